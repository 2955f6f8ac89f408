"""An optimizer without a reference rule: what any sound first-order optimizer does on synthetic gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from audits.outcomes import Lane, Outcome, ResultRow
from audits.subject import LivePhase, Subject
from audits.updates.compare import rms, to_double
from audits.updates.replay import Replay
from audits.updates.rows import row
from audits.updates.synthetic import Synthetic, synthesize

#: Relative difference that separates rounding from a rule that is not the same: float64 arithmetic over three steps.
SAME = 1e-6

#: Steps over which permuted and scaled runs are compared.
STEPS = 3


def invariant_rows(subject: Subject, phase: LivePhase, seed: int) -> list[ResultRow]:
    """Return one ``optimizer.invariants`` row.

    Fails: a step on fresh state that does not descend (unless ``maximize``), a None gradient that moves its tensor,
    runs that differ between repeats. Only noted, as some rules break them on purpose: the update is proportional to
    lr (not for Rprop-like rules), and permuting elements permutes the update (not for matrix rules).
    """
    check = "optimizer.invariants"
    common: dict[str, Any] = {"phase": phase.name, "lane": Lane.SYNTHETIC}
    name = phase.recipe.optimizer.class_path
    synthetic = synthesize(subject, phase, None, seed)
    broken: list[str] = []
    noted: list[str] = []
    try:
        for claim, holds, fatal in _claims(synthetic):
            if not holds():
                (broken if fatal else noted).append(claim)
    except Exception as error:
        message = f"{name} could not take synthetic gradients: {type(error).__name__}: {error}"
        return [row(subject, check, Outcome.INCONCLUSIVE, message, cause="probe raised", **common)]
    if broken:
        return [row(subject, check, Outcome.FAIL, f"{name}: {'; '.join(broken)}", **common)]
    message = f"{name}: invariants only, there is no reference rule to hold it to"
    if noted:
        message += f" (by its nature or by mistake: {'; '.join(noted)})"
    return [row(subject, check, Outcome.PASS, message, cause="invariants only", **common)]


def _claims(synthetic: Synthetic) -> Iterator[tuple[str, Callable[[], bool], bool]]:
    yield "a step on fresh state does not descend along the gradient", lambda: _descends(synthetic), True
    yield "a tensor whose gradient is None was moved", lambda: _leaves_none(synthetic), True
    yield "two runs from the same start differ", lambda: _deterministic(synthetic), True
    yield "the update is not proportional to lr", lambda: _homogeneous(synthetic), False
    yield "elements are not treated alike", lambda: _equivariant(synthetic), False


def _run(
    synthetic: Synthetic, *, lr: float = 1.0, decay: bool = False, order: dict[str, torch.Tensor] | None = None,
    without: str | None = None,
) -> list[dict[str, torch.Tensor]]:  # fmt: skip
    overrides: dict[str, Any] = {}
    option = next(iter(synthetic.options.values()))
    if isinstance(option.get("lr"), float) and lr != 1.0:
        overrides["lr"] = option["lr"] * lr
    if "weight_decay" in option and not decay:
        overrides["weight_decay"] = 0.0
    replay = Replay(synthetic.recipe, synthetic.wide[0], torch.float64, {}, overrides)
    updates = []
    for weights, gradients in list(zip(synthetic.wide, synthetic.gradients, strict=True))[:STEPS]:
        chosen = {n: None if n == without else g for n, g in gradients.items()}
        held = dict(weights)
        if order is not None:
            chosen = {n: None if g is None else _permute(g, order[n]) for n, g in chosen.items()}
            held = {n: _permute(w, order[n]) for n, w in weights.items()}
        updates.append(replay.step(held, chosen, synthetic.options))
    return updates


def _permute(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)[order].view(tensor.shape)


def _descends(synthetic: Synthetic) -> bool:
    first, ascends = _run(synthetic)[0], 1.0
    slopes = []
    for name, update in first.items():
        gradient = synthetic.gradients[0][name]
        assert gradient is not None
        ascends = -1.0 if synthetic.options[name].get("maximize") else 1.0
        slopes.append(ascends * float((update * to_double(gradient)).sum()))
    return all(slope < 0 for slope in slopes)


def _leaves_none(synthetic: Synthetic) -> bool:
    name = next(iter(synthetic.native))
    return all(not rms(update[name]) for update in _run(synthetic, decay=True, without=name))


def _deterministic(synthetic: Synthetic) -> bool:
    one, other = _run(synthetic), _run(synthetic)
    return all(torch.equal(a[n], b[n]) for a, b in zip(one, other, strict=True) for n in a)


def _homogeneous(synthetic: Synthetic) -> bool:
    one, half = _run(synthetic)[0], _run(synthetic, lr=0.5)[0]
    return all(rms(half[n] - one[n] / 2) <= SAME * rms(one[n]) for n in one)


def _equivariant(synthetic: Synthetic) -> bool:
    generator = torch.Generator().manual_seed(0)
    order = {n: torch.randperm(w.numel(), generator=generator) for n, w in synthetic.wide[0].items()}
    plain, permuted = _run(synthetic), _run(synthetic, order=order)
    return all(
        rms(b[n] - _permute(a[n], order[n])) <= SAME * rms(a[n])
        for a, b in zip(plain, permuted, strict=True)
        for n in a
    )
