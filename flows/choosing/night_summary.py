"""What a night came to: what failed newly, what was fixed, what could not be judged. Knows no Prefect."""

from __future__ import annotations

import dataclasses
import datetime
from collections import Counter
from collections.abc import Callable, Sequence

from audits.causes import Cause
from audits.naming import label_of, reference_to, visible
from audits.outcomes import WORST_FIRST, Outcome
from audits.results.committed import CommittedAudit, CommittedAudits
from audits.waivers import excuses, unmatched
from audits.wording import and_more
from flows.choosing import outside, recipes_missing
from flows.choosing.audit_summary import AuditSummary, summaries_of
from flows.choosing.due import Plan, Reason
from flows.choosing.outside import SetAside, remembered
from flows.choosing.recipes_missing import WithoutRecipe, lacks_recipe
from flows.settings.environment import GradauditSettings
from flows.team_policy import today, waivers_of
from registry_models.registry.versions import Version
from registry_models.report.text import escape_markdown

_BAD, _GOOD = ("fail",), ("pass", "warn")

#: Versions that a list in the summary names.
_NAMED = 50


@dataclasses.dataclass(frozen=True)
class NightSummary:
    """A night's outcome.

    Attributes:
        plan: what was to be done.
        audited: one summary per audited version, in the plan's order.
        newly_failed: those that fail and did not before.
        fixed: those that pass or warn and failed before, or whose model's last audited version did.
        not_judged: those whose audit could not tell.
        not_audited: references of the versions without a result.
        troubles: why, as far as it is known.
        seconds: duration of the night.
        idle_waivers: sentences on waivers in force that excuse nothing, though what they are about was audited.
        outside: versions outside the audit, those that only their audit showed to be included.
        without_recipe: versions that are still known to be without a recipe; they are counted, and no news.
        excused: references of those of ``not_judged`` that a waiver excuses, or that are known to be without a recipe.
    """

    plan: Plan
    audited: tuple[AuditSummary, ...]
    newly_failed: tuple[AuditSummary, ...]
    fixed: tuple[AuditSummary, ...]
    not_judged: tuple[AuditSummary, ...]
    not_audited: tuple[str, ...]
    troubles: tuple[str, ...]
    seconds: float
    idle_waivers: tuple[str, ...] = ()
    outside: tuple[SetAside, ...] = ()
    without_recipe: tuple[WithoutRecipe, ...] = ()
    excused: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The night in one sentence."""
        counted = Counter(summary["outcome"] for summary in self.audited)
        parts = [f"{counted[str(outcome)]} {outcome}" for outcome in WORST_FIRST if counted[str(outcome)]]
        text = f"{len(self.audited)} of {self.plan.looked_at} versions audited: {', '.join(parts) or 'nothing'}"
        if self.newly_failed:
            text += f"; {len(self.newly_failed)} newly failed"
        if self.fixed:
            text += f"; {len(self.fixed)} fixed"
        if self.not_audited:
            text += f"; {len(self.not_audited)} could not be audited"
        return text

    @property
    def metrics(self) -> dict[str, float]:
        """Finite numbers for MLflow."""
        counted = Counter(summary["outcome"] for summary in self.audited)
        values: dict[str, float] = {f"night.{outcome}": counted[str(outcome)] for outcome in WORST_FIRST}
        return values | {
            "night.looked_at": self.plan.looked_at,
            "night.audited": len(self.audited),
            "night.newly_failed": len(self.newly_failed),
            "night.fixed": len(self.fixed),
            "night.not_audited": len(self.not_audited),
            "night.outside": len(self.outside),
            "night.without_recipe": len(self.without_recipe),
            "night.rotated": self.plan.count(Reason.ROTATION),
            "night.sampled": self.plan.count(Reason.SAMPLE),
            "night.outdated": self.plan.outdated,
            "night.seconds": self.seconds,
        }

    def markdown(self) -> str:
        """The night for Prefect's and MLflow's pages; names are escaped."""
        lines = [f"{self.headline}.", ""]
        for title, members in (
            ("Failed newly", self.newly_failed),
            ("Fixed", self.fixed),
            ("Could not be judged", self.not_judged),
        ):
            if members:
                lines += [f"### {title}", ""]
                lines += [f"- {escape_markdown(_sentence(s))}" for s in members[:_NAMED]]
                more = and_more(len(members) - _NAMED)
                lines += [f"- ... {more}"] if more else []
                lines.append("")
        if self.not_audited:
            lines += ["### Not audited: due again next time", ""]
            lines += [f"- {escape_markdown(visible(reference))}" for reference in self.not_audited[:_NAMED]]
            lines += [f"\n{escape_markdown(trouble)}" for trouble in self.troubles[:_NAMED]]
            lines.append("")
        if self.plan.unready:
            lines += ["### Passed over: not registered", ""]
            lines += [f"- {escape_markdown(sentence)}" for sentence in self.plan.unready[:_NAMED]]
            lines.append("")
        if self.idle_waivers:
            lines += ["### Waivers that match nothing", ""]
            lines += [f"- {escape_markdown(sentence)}" for sentence in self.idle_waivers[:_NAMED]]
            lines.append("")
        if self.without_recipe:
            lines += [f"{recipes_missing.in_words(self.without_recipe)}.", ""]
        if self.outside:
            lines += [f"{outside.in_words(self.outside)}.", ""]
            lines += [f"- {escape_markdown(_why_outside(one))}" for one in self.outside if one.new][:_NAMED]
            lines.append("")
        reasons = [f"{number} {reason}" for reason in Reason if (number := self.plan.count(reason))]
        lines.append(f"Why audited: {', '.join(reasons) or 'nothing was due'}. {self.plan.environment}.")
        if self.plan.outdated:
            lines.append(f"{self.plan.outdated} versions had their last verdict in another environment.")
        return "\n".join(lines)

    def table(self) -> list[dict[str, object]]:
        """One line per audited version for Prefect's table."""
        return [
            {
                "model": s["model"],
                "version": s["version"],
                "outcome": s["outcome"],
                "why": s["why"],
                "failed checks": ", ".join(s["failed_checks"]),
                "seconds": round(s["seconds"], 1),
                "MLflow run": s["run_id"] or "",
            }
            for s in self.audited
        ]


