"""Health of the gradients and of the step: vanishing, exploding, dead, saturated. Never more than a warning."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Iterator
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
        formula="norm(first) / norm(last) over weights in the order of the forward; mean |g|",
        threshold=(
            "ratio 1e-3 with a first norm below 1e-4, the first half's median norm below the second's; or mean |g| "
            "below 1e-7 everywhere"
        ),
        where_to_look="Initialisation, normalisation, residual paths; a converged model has small gradients too.",
    ),
    Check(
        name="health.exploding",
        claim="The gradient does not explode.",
        severity=_WARN,
        formula="norm of the parameter's gradient; norm(update) / norm(weight)",
        threshold="not finite; or 70 where the step scales with it, nothing clips and it moves the weight by 3 %",
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
        formula="norm(update) / norm(weight); rms(update) sqrt(fan in)",
        threshold="0.3, and 0.58",
        where_to_look="The learning rate; freshly zero-initialised weights are not judged.",
    ),
    Check(
        name="health.dead-relu",
        claim="No ReLU is off for a whole batch.",
        severity=_WARN,
        formula="share of units that are 0 for every example; chance that among units that never change so many are",
        threshold="0.5, and 1e-3",
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
#: Probability of as many dead units in a layer whose units are on or off by the toss of a coin, below which they are
#: news: one false warning in a thousand layers. It takes ten units of which all are off.
CHANCE = 1e-3
#: Distance from an end of a sigmoid's or tanh's range within which its slope is below 1e-3 (sigmoid), 2e-3 (tanh).
SATURATED = 1e-3
#: What a step may do to a layer's output, in standard deviations of inputs of variance 1: rms(update) sqrt(fan in). A
#: layer as torch initialises it gives 1 / sqrt(3): a step beyond that outweighs what the whole layer does. Fresh Adam
#: at 1e-3 gives 0.03 at a fan of 1,000, fresh RMSprop at its default rate 0.35 at 12.
OUTPUT_SHARE = 3**-0.5
#: Share of itself by which a step moves a weight where a large gradient does harm: 30 times the 1e-3 of usual training.
HARMFUL_MOVE = 0.03
#: Optimizers whose step is proportional to the gradient; of others a large norm says nothing.
PROPORTIONAL = (torch.optim.SGD, torch.optim.ASGD)
#: Weights of a smaller rms (zero-initialised scales and factors) have no meaningful update ratio.
TINY_WEIGHT = 1e-3


@dataclass
class _Activity:
    """Share of dead or saturated units of one module over the loss's forwards."""

    check: str
    dead: torch.Tensor | None = None
    always: torch.Tensor | None = None
    counts: list[float] = field(default_factory=list)

    @property
    def by_chance(self) -> float:
        """Return how likely so many units are off, or more, where each that never changes may as well be always on.

        So it is in a deep narrow net at its start, whose examples look alike: half of its units are off by chance.
        """
        if self.dead is None or self.always is None:
            return 0.0
        off, fixed = int(self.dead.sum()), int((self.dead | self.always).sum())
        return 0.5 * math.erfc((off - 0.5 - fixed / 2) / math.sqrt(fixed / 2)) if fixed else 1.0


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
            moves = _moves(phase, gradients)
            rows += _gradients(subject, phase, gradients, moves, activity.order)
            rows += activity.rows(phase)
            rows += _updates(subject, phase, moves)
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


def _gradients(
    subject: Subject,
    phase: LivePhase,
    gradients: dict[str, torch.Tensor | None],
    moves: dict[str, _Move],
    order: Iterable[str],
) -> Iterator[ResultRow]:
    norms = {}
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        size = float(torch.linalg.vector_norm(to_double(values).reshape(-1))) if values.numel() else 0.0
        norms[name] = size
        limit = subject.settings.exploding_norm
        bad = finite(size) is None or (size > limit and _harms(phase, moves.get(name)))
        message = f"{name}: gradient norm {size:.3g}"
        if bad and finite(size) is not None:
            message += f", and a step moves it by {moves[name].ratio:.1%} of itself: clip the norm, or lower the rate"
        yield _row(subject, "health.exploding", bad, message, phase=phase.name,
                   parameter=name, measured=finite(size), threshold=limit, gradient_norm=finite(size))  # fmt: skip
        zero = bool(values.numel()) and not size
        yield _row(subject, "health.all-zero", zero, f"{name}: gradient {'all zero' if zero else 'not all zero'}",
                   phase=phase.name, parameter=name, gradient_norm=finite(size))  # fmt: skip
    weights = [n for n in order if n in norms and subject.parameters[n].dim() > 1]
    if len(weights) > 1 and norms[weights[-1]]:
        first, last = weights[0], weights[-1]
        ratio = norms[first] / norms[last]
        middle = len(weights) // 2
        before, after = (statistics.median(norms[n] for n in half) for half in (weights[:middle], weights[middle:]))
        bad = (
            before < after
            and ratio < subject.settings.vanishing_ratio
            and norms[first] < subject.settings.vanishing_norm
        )
        message = f"the gradient's norm is {norms[first]:.3g} at {first} and {norms[last]:.3g} at {last}"
        yield _row(subject, "health.vanishing", bad, message, phase=phase.name, parameter=first, measured=ratio,
                   threshold=subject.settings.vanishing_ratio, gradient_norm=norms[first])  # fmt: skip
    means = {n: norms[n] / max(1, subject.parameters[n].numel()) ** 0.5 for n in norms}
    if means and 0 < max(means.values()) < VANISHING_MEAN:
        name = max(means, key=lambda n: means[n])
        message = f"every gradient is below {VANISHING_MEAN:g} per element; the largest is {name}'s, {means[name]:.3g}"
        yield _row(subject, "health.vanishing", True, message, phase=phase.name, measured=means[name],
                   threshold=VANISHING_MEAN)  # fmt: skip


