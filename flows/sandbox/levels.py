"""The levels of isolation, and which of them this host offers: each is tried before it is trusted."""

from __future__ import annotations

import enum
import importlib.util
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from audits.errors import SettingsError
from flows.sandbox.bubblewrap import bubblewrap_command
from flows.sandbox.limits import Limits
from flows.sandbox.needed_paths import needed_paths
from flows.sandbox.specification import specification

_log = logging.getLogger(__name__)

#: A trial takes 0.1 s; on a machine with every core busy, a few seconds.
_TRIAL_LIMITS = Limits(seconds=30.0, memory_bytes=2**30, file_bytes=2**20, scratch_bytes=2**20)

#: First of the user ids that audits started by root run as: beyond those that systems and subuid ranges give out.
_FIRST_UID, _UIDS = 0x60000000, 0x10000000
_NOBODY = 65534

ENTRY = Path(__file__).resolve().parent / "entry.py"

_CURE = (
    "install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap) and allow it to "
    "create namespaces (in a container: run it with user namespaces enabled), or set GRADAUDIT_ISOLATION=auto to "
    "accept what this host offers"
)


class Level(enum.StrEnum):
    """How an audit's process is confined, strongest first; docs/explanation/security.md says what each guarantees."""

    BUBBLEWRAP = "bubblewrap"
    NETWORK = "network"
    PROCESS = "process"


#: What a model's code can do at a level, for a reader of the settings.
NOT_GIVEN = {
    Level.BUBBLEWRAP: "a model's code reaches no file, process or network of this host; the kernel's own faults remain",
    Level.NETWORK: "a model's code has no network, but can read and change this user's files",
    Level.PROCESS: "a model's code can read and change this user's files, call other machines, and read the memory of "
    "this user's other processes",
}


@dataclass(frozen=True)
class Variant:
    """One way of reaching a level on this host.

    Attributes:
        name: for logs.
        own_user: root changes to a user id of its own; no user namespace.
        no_nested: bubblewrap forbids further user namespaces.
    """

    name: str
    own_user: bool = False
    no_nested: bool = False


_WITH_BUBBLEWRAP = (
    Variant("own user", own_user=True),
    Variant("user namespace, none inside", no_nested=True),
    Variant("user namespace"),
)
_WITHOUT = (Variant("user namespace"),)


def reached_level(setting: str) -> Level:
    """Return the level that the setting reaches on this host.

    Args:
        setting: ``auto`` (the best there is), ``required`` (bubblewrap or nothing), or a level's name (exactly that).

    Raises:
        SettingsError: the host does not offer what is asked for; the text names the cure.
    """
    if setting == "auto":
        return next(level for level in Level if variants_of(level))
    wanted = Level.BUBBLEWRAP if setting == "required" else Level(setting)
    if not variants_of(wanted):
        raise SettingsError(
            f"GRADAUDIT_ISOLATION={setting}: this host does not offer {wanted} ({why_not(wanted)}), and no model's "
            f"code is run below it: {_CURE}"
        )
    return wanted


@cache
def variants_of(level: Level) -> tuple[Variant, ...]:
    """Return the ways to ``level`` that work here, best first; empty when there is none. Tried once a process."""
    return tuple(variant for variant, trouble in _trials(level) if not trouble)


def why_not(level: Level) -> str:
    """Return, in one line, why ``level`` does not work here."""
    return next((trouble for _, trouble in _trials(level) if trouble), "it works")


@cache
def _trials(level: Level) -> tuple[tuple[Variant, str], ...]:
    if level is Level.PROCESS:
        return ((Variant("plain"), ""),)
    if not sys.platform.startswith("linux"):
        return ((Variant("none"), f"it needs Linux, this is {sys.platform}"),)
    if level is Level.BUBBLEWRAP and shutil.which("bwrap") is None:
        return ((Variant("none"), "there is no bwrap"),)
    variants = _WITH_BUBBLEWRAP if level is Level.BUBBLEWRAP else _WITHOUT
    tried = []
    for variant in variants:
        if variant.own_user and (os.geteuid() != 0 or spare_uid() is None):
            continue
        trouble = _trial(level, variant)
        _log.debug("%s (%s): %s", level, variant.name, trouble or "works")
        tried.append((variant, trouble))
    return tuple(tried)


def _trial(level: Level, variant: Variant) -> str:
    """Start the interpreter confined and open what an audit needs; return what went wrong, or an empty text."""
    own_root = ENTRY.parent.parent.parent
    opened = [str(own_root / "registry_models" / "child" / "__main__.py")]
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        opened.append(torch.origin)
    uid = spare_uid() if variant.own_user else None
    told = specification(_TRIAL_LIMITS, unshare=level is Level.NETWORK, namespace=level is not Level.PROCESS, uid=uid)
    inside = [sys.executable, "-I", "-S", str(ENTRY), told]
    inside += [sys.executable, "-I", "-S", "-c", "import sys; [open(name).close() for name in sys.argv[1:]]", *opened]
    with tempfile.TemporaryDirectory(prefix="gradaudit-") as temporary:
        command = []
        if level is Level.BUBBLEWRAP:
            command = bubblewrap_command(
                shutil.which("bwrap") or "bwrap",
                folder=Path(temporary),
                readable=needed_paths(own_root, gpu=False),
                scratch_bytes=_TRIAL_LIMITS.scratch_bytes,
                gpu=False,
                own_user=variant.own_user,
                no_nested=variant.no_nested,
            )
        try:
            done = subprocess.run(
                [*command, *inside],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TRIAL_LIMITS.seconds,
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{type(error).__name__}: {error}"
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def spare_uid() -> int | None:
    """Return a user id that nobody else has, or None where there is no way to one.

    Each audit its own, so that the kernel's count of processes per user is a count per audit. In a container with few
    user ids, ``nobody``'s is shared.
    """
    for candidate in (_FIRST_UID + secrets.randbelow(_UIDS), _NOBODY):
        if _mapped("uid", candidate) and _mapped("gid", candidate):
            return candidate
    return None


def _mapped(kind: str, number: int) -> bool:
    try:
        lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
    except OSError:
        return False
    ranges = [[int(part) for part in line.split()] for line in lines]
    return any(first <= number < first + count for first, _, count in ranges)
