"""Which device an audit runs on, how much memory it has, and the lock that gives it to one audit at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import threading
from collections.abc import Iterator
from functools import cache

from flows.choosing.due_keys import driver_version
from flows.choosing.sweeping import state_folder, waiting_for
from flows.settings.environment import GradauditSettings, visible_gpus

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU of this host.

    Attributes:
        uuid: its own id, the same whatever ``CUDA_VISIBLE_DEVICES`` calls it.
        memory_bytes: its memory; None where nothing tells.
    """

    uuid: str
    memory_bytes: int | None = None


def chosen_gpu(device: str) -> Gpu | None:
    """Return the GPU behind ``auto``, ``cuda`` or ``cuda:N``; None when the audit runs on the CPU or elsewhere."""
    if device != "auto" and not device.startswith("cuda"):
        return None
    gpus, visible = host_gpus(), visible_gpus()
    if visible is None:
        visible = [str(index) for index in range(len(gpus))]
    position = int(device.partition(":")[2] or 0) if device.startswith("cuda") else 0
    if position >= len(visible):
        return None if device == "auto" else Gpu(f"cuda-{position}")
    entry = visible[position]
    if entry.isdigit() and int(entry) < len(gpus):
        return gpus[int(entry)]
    return next((gpu for gpu in gpus if gpu.uuid.startswith(entry)), Gpu(entry))


@cache
def host_gpus() -> tuple[Gpu, ...]:
    """Return this host's GPUs by index, as the driver's own tool lists them."""
    if not driver_version():
        return ()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
        return tuple(parsed(text))
    return ()


def parsed(listing: str) -> list[Gpu]:
    """Read the tool's lines, ``index, uuid, MiB``, in the order of the indices."""
    found: dict[int, Gpu] = {}
    for line in listing.splitlines():
        index, uuid, memory = (part.strip() for part in line.split(","))
        found[int(index)] = Gpu(uuid, int(memory) * _MIB if memory.isdigit() else None)
    return [gpu for _, gpu in sorted(found.items())]


@contextlib.contextmanager
def held(device: str, settings: GradauditSettings, stopping: threading.Event) -> Iterator[None]:
    """Hold the device's GPU against every other audit on this host; on the CPU nothing is held.

    Who waits next holds a turnstile, so that a long sweep, which would take the lock again at once, lets a version
    that was just registered go first.

    Raises:
        InfrastructureError: the folder for locks cannot be used.
    """
    gpu = chosen_gpu(device)
    if gpu is None:
        yield
        return
    folder = state_folder(settings)
    name = "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in gpu.uuid)
    with contextlib.ExitStack() as stack:
        with waiting_for(folder / f"gpu-{name}.next.lock", stopping):
            stack.enter_context(waiting_for(folder / f"gpu-{name}.lock", stopping))
        yield
