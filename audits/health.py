"""Health of the gradients and of the step: vanishing, exploding, dead, saturated. Never more than a warning."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from audits.backward import by_grad_or_backward, gradients_of
from audits.outcomes import Check, Outcome, ResultRow, Severity, finite
from audits.subject import LivePhase, Subject
from audits.updates.compare import to_double

_WARN = Severity.WARN

HEALTH_CHECKS: tuple[Check, ...] = (
    Check(
        name="health.vanishing",
        claim="The gradient does not vanish on its way to the first layers.",
        severity=_WARN,
        formula="norm(first) / norm(last) over weights in forward order; mean |g|",
        threshold="ratio 1e-3 with a first norm below 1e-4; or mean |g| below 1e-7 everywhere",
        where_to_look="Initialisation, normalisation, residual paths; a converged model has small gradients too.",
    ),
    Check(
        name="health.exploding",
        claim="The gradient does not explode.",
        severity=_WARN,
        formula="norm of the parameter's gradient",
        threshold="70, or not finite",
        where_to_look="Learning rate, initialisation, clipping.",
    ),
    Check(
        name="health.all-zero",
        claim="No parameter's gradient is all zero.",
        severity=_WARN,
        threshold="some element not 0",
        where_to_look="Dead units, a branch the batch does not use, a zero-initialised factor.",
    ),
    Check(
        name="health.update-ratio",
        claim="A step moves a weight by a small part of itself.",
        severity=_WARN,
        formula="norm(update) / norm(weight)",
        threshold="0.3",
        where_to_look="The learning rate; freshly zero-initialised weights are not judged.",
    ),
    Check(
        name="health.dead-relu",
        claim="No ReLU is off for a whole batch.",
        severity=_WARN,
        formula="share of units that are 0 for every example",
        threshold="0.5",
        where_to_look="Large negative biases, a learning rate that once was too high.",
    ),
    Check(
        name="health.saturation",
        claim="Sigmoids and tanhs work away from their flat ends.",
        severity=_WARN,
        formula="share of outputs within 1e-3 of an end",
        threshold="0.5",
        where_to_look="Scale of the inputs and of the weights before them.",
    ),
)

_BY_NAME = {check.name: check for check in HEALTH_CHECKS}

#: Mean absolute gradient below which a whole tensor counts as vanishing: a step of 1e-3 of it is lost in float32.
VANISHING_MEAN = 1e-7
#: Share of dead or saturated units above which a layer warns.
LAYER_SHARE = 0.5
#: Distance from an end of a sigmoid's or tanh's range within which its slope is below 1e-3 (sigmoid), 2e-3 (tanh).
SATURATED = 1e-3
#: Weights of a smaller rms (zero-initialised scales and factors) have no meaningful update ratio.
TINY_WEIGHT = 1e-3


@dataclass
class _Activity:
    """Share of dead or saturated units of one module over the loss's forwards."""

    check: str
    dead: torch.Tensor | None = None
    counts: list[float] = field(default_factory=list)


def check_health(subject: Subject) -> list[ResultRow]:
    """Return the rows of ``health.*``: one gradient evaluation and one optimizer step per phase.

    Args:
        subject: the model under audit; left at its start.
    """
    if not subject.settings.wants_check(*_BY_NAME):
        return []
    rows: list[ResultRow] = []
    try:
        for phase in subject.phases:
            activity = _Listener(subject)
            gradients = by_grad_or_backward(functools.partial(_evaluate, subject, phase, activity))
            rows += _gradients(subject, phase, gradients)
            rows += activity.rows(phase)
            rows += _updates(subject, phase, gradients)
    finally:
        subject.reset()
    return [
        r for r in rows
        if subject.settings.wants_check(r.check)
        and (r.parameter is None or subject.settings.wants_parameter(r.parameter))
    ]  # fmt: skip


def _evaluate(subject: Subject, phase: LivePhase, activity: _Listener, plain: bool) -> dict[str, torch.Tensor | None]:
    subject.reset()
    with activity.listening(), subject.autocast():
        loss = subject.loss(phase)
    found = gradients_of(loss, list(phase.parameters.values()), plain=plain)
    return dict(zip(phase.parameters, found, strict=True))


