"""Tries to write into the memory of the first process it can see, and says what confines that one."""

import json
import os

found = {}
with open("/proc/1/status") as stream:
    for line in stream:
        name, _, value = line.partition(":")
        if name in ("Seccomp", "NoNewPrivs", "CapEff"):
            found[name] = value.strip()
for name in ("mem", "environ", "maps"):
    try:
        with open(f"/proc/1/{name}", "r+b" if name == "mem" else "rb") as stream:
            found[name] = len(stream.read(1))
    except OSError as error:
        found[name] = type(error).__name__
with open("/proc/self/status") as stream:
    found["own"] = {k: v.strip() for k, _, v in (line.partition(":") for line in stream) if k in ("CapBnd", "Seccomp")}
shown = [path for path in ("/usr/local/etc", "/usr/etc") if os.path.isdir(path)]
found["settings"] = [name for path in shown for name in os.listdir(path)]
print(json.dumps(found))
