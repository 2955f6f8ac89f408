"""A file of functions ``audit_...``, each of which returns a model and its recipe: found, called, audited.

The file is the caller's own code, as a test's is: it is imported and run in this process.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits.errors import InputError, suggest
from audits.model_files.places import Place, place_of_callable, place_of_finding
from audits.recipe.recipe import Recipe
from audits.report import AuditReport
from audits.run import audit
from audits.settings import AuditSettings

#: How the functions are called that a file without ``:FUNCTION`` is asked for.
PREFIX = "audit_"

#: Set before each function, so that a model starts with the same weights each time.
SEED = 0


@dataclass(frozen=True)
class AuditedFunction:
    """One function's model, audited.

    Attributes:
        name: the function's.
        report: its audit.
        places: where in the sources each of the report's root findings goes back to, in their order.
    """

    name: str
    report: AuditReport
    places: tuple[Place, ...]


def split_target(target: str) -> tuple[Path, str | None]:
    """Return the file and the function of ``FILE`` or ``FILE:FUNCTION``.

    Raises:
        InputError: there is no such file.
    """
    file, colon, function = target.rpartition(":")
    path, name = (Path(file), function) if colon and function.isidentifier() else (Path(target), None)
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"{target!r} does not name a Python file: write path/to/file.py or path/to/file.py:FUNCTION")
    return path.resolve(), name


def audit_file(
    path: Path, function: str | None = None, *, root: Path, settings: AuditSettings | None = None, device: str = "auto"
) -> list[AuditedFunction]:
    """Audit what the functions of a file return, one after the other.

    Args:
        path: the file.
        function: the one function; every ``audit_...`` of the file otherwise.
        root: folder of the sources that may be at fault; what lies outside of it is others' code.
        settings: what to check; the defaults when None.
        device: what the audits run on.

    Raises:
        InputError: the file cannot be imported, has no such function, or one returns something else than a model and
            its recipe.
    """
    module = _imported(path)
    audited = []
    for each in _functions(module, path, function):
        torch.manual_seed(SEED)
        model, recipe = _returned(each, path)
        report = audit(model, recipe, settings=settings, device=device)
        fallback = place_of_callable(each, root) or Place(path, 1)
        places = tuple(place_of_finding(found, model, recipe, fallback, root) for found in report.root_findings)
        audited.append(AuditedFunction(each.__name__, report, places))
    return audited


def _imported(path: Path) -> Any:
    """Import the file under the name that its own package's code would, so that recipes can name what is in it."""
    root, parts = path.parent, [] if path.stem == "__init__" else [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    name = ".".join(parts)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise InputError(f"{path.name} cannot be imported: {_told(error, path)}") from error
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != path:
        raise InputError(f"{path.name} cannot be imported: the name {name!r} is another module's; rename the file")
    return module


def _functions(module: Any, path: Path, name: str | None) -> list[Callable[[], Any]]:
    own: dict[str, Callable[[], Any]] = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    if name is not None:
        if name not in own:
            raise InputError(f"{path.name} has no function {name!r}{suggest(name, own)}")
        return [own[name]]
    found = [value for key, value in own.items() if key.startswith(PREFIX)]
    if not found:
        raise InputError(
            f"{path.name} has no function whose name begins with {PREFIX!r}: write one that returns (model, recipe), "
            f"or name one: {path.name}:FUNCTION"
        )
    return found


def _returned(function: Callable[[], Any], path: Path) -> tuple[nn.Module, Recipe]:
    try:
        returned = function()
    except Exception as error:
        raise InputError(f"{path.name}:{function.__name__} raised {_told(error, path)}") from error
    if isinstance(returned, tuple) and len(returned) == 2:
        model, recipe = returned
        if isinstance(model, nn.Module) and isinstance(recipe, Recipe):
            return model, recipe
    raise InputError(f"{path.name}:{function.__name__} must return (model, recipe), a torch module and a Recipe")


def _told(error: Exception, path: Path) -> str:
    """An error with the line of the file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"