def _gradients(subject: Subject, phase: LivePhase, gradients: dict[str, torch.Tensor | None]) -> Iterator[ResultRow]:
    norms = {}
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        size = float(torch.linalg.vector_norm(to_double(values).reshape(-1))) if values.numel() else 0.0
        norms[name] = size
        limit = subject.settings.exploding_norm
        bad = finite(size) is None or size > limit
        yield _row(subject, "health.exploding", bad, f"{name}: gradient norm {size:.3g}", phase=phase.name,
                   parameter=name, measured=finite(size), threshold=limit, gradient_norm=finite(size))  # fmt: skip
        zero = bool(values.numel()) and not size
        yield _row(subject, "health.all-zero", zero, f"{name}: gradient {'all zero' if zero else 'not all zero'}",
                   phase=phase.name, parameter=name, gradient_norm=finite(size))  # fmt: skip
    weights = [n for n in norms if subject.parameters[n].dim() > 1]
    if len(weights) > 1 and norms[weights[-1]]:
        first, last = weights[0], weights[-1]
        ratio = norms[first] / norms[last]
        bad = ratio < subject.settings.vanishing_ratio and norms[first] < subject.settings.vanishing_norm
        message = f"the gradient's norm is {norms[first]:.3g} at {first} and {norms[last]:.3g} at {last}"
        yield _row(subject, "health.vanishing", bad, message, phase=phase.name, parameter=first, measured=ratio,
                   threshold=subject.settings.vanishing_ratio, gradient_norm=norms[first])  # fmt: skip
    means = {n: norms[n] / max(1, subject.parameters[n].numel()) ** 0.5 for n in norms}
    if means and 0 < max(means.values()) < VANISHING_MEAN:
        name = max(means, key=lambda n: means[n])
        message = f"every gradient is below {VANISHING_MEAN:g} per element; the largest is {name}'s, {means[name]:.3g}"
        yield _row(subject, "health.vanishing", True, message, phase=phase.name, measured=means[name],
                   threshold=VANISHING_MEAN)  # fmt: skip


def _updates(subject: Subject, phase: LivePhase, gradients: dict[str, torch.Tensor | None]) -> Iterator[ResultRow]:
    if isinstance(optimizer := phase.build_optimizer(), torch.optim.LBFGS):
        return
    before = {name: parameter.detach().clone() for name, parameter in phase.parameters.items()}
    for name, parameter in phase.parameters.items():
        gradient = gradients[name]
        parameter.grad = None if gradient is None else gradient.clone()
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError):
        return
    limit = subject.settings.update_ratio
    for name, parameter in phase.parameters.items():
        weight = float(before[name].abs().double().square().sum() ** 0.5)
        if parameter.dim() < 2 or not parameter.numel() or weight < TINY_WEIGHT * parameter.numel() ** 0.5:
            continue
        change = float((parameter.detach() - before[name]).abs().double().square().sum() ** 0.5)
        ratio = change / weight
        yield _row(subject, "health.update-ratio", ratio > limit or finite(ratio) is None,
                   f"{name}: a step moves it by {ratio:.3g} of itself", phase=phase.name, parameter=name,
                   measured=finite(ratio), threshold=limit, parameter_norm=finite(weight),
                   update_norm=finite(change))  # fmt: skip


class _Listener:
    """Counts dead and saturated units of activation modules during a forward."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._found: dict[str, _Activity] = {}

    def listening(self) -> _Handles:
        handles = _Handles()
        for path, module in self._subject.model.named_modules():
            if isinstance(module, (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh)):
                handles.append(module.register_forward_hook(self._hook(path)))
        return handles

    def _hook(self, path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, _: object, output: torch.Tensor) -> None:
            values = output.detach()
            if not isinstance(values, torch.Tensor) or values.dim() < 2:
                return
            if isinstance(module, (nn.ReLU, nn.ReLU6)):
                active = (values != 0).flatten(0, -2).any(0) if values.dim() != 4 else (values != 0).amax((0, 2, 3))
                seen = self._found.setdefault(path, _Activity("health.dead-relu"))
                same = seen.dead is not None and seen.dead.shape == active.shape
                seen.dead = (~active & seen.dead) if same else ~active  # type: ignore[operator]
                seen.counts = [float(seen.dead.float().mean())]
            else:
                low, high = (0.0, 1.0) if isinstance(module, nn.Sigmoid) else (-1.0, 1.0)
                flat = ((values - low).abs() < SATURATED) | ((values - high).abs() < SATURATED)
                seen = self._found.setdefault(path, _Activity("health.saturation"))
                seen.counts.append(float(flat.float().mean()))

        return hook

    def rows(self, phase: LivePhase) -> Iterator[ResultRow]:
        for path, seen in self._found.items():
            share = sum(seen.counts) / len(seen.counts)
            what = "units are 0 for the whole batch" if seen.check == "health.dead-relu" else "outputs are at an end"
            module = f"{type(self._subject.model.get_submodule(path)).__name__} ({path})"
            yield _row(self._subject, seen.check, share > LAYER_SHARE, f"{path}: {share:.0%} of the {what}",
                       phase=phase.name, module=module, measured=share, threshold=LAYER_SHARE)  # fmt: skip


class _Handles(list):
    """Hook handles as a context that removes them."""

    def __enter__(self) -> _Handles:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self:
            handle.remove()


def _row(subject: Subject, check: str, bad: bool, message: str, **fields: object) -> ResultRow:
    name = fields.get("parameter")
    if isinstance(name, str):
        tensor = subject.parameters[name]
        fields |= {"numel": tensor.numel(), "dtype": str(tensor.dtype), "module": subject.owner(name).label}
    outcome = Outcome.WARN if bad else Outcome.PASS
    return ResultRow(check=check, outcome=outcome, severity=Severity.WARN, message=message, seed=subject.seed,
                     where_to_look=_BY_NAME[check].where_to_look if bad else None, **fields)  # type: ignore[arg-type]  # fmt: skip
