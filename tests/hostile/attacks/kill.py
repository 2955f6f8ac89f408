"""Kills its parent, its parent's group, its own group and whatever else it sees."""

import contextlib
import os
import signal

parent = os.getppid()
group = os.getpgid(parent) if parent else 0
for target in {parent, os.getsid(0)} - {0, os.getpid()}:
    with contextlib.suppress(OSError):
        os.kill(target, signal.SIGKILL)
if group not in (0, os.getpgid(0)) and group == TARGETS.get("group"):  # noqa: F821 -- the test's own group only
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
print("killed", flush=True)
