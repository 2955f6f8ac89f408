"""A model of many heads, each trained by an optimizer of its own: wrong ones and their correct twins, importable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from audits import Phase, Recipe
from tests.audits.updates import live_optimizers as live
from tests.wrong_on_purpose.updates.faults_subclasses import MyAdamW, MyRMSprop, MySGD
from tests.wrong_on_purpose.updates.foreign import Foreign

Parameters = list[nn.Parameter]


class OwnAdamW(MyAdamW):
    """AdamW with state of its own that can be loaded: torch's Adam looks for ``step`` in it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # type: ignore[misc]


class OwnRMSprop(MyRMSprop):
    """RMSprop, likewise."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # type: ignore[misc]


class DecayCoupled(OwnAdamW):
    mistake = "decay coupled"


class NotCorrected(OwnAdamW):
    mistake = "bias not corrected"


class FirstGroup(OwnAdamW):
    mistake = "first group's options"


class TailSkipped(OwnAdamW):
    mistake = "tail skipped"


class EpsUnderTheRoot(OwnRMSprop):
    mistake = "eps under the root"


class NesterovIgnored(MySGD):
    mistake = "nesterov ignored"


class ByShape(torch.optim.SGD):
    """SGD with momentum, which files its buffers by shape: tensors of one shape share one."""

    def key_of(self, p: nn.Parameter) -> Any:
        return p.shape

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        shared: dict[Any, torch.Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    old = shared.get(self.key_of(p), self.state[p].get("momentum_buffer"))
                    new = p.grad.clone() if old is None else group["momentum"] * old + p.grad
                    self.state[p]["momentum_buffer"] = shared[self.key_of(p)] = new
                    p.sub_(group["lr"] * new)


class ByTensor(ByShape):
    """The same filed by tensor, as it should be."""

    def key_of(self, p: nn.Parameter) -> Any:
        return p


class Switched(torch.optim.AdamW):
    """AdamW whose ``symmetric`` argument, which is in no group, makes it step by the sign of the first moment."""

    def __init__(self, params: Any, lr: float = 1e-3, *, symmetric: bool = False) -> None:
        super().__init__(params, lr=lr)
        self.symmetric = symmetric

    def step(self, closure: Any = None) -> Any:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        found = super().step(closure)
        with torch.no_grad():
            for p, old in zip((p for g in self.param_groups for p in g["params"]), before, strict=True):
                if self.symmetric:
                    p.copy_(old - self.param_groups[0]["lr"] * self.state[p]["exp_avg"].sign())
        return found


def _in_groups(cls: Any, **options: Any) -> Callable[[Parameters], torch.optim.Optimizer]:
    def make(held: Parameters) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(
            [{"params": held[:1]}, {"params": held[1:], "lr": 3.0 * options["lr"]}], **options
        )
        return optimizer

    return make


def _plain(cls: Any, **options: Any) -> Callable[[Parameters], torch.optim.Optimizer]:
    def make(held: Parameters) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(held, **options)
        return optimizer

    return make


def _hooked(pre: Any = None, post: Any = None) -> Callable[[Parameters], torch.optim.Optimizer]:
    def make(held: Parameters) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(held, lr=1e-2)
        if pre is not None:
            optimizer.register_step_pre_hook(pre)
        if post is not None:
            optimizer.register_step_post_hook(post)
        return optimizer

    return make


#: Fault -> (the wrong optimizer, its correct twin, the check that must fail).
PAIRS: dict[str, tuple[Any, Any, str]] = {
    "decay_coupled": (_plain(DecayCoupled, lr=1e-3, weight_decay=0.1), _plain(OwnAdamW, lr=1e-3, weight_decay=0.1),
                      "update.rule"),
    "bias_not_corrected": (_plain(NotCorrected, lr=1e-3), _plain(OwnAdamW, lr=1e-3), "update.rule"),
    "state_mixed": (_plain(ByShape, lr=0.1, momentum=0.9), _plain(ByTensor, lr=0.1, momentum=0.9), "update.rule"),
    "options_of_the_first_group": (_in_groups(FirstGroup, lr=1e-3), _in_groups(OwnAdamW, lr=1e-3), "update.rule"),
    "nesterov_ignored": (_plain(NesterovIgnored, lr=0.1, momentum=0.9, nesterov=True),
                         _plain(MySGD, lr=0.1, momentum=0.9, nesterov=True), "update.rule"),
    "tail_skipped": (_plain(TailSkipped, lr=1e-3), _plain(OwnAdamW, lr=1e-3), "update.rule"),
    "eps_under_the_root": (_plain(EpsUnderTheRoot, lr=1e-3, eps=1e-6), _plain(OwnRMSprop, lr=1e-3, eps=1e-6),
                           "update.rule"),
    "hook_clamps": (_hooked(post=live.clamps_weights), _hooked(post=live.looks_on), "update.outside-step"),
    "hook_takes_signs": (_hooked(pre=live.takes_signs), _hooked(pre=live.looks_on), "step.gradient"),
    "argument_changes_the_rule": (_plain(Switched, symmetric=True), _plain(Switched), "update.rule"),
    "no_rule_first_group": (_in_groups(Foreign, lr=1e-3, mistake="first group's options for all"),
                            _in_groups(Foreign, lr=1e-3), "optimizer.invariants"),
    "no_rule_count_lost": (_plain(Foreign, mistake="count outside the state"), _plain(Foreign),
                           "optimizer.invariants"),
}  # fmt: skip


class Heads(nn.Module):
    """One small network for each fault; two of its matrices and two of its vectors are alike in shape."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for name in PAIRS})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: head(x) for name, head in self.heads.items()}


def losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of all heads' losses: each optimizer's own parameters hear of one of them."""
    return torch.stack([F.cross_entropy(out, batch["y"]) for out in model(batch["x"]).values()]).sum()


def trained(*, wrong: bool, steps: int = 2) -> tuple[Heads, Recipe]:
    """Return the model after some steps of all optimizers, and its recipe: a phase for each fault."""
    torch.manual_seed(0)
    model, batch = Heads(), {"x": torch.randn(8, 6), "y": torch.arange(8) % 6}
    optimizers = {
        name: (bad if wrong else good)(list(model.heads[name].parameters())) for name, (bad, good, _) in PAIRS.items()
    }
    for _ in range(steps):
        model.zero_grad()
        losses(model, batch).backward()
        for optimizer in optimizers.values():
            optimizer.step()
    phases = [Phase(name, loss=losses, optimizer=optimizer) for name, optimizer in optimizers.items()]
    return model, Recipe.capture(model, batch=batch, phases=phases)
