"""Failures that a stop-gradient explains: which one, whether it is meant, and what may be advised.

A declaration excuses every stop in its scope, a misplaced one too. It is suggested where one stop alone explains the
failure and nothing speaks against it; where several work together, or one module stands under two names, or a gradient
cancels, the text says so and suggests none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from audits.causes import Cause
from audits.gradients.causes.aliases import called_under_two_names
from audits.gradients.causes.cancelled import Cancellation, cancellations
from audits.gradients.methods.certify import Certifier
from audits.gradients.verdicts import Verdict, number
from audits.lanes.evaluation import Point
from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free
from audits.lanes.stops import FIRST_ORDER, StopGradients, StopSite
from audits.live.subject import Subject
from audits.outcomes import Outcome
from audits.wording import listed

#: Places a stop-gradient's cause is narrowed to one of, when there are no more than so many.
NARROWED_PLACES = 8

#: Stop-gradients that are meant, in words: by the recipe, by torch's own module, by their structure.
DECLARED, BUILT_IN, STRAIGHT = "declared stop-gradient", "built-in stop-gradient", "straight-through estimate"

Chosen = Callable[[StopSite], bool]


def explain_stops(
    subject: Subject, problem: Problem, point: Point, failing: Mapping[str, Verdict]
) -> dict[str, Verdict]:
    """Return new verdicts of the failing tensors whose failure the held values explain.

    Args:
        subject: the subject.
        problem: the phase's loss, its tensors at theta.
        point: the point at theta, restored.
        failing: the verdicts to explain.
    """
    explaining = _Explaining(subject, problem, point, failing)
    explaining.by_what_is_meant()
    explaining.by_stops()
    explaining.by_first_order_gradients()
    return explaining.explained


class _Explaining:
    """Explains failures one kind of held value after the other; what one kind explains is settled."""

    def __init__(self, subject: Subject, problem: Problem, point: Point, failing: Mapping[str, Verdict]) -> None:
        self.explained: dict[str, Verdict] = {}
        self._subject, self._problem, self._point = subject, problem, point
        self._scopes = tuple(subject.recipe.stop_gradient)
        self._sites = _sites(subject, problem)
        self._remaining = dict(failing)

    def by_what_is_meant(self) -> None:
        """Pass what the declared, built-in and straight-through stops explain, unless it cancels by mistake."""
        meant = [site for site in self._sites if self._is_meant(site)]
        if not meant:
            return
        agreeing = self._agreeing(list(self._remaining), self._is_meant)
        kind, where = _kind(meant, self._scopes), _places(meant)
        cancelled: list[Cancellation] = []
        if agreeing and kind != BUILT_IN:
            cancelled = cancellations(self._subject, self._problem, list(agreeing))
        for name, verdict in agreeing.items():
            if any(name in found.tensors for found in cancelled):
                self._settle(name, _cancelled(name, self._remaining[name], cancelled, f"{kind} at {where}"))
            else:
                stopped = self._point.gradients.norms[name] == 0
                self._settle(name, _meant(name, verdict, kind, meant, stopped=stopped))

    def by_stops(self) -> None:
        """Name the stops that nobody meant."""
        ordinary = self._ordinary
        if not self._remaining or not ordinary:
            return
        agreeing = self._agreeing(list(self._remaining), lambda site: site.kind != FIRST_ORDER)
        if not agreeing:
            return
        culprits = _narrowed(self._subject, self._problem, list(agreeing), ordinary, self._is_meant)
        straight = [site for site in self._sites if site.straight]
        advice = _advice(self._subject, self._problem, self._point, list(agreeing), [*culprits, *straight])
        for name in agreeing:
            self._settle(name, _unmeant(name, self._remaining[name], culprits, advice))

    def by_first_order_gradients(self) -> None:
        """Name the gradients that were taken without ``create_graph=True``, alone or beside other stops."""
        first_order = [site for site in self._sites if site.kind == FIRST_ORDER]
        if not self._remaining or not first_order:
            return
        agreeing = self._agreeing(
            list(self._remaining), lambda site: site.kind == FIRST_ORDER or self._is_meant(site)
        )  # fmt: skip
        others = [name for name in self._remaining if name not in agreeing]
        for name in agreeing:
            self._settle(name, _first_order(name, self._remaining[name], first_order))
        if others and self._ordinary:
            for name in self._agreeing(others, lambda site: True):
                self._settle(name, _first_order(name, self._remaining[name], first_order, self._ordinary))

    @property
    def _ordinary(self) -> list[StopSite]:
        return [site for site in self._sites if not self._is_meant(site) and site.kind != FIRST_ORDER]

    def _is_meant(self, site: StopSite) -> bool:
        return site.built_in or site.straight or site.declared(self._scopes)

    def _agreeing(self, names: list[str], frozen: Chosen) -> dict[str, Verdict]:
        return _agreeing(self._subject, self._problem, names, frozen)

    def _settle(self, name: str, verdict: Verdict) -> None:
        self.explained[name] = verdict
        del self._remaining[name]


def _kind(meant: list[StopSite], scopes: tuple[str, ...]) -> str:
    if any(site.declared(scopes) for site in meant):
        return DECLARED
    return STRAIGHT if any(site.straight for site in meant) else BUILT_IN


def _meant(name: str, verdict: Verdict, kind: str, meant: list[StopSite], *, stopped: bool) -> Verdict:
    places = _places([site for site in meant if site.straight] if kind == STRAIGHT else meant)
    if kind == DECLARED and stopped:
        return replace(
            verdict, outcome=Outcome.SKIPPED, cause=f"{kind} at {places}",
            message=f"{name!r} gets no gradient because of the {kind} at {places}",
        )  # fmt: skip
    return replace(
        verdict, outcome=Outcome.PASS, cause=Cause.CONVENTION if kind == STRAIGHT else f"{kind} at {places}",
        message=f"the gradient of {name!r} is the loss's derivative with the {kind} at {places} held constant",
    )  # fmt: skip


def _cancelled(name: str, verdict: Verdict, found: list[Cancellation], places: str) -> Verdict:
    first = next(c for c in found if name in c.tensors)
    return replace(
        verdict,
        cause=Cause.CANCELLED_GRADIENT.at(first.label),
        message=f"{_numbers(name, verdict)} The {places} explains the difference, but {first.describe()}",
        where_to_look=f"{first.label}, {first.source}",
    )


def _unmeant(name: str, verdict: Verdict, culprits: list[StopSite], advice: str) -> Verdict:
    places = _places(culprits)
    kinds = " and ".join(sorted({site.kind for site in culprits}))
    return replace(
        verdict,
        cause=Cause.STOP_GRADIENT.at(places),
        message=f"the gradient of {name!r} misses what a stop-gradient ({kinds}) in {places} cuts off: autograd "
        f"gives {number(verdict.measured)}, the loss's derivative is {number(verdict.expected)}; with that held "
        f"constant both agree. {advice}",
        where_to_look=f"{kinds} in {places}",
    )


def _first_order(name: str, verdict: Verdict, sites: list[StopSite], others: list[StopSite] | None = None) -> Verdict:
    places, sources = _places(sites), ", ".join(dict.fromkeys(site.source for site in sites))
    besides = f", and so are the values behind a stop-gradient in {_places(others)}" if others else ""
    return replace(
        verdict,
        cause=Cause.NO_CREATE_GRAPH.at(places),
        message=f"{_numbers(name, verdict)} {places[:1].upper()}{places[1:]} uses a gradient that was taken without "
        f"create_graph=True ({sources}): autograd holds it constant{besides}, and with that both agree. Pass "
        "create_graph=True, as a gradient penalty needs it; a gradient that is meant as a constant says so with "
        ".detach()",
        where_to_look=f"torch.autograd.grad or backward at {sources}: create_graph=True",
    )


def _numbers(name: str, verdict: Verdict) -> str:
    return (
        f"the gradient of {name!r} is wrong: autograd gives {number(verdict.measured)}, the loss's derivative is "
        f"{number(verdict.expected)}."
    )


def _advice(subject: Subject, problem: Problem, point: Point, names: list[str], culprits: list[StopSite]) -> str:
    none = "; no declaration is suggested, since it would cover a stop at the wrong place too"
    alias = called_under_two_names(subject, problem, names)
    if alias is not None:
        return (
            f"{alias.names} are one module: what is held constant under one name is trained under the other. If one "
            f"is meant to follow the other, make it a copy of its own (copy.deepcopy){none}"
        )
    cancelled = cancellations(subject, problem, names)
    if cancelled:
        text = cancelled[0].describe()
        return f"{text[0].upper()}{text[1:]}{none}"
    lines = list(dict.fromkeys((site.path, site.source) for site in culprits))
    fully = all(point.gradients.norms[name] == 0 for name in names)
    paths = sorted({site.path for site in culprits})
    if len(lines) > 1 and not (fully and len(paths) == 1):
        where = ", ".join(dict.fromkeys(site.source for site in culprits[:NARROWED_PLACES]))
        return (
            f"Several stops work together ({where}); which of them are meant, and whether one is missing, cannot be "
            f"told from here: compare each with the paper or code it follows{none}"
        )
    return f"If it is meant, declare stop_gradient={paths!r} in the recipe"


def _sites(subject: Subject, problem: Problem) -> list[StopSite]:
    stops = StopGradients(subject.model, lambda site: False)
    problem.before()
    with quiet(), Free(problem.tape.cursor(), lift=problem.lifts), stops.active():
        problem.loss()
    return stops.sites


def _agreeing(subject: Subject, problem: Problem, names: list[str], frozen: Chosen) -> dict[str, Verdict]:
    """Judge the tensors with some stop-gradients' values held; return those that pass."""
    stops = StopGradients(subject.model, frozen)

    def loss():  # type: ignore[no-untyped-def]
        with stops.active():
            return problem.loss()

    held = Problem(
        problem.tensors, loss, problem.before, problem.tape, problem.lane, stops.at_point, native=problem.native
    )  # fmt: skip
    settings = subject.settings
    certifier = Certifier(
        held, seed=subject.seed + 1, probes=settings.probes, detection_limit=settings.detection_limit
    )  # fmt: skip
    certifier.run(names)
    return {n: v for n, v in certifier.verdicts.items() if v.outcome is Outcome.PASS}


