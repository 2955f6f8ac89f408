"""What a loss is a function of: every leaf that requires a gradient is a parameter, and trained."""

from __future__ import annotations

from audits.causes import Cause
from audits.checks.registration import REACHES_LOSS
from audits.globs import matches
from audits.leaves import BUFFER, Place, kept_in_loss, kept_in_model
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.update_rows import row

CHECK = REACHES_LOSS.name


def places_of(subject: Subject, phase: LivePhase) -> list[Place]:
    """Return where the strays of a phase's loss are kept, in their order.

    Args:
        subject: the open subject, whose strays are known.
        phase: the phase.
    """
    strays = subject.strays[phase.name]
    if not strays:
        return []
    known = {**kept_in_loss(phase.loss_function, subject.model), **kept_in_model(subject.model)}
    places = []
    for number, leaf in enumerate(strays):
        shape = "x".join(map(str, leaf.shape)) or "one number"
        nowhere = Place(f"<leaf {number}: {shape}>", "where neither the model nor the loss refers to it", "")
        places.append(known.get(id(leaf), nowhere))
    return places


def reaches_loss_rows(subject: Subject) -> list[ResultRow]:
    """Return one row per leaf that reaches a loss and is no parameter of the model, and one per phase without any."""
    frozen = subject.recipe.expect.get("frozen")
    held = {tensor.path for phase in subject.phases for tensor in phase.recipe.optimizer.unknown if tensor.path}
    rows = []
    for phase in subject.phases:
        places = places_of(subject, phase)
        for place, leaf in zip(places, subject.strays[phase.name], strict=True):
            rows.append(_row(subject, phase, place, declared=matches(place.path, frozen), held=place.path in held,
                             numel=leaf.numel(), dtype=str(leaf.dtype)))  # fmt: skip
        if not places:
            message = f"every leaf that the loss of phase {phase.name!r} is a function of is a parameter of the model"
            rows.append(row(subject, CHECK, Outcome.PASS, message, phase=phase.name))
    return rows


def _row(
    subject: Subject, phase: LivePhase, place: Place, *, declared: bool, held: bool, numel: int, dtype: str
) -> ResultRow:
    outcome, cause = Outcome.FAIL, Cause.NOT_REGISTERED
    message = f"{place.path} requires a gradient and reaches the loss of phase {phase.name!r}, but it is no parameter "
    message += f"of the model: it is kept {place.how}"
    if declared:
        outcome = Outcome.PASS
        message += ", and declared frozen"
    elif held:
        outcome = Outcome.PASS
        message += ", and an optimizer holds it"
    elif place.training is False:
        outcome, cause = Outcome.WARN, Cause.NETWORK_IN_EVAL_MODE
        message += (", in a network in eval mode: its gradient is computed in every step and nobody uses it. To do: "
                    "requires_grad_(False) there, or torch.no_grad() around it; train() if it is to learn")  # fmt: skip
    else:
        message += ". No optimizer holds it: it is never trained"
        message += "" if place.how == BUFFER else ", nor saved or moved with the model"
        message += f". To do: keep it in {place.cure}" if place.cure else (
            ". To do: make it a part of the model, or requires_grad_(False) if it is not to learn"
        )  # fmt: skip
    return row(subject, CHECK, outcome, message, phase=phase.name, parameter=place.path, numel=numel, dtype=dtype,
               cause=cause)  # fmt: skip
