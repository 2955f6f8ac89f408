"""The update audit in order: registration, two training steps judged, a second seed for what failed."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable

from audits.causes import Cause
from audits.checks import CHECKS
from audits.findings.confirming import confirmed, key_of
from audits.lanes.separation import find_weighings
from audits.live.subject import LivePhase, Subject
from audits.outcomes import WORST_FIRST, Family, Outcome, ResultRow
from audits.updates.findings.batch_unchanged import batch_rows
from audits.updates.findings.buffers import batch_norm_rows
from audits.updates.findings.isolation_checks import isolation_rows
from audits.updates.findings.registration import registration_rows, tied_rows
from audits.updates.findings.shadow_buffers import shadow_buffer_rows
from audits.updates.findings.shadows import ema_rows
from audits.updates.findings.step_function_checks import (
    idle_group_rows,
    skipped_step_function_rows,
    step_function_rows,
    with_own_places,
)
from audits.updates.judge.apply_rule import is_lbfgs, rule_for
from audits.updates.judge.closures import ClosureJudge, closure_probe_rows
from audits.updates.judge.fresh_state import FreshState
from audits.updates.judge.optimizer_probe import probe_rows
from audits.updates.judge.optimizer_whole import without_false_verdicts
from audits.updates.judge.rule_check import RuleJudge
from audits.updates.received.cut_graph import cut_graph_rows
from audits.updates.received.gradient_rows import gradient_rows
from audits.updates.record.shadow_modules import shadows_of
from audits.updates.record.shelf import Shelf
from audits.updates.relations import relation_rows
from audits.updates.steps import TrainingStep, training_steps
from audits.updates.update_rows import row

#: Added to the subject's seed for the run that confirms a failure.
SECOND_SEED = 7919

#: Rows of each step are kept; of all other checks the worst of a phase's steps is.
_PER_STEP = ("update.rule",)

_STEP_CHECKS = tuple(
    name
    for name, check in CHECKS.items()
    if check.family in (Family.STEP, Family.UPDATE, Family.BUFFERS) or name == "registration.tied"
)


def check_registration(subject: Subject) -> list[ResultRow]:
    """Return the rows that need no training step: the right tensors are in the optimizers, as declared.

    Args:
        subject: the model under audit; left as it was.
    """
    return registration_rows(subject)


def check_updates(subject: Subject) -> list[ResultRow]:
    """Return the rows of ``step.*``, ``update.*``, ``optimizer.*`` and ``buffers.*``.

    A row fails only when a second run with another seed fails it too.

    Args:
        subject: the model under audit; left at its start.
    """
    rows: list[ResultRow] = []
    find_weighings(subject)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the training warns of was said when it trained
            if subject.settings.wants_check(*_STEP_CHECKS):
                rows = _confirmed(subject)
            for phase in subject.phases:
                try:
                    rows += synthetic_rows(subject, phase)
                except Exception as error:  # the very build, on tensors it was not made for
                    message = f"the probe of phase {phase.name!r} raised {type(error).__name__}: {error}"
                    rows.append(row(subject, "optimizer.probe", Outcome.INCONCLUSIVE, message, phase=phase.name,
                                    cause=Cause.PROBE_RAISED))  # fmt: skip
        rows = without_false_verdicts(subject, _name_environment(rows))
    finally:
        subject.reset()
    return [r for r in rows if _wanted(subject, r)]


def synthetic_rows(subject: Subject, phase: LivePhase) -> list[ResultRow]:
    """Return the rows of a phase's optimizer on synthetic gradients; failures are confirmed with a second seed."""
    if not subject.settings.wants_check("optimizer.*", "registration.state-round-trip", "update.rule"):
        return []
    if not is_lbfgs(phase) and rule_for(subject, phase) is None:

        def unknown(seed: int) -> list[ResultRow]:
            return [*probe_rows(subject, phase, seed), *relation_rows(subject, phase, seed)]

        return confirmed(unknown(subject.seed), unknown, subject.seed, subject.seed + SECOND_SEED)
    probe = closure_probe_rows if is_lbfgs(phase) else probe_rows

    def run(seed: int) -> list[ResultRow]:
        return probe(subject, phase, seed)

    return confirmed(run(subject.seed), run, subject.seed, subject.seed + SECOND_SEED)


