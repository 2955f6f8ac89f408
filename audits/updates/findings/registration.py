"""Registration: the right tensors are in the optimizers, once each, trainable and tied as declared."""

from __future__ import annotations

from collections import Counter

from audits.causes import Cause
from audits.globs import matches
from audits.live.ownership import holders
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.capture import ties_of
from audits.recipe.phases import UnknownTensor
from audits.updates.findings.declared_ties import declared_tie_rows
from audits.updates.findings.hyperparameters import hyperparameter_rows
from audits.updates.findings.reaches_loss import places_of, reaches_loss_rows
from audits.updates.judge.optimizer_whole import whole_rows
from audits.updates.record.shadow_modules import shadows_of
from audits.updates.update_rows import row


def registration_rows(subject: Subject) -> list[ResultRow]:
    """Return the rows of ``registration.*`` that need no training step."""
    wants = subject.settings.wants_check
    rows: list[ResultRow] = []
    if wants("registration.coverage"):
        rows += _coverage(subject)
    if wants("registration.stale"):
        rows += _stale(subject)
    if wants("registration.reaches-loss"):
        rows += reaches_loss_rows(subject)
    if wants("registration.optimizer-whole"):
        rows += whole_rows(subject)
    if wants("registration.duplicate"):
        rows += _duplicate(subject)
    if wants("registration.requires-grad"):
        rows += _requires_grad(subject)
    if wants("registration.tied"):
        rows += tied_rows(subject, "after loading") + overlap_rows(subject) + declared_tie_rows(subject)
    if wants("registration.hyperparameters"):
        rows += hyperparameter_rows(subject)
    return [r for r in rows if r.parameter is None or subject.settings.wants_parameter(r.parameter)]


def _coverage(subject: Subject) -> list[ResultRow]:
    held = holders(subject)
    frozen, shadows = subject.recipe.expect.get("frozen"), ema_shadows(subject)
    stale = {u.likely: u for phase in subject.phases for u in phase.recipe.optimizer.unknown if u.likely}
    rows = []
    for name in subject.trainable:
        if held[name]:
            message = f"{name} is in the optimizer of phase {', '.join(held[name])}"
            rows.append(row(subject, "registration.coverage", Outcome.PASS, message, parameter=name))
        elif matches(name, frozen) or name in shadows:
            message = f"{name} is in no optimizer, as its declaration (frozen or EMA) says"
            rows.append(row(subject, "registration.coverage", Outcome.PASS, message, parameter=name))
        else:
            message = f"{name} is trainable and in no optimizer: it will never be trained"
            if name in stale:
                message += (f"; an optimizer holds a stale tensor of the same shape {stale[name].shape}, which it "
                            "probably was before it was replaced")  # fmt: skip
            rows.append(row(subject, "registration.coverage", Outcome.FAIL, message, parameter=name,
                            measured=0.0, expected=1.0))  # fmt: skip
    return rows


def _stale(subject: Subject) -> list[ResultRow]:
    rows = []
    for phase in subject.phases:
        unknown = phase.recipe.optimizer.unknown
        live = {place.path for place in places_of(subject, phase)} if any(t.path for t in unknown) else set()
        rows += [_stale_row(subject, phase.name, tensor, live=tensor.path in live) for tensor in unknown]
        if not unknown:
            message = f"every tensor in the optimizer of phase {phase.name!r} is a parameter of the model"
            rows.append(row(subject, "registration.stale", Outcome.PASS, message, phase=phase.name))
    return rows


def _stale_row(subject: Subject, phase: str, tensor: UnknownTensor, *, live: bool) -> ResultRow:
    if live:
        message = (f"the optimizer of phase {phase!r} trains {tensor.path}, which reaches the loss and is no parameter "
                   "of the model: it is not saved with the version, and its update is not audited. To do: make it a "
                   "part of the model")  # fmt: skip
        return row(subject, "registration.stale", Outcome.WARN, message, phase=phase, parameter=tensor.path,
                   dtype=tensor.dtype)  # fmt: skip
    message = (f"the optimizer of phase {phase!r} holds a tensor of shape {tensor.shape} (number {tensor.position}) "
               "that the model does not have as a parameter: it trains a tensor that nothing uses")  # fmt: skip
    if tensor.likely:
        message += f"; {tensor.likely} has that shape and is in no optimizer, so it probably replaced this tensor"
    return row(subject, "registration.stale", Outcome.FAIL, message, phase=phase,
               parameter=tensor.likely or tensor.label, dtype=tensor.dtype)  # fmt: skip


def _duplicate(subject: Subject) -> list[ResultRow]:
    rows = []
    for phase in subject.phases:
        counts = Counter(phase.recipe.optimizer.names)
        repeated = {name: count for name, count in counts.items() if count > 1}
        for name, count in repeated.items():
            also = [n for ties in subject.recipe.ties if name in ties for n in ties if n != name]
            message = (
                f"{name} is registered {count} times in the optimizer of phase {phase.name!r}: each step moves it "
            )
            message += f"{count} times"
            if also:
                message += f"; it is tied to {', '.join(also)}, which may be how it came in twice"
            rows.append(row(subject, "registration.duplicate", Outcome.FAIL, message, phase=phase.name, parameter=name,
                            measured=float(count), expected=1.0))  # fmt: skip
        if not repeated:
            message = f"no parameter is registered twice in the optimizer of phase {phase.name!r}"
            rows.append(row(subject, "registration.duplicate", Outcome.PASS, message, phase=phase.name))
    return rows


