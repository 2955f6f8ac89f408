"""Low-precision values lifted to float64 inside a forward that was written for another dtype.

Knows how the arguments and results of one operation are lifted; not when (that is `audits.lanes.program`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

#: What every lower floating or complex dtype becomes in the float64 lane.
LIFTED_DTYPE: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
    torch.float8_e4m3fn: torch.float64,
    torch.float8_e5m2: torch.float64,
}

#: Reinterpret bits or hand out a pointer's contents: changing their dtype would change their meaning.
_BITWISE = frozenset({"aten::view.dtype", "aten::view_as_real", "aten::view_as_complex", "aten::_local_scalar_dense"})


@dataclass(frozen=True)
class OperatorTraits:
    """What the lanes need to know of one operator overload.

    Attributes:
        name: ``aten::add.Tensor``.
        written: positions (or keyword names) of the arguments it writes into.
        argument_names: the schema's argument names, in order.
        defaults: argument name -> default value.
        is_view: whether it only makes an alias.
    """

    name: str
    written: frozenset[int | str]
    argument_names: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    is_view: bool

    @property
    def base(self) -> str:
        """The functional operator's name: ``relu`` for ``aten::relu_`` and ``aten::relu.out``."""
        base = self.name.partition("::")[2].partition(".")[0]
        return base.removesuffix("_") if self.written and base.endswith("_") else base

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the call's arguments by name, defaults filled in."""
        bound = dict(self.defaults)
        bound.update(zip(self.argument_names, args, strict=False))
        bound.update(kwargs)
        return bound


@functools.cache
def traits(func: Any) -> OperatorTraits:
    """Return the traits of an operator overload (cached)."""
    schema = func._schema
    written: set[int | str] = set()
    defaults: list[tuple[str, Any]] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.update((position, argument.name))
        if argument.has_default_value():
            defaults.append((argument.name, argument.default_value))
    name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
    is_view = not written and any(r.alias_info is not None for r in schema.returns)
    return OperatorTraits(name, frozenset(written), tuple(a.name for a in schema.arguments), tuple(defaults), is_view)


def lift_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float64 (complex128), or itself when it is neither floating nor low."""
    target = LIFTED_DTYPE.get(tensor.dtype)
    return tensor if target is None else tensor.to(target)


def _needs_lift(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in LIFTED_DTYPE
    if isinstance(value, torch.dtype):
        return value in LIFTED_DTYPE
    if isinstance(value, (list, tuple)):
        return any(_needs_lift(item) for item in value)
    return False


def _lift(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return lift_tensor(value)
    if isinstance(value, torch.dtype):
        return LIFTED_DTYPE.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(_lift(item) for item in value)
    return value


def lift_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Return the call with low tensors and low ``dtype`` arguments lifted, and whether anything was.

    Arguments the operator writes into stay as they are: a copy would swallow what is written.
    """
    known = traits(func)
    if known.name in _BITWISE or known.is_view:
        return args, kwargs, False
    changed = False
    new_args = list(args)
    for position, value in enumerate(args):
        if position not in known.written and _needs_lift(value):
            new_args[position] = _lift(value)
            changed = True
    new_kwargs = kwargs
    for key, value in kwargs.items():
        if key not in known.written and _needs_lift(value):
            if new_kwargs is kwargs:
                new_kwargs = dict(kwargs)
            new_kwargs[key] = _lift(value)
            changed = True
    return (tuple(new_args) if changed else args), new_kwargs, changed


def lift_result(func: Any, result: Any) -> tuple[Any, bool]:
    """Return a fresh result lifted to float64 (``torch.tensor(1.5, dtype=float32)``), and whether it was."""
    known = traits(func)
    if known.written or known.is_view or known.name in _BITWISE or not _needs_lift(result):
        if known.name == "aten::lift_fresh" and _needs_lift(result):
            return _lift(result), True
        return result, False
    return _lift(result), True
