"""A parameter without a gradient: unused by the batch, or cut off from a loss that depends on it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from audits.causes import Cause
from audits.devices import Draws
from audits.live.ownership import holders
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.compare import rms, to_double

#: Size of the displacement, relative to the tensor's rms (absolute for a tensor of zeros).
DISPLACEMENT = 0.1


def cut_graph_rows(subject: Subject, rows: Iterable[ResultRow], seed: int) -> Iterator[ResultRow]:
    """Yield the rows, with those of parameters whose graph is cut turned into failures.

    A warning of ``step.gradient-present`` says that neither the step nor the loss has a gradient for a parameter. If
    the loss changes when the parameter does, autograd was cut off (detach, no_grad, .item(), .data) on the way.
    """
    rows = list(rows)
    suspects: dict[str, list[str]] = {}
    held = holders(subject)
    for r in rows:
        absent = r.check == "step.gradient-present" and r.outcome is Outcome.WARN and r.gradient_norm is None
        if absent and r.parameter and len(held[r.parameter]) == 1 and not _declared(subject, r.parameter):
            # What another phase holds too is a matter of update.isolation: this phase detaches it on purpose.
            suspects.setdefault(r.phase or "", []).append(r.parameter)
    cut = {
        (phase.name, name)
        for phase in subject.phases
        if phase.name in suspects
        for name in _depends(subject, phase, list(dict.fromkeys(suspects[phase.name])), seed)
    }
    for r in rows:
        if r.check == "step.gradient-present" and r.outcome is Outcome.WARN and (r.phase, r.parameter) in cut:
            message = (f"{r.parameter} has no gradient at the optimizer of {r.phase!r}, yet the loss depends on it:"
                       " the graph is cut between them")  # fmt: skip
            yield dataclasses.replace(r, outcome=Outcome.FAIL, message=message, cause=Cause.CUT_GRAPH,
                                      where_to_look="detach, no_grad, .item() or .data before the loss.")  # fmt: skip
        else:
            yield r


def _declared(subject: Subject, name: str) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in subject.recipe.stop_gradient)


def _depends(subject: Subject, phase: LivePhase, names: list[str], seed: int) -> list[str]:
    """Return those of the parameters that the phase's loss depends on."""
    base = _loss(subject, phase, (), seed)
    if base != _loss(subject, phase, (), seed) or base == _loss(subject, phase, names, seed):
        return []  # not repeatable, or independent of all of them
    return names if len(names) == 1 else [name for name in names if base != _loss(subject, phase, (name,), seed)]


def _loss(subject: Subject, phase: LivePhase, displaced: Iterable[str], seed: int) -> float:
    subject.reset(seed=seed)
    draws = Draws(seed)
    for name in displaced:
        parameter = subject.parameters[name]
        size = rms(to_double(parameter)) or 1.0
        noise = torch.randn(parameter.shape, **draws.on(parameter.device)).to(parameter.dtype)
        parameter.data.add_(noise * DISPLACEMENT * size)
    with subject.autocast():
        return float(subject.loss(phase).detach())
