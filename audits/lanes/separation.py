"""Which weights make the loss of the whole batch the sum of its micro-batches' losses: found from losses alone.

``L(whole) = sum_i w_i L_i`` is asked of losses in the float64 lane, at the model's weights and displaced from them, for
every weighing that counting the batch suggests; what holds at all of them is how the loss separates. Where no weighing
does, the w_i themselves are solved for from more points than there are unknowns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from audits.lanes.alike_rows import AlikeRows
from audits.lanes.lifted_loss import lifted_loss
from audits.lanes.lifting import lift_tensor
from audits.lanes.problem import LaneError, quiet
from audits.live.state import ModuleState
from audits.live.subject import LivePhase, Subject
from audits.live.weighing import ALIKE, AUTO, ITEMS, SUMMED, Count, Weighing, counts_of, joined, targets_of
from audits.outcomes import Lane
from audits.random_state import random_state_kept, seed_everything
from audits.structures import map_tensors

#: ``|L(whole) - sum w_i L_i|`` relative to the sum of their sizes: half of float64's digits, which no rounding of a
#: sum in another order reaches; in float32 the scatter of a sum in another order that `step.gradient` allows.
TOLERANCE = {Lane.FLOAT64: 2.0**-26, Lane.FLOAT32: 1024 * 2.0**-24}

#: Sizes of the displacements, relative to each tensor's rms: at the trained weights the micro-batches' losses may lie
#: too close together to tell one weighing from another.
DISPLACEMENTS = (0.0, 0.1, 0.3, 1.0)

#: Weights that differ by less are the same: counts are whole numbers, far from float64's rounding.
SAME = 1e-9

#: Points beyond the number of unknown weights at which solved weights have to hold.
HELD_OUT = 3

_log = logging.getLogger(__name__)


def find_weighings(subject: Subject) -> None:
    """Find, for each phase, how its micro-batches weigh, and how many targets a loss that asks for it is to be told.

    A loss that separates in eval mode but not in the recipe's (BatchNorm in train mode), or not at all (contrastive
    losses), has micro-batches for its unit; the weighing says so.

    Args:
        subject: the open subject; its weighings are set, once, and it is reset.
    """
    if subject.weighed:
        return
    subject.weighed = True
    for phase in subject.phases:
        batches = [batch for _, batch in subject.micro_batches(phase)]
        auto = len(batches) > 1 and subject.recipe.normalize == AUTO
        if not auto and not phase.asks_for_items:
            continue
        told, weighing = phase.items, subject.weighings[phase.name]
        first = subject.first_forwards[phase.name].losses
        if not all(map(math.isfinite, first)):  # a micro-batch without a target that counts: its mean is nan
            some = [float(math.isfinite(value)) for value in first]
            subject.weighings[phase.name] = Weighing(fixed=tuple(each / (sum(some) or 1.0) for each in some))
        with random_state_kept():
            found = _found(subject, phase, batches)
        subject.weighings[phase.name] = weighing
        if auto:
            subject.weighings[phase.name] = found
        if phase.items != told:  # the first forward was told another count
            del subject.first_forwards[phase.name]
        subject.reset()


def weighing_here(subject: Subject, phase: LivePhase, batches: list[Any]) -> Weighing | None:
    """Return how micro-batches of a step's own weigh, found in the middle of that step, which feels nothing of it.

    In the dtypes that the model trains in, told apart by what `TOLERANCE` allows float32.

    Args:
        subject: the open subject.
        phase: whose loss.
        batches: rows of the recipe's batch, each of them once.

    Returns:
        The weighing; None where the loss cannot be taken on them.
    """
    here = ModuleState(subject.model)
    try:
        with random_state_kept():
            counts = _counts(subject, batches)
            return _Losses(subject, phase, Lane.FLOAT32, batches).weighing(counts)
    except Exception:  # the user's loss runs here, on batches that nobody has tried before
        _log.debug("the weights of a step's own micro-batches were not found", exc_info=True)
        return None
    finally:
        here.restore()


def _counts(subject: Subject, batches: list[Any]) -> list[Count]:
    padding = getattr(getattr(subject.model, "config", None), "pad_token_id", None)
    return counts_of(batches[0], (padding,) if isinstance(padding, int) else ())


def _found(subject: Subject, phase: LivePhase, batches: list[Any]) -> Weighing:
    """Look in the float64 lane, and in float32 where that has no kernels."""
    counts = _counts(subject, batches)
    problem = ""
    for lane in (Lane.FLOAT64, Lane.FLOAT32):
        try:
            with lifted_loss(subject, phase, precision=lane):
                losses = _Losses(subject, phase, lane, batches)
                if phase.asks_for_items:
                    phase.items = losses.items(counts) or phase.items
                return losses.weighing(counts) if len(batches) > 1 else ALIKE
        except Exception as error:  # the user's loss runs here, on a batch that nobody has tried before
            _log.debug("the weights were not found in the %s lane", lane, exc_info=True)
            problem = problem or f"the loss of the whole batch could not be taken: {type(error).__name__}: {error}"
    return _undecided(counts, batches, " ".join(problem.split())[:200])


class _Losses:
    """Losses of the whole batch and of its micro-batches, from the same weights and alike random numbers.

    Args:
        subject: the subject, in a lane.
        phase: whose loss.
        lane: the lane.
        batches: the micro-batches, native.
    """

    def __init__(self, subject: Subject, phase: LivePhase, lane: Lane, batches: list[Any]) -> None:
        self._subject, self._phase, self._lane = subject, phase, lane
        lift = lift_tensor if lane is Lane.FLOAT64 else torch.Tensor.detach
        self._native = batches
        self._batches = [map_tensors(batch, lift) for batch in batches]
        self._whole = joined(self._batches)
        self._state = ModuleState(subject.model)
        self._theta = {n: p.detach().clone() for n, p in subject.parameters.items() if p.is_floating_point()}
        #: By mode: dropout draws in train mode, so that the draws come in another order.
        self._rows = {mode: AlikeRows(lift=lane is Lane.FLOAT64) for mode in (False, None)}

    def weighing(self, counts: Sequence[Count]) -> Weighing:
        """Return the weighing that holds at every point."""
        known = _distinct([ALIKE, SUMMED, *(Weighing(count) for count in counts)], self._native)
        left = known
        for index, size in enumerate(DISPLACEMENTS):
            whole, parts = self._at(size, index)
            if not math.isfinite(whole):
                continue
            left = [w for w in left if self._holds(w.weights(self._native), whole, parts)]
            if not left or (len(left) == 1 and index):
                break
        if len(left) > 1:
            return _undecided(counts, self._native, "the losses of the micro-batches do not tell their weights")
        found = left[0] if left else self._solved()
        if found is None:
            return _undecided(counts, self._native, "the loss does not separate over the batch")
        mean = [w for w in _accepted(counts, self._native) if not _same(w, found, self._native)]
        found = dataclasses.replace(found, others=tuple(mean))
        whole, parts = self._at(0.0, 0, mode=None)
        if not self._holds(found.weights(self._native), whole, parts):
            found = dataclasses.replace(
                found, unit="in the mode it trains in, the loss does not separate over the batch (BatchNorm?)"
            )
        return found

    def items(self, counts: Sequence[Count]) -> int | None:
        """Return the whole batch's count with which the loss is what it is without being told any."""
        default = inspect.signature(self._phase.loss_function).parameters[ITEMS].default
        if default is not None:
            return None
        told = self._phase.items
        try:
            self._phase.items = None
            untold = self._value(self._whole, mode=False)
            for count in counts:
                total = sum(count.of(batch) for batch in self._native)
                if total <= 0 or total != int(total):
                    continue
                self._phase.items = int(total)
                if self._holds((1.0,), untold, [self._value(self._whole, mode=False)]):
                    return int(total)
        finally:
            self._phase.items = told
        return None

    def _solved(self) -> Weighing | None:
        """Solve ``L(whole) = sum w_i L_i`` for the weights, and have them hold at points not used for that."""
        count = len(self._batches)
        rows = [self._at(0.3, 10 + index) for index in range(count + HELD_OUT)]
        if not all(math.isfinite(value) for whole, parts in rows for value in (whole, *parts)):
            return None
        matrix = torch.tensor([parts for _, parts in rows[:count]], dtype=torch.float64)
        wanted = torch.tensor([whole for whole, _ in rows[:count]], dtype=torch.float64)
        try:
            weights = tuple(torch.linalg.solve(matrix, wanted).tolist())
        except RuntimeError:  # singular
            return None
        if not all(math.isfinite(w) and w > -SAME for w in weights):
            return None
        fixed = Weighing(fixed=weights)
        return fixed if all(self._holds(weights, whole, parts) for whole, parts in rows[count:]) else None

    def _holds(self, weights: Sequence[float], whole: float, parts: Sequence[float]) -> bool:
        terms = [w * part for w, part in zip(weights, parts, strict=True) if w]  # no target at all: a mean of nan
        added, size = sum(terms), abs(whole) + sum(map(abs, terms))
        return abs(whole - added) <= TOLERANCE[self._lane] * size

    def _at(self, size: float, seed: int, mode: bool | None = False) -> tuple[float, list[float]]:
        """Return the whole batch's loss and each micro-batch's at weights displaced by ``size`` times their rms."""
        generator = torch.Generator().manual_seed(self._subject.seed + seed)
        try:
            for name, theta in self._theta.items() if size else ():
                noise = torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
                scale = size * (float(theta.double().square().mean().sqrt()) or 1.0) if theta.numel() else 0.0
                self._subject.parameters[name].data.copy_(theta + (scale * noise).to(theta.dtype))
            return self._value(self._whole, mode=mode), [self._value(batch, mode=mode) for batch in self._batches]
        finally:
            for name, theta in self._theta.items() if size else ():
                self._subject.parameters[name].data.copy_(theta)

    def _value(self, batch: Any, *, mode: bool | None) -> float:
        self._state.restore()
        if mode is not None:
            self._subject.model.train(mode)
        seed_everything(self._subject.seed)
        self._rows[mode].begin()
        with quiet(), self._rows[mode]:
            loss = self._phase.call_loss(self._subject.model, map_tensors(batch, torch.clone))
        if self._lane is Lane.FLOAT64 and loss.dtype is not torch.float64:
            raise LaneError(f"the loss stays {loss.dtype} in the float64 lane")
        return float(loss.detach())


