"""Takes memory, 1.5 GiB at most, and waits."""

import time

held = [bytearray(b"x" * (100 << 20)) for _ in range(15)]
time.sleep(30)
