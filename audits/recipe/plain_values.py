"""One value of an optimizer as a plain one and back: numbers, text, tensors, containers, callables by import path."""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from audits.errors import RecipeError
from audits.recipe.callables import import_object, importable_path
from audits.recipe.copying import attributes_of
from audits.recipe.moulds import Held, IdOf

#: Keys of mappings that stand for something else; a dict that has one of them is written as pairs.
_MARKS = ("pairs", "ordered", "defaultdict", "deque", "set", "frozenset", "parameter", "id_of", "optimizer", "dtype",
          "device", "import", "method", "bound", "partial", "generator", "tensor", "tuple")  # fmt: skip


class UnstorableError(Exception):
    """A value that no recipe can hold."""


def encode(value: Any, mould: Any) -> Any:
    """Return a value as a plain one.

    Args:
        value: what an optimizer holds.
        mould: the optimizer that holds it, which bound methods may be of.

    Raises:
        UnstorableError: no recipe can hold it.
    """
    if isinstance(value, enum.Enum):
        return {"import": _checked(f"{type(value).__module__}:{type(value).__qualname__}.{value.name}", value)}
    if value is None or isinstance(value, (bool, int, float, str)):  # subclasses of these (numpy's) as what they are
        return (
            value if value is None else next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
        )
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise UnstorableError
        return value.detach().cpu().clone()
    encoded = functools.partial(encode, mould=mould)
    if isinstance(value, (dict, OrderedDict, defaultdict)):
        return _dict_to_plain(value, encoded)
    for kind in (list, tuple, set, frozenset):
        if type(value) is kind:
            items = [encoded(item) for item in value]
            return kind(items) if kind in (list, tuple) else {kind.__name__: items}
    if type(value) is deque:
        return {"deque": [[encoded(item) for item in value], value.maxlen]}
    if isinstance(value, Held):
        return {"parameter": value.name}
    if isinstance(value, IdOf):
        return {"id_of": value.name}
    if mould is not None and value is mould:
        return {"optimizer": True}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"dtype" if isinstance(value, torch.dtype) else "device": str(value)}
    if type(value) is torch.Size:
        return encoded(tuple(value))
    if type(value) is torch.Generator and value.device.type == "cpu":
        return {"generator": value.get_state()}
    if isinstance(value, functools.partial):
        return {"partial": [encoded(value.func), list(map(encoded, value.args)), encoded(dict(value.keywords))]}
    if isinstance(value, types.MethodType) and value.__self__ is mould:
        if getattr(type(mould), value.__name__, None) is value.__func__:
            return {"method": value.__name__}
        return {"bound": encoded(value.__func__)}
    return {"import": _import_path(value)}


def made_alike(one: Any, other: Any, optimizers: tuple[Any, Any]) -> bool:
    """Whether two objects that no recipe can hold were made by the same code from the same values."""
    if one is other or (one is optimizers[0] and other is optimizers[1]):
        return True
    alike = functools.partial(made_alike, optimizers=optimizers)
    if type(one) is not type(other) or isinstance(one, torch.optim.Optimizer):
        return False
    if isinstance(one, types.FunctionType):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other)]
        same = one.__code__ is other.__code__ and one.__defaults__ == other.__defaults__
        return same and len(cells[0]) == len(cells[1]) and all(map(alike, *cells))
    if isinstance(one, types.MethodType):
        return one.__func__ is other.__func__ and alike(one.__self__, other.__self__)
    if isinstance(one, functools.partial):
        return all(map(alike, (one.func, one.args, one.keywords), (other.func, other.args, other.keywords)))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if getattr(type(one), "__eq__", None) is not getattr(object, "__eq__", None):
        return bool(one == other)
    held = [dict(attributes_of(each)) for each in (one, other)]
    return bool(held[0]) and alike(held[0], held[1])


def _dict_to_plain(value: Mapping[Any, Any], encode: Callable[[Any], Any]) -> Any:
    readable = all(type(key) is str and key not in _MARKS for key in value)
    if type(value) is dict and readable:
        return {key: encode(item) for key, item in value.items()}
    pairs = [[encode(key), encode(item)] for key, item in value.items()]
    if type(value) is dict:
        return {"pairs": pairs}
    if type(value) is OrderedDict:
        return {"ordered": pairs}
    if type(value) is defaultdict:
        return {"defaultdict": [encode(value.default_factory), pairs]}
    raise UnstorableError


def _import_path(value: Any) -> str:
    if isinstance(value, types.BuiltinFunctionType) and getattr(torch, name := value.__name__, None) is value:
        return f"torch:{name}"
    path = importable_path(value) if callable(value) else None
    if path is None:
        raise UnstorableError
    return path if ":" in path else f"torch.nn.functional:{path}"


def _checked(path: str, value: Any) -> str:
    try:
        if import_object(path, role="attribute") is value:
            return path
    except RecipeError:
        pass
    raise UnstorableError


def decode(plain: Any, mould: Any) -> Any:
    """Return the value that `encode` described.

    Args:
        plain: the description.
        mould: the optimizer that is to hold it.
    """
    decoded = functools.partial(decode, mould=mould)
    if isinstance(plain, (list, tuple)):
        return type(plain)(map(decoded, plain))
    if not isinstance(plain, Mapping):
        return plain
    if len(plain) != 1 or next(iter(plain)) not in _MARKS:
        return {key: decoded(item) for key, item in plain.items()}
    ((mark, value),) = plain.items()
    read: dict[str, Callable[[], Any]] = {
        "pairs": lambda: _pairs(value, decoded),
        "ordered": lambda: OrderedDict(_pairs(value, decoded)),
        "defaultdict": lambda: defaultdict(decoded(value[0]), _pairs(value[1], decoded)),
        "deque": lambda: deque(map(decoded, value[0]), value[1]),
        "set": lambda: set(map(decoded, value)),
        "frozenset": lambda: frozenset(map(decoded, value)),
        "tuple": lambda: tuple(map(decoded, value)),
        "parameter": lambda: Held(value),
        "id_of": lambda: IdOf(value),
        "optimizer": lambda: mould,
        "dtype": lambda: _torchs(value, torch.dtype),
        "device": lambda: torch.device(value),
        "import": lambda: import_object(value, role="of the optimizer,"),
        "method": lambda: getattr(mould, value),
        "bound": lambda: types.MethodType(decoded(value), mould),
        "partial": lambda: functools.partial(decoded(value[0]), *map(decoded, value[1]), **decoded(value[2])),
        "generator": lambda: _generator(value),
    }
    if mark not in read:
        raise RecipeError(f"the optimizer's attributes hold {mark!r} where a recipe has none")
    return read[mark]()


def _pairs(plain: Iterable[Any], decode: Callable[[Any], Any]) -> dict[Any, Any]:
    return {decode(key): decode(item) for key, item in plain}


def _torchs(name: str, kind: type) -> Any:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, kind):
        raise RecipeError(f"the optimizer's attributes name {name!r}, but torch has no {kind.__name__} of that name")
    return found


def _generator(state: torch.Tensor) -> torch.Generator:
    made = torch.Generator()
    made.set_state(state.cpu())
    return made
