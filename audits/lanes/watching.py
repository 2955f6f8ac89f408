"""Where in the model an evaluation is: the module being run, the custom autograd Functions being applied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from audits.wording import module_label

#: How sites outside every module of the model are named: in the loss function itself.
LOSS_PATH = "loss"

CallObserver = Callable[[type, tuple[Any, ...], dict[str, Any]], None]
ResultObserver = Callable[[Any], None]
Replacement = Callable[[type, tuple[Any, ...], Any], Any]


class ModuleStack:
    """The paths of the modules whose forwards are running, innermost last."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._stack: list[tuple[str, type[nn.Module], bool]] = []

    @property
    def path(self) -> str:
        """The innermost module's path, ``loss`` outside of all."""
        return self._stack[-1][0] if self._stack else LOSS_PATH

    @property
    def outermost(self) -> str:
        """The path of the first module entered, ``loss`` outside of all."""
        return self._stack[0][0] if self._stack else LOSS_PATH

    def outside(self) -> tuple[str, type[nn.Module] | None]:
        """Return path and class of the innermost module entered with gradients on: who switched them off, if anyone.

        The loss function's path, and no class, where gradients were off before every module.
        """
        return next(((path, kind) for path, kind, enabled in reversed(self._stack) if enabled), (LOSS_PATH, None))

    def label(self, path: str) -> str:
        """Return ``Class (path)``."""
        module = self._modules.get(path)
        if path == LOSS_PATH or module is None:
            return "the loss function"
        return module_label(type(module), path)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the forwards."""

        def enter(module: nn.Module, _: Any) -> None:
            path = self._paths.get(id(module))
            self._stack.append((self.path if path is None else path, type(module), torch.is_grad_enabled()))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if self._stack:
                self._stack.pop()

        self._stack.clear()
        before = module_hooks.register_module_forward_pre_hook(enter)
        after = module_hooks.register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._stack.clear()


class FunctionDepth:
    """How many custom `torch.autograd.Function.apply` are running."""

    def __init__(self) -> None:
        self.depth = 0

    @contextlib.contextmanager
    def watching(self, observe: CallObserver | None = None, returned: ResultObserver | None = None) -> Iterator[None]:
        """Count, and show every outermost call to ``observe``, and its result to ``returned``."""
        watcher = (self, observe, returned)
        _WATCHERS.append(watcher)
        try:
            with _applied_by_ours():
                yield
        finally:
            _WATCHERS.remove(watcher)


@contextlib.contextmanager
def standing_in(replace: Replacement) -> Iterator[None]:
    """Let every call's result be what ``replace(function, arguments, result)`` makes of it."""
    _STANDING_IN.append(replace)
    try:
        with _applied_by_ours():
            yield
    finally:
        _STANDING_IN.remove(replace)


def applied(function: type, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return the result of a Function that nobody watches."""
    return super(_BENEATH, function).apply(*args, **(kwargs or {}))  # type: ignore[misc, arg-type]


#: What stands for the results of custom Functions at the moment.
_STANDING_IN: list[Replacement] = []

#: Who watches at the moment, outermost first.
_WATCHERS: list[tuple[FunctionDepth, CallObserver | None, ResultObserver | None]] = []

#: The class whose ``apply`` every ``Function.apply`` calls, also one bound to a name (``swish = Swish.apply``).
_BENEATH: Any = torch.autograd.function._SingleLevelFunction


def _apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    watchers = list(_WATCHERS)
    for counter, observe, _ in watchers:
        if observe is not None and counter.depth == 0:
            observe(cls, args, kwargs)
    for counter, _, _ in watchers:
        counter.depth += 1
    try:
        result = applied(cls, args, kwargs)
    finally:
        for counter, _, _ in watchers:
            counter.depth -= 1
    for counter, _, returned in watchers:
        if returned is not None and counter.depth == 0:
            returned(result)
    for replace in _STANDING_IN:
        result = replace(cls, args, result)
    return result


@contextlib.contextmanager
def _applied_by_ours() -> Iterator[None]:
    """Have Functions applied by `_apply`; torch is left as it was."""
    before = vars(_BENEATH).get("apply")
    _BENEATH.apply = classmethod(_apply)
    try:
        yield
    finally:
        if before is None:
            del _BENEATH.apply
        else:
            _BENEATH.apply = before
