"""`gradient.input`: the gradient with respect to the batch's floating tensors."""

from __future__ import annotations

from dataclasses import replace

from audits.gradients.certify import Certifier
from audits.gradients.claims import INPUT
from audits.gradients.explain import explain
from audits.gradients.verdicts import Verdict, describe
from audits.lanes.arithmetic import norm
from audits.lanes.evaluation import Point
from audits.lanes.float64 import float64_lane
from audits.outcomes import Lane, Outcome, ResultRow, finite
from audits.subject import LivePhase, Subject


def check_inputs(subject: Subject, phase: LivePhase) -> list[ResultRow]:
    """Check the gradient of one phase's loss with respect to every floating tensor of the batch.

    A stop-gradient between a batch tensor and the model (preprocessing under `no_grad`, a detached target) is only a
    failure where the batch asks for that tensor's gradient (``requires_grad``); elsewhere the row is ``skipped``.

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
                          cause="large model", message=message, seed=subject.seed)]  # fmt: skip
    try:
        with float64_lane(subject, phase, inputs=True) as problem:
            names = [n for n, t in problem.tensors.items() if t.numel() and subject.settings.wants_parameter(n)]
            if not names:
                return []
            asked = problem.asked
            certifier = Certifier(
                problem, seed=subject.seed, probes=subject.settings.probes,
                detection_limit=subject.settings.detection_limit,
            )  # fmt: skip
            point = certifier.run(names)
            verdicts = explain(subject, phase, problem, point, certifier.verdicts)
            return [_row(subject, phase, name, _lenient(verdicts[name], name in asked), point) for name in names]
    except Exception as error:  # the model's own code runs here: whatever it raises is its answer
        text = " ".join(str(error).split())[:300]
        return [ResultRow(check=INPUT.name, outcome=Outcome.INCONCLUSIVE, severity=INPUT.severity, phase=phase.name,
                          lane=Lane.FLOAT64, cause=f"cannot evaluate: {type(error).__name__}", seed=subject.seed,
                          message=f"no gradient of the loss by its inputs in float64: {text}")]  # fmt: skip
    finally:
        subject.reset()


def _lenient(verdict: Verdict, asked: bool) -> Verdict:
    stopped = verdict.outcome is Outcome.FAIL and (verdict.cause or "").startswith("stop-gradient")
    return replace(verdict, outcome=Outcome.SKIPPED) if stopped and not asked else verdict


def _row(subject: Subject, phase: LivePhase, name: str, verdict: Verdict, point: Point) -> ResultRow:
    return ResultRow(
        check=INPUT.name, outcome=verdict.outcome, severity=INPUT.severity, phase=phase.name, lane=point.problem.lane,
        parameter=name, numel=point.theta(name).numel(), dtype=point.problem.dtypes.get(name),
        measured=finite(verdict.measured), expected=finite(verdict.expected), error=finite(verdict.error),
        threshold=finite(verdict.threshold), detection_limit=finite(verdict.limit),
        parameter_norm=finite(norm(point.theta(name))), gradient_norm=finite(norm(point.gradients[name])),
        seed=subject.seed, cause=verdict.cause, message=verdict.message or describe(name, verdict),
        where_to_look=verdict.where_to_look,
    )  # fmt: skip
