"""The recipe's batch as the audit gives it to losses and steps, and as it was before they changed it in place."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from audits.structures import map_tensors, tensors_in


class GivenBatch:
    """Micro-batches on a device, with memory of their own, and their first values.

    Args:
        batches: the recipe's micro-batches.
        device: where they are to be.
    """

    def __init__(self, batches: list[Any], device: torch.device) -> None:
        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().clone().to(device).requires_grad_(tensor.requires_grad)

        self._given, self._own = batches, own
        self._place(frozenset())

    def _place(self, on_cpu: frozenset[str]) -> None:
        def places(batch: Any) -> Any:
            paths = iter([path for path, _ in tensors_in(batch)])  # in the order in which `map_tensors` meets them
            return map_tensors(batch, lambda t: copy_of(t) if next(paths) in on_cpu else self._own(t))

        self.batches = [places(batch) for batch in self._given]
        self.first = self.copies()
        self._versions = self._counted()

    def lengths(self) -> list[str]:
        """Return the paths of what may be lengths, which torch may want on the CPU: integers in one dimension."""
        of_first = tensors_in(self._given[0]) if self._given else ()
        return [path for path, t in of_first if t.dim() == 1 and not (t.is_floating_point() or t.is_complex())]

    @contextlib.contextmanager
    def leaving_on_cpu(self, paths: Collection[str]) -> Iterator[None]:
        """Leave some tensors on the CPU, from now on unless what is done here raises."""
        self._place(frozenset(paths))
        try:
            yield
        except BaseException:
            self._place(frozenset())
            raise

    def copies(self) -> list[Any]:
        """Return the micro-batches as they are, in memory of their own."""
        return [map_tensors(batch, copy_of) for batch in self.batches]

    def restore(self, *, surely: bool = False) -> None:
        """Put the first values back.

        Args:
            surely: also where torch counted no write (through ``.data``, NumPy, a custom kernel).
        """
        if not surely and self._versions == self._counted():
            return
        for present, first in zip(self.batches, self.first, strict=True):
            kept = dict(tensors_in(first))
            for path, tensor in tensors_in(present):
                if path in kept and not same_values(tensor, kept[path]):
                    with torch.no_grad():
                        tensor.copy_(kept[path])
        self._versions = self._counted()

    def changed_since(self, copies: list[Any]) -> tuple[str, ...]:
        """Return the paths of the tensors whose values are not those of the copies."""
        found: dict[str, None] = {}
        for present, before in zip(self.batches, copies, strict=True):
            kept = dict(tensors_in(before))
            found |= {p: None for p, t in tensors_in(present) if p not in kept or not same_values(t, kept[p])}
        return tuple(found)

    def _counted(self) -> list[int]:
        return [tensor._version for _, tensor in tensors_in(self.batches) if not tensor.is_inference()]


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's values in memory of its own; one that requires a gradient goes on requiring it."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def copy_of_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy, which a loss may change in place; the tensor itself where it requires a gradient."""
    return tensor if tensor.requires_grad else tensor.clone()


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_nested or one.is_meta:  # torch compares neither
        return True
    one, other = (t.detach().to_dense() if t.layout is not torch.strided else t.detach() for t in (one, other))
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
