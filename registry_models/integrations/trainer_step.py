"""A training step and a loss that are transformers' own: a real ``Trainer`` takes one optimizer step.

Clipping, accumulation and its normalisation, autocast, loss scaling and the schedule are the library's code, and what
a subclass or a callback changes is the user's. The loss is written down here once more, independently: the mean over
the labels of a micro-batch, so that what the Trainer makes of several is judged.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError
from audits.live.subject import IGNORED_LABEL
from registry_models.integrations.own_objects import missing_of
from registry_models.integrations.surroundings import (
    ProcessState,
    nothing_left_behind,
    plain_step,
    prepared_for_a_while,
    scale_with,
)
from registry_models.integrations.trainer_parts import TrainerParts

#: Key of a stored micro-batch with a mask of the labels that count; the Trainer never sees it.
COUNTED = "labels_that_count"


class TrainerStep:
    """``(model, batch, context) -> None``: builds a Trainer and lets its own loop take one optimizer step.

    Args:
        trainer: see `TrainerParts`, as the others are.
        options: likewise.
        callbacks: likewise.
        loss_function: likewise.
    """

    def __init__(
        self,
        trainer: Mapping[str, Any],
        options: Mapping[str, Any],
        callbacks: Sequence[Mapping[str, Any]] = (),
        loss_function: Any = None,
    ) -> None:
        self._parts = TrainerParts(trainer, options, callbacks, loss_function)
        self.__qualname__ = "Trainer.train"

    def __call__(self, model: nn.Module, batch: Any, context: Any) -> None:
        """Take one optimizer step on the micro-batches.

        Raises:
            RecipeError: the user's own code misses something that could not be stored.
        """
        batches = [_as_loaded(each) for each in (batch if isinstance(batch, list) else [batch])]
        with nothing_left_behind() as folder, prepared_for_a_while(model):
            optimizers = (context.optimizer, context.scheduler or _Constant(context.optimizer))
            trainer = self._parts.build(model, context.device, folder, optimizers)
            if context.scaler.is_enabled():
                scale_with(trainer.accelerator, context.scaler)
            trainer.get_train_dataloader = lambda: _Loader(batches)
            trainer.create_optimizer = lambda *_, **__: trainer.optimizer
            trainer.create_scheduler = lambda *_, **__: trainer.lr_scheduler
            trainer.create_optimizer_and_scheduler = lambda *_, **__: None
            with plain_step(context.optimizer), missing_named(self._parts):
                trainer.train()

    def where_to_look(self, check: str) -> str | None:
        """Return which of the user's own methods, else which options, decide what a check judges."""
        return self._parts.where_to_look(check)


