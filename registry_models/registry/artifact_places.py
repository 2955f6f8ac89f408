"""Where a registered version's files are, and the way to them: never by a URI made of the version's name.

MLflow reads ``models:/NAME/VERSION`` as a URL, which drops tabs and line breaks and so names another model. The
registry itself takes any name, so it is asked for the place of the files, and what the version says it was made from
must be in the same place.
"""

from __future__ import annotations

import contextlib
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_databricks_unity_catalog_uri, is_databricks_uri, is_oss_unity_catalog_uri

from audits.errors import ArtifactError, InfrastructureError
from audits.naming import Named, read_reference, visible
from registry_models.registry.logged_models import Origin, origin_of
from registry_models.registry.versions import Version

#: What `urllib.parse` takes out of a URL wherever it stands; and, by WHATWG's rule, what it takes off its ends.
_DROPPED, _STRIPPED = "\t\r\n", "".join(map(chr, range(0x21)))

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_RUN = re.compile(r"runs:/(?P<run>[0-9A-Za-z_-]+)(?:/(?P<path>.+))?", re.DOTALL)
_LOGGED = re.compile(r"models:/(?P<id>m-[0-9a-f]+)(?:/(?P<path>.+))?", re.DOTALL)

#: References that lead to references; nobody has more, and a circle must end.
_FOLLOWED = 20


class Entry(NamedTuple):
    """What a listing of an artifact store says of one file or folder; the size is None where it does not tell."""

    name: str
    size: int | None
    is_folder: bool


@dataclass(frozen=True)
class Artifacts:
    """Files of an artifact store: a repository of MLflow's and a path inside it."""

    repository: ArtifactRepository
    path: str = ""

    @property
    def place(self) -> str:
        """Where they are, for a reader."""
        return "/".join(filter(None, (str(self.repository.artifact_uri).rstrip("/"), self.path)))

    def size(self, depth: int = 4) -> int:
        """Return the bytes that a download would bring, as far as the store lists sizes."""
        return self._size(self.path, depth)

    def _size(self, path: str, depth: int) -> int:
        total = 0
        for entry in self.repository.list_artifacts(path or None) or []:
            if not entry.is_dir:
                total += int(entry.file_size or 0)
            elif depth and entry.path not in (path, "."):
                total += self._size(entry.path, depth - 1)
        return total

    def download(self, target: Path) -> Path:
        """Copy the files into the folder ``target`` and return where they are."""
        return Path(self.repository.download_artifacts(self.path, str(target)))

    def entries(self, folder: str = "") -> list[Entry]:
        """Return what a folder of them holds, by names below their own place; nothing where there is no such folder."""
        found = self.repository.list_artifacts(self._below(folder) or None) or []
        start = f"{self.path}/" if self.path else ""
        named = [Entry(e.path.removeprefix(start), e.file_size, e.is_dir) for e in found if e.path.startswith(start)]
        return [entry for entry in named if entry.name not in ("", ".", folder)]

    def file(self, name: str, target: Path) -> Path:
        """Copy one file into the folder ``target`` and return where it is."""
        return Path(self.repository.download_artifacts(self._below(name), str(target)))

    def local(self, name: str) -> Path | None:
        """Return where one file is on this host's disk; None where the store is elsewhere."""
        inner = getattr(self.repository, "repo", self.repository)  # of runs:/ and models:/
        return Path(inner.artifact_dir, self._below(name)) if isinstance(inner, LocalArtifactRepository) else None

    def _below(self, name: str) -> str:
        return "/".join(filter(None, (self.path, name)))


def version_artifacts(version: Version, client: MlflowClient) -> Artifacts:
    """Return the files of a version, which are in one place whatever says so.

    Raises:
        ArtifactError: the registry and the version's own source disagree about where they are.
        InfrastructureError: the version was replaced by another one of its number.
    """
    if _databricks():
        return _by_name(version, client)
    still_the_same(version, client)
    place = _place(version, client)
    origin = origin_of(client, version)
    _agree(version, place, origin, client)
    return artifacts_at(place, client)


def artifacts_at(place: str, client: MlflowClient) -> Artifacts:
    """Return the files at a place: a path, a URI of a store, ``runs:/RUN/PATH``, or a ``models:/`` reference.

    Raises:
        ArtifactError: the place is one that MLflow would read as another, or no place at all.
    """
    for _ in range(_FOLLOWED):
        if not place.startswith("models:"):
            return _in_store(place, client)
        named, inside = read_inside(place)
        if isinstance(named, str):
            place = str(client.get_logged_model(named).artifact_location)
        elif named is not None and named.alias is not None:
            place = _place(Version.of(client.get_model_version_by_alias(named.name, named.alias)), client)
        elif named is not None:
            place = str(client.get_model_version_download_uri(named.name, str(named.version)))
        else:
            break
        if inside:
            found = artifacts_at(place, client)
            return Artifacts(found.repository, "/".join(filter(None, (found.path, inside))))
    raise ArtifactError(f"{visible(place)!r} leads to no files")


