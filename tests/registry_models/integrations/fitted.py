"""Lightning modules and callbacks, right and wrong on purpose, that can be imported where versions are loaded."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import nn

from tests.registry_models.lightning_modules import Classifier


class Plain(Classifier):
    """Right: no dropout, a schedule by step, a larger rate."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class StepsTwice(Plain):
    """Wrong: an ``optimizer_step`` that steps, and steps again."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        optimizer.step()


class NeverClips(Plain):
    """Wrong: takes clipping over and does none."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None,
                                    gradient_clip_algorithm: Any = None) -> None:  # fmt: skip
        return None


class ClipsByValue(Plain):
    """Wrong: clips by value where the Trainer's flags say by norm."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None,
                                    gradient_clip_algorithm: Any = None) -> None:  # fmt: skip
        nn.utils.clip_grad_value_(self.parameters(), 0.001)


class SchedulesTwice(Plain):
    """Wrong: an ``lr_scheduler_step`` that steps twice."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()
        scheduler.step()


class LeavesEval(Classifier):
    """Wrong: in eval mode since a look at something when training began."""

    def on_train_start(self) -> None:
        self.eval()


class ZeroesGradients(Plain):
    """Wrong: drops a layer's gradient before the step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.net[0].weight.grad = None


class Detaches(Plain):
    """Wrong: the first layer learns nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net[2](self.net[1](self.net[0](x)).detach()) + 0 * self.net(x), y)


class AddsUp(Plain):
    """Wrong: undoes Lightning's division by ``accumulate_grad_batches``."""

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss * self.trainer.accumulate_grad_batches, *args, **kwargs)


class ShrinksWeights(Plain):
    """Wrong unless it is declared: writes weights after the step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.net[2].weight.mul_(0.99)


class ByHand(lightning.LightningModule):
    """Right: manual optimization with one optimizer, clipped by hand."""

    clears = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        if self.clears:
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=10.0, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class NeverClears(ByHand):
    """Wrong: ``optimizer.zero_grad()`` is forgotten."""

    clears = False


class Adversaries(lightning.LightningModule):
    """Right: the critic's gradients are switched off while the generator learns."""

    toggles = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(2, 4)
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.critic(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        of_generator, of_critic = self.optimizers()
        if self.toggles:
            self.toggle_optimizer(of_generator)
        fake = self.generator(real[:, :2])
        self.manual_backward(nn.functional.softplus(-self(fake)).mean())
        of_generator.step()
        of_generator.zero_grad()
        if self.toggles:
            self.untoggle_optimizer(of_generator)
        fake = self.generator(real[:, :2]).detach()
        self.manual_backward(nn.functional.softplus(-self(real)).mean() + nn.functional.softplus(self(fake)).mean())
        of_critic.step()
        of_critic.zero_grad()

    def configure_optimizers(self) -> Any:
        generator = torch.optim.SGD(self.generator.parameters(), lr=1e-2)
        return [generator, torch.optim.SGD(self.critic.parameters(), lr=1e-2)], []


class NeverToggles(Adversaries):
    """Wrong: the generator's loss reaches the critic's step."""

    toggles = False


class Counts(lightning.Callback):
    """Right: only looks."""

    def __init__(self) -> None:
        self.steps = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1


class Doubles(lightning.Callback):
    """Wrong: scales the gradients after every backward."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.grad.mul_(2)
