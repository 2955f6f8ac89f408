"""Where in the sources a finding goes back to: the backward, module, step or optimizer that its cause names."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits.causes import Cause
from audits.findings.root_causes import RootFinding
from audits.outcomes import Family
from audits.recipe.recipe import Recipe

#: ``Function in Module (path)``, ``Module (path)``, ``Module``: how causes and rows name a place.
_PLACE = re.compile(r"(?:(?P<function>\S+) in )?(?P<module>\S+)(?: \((?P<path>[^()]*)\))?")

#: The line that defines something, after its decorators.
_DEFINED = re.compile(r"\s*(?:async\s+def|def|class)\s")


@dataclass(frozen=True)
class Place:
    """Lines of a file.

    Attributes:
        file: its path.
        line: the first line, from 1.
        end: the last line, where it is known.
    """

    file: Path
    line: int
    end: int | None = None


def place_of_finding(finding: RootFinding, model: nn.Module, recipe: Recipe, fallback: Place, root: Path) -> Place:
    """Return the lines at fault, as far as the finding's cause names any in the sources under ``root``.

    Args:
        finding: what failed.
        model: the model that was audited.
        recipe: its recipe.
        fallback: where model, loss and optimizer are put together; the place of what belongs to no code in particular.
        root: folder of the caller's own sources.
    """
    for found in _candidates(finding, model, recipe):
        if found is not None and (place := place_of_callable(found, root)) is not None:
            return place
    return fallback


def place_of_callable(found: Any, root: Path) -> Place | None:
    """Return the lines of a function or class; None when its source is not under ``root``, or not to be had."""
    try:
        found = inspect.unwrap(found)
        file = Path(inspect.getsourcefile(found) or "").resolve()
        lines, first = inspect.getsourcelines(found)
    except (OSError, TypeError, ValueError):
        return None
    if not file.is_relative_to(root.resolve()) or "site-packages" in file.relative_to(root.resolve()).parts:
        return None
    first, last = max(first, 1), max(first, 1) + len(lines) - 1
    decorators = itertools.takewhile(lambda line: not _DEFINED.match(line), lines)
    own = first + sum(1 for _ in decorators)
    return Place(file, own if own <= last else first, last)


def _candidates(finding: RootFinding, model: nn.Module, recipe: Recipe) -> Iterator[Any]:
    """What may be at fault, the most particular first."""
    row = finding.rows[0]
    cause, place = Cause.read(row.cause)
    named = _PLACE.fullmatch(place) if cause is not None else None
    family = row.family
    if named is not None:
        if named["function"]:
            yield from (function.backward for function in _functions_called(named["function"], model))
        yield from _modules(named["path"] or "", model)
        yield from _modules_called(named["module"], model)
    if family in (Family.STEP, Family.BUFFERS) and recipe.step is not None:
        yield _callable_of(recipe.step.target)
    if family in (Family.UPDATE, Family.OPTIMIZER):
        for phase in recipe.phases:
            if (row.phase is None or phase.name == row.phase) and (rule := phase.optimizer.live_class) is not None:
                yield rule.step
    if family in (Family.GRADIENT, Family.HEALTH, Family.BUFFERS):
        if row.parameter is not None and not row.parameter.startswith("<"):
            yield from _modules(row.parameter.rpartition(".")[0], model)
        for phase in recipe.phases:
            yield _callable_of(phase.loss.target)


def _modules(path: str, model: nn.Module) -> Iterator[Callable[..., Any]]:
    """The forward of the module at ``path``, then those of the modules around it."""
    while True:
        with contextlib.suppress(AttributeError):  # a parameter list, say, is no module
            yield type(model.get_submodule(path)).forward
        if not path:
            return
        path = path.rpartition(".")[0]


def _modules_called(name: str, model: nn.Module) -> Iterator[Callable[..., Any]]:
    kinds = dict.fromkeys(type(module) for module in model.modules())
    return (kind.forward for kind in kinds if kind.__name__ == name)


def _functions_called(name: str, model: nn.Module) -> list[Any]:
    """Functions of this name, those beside the model's own modules first."""
    pending, found = [torch.autograd.Function], []
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__name__ == name:
            found.append(kind)
    own = {type(module).__module__ for module in model.modules()}
    return sorted(dict.fromkeys(found), key=lambda kind: kind.__module__ not in own)


def _callable_of(target: Any) -> Any:
    """What has the source lines of a loss or step: a function, a bound method, or a module's forward."""
    return type(target).forward if isinstance(target, nn.Module) else target
