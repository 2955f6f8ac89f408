"""`check_gradients`: every gradient check of a subject, as rows."""

from __future__ import annotations

import logging

from audits.causes import Cause
from audits.checks.gradient import FINITE_DIFFERENCE, INPUT, NATIVE_DTYPE
from audits.gradients.causes.conventions import with_conventions
from audits.gradients.causes.explain import explain
from audits.gradients.functions.each_function import judge_each_function
from audits.gradients.functions.stand_ins import held_as_declared, say_what_is_held
from audits.gradients.inputs import check_inputs
from audits.gradients.methods.batched import vmap_holds
from audits.gradients.methods.certify import Certifier
from audits.gradients.methods.elementwise import check_elements
from audits.gradients.methods.exact import check_exactly
from audits.gradients.methods.rounding import mark_rounding_zeros, suspicious
from audits.gradients.methods.second_opinion import check_with_gradcheck
from audits.gradients.native.native import check_native
from audits.gradients.native.whole_model import NativeGradient
from audits.gradients.verdict_rows import parameter_row, skipped_row
from audits.gradients.verdicts import Verdict
from audits.lanes.evaluation import Point
from audits.lanes.lifted_loss import lifted_loss
from audits.lanes.problem import Problem
from audits.lanes.separation import find_weighings
from audits.live.ownership import surely_foreign
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow

#: Trainable elements up to which `auto` checks every one of them in a plain loop, where vmap does not hold.
LOOP_LIMIT = 256

_log = logging.getLogger(__name__)


def check_gradients(subject: Subject) -> list[ResultRow]:
    """Check that autograd's gradients are the derivatives of the losses.

    Args:
        subject: an open subject; it is reset to its own state before this returns.

    Returns:
        One `gradient.finite-difference` row per phase and parameter, and the rows of the other gradient checks that
        the settings ask for.
    """
    settings = subject.settings
    rows: list[ResultRow] = []
    find_weighings(subject)
    natively = settings.wants_check(NATIVE_DTYPE.name) and not settings.parameters
    for phase in subject.phases:
        gradient = _native_gradient(subject, phase) if natively else None
        if settings.wants_check(FINITE_DIFFERENCE.name):
            rows += _finite_differences(subject, phase, gradient)
        if natively:
            rows += check_native(subject, phase, gradient)
        if settings.wants_check(INPUT.name):
            rows += check_inputs(subject, phase)
    subject.reset()
    return rows


def _native_gradient(subject: Subject, phase: LivePhase) -> NativeGradient | None:
    try:
        return NativeGradient(subject, phase)
    except Exception:  # the model's own code; `check_native` tells what it raised
        _log.debug("no native gradient", exc_info=True)
        return None


def _finite_differences(subject: Subject, phase: LivePhase, gradient: NativeGradient | None) -> list[ResultRow]:
    dtypes = {name: str(parameter.dtype) for name, parameter in subject.parameters.items()}
    wanted = [name for name in subject.parameters if subject.settings.wants_parameter(name)]
    foreign = surely_foreign(subject, phase.name)  # update.isolation fails them; stopped gradients would follow from it
    judged = [n for n in wanted if n in phase.parameters and phase.parameters[n].numel() and n not in foreign]
    verdicts: dict[str, Verdict] = {}
    point: Point | None = None
    rows = []
    alone: list[ResultRow] = []
    if judged:
        for lane in (Lane.FLOAT64, Lane.FLOAT32):
            try:
                with lifted_loss(subject, phase, precision=lane) as problem:
                    if gradient is not None and lane is Lane.FLOAT64:
                        problem.observe = gradient.observe
                    ours = subject.settings.method != "gradcheck"
                    held, labels = held_as_declared(subject, problem) if ours else (problem, {})
                    verdicts, point = judge(subject, held, judged)
                    if ours:
                        verdicts = explain(subject, phase, held, point, verdicts, held=bool(labels))
                        verdicts = with_conventions(held, point, verdicts)
                        verdicts = say_what_is_held(problem, verdicts, labels)
                    rows = [parameter_row(subject, phase, n, verdicts[n], point, lane, dtypes[n]) for n in judged]
                    if ours and not subject.settings.parameters:
                        alone = _functions_alone(subject, phase, problem, verdicts)
                break
            except Exception as error:  # the model's own code runs here: whatever it raises is its answer
                _log.debug("the %s lane failed", lane, exc_info=True)
                rows = rows or _not_evaluated(subject, phase, judged, error, dtypes)
                if not _needs_float32(error):
                    break
            finally:
                subject.reset()
    by_name = {row.parameter: row for row in rows}
    for name in wanted:
        if name not in by_name:
            cause, message = _why_skipped(subject, phase, name)
            by_name[name] = skipped_row(subject, phase, name, cause, message, dtypes[name])
    return [by_name[name] for name in wanted] + alone


