"""Prints a gigabyte."""

import os

for _ in range(1024):
    os.write(1, b"\x1b[31m" + b"x" * (1 << 20))
