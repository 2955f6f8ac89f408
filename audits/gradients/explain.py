"""Why a gradient is wrong: a stop-gradient, a custom Function's backward, a hook; and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from audits.gradients.certify import Certifier
from audits.gradients.classify import backward_hooks, jvp_agrees, single_wrong_element
from audits.gradients.functions import WrongFunction, wrong_functions
from audits.gradients.graph import LossGraph, root_of
from audits.gradients.probe import Prober
from audits.gradients.romberg import FIRST_STEP
from audits.gradients.verdicts import Verdict, describe
from audits.lanes.arithmetic import dot, norm
from audits.lanes.evaluation import Point
from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free
from audits.lanes.stops import StopGradients, StopSite
from audits.lanes.watching import ModuleStack
from audits.outcomes import Outcome
from audits.subject import LivePhase, Subject

#: Places a stop-gradient's cause is narrowed to one of, when there are no more than so many.
NARROWED_PLACES = 8

#: A single wrong element is looked for when no more tensors than this fail: a formula's error fails all upstream.
SINGLE_ELEMENT_TENSORS = 2


def explain(
    subject: Subject, phase: LivePhase, problem: Problem, point: Point, verdicts: Mapping[str, Verdict]
) -> dict[str, Verdict]:
    """Return the verdicts with the failing ones explained; a stop-gradient that is meant no longer fails.

    Args:
        subject: the subject.
        phase: the phase the problem belongs to.
        problem: the phase's loss, its tensors at theta.
        point: the point at theta, restored.
        verdicts: what was found.
    """
    explained = dict(verdicts)
    failing = _failing(explained)
    if not failing:
        return explained
    try:
        explained |= _stop_gradients(subject, problem, point, {n: verdicts[n] for n in failing})
        failing = _failing(explained)
        if failing:
            explained |= _formulas(subject, problem, point, {n: explained[n] for n in failing})
    except Exception as error:  # an explanation that fails must not hide the failure
        for name in failing:
            note = f"; its cause could not be narrowed down ({type(error).__name__})"
            explained[name] = replace(explained[name], message=describe(name, explained[name]) + note)
    return explained


def _failing(verdicts: Mapping[str, Verdict]) -> list[str]:
    return [n for n, v in verdicts.items() if v.outcome is Outcome.FAIL and v.cause == "wrong gradient"]


def _stop_gradients(
    subject: Subject, problem: Problem, point: Point, failing: Mapping[str, Verdict]
) -> dict[str, Verdict]:
    scopes = tuple(subject.recipe.stop_gradient)
    sites = _sites(subject, problem)
    if not sites:
        return {}
    meant = [site for site in sites if site.built_in or site.declared(scopes)]
    remaining = list(failing)
    explained: dict[str, Verdict] = {}
    if meant:
        agreeing = _agreeing(subject, problem, remaining, lambda site: site.built_in or site.declared(scopes))
        places = _places(meant)
        declared = any(site.declared(scopes) for site in meant)
        for name, verdict in agreeing.items():
            explained[name] = _meant(name, verdict, places, declared=declared, stopped=norm(point.gradients[name]) == 0)
        remaining = [name for name in remaining if name not in explained]
    if not remaining:
        return explained
    agreeing = _agreeing(subject, problem, remaining, lambda site: True)
    if not agreeing:
        return explained
    culprits = _narrowed(subject, problem, list(agreeing), sites, scopes)
    places = _places(culprits)
    paths = sorted({site.path for site in culprits})
    kinds = " and ".join(sorted({site.kind for site in culprits}))
    for name in agreeing:
        verdict = failing[name]
        explained[name] = replace(
            verdict,
            cause=f"stop-gradient at {places}",
            message=f"the gradient of {name!r} misses what a stop-gradient ({kinds}) in {places} cuts off: autograd "
            f"gives {_number(verdict.measured)}, the loss's derivative is {_number(verdict.expected)}; with that held "
            f"constant both agree. If it is meant, declare stop_gradient={paths!r} in the recipe",
            where_to_look=f"{kinds} in {places}",
        )
    return explained


def _meant(name: str, verdict: Verdict, places: str, *, declared: bool, stopped: bool) -> Verdict:
    word = "declared" if declared else "built-in"
    if declared and stopped:
        return replace(
            verdict, outcome=Outcome.SKIPPED, cause=f"declared stop-gradient at {places}",
            message=f"{name!r} gets no gradient because of the declared stop-gradient at {places}",
        )  # fmt: skip
    return replace(
        verdict, outcome=Outcome.PASS, cause=f"{word} stop-gradient at {places}",
        message=f"the gradient of {name!r} is the loss's derivative with the {word} stop-gradient at {places} held "
        "constant",
    )  # fmt: skip


def _sites(subject: Subject, problem: Problem) -> list[StopSite]:
    stops = StopGradients(subject.model, lambda site: False)
    problem.before()
    with quiet(), Free(problem.tape.cursor(), lift=problem.lifts), stops.active():
        problem.loss()
    return stops.sites


def _agreeing(
    subject: Subject, problem: Problem, names: list[str], frozen: Callable[[StopSite], bool]
) -> dict[str, Verdict]:
    """Judge the tensors with some stop-gradients' values held; return those that pass."""
    stops = StopGradients(subject.model, frozen)

    def loss():  # type: ignore[no-untyped-def]
        with stops.active():
            return problem.loss()

    held = Problem(problem.tensors, loss, problem.before, problem.tape, problem.lane, stops.at_point)
    settings = subject.settings
    certifier = Certifier(
        held, seed=subject.seed + 1, probes=settings.probes, detection_limit=settings.detection_limit
    )  # fmt: skip
    certifier.run(names)
    return {n: v for n, v in certifier.verdicts.items() if v.outcome is Outcome.PASS}