class TrainerLoss:
    """``(model, batch) -> scalar``: the mean loss over a micro-batch's labels, as the Trainer means it.

    ``L = S / n`` with S the model's summed loss over the n labels that count; with label smoothing e over V classes
    ``L = (1 - e) sum(-log p_label) / n + e sum(-log p) / (n V)``. A loss of the user's own is asked instead, and told
    n as ``num_items_in_batch``.

    Args:
        counts: whether the model's loss is told ``num_items_in_batch``.
        shifted: whether the first label of every row is no target.
        smoothing: ``label_smoothing_factor``.
        noise: ``neftune_noise_alpha``, which the Trainer's hook reads off the embedding.
        trainer: a Trainer with a loss of its own, as the arguments of `TrainerStep`.
    """

    def __init__(
        self,
        counts: bool,
        shifted: bool,
        smoothing: float = 0.0,
        noise: float | None = None,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        self._counts, self._shifted, self._smoothing, self._noise = counts, shifted, smoothing, noise
        self._parts = None if trainer is None else TrainerParts(**trainer)
        self._made: tuple[Any, ProcessState] | None = None
        self.__qualname__ = "the Trainer's loss"

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss of one micro-batch."""
        inputs = _as_loaded(batch)
        labels = inputs.get("labels")
        if self._noise is not None:
            embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
            embeddings.neftune_noise_alpha = self._noise
        count = count_of(inputs, self._shifted) if self._counts or self._parts is not None else None
        with _autocast_in_forward(model):
            if self._parts is not None:
                return self._users(model, inputs, count)
            told = {"num_items_in_batch": count} if self._counts and count is not None else {}
            if self._smoothing and labels is not None:
                given = {key: value for key, value in inputs.items() if key != "labels"}
                return self._smoothed(model(**given, **told), labels, count)
            output = model(**inputs, **told)
        return output["loss"] if isinstance(output, Mapping) else output[0]  # type: ignore[no-any-return]

    def _smoothed(self, output: Any, labels: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
        logits = output["logits"] if isinstance(output, Mapping) else output[0]
        if self._shifted:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        surprise = -nn.functional.log_softmax(logits, dim=-1)
        ignored = labels.eq(IGNORED_LABEL)
        number = (~ignored).sum() if count is None else count
        of_label = surprise.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(ignored, 0.0).sum()
        of_all = surprise.sum(-1).masked_fill(ignored, 0.0).sum()
        mean = of_label / number
        return (1 - self._smoothing) * mean + self._smoothing * of_all / (number * surprise.shape[-1])  # type: ignore[no-any-return]

    def _users(self, model: nn.Module, inputs: dict[str, Any], count: torch.Tensor | None) -> torch.Tensor:
        assert self._parts is not None
        if self._made is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            with nothing_left_behind() as folder:
                made = self._parts.build(model, device, folder)
                self._made = made, ProcessState.now()
        trainer, state = self._made
        trainer.model = trainer.model_wrapped = model
        told = count if trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None else None
        with state.lent(), missing_named(self._parts):
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=told)
        if not isinstance(loss, torch.Tensor):
            raise RecipeError(f"{self._parts.whose_loss} returned {type(loss).__name__}, no loss")
        return loss


def counted_labels(batch: Mapping[str, Any], shifted: bool) -> torch.Tensor | None:
    """Return a mask of the labels that count in a micro-batch; None where it has none."""
    if isinstance(given := batch.get("shift_labels"), torch.Tensor):
        return given.ne(IGNORED_LABEL)
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        return None
    return (labels[..., 1:] if shifted and labels.dim() else labels).ne(IGNORED_LABEL)


def count_of(batch: Mapping[str, Any], shifted: bool) -> torch.Tensor | None:
    """Return the number of labels that count, as the Trainer hands it over."""
    mask = counted_labels(batch, shifted)
    return None if mask is None else mask.sum() / 1


@contextlib.contextmanager
def missing_named(parts: Any) -> Iterator[None]:
    """Say of an attribute that is not there that it could not be stored.

    Raises:
        RecipeError: the user's code asks for one.
    """
    try:
        yield
    except AttributeError as error:
        what = missing_of(error, parts.described)
        if what is None:
            raise
        raise RecipeError(
            f"the training step needs {what}, which could not be stored with the recipe: keep plain values, small "
            "tensors and importable functions there, or attach a recipe with a step of your own"
        ) from error


def _as_loaded(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != COUNTED}


class _Loader:
    """The recipe's micro-batches in order, as a data loader."""

    batch_size = 1

    def __init__(self, batches: list[Any]) -> None:
        self.dataset = batches

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


class _Constant:
    """A schedule for a Trainer whose recipe declares none."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def step(self, *_: Any) -> None:
        """Do nothing."""

    def get_last_lr(self) -> list[float]:
        """Return the rates as they are."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


@contextlib.contextmanager
def _autocast_in_forward(model: nn.Module) -> Iterator[None]:
    """Let autocast end with the model's forward, as accelerate does: what follows runs in float32."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if "_original_forward" in vars(model):  # prepared by accelerate already
            yield
            return
        with prepared_for_a_while(model):
            convert_outputs_to_fp32 = importlib.import_module("accelerate.utils").convert_outputs_to_fp32
            vars(model)["forward"] = convert_outputs_to_fp32(torch.autocast(device, dtype=dtype)(model.forward))
            yield