def _functions_alone(
    subject: Subject, phase: LivePhase, problem: Problem, verdicts: dict[str, Verdict]
) -> list[ResultRow]:
    """Judge every Function by itself too; what goes wrong there must not take the verdicts away."""
    try:
        return judge_each_function(subject, phase, problem, verdicts)
    except Exception:  # the model's own code runs here
        _log.debug("the Functions could not be judged by themselves", exc_info=True)
        return []


def _needs_float32(error: Exception) -> bool:
    """Whether a float64 kernel is missing, rather than something being wrong in every dtype."""
    text = str(error)
    if isinstance(error, AssertionError):
        return True  # asserts on dtypes
    return any(sign in text for sign in ("not implemented for 'Double'", "float64 lane", "Double", "float64"))


def _not_evaluated(
    subject: Subject, phase: LivePhase, names: list[str], error: Exception, dtypes: dict[str, str]
) -> list[ResultRow]:
    text = " ".join(str(error).split())[:300]
    verdict = Verdict(
        outcome=Outcome.INCONCLUSIVE,
        cause=Cause.CANNOT_EVALUATE.at(type(error).__name__),
        message=f"the loss could not be evaluated in float64: {text}",
    )
    return [parameter_row(subject, phase, n, verdict, None, Lane.FLOAT64, dtypes[n]) for n in names]


def judge(subject: Subject, problem: Problem, names: list[str]) -> tuple[dict[str, Verdict], Point]:
    """Judge the named tensors of a problem by the method of the settings."""
    settings = subject.settings
    elements = sum(problem.tensors[name].numel() for name in names)
    method = settings.method
    certifier = Certifier(
        problem, seed=subject.seed, probes=settings.probes, detection_limit=settings.detection_limit
    )  # fmt: skip
    if method == "probe" or (method == "auto" and elements > settings.exact_limit):
        point = certifier.run(names)
        return certifier.verdicts, point
    point = certifier.start()
    if method == "auto":
        # with a plain loop a few thousand elements take half a minute, and the probe's bound is as good
        method = "exact" if elements <= LOOP_LIMIT or vmap_holds(point, names) else "probe"
        if method == "probe":
            point.restore()
            point = certifier.run(names)
            return certifier.verdicts, point
    verdicts = certifier.verdicts
    finite = certifier.refuse_non_finite(point, names)
    try:
        if method == "elementwise":
            verdicts |= check_elements(
                point, finite, epsilon=settings.elementwise_epsilon, tolerance=settings.elementwise_tolerance,
                detection_limit=settings.detection_limit,
            )  # fmt: skip
        elif method == "gradcheck":
            verdicts |= check_with_gradcheck(problem, finite)
        else:
            mark_rounding_zeros(point, suspicious(point, finite))
            alone = None if settings.method == "exact" else LOOP_LIMIT
            verdicts |= check_exactly(point, finite, detection_limit=settings.detection_limit, alone=alone)
            left = [name for name in finite if name not in verdicts]  # probes are as good, and cheaper than a loop
            left = certifier.patiently(point, certifier.rounds(point, left, displaced=False), displaced=False)
            doubtful = [
                n for n in finite if n not in left and verdicts[n].cause in (Cause.ZERO_GRADIENT, Cause.UNRESOLVED)
            ] + left
            if doubtful:
                certifier.displace(point, doubtful)
    finally:
        point.restore()
    return verdicts, point


def _why_skipped(subject: Subject, phase: LivePhase, name: str) -> tuple[str, str]:
    parameter = subject.parameters[name]
    if not parameter.requires_grad:
        return "frozen", f"{name!r} is frozen: no gradient is asked for"
    if name not in phase.parameters:
        of_phase = f" of phase {phase.name!r}" if len(subject.phases) > 1 else ""
        return "not in the optimizer", f"{name!r} is not in the optimizer{of_phase}"
    if owners := surely_foreign(subject, phase.name).get(name):
        return Cause.FOREIGN, f"{name!r} belongs to phase {', '.join(owners)} and is judged there: see update.isolation"
    return "empty", f"{name!r} has no elements"
