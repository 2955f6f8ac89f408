"""Computes for ever (60 s where nothing ends it)."""

import time

deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    pass
