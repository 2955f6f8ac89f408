"""Stop-gradients: values that depend on the parameters and that autograd is told to hold constant.

`detach()`, `.data`, Python-level `no_grad`, floating `.item()` and gradients taken without ``create_graph=True`` make
the loss depend on a parameter in a way no gradient shows. Holding exactly those values at theta makes the finite
difference the derivative autograd means: when that agrees, the stop-gradient is the cause. The C++ no-grad inside
`autograd.Function.forward` is not a stop-gradient.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from audits.lanes.kinks.straight_through import SignedTerms
from audits.lanes.watching import LOSS_PATH, FunctionDepth, ModuleStack
from audits.structures import any_tensor

_DETACH: frozenset[Any] = frozenset(
    {torch.Tensor.detach, torch.Tensor.detach_, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
)
_GIVES_GRADIENT: frozenset[Any] = frozenset(
    {torch.autograd.grad, torch.Tensor.grad.__get__}  # type: ignore[attr-defined,union-attr]
)
_TO_PYTHON: frozenset[Any] = frozenset(
    {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.numpy, torch.Tensor.__array__}
)

_TORCH = os.path.dirname(torch.__file__) + os.sep
_BUILT_IN = os.path.join(_TORCH, "nn") + os.sep
#: Frames between the caller and the mode: they carry the call, they do not decide on it.
_CARRIERS = tuple(
    os.path.join(_TORCH, name)
    for name in ("overrides.py", "_tensor.py", "nn/functional.py", "utils/_contextlib.py", "autograd/__init__.py")
)


#: A gradient of the loss's own that is no function of the parameters for autograd.
FIRST_ORDER = "autograd.grad without create_graph"


@dataclass(frozen=True)
class StopSite:
    """One place where a value is held constant.

    Attributes:
        kind: ``detach``, ``no_grad``, ``item``, or `FIRST_ORDER`.
        path: the module that does it, ``loss`` outside of all.
        places: the paths under which a recipe may declare it: the module that does it, and the one that runs meanwhile.
        label: where, for people.
        built_in: whether torch's own module does it (spectral_norm's power iteration).
        source: ``file.py:line`` that does it.
        straight: whether it makes a straight-through estimate: it meets what it stops, with the other sign, in a sum.
    """

    kind: str
    path: str
    places: tuple[str, ...]
    label: str
    built_in: bool
    source: str
    straight: bool = False

    def declared(self, scopes: tuple[str, ...]) -> bool:
        """Whether the recipe declares this place, or a module around it.

        Never for a first-order gradient: who means a constant there writes ``.detach()``, which can be declared.
        """
        return self.kind != FIRST_ORDER and any(
            place == scope or place.startswith(f"{scope}.") for scope in scopes for place in self.places
        )


class StopGradients:
    """Record the stop-gradients of one forward and hold some of them at their recorded values in the next ones."""

    def __init__(self, model: nn.Module, frozen: Callable[[StopSite], bool]) -> None:
        self.sites: list[StopSite] = []
        self._values: list[Any] = []
        self._frozen = frozen
        self._stack = ModuleStack(model)
        self._functions = FunctionDepth()
        self._recording = True
        self.terms = SignedTerms(self._is_straight)

    def at_point(self) -> None:
        """Record in the next evaluation."""
        self._recording = True

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Evaluate once, recording or holding."""
        recording, self._recording = self._recording, False
        if recording:
            self.sites, self._values = [], []
            self.terms = SignedTerms(self._is_straight)
        with self._stack.watching(), self._functions.watching(), _Mode(self, recording):
            yield

    def met(self, position: int, kind: str, result: Any, target: Any, recording: bool) -> Any:
        """Record a site's value, or return the held one."""
        if recording:
            inner = self._stack.path
            outer, owner = self._stack.outside()
            path = outer if kind == "no_grad" else inner
            if path == LOSS_PATH:
                path = self._stack.outermost or LOSS_PATH  # a target network under the loss's no_grad
            file, line = caller()
            built_in = owner is not None and owner.__module__.startswith("torch.nn.") and file.startswith(_BUILT_IN)
            places = (path, inner, outer if kind == "no_grad" else inner)
            source = f"{os.path.basename(file)}:{line}"
            self.sites.append(StopSite(kind, path, places, self._stack.label(path), built_in, source))
            self._values.append(_copied(result))
        if position >= len(self.sites) or self.sites[position].kind != kind or not self._frozen(self.sites[position]):
            return result
        held = _copied(self._values[position])
        if target is not None and isinstance(held, torch.Tensor):
            target.copy_(held)
            return target
        return held

    def _is_straight(self, position: int) -> None:
        self.sites[position] = replace(self.sites[position], straight=True)

    @property
    def inside_function(self) -> bool:
        """Whether an autograd.Function's forward is running."""
        return self._functions.depth > 0


class _Mode(TorchFunctionMode):
    def __init__(self, stops: StopGradients, recording: bool) -> None:
        super().__init__()
        self._stops = stops
        self._recording = recording
        self._position = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.gumbel_softmax:
            return self._gumbel_softmax(*args, **kwargs)
        result = func(*args, **kwargs)
        if self._stops.inside_function:
            return result
        if self._recording:
            self._stops.terms.see(func, args, kwargs, result)
        target = None
        if func in _GIVES_GRADIENT:
            if not _is_floating(result) or _requires_grad(result):
                return result
            kind = FIRST_ORDER
        elif func in _DETACH:
            kind = "detach"
        elif func in _TO_PYTHON:
            kind = "item"
        elif not torch.is_grad_enabled():
            kind = "no_grad"
            target = kwargs.get("out")
            if target is None and args and result is args[0]:
                target = result
        else:
            return result
        if not _is_floating(result):
            return result
        position, self._position = self._position, self._position + 1
        # what is copied here is no part of the forward: the dispatch modes must not see it
        with torch.no_grad(), _disable_current_modes():
            held = self._stops.met(position, kind, result, target, self._recording)
        if self._recording:
            self._stops.terms.stop(args[0] if kind == "detach" else result, held, position)
        return held

    def _gumbel_softmax(
        self, logits: torch.Tensor, tau: float = 1.0, hard: bool = False, eps: float = 1e-10, dim: int = -1
    ) -> torch.Tensor:
        """Run `gumbel_softmax` with the detach inside its hard form in sight: torch hands the function over whole."""
        soft = functional.gumbel_softmax(logits, tau=tau, hard=False, dim=dim)
        if not hard:
            return soft
        sample = torch.zeros_like(logits).scatter_(dim, soft.max(dim, keepdim=True)[1], 1.0)
        with self:
            return sample - soft.detach() + soft


def _is_floating(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    if isinstance(value, (list, tuple)):
        return any(_is_floating(item) for item in value)
    return isinstance(value, float) or type(value).__name__ == "ndarray"


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value.copy() if type(value).__name__ == "ndarray" else value


def _requires_grad(value: Any) -> bool:
    return any_tensor(value, lambda tensor: tensor.requires_grad)


def caller(*watching: str) -> tuple[str, int]:
    """Return file and line of the code that decided on the call, past torch's carriers and the ``watching`` files."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in (__file__, *watching) and not name.startswith(_CARRIERS):
            return str(name), int(frame.f_lineno)
        frame = frame.f_back
    return "", 0
