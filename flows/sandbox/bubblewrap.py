"""The command line of bubblewrap for one audit: what it sees, what it may write, which namespaces it gets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

#: Identity inside; nothing needs the names but ``getpass.getuser``.
_NOBODY = 65534
USER_NAME = "audit"

#: Capabilities with which the first process inside becomes another user and gives up the rest.
_KEPT = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")

#: Top-level folders that are links into /usr on most systems and real folders on some.
_TOP = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")

#: Settings of the host's that lie below /usr and that no library needs.
_HIDDEN = ("/usr/etc", "/usr/local/etc", "/usr/src", "/usr/local/src")

#: Device nodes of the GPU drivers, by the start of their names.
_GPU_NODES = ("nvidia", "kfd", "dri", "dxg")


def bubblewrap_command(
    program: str,
    *,
    folder: Path,
    readable: Sequence[Path],
    scratch_bytes: int,
    gpu: bool,
    own_user: bool,
    no_nested: bool,
) -> list[str]:
    """Return the command up to, and without, what is to run inside.

    Args:
        program: bubblewrap.
        folder: private folder of the audit, for the files that stand in for the host's.
        readable: paths shown read-only, at the place they have outside.
        scratch_bytes: size of each of the private in-memory file systems.
        gpu: show the GPU's device nodes and settings.
        own_user: the caller is root, and what runs inside changes to a user of its own: no user namespace. Otherwise
            one with an unprivileged user.
        no_nested: forbid further user namespaces inside (bubblewrap 0.8, with a user namespace only).
    """
    size = str(scratch_bytes)
    command = [program, "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    # Bubblewrap's own first process would have the audit's user, and neither its limits nor its filter.
    command += ["--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "audit"]
    if own_user:
        command += ["--cap-drop", "ALL", *(part for name in _KEPT for part in ("--cap-add", name))]
    else:
        command += ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
        command += ["--disable-userns"] if no_nested else []
    for top in _TOP:
        if os.path.islink(top):
            command += ["--symlink", os.readlink(top), top]
        elif os.path.isdir(top):
            command += ["--ro-bind", top, top]
    command += ["--proc", "/proc", "--dev", "/dev"]
    command += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp", "--perms", "1777", "--size", size]
    command += ["--tmpfs", "/dev/shm"]
    command += _parents([Path("/etc/passwd"), *readable])
    for path in readable:
        command += ["--ro-bind", str(path), str(path)]
    for hidden in filter(os.path.isdir, _HIDDEN):
        command += ["--tmpfs", hidden, "--remount-ro", hidden]
    for name, text in _identity_files().items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o644)
        command += ["--ro-bind", str(folder / name), f"/etc/{name}"]
    if gpu:
        for node in gpu_nodes():
            command += ["--dev-bind", str(node), str(node)]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _parents(paths: Sequence[Path]) -> list[str]:
    """Make the folders above mount points passable for the user inside: bubblewrap's own are for root alone."""
    parents = {parent for path in paths for parent in path.parents}
    inside = [path for path in paths if path.is_dir()]
    wanted = [parent for parent in parents if not any(parent.is_relative_to(path) for path in inside)]
    made = sorted(set(wanted) - {Path("/"), Path("/tmp"), Path("/proc"), Path("/dev")})
    return [part for path in made for part in ("--perms", "0755", "--dir", str(path))]


def gpu_nodes() -> list[Path]:
    """Return the GPU device nodes this host has."""
    try:
        return sorted(path for path in Path("/dev").iterdir() if path.name.startswith(_GPU_NODES))
    except OSError:
        return []


def _identity_files() -> dict[str, str]:
    return {
        "passwd": f"{USER_NAME}:x:{_NOBODY}:{_NOBODY}::/tmp:/bin/false\n",
        "group": f"{USER_NAME}:x:{_NOBODY}:\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    }
