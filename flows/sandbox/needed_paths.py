"""Which of the host's files an audit needs in order to import torch and our own rooms: these, and no home directory."""

from __future__ import annotations

import contextlib
import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

#: Our packages, in a checkout or installed.
ROOMS = ("audits", "flows", "registry_models")

#: What of an installation's prefix is the interpreter; a prefix may be a user's project or home.
_OF_PREFIX = ("bin", "lib", "lib64", "pyvenv.cfg")

#: Where the dynamic linker looks and what names alternatives; nothing else of /etc.
_OF_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "OpenCL")

_STORES = ("/nix/store", "/gnu/store")


def needed_paths(own_root: Path, *, gpu: bool, extra: Iterable[str] = ()) -> list[Path]:
    """Return the paths to show read-only, each outermost first and none inside another.

    Args:
        own_root: the folder that holds our three rooms.
        gpu: also what CUDA and ROCm read.
        extra: further paths, from the settings.
    """
    wanted: list[Path] = [Path("/usr"), *(Path("/etc") / name for name in _OF_ETC), *map(Path, _STORES)]
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.realpath(sys.base_prefix)}:
        wanted += [Path(prefix) / name for name in _OF_PREFIX]
    wanted += _links_of(Path(sys.executable))
    libraries = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    wanted += [*libraries, *map(Path, map(os.path.realpath, libraries))]
    for library in {*libraries[2:], *map(Path, site.getsitepackages())}:
        for folder in _editable(library):
            wanted += _importable(folder)
    wanted += [own_root / name for name in ROOMS]
    wanted.append(Path(__file__).resolve().parent / "entry.py")
    wanted += [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part.startswith("/")]
    wanted += [Path("/sys/devices/system/cpu"), Path("/sys/devices/system/node")]
    if gpu:
        wanted += [Path("/sys"), Path("/opt/rocm"), Path("/etc/nvidia"), Path("/etc/vulkan")]
    wanted += [Path(part).expanduser().absolute() for part in extra]
    return _outermost(path for path in wanted if path.exists() and path != Path("/"))


def _links_of(path: Path) -> list[Path]:
    found = [path]
    with contextlib.suppress(OSError):  # a folder on the way that this user may not look into
        while path.is_symlink() and len(found) < 10:
            path = path.parent / path.readlink()
            found.append(Path(os.path.normpath(path)))
    return found


def _editable(library: Path) -> list[Path]:
    """Folders that ``.pth`` files put on the import path: packages installed in editable mode."""
    folders = []
    for file in sorted(library.glob("*.pth")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        folders += [Path(line) for line in lines if line.startswith("/") and Path(line).is_dir()]
    return folders


def _importable(folder: Path) -> list[Path]:
    """What of a project's folder can be imported; its other files, ``.env`` among them, stay out."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".py", ".so") or (path.is_dir() and (path / "__init__.py").is_file())
    ]


def _outermost(paths: Iterable[Path]) -> list[Path]:
    kept: list[Path] = []
    for path in sorted(set(paths), key=lambda path: len(path.parts)):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept
