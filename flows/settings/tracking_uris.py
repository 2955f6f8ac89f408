"""The tracking URI as people write it: made absolute, or refused in one sentence before anything is done."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from audits.errors import SettingsError, suggest

#: Schemes of MLflow's own stores; further ones come with plug-ins.
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc", "file")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?!\d)")
_HOST_AND_PORT = re.compile(r"([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*|\[[0-9A-Fa-f:]+\]):(\d+)(/.*)?")


def usable_uri(uri: str) -> str:
    """Return the URI with relative paths made absolute, for whoever goes on elsewhere with it.

    Raises:
        SettingsError: MLflow could do nothing with it; the text says what to write instead.
    """
    if _HOST_AND_PORT.fullmatch(uri):
        raise SettingsError(f"the tracking URI {uri!r} has no scheme: write http://{uri}")
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return uri if uri in _SCHEMES else _folder(uri, uri)
    name = scheme[1].lower()
    kind = name.partition("+")[0]
    if kind == "sqlite":
        return _sqlite(uri)
    if kind == "file":
        return _file(uri)
    if kind in ("http", "https") and not urlsplit(uri).hostname:
        raise SettingsError(f"the tracking URI {uri!r} names no server: write {kind}://HOST:PORT")
    plugged = [entry.name for entry in metadata.entry_points(group="mlflow.tracking_store")]
    if kind not in _SCHEMES and name not in plugged:
        hint = suggest(kind, _SCHEMES) or ": write http://HOST:PORT, sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        raise SettingsError(f"the tracking URI {uri!r} has a scheme that MLflow does not know{hint}")
    return uri


def _sqlite(uri: str) -> str:
    start, slashes, path = uri.partition(":///")
    if not slashes:
        if uri.rstrip("/").endswith(":"):
            return uri  # in memory
        raise SettingsError(f"the tracking URI {uri!r} names no file: write sqlite:///FILE, with three slashes")
    plain, mark, options = path.partition("?")
    if not plain or plain == ":memory:" or plain.startswith("file:"):
        return uri
    return f"{start}:///{os.path.abspath(plain)}{mark}{options}"


def _file(uri: str) -> str:
    rest = uri[len("file:") :]
    if rest.startswith("///") or (rest.startswith("/") and not rest.startswith("//")):
        return uri
    if rest.startswith("//"):
        folder = os.path.abspath(rest[2:])
        raise SettingsError(f"the tracking URI {uri!r} names a host, not a folder: write file://{folder}")
    return Path(_folder(uri, rest)).as_uri()


def _folder(uri: str, path: str) -> str:
    """Return the folder of a file store, absolute."""
    folder = Path(os.path.abspath(path))
    if folder.is_file() or folder.suffix in (".db", ".sqlite", ".sqlite3"):
        raise SettingsError(f"the tracking URI {uri!r} is a file: for a database write sqlite:///{folder}")
    return str(folder)
