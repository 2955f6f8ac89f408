"""What ``entry.py`` is told: what to give up and how much may be used, as JSON."""

from __future__ import annotations

import json
import os

from flows.sandbox.limits import Limits
from flows.sandbox.process_tree import tasks_of_user
from flows.sandbox.system_calls import filter_program

#: From this release on the kernel counts a user's processes in each user namespace apart.
_COUNTS_BY_NAMESPACE = (5, 14)


def specification(limits: Limits, *, unshare: bool, namespace: bool, uid: int | None, gpu: bool = False) -> str:
    """Return the specification.

    Args:
        limits: what may be used.
        unshare: enter namespaces first (where nothing outside has done so).
        namespace: a user namespace of its own counts the processes.
        uid: user to become, or None.
        gpu: leave the drivers' libraries what they may need.
    """
    tasks = limits.tasks
    if uid is None and not (namespace and _release() >= _COUNTS_BY_NAMESPACE):
        tasks += tasks_of_user()  # the limit is then on all that the user runs
    told = {
        "unshare": unshare,
        "uid": uid,
        "limits": {
            "file": limits.file_bytes,
            "cpu": limits.cpu,
            "tasks": tasks,
            "descriptors": limits.descriptors,
        },
        "filter": filter_program(gpu=gpu),
    }
    return json.dumps(told)


def _release() -> tuple[int, int]:
    try:
        major, minor = os.uname().release.split(".")[:2]
        return int(major), int("".join(digit for digit in minor if digit.isdigit()))
    except ValueError:
        return 0, 0
