"""`audit`: registration, gradients, updates and health of one model, in this order, in this process."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

import torch
from torch import nn

from audits.causes import Cause
from audits.checks.severities import with_severities
from audits.devices import device_name
from audits.errors import DeviceError
from audits.findings.advice import with_advice
from audits.findings.diagnosis import diagnosed
from audits.gradients import check_gradients
from audits.gradients.causes.zero_gradients import with_zeros_explained
from audits.gradients.causes.zero_start import with_one_note
from audits.gradients.compiled.compiled import check_compiled, compiled_limits
from audits.health import check_health
from audits.lanes.separation import find_weighings
from audits.live.subject import Subject, open_subject
from audits.outcomes import Coverage, Outcome, ResultRow, Severity
from audits.recipe.declared_names import check_asked_parameters
from audits.recipe.digests import parts_of, recipe_digest
from audits.recipe.recipe import Recipe
from audits.refusals import refused as refused
from audits.refusals import with_identity as with_identity
from audits.repeating.first_calls import check_first_calls, gradients_confirmed
from audits.repeating.settling import settled, suspected
from audits.report import AuditReport
from audits.results.identity import AuditIdentity
from audits.settings import AuditSettings
from audits.updates import check_registration, check_updates
from audits.updates.relations import relation_limits

_log = logging.getLogger(__name__)

#: What is said of a loss that only runs on the CPU.
AUDITED_ON_CPU = "Audited on the CPU, though there is a GPU:"

#: What is said of a recipe that was captured from a model in eval mode.
CAPTURED_IN_EVAL = (
    "The model was in eval mode when the recipe was captured and is audited in train mode, every module of it: which "
    "are meant to stay in eval mode (a frozen BatchNorm) is not known. Capture while it trains, or with mode='eval'."
)


def _checked_gradients(subject: Subject) -> list[ResultRow]:
    return gradients_confirmed(subject, check_gradients(subject), lambda: check_gradients(subject))


#: The parts of an audit, in order; the first call comes first.
PARTS = (
    ("first-call", check_first_calls),
    ("registration", check_registration),
    ("gradient", _checked_gradients),
    ("update", check_updates),
    ("health", check_health),
    ("compiled", check_compiled),
)


def audit(
    model: nn.Module, recipe: Recipe, *, settings: AuditSettings | None = None, device: str = "auto"
) -> AuditReport:
    """Prove that ``model`` can be trained correctly as ``recipe`` says, or name what is wrong.

    Works on the live model and leaves it as it was, bit for bit: parameters, gradients, buffers, mode, random
    generators; the user's optimizer is never touched. A failure that only the first call showed is looked for in a
    fresh process, where model and recipe can be carried there.

    Args:
        model: the module; wrappers (DDP, DataParallel, compiled) are looked through.
        recipe: what `Recipe.capture` returned.
        settings: what to check and how; the defaults are what the nightly uses.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or any type that torch finds.

    Returns:
        The report: rows, findings, coverage, outcome.

    Raises:
        RecipeError: the recipe cannot be carried out on this model; the text names the field and the cure.
    """
    report = audit_once(model, recipe, settings=settings, device=device)
    if not suspected(report):
        return report
    from audits.repeating.fresh_process import audited_afresh

    fresh, why_not = audited_afresh(model, recipe, settings or AuditSettings(), device, report.seconds)
    return settled(report, fresh, why_not)


def audit_once(
    model: nn.Module, recipe: Recipe, *, settings: AuditSettings | None = None, device: str = "auto"
) -> AuditReport:
    """Do what `audit` does in this process alone: suspected first calls stay open (`first_calls.suspected`)."""
    settings = settings or AuditSettings()
    try:
        return _audit_on(device, model, recipe, settings)
    except DeviceError as error:
        if device != "auto":
            raise
        report = _audit_on("cpu", model, recipe, settings)  # where its loss was written to run
        return dataclasses.replace(report, limits=(*report.limits, f"{AUDITED_ON_CPU} {error}."))


def _audit_on(device: str, model: nn.Module, recipe: Recipe, settings: AuditSettings) -> AuditReport:
    began = time.perf_counter()
    rows: list[ResultRow] = []
    with open_subject(model, recipe, settings, device) as subject:
        check_asked_parameters(settings.parameters, subject.model)
        find_weighings(subject)
        for name, part in PARTS:
            rows += _run_part(name, part, subject)
        rows = with_zeros_explained(with_one_note(rows, subject))
        rows = [r for r in rows if settings.wants_check(r.check)]
        rows = [r for r in rows if r.parameter is None or settings.wants_parameter(r.parameter)]
        parts = parts_of(subject.model, recipe)
        sizes = {n: subject.parameters[n].numel() for n in subject.trainable if settings.wants_parameter(n)}
        trainable = {n: size for n, size in sizes.items() if size}  # what has no elements has nothing to be judged
        rows = with_advice(with_severities(diagnosed(rows, subject), settings.severity))
        chosen = subject.device
        limits = (*relation_limits(subject, rows), *compiled_limits(subject, rows))
        if recipe.captured_in_eval and not recipe.assumed:
            limits = (CAPTURED_IN_EVAL, *limits)
    if settings.narrowed and not rows:
        from audits.errors import SettingsError

        asked = [f"--check {glob}" for glob in settings.checks] + [f"--parameter {g}" for g in settings.parameters]
        raise SettingsError(f"{' '.join(asked)} looks at nothing: these checks say nothing of this model")
    return AuditReport(
        rows=tuple(rows),
        coverage_of=Coverage.of(rows, trainable, recipe.assumed),
        identity=AuditIdentity(
            recipe_digest=recipe_digest(recipe),
            settings_digest=settings.digest(),
            torch=torch.__version__,
            device=device_name(chosen),
            driver=torch.version.cuda or "" if chosen.type == "cuda" else "",
        ),
        seconds=time.perf_counter() - began,
        provenance={
            f: "assumed" if f in recipe.assumed else "declared" for f in ("batch", "loss", "optimizer", "step")
        },
        parts=parts,
        limits=limits,
        narrowed=settings.narrowed,
    )


def _run_part(name: str, part: Callable[[Subject], list[ResultRow]], subject: Subject) -> list[ResultRow]:
    """Run one part; what it cannot do becomes an inconclusive row, so that the other parts still speak."""
    try:
        subject.reset()
        return part(subject)
    except torch.OutOfMemoryError as error:
        text, cause = f"out of memory during the {name} checks: {str(error).splitlines()[0]}", Cause.OUT_OF_MEMORY
    except Exception as error:
        _log.exception("the %s checks stopped", name)
        text, cause = f"the {name} checks stopped: {type(error).__name__}: {error}", Cause.STOPPED
    finally:
        subject.reset()
    # What health would have said is a warning at most, and so is not having heard it.
    severity = Severity.WARN if name == "health" else Severity.FAIL
    return [
        ResultRow(check="audit.completed", outcome=Outcome.INCONCLUSIVE, severity=severity, cause=cause, message=text)
    ]
