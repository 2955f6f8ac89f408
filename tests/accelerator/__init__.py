"""A second device for tests, on every machine: the CPU under another name, whose tensors never mix with the CPU's.

`register` builds the extension once per environment (a C++ compiler is needed, about half a minute) and makes
``torch.device(NAME)`` work in this process: factories, operators, autograd, autocast, generators, `Module.to`. It has
to be called before the first backward of a process, as torch starts its threads for devices then and never again; the
tests of this folder therefore run in a process of their own (see ``conftest.py``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import types
from pathlib import Path

import torch
from filelock import FileLock

from tests.accelerator.as_cuda import install

#: What ``tensor.device.type`` says.
NAME = "emulated"

_kept: list[torch.library.Library] = []

_SOURCE = Path(__file__).with_name("device.cpp")
_TORCH = Path(torch.__file__).parent


class NoCompilerError(Exception):
    """The extension cannot be built here."""


@functools.cache
def register() -> torch.device:
    """Build the extension where it is not built yet, load it, and return the device.

    Raises:
        NoCompilerError: there is no C++ compiler, or it cannot build the extension; the text says which.
    """
    torch.ops.load_library(str(built()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _kept.append(install())
    return torch.device(NAME, 0)


def built() -> Path:
    """Return the extension, compiled for this source, torch and Python; beside this file where it was put there.

    Raises:
        NoCompilerError: as `register`.
    """
    beside = Path(__file__).with_name("device.so")
    if beside.exists():
        return beside
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("the emulated device needs a C++ compiler: none of $CXX, g++, clang++ is here")
    key = hashlib.sha256(
        b"\0".join((_SOURCE.read_bytes(), torch.__version__.encode(), sys.version.encode(), str(_TORCH).encode()))
    ).hexdigest()[:16]
    folder = _cache()
    target = folder / f"device-{key}.so"
    with FileLock(folder / f"{key}.lock"):
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")
            done = subprocess.run([*_command(compiler), "-o", str(part)], capture_output=True, text=True)
            if done.returncode:
                raise NoCompilerError(f"{compiler} cannot build the emulated device:\n{done.stderr[-2000:]}")
            part.rename(target)
    return target


def _cache() -> Path:
    """Return a folder that lasts as long as the environment does, or the user's cache where that is not writable."""
    for root in (Path(sys.prefix), Path.home() / ".cache", Path(tempfile.gettempdir())):
        folder = root / "gradaudit-emulated-device"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise NoCompilerError("no folder to keep the emulated device in is writable")


def _command(compiler: str) -> list[str]:
    libraries = _TORCH / "lib"
    return [
        compiler, "-O1", "-shared", "-fPIC", "-std=c++20", "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-I{_TORCH / 'include'}", f"-I{_TORCH / 'include/torch/csrc/api/include'}",
        f"-I{sysconfig.get_paths()['include']}",
        str(_SOURCE), f"-L{libraries}", "-lc10", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip


class _Current(contextlib.nullcontext[None]):
    """The context manager that torch's own modules have; there is one device, so it has nothing to do."""

    def __init__(self, device: object) -> None:
        super().__init__()


def _module() -> types.ModuleType:
    """Return ``torch.<NAME>``: what torch and its users ask a device's module for."""
    native = torch.ops.emulated_device
    module = types.ModuleType(f"torch.{NAME}")

    def get_rng_state(device: object = None) -> torch.Tensor:
        return native.get_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        native.set_state(state)

    def manual_seed_all(seed: int) -> None:
        native.manual_seed(int(seed))

    members = {
        "device": _Current,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "memory_allocated": lambda device=None: native.memory_allocated(),
        "max_memory_allocated": lambda device=None: native.max_memory_allocated(),
        "reset_peak_memory_stats": lambda device=None: native.reset_peak_memory_stats(),
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [native.get_state()],
        "set_rng_state_all": lambda states: native.set_state(next(iter(states))),
        "manual_seed": manual_seed_all,
        "manual_seed_all": manual_seed_all,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "_is_in_bad_fork": lambda: False,
        "_initialized": True,
        "_lazy_init": lambda: None,
    }
    vars(module).update(members)
    return module
