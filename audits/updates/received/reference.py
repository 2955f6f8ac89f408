"""The declared loss's own gradient before an optimizer's step: same weights, precision, order, random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audits.devices import same_states
from audits.lanes.backward import by_grad_or_backward, gradients_of
from audits.live.state import ModuleState
from audits.live.subject import LivePhase, Subject
from audits.live.weighing import Weighing
from audits.random_state import RandomState

Gradients = dict[str, torch.Tensor | None]


@dataclass
class Reference:
    """The reference gradient of a phase.

    Attributes:
        gradients: by parameter, of every trainable parameter of the model; accumulated, unscaled and clipped.
        loss: the loss.
        norm: norm of the phase's gradient before clipping.
        same_draws: whether the random generators ended where the training step's had, so that both drew alike.
        replayed: whether the generators were set to where the step's own loss was seen to begin.
        draws: whether the loss draws random numbers at all.
        otherwise: gradients with the micro-batches weighed otherwise, by how: what may explain a wrong step.
        buffers: the model's buffers after the loss's forwards.
    """

    gradients: Gradients
    loss: float
    norm: float
    same_draws: bool
    replayed: bool
    draws: bool
    otherwise: dict[str, Gradients]
    buffers: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Start:
    """Where a phase's forward may have started from.

    Attributes:
        random: the generators.
        modules: buffers, modes and attributes of the modules.
        weights: the weights, if not the present ones.
        pieces: the generators at each micro-batch, where they were seen; they need not follow from each other.
        batches: the micro-batches, if not the recipe's.
        random_only: whether it differs from starting points before it in the generators alone.
    """

    random: RandomState
    modules: ModuleState
    weights: Mapping[str, torch.Tensor] | None = None
    pieces: tuple[RandomState, ...] = ()
    batches: tuple[Any, ...] | None = None
    random_only: bool = False


def reference_gradient(
    subject: Subject,
    phase: LivePhase,
    start: Start,
    *,
    scale: float = 1.0,
    clip_norm: tuple[float, float] | None = None,
    backward_in_autocast: bool = False,
    weighing: Weighing | None = None,
) -> Reference:
    """Return the gradient of the declared loss at the model's present weights, leaving everything as it was.

    ``g = clip(sum_i d(w_i * scale * loss_i)/d theta / scale)``, accumulated micro-batch by micro-batch in the
    gradients' own dtype, as `backward` does.

    Args:
        subject: the model, where the training step has brought it.
        phase: whose loss.
        start: random generators and buffers to evaluate the loss from.
        scale: the loss scale in force.
        clip_norm: norm to clip to, and its order; None for the phase's declared one, the Euclidean norm.
        backward_in_autocast: run the backward under autocast too, where some of its products round once more. torch
            advises against it, training scripts do it all the same.
        weighing: how the micro-batches weigh; None for as the loss separates.
    """
    return by_grad_or_backward(
        lambda plain: _reference(
            subject,
            phase,
            start,
            scale,
            clip_norm,
            backward_in_autocast=backward_in_autocast,
            plain_backward=plain,
            weighing=weighing or subject.weighings[phase.name],
        )
    )


def _reference(
    subject: Subject, phase: LivePhase, start: Start, scale: float, clip_norm: tuple[float, float] | None, *,
    backward_in_autocast: bool, plain_backward: bool, weighing: Weighing,
) -> Reference:  # fmt: skip
    ahead, here = RandomState.now(), ModuleState(subject.model)
    sums = _Sums(
        weighted=dict.fromkeys(subject.trainable),
        otherwise={w.text: dict.fromkeys(subject.trainable) for w in weighing.others},
    )
    parameters = [subject.parameters[name] for name in subject.trainable]
    try:
        start.modules.restore()
        start.random.restore()
        with _weights(subject, start.weights), _as_in_training(subject):
            batches = subject.micro_batches(phase, start.batches, weighing)
            others = {w.text: w.weights([b for _, b in batches]) for w in weighing.others}
            for index, (weight, batch) in enumerate(batches):
                if start.pieces:
                    start.pieces[index].restore()
                began = RandomState.now()
                with subject.autocast():
                    loss = phase.call_loss(subject.model, batch)
                with subject.autocast() if backward_in_autocast else contextlib.nullcontext():
                    scaled = loss * (weight * scale) if weight * scale != 1.0 else loss
                    found = list(gradients_of(scaled, parameters, plain=plain_backward))
                sums.draws = sums.draws or not same_random(RandomState.now(), began)
                if weight:  # a micro-batch without a target that counts: its mean is nan
                    shares = {text: weights[index] / weight for text, weights in others.items()}
                    sums.add(subject.trainable, found, weight * float(loss.detach()), shares)
        ended = RandomState.now()
        buffers = {name: buffer.detach().clone() for name, buffer in subject.model.named_buffers()}
    finally:
        here.restore()
        ahead.restore()
    norm = sums.finish(phase, scale, subject.recipe.expect.get("clip_grad_value"), clip_norm)
    return Reference(
        gradients=sums.weighted,
        loss=sums.loss,
        norm=norm,
        same_draws=same_random(ended, ahead),
        replayed=bool(start.pieces),
        draws=sums.draws,
        otherwise=sums.otherwise,
        buffers=buffers,
    )


@dataclass
class _Sums:
    """What is accumulated over the micro-batches: gradients weighted as they should be, and otherwise."""

    weighted: Gradients
    otherwise: dict[str, Gradients]
    loss: float = 0.0
    draws: bool = False

    def add(
        self, names: tuple[str, ...], found: list[torch.Tensor | None], loss: float, shares: Mapping[str, float]
    ) -> None:
        """Add one micro-batch's gradients and loss, which have its weight in them; shares of it weigh otherwise.

        The gradients are taken out of the list as they are added, so that no more than one is held twice.
        """
        self.loss += loss
        for index, name in enumerate(names):
            gradient, found[index] = found[index], None
            _add(self.weighted, name, gradient, 1.0)
            for text, share in shares.items():
                _add(self.otherwise[text], name, gradient, share)

    def finish(
        self, phase: LivePhase, scale: float, bound: float | None, clip_norm: tuple[float, float] | None
    ) -> float:
        """Unscale and clip the gradients, by value and by norm; return the phase's norm before it was clipped."""
        sets = [self.weighted, *self.otherwise.values()]
        for gradients in sets:
            if scale != 1.0:
                gradients.update({n: None if g is None else g / scale for n, g in gradients.items()})
            if bound is not None:
                gradients.update({n: None if g is None else g.clamp(-bound, bound) for n, g in gradients.items()})
        limit, order = (phase.recipe.clip_grad_norm, 2.0) if clip_norm is None else clip_norm
        found = ([g for n in phase.parameters if (g := gradients[n]) is not None] for gradients in sets)
        norms = [total_norm(each, order) for each in found]
        if limit:
            for gradients, norm in zip(sets, norms, strict=True):
                _clip(gradients, phase, norm, limit)
        return float(norms[0])


