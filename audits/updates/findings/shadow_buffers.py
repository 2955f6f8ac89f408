"""Buffers of EMA shadows (BatchNorm's running statistics above all): copied, averaged, or moved by their own forward.

Libraries differ: torch's `AveragedModel` copies buffers or, with ``use_buffers``, averages them; timm's ModelEma
averages the whole state_dict; a teacher in train mode moves its own statistics. Each is right; to leave them behind
is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from audits.causes import Cause
from audits.checks.buffers import AVERAGE
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.compare import to_double
from audits.updates.findings.buffers import follows_torch
from audits.updates.findings.shadows import distance, how_it_moved
from audits.updates.record.buffer_watch import BufferWatch
from audits.updates.record.shadow_modules import Shadow, shadows_of, tensors_of
from audits.updates.update_rows import row
from audits.wording import module_label

_CURE = "copy or average the buffers together with the weights"


@dataclass
class _Buffer:
    """One buffer of a shadow through one training step."""

    shadow: str
    weight: str
    before: torch.Tensor
    now: torch.Tensor
    #: What the source was before the step, and what the step's forwards made of it.
    old: torch.Tensor
    sources: list[torch.Tensor]
    #: What the shadow's own forward in train mode makes of it, where that is known.
    own: torch.Tensor | None
    #: The module that holds it, and whether it ran in the step.
    module: nn.Module
    ran: bool
    ways: dict[str, float] = field(default_factory=dict)

    @property
    def moved(self) -> bool:
        return not torch.equal(self.now, self.before)

    @property
    def source_moved(self) -> bool:
        return any(not torch.equal(source, self.old) for source in self.sources)

    @property
    def persistent(self) -> bool:
        return self.shadow.rpartition(".")[2] not in self.module._non_persistent_buffers_set


def shadow_buffer_rows(
    subject: Subject, before: dict[str, torch.Tensor], watch: BufferWatch, number: int
) -> Iterator[ResultRow]:
    """Yield one ``buffers.ema`` row per buffer of a shadow.

    A buffer passes when it is its source's value, ``keep`` of itself and ``1 - keep`` of that value, or what its own
    module's forward made of it. One that stays where it was while its source moves fails where the shadow is declared,
    and warns where it was only found: whoever declares a shadow says that it follows.

    Args:
        subject: the model after the step.
        before: parameters and buffers before it.
        watch: what was followed during it.
        number: of the training step.
    """
    now = tensors_of(subject.model)
    for following in shadows_of(subject):
        judged: list[_Buffer] = []
        for shadow, weight in following.pairs(now):
            if weight not in subject.parameters and shadow not in subject.parameters:
                buffer = _buffer(subject, shadow, weight, before, now, watch)
                _find_ways(buffer, following.keep(subject, before), watch)
                yield _row(subject, following, buffer, number, following.keep(subject, before))
                judged.append(buffer)
        yield from _inconsistent(subject, following, judged, number)


def _buffer(
    subject: Subject, shadow: str, weight: str, before: dict[str, torch.Tensor], now: dict[str, torch.Tensor],
    watch: BufferWatch,
) -> _Buffer:  # fmt: skip
    path, _, name = shadow.rpartition(".")
    own = None
    statistics = watch.statistics.get(path)
    if statistics is not None and statistics.forwards:
        made = {"running_mean": statistics.mean, "running_var": statistics.variance}
        count = torch.tensor(statistics.batches, device=now[shadow].device)
        own = count if name == "num_batches_tracked" else made.get(name)
    sources = [now[weight], *watch.between.get(weight, [])]
    module = subject.model.get_submodule(path)
    return _Buffer(shadow, weight, before[shadow], now[shadow], before[weight], sources, own, module, path in watch.ran)


def _find_ways(buffer: _Buffer, keep: float, watch: BufferWatch) -> None:
    """Fill in the right ways that explain what the buffer is now: way -> error, in units of the threshold's."""
    now, start = to_double(buffer.now), to_double(buffer.before)
    starts = {"": start} if buffer.own is None else {"": start, " after its own forward": to_double(buffer.own)}
    if not buffer.now.is_floating_point():
        # Averaged integers are rounded, towards zero by torch's copy_, and many libraries leave them alone.
        for source in buffer.sources:
            target = to_double(source)
            if torch.equal(buffer.now, source):
                buffer.ways["copied"] = 0.0
            if any(bool(((now - (keep * s + (1 - keep) * target)).abs() <= 1).all()) for s in starts.values()):
                buffer.ways["averaged"] = 0.0
        if not buffer.moved:
            buffer.ways["left"] = 0.0
        if buffer.own is not None and torch.equal(now, starts[" after its own forward"]):
            buffer.ways["own"] = 0.0
        return
    dtype = buffer.now.dtype
    found: dict[str, float] = {}
    for source in buffer.sources:
        target = to_double(source)
        found["copied"] = min(found.get("copied", float("inf")), distance(now, target, start, dtype))
        for text, begun in starts.items():
            error = distance(now, keep * begun + (1 - keep) * target, start, dtype)
            found["averaged" + text] = min(found.get("averaged" + text, float("inf")), error)
    if buffer.own is not None:
        # As buffers.batch-norm: the batch's moment stands beside the statistics, of which a mean may nearly vanish.
        moment = watch.statistics[buffer.shadow.rpartition(".")[0]].moment
        scale = moment if buffer.shadow.endswith("running_var") else moment**0.5
        found["own"] = distance(now, to_double(buffer.own), start.new_full((), scale), dtype)
    buffer.ways = {way: error for way, error in found.items() if error <= AVERAGE.value}


