"""The attributes and hooks of an optimizer as plain values and back: what a recipe can store of them.

Plain are numbers, text, None, dtypes, tensors, containers of these, parameters of the model by name, and callables by
import path. What is not is named, so that an audit can say what it goes without.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from audits.callables import import_object, importable_path
from audits.copying import attributes_of
from audits.errors import RecipeError
from audits.moulds import HOOKS, TORCHS_OWN, Held, IdOf, blank, callable_name
from audits.structures import tensors_in

#: Keys of mappings that stand for something else; a dict that has one of them is written as pairs.
_MARKS = ("pairs", "ordered", "defaultdict", "deque", "set", "frozenset", "parameter", "id_of", "optimizer", "dtype",
          "device", "import", "method", "bound", "partial", "generator", "tensor", "tuple")  # fmt: skip

#: Keys of a recipe's ``attributes`` that are no attributes: hooks by kind, the instance's own step, unheld state.
_STEP, _ATTRIBUTES, _STATE = "step", "values", "state"
_HOOK_KEYS = {kind: f"{kind.replace(' ', '_').replace('-', '_')}s" for kind in HOOKS}


#: Names of attributes that no recipe can hold and that the constructor makes again: a function inside of it.
CONSTRUCTED = "constructed"


class UnstorableError(Exception):
    """A value that no recipe can hold."""


def to_plain(
    mould: torch.optim.Optimizer, twin: Callable[[], torch.optim.Optimizer | None] = lambda: None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what a mould holds as plain values, and in words what cannot be.

    Args:
        mould: what `audits.moulds.mould_of` made.
        twin: makes what the class's constructor makes of the same options, None where it cannot.
    """
    plain: dict[str, Any] = {}
    missing: list[str] = []

    def kept(value: Any, name: str) -> Iterator[Any]:
        try:
            yield _encode(value, mould)
        except (UnstorableError, RecursionError):
            missing.append(name)

    values: dict[str, Any] = {}
    unstorable: dict[str, Any] = {}
    for name, value in attributes_of(mould):
        if name not in TORCHS_OWN:
            try:
                values[name] = _encode(value, mould)
            except (UnstorableError, RecursionError):
                unstorable[name] = value
    if values:
        plain[_ATTRIBUTES] = values
    other = twin() if unstorable else None
    made = {} if other is None else dict(attributes_of(other))
    constructed = [n for n, v in unstorable.items() if n in made and _made_alike(v, made[n], (mould, other))]
    if constructed:
        plain[CONSTRUCTED] = constructed
    missing += [f"its attribute {n!r} ({type(v).__name__})" for n, v in unstorable.items() if n not in constructed]
    for kind, place in HOOKS.items():
        hooks = [
            found
            for hook in getattr(mould, place).values()
            for found in kept(hook, f"the {kind} {callable_name(hook)}")
        ]
        if hooks:
            plain[_HOOK_KEYS[kind]] = hooks
    if (step := vars(mould).get("step")) is not None:
        for found in kept(step, f"the step set on the instance, {callable_name(step)}"):
            plain[_STEP] = found
    if mould.state:
        for found in kept(dict(mould.state), "the state that it keeps for no parameter"):
            plain[_STATE] = found
    return plain, tuple(missing)


