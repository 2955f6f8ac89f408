"""A verdict on a version: tags (``audit.outcome`` last), a marked block in its description, a tag on its model."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator, Sequence

from mlflow.tracking import MlflowClient

from audits.report import AuditReport
from registry_models.registry.artifact_places import still_the_same
from registry_models.registry.mlflow_values import tag_value
from registry_models.registry.versions import OUTCOME_TAG, SUBJECT_TAG, Version, registry_errors
from registry_models.report.text import escape_markdown

#: The block starts with a plain line, since lists of versions show a description's first line as it stands, and ends
#: with a comment that nobody sees.
BLOCK_BEGIN, BLOCK_END = "gradaudit audit · ", "<!-- gradaudit -->"
_BLOCK = re.compile(f"(?ms)^{BLOCK_BEGIN}(?:(?!^{BLOCK_BEGIN}).)*?{BLOCK_END}")

#: On the registered model: the verdict on its latest audited version.
LATEST_TAG = "audit.latest"

#: Parameters named in a tag before it says how many more there are.
NAMED_PARAMETERS = 20


def mark(
    client: MlflowClient, report: AuditReport, version: Version, *, run_id: str, experiment_id: str, fingerprint: str
) -> bool:
    """Mark the version and return True; False when a newer audit has already marked it.

    The user's own tags, aliases and description text stay as they are. ``audit.outcome`` is written last: a version
    never shows a verdict whose run and rows are not there.

    Raises:
        ArtifactError: the version is gone.
        InfrastructureError: the registry does not answer, or the version was replaced by another one meanwhile.
    """
    with registry_errors(version.label, "write tags and the description of this version"):
        current = still_the_same(version, client)
        at = report.identity.audited_at.astimezone(datetime.UTC).isoformat(timespec="milliseconds")
        if current.tags.get(SUBJECT_TAG) == _subject(version) and current.tags.get("audit.at", "") > at:
            return False
        tags = {
            "audit.at": at,
            "audit.run_id": run_id,
            "audit.cause": "; ".join(report.causes),
            "audit.failed_checks": ",".join(report.failed_checks),
            "audit.failed_parameters": named_parameters(report.failed_parameters),
            "audit.coverage": f"{report.coverage:.4f}",
            "audit.fingerprint": fingerprint,
        }
        tags = {name: tag_value(value) for name, value in tags.items()} | {SUBJECT_TAG: _subject(version)}
        description = with_block(current.description, _block(report, run_id, experiment_id))
        with _all_or_nothing(client, current, [*tags, OUTCOME_TAG]):
            if OUTCOME_TAG in current.tags and current.tags[OUTCOME_TAG] != str(report.outcome):
                # Between the first and the last tag the version shows no verdict rather than an outdated one.
                client.delete_model_version_tag(version.name, str(version.version), OUTCOME_TAG)
            client.update_model_version(version.name, str(version.version), description)
            for name, value in tags.items():
                client.set_model_version_tag(version.name, str(version.version), name, value)
            _mark_model(client, report, version)
            client.set_model_version_tag(version.name, str(version.version), OUTCOME_TAG, str(report.outcome))
    return True


@contextlib.contextmanager
def _all_or_nothing(client: MlflowClient, before: Version, names: Sequence[str]) -> Iterator[None]:
    """Put tags and description back as they were where the block does not come to its end.

    A registry that does not answer any more leaves them without a verdict; the version stays due.
    """
    latest = client.get_registered_model(before.name).tags.get(LATEST_TAG)
    try:
        yield
    except BaseException:
        version = (before.name, str(before.version))
        with contextlib.suppress(Exception):
            if latest is None:
                with contextlib.suppress(Exception):
                    client.delete_registered_model_tag(before.name, LATEST_TAG)
            else:
                client.set_registered_model_tag(before.name, LATEST_TAG, latest)
            client.update_model_version(*version, before.description)
            for name in names:  # the verdict last, as ever
                if name in before.tags:
                    client.set_model_version_tag(*version, name, before.tags[name])
                else:
                    with contextlib.suppress(Exception):
                        client.delete_model_version_tag(*version, name)
        raise


def named_parameters(names: list[str]) -> str:
    """Return the first names, comma-separated, and ``+N`` for the rest."""
    rest = len(names) - NAMED_PARAMETERS
    return ",".join(names[:NAMED_PARAMETERS]) + (f",+{rest}" if rest > 0 else "")


def with_block(description: str, block: str) -> str:
    """Return the description with gradaudit's block replaced, or added at its end; the rest is the user's."""
    marked = f"{BLOCK_BEGIN}{block}\n{BLOCK_END}"
    if _BLOCK.search(description):
        return _BLOCK.sub(lambda _: marked, description, count=1)
    return f"{description.rstrip()}\n\n{marked}" if description.strip() else marked


def _block(report: AuditReport, run_id: str, experiment_id: str) -> str:
    link = f"#/experiments/{experiment_id}/runs/{run_id}"
    date = report.identity.audited_at.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{date} · {escape_markdown(report.headline)}\n\n[Open the audit's report]({link})"


def _mark_model(client: MlflowClient, report: AuditReport, version: Version) -> None:
    """``audit.latest`` on the registered model, unless a later version already says it."""
    known = client.get_registered_model(version.name).tags.get(LATEST_TAG, "")
    match = re.match(r"v(\d+) ", known)
    if match is None or int(match[1]) <= version.version:
        client.set_registered_model_tag(version.name, LATEST_TAG, f"v{version.version} {report.outcome}")


def _subject(version: Version) -> str:
    return f"{version.name}/{version.version}"
