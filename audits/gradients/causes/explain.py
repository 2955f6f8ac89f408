"""Why a gradient is wrong: a stop-gradient, a custom Function's backward, a hook; and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from audits.causes import Cause
from audits.gradients.causes.classify import backward_hooks, jvp_agrees, single_wrong_element
from audits.gradients.causes.stopped import explain_stops
from audits.gradients.functions.alone import WrongFunction, declared_custom, wrong_functions
from audits.gradients.graph import LossGraph, root_of
from audits.gradients.methods.probe import Prober
from audits.gradients.methods.romberg import FIRST_STEP
from audits.gradients.verdicts import Verdict, describe, number
from audits.lanes.evaluation import Point
from audits.lanes.problem import Problem
from audits.lanes.watching import ModuleStack
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome

#: A single wrong element is looked for when no more tensors than this fail: a formula's error fails all upstream.
SINGLE_ELEMENT_TENSORS = 2


def explain(
    subject: Subject, phase: LivePhase, problem: Problem, point: Point, verdicts: Mapping[str, Verdict], *,
    held: bool = False,
) -> dict[str, Verdict]:  # fmt: skip
    """Return the verdicts with the failing ones explained; a stop-gradient that is meant no longer fails.

    Args:
        subject: the subject.
        phase: the phase the problem belongs to.
        problem: the phase's loss, its tensors at theta.
        point: the point at theta, restored.
        verdicts: what was found.
        held: whether declared custom gradients were taken as they are: they explain nothing then.
    """
    explained = dict(verdicts)
    failing = _failing(explained)
    if not failing:
        return explained
    try:
        explained |= explain_stops(subject, problem, point, {n: verdicts[n] for n in failing})
        failing = _failing(explained)
        if failing:
            explained |= _formulas(subject, problem, point, {n: explained[n] for n in failing}, held=held)
    except Exception as error:  # an explanation that fails must not hide the failure
        for name in failing:
            note = f"; its cause could not be narrowed down ({type(error).__name__})"
            explained[name] = replace(explained[name], message=describe(name, explained[name]) + note)
    return explained


def _failing(verdicts: Mapping[str, Verdict]) -> list[str]:
    return [n for n, v in verdicts.items() if v.outcome is Outcome.FAIL and v.cause == Cause.WRONG_GRADIENT]


def _formulas(
    subject: Subject, problem: Problem, point: Point, failing: Mapping[str, Verdict], *, held: bool
) -> dict[str, Verdict]:
    """Find the Function whose backward is wrong; otherwise say between what the error lies."""
    graph = LossGraph(problem)
    wrong = wrong_functions(problem, ModuleStack(subject.model), seed=subject.seed)
    declared = declared_custom(subject)
    wrong = [w for w in wrong if not held or not declared & {w.name, w.call.path}]
    upstream = {id(w): graph.upstream_of(w.call.function) for w in wrong}
    explained = {}
    unexplained = {}
    for name, verdict in failing.items():
        culprits = [w for w in wrong if name in upstream[id(w)]]
        undeclared = [w for w in culprits if not declared & {w.name, w.call.path}]
        if undeclared:
            explained[name] = _blamed(name, verdict, undeclared)
        elif culprits:
            labels = ", ".join(dict.fromkeys(f"{w.name} in {w.call.label}" for w in culprits))
            explained[name] = replace(
                verdict, outcome=Outcome.SKIPPED, cause=Cause.DECLARED_CUSTOM_GRADIENT.at(labels),
                message=f"the gradient of {name!r} passes through the declared custom gradient of {labels}: it is not "
                "the loss's derivative, and is not meant to be",
            )  # fmt: skip
        else:
            unexplained[name] = verdict
    if unexplained:
        explained |= _between(subject, problem, point, unexplained, graph)
    return explained


def _blamed(name: str, verdict: Verdict, culprits: list[WrongFunction]) -> Verdict:
    labels = list(dict.fromkeys(f"{w.name} in {w.call.label}" for w in culprits))
    first = culprits[0]
    return replace(
        verdict,
        cause=Cause.WRONG_BACKWARD.at(labels[0]),
        message=f"the gradient of {name!r} is wrong: autograd gives {number(verdict.measured)}, the loss's derivative "
        f"is {number(verdict.expected)}. The backward of the autograd.Function {', '.join(labels)} is wrong by "
        f"itself: for its argument {first.argument} it gives {first.measured:.6g} where its forward's derivative is "
        f"{first.expected:.6g}",
        where_to_look=f"{first.name}.backward, used by {first.call.label}; if its gradient is meant to differ, declare "
        f"expect={{'custom_gradient': [{first.name!r}]}}",
    )


def _between(
    subject: Subject, problem: Problem, point: Point, failing: Mapping[str, Verdict], graph: LossGraph
) -> dict[str, Verdict]:
    root = root_of(list(failing), graph)
    owner = subject.owner(root).label if root in subject.parameters else "the batch"
    hooks = backward_hooks(subject.model, problem)
    prober = Prober(point, subject.seed + 5)
    direction = prober.direction(prober.scales(list(failing), FIRST_STEP))
    expected = point.gradients.products(direction).total
    agrees = jvp_agrees(subject.model, problem, direction, expected)
    kind = {
        True: "forward-mode differentiation agrees with autograd: a value is detached, or changed outside autograd",
        False: "forward-mode differentiation disagrees with autograd: a backward formula or a hook is wrong",
        None: "",
    }[agrees]
    element = None
    if len(failing) <= SINGLE_ELEMENT_TENSORS and problem.tensors[root].numel() > 1:
        element = single_wrong_element(prober, root, FIRST_STEP)
        point.restore()
    explained = {}
    for name, verdict in failing.items():
        notes = [f"the error lies between {root!r} in {owner} and the loss"]
        notes += [kind] if kind else []
        notes += [f"there is {', '.join(hooks[:3])}"] if hooks else []
        cause = Cause.BACKWARD_HOOK.at(hooks[0]) if hooks and agrees is False else Cause.WRONG_TOWARDS_LOSS.at(root)
        if name == root and element is not None:
            index, analytic, numeric = element
            cause = Cause.ONE_WRONG_ELEMENT
            notes.append(f"only element {index} is wrong: {analytic:.6g} where the derivative is {numeric:.6g}")
        explained[name] = replace(
            verdict,
            cause=cause,
            message=f"the gradient of {name!r} is wrong: autograd gives {number(verdict.measured)}, the loss's "
            f"derivative is {number(verdict.expected)}; {'; '.join(notes)}",
            where_to_look=hooks[0] if hooks else f"{owner}, or what follows it towards the loss",
        )
    return explained
