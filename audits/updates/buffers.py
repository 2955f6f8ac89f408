"""Running statistics of BatchNorm and EMA shadows: they move by their own formula, once, at the right time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from audits.outcomes import Outcome, ResultRow
from audits.subject import Subject
from audits.updates.compare import rms, to_double
from audits.updates.rows import row

#: In eps of the buffer's dtype: a mean over a batch and one weighted sum.
THRESHOLD = 8.0

_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass
class _Statistics:
    """What one BatchNorm's buffers should be after the forwards so far."""

    mean: torch.Tensor
    variance: torch.Tensor
    batches: int
    forwards: int = 0
    moment: float = 0.0
    start: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class BufferWatch:
    """Follows BatchNorm inputs during the training step and works out the running statistics by the formula.

    ``mean = (1 - m) mean + m mean(x)``, ``var = (1 - m) var + m var(x) n / (n - 1)``; m is the momentum, or
    ``1 / batches`` when it is None.
    """

    subject: Subject
    statistics: dict[str, _Statistics] = field(default_factory=dict)
    declared: dict[str, int] = field(default_factory=dict)
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
        self.statistics, self.declared = {}, {}
        for path, module in self.subject.model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                mean, variance = to_double(module.running_mean), to_double(module.running_var)
                batches = int(module.num_batches_tracked) if module.num_batches_tracked is not None else 0
                self.statistics[path] = _Statistics(mean, variance, batches, start=(mean, variance))
                handles.append(module.register_forward_pre_hook(self._hook(path), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
            found.mean = (1.0 - momentum) * found.mean + momentum * mean
            found.variance = (1.0 - momentum) * found.variance + momentum * variance
            found.moment = max(found.moment, float(x.square().mean()))

        return hook


def batch_norm_rows(
    subject: Subject, watch: BufferWatch, number: int, forwards: dict[str, int] | None
) -> Iterator[ResultRow]:
    """Yield one ``buffers.batch-norm`` row per BatchNorm.

    Args:
        subject: the model after the step.
        watch: what was followed during it.
        number: of the training step.
        forwards: train-mode forwards of each BatchNorm in the declared losses alone, by path; the most that a step
            function should run (it may share a forward between phases). None where the step is our own.
    """
    check = "buffers.batch-norm"
    shadows = tuple(prefix for prefix, _, _ in declared_shadows(subject))
    for path, expected in watch.statistics.items():
        if shadows and f"{path}.".startswith(shadows):
            continue  # a shadow's statistics are copied or averaged, not its own
        module: Any = subject.model.get_submodule(path)
        label = f"{type(module).__name__} ({path})"
        eps = torch.finfo(module.running_mean.dtype).eps
        scale_mean = rms(expected.mean) + expected.moment**0.5
        scale_var = rms(expected.variance) + expected.moment
        error_mean = rms(to_double(module.running_mean) - expected.mean) / (eps * scale_mean) if scale_mean else 0.0
        error_var = rms(to_double(module.running_var) - expected.variance) / (eps * scale_var) if scale_var else 0.0
        error = max(error_mean, error_var)
        common: dict[str, Any] = {"module": label, "step": number, "error": error, "threshold": THRESHOLD}
        counted = module.num_batches_tracked is None or int(module.num_batches_tracked) == expected.batches
        wanted = None if forwards is None else forwards.get(path, 0)
        if not error <= THRESHOLD or not counted:
            what = "running_mean" if error_mean >= error_var else "running_var"
            message = f"{path}: {what if not error <= THRESHOLD else 'num_batches_tracked'} is not what the batches of "
            message += f"step {number} make it"
            if not _follows_torch(module):
                message += ", and its class has a forward of its own, whose formula nobody declared"
                yield row(subject, check, Outcome.INCONCLUSIVE, message, cause="own class", **common)
                continue
            yield row(subject, check, Outcome.FAIL, message, **common)
        elif wanted is not None and expected.forwards > wanted:
            message = (f"{path} ran {expected.forwards} times in train mode in step {number}; the declared loss runs it"
                       f" {wanted} times: its statistics moved by batches that were not trained on")  # fmt: skip
            yield row(subject, check, Outcome.FAIL, message, measured=float(expected.forwards), expected=float(wanted),
                      **common)  # fmt: skip
        else:
            moved = "moved by their formula" if expected.forwards else "stayed (eval mode)"
            yield row(subject, check, Outcome.PASS, f"{path}: running statistics {moved} in step {number}", **common)


def _follows_torch(module: nn.Module) -> bool:
    """Whether the module's forward is torch's own: a ghost or renormalising BatchNorm has statistics of its own."""
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    return owner.__module__.startswith("torch.nn.")


def ema_rows(subject: Subject, before: dict[str, torch.Tensor], number: int) -> Iterator[ResultRow]:
    """Yield one ``buffers.ema`` row per shadow tensor declared by ``expect["ema"]`` or held by an `AveragedModel`.

    ``expect["ema"]`` maps a shadow's path prefix to ``{"source": prefix, "decay": d}``;
    ``shadow' = d shadow + (1 - d) source'``, the source after the step. An `AveragedModel` inside the model averages
    equally, ``shadow' = shadow + (source' - shadow) / (n + 1)``, unless its decay is declared.
    """
    check = "buffers.ema"
    now = tensors_of(subject.model)
    for prefix, source, decay in declared_shadows(subject):
        pairs = [
            (n, source + n[len(prefix) :]) for n in now if n.startswith(prefix) and source + n[len(prefix) :] in now
        ]
        if not pairs:
            message = f"expect['ema'] names {prefix!r} as a shadow of {source!r}: no tensors match"
            yield row(subject, check, Outcome.INCONCLUSIVE, message, cause="matches nothing")
            continue
        averaged = _averaged_at(subject.model, prefix)
        for shadow, weight in pairs:
            copied = weight not in subject.parameters
            if not now[shadow].is_floating_point() or (copied and (averaged is None or averaged.use_buffers)):
                continue  # shadows of buffers are averaged by some and copied by others
            start, target, moved = to_double(before[shadow]), to_double(now[weight]), to_double(now[shadow])
            keep = decay if decay is not None else 0.0
            if averaged is not None:
                keep = 0.0 if copied else _averaged_decay(prefix, before, decay)
            expected = keep * start + (1.0 - keep) * target
            scale = torch.finfo(now[shadow].dtype).eps * (rms(expected) + rms(start))
            off = rms(moved - expected)
            error = off / scale if scale else (float("inf") if off else 0.0)
            met = error <= THRESHOLD
            message = f"{shadow} moved towards {weight} with decay {keep:g} in step {number}"
            if not met:
                message = f"{shadow} should be {keep:g} of itself and {1 - keep:g} of {weight} after step {number}"
                message += _how_it_moved(start, target, to_double(before[weight]), moved, keep)
            yield row(subject, check, Outcome.PASS if met else Outcome.FAIL, message, step=number, error=error,
                      parameter=shadow if shadow in subject.parameters else None, threshold=THRESHOLD)  # fmt: skip


def _how_it_moved(
    start: torch.Tensor, target: torch.Tensor, old: torch.Tensor, moved: torch.Tensor, keep: float
) -> str:
    if torch.equal(moved, start):
        return ": it did not move"
    if rms(moved - (keep * start + (1.0 - keep) * old)) <= 1e-6 * rms(start) and not torch.equal(old, target):
        return ": it averaged the weights from before the step"
    gap = float(((target - start) ** 2).sum())
    if gap:
        share = float(((moved - start) * (target - start)).sum()) / gap
        return f": it moved {share:.4g} of the way (decay {1 - share:.6g})"
    return ""


def _averaged_at(model: nn.Module, prefix: str) -> AveragedModel | None:
    modules = dict(model.named_modules())
    found = modules.get(prefix.removesuffix(".").removesuffix(".module"))
    return found if isinstance(found, AveragedModel) else None


def _averaged_decay(prefix: str, before: dict[str, torch.Tensor], decay: float | None) -> float:
    """An `AveragedModel` copies the first time, then averages equally or with its decay."""
    count = int(before[prefix.removesuffix("module.") + "n_averaged"])
    if not count:
        return 0.0
    return count / (count + 1.0) if decay is None else decay


def declared_shadows(subject: Subject) -> list[tuple[str, str, float | None]]:
    """Return (shadow prefix, source prefix, decay or None for an equal average)."""
    found: list[tuple[str, str, float | None]] = []
    declared = subject.recipe.expect.get("ema") or {}
    for prefix, what in declared.items() if isinstance(declared, dict) else ():
        if isinstance(what, dict):
            shadow = _dotted(prefix)
            if not shadow.endswith("module.") and _averaged_at(subject.model, shadow) is not None:
                shadow += "module."
            decay = what.get("decay")
            found.append((shadow, _dotted(str(what.get("source", ""))), None if decay is None else float(decay)))
    known = {prefix for prefix, _, _ in found}
    for path, module in subject.model.named_modules():
        inner = f"{path}.module."
        if path and isinstance(module, AveragedModel) and inner not in known:
            source = _source_of(subject.model, path, module)
            if source:
                found.append((inner, source, None))
    return found


def _source_of(model: nn.Module, path: str, averaged: AveragedModel) -> str | None:
    """The module of the same class and shapes that an `AveragedModel` follows, when there is just one."""
    shapes = [(n, p.shape) for n, p in averaged.module.named_parameters()]
    twins = [
        name
        for name, module in model.named_modules()
        if name and type(module) is type(averaged.module) and not f"{name}.".startswith(f"{path}.")
        and [(n, p.shape) for n, p in module.named_parameters()] == shapes
    ]  # fmt: skip
    plain = averaged.multi_avg_fn is None and averaged.avg_fn is None
    return f"{twins[0]}." if len(twins) == 1 and plain else None


def _dotted(prefix: str) -> str:
    prefix = prefix.removesuffix("*")
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return clones of all parameters and buffers by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}
