"""A large tensor judged slice by slice: sums of squares stand for the vectors, so that little is held in float64.

Where each element's update depends on that element alone, the update of a slice is the slice of the update. The sums
give the numbers of a row to the rounding of a float64 sum. They tell a tensor that follows its rule; what they do not
settle (a departure, an element beyond the peak's bound, scalars that were rounded) is judged with the vectors whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from audits.updates.compare import COSINE_FROM, PEAK_FROM, Deviation, real_dtype
from audits.updates.compare import to_double as double
from audits.updates.record.calls import Call
from audits.updates.record.shelf import held

#: Elements of a slice: a dozen vectors of it in float64 are 100 MB. On an accelerator every kernel and every number
#: that is fetched has its price, whatever the size: there it is four times as many.
SLICE = 2**20
ON_ACCELERATOR = 4


def slice_size(device: torch.device) -> int:
    """Return how many elements are judged at a time on a device."""
    return SLICE if device.type == "cpu" else ON_ACCELERATOR * SLICE


@dataclass
class Sums:
    """What is added up over a tensor's slices, of weights theta, update d and the rule's update r."""

    count: int = 0
    theta: float = 0.0
    reference: float = 0.0
    actual: float = 0.0
    off: float = 0.0
    cross: float = 0.0
    worst: float = 0.0

    def add(self, theta: torch.Tensor, actual: torch.Tensor, reference: torch.Tensor) -> None:
        """Add a slice; ``actual`` is overwritten."""
        pairs = [(theta, theta), (reference, reference), (actual, actual), (actual, reference)]
        sums = [_dot(*pair) for pair in pairs]
        difference = actual.sub_(reference)
        sums += [_dot(difference, difference), *torch.aminmax(difference)]
        numbers = torch.stack([s.double() for s in sums]).tolist()  # one synchronisation
        self.count += theta.numel()
        self.theta += numbers[0]
        self.reference += numbers[1]
        self.actual += numbers[2]
        self.cross += numbers[3]
        self.off += numbers[4]
        self.worst = max(self.worst, numbers[6], -numbers[5])

    @property
    def size(self) -> float:
        """``rms(theta)``."""
        return math.sqrt(self.theta / self.count)

    @property
    def length(self) -> float:
        """``rms(r)``."""
        return math.sqrt(self.reference / self.count)

    def deviation(self, dtype: torch.dtype) -> Deviation | None:
        """Return what `compare.deviation` does; None where the sums do not tell the worst element."""
        eps, tiny = torch.finfo(real_dtype(dtype)).eps, torch.finfo(real_dtype(dtype)).tiny
        scale = eps * (self.size + self.length + tiny)
        off, length = math.sqrt(self.off / self.count), self.length
        peak = self.worst / scale if scale else math.inf
        if not peak <= PEAK_FROM or not math.isfinite(off):
            return None
        cosine = 1.0
        if off > COSINE_FROM * length:
            moved = math.sqrt(self.actual / self.count)
            cosine = self.cross / self.count / (moved * length) if moved and length else 0.0
        relative = off / length if length else (float("inf") if off else 0.0)
        return Deviation(l2=off / scale, peak=peak, relative=relative, cosine=cosine)


@dataclass
class StateSums:
    """What is added up of one entry of an optimizer's state: the rule's after and before, and how far it is off.

    Attributes:
        wanted, before, off: sums of squares.
        kept_in: the dtype that the optimizer keeps it in; None for what is one number or no tensor.
        first: the optimizer's, the rule's, and the rule's before, of the first slice.
    """

    wanted: float = 0.0
    before: float = 0.0
    off: float = 0.0
    kept_in: torch.dtype | None = None
    first: tuple[Any, Any, Any] = (None, None, None)
    begun: bool = False

    def add(self, actual: Any, wanted: Any, before: Any) -> None:
        """Add a slice."""
        if not self.begun:
            self.begun, self.first = True, (actual, wanted, before)
            sized = isinstance(actual, torch.Tensor) and isinstance(wanted, torch.Tensor)
            if sized and actual.shape == wanted.shape and actual.is_floating_point():
                self.kept_in, self.first = actual.dtype, (None, None, None)
        if self.kept_in is not None:
            difference = wanted - actual
            vectors = (wanted, difference, before) if isinstance(before, torch.Tensor) else (wanted, difference)
            numbers = [*torch.stack([_dot(v, v).double() for v in vectors]).tolist(), 0.0]
            self.wanted += numbers[0]
            self.off += numbers[1]
            self.before += numbers[2]


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.dot(one.reshape(-1), other.reshape(-1))


def bounds(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the slices of ``count`` elements."""
    for first in range(0, count, size):
        yield first, min(first + size, count)


def squares_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return ``norm(one - other)`` in float64, a slice at a time."""
    if one.numel() <= slice_size(one.device) or not (one.is_contiguous() and other.is_contiguous()):
        return float(torch.linalg.vector_norm(double(one) - double(other)))
    one, other = one.detach().reshape(-1), other.detach().reshape(-1)
    slices = bounds(one.numel(), slice_size(one.device))
    return math.hypot(*(float(torch.linalg.vector_norm(double(one[a:b]).sub_(double(other[a:b])))) for a, b in slices))


def cut(value: Any, count: int, part: slice) -> Any:
    """Return a part of what has one number for each of a tensor's ``count`` elements; anything else as it is."""
    whole = isinstance(value, torch.Tensor) and value.dim() and value.numel() == count
    return value.detach().reshape(-1)[part] if whole else value


def sliced_call(call: Call, name: str, part: slice) -> Call:
    """Return a recorded call as if a parameter were a part of its elements, and the only one."""
    weights = held(call.before, name)
    assert weights is not None
    count, device = weights.numel(), call.phase.parameters[name].device

    def of(entries: Mapping[str, torch.Tensor | None]) -> torch.Tensor | None:
        value = cut(held(entries, name), count, part)
        return value.to(device) if isinstance(value, torch.Tensor) else None

    kept = held(call.state_after, name) or {}
    state = {key: cut(value, count, part) for key, value in kept.items()}
    return dataclasses.replace(
        call,
        before={name: of(call.before)},  # type: ignore[dict-item]
        after={name: of(call.after)} if name in call.after else {},  # type: ignore[dict-item]
        gradients={name: of(call.gradients)},
        options={name: call.options[name]},
        state_after={name: {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in state.items()}},
        state_before=None,
    )


def sliced_state(state: Mapping[str, Any], count: int, part: slice) -> dict[str, Any]:
    """Return a parameter's captured state as that of a part of its elements."""
    return {key: cut(value, count, part) for key, value in state.items()}


def can_slice(calls: Sequence[Call], name: str) -> bool:
    """Whether all that was recorded of a parameter is real, dense, and of one shape."""
    recorded = [held(entries, name) for call in calls for entries in (call.before, call.gradients)]
    recorded += [after for call in calls if (after := held(call.after, name)) is not None]
    first = recorded[0]
    return all(
        isinstance(t, torch.Tensor)
        and t.layout is torch.strided
        and t.shape == getattr(first, "shape", None)
        and t.is_floating_point()
        for t in recorded
    )


#: ``(calls of a slice, its part) -> None``: adds a slice to sums.
EachSlice = Callable[[list[Call], slice], None]


def over_slices(calls: Sequence[Call], name: str, each: EachSlice) -> None:
    """Call ``each`` with the recorded calls of one slice of a parameter after the other."""
    parameter = calls[-1].phase.parameters[name]
    for first, end in bounds(parameter.numel(), slice_size(parameter.device)):
        part = slice(first, end)
        each([sliced_call(call, name, part) for call in calls], part)
