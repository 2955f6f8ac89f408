"""Leaves 200 MiB in the answer's folder, and then waits."""

import os
import time

for number in range(200):
    with open(os.path.join(TARGETS["answer"], str(number)), "wb") as stream:  # noqa: F821
        stream.write(bytes(1 << 20))
time.sleep(30)
