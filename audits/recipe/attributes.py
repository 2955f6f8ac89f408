"""The attributes and hooks of an optimizer as plain values and back: what a recipe can store of them.

Plain are numbers, text, None, dtypes, tensors, containers of these, parameters of the model by name, and callables by
import path. What is not is named, so that an audit can say what it goes without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from audits.errors import RecipeError, unknown_among
from audits.recipe.copying import attributes_of
from audits.recipe.moulds import HOOKS, TORCHS_OWN, blank, callable_name
from audits.recipe.plain_values import UnstorableError, decode, encode, made_alike
from audits.structures import tensors_in

#: Keys of a recipe's ``attributes`` that are no attributes: hooks by kind, the instance's own step, unheld state.
_STEP, _ATTRIBUTES, _STATE = "step", "values", "state"
_HOOK_KEYS = {kind: f"{kind.replace(' ', '_').replace('-', '_')}s" for kind in HOOKS}


#: Names of attributes that no recipe can hold and that the constructor makes again: a function inside of it.
CONSTRUCTED = "constructed"


def to_plain(
    mould: torch.optim.Optimizer, twin: Callable[[], torch.optim.Optimizer | None] = lambda: None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what a mould holds as plain values, and in words what cannot be.

    Args:
        mould: what `audits.recipe.moulds.mould_of` made.
        twin: makes what the class's constructor makes of the same options, None where it cannot.
    """
    plain: dict[str, Any] = {}
    missing: list[str] = []

    def kept(value: Any, name: str) -> Iterator[Any]:
        try:
            yield encode(value, mould)
        except (UnstorableError, RecursionError):
            missing.append(name)

    values: dict[str, Any] = {}
    unstorable: dict[str, Any] = {}
    for name, value in attributes_of(mould):
        if name not in TORCHS_OWN:
            try:
                values[name] = encode(value, mould)
            except (UnstorableError, RecursionError):
                unstorable[name] = value
    if values:
        plain[_ATTRIBUTES] = values
    other = twin() if unstorable else None
    made = {} if other is None else dict(attributes_of(other))
    constructed = [n for n, v in unstorable.items() if n in made and made_alike(v, made[n], (mould, other))]
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
    if unknown := unknown_among(plain, known):
        raise RecipeError(f"the optimizer's attributes have the unknown key {unknown}; they are {', '.join(known)}")
    mould = blank(cls)
    for name, value in (plain.get(_ATTRIBUTES) or {}).items():
        object.__setattr__(mould, name, decode(value, mould))
    for kind, place in HOOKS.items():
        for number, hook in enumerate(plain.get(_HOOK_KEYS[kind]) or ()):
            getattr(mould, place)[number] = decode(hook, mould)
    if _STEP in plain:
        vars(mould)["step"] = decode(plain[_STEP], mould)
    mould.state.update(decode(plain.get(_STATE) or {}, mould))
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
                found.append((name, with_imports(item, rename)))
            except RecipeError:
                what = f"its attribute {name!r}" if key == _ATTRIBUTES else f"the {key.rstrip('s').replace('_', ' ')}"
                missing.append(f"{what} ({', '.join(imports_in(item))})")
        if found:
            values = [item for _, item in found]
            made[key] = dict(found) if key == _ATTRIBUTES else values if isinstance(held, list) else values[0]
    return made, tuple(missing)


def _listed(held: Any) -> list[Any]:
    return held if isinstance(held, list) else [held]


def with_imports(plain: Any, rename: Callable[[str], str]) -> Any:
    """Return a description with every import path renamed."""
    if isinstance(plain, Mapping):
        if set(plain) == {"import"}:
            return {"import": rename(plain["import"])}
        return {key: with_imports(item, rename) for key, item in plain.items()}
    if isinstance(plain, (list, tuple)):
        return type(plain)(with_imports(item, rename) for item in plain)
    return plain


def storable_option(value: Any) -> bool:
    """Whether an option of a group can be written into a recipe."""
    return option_to_plain(value) is not None or value is None


def option_to_plain(value: Any) -> Any:
    """Return an option of a group as a plain value; None for what cannot be one: a function, a tensor, an object."""
    try:
        plain = encode(value, None)
    except (UnstorableError, RecursionError):
        return None
    return None if any(True for _ in imports_in(plain)) or any(True for _ in tensors_in(plain)) else plain


def option_from_plain(value: Any) -> Any:
    """Return the option that `option_to_plain` described."""
    return decode(value, None)
