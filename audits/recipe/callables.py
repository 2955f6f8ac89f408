"""Losses and step functions: named by import path when they can be, kept as objects in process when not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError, suggest

#: The loss that a model computes itself: the output's ``.loss`` (or ``["loss"]``).
MODEL_LOSS = "model"

#: Names in a batch under which the model's input and the loss's target are looked for, in this order.
INPUT_KEYS = ("inputs", "input", "x", "images", "features", "tokens", "input_ids")
TARGET_KEYS = ("targets", "target", "y", "labels", "label")


@dataclass(frozen=True)
class CallableReference:
    """A function or loss module.

    Attributes:
        path: ``"package.module:qualified_name"``; a name of `torch.nn.functional`; ``"model"``; or, for a loss
            module, its class path. None for a lambda, closure or notebook cell, which only works in process.
        arguments: constructor arguments of a loss module; None for anything else.
        target: the live object, where there is one; never stored, never compared.
    """

    path: str | None
    arguments: Mapping[str, Any] | None = None
    target: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, value: Any, *, role: str) -> CallableReference:
        """Describe what a recipe was given as a loss or step function.

        Raises:
            RecipeError: the value is neither callable nor a known name.
        """
        if isinstance(value, CallableReference):
            return value
        if isinstance(value, str):
            reference = cls(value)
            reference.resolve(role=role)
            return reference
        if isinstance(value, nn.Module):
            return cls(_class_path(type(value)), _constructor_arguments(value), value)
        if callable(value):
            return cls(importable_path(value), None, value)
        raise RecipeError(f"{role} must be a callable, an import path or a name of torch.nn.functional, not {value!r}")

    @property
    def storable(self) -> bool:
        """Whether another process can find it again."""
        return self.path is not None and not self.path.startswith("__main__:")

    def describe(self) -> str:
        """Return a name for messages."""
        return self.path or str(getattr(self.target, "__qualname__", repr(self.target)))

    def resolve(self, *, role: str = "loss") -> Any:
        """Return the live callable, importing it if need be.

        Raises:
            RecipeError: the path cannot be imported; the text names it and the cure.
        """
        if self.target is not None:
            return self.target
        path = self.path or ""
        if path == MODEL_LOSS:
            return None
        if self.arguments is not None:
            module_class = import_object(path, role=role)
            return module_class(**{k: _from_plain(v) for k, v in self.arguments.items()})
        if ":" in path:
            return import_object(path, role=role)
        function = getattr(nn.functional, path, None)
        if not callable(function):
            hint = suggest(path, [n for n in dir(nn.functional) if not n.startswith("_")])
            raise RecipeError(
                f"{role} {path!r} is neither an import path 'package.module:function', nor 'model', nor a name of "
                f"torch.nn.functional{hint}"
            )
        return function


def as_loss(reference: CallableReference) -> Callable[[nn.Module, Any], torch.Tensor]:
    """Turn a loss reference into ``(model, batch) -> scalar``.

    A user's function is called as it is; a name of `torch.nn.functional` or a loss module is applied to
    ``model(batch[inputs])`` and the target; ``"model"`` reads the loss off the model's own output.
    """
    target = reference.resolve(role="loss")
    if reference.path == MODEL_LOSS and reference.target is None:
        return _model_loss
    if (
        isinstance(target, nn.Module)
        or (reference.path is not None and ":" not in reference.path and reference.target is None)
        or getattr(target, "__module__", None) in ("torch.nn.functional", "torch._C._nn")
    ):
        return lambda model, batch: _supervised_loss(target, model, batch)
    return target  # type: ignore[no-any-return]


def _model_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss a model reports of itself, as transformers' models do when given labels."""
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise RecipeError("loss='model' needs a model whose output has .loss; did the batch bring its labels?")
    return loss  # type: ignore[no-any-return]


def _supervised_loss(function: Callable[..., torch.Tensor], model: nn.Module, batch: Any) -> torch.Tensor:
    target_key = next((key for key in TARGET_KEYS if key in batch), None)
    if target_key is None:
        raise RecipeError(f"the batch has no target: its keys are {sorted(batch)}, looked for {', '.join(TARGET_KEYS)}")
    remaining = [key for key in batch if key != target_key]
    input_key = next((key for key in INPUT_KEYS if key in remaining), remaining[0] if len(remaining) == 1 else None)
    if input_key is None:
        raise RecipeError(
            f"the batch's input is ambiguous: keys {sorted(remaining)}; name it 'inputs', or give a loss "
            "function (model, batch) -> scalar"
        )
    return function(model(batch[input_key]), batch[target_key])


def import_object(path: str, *, role: str) -> Any:
    """Import ``package.module:qualified.name`` (or a dotted class path).

    Raises:
        RecipeError: the module or the name does not exist.
    """
    module_name, separator, qualified = path.partition(":")
    if not separator:
        module_name, _, qualified = path.rpartition(".")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise RecipeError(
            f"{role} {path!r}: importing {module_name!r} failed ({type(error).__name__}: {error}); ship "
            "its package with the model (code_paths) or install it where audits run"
        ) from error
    for part in qualified.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise RecipeError(f"{role} {path!r}: {module_name!r} has no {qualified!r}{_nearest(part, found)}") from None
    return found


def _nearest(name: str, holder: Any) -> str:
    """Suggest among what a module or class defines itself, not among what it imports; else say what it has."""
    own = getattr(holder, "__name__", "")
    names = [
        known
        for known, value in vars(holder).items()
        if not known.startswith("_") and callable(value) and _defined_in(value, own)
    ]
    has = f"; it has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
    return suggest(name, names) or has


def _defined_in(value: Any, own: str) -> bool:
    """Whether a package or one of its modules defines it: ``torch.optim.SGD`` is defined in ``torch.optim.sgd``."""
    module = getattr(value, "__module__", own) or own
    return module == own or module.startswith(f"{own}.")


def importable_path(function: Any) -> str | None:
    """The import path under which ``function`` is found again, or None."""
    module_name = getattr(function, "__module__", None)
    qualified = getattr(function, "__qualname__", None)
    if not module_name or not qualified or "<" in qualified:
        return None
    if module_name in ("torch.nn.functional", "torch._C._nn"):
        name = function.__name__
        return name if getattr(nn.functional, name, None) is function else None
    if module_name == "__main__":
        return f"__main__:{qualified}"
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return f"{module_name}:{qualified}" if found is function else None


def _class_path(cls: type) -> str:
    if cls.__module__.startswith("torch.nn.modules.") and getattr(nn, cls.__name__, None) is cls:
        return f"torch.nn.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _constructor_arguments(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a loss module, read back from attributes of the same name."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", "size_average", "reduce", "device", "dtype"):
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(module, name):
            continue
        arguments[name] = _to_plain(getattr(module, name))
    return arguments


def _to_plain(value: Any) -> Any:
    return {"tensor": value.tolist()} if isinstance(value, torch.Tensor) else value


def _from_plain(value: Any) -> Any:
    return torch.tensor(value["tensor"]) if isinstance(value, Mapping) and set(value) == {"tensor"} else value
