"""The command that confines one audit: at a level, within limits, seeing only what it needs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.sandbox.bubblewrap import USER_NAME, bubblewrap_command
from flows.sandbox.levels import ENTRY, Level, Variant, spare_uid, variants_of
from flows.sandbox.limits import Limits
from flows.sandbox.needed_paths import needed_paths
from flows.sandbox.specification import specification


@dataclass(frozen=True)
class Confinement:
    """How to start one audit.

    Attributes:
        command: what to put before the program and its arguments.
        home: home and temporary folder as the program sees it.
        user_name: the user's name as the program sees it.
        own_user: it becomes another user, who reads what everybody may read.
    """

    command: tuple[str, ...]
    home: str
    user_name: str
    own_user: bool = False


def confine(
    level: Level,
    limits: Limits,
    *,
    folder: Path,
    readable: Sequence[Path] = (),
    gpu: bool = False,
    own_root: Path | None = None,
    extra: Iterable[str] = (),
) -> Confinement:
    """Return the confinement of one audit.

    Args:
        level: one that this host offers.
        limits: what the audit may use.
        folder: the audit's private folder.
        readable: the snapshot, the recipe and the request.
        gpu: show the GPUs.
        own_root: the folder that holds our three rooms.
        extra: further paths to show read-only.
    """
    variant = _variant_for(level, readable)
    uid = spare_uid() if variant.own_user else None
    before: list[str] = []
    if level is Level.BUBBLEWRAP:
        shown = needed_paths(own_root or ENTRY.parent.parent.parent, gpu=gpu, extra=extra)
        before = bubblewrap_command(
            shutil.which("bwrap") or "bwrap",
            folder=folder,
            readable=[*shown, *readable],
            scratch_bytes=limits.scratch_bytes,
            gpu=gpu,
            own_user=variant.own_user,
            no_nested=variant.no_nested,
        )
    told = specification(limits, unshare=level is Level.NETWORK, namespace=level is not Level.PROCESS, uid=uid, gpu=gpu)
    inside = [sys.executable, "-I", "-S", str(ENTRY), told]
    home = "/tmp" if level is Level.BUBBLEWRAP else str(folder / "home")
    return Confinement((*before, *inside), home, USER_NAME, uid is not None)


def _variant_for(level: Level, readable: Sequence[Path]) -> Variant:
    """Choose the best variant that can read the artifact: another user cannot read files that only root may."""
    variants = variants_of(level)
    for variant in variants:
        if not variant.own_user or all(readable_by_others(path) for path in readable):
            return variant
    return variants[0]


def readable_by_others(path: Path) -> bool:
    """Whether files and folders below ``path`` can be read by everyone; folders above it do not matter."""
    if not path.is_dir():
        return bool(path.stat().st_mode & 0o004)
    if path.stat().st_mode & 0o005 != 0o005:
        return False
    for where, folders, files in os.walk(path):
        for name, needed in [*((name, 0o005) for name in folders), *((name, 0o004) for name in files)]:
            if os.lstat(os.path.join(where, name)).st_mode & needed != needed:
                return False
    return True
