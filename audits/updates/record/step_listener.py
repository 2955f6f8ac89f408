"""What a step function does besides stepping: which modules ran in which mode, and what torch's clipping saw."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from audits.live.subject import Subject
from audits.structures import tensors_in
from audits.updates.pausing import Pausable


@dataclass(frozen=True)
class ClippingCall:
    """One call of torch's norm clipping: the norm it saw, the limit, and the norm's order."""

    norm: float
    max_norm: float
    order: float = 2.0


class StepListener(Pausable):
    """Listens to the modules' forwards and to `torch.nn.utils.clip_grad_norm_`, however it was imported."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._declared = {path: module.training for path, module in subject.model.named_modules()}
        self._pending: list[ClippingCall] = []
        self._order = 2.0
        self.wrong_modes: dict[str, bool] = {}
        #: Of each forward under way, the modules inside it that run in another mode than the declared one.
        self._open: list[dict[str, bool]] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen during one training step."""
        self._pending, self.wrong_modes = [], {}
        handles = []
        if self._subject.recipe.step is not None:
            self._open = []
            for path, module in self._subject.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(path)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        clip_grad: Any = torch.nn.utils.clip_grad
        original, norm_of = clip_grad._clip_grads_with_norm_, clip_grad._get_total_norm
        clip_grad._clip_grads_with_norm_ = self._clipping(original)
        clip_grad._get_total_norm = self._noting_order(norm_of)
        try:
            yield
        finally:
            clip_grad._clip_grads_with_norm_, clip_grad._get_total_norm = original, norm_of
            for handle in handles:
                handle.remove()

    def take_clipping(self) -> list[ClippingCall]:
        """Return the clipping since the last optimizer step."""
        taken, self._pending = self._pending, []
        return taken

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            wrong = not self.is_paused and module.training is not self._declared.get(path, module.training)
            self._open.append({path: module.training} if wrong else {})

        return hook

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        """Note wrong modes once a gradient flows back through the output: what is only measured leads to none.

        A module without gradients of its own, a frozen backbone, counts when that of the module around it arrives.
        """
        wrong = self._open.pop() if self._open else {}
        if not wrong or self.is_paused:
            return
        through = [t for _, t in tensors_in(output) if t.requires_grad and not t.is_leaf]
        for tensor in through:
            tensor.register_hook(lambda _: self.wrong_modes.update(wrong))
        if self._open and not through:
            self._open[-1].update(wrong)

    def _noting_order(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def total_norm(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
            if not self.is_paused:
                self._order = float(norm_type)
            return original(tensors, norm_type, *args, **kwargs)

        return total_norm

    def _clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip(parameters: Any, max_norm: float, total_norm: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.is_paused and not math.isinf(max_norm):  # an infinite limit only measures the norm
                self._pending.append(ClippingCall(float(total_norm), float(max_norm), self._order))
            return original(parameters, max_norm, total_norm, *args, **kwargs)

        return clip
