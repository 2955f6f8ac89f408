"""What the user's own step hooks write, hook by hook: gradients on their way to the rule, state, and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audits.recipe.moulds import STEP_HOOKS, callable_name, own_step
from audits.structures import map_tensors
from audits.updates.update_rows import norm

#: How the instance's own ``step`` is called beside the hooks.
WRAPPED = "step set on the instance"
POST = "step post-hook"


@dataclass(frozen=True)
class HookWrite:
    """One thing that a hook, or a ``step`` set on the instance, wrote.

    Attributes:
        kind: ``"step pre-hook"``, ``"step post-hook"`` or `WRAPPED`.
        hook: ``package.module.function``.
        what: ``"gradient"`` or ``"state"``.
        parameter: whose.
        text: half a sentence on what became of it.
    """

    kind: str
    hook: str
    what: str
    parameter: str
    text: str = ""

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"the {self.kind} {self.hook}"


def cure(hook: str) -> str:
    """How to declare a hook that is meant."""
    return f"if it is meant, declare expect={{'step_hooks': [{hook!r}]}}"


#: ``(kind, hook) -> context`` around every run of a user's hook.
Around = Callable[[str, str], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def watched_hooks(optimizer: torch.optim.Optimizer, around: Around) -> Iterator[None]:
    """Have every hook of the optimizer's step, and a ``step`` of its own, run inside a context while the body runs."""
    step = own_step(optimizer)
    originals = {place: dict(getattr(optimizer, place)) for place in STEP_HOOKS.values()}

    def inside(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        name = callable_name(function)

        def run(*args: Any, **kwargs: Any) -> Any:
            with around(kind, name):
                return function(*args, **kwargs)

        return run

    for kind, place in STEP_HOOKS.items():
        for key, hook in originals[place].items():
            getattr(optimizer, place)[key] = inside(kind, hook)
    if step is not None:
        vars(optimizer)["step"] = inside(WRAPPED, step)
    try:
        yield
    finally:
        for place, hooks in originals.items():
            getattr(optimizer, place).update(hooks)
        if step is not None:
            vars(optimizer)["step"] = step


def gradient_writes(
    kind: str, hook: str, before: Mapping[str, torch.Tensor | None], after: Mapping[str, torch.Tensor | None]
) -> Iterator[HookWrite]:
    """Yield what a hook did to gradients."""
    for name, new in after.items():
        old = before.get(name)
        if old is None or new is None:
            if old is not new:
                text = f"gave {name} a gradient of its own" if old is None else f"took {name}'s gradient away"
                yield HookWrite(kind, hook, "gradient", name, text)
        elif not _same(old, new):
            text = f"changed {name}'s gradient from norm {norm(old):.4g} to {norm(new):.4g}"
            yield HookWrite(kind, hook, "gradient", name, text)


def state_writes(
    kind: str, hook: str, before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> Iterator[HookWrite]:
    """Yield what a hook did to the optimizer's state."""
    for name in {**before, **after}:
        old, new = before.get(name) or {}, after.get(name) or {}
        for key in {**old, **new}:
            if not _alike(old.get(key), new.get(key)):
                yield HookWrite(kind, hook, "state", name, f"wrote {name}'s {key}")


def _alike(one: Any, other: Any) -> bool:
    ones: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    map_tensors(one, lambda t: (ones.append(t), t)[1])  # type: ignore[func-returns-value]
    map_tensors(other, lambda t: (others.append(t), t)[1])  # type: ignore[func-returns-value]
    if not ones and not others:
        return bool(one == other)
    return len(ones) == len(others) and all(map(_same, ones, others))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.detach().to_dense().nan_to_num(), other.detach().to_dense().nan_to_num())
