"""A seccomp filter: system calls that an audit never needs and that widen what a hostile one could try.

It refuses (EPERM) new namespaces and mounts, which root's own sandbox would otherwise allow to try; tracing; the
kernel's keyrings, which no namespace separates; bpf, performance counters and io_uring, where kernels' privilege
escalations live; and memory that no process holds (memfd, System V segments, semaphores and queues), which polling of
resident memory does not see. ``clone3`` hides its flags from a filter: it answers ENOSYS, so that the C library falls
back to ``clone``.
"""

from __future__ import annotations

import base64
import errno
import platform
import struct
import sys

#: Numbers of the kernel's tables (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
_NUMBERS = {
    "x86_64": {
        "audit_arch": 0xC000003E,
        "refused": {
            "ptrace": 101, "syslog": 103, "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166,
            "swapon": 167, "reboot": 169, "init_module": 175, "delete_module": 176, "kexec_load": 246, "add_key": 248,
            "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308,
            "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
            "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430,
            "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
        },
        "memory": {"shmget": 29, "semget": 64, "msgget": 68, "memfd_create": 319, "memfd_secret": 447},
        "clone": 56,
        "clone3": 435,
    },
    "aarch64": {
        "audit_arch": 0xC00000B7,
        "refused": {
            "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "unshare": 97, "kexec_load": 104,
            "init_module": 105, "delete_module": 106, "syslog": 116, "ptrace": 117, "reboot": 142, "add_key": 217,
            "request_key": 218, "keyctl": 219, "swapon": 224, "perf_event_open": 241, "setns": 268,
            "finit_module": 273, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294, "io_uring_setup": 425,
            "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430,
            "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
        },
        "memory": {"msgget": 186, "semget": 190, "shmget": 194, "memfd_create": 279, "memfd_secret": 447},
        "clone": 220,
        "clone3": 435,
    },
}  # fmt: skip

#: CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}.
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
#: Calls of x86-64's 32-bit-pointer interface carry this bit.
_X32_BIT = 0x40000000


def filter_program(*, gpu: bool) -> str | None:
    """Return the filter as base64 of the kernel's ``struct sock_filter`` array, or None where it is not known.

    Args:
        gpu: leave memory that no process holds allowed: the drivers' libraries may want it.
    """
    known = _NUMBERS.get(platform.machine())
    if known is None or sys.platform != "linux":
        return None
    refused = sorted(known["refused"].values())  # type: ignore[attr-defined]
    if not gpu:
        refused += sorted(known["memory"].values())  # type: ignore[attr-defined]
    code = [
        _instruction(_LOAD, _ARCH_AT),
        _instruction(_EQUAL, int(known["audit_arch"]), 1, 0),  # type: ignore[call-overload]
        _instruction(_RETURN, _ERRNO | errno.EPERM),
        _instruction(_LOAD, _NUMBER_AT),
        _instruction(_AT_LEAST, _X32_BIT, 0, 1),
        _instruction(_RETURN, _ERRNO | errno.EPERM),
        _instruction(_EQUAL, int(known["clone3"]), 0, 1),  # type: ignore[call-overload]
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
        _instruction(_EQUAL, int(known["clone"]), 0, 4),  # type: ignore[call-overload]
        _instruction(_LOAD, _FIRST_ARGUMENT_AT),
        _instruction(_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        _instruction(_RETURN, _ERRNO | errno.EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    for number in refused:
        code += [_instruction(_EQUAL, number, 0, 1), _instruction(_RETURN, _ERRNO | errno.EPERM)]
    return base64.b64encode(b"".join([*code, _instruction(_RETURN, _ALLOW)])).decode()


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
