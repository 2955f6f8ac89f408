"""Running statistics of BatchNorm: they move by their own formula, once, at the right time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from audits.causes import Cause
from audits.checks.buffers import MOMENT
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.compare import rms, to_double
from audits.updates.record.buffer_watch import BufferWatch, Statistics
from audits.updates.record.shadow_modules import shadows_of
from audits.updates.update_rows import row
from audits.wording import module_label


def _allowed(expected: Statistics, eps: float, scales: tuple[float, float]) -> float:
    """Return the threshold in eps: what any kernel may be off by, and what torch's own is on these batches."""
    if expected.native is None or not expected.forwards:
        return MOMENT.value
    off = [
        rms(to_double(made) - meant) / (eps * scale) if scale else 0.0
        for made, meant, scale in zip(expected.native, (expected.mean, expected.variance), scales, strict=True)
    ]
    return MOMENT.value + min(max(off), expected.sums)


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
    shadows = tuple(shadow.prefix for shadow in shadows_of(subject))
    for path, expected in watch.statistics.items():
        if shadows and f"{path}.".startswith(shadows):
            continue  # a shadow's statistics are copied or averaged, not its own
        module: Any = subject.model.get_submodule(path)
        label = module_label(type(module), path)
        eps = torch.finfo(module.running_mean.dtype).eps
        scale_mean = rms(expected.mean) + expected.moment**0.5 + expected.weighed[0]
        scale_var = rms(expected.variance) + expected.moment + expected.weighed[1]
        error_mean = rms(to_double(module.running_mean) - expected.mean) / (eps * scale_mean) if scale_mean else 0.0
        error_var = rms(to_double(module.running_var) - expected.variance) / (eps * scale_var) if scale_var else 0.0
        error = max(error_mean, error_var)
        allowed = _allowed(expected, eps, (scale_mean, scale_var))
        common: dict[str, Any] = {"module": label, "step": number, "error": error, "threshold": allowed}
        counted = module.num_batches_tracked is None or int(module.num_batches_tracked) == expected.batches
        wanted = None if forwards is None else forwards.get(path, 0)
        if not error <= allowed or not counted:
            what = "running_mean" if error_mean >= error_var else "running_var"
            message = f"{path}: {what if not error <= allowed else 'num_batches_tracked'} is not what the batches of "
            message += f"step {number} make it"
            if not follows_torch(module):
                message += ", and its class has a forward of its own, whose formula nobody declared"
                yield row(subject, check, Outcome.INCONCLUSIVE, message, cause=Cause.OWN_CLASS, **common)
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


def follows_torch(module: nn.Module) -> bool:
    """Whether the module's forward is torch's own: a ghost or renormalising BatchNorm has statistics of its own."""
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    return owner.__module__.startswith("torch.nn.")