def _row(subject: Subject, following: Shadow, buffer: _Buffer, number: int, keep: float) -> ResultRow:
    shadow, weight = buffer.shadow, buffer.weight
    fields: dict[str, Any] = {
        "parameter": shadow,
        "module": module_label(type(buffer.module), shadow.rpartition(".")[0]),
        "step": number,
        "threshold": AVERAGE.value,
    }
    check = "buffers.ema"
    allowed = [way for way in buffer.ways if following.buffers is None or way.startswith(following.buffers)]
    if allowed:
        error = min(buffer.ways[way] for way in allowed)
        message = f"{shadow} follows {weight} in step {number}: {' or '.join(allowed)}"
        return row(subject, check, Outcome.PASS, message, error=error, **fields)
    if following.buffers == "left" and not buffer.moved:
        return row(subject, check, Outcome.PASS, f"{shadow} stayed as it was, as declared", **fields)
    if not buffer.moved and not (buffer.source_moved and buffer.persistent):
        why = f"{weight} did not move either" if not buffer.source_moved else "the state_dict leaves it out"
        message = f"{shadow} stayed as it was in step {number}, and {why}: how it follows does not show"
        return row(subject, check, Outcome.SKIPPED, message, cause=Cause.DID_NOT_MOVE, **fields)
    if buffer.moved and buffer.ran and (buffer.own is None or not follows_torch(buffer.module)):
        message = (f"{shadow} moved in step {number}, in which its module ran: it is neither a copy nor an average of "
                   f"{weight}, perhaps a rule of its own, which nobody declared")  # fmt: skip
        return row(subject, check, Outcome.INCONCLUSIVE, message, cause=Cause.OWN_RULE, **fields)
    outcome = Outcome.FAIL if following.declared else Outcome.WARN
    if not buffer.moved:
        message = (f"{shadow} did not move in step {number}, while {weight} did: the shadow keeps statistics of other "
                   f"weights than its own; {_CURE}, or declare 'buffers': 'left' in expect['ema'] where they are "
                   "computed anew at the end of training")  # fmt: skip
        return row(subject, check, outcome, message, cause=Cause.NEVER_UPDATED, **fields)
    start, now, target = to_double(buffer.before), to_double(buffer.now), to_double(buffer.sources[0])
    wanted = following.buffers or "copied or averaged"
    message = f"{shadow} is not {weight} {wanted} (decay {keep:g}) after step {number}"
    if torch.equal(buffer.now, buffer.old):
        message += ": it is what that was before the step"
    elif buffer.ways:
        message += f": it is {' or '.join(buffer.ways)}"
    else:
        message += how_it_moved(start, target, to_double(buffer.old), now, keep)
    return row(subject, check, outcome, message, error=_distance_to(now, target, start, buffer), **fields)


def _distance_to(now: torch.Tensor, target: torch.Tensor, start: torch.Tensor, buffer: _Buffer) -> float:
    """Return how far the buffer is from a copy, in the check's unit; its elements' distance for integers."""
    if buffer.now.is_floating_point():
        return distance(now, target, start, buffer.now.dtype)
    return float((now - target).abs().max())


def _inconsistent(subject: Subject, following: Shadow, judged: list[_Buffer], number: int) -> Iterator[ResultRow]:
    """Yield one row per module whose statistics follow in different ways: a mean of now beside a variance of then."""
    for module in dict.fromkeys(buffer.module for buffer in judged):
        held = [b for b in judged if b.module is module and b.now.is_floating_point() and b.ways and b.source_moved]
        if len(held) < 2 or set.intersection(*(set(b.ways) for b in held)):
            continue
        ways = ", ".join(f"{b.shadow.rpartition('.')[2]} is {' or '.join(b.ways)}" for b in held)
        path = held[0].shadow.rpartition(".")[0]
        message = (
            f"the buffers of {path} follow {following.source.rstrip('.')} in different ways in step {number}: {ways}"
        )
        outcome = Outcome.FAIL if following.declared else Outcome.WARN
        yield row(subject, "buffers.ema", outcome, message, step=number, parameter=held[0].shadow,
                  module=module_label(type(module), path), cause=Cause.INCONSISTENT)  # fmt: skip