def summarise_night(
    plan: Plan,
    committed: CommittedAudits,
    settings: GradauditSettings,
    *,
    troubles: Sequence[str] = (),
) -> NightSummary:
    """Compare what is committed since the night began with what was known before.

    Args:
        plan: the night's plan.
        committed: the results store's audits; they are read anew.
        settings: the results store.
        troubles: what went wrong.

    Raises:
        InfrastructureError: the results store cannot be read.
    """
    audits = committed_since(plan, committed.refresh())
    done = {reference_to(audit.model_name, audit.model_version): audit for audit in audits}
    summaries = dict(zip([audit.audit_id for audit in audits], summaries_of(audits, settings.results), strict=True))
    newly, fixed = [], []
    for due in plan.due:
        audit = done.get(due.version.uri)
        if audit is None:
            continue
        before = _before(committed, due.version, plan)
        failed_before = before is not None and before.outcome in _BAD
        own = before is not None and before.model_version == due.version.version
        if audit.outcome in _BAD and not (failed_before and own):
            newly.append(summaries[audit.audit_id])
        elif audit.outcome in _GOOD and failed_before:
            fixed.append(summaries[audit.audit_id])
    late = remembered([due.version for due in plan.due if due.version.uri not in done], settings.results)
    known = {one.uri for one in plan.without_recipe}
    aside = {one.version.uri for one in late}
    unjudged = tuple(s for s in summaries.values() if s["outcome"] == Outcome.INCONCLUSIVE)
    waivers = waivers_of(settings)
    return NightSummary(
        plan=plan,
        audited=tuple(summaries.values()),
        newly_failed=tuple(newly),
        fixed=tuple(fixed),
        not_judged=unjudged,
        not_audited=tuple(due.version.uri for due in plan.due if due.version.uri not in done.keys() | aside),
        troubles=tuple(troubles),
        seconds=(datetime.datetime.now(datetime.UTC) - plan.at).total_seconds(),
        idle_waivers=_idle_waivers(plan, committed, settings),
        outside=(*plan.outside, *(dataclasses.replace(one, new=True) for one in late)),
        without_recipe=tuple(one for one in plan.without_recipe if one.uri not in done or lacks_recipe(done[one.uri])),
        excused=tuple(
            uri
            for s in unjudged
            if ((uri := reference_to(s["model"], s["version"])) in known and s["unjudged"] == Cause.NO_RECIPE)
            or excuses(waivers, s["model"], s["version"], today())
        ),
    )


def _idle_waivers(plan: Plan, committed: CommittedAudits, settings: GradauditSettings) -> tuple[str, ...]:
    """Waivers in force that are about a version of tonight and excuse nothing in any version's latest audit."""
    waivers = waivers_of(settings)
    tonight = [due.version for due in plan.due]
    waivers = tuple(w for w in waivers if any(w.covers(version.name, version.version) for version in tonight))
    unjudged = [audit for audit in committed.latest() if audit.outcome == Outcome.INCONCLUSIVE]
    used = {w.id for a in unjudged for w in excuses(waivers, a.model_name, a.model_version, today())}
    waivers = tuple(w for w in waivers if w.id not in used)
    latest = ((audit.model_name, audit.model_version, audit.waivers) for audit in committed.latest()) if waivers else ()
    return tuple(
        f"The waiver of {waiver.label} ({waiver.owner}) matches no finding: it can go."
        for waiver in unmatched(waivers, latest, today())
    )


def committed_since(plan: Plan, committed: CommittedAudits) -> list[CommittedAudit]:
    """Return each version's latest audit since the night was planned, where there is one, in the plan's order."""
    latest = (committed.of(due.version.name, due.version.version)[-1:] for due in plan.due)
    return [audit for found in latest for audit in found if plan.is_new(audit)]


def outcome_before(committed: CommittedAudits, version: Version) -> str | None:
    """Return what a version's latest audit came to; of one never audited, that of the version before it."""
    audit = _latest(committed, version, lambda _: True)
    return None if audit is None else audit.outcome


def _before(committed: CommittedAudits, version: Version, plan: Plan) -> CommittedAudit | None:
    """The version's last audit before tonight; for a version never audited, that of the one before it."""
    return _latest(committed, version, lambda audit: not plan.is_new(audit))


def _latest(
    committed: CommittedAudits, version: Version, counts: Callable[[CommittedAudit], bool]
) -> CommittedAudit | None:
    for number in range(version.version, max(0, version.version - 20), -1):
        past = [audit for audit in committed.of(version.name, number) if counts(audit)]
        if past:
            return past[-1]
    return None


def _why_outside(one: SetAside) -> str:
    return f"{one.version.label}: {one.why}"


def _sentence(summary: AuditSummary) -> str:
    return f"{label_of(summary['model'], summary['version'])}: {summary['headline']}"
