"""`gradient.input`: the gradient with respect to the batch's floating tensors."""

from __future__ import annotations

from dataclasses import replace

from audits.causes import Cause
from audits.checks.gradient import INPUT
from audits.globs import matches
from audits.gradients.causes.explain import explain
from audits.gradients.functions.stand_ins import held_as_declared, say_what_is_held
from audits.gradients.methods.certify import Certifier
from audits.gradients.verdicts import Verdict, describe
from audits.lanes.evaluation import Point
from audits.lanes.lifted_loss import lifted_loss
from audits.lanes.problem import Problem
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow, Severity, finite
from audits.structures import tensors_in

#: How a batch tensor's gradient is asked for.
ASK = (
    "Whoever uses it marks the tensor with requires_grad in the batch, or names it in expect={'input_gradients': [...]}"
)


def check_inputs(subject: Subject, phase: LivePhase) -> list[ResultRow]:
    """Check the gradient of one phase's loss with respect to every floating tensor of the batch.

    Only a tensor whose gradient is asked for can fail: ``requires_grad`` in the batch, or its path in
    ``expect["input_gradients"]``. For others (targets, masks, weights) a wrong gradient is a warning, and an absent one
    (a stop-gradient before the model, a Function that returns None) is ``skipped``.

    Args:
        subject: the open subject.
        phase: the phase.

    Returns:
        One row per floating tensor, its name in `parameter` as ``<batch x>``; none without such tensors.
    """
    elements = sum(subject.parameters[name].numel() for name in subject.trainable)
    limit = subject.settings.input_gradient_limit
    if elements > limit:
        message = f"the model has {elements} trainable elements, input_gradient_limit is {limit}"
        return [ResultRow(check=INPUT.name, outcome=Outcome.SKIPPED, severity=INPUT.severity, phase=phase.name,
                          cause=Cause.LARGE_MODEL, message=message, seed=subject.seed)]  # fmt: skip
    try:
        with lifted_loss(subject, phase, inputs=True) as problem:
            names = [n for n, t in problem.tensors.items() if t.numel() and subject.settings.wants_parameter(n)]
            if not names:
                return []
            asked = _asked(subject, problem, names)
            held, labels = held_as_declared(subject, problem)
            certifier = Certifier(
                held, seed=subject.seed, probes=subject.settings.probes,
                detection_limit=subject.settings.detection_limit,
            )  # fmt: skip
            point = certifier.run(names)
            verdicts = explain(subject, phase, held, point, certifier.verdicts, held=bool(labels))
            verdicts = say_what_is_held(problem, verdicts, labels)
            return [_row(subject, phase, name, verdicts[name], point, asked=name in asked) for name in names]
    except Exception as error:  # the model's own code runs here: whatever it raises is its answer
        text = f"no gradient of the loss by its inputs in float64: {' '.join(str(error).split())[:300]}"
        outcome = Outcome.INCONCLUSIVE
        if not _anybody_asks(subject):  # a model may well refuse inputs that ask for a gradient
            outcome, text = Outcome.SKIPPED, f"{text}. Nothing in the step uses it. {ASK}"
        return [ResultRow(check=INPUT.name, outcome=outcome, severity=INPUT.severity, phase=phase.name,
                          lane=Lane.FLOAT64, cause=Cause.CANNOT_EVALUATE.at(type(error).__name__), seed=subject.seed,
                          message=text)]  # fmt: skip
    finally:
        subject.reset()


def _anybody_asks(subject: Subject) -> bool:
    """Whether a tensor of the batch is marked, or any is declared."""
    marked = any(t.requires_grad for _, t in tensors_in(subject.recipe.batch))
    return marked or bool(subject.recipe.expect.get("input_gradients"))


def _asked(subject: Subject, problem: Problem, names: list[str]) -> set[str]:
    """Return the tensors whose gradient somebody wants: marked in the batch, or declared."""
    declared = subject.recipe.expect.get("input_gradients", ())
    return {
        name for name in names
        if name in problem.asked or matches(problem.paths[name], declared)
    }  # fmt: skip


def _unasked(name: str, verdict: Verdict, gradient_norm: float) -> Verdict:
    """Judge a gradient that nobody asked for: an absent one is a note, a wrong one a warning."""
    if verdict.outcome is not Outcome.FAIL:
        return verdict
    if Cause.STOP_GRADIENT.begins(verdict.cause):
        return replace(verdict, outcome=Outcome.SKIPPED)
    if gradient_norm == 0.0:
        return replace(
            verdict, outcome=Outcome.SKIPPED, cause=Cause.NO_GRADIENT_ASKED,
            message=f"the loss depends on {name} and gives it no gradient, as losses do for targets, masks and "
            f"weights; nothing needs doing. {ASK}",
        )  # fmt: skip
    message = verdict.message or describe(name, verdict)
    return replace(verdict, outcome=Outcome.WARN, message=f"{message}. Nothing in the step uses this gradient. {ASK}")


def _row(subject: Subject, phase: LivePhase, name: str, verdict: Verdict, point: Point, *, asked: bool) -> ResultRow:
    if not asked:
        verdict = _unasked(name, verdict, point.gradients.norms[name])
    return ResultRow(
        check=INPUT.name, outcome=verdict.outcome, severity=INPUT.severity if asked else Severity.WARN,
        phase=phase.name, lane=point.problem.lane,
        parameter=name, numel=point.count(name), dtype=point.problem.dtypes.get(name),
        **verdict.numbers,
        parameter_norm=finite(point.theta_norms[name]), gradient_norm=finite(point.gradients.norms[name]),
        seed=subject.seed, cause=verdict.cause, message=verdict.message or describe(name, verdict),
        where_to_look=verdict.where_to_look,
    )  # fmt: skip
