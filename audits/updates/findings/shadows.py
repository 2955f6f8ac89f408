"""EMA shadows: their parameters move by the declared decay towards the weights after the step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.judge.compare import rms, to_double
from audits.updates.update_rows import row

#: In eps of the shadow's dtype: one weighted sum.
THRESHOLD = 8.0


@dataclass(frozen=True)
class Shadow:
    """A module that follows another one.

    Attributes:
        prefix: of the shadow's tensors, with its dot.
        source: prefix of the tensors that it follows.
        decay: None for an equal average.
        declared: by ``expect["ema"]``; otherwise an `AveragedModel` that was found.
        buffers: how its buffers are declared to follow: copied, averaged, left; None where either is right.
    """

    prefix: str
    source: str
    decay: float | None
    declared: bool
    buffers: str | None = None

    def pairs(self, names: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
        """Return (tensor of the shadow, tensor that it follows)."""
        found = ((name, self.source + name[len(self.prefix) :]) for name in names if name.startswith(self.prefix))
        return [(shadow, weight) for shadow, weight in found if weight in names]

    def keep(self, subject: Subject, before: dict[str, torch.Tensor]) -> float:
        """Return the share of itself that an averaged tensor keeps in this step."""
        if averaged_at(subject.model, self.prefix) is None:
            return self.decay if self.decay is not None else 0.0
        count = int(before[self.prefix.removesuffix("module.") + "n_averaged"])
        if not count:
            return 0.0  # an `AveragedModel` copies the first time, then averages equally or with its decay
        return count / (count + 1.0) if self.decay is None else self.decay


def ema_rows(subject: Subject, before: dict[str, torch.Tensor], number: int) -> Iterator[ResultRow]:
    """Yield one ``buffers.ema`` row per shadow parameter declared by ``expect["ema"]`` or held by an `AveragedModel`.

    ``expect["ema"]`` maps a shadow's path prefix to ``{"source": prefix, "decay": d}``;
    ``shadow' = d shadow + (1 - d) source'``, the source after the step. An `AveragedModel` inside the model averages
    equally, ``shadow' = shadow + (source' - shadow) / (n + 1)``, unless its decay is declared or torch's own.
    """
    check = "buffers.ema"
    now = tensors_of(subject.model)
    for following in shadows_of(subject):
        pairs = following.pairs(now)
        if not pairs:
            message = (f"expect['ema'] names {following.prefix!r} as a shadow of {following.source!r}: no tensors "
                       "match")  # fmt: skip
            yield row(subject, check, Outcome.INCONCLUSIVE, message, cause="matches nothing")
        keep = following.keep(subject, before) if pairs else 0.0
        for shadow, weight in pairs:
            if weight not in subject.parameters or not now[shadow].is_floating_point():
                continue
            start, target, moved = to_double(before[shadow]), to_double(now[weight]), to_double(now[shadow])
            # On a device an `AveragedModel` divides 1 by its count there, an integer, in float32.
            equal = following.decay is None and averaged_at(subject.model, following.prefix) is not None
            slack = torch.finfo(torch.float32).eps * (1.0 - keep) * rms(target - start) if equal else 0.0
            error = distance(moved, keep * start + (1.0 - keep) * target, start, now[shadow].dtype, slack)
            met = error <= THRESHOLD
            message = f"{shadow} moved towards {weight} with decay {keep:g} in step {number}"
            if not met:
                message = f"{shadow} should be {keep:g} of itself and {1 - keep:g} of {weight} after step {number}"
                message += how_it_moved(start, target, to_double(before[weight]), moved, keep)
            yield row(subject, check, Outcome.PASS if met else Outcome.FAIL, message, step=number, error=error,
                      parameter=shadow if shadow in subject.parameters else None, threshold=THRESHOLD)  # fmt: skip


def distance(
    moved: torch.Tensor, expected: torch.Tensor, start: torch.Tensor, dtype: torch.dtype, slack: float = 0.0
) -> float:
    """Return ``(rms(moved - expected) - slack) / (eps (rms(expected) + rms(start)))``, eps of the shadow's dtype."""
    scale = torch.finfo(dtype).eps * (rms(expected) + rms(start))
    off = max(0.0, rms(moved - expected) - slack)
    return off / scale if scale else (float("inf") if off else 0.0)


def how_it_moved(start: torch.Tensor, target: torch.Tensor, old: torch.Tensor, moved: torch.Tensor, keep: float) -> str:
    """Return what a shadow did instead, as the end of a sentence; empty where nothing simple explains it."""
    if torch.equal(moved, start):
        return ": it did not move"
    if rms(moved - (keep * start + (1.0 - keep) * old)) <= 1e-6 * rms(start) and not torch.equal(old, target):
        return ": it averaged the weights from before the step"
    gap = float(((target - start) ** 2).sum())
    if gap:
        share = float(((moved - start) * (target - start)).sum()) / gap
        return f": it moved {share:.4g} of the way (decay {1 - share:.6g})"
    return ""


def averaged_at(model: nn.Module, prefix: str) -> AveragedModel | None:
    """Return torch's `AveragedModel` whose tensors have this prefix."""
    modules = dict(model.named_modules())
    found = modules.get(prefix.removesuffix(".").removesuffix(".module"))
    return found if isinstance(found, AveragedModel) else None


def shadows_of(subject: Subject) -> list[Shadow]:
    """Return the shadows that are declared, and the `AveragedModel` whose source and decay are plain."""
    found: list[Shadow] = []
    declared = subject.recipe.expect.get("ema") or {}
    for prefix, what in declared.items() if isinstance(declared, dict) else ():
        if isinstance(what, dict):
            shadow = _dotted(prefix)
            if not shadow.endswith("module.") and averaged_at(subject.model, shadow) is not None:
                shadow += "module."
            decay = what.get("decay")
            found.append(Shadow(shadow, _dotted(str(what.get("source", ""))), None if decay is None else float(decay),
                                True, what.get("buffers")))  # fmt: skip
    known = {shadow.prefix for shadow in found}
    for path, module in subject.model.named_modules():
        inner = f"{path}.module."
        if path and isinstance(module, AveragedModel) and inner not in known:
            plain, decay = _plain_average(module)
            source = _source_of(subject.model, path, module) if plain else None
            if source:
                found.append(Shadow(inner, source, decay, False))
    return found


def _plain_average(averaged: AveragedModel) -> tuple[bool, float | None]:
    """Whether the average is one of torch's own, and its decay (None for an equal average)."""
    given: Any = averaged.multi_avg_fn or averaged.avg_fn
    if given is None:
        return True, None
    name = getattr(given, "__qualname__", "")
    if getattr(given, "__module__", "") != AveragedModel.__module__ or "get_ema_" not in name:
        return "get_swa_" in name, None
    decay = inspect.getclosurevars(inspect.unwrap(given)).nonlocals.get("decay")
    return decay is not None, decay


def _source_of(model: nn.Module, path: str, averaged: AveragedModel) -> str | None:
    """The module of the same class and shapes that an `AveragedModel` follows, when there is just one."""
    shapes = [(n, p.shape) for n, p in averaged.module.named_parameters()]
    twins = [
        name
        for name, module in model.named_modules()
        if name and type(module) is type(averaged.module) and not f"{name}.".startswith(f"{path}.")
        and [(n, p.shape) for n, p in module.named_parameters()] == shapes
    ]  # fmt: skip
    return f"{twins[0]}." if len(twins) == 1 else None


def _dotted(prefix: str) -> str:
    prefix = prefix.removesuffix("*")
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return clones of all parameters and buffers by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}
