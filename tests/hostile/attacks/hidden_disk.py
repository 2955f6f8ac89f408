"""Takes room on the disk that a walk over names does not see: files without a name, folders that cannot be read."""

import os
import time

home = os.path.expanduser("~")
if TARGETS["how"] == "unlinked":  # noqa: F821
    held = []
    for number in range(10):
        held.append(os.open(f"{home}/{number}", os.O_CREAT | os.O_WRONLY))
        os.unlink(f"{home}/{number}")
        os.write(held[-1], b"x" * (10 << 20))
else:
    os.mkdir(home + "/closed")
    for number in range(10):
        with open(f"{home}/closed/{number}", "wb") as stream:
            stream.write(b"x" * (10 << 20))
    os.chmod(home + "/closed", 0o300)
time.sleep(30)