def read_inside(place: str) -> tuple[Named | str | None, str]:
    """Return what a ``models:/`` reference names, a LoggedModel by its id, and the path that follows it."""
    if found := _LOGGED.fullmatch(place.rstrip("/")):
        return found["id"], found["path"] or ""
    first, _, rest = place.removeprefix("models:/").partition("/")
    second, _, inside = rest.partition("/")
    if named := read_reference(f"models:/{first}/{second}"):
        return named, inside.strip("/")
    return read_reference(f"models:/{first}"), rest.strip("/")


@contextlib.contextmanager
def at_home(client: MlflowClient) -> Iterator[None]:
    """Inside the block, MLflow's own code asks the client's server, whatever its global setting is."""
    tracking_uri = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(client.tracking_uri)
        yield
    finally:
        mlflow.set_tracking_uri(tracking_uri)


def still_the_same(version: Version, client: MlflowClient) -> Version:
    """Return the version as it is now.

    Raises:
        ArtifactError: there is no such version any more.
        InfrastructureError: its model was deleted and registered again; the version that has its number now is due.
    """
    now = Version.of(client.get_model_version(version.name, str(version.version)))
    same = (now.name, now.version, now.source, now.created) == (
        version.name, version.version, version.source, version.created,
    )  # fmt: skip
    if not same:
        raise InfrastructureError(f"{version.label} was replaced by another version while it was audited")
    return now


def _databricks() -> bool:
    """Whether the registry gives files out by its own protocol alone, and no place that could be read without it."""
    uri = mlflow.get_registry_uri()
    return any(tell(uri) for tell in (is_databricks_uri, is_databricks_unity_catalog_uri, is_oss_unity_catalog_uri))


def _by_name(version: Version, client: MlflowClient) -> Artifacts:
    read = urllib.parse.urlsplit(version.uri)
    if read.geturl() != version.uri or read.query or read.fragment:
        raise ArtifactError(f"MLflow reads {visible(version.uri)!r} as {visible(_read(version.uri))!r}: refused")
    return Artifacts(get_artifact_repository(version.uri, client.tracking_uri))


def _place(version: Version, client: MlflowClient) -> str:
    return str(client.get_model_version_download_uri(version.name, str(version.version)))


def _agree(version: Version, place: str, origin: Origin, client: MlflowClient) -> None:
    """Refuse a version whose files are not those of what it says it was made from.

    MLflow copies ``a<line break>b`` by the URI ``models:/a<line break>b/1``, and so takes the files of ``ab``.
    """
    for original in origin.copied:
        if not _same_place(_place(original, client), place):
            raise ArtifactError(
                f"{version.label} says that it is a copy of {original.label}, but the registry has its files at "
                f"{visible(place)}, which are another model's: refused. Register it again from its own source"
            )
    if origin.location and not _same_place(origin.location, place):
        raise ArtifactError(
            f"{version.label} says that it was registered from the model {origin.model_id}, but the registry has its "
            f"files at {visible(place)}, which are not that model's: refused. Register it again from its own source"
        )
    if any(character in origin.lost for character in _DROPPED):
        raise ArtifactError(
            f"{version.label} is a copy of {visible(origin.lost)}, a name that MLflow reads as another, and that "
            "version is gone: whose files it has cannot be told. Register it again from its own source"
        )


def _same_place(one: str, other: str) -> bool:
    def plain(place: str) -> str:
        scheme = _SCHEME.match(place)
        local = scheme is None or scheme[1] == "file"
        return (str(local_file_uri_to_path(place)) if local else place).rstrip("/")

    return plain(one) == plain(other)


def _in_store(place: str, client: MlflowClient) -> Artifacts:
    scheme = _SCHEME.match(place)
    if scheme is not None:
        _literal(place, scheme[1].lower())
    home = client.tracking_uri
    if run := _RUN.fullmatch(place):
        return Artifacts(get_artifact_repository(f"runs:/{run['run']}", home), (run["path"] or "").strip("/"))
    try:
        return Artifacts(get_artifact_repository(place, home))
    except MlflowException as error:
        if "Could not find a registered artifact repository" not in str(error):
            raise
        raise ArtifactError(f"{visible(place)!r} is not a place of files: MLflow has no such scheme") from error


def _literal(place: str, scheme: str) -> None:
    """Refuse a URI that is not what a URL's parser makes of it: the files it would fetch are others.

    Raises:
        ArtifactError: a part would be dropped or cut off.
    """
    parsed = urllib.parse.urlsplit(place)
    dropped = any(character in place for character in _DROPPED) or place != place.strip(_STRIPPED)
    query = parsed.query and scheme not in ("http", "https")  # there, a query can be a signature
    if dropped or parsed.fragment or query:
        raise ArtifactError(
            f"the files are at {visible(place)!r}, which MLflow reads as {visible(_read(place))!r}, another place: "
            "refused. Register the version from a path without tabs, line breaks, '?' and '#'"
        )


def _read(place: str) -> str:
    parsed = urllib.parse.urlsplit(place)
    return urllib.parse.urlunsplit(parsed._replace(query="", fragment=""))
