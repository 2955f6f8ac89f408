"""False alarms of the gradient check: correct models, many seeds, untrained and trained.

    python benchmarks/false_alarms_gradient.py --seeds 20

prints per family the runs, the false alarms (any row that fails), the runs with an inconclusive row, and the worst
residual over bound of a passing row. The target is no false alarm in 1,000 runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from audits.gradients import check_gradients
from audits.live.subject import open_subject
from audits.outcomes import Outcome
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models.correct import FAMILIES, Family, train


def run(make: Family, seed: int, trained: bool, method: str) -> tuple[list[Any], float]:
    torch.manual_seed(seed)
    model, batch, loss = make()
    if trained:
        train(model, batch, loss)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)
    started = time.perf_counter()
    checks = ("gradient.finite-difference", "gradient.input", "gradient.native-dtype")
    settings = AuditSettings(method=method, seed=seed, checks=checks)
    with open_subject(model, recipe, settings) as subject:
        return check_gradients(subject), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=17)
    parser.add_argument("--method", default="probe")
    parser.add_argument("--families", default="")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import warnings

    warnings.simplefilter("ignore")
    chosen = [name for name in FAMILIES if not options.families or name in options.families.split(",")]
    totals = [0, 0, 0]
    worst_of_all = 0.0
    print(f"{'family':28s} {'runs':>5s} {'alarms':>7s} {'open':>5s} {'worst r/B':>10s} {'ms/run':>8s}")
    for name in chosen:
        alarms = open_runs = runs = 0
        worst, seconds = 0.0, 0.0
        for seed in range(options.seeds):
            for trained in (False, True):
                rows, took = run(FAMILIES[name], seed, trained, options.method)
                runs += 1
                seconds += took
                failing = [row for row in rows if row.outcome is Outcome.FAIL]
                unsettled = [row for row in rows if row.outcome is Outcome.INCONCLUSIVE]
                alarms += bool(failing)
                open_runs += bool(unsettled)
                ratios = [
                    row.error / row.threshold
                    for row in rows
                    if row.outcome is Outcome.PASS and row.error is not None and row.threshold
                    and row.cause != "rounding inside an op" and row.check != "gradient.native-dtype"
                ]  # fmt: skip
                worst = max([worst, *ratios])
                if options.verbose:
                    for row in [*failing, *unsettled]:
                        print(f"    seed {seed} trained {trained} {row.check} {row.outcome} {row.parameter}"
                              f" {row.cause} error {row.error} threshold {row.threshold}"
                              f" limit {row.detection_limit} | {row.message[:260]}")  # fmt: skip
        print(f"{name:28s} {runs:5d} {alarms:7d} {open_runs:5d} {worst:10.3f} {1e3 * seconds / runs:8.0f}", flush=True)
        totals = [totals[0] + runs, totals[1] + alarms, totals[2] + open_runs]
        worst_of_all = max(worst_of_all, worst)
    print(f"{totals[0]} runs, {totals[1]} false alarms, {totals[2]} inconclusive, worst r/B {worst_of_all:.3f}")


if __name__ == "__main__":
    main()