def _accepted(counts: Sequence[Count], batches: Sequence[Any]) -> list[Weighing]:
    """Return the mean weighings that people use: alike, by rows, by targets."""
    targets = targets_of(batches[0])
    return _distinct([ALIKE, Weighing(counts[0]), *([Weighing(targets)] if targets else [])], batches)


def _undecided(counts: Sequence[Count], batches: Sequence[Any], why: str) -> Weighing:
    """Return equal weights, with the others that a step may use as well."""
    try:
        known = _accepted(counts, batches)
    except Exception:  # micro-batches that do not hold the same keys cannot be counted alike
        known = [ALIKE]
    return Weighing(unit=why, accepted=tuple(known[1:]))


def _distinct(weighings: Sequence[Weighing], batches: Sequence[Any]) -> list[Weighing]:
    """Return the weighings that can be had on these micro-batches, one of each kind of weights."""
    found: list[Weighing] = []
    for weighing in weighings:
        with contextlib.suppress(Exception):  # a count that some micro-batch lacks, or whose sum is 0
            if min(weighing.weights(batches)) >= 0 and not any(_same(weighing, other, batches) for other in found):
                found.append(weighing)
    return found


def _same(one: Weighing, other: Weighing, batches: Sequence[Any]) -> bool:
    pairs = zip(one.weights(batches), other.weights(batches), strict=True)
    return all(abs(a - b) <= SAME for a, b in pairs)
