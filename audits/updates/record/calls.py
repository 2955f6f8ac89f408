"""What was recorded of one `optimizer.step`: gradients and weights before it, weights and state after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from audits.live.subject import LivePhase
from audits.recipe.moulds import declared_hook
from audits.structures import map_tensors
from audits.updates.record.hook_listener import HookWrite
from audits.updates.record.shelf import Shelf, held

Tensors = dict[str, torch.Tensor]


@dataclass
class Call:
    """One `optimizer.step` of a phase.

    Attributes:
        phase: the phase.
        step: number of the training step, from 1.
        before: the weights of every parameter of the model before it.
        after: the weights of those that it changed.
        gradients: what the optimizer received, unscaled; None where it received none. These, and the weights, wait in
            host memory (`Shelf`).
        options: the options of each held parameter's group.
        state_after: the optimizer's state by parameter; let go of when it is judged, since it may be the very one
            that the optimizer goes on with.
        training: mode of every module at its last forward before this call.
        evaluations: for an optimizer that calls its closure: the weights, loss and gradients of every evaluation.
        tensor_rate: whether a learning rate is kept in a tensor, in float32.
        handed: the gradients before anything of the user's ran at the optimizer: a hook, a ``step`` of its own.
        writes: what those wrote before the rule ran, and to the state since the rule ran last.
        state_before: the state before it, where a declared hook wrote there; None elsewhere.
        backward: torch's number of the backward inside which it happened; -1 outside of any.
        phase_expect: what the recipe declares (`expect`).
        note: whatever the reference side attached before it.
    """

    phase: LivePhase
    step: int
    before: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor | None]
    options: dict[str, dict[str, Any]]
    after: Mapping[str, torch.Tensor] = field(default_factory=dict)
    state_after: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: list[tuple[Tensors, float, Mapping[str, torch.Tensor | None]]] = field(default_factory=list)
    note: Any = None
    phase_expect: Mapping[str, Any] = field(default_factory=dict)
    tensor_rate: bool = False
    backward: int = -1
    handed: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    writes: list[HookWrite] = field(default_factory=list)
    state_before: Mapping[str, dict[str, Any]] | None = None

    @property
    def received(self) -> Mapping[str, torch.Tensor | None]:
        """The gradients that the training step handed over: before the hooks that are declared, after the others."""
        if not self.writes:
            return self.gradients
        meant = self.phase_expect
        changed = {n: [w for w in self.writes if w.what == "gradient" and w.parameter == n] for n in self.handed}
        return {
            name: self.handed[name]
            if changed.get(name) and all(declared_hook(write.hook, meant) for write in changed[name])
            else gradient
            for name, gradient in self.gradients.items()
        }

    @property
    def in_backward(self) -> bool:
        """Whether it happened in a hook of a backward, where some gradients are not there yet."""
        return self.backward != -1

    def moved(self, name: str) -> torch.Tensor:
        """Return the weights after the call."""
        return self.after[name] if name in self.after else self.before[name]


@dataclass(frozen=True)
class OutsideWrite:
    """A parameter that changed while no optimizer's rule was at work; ``hook`` is the user's that wrote it, if any."""

    parameter: str
    step: int
    before_phase: str | None
    hook: str | None = None
    kind: str | None = None


def received(call: Call) -> set[str]:
    """Return the parameters that received a gradient."""
    return {name for name in call.gradients if held(call.gradients, name) is not None}


def join(earlier: Call, later: Call) -> None:
    """Add to a call what another of the same backward did to parameters that had no gradient yet."""
    for name in received(later):
        hold(earlier.gradients, later.gradients, name)
        hold(earlier.before, later.before, name)
    for name in later.after:
        hold(earlier.after, later.after, name)
    for name in later.state_after:
        hold(earlier.state_after, later.state_after, name)


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options as plain values; an lr kept in a tensor becomes a number."""
    return {
        key: map_tensors(value, lambda t: t.item() if t.numel() == 1 else t.detach().clone())  # type: ignore[arg-type, return-value]
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def hold(shelf: Any, other: Any, name: str) -> None:
    """Hold under a name what another shelf holds there."""
    assert isinstance(shelf, Shelf)
    assert isinstance(other, Shelf)
    shelf.put(name, other.raw(name))


def snapshot(parameters: Mapping[str, torch.Tensor]) -> Tensors:
    """Return clones of the values."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; NaN equals itself, as nothing wrote there."""
    one, other = one.detach(), other.detach()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    missing = one.isnan()
    return bool(missing.any()) and bool(((one == other) | (missing & other.isnan())).all())