def same_random(one: RandomState, other: RandomState) -> bool:
    """Whether torch's (of every device), NumPy's and Python's generators stand at the same place."""
    return (
        torch.equal(one.cpu, other.cpu)
        and same_states(one.devices, other.devices)
        and one.numpy[2:] == other.numpy[2:]
        and bool((one.numpy[1] == other.numpy[1]).all())
        and one.python == other.python
    )


@contextlib.contextmanager
def _weights(subject: Subject, weights: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Lend the model other weights."""
    present = {n: subject.parameters[n].detach().clone() for n in weights or {}}
    try:
        for name, value in (weights or {}).items():
            subject.parameters[name].data.copy_(value)
        yield
    finally:
        for name, value in present.items():
            subject.parameters[name].data.copy_(value)


@contextlib.contextmanager
def _as_in_training(subject: Subject) -> Iterator[None]:
    """Evaluate as the step does; a step may have switched a phase's gradients off for the while (a GAN's)."""
    switched_off = [p for n in subject.trainable if not (p := subject.parameters[n]).requires_grad]
    for parameter in switched_off:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), torch.autocast(subject.device.type, enabled=False):
            yield
    finally:
        for parameter in switched_off:
            parameter.requires_grad_(False)


def _add(total: Gradients, name: str, gradient: torch.Tensor | None, factor: float) -> None:
    if gradient is None:
        return
    gradient = gradient.detach() if factor == 1.0 else gradient.detach() * factor
    before = total[name]
    total[name] = gradient.clone() if before is None else before + gradient


def total_norm(gradients: list[torch.Tensor], order: float = 2.0) -> torch.Tensor:
    """Return the norm of all gradients together, as `torch.nn.utils.get_total_norm` defines it."""
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return torch.nn.utils.get_total_norm(dense, order) if dense else torch.tensor(0.0)


def _clip(gradients: Gradients, phase: LivePhase, norm: torch.Tensor, limit: float) -> None:
    """Scale by ``min(1, limit / (norm + 1e-6))``, the formula of `torch.nn.utils.clip_grad_norm_`."""
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for name in phase.parameters:
        gradient = gradients[name]
        if gradient is not None:
            gradients[name] = gradient * factor.to(gradient.device)