def _requires_grad(subject: Subject) -> list[ResultRow]:
    check = "registration.requires-grad"
    frozen, trainable = subject.recipe.expect.get("frozen"), subject.recipe.expect.get("trainable")
    if not frozen and not trainable:
        return [row(subject, check, Outcome.SKIPPED, "expect declares neither frozen nor trainable parameters",
                    cause=Cause.NOT_DECLARED)]  # fmt: skip
    held = holders(subject)
    rows = []
    for name, parameter in subject.parameters.items():
        meant_frozen, meant_trainable = matches(name, frozen), matches(name, trainable)
        if not (meant_frozen or meant_trainable):
            continue
        meant = meant_trainable
        numbers = {"measured": float(parameter.requires_grad), "expected": float(meant)}
        if parameter.requires_grad == meant:
            message = f"{name} is {'trainable' if meant else 'frozen'}, as declared"
            rows.append(row(subject, check, Outcome.PASS, message, parameter=name, **numbers))
        elif meant:
            message = f"{name} is declared trainable and has requires_grad=False: it gets no gradient"
            rows.append(row(subject, check, Outcome.FAIL, message, parameter=name, **numbers))
        elif held[name]:
            message = (f"{name} is declared frozen, but it requires a gradient and the optimizer of phase "
                       f"{', '.join(held[name])} holds it: it will be trained")  # fmt: skip
            rows.append(row(subject, check, Outcome.FAIL, message, parameter=name, **numbers))
        else:
            message = f"{name} is declared frozen and in no optimizer, yet a gradient is computed for it in every step"
            rows.append(row(subject, check, Outcome.WARN, message, parameter=name, **numbers))
    return rows


def tied_rows(subject: Subject, moment: str) -> list[ResultRow]:
    """Return one row per recorded tie: its names are one tensor at this moment."""
    check = "registration.tied"
    if not subject.recipe.ties:
        return [row(subject, check, Outcome.SKIPPED, "the recipe records no tied parameters", cause=Cause.NOT_DECLARED)]
    live = [set(names) for names in ties_of(subject.model)]
    rows = []
    for names in subject.recipe.ties:
        together = next((found for found in live if names[0] in found), {names[0]})
        apart = [name for name in names if name not in together]
        if apart:
            message = (f"{names[0]} and {', '.join(apart)} were one tensor when the recipe was captured and are "
                       f"separate tensors {moment}")  # fmt: skip
            rows.append(row(subject, check, Outcome.FAIL, message, parameter=names[0]))
        else:
            rows.append(row(subject, check, Outcome.PASS, f"{' = '.join(names)}, one tensor {moment}",
                            parameter=names[0]))  # fmt: skip
    return rows


def overlap_rows(subject: Subject) -> list[ResultRow]:
    """Return one row per pair of distinct Parameters on one memory: the optimizer moves the same numbers twice."""
    rows = []
    for overlap in subject.overlaps:
        first, second = overlap.first, overlap.second
        if first not in subject.parameters or second not in subject.parameters:
            continue
        numel = subject.parameters[first].numel()
        part = "the same memory" if overlap.elements == numel else f"{overlap.elements} of {numel} elements in common"
        trained = [name for name in (first, second) if subject.parameters[name].requires_grad]
        message = f"{first} and {second} are two Parameters with {part}: "
        if len(trained) == 2:
            message += ("a step moves those numbers twice, once for each, each time by that one's part (half) of the "
                        "gradient and with optimizer state of its own")  # fmt: skip
        elif trained:
            message += f"a step on {trained[0]} moves the other too, though that is frozen"
        else:
            message += "both are frozen, so nothing moves them"
        cure = f"assign the Parameter itself, model.{second} = model.{first}, not its .data"
        if overlap.elements != numel or subject.parameters[second].shape != subject.parameters[first].shape:
            cure = f"keep {first} alone as a Parameter and take the other as a view of it in the forward, or clone it"
        outcome = (Outcome.PASS, Outcome.WARN, Outcome.FAIL)[len(trained)]
        if outcome is not Outcome.PASS:
            message += f"; {cure}"
        rows.append(row(subject, "registration.tied", outcome, message, parameter=first, cause=Cause.ONE_MEMORY,
                        measured=float(overlap.elements), expected=0.0))  # fmt: skip
    return rows


def ema_shadows(subject: Subject) -> set[str]:
    """Return the parameters that are EMA shadows, declared in ``expect["ema"]`` or held by an `AveragedModel`."""
    prefixes = tuple(shadow.prefix for shadow in shadows_of(subject))
    return {name for name in subject.parameters if prefixes and name.startswith(prefixes)}
