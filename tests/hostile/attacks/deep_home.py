"""Leaves 3,000 nested folders, folders that nobody may enter, and links that lead out."""

import os

home = os.path.expanduser("~")
top = os.open(home, os.O_RDONLY)
for _ in range(3000):
    os.mkdir("deeper", dir_fd=top)
    inner = os.open("deeper", os.O_RDONLY, dir_fd=top)
    os.close(top)
    top = inner
os.mkdir(home + "/closed")
os.symlink(TARGETS["outside"], home + "/closed/link")  # noqa: F821
os.symlink(TARGETS["outside"], home + "/link")  # noqa: F821
os.chmod(home + "/closed", 0o500)
os.mkdir(home + "/nothing", 0o000)
