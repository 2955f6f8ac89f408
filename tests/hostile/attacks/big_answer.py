"""Answers with 200 MiB, and then waits."""

import json
import sys
import time

answer = json.load(sys.stdin)["answer"]
with open(answer, "wb") as stream:
    for _ in range(200):
        stream.write(b"x" * 2**20)
time.sleep(30)
