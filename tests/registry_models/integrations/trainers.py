"""Trainers and callbacks, right and wrong on purpose, that can be imported where versions are loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback


def _summed(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


class SharesTheCount(Trainer):
    """Right: divides the summed loss by the whole step's labels."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return _summed(outputs, inputs["labels"]) / num_items_in_batch


class WeighsClasses(Trainer):
    """Right, with an attribute of its own: every label counts by its class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.class_weights = torch.linspace(0.5, 1.5, 64)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(**inputs)["logits"][:, :-1].flatten(0, 1)
        weights = self.class_weights.to(logits)
        targets = inputs["labels"][:, 1:].flatten()
        return nn.functional.cross_entropy(logits, targets, weight=weights, reduction="sum") / num_items_in_batch


class AddsATerm(Trainer):
    """Right: the library's loss and a penalty by the same count."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        mask = inputs["labels"].ne(-100)
        return loss + 1e-3 * (outputs["logits"].square().mean(-1) * mask).sum() / num_items_in_batch


def counted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A right ``compute_loss_func``."""
    return _summed(outputs, labels) / num_items_in_batch


class IgnoresTheCount(Trainer):
    """Wrong: the mean of each micro-batch, which nobody divides by their number."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs)["loss"]


class MeanOfMeans(IgnoresTheCount):
    """Wrong over unequal numbers of labels: the mean of the micro-batches' means."""

    loss_is_scaled_for_ga = False


class LeavesEval(Trainer):
    """Wrong: switches dropout off to look at something, and never on again."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        model.eval()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class NeverClips(Trainer):
    """Wrong: measures the norm and does not clip."""

    def _clip_grad_norm(self, model: Any) -> Any:
        return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


class ClipsByValue(Trainer):
    """Wrong: clips by value where ``max_grad_norm`` says by norm."""

    def _clip_grad_norm(self, model: Any) -> Any:
        nn.utils.clip_grad_value_(model.parameters(), self.args.max_grad_norm / 10)
        return torch.tensor(0.0)


class DropsARow(Trainer):
    """Wrong: what was cut away while debugging is still cut away."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return super().training_step(model, {key: value[:1] for key, value in inputs.items()}, num_items_in_batch)


class CountsSteps(TrainerCallback):
    """Right: only looks."""

    def __init__(self) -> None:
        self.steps = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


class ZeroesGradients(TrainerCallback):
    """Wrong: clears the head's gradient before the step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].lm_head.weight.grad = None


class StepsAgain(TrainerCallback):
    """Wrong: steps the optimizer that the Trainer has stepped."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].step()


class SchedulesAgain(TrainerCallback):
    """Wrong: steps the scheduler that the Trainer has stepped."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["lr_scheduler"].step()


class ClipsWeights(TrainerCallback):
    """Wrong unless it is declared: writes weights after the step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].lm_head.weight.mul_(0.99)
