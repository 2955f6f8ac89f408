"""What a step function does besides stepping: which modules ran in which mode, and what torch's clipping saw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from audits.subject import Subject


@dataclass(frozen=True)
class ClippingCall:
    """One call of torch's norm clipping."""

    norm: float
    max_norm: float


class Watch:
    """Listens to the modules' forwards and to `torch.nn.utils.clip_grad_norm_`, however it was imported."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._declared = {path: module.training for path, module in subject.model.named_modules()}
        self._paused = False
        self._pending: list[ClippingCall] = []
        self.clipping: dict[str, list[ClippingCall]] = {}
        self.wrong_modes: dict[str, bool] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen during one training step."""
        self._pending, self.clipping, self.wrong_modes = [], {}, {}
        handles = []
        if self._subject.recipe.step is not None:
            modules = self._subject.model.named_modules()
            handles = [module.register_forward_pre_hook(self._mode(path)) for path, module in modules]
        clip_grad: Any = torch.nn.utils.clip_grad
        original = clip_grad._clip_grads_with_norm_
        clip_grad._clip_grads_with_norm_ = self._clipping(original)
        try:
            yield
        finally:
            clip_grad._clip_grads_with_norm_ = original
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not listen while the audit itself evaluates the model."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def take_clipping(self, phase: str) -> list[ClippingCall]:
        """Return the clipping since the last optimizer step, and file it under the phase that steps now."""
        taken, self._pending = self._pending, []
        self.clipping.setdefault(phase, []).extend(taken)
        return taken

    def _mode(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            if not self._paused and module.training is not self._declared.get(path, module.training):
                self.wrong_modes[path] = module.training

        return hook

    def _clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip(parameters: Any, max_norm: float, total_norm: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._paused:
                self._pending.append(ClippingCall(float(total_norm), float(max_norm)))
            return original(parameters, max_norm, total_norm, *args, **kwargs)

        return clip
