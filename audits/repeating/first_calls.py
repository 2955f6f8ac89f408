"""The first call of a process, held against later ones, natively and in the float64 lane."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping

import torch

from audits.causes import Cause
from audits.findings.confirming import REPEATS, Rows, failing, fails, key_of, opened
from audits.lanes.evaluation import Point
from audits.lanes.lifted_loss import lifted_loss
from audits.lanes.problem import differentiate
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.updates.update_rows import row

CHECK = "step.first-call"

_log = logging.getLogger(__name__)

#: Repeats of the whole gradient check where evaluations from one seed differ: of a gradient that is wrong every other
#: time, one in eight audits fails, the others leave it open.
UNSTEADY_REPEATS = 2

#: A parameter's gradient is compared with at least this share of the whole gradient's norm, below which it may be
#: rounding around zero (a bias before a BatchNorm).
FLOOR = 1e-2

#: Of two gradient norms of one float64 evaluation; beyond what reordered sums do, below any error that is found.
AGREED = 1e-6


def gradients_confirmed(subject: Subject, rows: Rows, repeat: Callable[[], Rows]) -> Rows:
    """Let a wrong gradient stand only where it is found again; the float64 lane's first call may be the only wrong one.

    Args:
        subject: the open subject.
        rows: of `check_gradients`.
        repeat: runs the gradient checks once more, with the same seed.
    """
    wrong = [r for r in rows if fails(r) and r.check == "gradient.finite-difference" and r.parameter]
    stopped = [r for r in rows if r.outcome is Outcome.INCONCLUSIVE and "does not reproduce it" in r.message]
    if not wrong and not stopped:
        return rows
    phases = {phase.name: phase for phase in subject.phases}
    asked = dict.fromkeys(r.phase or "" for r in (*wrong, *stopped))
    norms = {name: [_gradient_norms(subject, phases[name]) for _ in range(REPEATS)] for name in asked}
    if not stopped and all(_same_norm(r, found) for r in wrong for found in norms[r.phase or ""]):
        return rows
    steady = {name: all(_agree(found[0], other) for other in found) for name, found in norms.items()}
    second = repeat()
    again = failing(second) & {key_of(r) for r in wrong}
    if not all(steady.values()):  # of what is random, a failure that stands has failed every time
        for _ in range(UNSTEADY_REPEATS - 1):
            again = again & failing(repeat()) if again else again
    told = []
    for r in rows if not stopped else second:
        if r not in wrong or key_of(r) in again:
            told.append(r)
        elif steady[r.phase or ""]:
            told.append(opened(r, Cause.FIRST_CALL, f"{REPEATS} repeats did not show it"))
        else:
            told.append(
                opened(r, Cause.NOT_REPRODUCED, "evaluations from one seed differ, and some agree with the loss")
            )
    resolved = {r.phase for r in second if r.check == "gradient.finite-difference" and r.outcome.resolved}
    for r in {r.phase: r for r in stopped}.values():
        if r.phase in resolved and steady[r.phase or ""]:
            message = f"{r.message.partition(': an operator')[0]}, in the first evaluation alone"
            told.append(dataclasses.replace(r, parameter=None, module=None, numel=None, cause=Cause.FIRST_CALL,
                                            message=message))  # fmt: skip
    return told


def check_first_calls(subject: Subject) -> Rows:
    """Return one ``step.first-call`` row per phase: the process's first loss and gradient are what later ones are.

    The first evaluation is compared with `REPEATS` later ones, from the same weights and seed; the parameters that
    the forward itself wrote, too. Later ones that differ among themselves are random: then there is nothing to say.

    Args:
        subject: the open subject; left at its start.
    """
    if not subject.settings.wants_check(CHECK):
        return []
    rows = []
    for phase in subject.phases:
        try:
            rows += _first_call(subject, phase)
        except Exception:  # a loss or backward that raises is told by the checks that need it
            _log.debug("the first call was not compared", exc_info=True)
        finally:
            subject.reset()
    return rows


def _gradient_norms(subject: Subject, phase: LivePhase) -> dict[str, float] | None:
    try:
        with lifted_loss(subject, phase) as problem:
            point = Point(problem)
            point.restore()
            return dict(point.gradients.norms)
    except Exception:  # what cannot be evaluated is told by the check itself
        return None
    finally:
        subject.reset()


def _same_norm(r: ResultRow, norms: Mapping[str, float] | None) -> bool:
    found = None if norms is None else norms.get(r.parameter or "")
    if r.lane is not Lane.FLOAT64 or found is None or r.gradient_norm is None:
        return False
    return abs(found - r.gradient_norm) <= AGREED * r.gradient_norm


def _agree(one: Mapping[str, float] | None, other: Mapping[str, float] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(abs(value - other[name]) <= AGREED * max(value, other[name]) for name, value in one.items())


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """One evaluation of a phase's loss and gradient, in a few numbers a parameter."""

    loss: float
    gradients: dict[str, tuple[float, float]]
    #: Parameters that the forward wrote, by sum and norm before the backward.
    weights: dict[str, tuple[float, float]]