@dataclass(frozen=True)
class _Candidate:
    sites: tuple[StopSite, ...]

    def holds(self, site: StopSite) -> bool:
        return any(site.path == own.path and site.source == own.source for own in self.sites)


def _narrowed(
    subject: Subject, problem: Problem, names: list[str], unmeant: list[StopSite], is_meant: Chosen
) -> list[StopSite]:
    """Return the sites of one line of code, or of one module, if holding those alone explains all the tensors."""
    lines: dict[tuple[str, str], list[StopSite]] = {}
    paths: dict[str, list[StopSite]] = {}
    for site in unmeant:
        lines.setdefault((site.path, site.source), []).append(site)
        paths.setdefault(site.path, []).append(site)
    if len(lines) <= 1:
        return unmeant
    groups = [group for found in (lines, paths) if 1 < len(found) <= NARROWED_PLACES for group in found.values()]
    for group in groups:
        candidate = _Candidate(tuple(group))

        def frozen(site: StopSite, candidate: _Candidate = candidate) -> bool:
            return candidate.holds(site) or is_meant(site)

        if len(_agreeing(subject, problem, names, frozen)) == len(names):
            return group
    return unmeant


def _places(sites: list[StopSite]) -> str:
    return listed(dict.fromkeys(site.label for site in sites))
