"""Ignores every signal it may and never ends (60 s where nothing ends it)."""

import contextlib
import signal
import time

for number in range(1, 65):
    with contextlib.suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_IGN)
print("hanging", flush=True)
time.sleep(60)
