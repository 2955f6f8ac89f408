"""How far one step moves each weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from audits.checks.health import HARMFUL_MOVE, OUTPUT_SHARE
from audits.health.health_rows import health_row
from audits.live.subject import LivePhase, Subject
from audits.outcomes import ResultRow, finite

#: Optimizers whose step is proportional to the gradient; of others a large norm says nothing.
PROPORTIONAL = (torch.optim.SGD, torch.optim.ASGD)
#: Weights of a smaller rms (zero-initialised scales and factors) have no meaningful update ratio.
TINY_WEIGHT = 1e-3


@dataclass(frozen=True)
class Move:
    """What one step does to a weight: both norms, and its effect on the output of a layer of this shape."""

    weight: float
    change: float
    output: float
    tiny: bool
    proportional: bool

    @property
    def ratio(self) -> float:
        """By how much of itself the weight moves."""
        return self.change / self.weight if self.weight else math.inf


def harms(phase: LivePhase, move: Move | None) -> bool:
    """Whether a large gradient does harm: nothing bounds the step, and the step is large."""
    if move is None or move.tiny or not move.proportional or phase.recipe.clip_grad_norm is not None:
        return False
    return move.ratio > HARMFUL_MOVE.value


def moves_of(phase: LivePhase, gradients: dict[str, torch.Tensor | None]) -> dict[str, Move]:
    """Return what one step of the phase's optimizer on these gradients does to each weight; nothing if it cannot step.

    Of an optimizer that normalises its step (Adam and its kin) a large gradient tells nothing about it.
    """
    optimizer = phase.build_optimizer()
    if isinstance(optimizer, torch.optim.LBFGS):
        return {}
    before = {name: parameter.detach().clone() for name, parameter in phase.parameters.items()}
    for name, parameter in phase.parameters.items():
        gradient = gradients[name]
        parameter.grad = None if gradient is None else gradient.clone()
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError):
        return {}
    found, proportional = {}, isinstance(optimizer, PROPORTIONAL)
    for name, parameter in phase.parameters.items():
        count = max(parameter.numel(), 1) ** 0.5
        weight = float(before[name].abs().double().square().sum() ** 0.5)
        change = float((parameter.detach() - before[name]).abs().double().square().sum() ** 0.5)
        fan = max(parameter[0].numel(), 1) if parameter.dim() > 1 and parameter.numel() else 1
        found[name] = Move(weight, change, change / count * fan**0.5, weight < TINY_WEIGHT * count, proportional)
    return found


def update_rows(subject: Subject, phase: LivePhase, moves: dict[str, Move]) -> Iterator[ResultRow]:
    """Yield ``health.update-ratio``, one row a weight.

    Args:
        subject: the model under audit.
        phase: the phase.
        moves: what its step does to each weight.
    """
    limit = subject.settings.update_ratio
    for name, move in moves.items():
        parameter = phase.parameters[name]
        if parameter.dim() < 2 or not parameter.numel() or move.tiny:
            continue
        bad = finite(move.ratio) is None or (move.ratio > limit and move.output > OUTPUT_SHARE.value)
        message = f"{name}: a step moves it by {move.ratio:.3g} of itself"
        if bad:
            message += f" and the outputs of unit inputs by {move.output:.3g}"
        yield health_row(subject, "health.update-ratio", bad, message, phase=phase.name, parameter=name,
                   measured=finite(move.ratio), threshold=limit, parameter_norm=finite(move.weight),
                   update_norm=finite(move.change))  # fmt: skip