def _first_call(subject: Subject, phase: LivePhase) -> Rows:
    first = _as_first(subject, phase)
    later = [_evaluate(subject, phase)]
    dtypes = [p.dtype for p in phase.parameters.values() if p.is_floating_point()]
    autocast = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16}.get(subject.recipe.precision)
    # Half of the digits: kernels chosen anew after the first call reorder sums, no more.
    limit = max(torch.finfo(d).eps for d in (*dtypes, autocast) if d is not None) ** 0.5 if dtypes else 0.0
    apart = _apart(first, later[0], limit)
    message = f"the first loss and gradient of phase {phase.name!r} in this process are those of a second evaluation"
    if not apart:
        return [row(subject, CHECK, Outcome.PASS, message, phase=phase.name, threshold=limit)]
    while len(later) < REPEATS:
        later.append(_evaluate(subject, phase))
    if any(_apart(later[0], other, limit) for other in later[1:]):
        message = f"evaluations of phase {phase.name!r} from one seed differ: the model is not deterministic"
        return [row(subject, CHECK, Outcome.SKIPPED, message, phase=phase.name, cause=Cause.NOT_DETERMINISTIC)]
    return [
        row(subject, CHECK, Outcome.INCONCLUSIVE, f"{text}; {REPEATS} later evaluations from the same weights and seed "
            "agree", phase=phase.name, parameter=name, threshold=limit, cause=Cause.FIRST_CALL)
        for name, text in apart.items()
    ]  # fmt: skip


def _as_first(subject: Subject, phase: LivePhase) -> _Evaluation:
    """Evaluate; what opening the subject saw of the very first forward takes the place of this one's."""
    found = _evaluate(subject, phase)
    seen = subject.first_forwards.get(phase.name)
    if seen is None:
        return found
    loss = sum(w * value for (w, _), value in zip(subject.micro_batches(phase), seen.losses, strict=True) if w)
    return dataclasses.replace(found, loss=loss, weights=seen.weights)


def _evaluate(subject: Subject, phase: LivePhase) -> _Evaluation:
    subject.reset()
    with subject.autocast():
        loss = subject.loss(phase)
    weights = subject.fingerprints()
    gradients = differentiate(loss, phase.parameters)
    return _Evaluation(
        float(loss.detach()),
        {name: _norm_and_sum(g) for name, g in gradients.items() if g is not None},
        weights,
    )


def _norm_and_sum(gradient: torch.Tensor) -> tuple[float, float]:
    dense = gradient.detach()
    if dense.layout is not torch.strided:
        dense = dense.to_dense()
    wide = torch.complex128 if dense.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(dense, dtype=wide)), float(dense.sum(dtype=wide).abs())


def _apart(one: _Evaluation, other: _Evaluation, limit: float) -> dict[str | None, str]:
    """Return what differs between two evaluations: parameter (None for the loss) -> a sentence."""
    apart: dict[str | None, str] = {}
    for name, written in one.weights.items():
        if written != other.weights[name]:
            apart[name] = f"the process's first forward wrote other values into {name} than a later one does"
    whole = sum(g[0] ** 2 for g in other.gradients.values()) ** 0.5
    for name, (norm, total) in one.gradients.items():
        then = other.gradients.get(name, (0.0, 0.0))
        scale = max(norm, then[0], FLOOR * whole)
        # |sum g| is at most sqrt(n) ||g||: held against the norm it is the coarser of the two, and sees direction.
        if max(abs(norm - then[0]), abs(total - then[1])) > limit * scale and norm == norm:
            apart.setdefault(name, f"the process's first gradient of {name} has the norm {norm:.4g}, a later one "
                             f"{then[0]:.4g}")  # fmt: skip
    if not apart and abs(one.loss - other.loss) > limit * max(abs(one.loss), abs(other.loss)):
        apart[None] = f"the process's first loss is {one.loss:.6g}, a later one {other.loss:.6g}"
    return apart
