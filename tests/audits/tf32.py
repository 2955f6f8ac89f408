"""TF32 on a CPU: float32 products whose factors keep 10 bits, and the switches that allow it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audits.lanes import precision
from audits.lanes.lifting import traits
from audits.lanes.precision import Product, product_of
from audits.structures import map_tensors


def to_tf32(tensor: torch.Tensor, *, cut: bool = False) -> torch.Tensor:
    """Return a float32 tensor's values to 10 bits: rounded to the nearest, or the rest cut off."""
    if tensor.dtype is not torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits if cut else bits + 0x1000) & ~0x1FFF).view(torch.float32).view_as(tensor)


class Tf32(TorchDispatchMode):
    """Multiply as a tensor core does: every float32 product of the given kinds, forward and backward.

    Args:
        kinds: which products.
        cut: cut digits off, as a tensor core does with unconverted numbers, instead of rounding.
        wrong: changes the results of the named operation: a faulty kernel.
    """

    def __init__(
        self, kinds: tuple[Product, ...] = tuple(Product), *, cut: bool = False,
        wrong: tuple[str, Callable[[Any], Any]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._kinds, self._cut, self._wrong = kinds, cut, wrong
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = traits(func).base
        kwargs = kwargs or {}
        if product_of(name) in self._kinds and not traits(func).written:
            args, kwargs = (map_tensors(v, lambda t: to_tf32(t, cut=self._cut)) for v in (args, kwargs))
            self.seen += 1
        result = func(*args, **kwargs)
        if self._wrong is not None and self._wrong[0] == name:
            first = result[0] if isinstance(result, tuple) else result
            if first is not None and first.dtype is torch.float32:
                result = map_tensors(result, self._wrong[1])
        return result


def allowed(monkeypatch: pytest.MonkeyPatch, *kinds: Product, inside: str = "tf32") -> None:
    """Let the switches say that float32 products of some kinds run in something coarser."""
    monkeypatch.setattr(
        precision, "float32_precision", lambda device, product: inside if product in kinds else "ieee"
    )  # fmt: skip


@contextlib.contextmanager
def switches_kept() -> Iterator[None]:
    """Put torch's own switches back."""
    backends = torch.backends
    places = [(backends.cuda, "matmul"), (backends.cudnn, "conv"), (backends.cudnn, "rnn"),
              (backends.mkldnn, "matmul"), (backends.mkldnn, "conv"), (backends.mkldnn, "rnn")]  # fmt: skip
    legacy = torch.get_float32_matmul_precision()
    before = [getattr(backend, name).fp32_precision for backend, name in places]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for (backend, name), value in zip(places, before, strict=True):
            getattr(backend, name).fp32_precision = value
