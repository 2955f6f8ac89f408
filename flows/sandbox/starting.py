"""The start of an audit's process: confined, importing what every audit needs, knowing nothing yet of what it audits.

It reads its request from a pipe, once it has imported torch. Until then nothing of a model is in it; it ends by itself
when its parent closes the pipe without a request, and is killed by the kernel when its parent dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from audits.errors import InfrastructureError
from flows.processes import die_with_parent
from flows.sandbox.bubblewrap import gpu_nodes
from flows.sandbox.confinement import Confinement, confine
from flows.sandbox.levels import Level
from flows.sandbox.limits import Limits
from flows.sandbox.memory_group import MemoryGroup, memory_group
from flows.sandbox.process_tree import ProcessTree
from flows.sandbox.removing import remove_tree

#: Variables a child may see; everything else, credentials above all, stays out.
_PASSED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


@dataclass(frozen=True)
class Conditions:
    """What a process is started with and cannot be changed afterwards: one started for others fits these alone.

    Attributes:
        level: how it is confined; one that this host offers.
        limits: what it may use.
        gpu: it sees the GPUs.
        extra: further paths that it may read.
        passed: the variables it sees of its parent's.
    """

    level: Level
    limits: Limits
    gpu: bool
    extra: tuple[str, ...]
    passed: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, level: Level, limits: Limits, *, device: str, extra: Iterable[str] = ()) -> Conditions:
        """Return the present conditions for audits on ``device``: anything but ``cpu`` shows the GPUs there are."""
        passed = tuple((name, os.environ[name]) for name in _PASSED if name in os.environ)
        return cls(level, limits, device != "cpu" and bool(gpu_nodes()), tuple(extra), passed)


@dataclass(frozen=True)
class StartedChild:
    """A process that waits for its request.

    Attributes:
        conditions: what it was started with.
        folder: private folder of the process; its home is in it.
        process: the first process of its tree.
        tree: all of them.
        answers: the end of the pipe that its answer comes out of.
        group: the memory group around it, if there is one.
        own_user: it runs as another user, who reads what everybody may read.
    """

    conditions: Conditions
    folder: Path
    process: subprocess.Popen[bytes]
    tree: ProcessTree
    answers: IO[bytes]
    group: MemoryGroup | None
    own_user: bool
    _answer_end: int

    def tell(self, request: Mapping[str, Any]) -> None:
        """Send the request. A thread writes it: a process that hangs before it reads is a matter of its time limit."""
        text = json.dumps({**request, "answer": self._answer_end}).encode()
        threading.Thread(target=_write, args=(self.process.stdin, text), daemon=True).start()


@contextlib.contextmanager
def starting(conditions: Conditions, folder: Path, readable: Sequence[Path]) -> Iterator[StartedChild]:
    """Start ``registry_models.child``, confined; at the end of the block all it started is killed.

    It has a session of its own, a private home and temporary folder, no variable but a few harmless ones, and no
    descriptor of its parent's but two pipes' ends.

    Args:
        conditions: level, limits, what it may see.
        folder: its private folder.
        readable: files and folders that it may read: the artifact's, or an empty folder where they will lie.

    Raises:
        InfrastructureError: the process cannot be started.
    """
    reading, writing = os.pipe()
    with (
        os.fdopen(reading, "rb", buffering=0) as answers,
        os.fdopen(writing, "wb", buffering=0) as its_end,
        memory_group(conditions.limits) as group,
    ):
        confinement = confine(
            conditions.level,
            conditions.limits,
            folder=folder,
            readable=readable,
            gpu=conditions.gpu,
            own_root=own_root(),
            extra=conditions.extra,
        )
        (folder / "home").mkdir()
        process = _process(confinement, conditions, folder / "home", its_end, group)
        tree = ProcessTree(process.pid)
        try:
            own_user = confinement.own_user
            yield StartedChild(conditions, folder, process, tree, answers, group, own_user, writing)
        finally:
            tree.end()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # a request that nobody read
                    pipe.close()  # type: ignore[union-attr]
            remove_tree(folder / "home")


def _process(
    confinement: Confinement, conditions: Conditions, home: Path, its_end: IO[bytes], group: MemoryGroup | None
) -> subprocess.Popen[bytes]:
    """Start the process, which then holds the only writing end of the pipe."""
    parent = os.getpid()

    def before() -> None:
        die_with_parent(parent)
        if group is not None:
            group.enter()

    try:
        return subprocess.Popen(
            [*confinement.command, sys.executable, "-m", "registry_models.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(confinement, conditions),
            cwd=home,
            close_fds=True,
            pass_fds=(its_end.fileno(),),
            start_new_session=True,
            preexec_fn=before,
            bufsize=0,
        )
    except OSError as error:
        raise InfrastructureError(f"an audit's process could not be started: {error}") from error
    finally:
        its_end.close()


def _environment(confinement: Confinement, conditions: Conditions) -> dict[str, str]:
    return dict(conditions.passed) | {
        "HOME": confinement.home,
        "TMPDIR": confinement.home,
        "USER": confinement.user_name,
        "LOGNAME": confinement.user_name,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        # Threads that spin while they wait starve every other audit on the machine: two audits of a small model on
        # two cores took 75 s each, with this 2.7 s.
        "OMP_WAIT_POLICY": "PASSIVE",
        # cuBLAS has deterministic algorithms only with a workspace of a fixed size, told before it starts.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # Torch asks for huge pages: a gradient check of 124 M parameters takes 11.2 s instead of 13.0 s.
        "THP_MEM_ALLOC_ENABLE": "1",
        "PYTHONPATH": str(own_root()),
        "MPLBACKEND": "Agg",
    }


def _write(pipe: IO[bytes], text: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # it has ended, or was ended: its exit code says so
        while text:
            text = text[pipe.write(text) or 0 :]
        pipe.close()


def own_root() -> Path:
    """The folder that holds the three rooms, so that the child finds them wherever they are installed."""
    return Path(__file__).resolve().parents[2]
