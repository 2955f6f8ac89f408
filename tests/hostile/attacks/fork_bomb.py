"""Forks as long as it may, 150 times at most, and waits."""

import os
import time

started = 0
for _ in range(150):
    try:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
    except OSError:
        break
    started += 1
print("started", started, flush=True)
time.sleep(30)
