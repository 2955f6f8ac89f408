"""Which versions are outside the audit: another library's models, and modules without anything to train.

They are looked at once, several at a time, and remembered in the results store: a version that was seen before costs no
round trip. Knows no Prefect.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError, InfrastructureError
from audits.naming import with_names
from audits.results.committed import CommittedAudits
from audits.results.kinds import Kind, Kinds
from audits.results.store import ResultsStore
from audits.wording import plural
from flows.choosing.due_keys import digest
from registry_models.artifacts.first_look import look_at
from registry_models.artifacts.flavours import RULES, Outside
from registry_models.registry.artifact_places import at_home
from registry_models.registry.versions import RECIPE_TAG, Version

_log = logging.getLogger(__name__)

#: Looks at a time: each is a handful of small requests that mostly wait.
AT_ONCE = 8

#: Looks in a row that a service did not answer, after which the rest is left to the audits.
GIVE_UP_AFTER = 3

#: Kinds of artifacts that are audited: what was audited as one of them needs no look.
_AUDITED = ("eager", "pickle", "exported", "transformers")


@dataclasses.dataclass(frozen=True)
class SetAside:
    """A version that is outside the audit.

    Attributes:
        version: the version.
        flavour: the flavour's name, or what else puts it there.
        why: the same in a sentence without its full stop.
        since: when it was looked at first.
        new: whether that was now.
    """

    version: Version
    flavour: str
    why: str
    since: datetime.datetime
    new: bool = False


def key_of(version: Version) -> str:
    """Return what a version is remembered by: what its owner can change, and the rules that decide."""
    return digest(
        "kind", RULES, version.name, version.version, version.created, version.source, version.tags.get(RECIPE_TAG, "")
    )


def set_aside(
    versions: Sequence[Version],
    client: MlflowClient,
    results: str,
    *,
    committed: CommittedAudits | None = None,
    keep: bool = True,
) -> tuple[list[Version], list[SetAside]]:
    """Tell versions that are to be audited from those outside the audit, both in order.

    What a service did not tell stays with those to be audited: the audit tells it, or what is in the way.

    Args:
        versions: the versions.
        client: client of their registry.
        results: the results store, which remembers.
        committed: what was audited: no look is needed at a version that was audited as one of torch's.
        keep: False leaves the store as it is.

    Raises:
        InfrastructureError: the results store cannot be read or written.
    """
    kinds = _kinds(results).refresh()
    keys = {version.uri: key_of(version) for version in versions}
    unseen = [
        version for version in versions if kinds.of(keys[version.uri]) is None and not _was_audited(version, committed)
    ]
    found = _look_at_all(unseen, client)
    new = {version.uri: _kind(version, outside) for version, outside in found}
    if keep:
        kinds.remember(new.values())
    inside, aside = [], []
    for version in versions:
        kind = new.get(version.uri) or kinds.of(keys[version.uri])
        if kind is None or not kind.outside:
            inside.append(version)
        else:
            aside.append(SetAside(version, kind.outside, kind.why, kind.decided_at, version.uri in new))
    return inside, aside


def remember(version: Version, outside: Outside, results: str) -> None:
    """Remember what only an audit's process could tell of a version.

    Raises:
        InfrastructureError: the results store cannot be written.
    """
    _kinds(results).refresh().remember([_kind(version, outside)])


def remembered(versions: Iterable[Version], results: str) -> list[SetAside]:
    """Return which of the versions are remembered as outside the audit; nothing is looked at.

    Raises:
        InfrastructureError: the results store cannot be read.
    """
    kinds = _kinds(results).refresh()
    pairs = [(version, kinds.of(key_of(version))) for version in versions]
    return [SetAside(v, kind.outside, kind.why, kind.decided_at) for v, kind in pairs if kind and kind.outside]


def in_words(aside: Sequence[SetAside]) -> str:
    """Return how many there are of each flavour: ``3 versions outside the audit (2 sklearn, 1 xgboost)``."""
    counts = Counter(one.flavour for one in aside)
    each = ", ".join(f"{number} {flavour}" for flavour, number in counts.most_common())
    return f"{plural(len(aside), 'version')} outside the audit ({each})"


def _kinds(results: str) -> Kinds:
    return _kinds_at(ResultsStore(results).place)


@cache
def _kinds_at(place: str) -> Kinds:
    """One index per store and process, of which only what is new is read."""
    return Kinds(ResultsStore(place))


def _kind(version: Version, outside: Outside | None) -> Kind:
    return Kind(
        key=key_of(version),
        model_name=version.name,
        model_version=version.version,
        outside=outside.flavour if outside else "",
        why=with_names(outside.why, version.name, version.version) if outside else "",
        decided_at=datetime.datetime.now(datetime.UTC),
    )


def _was_audited(version: Version, committed: CommittedAudits | None) -> bool:
    """Whether this very version, and no earlier one of its number, was audited as a torch model."""
    audits = committed.of(version.name, version.version) if committed is not None else []
    return any(a.artifact_kind in _AUDITED and a.audited_at.timestamp() * 1000 >= version.created for a in audits)


def _look_at_all(versions: Sequence[Version], client: MlflowClient) -> list[tuple[Version, Outside | None]]:
    """Look at every version; those that a service did not answer for are left out."""
    failures = [0]

    def look(version: Version) -> tuple[Version, Outside | None] | None:
        if failures[0] >= GIVE_UP_AFTER:
            return None
        try:
            found = look_at(version, client)
        except ArtifactError:  # no files, or damaged ones: the audit says what is the matter
            found = None
        except InfrastructureError as error:
            failures[0] += 1
            _log.info("%s could not be looked at: %s", version.label, error)
            return None
        except Exception as error:  # whatever a stranger's files bring about concerns their version alone
            _log.info("%s could not be looked at: %s: %s", version.label, type(error).__name__, error)
            found = None
        failures[0] = 0
        return version, found

    if not versions:
        return []
    with at_home(client), ThreadPoolExecutor(min(AT_ONCE, len(versions)), thread_name_prefix="looking") as pool:
        return [found for found in pool.map(look, versions) if found is not None]
