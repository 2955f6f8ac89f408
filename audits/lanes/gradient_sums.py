"""What is kept of autograd's gradient: a few numbers a tensor, taken when it is ready; small ones are held whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import _disable_current_modes

from audits.lanes.arithmetic import PIECE, pieces
from audits.lanes.directions import Direction, Unit
from audits.lanes.problem import Tensors, as_real

#: Called with a tensor's name and its gradient; returns whether the gradient is to be held.
Taker = Callable[[str, torch.Tensor], bool]


@dataclass(frozen=True)
class Sums:
    """One tensor's gradient g in numbers, all summed in float64.

    Attributes:
        norm: ``||g||``.
        weighted: ``||g theta||``, elementwise.
        densest: where in the flattened tensor ``||g||`` is largest, `PIECE` elements at most.
        along: by random direction, ``(sum g k, sum |g k|)`` with its integers k.
    """

    norm: float
    weighted: float
    densest: slice
    along: dict[Unit, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Products:
    """Sums over a direction's elements.

    Attributes:
        total: ``sum g v``.
        absolute: ``sum |g v|``.
    """

    total: float
    absolute: float


def dot(gradient: torch.Tensor, direction: Direction, name: str) -> tuple[float, float]:
    """Return ``sum g w`` and ``sum |g w|`` in float64, w a tensor's values in a direction without their factor."""
    flat = gradient.reshape(-1)
    sums = []
    for place in pieces(flat):
        product = flat[place].to(torch.float64) * direction.piece(name, place)
        sums.append(torch.stack([product.sum(), product.abs_().sum()]))
    if not sums:
        return 0.0, 0.0
    total, absolute = torch.stack(sums).sum(0).tolist()
    return total, absolute


class Reduction:
    """The sums of one gradient on its device, not read yet: a read is a synchronisation."""

    def __init__(
        self, name: str, gradient: torch.Tensor, theta: Callable[[str, slice], torch.Tensor],
        directions: Sequence[Direction],
    ) -> None:  # fmt: skip
        flat = gradient.reshape(-1)
        self._places = list(pieces(flat))
        self._directions = [d for d in directions if name in d.names]
        rows = [self._row(name, flat[place], place, theta) for place in self._places]
        self._table = torch.stack(rows) if rows else gradient.new_zeros(0)

    def _row(
        self, name: str, gradient: torch.Tensor, place: slice, theta: Callable[[str, slice], torch.Tensor]
    ) -> torch.Tensor:
        g = gradient.to(torch.float64)
        sums = [torch.linalg.vector_norm(g), torch.linalg.vector_norm(g * theta(name, place)), _densest(g)]
        for direction in self._directions:
            product = g * direction.piece(name, place)
            sums += [product.sum(), product.abs_().sum()]
        return torch.stack(sums)

    def summary(self) -> torch.Tensor:
        """Return the numbers of `sums`, on the gradient's device."""
        if not self._places:
            return torch.zeros(4 + 2 * len(self._directions), dtype=torch.float64, device=self._table.device)
        norms = torch.linalg.vector_norm(self._table[:, :2], dim=0)
        densest = self._table[:, 0].argmax()[None]
        within = self._table[:, 2].gather(0, densest)
        return torch.cat([densest.to(torch.float64), within, norms, self._table[:, 3:].sum(0)])

    def sums(self, numbers: Sequence[float]) -> Sums:
        """Return what the numbers of `summary` say."""
        along: dict[Unit, tuple[float, float]] = {}
        for i, direction in enumerate(self._directions):
            unit = direction.unit_of()
            assert unit is not None
            along[unit] = numbers[4 + 2 * i], numbers[5 + 2 * i]
        if not self._places:
            return Sums(0.0, 0.0, slice(0, 0), along)
        place = self._places[int(numbers[0])]
        start = place.start + int(numbers[1]) * PIECE
        return Sums(numbers[2], numbers[3], slice(start, min(start + PIECE, place.stop)), along)


def _densest(g: torch.Tensor) -> torch.Tensor:
    """Return which `PIECE` elements of a piece have the largest norm, as a float64 on its device."""
    count = -(-g.numel() // PIECE)
    if count <= 1:
        return torch.zeros((), dtype=torch.float64, device=g.device)
    whole = g.numel() // PIECE * PIECE
    norms = [torch.linalg.vector_norm(g[:whole].view(-1, PIECE), dim=1)]
    if whole < g.numel():
        norms.append(torch.linalg.vector_norm(g[whole:])[None])
    return torch.cat(norms).argmax().to(torch.float64)


def read_all(reductions: Mapping[str, Reduction]) -> dict[str, Sums]:
    """Read many reductions in one synchronisation a device."""
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, reduction in reductions.items():
        summary = reduction.summary()
        by_device.setdefault(summary.device, []).append((name, summary))
    found: dict[str, Sums] = {}
    for summaries in by_device.values():
        numbers = torch.cat([summary for _, summary in summaries]).tolist()
        for name, summary in summaries:
            own, numbers = numbers[: summary.numel()], numbers[summary.numel() :]
            found[name] = reductions[name].sums(own)
    return found


class GivenInPartsError(Exception):
    """Some tensors' gradients came in several parts (a reentrant checkpoint runs a backward within the backward)."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


def differentiate_into(
    loss: torch.Tensor, tensors: Tensors, take: Taker, *, hooked: bool = False, at_the_end: frozenset[str] = frozenset()
) -> dict[str, torch.Tensor]:
    """Run a plain backward and hand each tensor's gradient over as soon as it is ready; return those to be held.

    Args:
        loss: a scalar.
        tensors: the leaves; gradients of all others are dropped.
        take: gets every gradient, dense and real, once.
        hooked: leave the hooks of the parameters out (an optimizer that steps there would take the gradients away);
            all gradients are then there at once.
        at_the_end: tensors whose gradients come in parts: they are handed over after the backward.

    Raises:
        GivenInPartsError: gradients of tensors that are not in ``at_the_end`` came in parts; what was taken is void.
    """
    held: dict[str, torch.Tensor] = {}

    def hand_over(name: str, gradient: torch.Tensor) -> bool:
        real = as_real(gradient.detach())
        with torch.no_grad(), _disable_current_modes():
            kept = take(name, real)
        if kept:
            held[name] = real
        return kept

    if hooked:
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        for name, gradient in zip(tensors, found, strict=True):
            if gradient is not None:
                hand_over(name, gradient)
        return held
    for tensor in tensors.values():
        tensor.grad = None
    if not loss.requires_grad:
        return held
    ready: set[str] = set()
    late: set[str] = set()

    def when_ready(name: str, tensor: torch.Tensor) -> None:
        if name in ready:
            late.add(name)
        elif tensor.grad is not None:
            ready.add(name)
            hand_over(name, tensor.grad)
            tensor.grad = None

    hooks = [
        tensor.register_post_accumulate_grad_hook(functools.partial(when_ready, name))
        for name, tensor in tensors.items()
        if tensor.requires_grad and tensor.is_leaf and name not in at_the_end
    ]
    try:
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        rest = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
        for tensor in tensors.values():
            tensor.grad = None
    if late:
        raise GivenInPartsError(late)
    for name, gradient in rest.items():
        hand_over(name, gradient)
    return held