def _name_environment(rows: list[ResultRow]) -> list[ResultRow]:
    """Give the failing rule rows of a phase the cause that the probe found to be the torch build's."""
    faulty = {r.phase for r in rows if r.check == "optimizer.probe" and r.cause == Cause.ENVIRONMENT}
    return [
        dataclasses.replace(
            r, cause=Cause.ENVIRONMENT, message=f"{r.message}; optimizer.probe shows the kernel to be at fault"
        )
        if r.phase in faulty and r.outcome is Outcome.FAIL and r.check in ("update.rule", "update.state")
        else r
        for r in rows
    ]


def _wanted(subject: Subject, r: ResultRow) -> bool:
    return subject.settings.wants_check(r.check) and (
        r.parameter is None or subject.settings.wants_parameter(r.parameter) or r.parameter not in subject.parameters
    )


def _confirmed(subject: Subject) -> list[ResultRow]:
    rows = run_once(subject, subject.seed)
    return confirmed(rows, functools.partial(run_once, subject), subject.seed, subject.seed + SECOND_SEED)


def run_once(subject: Subject, seed: int) -> list[ResultRow]:
    """Run the training steps once and return their rows."""
    rows: list[ResultRow] = []
    subject.reset(seed=seed)
    start = Shelf(subject.device, {name: subject.held_value(name) for name in subject.parameters})
    judges = {p.name: ClosureJudge(subject, p) if is_lbfgs(p) else RuleJudge(subject, p) for p in subject.phases}
    fresh = {p.name: FreshState(subject, p) for p in subject.phases if p.recipe.optimizer.state and not is_lbfgs(p)}
    steps: list[TrainingStep] = []
    for step in training_steps(subject, seed=seed):
        steps.append(step)
        for call in step.calls:
            rows += judges[call.phase.name].rows(call)
            if call.phase.name in fresh:
                rows += fresh[call.phase.name].rows(call)
            call.state_after = {}  # judged
        if step.error is not None:  # an optimizer step that ended is judged; the rest of it is half a training step
            rows.append(_raised(subject, step))
            break
        rows += isolation_rows(subject, step, start)
        own = subject.recipe.step is not None
        if own:
            rows += step_function_rows(subject, step)
        assert step.buffers is not None
        rows += batch_norm_rows(subject, step.buffers, step.number, step.reference_forwards if own else None)
        if own and step.before:
            rows += ema_rows(subject, step.before, step.number)
            rows += shadow_buffer_rows(subject, step.before, step.buffers, step.number)
    rows += gradient_rows(subject, steps)
    rows += idle_group_rows(subject, steps)
    rows += batch_rows(subject, steps, lambda: list(training_steps(subject, seed=seed, put_back=True)))
    rows = list(cut_graph_rows(subject, rows, seed))
    raised = any(step.error is not None for step in steps)
    if subject.recipe.ties and subject.settings.wants_check("registration.tied") and not raised:
        rows += [r for r in tied_rows(subject, "after the training steps") if r.outcome is Outcome.FAIL]
    if subject.recipe.step is None:
        rows += skipped_step_function_rows(subject)
        if shadows_of(subject):
            rows.append(row(subject, "buffers.ema", Outcome.SKIPPED, "the canonical step updates no EMA",
                            cause=Cause.CANONICAL_STEP))  # fmt: skip
    return with_own_places(subject, worst(rows))


def _raised(subject: Subject, step: TrainingStep) -> ResultRow:
    error = step.error
    message = f"training step {step.number} raised {type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, NotImplementedError) and not str(error):
        message += ": an optimizer without a step() (LOMO works inside the backward) needs the real training "
        message += "step: Recipe.capture(..., step=FUNCTION)"
    return row(subject, "update.rule", Outcome.INCONCLUSIVE, message, step=step.number, cause=Cause.STEP_RAISED)


def worst(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Return one row per check, phase and parameter: the worst of the steps (of each step for `update.rule`)."""
    kept: dict[tuple[object, ...], ResultRow] = {}
    for r in rows:
        key = (*key_of(r), r.step if r.check in _PER_STEP else None)
        known = kept.get(key)
        if known is None or WORST_FIRST.index(r.outcome) < WORST_FIRST.index(known.outcome):
            kept[key] = r
    return list(kept.values())
