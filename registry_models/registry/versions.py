"""Registered versions: references as people write them, and which versions exist."""

from __future__ import annotations

import contextlib
import glob
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError, InfrastructureError, suggest
from audits.globs import matches, matching
from audits.naming import label_of, no_reference, read_reference, reference_to, visible
from registry_models.registry.troubles import trouble

#: Tags that gradaudit reads or writes on a version.
RECIPE_TAG = "audit.recipe"
OUTCOME_TAG = "audit.outcome"
SUBJECT_TAG = "audit.subject"

#: What a registry says of a version's registration.
READY, PENDING, FAILED = "READY", "PENDING_REGISTRATION", "FAILED_REGISTRATION"

#: Seconds that an audit waits for a registration to end, and between looks at it.
REGISTRATION_SECONDS, _LOOK = 60.0, 1.0

#: Largest version number that MLflow's databases can hold.
LARGEST_VERSION = 2**31 - 1


class UnreadyError(ArtifactError):
    """A version whose registration has not ended, or has failed: it is not audited and not marked."""


@dataclass(frozen=True)
class VersionReference:
    """``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> VersionReference:
        """Read a reference.

        Raises:
            ArtifactError: the text is none; it says what one looks like.
        """
        named = read_reference(text)
        if named is None:
            raise ArtifactError(no_reference(text))
        return cls(named.name, named.version, named.alias)

    def __str__(self) -> str:
        """Return the reference as it is written, for a reader."""
        return visible(f"models:/{self.name}" + (f"@{self.alias}" if self.alias is not None else f"/{self.version}"))

    def resolve(self, client: MlflowClient) -> Version:
        """Ask the registry.

        Raises:
            ArtifactError: there is no such version, or the registry names another one in its answer.
            InfrastructureError: the registry does not answer.
        """
        if self.version is not None and not 1 <= self.version <= LARGEST_VERSION:
            raise ArtifactError(f"{self}: there is no such version{_what_there_is(self, client)}")
        try:
            with registry_errors(str(self)):
                if self.alias is not None:
                    found = Version.of(client.get_model_version_by_alias(self.name, self.alias))
                else:
                    found = Version.of(client.get_model_version(self.name, str(self.version)))
        except ArtifactError as error:
            raise ArtifactError(f"{f'{error}'.rstrip('.')}{_what_there_is(self, client)}") from error
        if found.name != self.name or self.version not in (None, found.version):
            raise ArtifactError(f"{self}: the registry answers with another version, {visible(found.uri)}: refused")
        return found


@dataclass(frozen=True)
class Version:
    """One registered version, as much of it as an audit needs."""

    name: str
    version: int
    source: str
    created: int
    run_id: str | None
    description: str
    tags: dict[str, str]
    status: str = READY
    status_message: str = ""

    @classmethod
    def of(cls, found: ModelVersion) -> Version:
        """Read MLflow's entity; its ``version`` is an int over SQLite and a string over REST."""
        return cls(
            name=found.name,
            version=int(found.version),
            source=found.source or "",
            created=int(found.creation_timestamp or 0),
            run_id=found.run_id or None,
            description=found.description or "",
            tags=dict(found.tags or {}),
            status=str(found.status or READY),
            status_message=found.status_message or "",
        )

    @property
    def unready(self) -> str:
        """Why there is nothing to audit yet or ever, as a sentence; empty for a version that is registered."""
        why = f" ({visible(self.status_message)})" if self.status_message else ""
        if self.status == PENDING:
            return f"{self.label} is still being registered{why}: it is audited when its files are there"
        if self.status == FAILED:
            return f"the registration of {self.label} failed{why}: it has no files to audit; register it again"
        return ""

    @property
    def uri(self) -> str:
        """``models:/NAME/VERSION``."""
        return reference_to(self.name, self.version)

    @property
    def label(self) -> str:
        """``NAME vVERSION``."""
        return label_of(self.name, self.version)


def registered(version: Version, client: MlflowClient, *, seconds: float = REGISTRATION_SECONDS) -> Version:
    """Return the version when its registration has ended, which is awaited for a while.

    Raises:
        ArtifactError: it failed, or has not ended.
        InfrastructureError: the registry does not answer.
    """
    deadline = time.monotonic() + seconds
    while version.status == PENDING and time.monotonic() < deadline:
        time.sleep(min(_LOOK, seconds))
        version = VersionReference(version.name, version.version).resolve(client)
    if version.unready:
        raise UnreadyError(version.unready)
    return version


def _what_there_is(reference: VersionReference, client: MlflowClient) -> str:
    """The model's versions and aliases, or the nearest names of other models; empty where nothing is near."""
    try:
        names = {str(model.name) for model in client.search_registered_models(max_results=1000)}
        if reference.name not in names:
            return suggest(reference.name, names)
        model = client.get_registered_model(reference.name)
        versions = sorted(v.version for v in list_versions(client, [glob.escape(reference.name)]))
    except (MlflowException, InfrastructureError):
        return ""
    aliases = "".join(f", @{alias}" for alias in sorted(model.aliases or {}))
    return f"; it has versions {', '.join(str(v) for v in versions[-10:]) or 'none'}{aliases}"


def refuse_models(globs: Sequence[str], client: MlflowClient) -> None:
    """Refuse names and globs that no registered model has; an empty registry refuses none.

    Raises:
        ArtifactError: the text names the glob and the nearest model.
        InfrastructureError: the registry does not answer.
    """
    if not globs:
        return
    names: list[str] = []
    token = None
    with registry_errors("the registry"):
        while True:
            page = client.search_registered_models(max_results=1000, page_token=token)
            names += [model.name for model in page]
            token = page.token
            if not token:
                break
    for glob_ in globs if names else ():
        if not matching(names, glob_):
            raise ArtifactError(f"no registered model matches {glob_!r}{suggest(glob_, names) or _some(names)}")


def _some(names: Sequence[str]) -> str:
    return f"; there are {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"


def list_versions(client: MlflowClient, globs: Sequence[str] = ()) -> list[Version]:
    """Return every version whose model's name matches a glob (all without globs), newest first.

    Raises:
        InfrastructureError: the registry does not answer.
    """
    found: list[Version] = []
    token = None
    with registry_errors("the registry"):
        while True:
            page = client.search_model_versions(
                max_results=1000, order_by=["creation_timestamp DESC"], page_token=token
            )
            found += [Version.of(v) for v in page if not globs or matches(v.name, globs)]
            token = page.token
            if not token:
                return found


def answers(client: MlflowClient) -> bool:
    """Whether the registry answers at all."""
    try:
        client.search_registered_models(max_results=1)
    except Exception:  # whatever its client raises, it has not answered
        return False
    return True


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """Return the experiment's id, creating it if need be; two creators at once both get it.

    Raises:
        InfrastructureError: MLflow does not answer, or forbids it.
    """
    with registry_errors(f"the experiment {name!r}", "create experiments"):
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name))
            except MlflowException:
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


@contextlib.contextmanager
def registry_errors(what: str, doing: str = "") -> Iterator[None]:
    """Tell a caller's mistake from what is in the way, and both from a registry that does not answer.

    Args:
        what: what is asked about.
        doing: what a user needs the right to.

    Raises:
        ArtifactError: MLflow says that there is no such thing.
        SetupError: a login, a right, an address, a certificate, a disk, a package; the text has the cure.
        InfrastructureError: anything else MLflow, the network or the disk says.
    """
    try:
        yield
    except (MlflowException, OSError, ImportError) as error:
        raise trouble(error, what, doing) from error
