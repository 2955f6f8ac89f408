"""First program inside a confined process: gives up what it has, then becomes the program it was asked to run.

Started by path as ``python -I -S entry.py SPECIFICATION PROGRAM ARGUMENT...``. Knows only the standard library: what
it imports must cost nothing and work before anything of an artifact is on the import path. The order matters: unshare,
limit, filter, change the user, execute.

In a process namespace of its own it is the first process and stays it: the kernel spares a first process the signals
that it does not handle, SIGXCPU among them, so the program runs as its child. It is limited and filtered as the program
is, and no process of the program's user can look into it.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import select
import signal
import sys
from typing import Any

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_REC_PRIVATE, _MS_NOSUID_NODEV_NOEXEC = 0x4000 | 0x40000, 2 | 4 | 8
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION = 0x20080522
_NOBODY = 65534


def main(arguments: list[str]) -> int:
    """Confine this process as the specification says and run the program; returns only what a waiting parent must."""
    specification, program = json.loads(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if specification.get("unshare"):
        status = _unshare(libc)
        if status is not None:
            return status
    _limit(specification["limits"])
    if sys.platform == "linux":
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        _filter(libc, specification.get("filter"))
        if os.getpid() == 1:
            # Nobody's memory but its own; and a process that starts others as root stays root itself, without its
            # powers, or the end of the one that started it would not reach it.
            _checked(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "undumpable")
            _checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "end with the parent")
            if _forsaken():
                return 1
            pid = os.fork()
            if pid:
                _drop_capabilities(libc)
                return _wait(pid)
    uid = specification.get("uid")
    if uid is not None:
        _drop_bounding_set(libc)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    os.execv(program[0], program)
    return 0  # pragma: no cover


def _forsaken() -> bool:
    """Whether the one that was to send the request died before the kernel was told to end this process with it."""
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    return any(event & select.POLLHUP and not event & select.POLLIN for _, event in waiting.poll(0))


def _wait(program: int) -> int:
    """Take ended processes that nobody else waits for, until the program's; return its exit code, as a shell has it.

    With this process the kernel ends everything in its namespace.
    """
    while True:
        pid, status = os.wait()
        if pid == program:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _drop_capabilities(libc: Any) -> None:
    """Give up every capability: ``capset`` with the header of its third version and three empty sets of 64 bits."""
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _checked(libc.capset(ctypes.byref(header), ctypes.byref(none)), "capset")


def _drop_bounding_set(libc: Any) -> None:
    """Give up every capability that a file could bring back; beyond the last one the kernel answers EINVAL."""
    number = 0
    while libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1


def _unshare(libc: Any) -> int | None:
    """Enter namespaces of our own. Returns None in the first process inside, an exit code in the one that waited."""
    uid, gid = os.getuid(), os.getgid()
    flags = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWUTS | _CLONE_NEWNS
    _checked(libc.unshare(flags), "unshare")
    _write("/proc/self/setgroups", "deny")
    # No root inside: the capabilities that the new namespace brings are then lost when the program is executed.
    _write("/proc/self/uid_map", f"{_NOBODY} {uid} 1")
    _write("/proc/self/gid_map", f"{_NOBODY} {gid} 1")
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    os.setsid()
    _checked(libc.mount(None, b"/", None, _MS_REC_PRIVATE, None), "mount /")
    # The host's /proc would show the parent, and to the same user the parent's environment.
    _checked(libc.mount(b"proc", b"/proc", b"proc", _MS_NOSUID_NODEV_NOEXEC, None), "mount /proc")
    return None


def _write(path: str, text: str) -> None:
    with open(path, "w") as stream:
        stream.write(text)


def _limit(limits: dict[str, int]) -> None:
    wanted = {"CORE": (0, 0), "FSIZE": (limits["file"], limits["file"]), "NPROC": (limits["tasks"], limits["tasks"])}
    # Buffers of sockets and pipes are the kernel's memory, up to 0.4 MB each, and no process is seen to hold them.
    wanted["NOFILE"] = (limits["descriptors"], limits["descriptors"])
    # SIGXCPU at the first bound tells what happened, SIGKILL at the second needs no consent.
    wanted["CPU"] = (limits["cpu"], limits["cpu"] + 5)
    for name, bounds in wanted.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        soft, most = (bound if hard == resource.RLIM_INFINITY else min(bound, hard) for bound in bounds)
        resource.setrlimit(which, (soft, most))


class _Program(ctypes.Structure):
    """The kernel's ``struct sock_fprog``."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _filter(libc: Any, encoded: str | None) -> None:
    """Install a seccomp filter; a kernel built without seccomp leaves the process as it is."""
    if not encoded:
        return
    instructions = base64.b64decode(encoded)
    program = _Program(len(instructions) // 8, instructions)
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
