"""EMA shadows: their parameters move by the declared decay towards the weights after the step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from audits.causes import Cause
from audits.checks.buffers import AVERAGE
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.compare import rms, to_double
from audits.updates.record.shadow_modules import averaged_at, shadows_of, tensors_of
from audits.updates.update_rows import row


def ema_rows(subject: Subject, before: dict[str, torch.Tensor], number: int) -> Iterator[ResultRow]:
    """Yield one ``buffers.ema`` row per shadow parameter declared by ``expect["ema"]`` or held by an `AveragedModel`.

    ``expect["ema"]`` maps a shadow's path prefix to ``{"source": prefix, "decay": d}``;
    ``shadow' = d shadow + (1 - d) source'``, the source after the step, or before it with ``"when": "before"``. An
    `AveragedModel` inside the model averages equally, ``shadow' = shadow + (source' - shadow) / (n + 1)``, unless its
    decay is declared or torch's own.
    """
    check = "buffers.ema"
    now = tensors_of(subject.model)
    for following in shadows_of(subject):
        pairs = following.pairs(now)
        if not pairs:
            message = (f"expect['ema'] names {following.prefix!r} as a shadow of {following.source!r}: no tensors "
                       "match")  # fmt: skip
            yield row(subject, check, Outcome.INCONCLUSIVE, message, cause=Cause.MATCHES_NOTHING)
        keep = following.keep(subject, before) if pairs else 0.0
        for shadow, weight in pairs:
            if weight not in subject.parameters or not now[shadow].is_floating_point():
                continue
            followed = before if following.lagging else now
            start, target, moved = to_double(before[shadow]), to_double(followed[weight]), to_double(now[shadow])
            # On a device an `AveragedModel` divides 1 by its count there, an integer, in float32.
            equal = following.decay is None and averaged_at(subject.model, following.prefix) is not None
            slack = torch.finfo(torch.float32).eps * (1.0 - keep) * rms(target - start) if equal else 0.0
            error = distance(moved, keep * start + (1.0 - keep) * target, start, now[shadow].dtype, slack)
            met = error <= AVERAGE.value
            message = f"{shadow} moved towards {weight} with decay {keep:g} in step {number}"
            if not met:
                when = "before" if following.lagging else "after"
                message = f"{shadow} should be {keep:g} of itself and {1 - keep:g} of {weight} {when} step {number}"
                message += how_it_moved(start, target, to_double(before[weight]), moved, keep)
            yield row(subject, check, Outcome.PASS if met else Outcome.FAIL, message, step=number, error=error,
                      parameter=shadow if shadow in subject.parameters else None, threshold=AVERAGE.value)  # fmt: skip


def distance(
    moved: torch.Tensor, expected: torch.Tensor, start: torch.Tensor, dtype: torch.dtype, slack: float = 0.0
) -> float:
    """Return ``(rms(moved - expected) - slack) / (eps (rms(expected) + rms(start)))``, eps of the shadow's dtype."""
    scale = torch.finfo(dtype).eps * (rms(expected) + rms(start))
    off = max(0.0, rms(moved - expected) - slack)
    return off / scale if scale else (float("inf") if off else 0.0)


def how_it_moved(start: torch.Tensor, target: torch.Tensor, old: torch.Tensor, moved: torch.Tensor, keep: float) -> str:
    """Return what a shadow did instead, as the end of a sentence; empty where nothing simple explains it."""
    if torch.equal(moved, start):
        return ": it did not move"
    if rms(moved - (keep * start + (1.0 - keep) * old)) <= 1e-6 * rms(start) and not torch.equal(old, target):
        return ": it averaged the weights from before the step; declare 'when': 'before' if that is meant"
    gap = float(((target - start) ** 2).sum())
    if gap:
        share = float(((moved - start) * (target - start)).sum()) / gap
        return f": it moved {share:.4g} of the way (decay {1 - share:.6g})"
    return ""
