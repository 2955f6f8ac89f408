"""Answers with 200 MiB, and then waits."""

import json
import time

with open(TARGETS["request"]) as stream:  # noqa: F821
    answer = json.load(stream)["answer"]
with open(answer, "wb") as stream:
    for _ in range(200):
        stream.write(b"x" * 2**20)
time.sleep(30)
