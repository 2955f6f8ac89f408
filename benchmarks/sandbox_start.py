"""What the sandbox costs an audit: start of the child and ``import torch`` in it, at every level this host offers.

The child is given an empty model directory: it starts, imports everything an audit needs, refuses and ends.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from audits.settings import AuditSettings
from flows.sandbox import Level, reached_level
from flows.sandbox.isolation import run_child
from flows.sandbox.limits import limits_of
from flows.settings.environment import GradauditSettings


def start(level: Level, settings: GradauditSettings) -> float:
    with tempfile.TemporaryDirectory(prefix="gradaudit-bench-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        place, answer, model = folder / "place", folder / "place" / "answer.jsonl", folder / "model"
        place.mkdir()
        model.mkdir()
        request = {
            "folder": str(model),
            "artifact_kind": "pickle",
            "code_folder": None,
            "recipe_folder": None,
            "settings": AuditSettings().to_mapping(),
            "device": "cpu",
        }
        began = time.perf_counter()
        end = run_child(request, place, limits_of(settings), level=level, readable=[model], answer=answer)
        seconds = time.perf_counter() - began
        if end.cause is not None or not answer.stat().st_size:
            raise SystemExit(f"the child did not answer at level {level}: {end.message}\n{end.log}")
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="runs per level, taken in turn")
    options = parser.parse_args()
    settings = GradauditSettings.load()
    best = reached_level("auto")
    levels = list(Level)[list(Level).index(best) :]
    times: dict[Level, list[float]] = {level: [] for level in levels}
    for _ in range(options.runs):
        for level in levels:
            times[level].append(start(level, settings))
    print("| | median | slowest |\n|---|---|---|")
    for level, seconds in times.items():
        print(f"| `{level}` | {statistics.median(seconds):.2f} s | {max(seconds):.2f} s |")


if __name__ == "__main__":
    main()
