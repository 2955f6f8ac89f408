"""BatchNorm's inputs during a training step, and the running statistics that its formula makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from audits.live.subject import Subject
from audits.updates.compare import rms, to_double
from audits.updates.record.shadow_modules import shadows_of

#: torch's kernel for the CPU in channels_last sums up one value after the other in float32 (2.13): n values of one sign
#: are off by n roundoffs at most, and 12 eps were measured at n = 32,768, 560 eps at n = 401,408, where the statistics
#: are the batch's alone (momentum 1). So far the kernel's own distance from the formula is allowed on top.
_SEQUENTIAL = 0.5

_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass
class Statistics:
    """What one BatchNorm's buffers should be after the forwards so far."""

    mean: torch.Tensor
    variance: torch.Tensor
    batches: int
    forwards: int = 0
    moment: float = 0.0
    start: tuple[torch.Tensor, torch.Tensor] | None = None
    #: Largest rms of what was averaged with a batch: torch's kernels round 1 - momentum as a number near 1, half an ulp
    #: of 1 times what it weighs.
    weighed: tuple[float, float] = (0.0, 0.0)
    #: The buffers as torch's kernel makes them of the same batches, and how far off its sums may be, in eps.
    native: tuple[torch.Tensor, torch.Tensor] | None = None
    sums: float = 0.0


@dataclass
class BufferWatch:
    """Follows BatchNorm inputs during the training step and works out the running statistics by the formula.

    ``mean = (1 - m) mean + m mean(x)``, ``var = (1 - m) var + m var(x) n / (n - 1)``; m is the momentum, or
    ``1 / batches`` when it is None.
    """

    subject: Subject
    statistics: dict[str, Statistics] = field(default_factory=dict)
    declared: dict[str, int] = field(default_factory=dict)
    #: What a source's buffers were between two of its forwards in the step, where shadows are followed.
    between: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    #: Modules with buffers, of shadows and sources, that ran in the step.
    ran: set[str] = field(default_factory=set)
    _counting: bool = False
    _trial: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the forwards of the declared loss instead of following them."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def begin_trial(self) -> None:
        """Forget the forwards of an evaluation that is made again."""
        self._trial = {}

    def end_trial(self) -> None:
        """Add the forwards of the evaluation that counts."""
        for path, count in self._trial.items():
            self.declared[path] = self.declared.get(path, 0) + count
        self._trial = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen during one training step."""
        handles = []
        self.statistics, self.declared, self.between, self.ran = {}, {}, {}, set()
        followed = tuple(p for shadow in shadows_of(self.subject) for p in (shadow.prefix, shadow.source))
        for path, module in self.subject.model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                mean, variance = to_double(module.running_mean), to_double(module.running_var)
                batches = int(module.num_batches_tracked) if module.num_batches_tracked is not None else 0
                self.statistics[path] = Statistics(mean, variance, batches, start=(mean, variance))
                self.statistics[path].native = (module.running_mean.clone(), module.running_var.clone())
                handles.append(module.register_forward_pre_hook(self._hook(path), with_kwargs=True))
            if followed and f"{path}.".startswith(followed) and module._buffers:
                handles.append(module.register_forward_pre_hook(self._followed(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _followed(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            if self._counting:
                return
            if path in self.ran:
                for name, buffer in module.named_buffers(recurse=False):
                    full = f"{path}.{name}" if path else name
                    self.between.setdefault(full, []).append(buffer.detach().clone())
            self.ran.add(path)

        return hook

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else named.get("input")
            if not module.training or not isinstance(x, torch.Tensor):
                return
            if self._counting:
                self._trial[path] = self._trial.get(path, 0) + 1
                return
            found = self.statistics[path]
            x = x.detach()
            axes = [axis for axis in range(x.dim()) if axis != 1]
            x = x.to(torch.float64)
            count = x.numel() // x.shape[1]
            mean, variance = x.mean(axes), x.var(axes, unbiased=count > 1)
            found.forwards += 1
            found.batches += 1
            momentum = 1.0 / found.batches if module.momentum is None else float(module.momentum)
            found.weighed = (max(found.weighed[0], rms(found.mean)), max(found.weighed[1], rms(found.variance)))
            found.mean = (1.0 - momentum) * found.mean + momentum * mean
            found.variance = (1.0 - momentum) * found.variance + momentum * variance
            found.moment = max(found.moment, float(x.square().mean()))
            found.native = _by_torch(found.native, inputs[0] if inputs else named["input"], momentum)
            found.sums = (1.0 - momentum) * found.sums + momentum * _SEQUENTIAL * count

        return hook


_Buffers = tuple[torch.Tensor, torch.Tensor]


def _by_torch(native: _Buffers | None, x: torch.Tensor, momentum: float) -> _Buffers | None:
    """Return the running statistics after one more batch, as torch's own kernel has them; None where it cannot."""
    if native is None:
        return None
    try:
        with torch.no_grad():
            functional.batch_norm(x.detach(), *native, training=True, momentum=momentum)
    except (RuntimeError, ValueError, TypeError):
        return None
    return native