def from_plain(plain: Mapping[str, Any], cls: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return the mould that `to_plain` described.

    Raises:
        RecipeError: something in it cannot be imported, or is no description; the text names it.
    """
    known = (_ATTRIBUTES, _STEP, _STATE, CONSTRUCTED, *_HOOK_KEYS.values())
    for key in plain:
        if key not in known:
            raise RecipeError(f"the optimizer's attributes have the unknown key {key!r}; they are {', '.join(known)}")
    mould = blank(cls)
    for name, value in (plain.get(_ATTRIBUTES) or {}).items():
        object.__setattr__(mould, name, _decode(value, mould))
    for kind, place in HOOKS.items():
        for number, hook in enumerate(plain.get(_HOOK_KEYS[kind]) or ()):
            getattr(mould, place)[number] = _decode(hook, mould)
    if _STEP in plain:
        vars(mould)["step"] = _decode(plain[_STEP], mould)
    mould.state.update(_decode(plain.get(_STATE) or {}, mould))
    return mould


def imports_in(plain: Any) -> Iterator[str]:
    """Yield the import paths that a description names."""
    if isinstance(plain, Mapping):
        if set(plain) == {"import"}:
            yield plain["import"]
            return
        plain = plain.values()
    elif not isinstance(plain, (list, tuple)):
        return
    for item in plain:
        yield from imports_in(item)


def renamed(plain: Mapping[str, Any], rename: Callable[[str], str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the description with other import paths, and in words what has none: it is left out.

    Args:
        plain: what `to_plain` returned.
        rename: ``path -> path``; a `RecipeError` says that no other process can import it.
    """
    made: dict[str, Any] = {}
    missing: list[str] = []
    for key, held in plain.items():
        if key == CONSTRUCTED:
            made[key] = held
            continue
        parts = list(held.items()) if key == _ATTRIBUTES else [(key, item) for item in _listed(held)]
        found = []
        for name, item in parts:
            try:
                found.append((name, _with_imports(item, rename)))
            except RecipeError:
                what = f"its attribute {name!r}" if key == _ATTRIBUTES else f"the {key.rstrip('s').replace('_', ' ')}"
                missing.append(f"{what} ({', '.join(imports_in(item))})")
        if found:
            values = [item for _, item in found]
            made[key] = dict(found) if key == _ATTRIBUTES else values if isinstance(held, list) else values[0]
    return made, tuple(missing)


def _listed(held: Any) -> list[Any]:
    return held if isinstance(held, list) else [held]


def _with_imports(plain: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(plain, Mapping):
        if set(plain) == {"import"}:
            return {"import": rename(plain["import"])}
        return {key: _with_imports(item, rename) for key, item in plain.items()}
    if isinstance(plain, (list, tuple)):
        return type(plain)(_with_imports(item, rename) for item in plain)
    return plain


def storable_option(value: Any) -> bool:
    """Whether an option of a group can be written into a recipe."""
    return option_to_plain(value) is not None or value is None


def option_to_plain(value: Any) -> Any:
    """Return an option of a group as a plain value; None for what cannot be one: a function, a tensor, an object."""
    try:
        plain = _encode(value, None)
    except (UnstorableError, RecursionError):
        return None
    return None if any(True for _ in imports_in(plain)) or any(True for _ in tensors_in(plain)) else plain


def option_from_plain(value: Any) -> Any:
    """Return the option that `option_to_plain` described."""
    return _decode(value, None)


def _encode(value: Any, mould: Any) -> Any:
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
    encode = functools.partial(_encode, mould=mould)
    if isinstance(value, (dict, OrderedDict, defaultdict)):
        return _dict_to_plain(value, encode)
    for kind in (list, tuple, set, frozenset):
        if type(value) is kind:
            items = [encode(item) for item in value]
            return kind(items) if kind in (list, tuple) else {kind.__name__: items}
    if type(value) is deque:
        return {"deque": [[encode(item) for item in value], value.maxlen]}
    if isinstance(value, Held):
        return {"parameter": value.name}
    if isinstance(value, IdOf):
        return {"id_of": value.name}
    if mould is not None and value is mould:
        return {"optimizer": True}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"dtype" if isinstance(value, torch.dtype) else "device": str(value)}
    if type(value) is torch.Size:
        return encode(tuple(value))
    if type(value) is torch.Generator and value.device.type == "cpu":
        return {"generator": value.get_state()}
    if isinstance(value, functools.partial):
        return {"partial": [encode(value.func), list(map(encode, value.args)), encode(dict(value.keywords))]}
    if isinstance(value, types.MethodType) and value.__self__ is mould:
        if getattr(type(mould), value.__name__, None) is value.__func__:
            return {"method": value.__name__}
        return {"bound": encode(value.__func__)}
    return {"import": _import_path(value)}


def _made_alike(one: Any, other: Any, optimizers: tuple[Any, Any]) -> bool:
    """Whether two objects that no recipe can hold were made by the same code from the same values."""
    if one is other or (one is optimizers[0] and other is optimizers[1]):
        return True
    alike = functools.partial(_made_alike, optimizers=optimizers)
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


def _decode(plain: Any, mould: Any) -> Any:
    decode = functools.partial(_decode, mould=mould)
    if isinstance(plain, (list, tuple)):
        return type(plain)(map(decode, plain))
    if not isinstance(plain, Mapping):
        return plain
    if len(plain) != 1 or next(iter(plain)) not in _MARKS:
        return {key: decode(item) for key, item in plain.items()}
    ((mark, value),) = plain.items()
    read: dict[str, Callable[[], Any]] = {
        "pairs": lambda: _pairs(value, decode),
        "ordered": lambda: OrderedDict(_pairs(value, decode)),
        "defaultdict": lambda: defaultdict(decode(value[0]), _pairs(value[1], decode)),
        "deque": lambda: deque(map(decode, value[0]), value[1]),
        "set": lambda: set(map(decode, value)),
        "frozenset": lambda: frozenset(map(decode, value)),
        "tuple": lambda: tuple(map(decode, value)),
        "parameter": lambda: Held(value),
        "id_of": lambda: IdOf(value),
        "optimizer": lambda: mould,
        "dtype": lambda: _torchs(value, torch.dtype),
        "device": lambda: torch.device(value),
        "import": lambda: import_object(value, role="of the optimizer,"),
        "method": lambda: getattr(mould, value),
        "bound": lambda: types.MethodType(decode(value), mould),
        "partial": lambda: functools.partial(decode(value[0]), *map(decode, value[1]), **decode(value[2])),
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
        raise RecipeError(f"the optimizer's attributes name {name!r}, which is no {kind.__name__} of torch's")
    return found


def _generator(state: torch.Tensor) -> torch.Generator:
    made = torch.Generator()
    made.set_state(state.cpu())
    return made