def _narrowed(
    subject: Subject, problem: Problem, names: list[str], sites: list[StopSite], scopes: tuple[str, ...]
) -> list[StopSite]:
    """Return the undeclared sites of one path, if holding those alone explains all the tensors."""
    unmeant = [site for site in sites if not site.built_in and not site.declared(scopes)]
    paths = list(dict.fromkeys(site.path for site in unmeant))
    if len(paths) <= 1 or len(paths) > NARROWED_PLACES:
        return unmeant

    for path in paths:

        def frozen(site: StopSite, path: str = path) -> bool:
            return site.path == path or site.built_in or site.declared(scopes)

        if len(_agreeing(subject, problem, names, frozen)) == len(names):
            return [site for site in unmeant if site.path == path]
    return unmeant


def _places(sites: list[StopSite]) -> str:
    labels = list(dict.fromkeys(site.label for site in sites))
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def _formulas(subject: Subject, problem: Problem, point: Point, failing: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Find the Function whose backward is wrong; otherwise say between what the error lies."""
    graph = LossGraph(problem)
    wrong = wrong_functions(problem, ModuleStack(subject.model), seed=subject.seed)
    upstream = {id(w): graph.upstream_of(w.call.function) for w in wrong}
    declared = _declared(subject)
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
                verdict, outcome=Outcome.SKIPPED, cause=f"declared custom gradient of {labels}",
                message=f"the gradient of {name!r} passes through the declared custom gradient of {labels}: it is not "
                "the loss's derivative, and is not meant to be",
            )  # fmt: skip
        else:
            unexplained[name] = verdict
    if unexplained:
        explained |= _between(subject, problem, point, unexplained, graph)
    return explained


def _declared(subject: Subject) -> set[str]:
    declared = subject.recipe.expect.get("custom_gradient", ())
    return {declared} if isinstance(declared, str) else set(declared)


def _blamed(name: str, verdict: Verdict, culprits: list[WrongFunction]) -> Verdict:
    labels = list(dict.fromkeys(f"{w.name} in {w.call.label}" for w in culprits))
    first = culprits[0]
    return replace(
        verdict,
        cause=f"wrong backward of {labels[0]}",
        message=f"the gradient of {name!r} is wrong: autograd gives {_number(verdict.measured)}, the loss's derivative "
        f"is {_number(verdict.expected)}. The backward of the autograd.Function {', '.join(labels)} is wrong by "
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
    expected = dot(point.gradients, direction).total
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
        cause = verdict.cause
        if name == root and element is not None:
            index, analytic, numeric = element
            cause = "one wrong element"
            notes.append(f"only element {index} is wrong: {analytic:.6g} where the derivative is {numeric:.6g}")
        explained[name] = replace(
            verdict,
            cause=cause,
            message=f"the gradient of {name!r} is wrong: autograd gives {_number(verdict.measured)}, the loss's "
            f"derivative is {_number(verdict.expected)}; {'; '.join(notes)}",
            where_to_look=hooks[0] if hooks else f"{owner}, or what follows it towards the loss",
        )
    return explained


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.6g}"
