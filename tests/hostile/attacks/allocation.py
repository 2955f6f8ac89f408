"""Takes memory, 600 MiB at most, half of it in a second process, and waits."""

import os
import time

child = os.fork()
held = bytearray(300 << 20)
print("held", len(held), flush=True)
time.sleep(30)
