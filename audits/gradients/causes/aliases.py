"""Modules that stand under two names and run twice in one loss: a target network that is the online network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free
from audits.live.subject import Subject


@dataclass(frozen=True)
class Alias:
    """One module, or two that share every parameter.

    Attributes:
        paths: its names, at least two.
    """

    paths: tuple[str, ...]

    @property
    def names(self) -> str:
        """The names for messages: ``'online' and 'target'``."""
        *first, last = [repr(path) for path in self.paths]
        return f"{', '.join(first)} and {last}"


def called_under_two_names(subject: Subject, problem: Problem, names: list[str]) -> Alias | None:
    """Return the outermost module with two names that holds one of the tensors and runs twice in one loss.

    A layer that is listed twice for convenience runs once; a target network that is the online one runs twice.
    """
    groups = _groups(subject.model)
    if not groups:
        return None
    counts: Counter[int] = Counter()

    def count(module: nn.Module, _: Any) -> None:
        counts[id(module)] += 1

    handle = module_hooks.register_module_forward_pre_hook(count)
    try:
        problem.before()
        with quiet(), Free(problem.tape.cursor(), lift=problem.lifts):
            problem.loss()
    finally:
        handle.remove()
    modules = dict(subject.model.named_modules(remove_duplicate=False))
    for paths in groups:
        runs = sum(counts[key] for key in {id(modules[path]) for path in paths})
        if runs > 1 and any(name.startswith(f"{path}.") for name in names for path in paths):
            return Alias(paths)
    return None


def _groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Paths of one module, or of modules of one class with the very same parameters; outermost first."""
    by_content: dict[Any, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parameters = tuple(id(p) for p in module.parameters())
        if path and parameters:
            by_content.setdefault((type(module), parameters), []).append(path)
    groups = [tuple(paths) for paths in by_content.values() if len(paths) > 1]
    return sorted(groups, key=lambda paths: min(path.count(".") for path in paths))
