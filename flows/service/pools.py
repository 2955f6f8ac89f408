"""The work pools and their queues."""

from __future__ import annotations

#: Each pool's queues by priority; 1 is served first. Registrations never wait behind a night's list.
QUEUES = {"cpu": {"default": 1}, "gpu": {"registration": 1, "nightly": 10}}
