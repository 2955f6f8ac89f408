"""A user's own objects as plain values and back: what a subclassed Trainer or a callback holds beyond its library's.

An object is its class, by import path, and its attributes; nothing is pickled, and no constructor is called. What
cannot be stored is named, so that a training step that misses it says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from audits.errors import RecipeError
from audits.recipe.callables import import_object
from audits.recipe.plain_values import UnstorableError, decode, encode
from audits.structures import map_tensors

#: A tensor among the attributes, class weights say, is written as numbers: larger ones belong to the model.
MAXIMUM_ELEMENTS = 4096

_TENSOR = "numbers"


def to_plain(value: Any) -> Any:
    """Return a value as a plain one: numbers, text, containers, small tensors, callables by import path.

    Raises:
        UnstorableError: it cannot be one.
    """
    return _numbers(encode(value, None))


def from_plain(plain: Any) -> Any:
    """Return the value that `to_plain` described.

    Raises:
        RecipeError: something in it cannot be imported.
    """
    return decode(_tensors(plain), None)


def import_path(thing: Any) -> str:
    """Return ``module:qualified.name`` of a class.

    Raises:
        RecipeError: it is made inside a function.
    """
    if "<locals>" in thing.__qualname__:
        raise RecipeError(
            f"the class {thing.__qualname__} is made inside a function: no other process can import it. Cure: move it "
            "to a module"
        )
    return f"{thing.__module__}:{thing.__qualname__}"


def object_to_plain(value: Any, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return an object's class and attributes.

    Args:
        value: the object.
        without: names of attributes that are left out.
    """
    attributes: dict[str, Any] = {}
    missing: list[str] = []
    for name, held in vars(value).items():
        if name in without:
            continue
        try:
            attributes[name] = to_plain(held)
        except (UnstorableError, RecursionError):
            missing.append(name)
    return {"class": {"import": import_path(type(value))}, "attributes": attributes, "missing": missing}


def object_from_plain(plain: Mapping[str, Any]) -> Any:
    """Return an object of the described class with the described attributes."""
    cls = import_object(plain["class"]["import"], role="class")
    made = cls.__new__(cls)
    give_attributes(made, plain)
    return made


def give_attributes(thing: Any, plain: Mapping[str, Any]) -> None:
    """Set the described attributes on an object."""
    for name, held in (plain.get("attributes") or {}).items():
        setattr(thing, name, from_plain(held))


def missing_of(error: AttributeError, described: Iterable[Mapping[str, Any]]) -> str | None:
    """Return which attribute that could not be stored an error is about, in words."""
    for plain in described:
        if error.name in (plain.get("missing") or ()):
            return f"the attribute {error.name!r} of {plain['class']['import'].rpartition(':')[2]}"
    return None


def is_gradaudits(callback: Any) -> bool:
    """Whether it is one of gradaudit's callbacks, or of a subclass of one."""
    return any(cls.__module__.startswith("registry_models.integrations.") for cls in type(callback).__mro__)


def overridden(cls: type, base: type, names: Iterable[str]) -> list[str]:
    """Return which methods a class defines otherwise than its library's base class."""
    return [name for name in names if getattr(cls, name, None) is not getattr(base, name, None)]


def _numbers(plain: Any) -> Any:
    def number(tensor: torch.Tensor) -> Any:
        if tensor.numel() > MAXIMUM_ELEMENTS or tensor.is_complex():
            raise UnstorableError
        return {_TENSOR: tensor.tolist(), "of": str(tensor.dtype).removeprefix("torch.")}

    return map_tensors(plain, number)  # type: ignore[arg-type]


def _tensors(plain: Any) -> Any:
    if isinstance(plain, Mapping):
        if set(plain) == {_TENSOR, "of"}:
            return torch.tensor(plain[_TENSOR], dtype=getattr(torch, plain["of"]))
        return {key: _tensors(item) for key, item in plain.items()}
    if isinstance(plain, (list, tuple)):
        return type(plain)(_tensors(item) for item in plain)
    return plain