@dataclass(frozen=True)
class _Move:
    """What one step does to a weight: both norms, and its effect on the output of a layer of this shape."""

    weight: float
    change: float
    output: float
    tiny: bool
    proportional: bool

    @property
    def ratio(self) -> float:
        return self.change / self.weight if self.weight else math.inf


def _harms(phase: LivePhase, move: _Move | None) -> bool:
    """Whether a large gradient does harm: nothing bounds the step, and the step is large."""
    if move is None or move.tiny or not move.proportional or phase.recipe.clip_grad_norm is not None:
        return False
    return move.ratio > HARMFUL_MOVE


def _moves(phase: LivePhase, gradients: dict[str, torch.Tensor | None]) -> dict[str, _Move]:
    """Return what one step of the phase's optimizer on these gradients does to each weight; nothing if it cannot step.

    Of an optimizer that normalises its step (Adam and its kin) a large gradient tells nothing about it.
    """
    optimizer = phase.build_optimizer()
    if isinstance(optimizer, torch.optim.LBFGS):
        return {}
    before = {name: parameter.detach().clone() for name, parameter in phase.parameters.items()}
    for name, parameter in phase.parameters.items():
        gradient = gradients[name]
        parameter.grad = None if gradient is None else gradient.clone()
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError):
        return {}
    found, proportional = {}, isinstance(optimizer, PROPORTIONAL)
    for name, parameter in phase.parameters.items():
        count = max(parameter.numel(), 1) ** 0.5
        weight = float(before[name].abs().double().square().sum() ** 0.5)
        change = float((parameter.detach() - before[name]).abs().double().square().sum() ** 0.5)
        fan = max(parameter[0].numel(), 1) if parameter.dim() > 1 and parameter.numel() else 1
        found[name] = _Move(weight, change, change / count * fan**0.5, weight < TINY_WEIGHT * count, proportional)
    return found


def _updates(subject: Subject, phase: LivePhase, moves: dict[str, _Move]) -> Iterator[ResultRow]:
    limit = subject.settings.update_ratio
    for name, move in moves.items():
        parameter = phase.parameters[name]
        if parameter.dim() < 2 or not parameter.numel() or move.tiny:
            continue
        bad = finite(move.ratio) is None or (move.ratio > limit and move.output > OUTPUT_SHARE)
        message = f"{name}: a step moves it by {move.ratio:.3g} of itself"
        if bad:
            message += f" and the outputs of unit inputs by {move.output:.3g}: lower the learning rate, or warm it up"
        yield _row(subject, "health.update-ratio", bad, message, phase=phase.name, parameter=name,
                   measured=finite(move.ratio), threshold=limit, parameter_norm=finite(move.weight),
                   update_norm=finite(move.change))  # fmt: skip


class _Listener:
    """Counts dead and saturated units of activation modules during a forward."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._found: dict[str, _Activity] = {}
        #: Parameters by the order in which the forward enters the modules that own them.
        self.order: dict[str, None] = {}

    def listening(self) -> _Handles:
        handles = _Handles()
        self.order = {}
        names = {id(p): name for name, p in self._subject.parameters.items()}
        for path, module in self._subject.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks from Python: what runs in it is not seen
            owned = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
            if owned:
                handles.append(module.register_forward_pre_hook(self._entered(owned)))
            if isinstance(module, (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh)):
                handles.append(module.register_forward_hook(self._hook(path)))
        return handles

    def _entered(self, owned: list[str]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, _: object) -> None:
            self.order.update(dict.fromkeys(owned))

        return hook

    def _hook(self, path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, _: object, output: torch.Tensor) -> None:
            values = output.detach()
            if not isinstance(values, torch.Tensor) or values.dim() < 2:
                return
            if isinstance(module, (nn.ReLU, nn.ReLU6)):
                on = (values != 0).flatten(0, -2) if values.dim() != 4 else (values != 0).transpose(0, 1).flatten(1).T
                active, always = on.any(0), on.all(0)
                seen = self._found.setdefault(path, _Activity("health.dead-relu"))
                same = seen.dead is not None and seen.dead.shape == active.shape
                seen.dead = (~active & seen.dead) if same else ~active  # type: ignore[operator]
                seen.always = (always & seen.always) if same else always  # type: ignore[operator]
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
            bad = share > LAYER_SHARE and seen.by_chance < CHANCE
            yield _row(self._subject, seen.check, bad, f"{path}: {share:.0%} of the {what}",
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
