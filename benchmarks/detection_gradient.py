"""Detection by the gradient check: a parameter's gradient off by its own stated limit, over many correct models.

    python benchmarks/detection_gradient.py --draws 40

Per draw a fresh model is audited, one of its passing parameters is drawn, its gradient is multiplied by 1 + its stated
detection limit, and the model is audited again with another seed. Printed per family: draws, how many the parameter
failed in, how many it was inconclusive in, the median limit. The claim is 99 % of the draws; half the limit and four
times it are drawn too, to show that the limit is neither luck nor far from what can be seen.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from audits.gradients import check_gradients
from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models.correct import FAMILIES, Family, train

CHECK = "gradient.finite-difference"

#: Multiples of the stated limit that are planted; the claim is about 1.
MULTIPLES = (0.5, 1.0, 4.0)


def rows_of(model: torch.nn.Module, batch: Any, loss: Any, method: str, seed: int) -> dict[str, ResultRow]:
    """Return the finite-difference rows by parameter."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)
    settings = AuditSettings(method=method, seed=seed, checks=(CHECK,))
    with open_subject(model, recipe, settings) as subject:
        return {str(row.parameter): row for row in check_gradients(subject)}


def draw(make: Family, number: int, method: str) -> list[tuple[Outcome, float]]:
    """Return the outcome of the planted parameter for every multiple, with the limit; empty where nothing resolves."""
    torch.manual_seed(number)
    model, batch, loss = make()
    if number % 2:
        train(model, batch, loss)
    rows = rows_of(model, batch, loss, method, number)
    ready = [name for name, row in rows.items() if row.outcome is Outcome.PASS and row.detection_limit]
    if not ready:
        return []
    name = random.Random(number).choice(sorted(ready))
    limit = float(rows[name].detection_limit or 0.0)
    found = []
    for multiple in MULTIPLES:
        factor = 1 + multiple * limit
        handle = model.get_parameter(name).register_hook(lambda g, factor=factor: g * factor)
        planted = rows_of(model, batch, loss, method, number + 100_000)
        handle.remove()
        found.append((planted[name].outcome, limit))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40, help="per family; every second model is trained")
    parser.add_argument("--method", default="probe", help="probe, exact or auto")
    parser.add_argument("--families", default="", help="comma-separated names; all without")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'family':28s} {'draws':>6s} {'limit':>8s}  " + "  ".join(f"fails, open at {m:g}" for m in MULTIPLES))
    totals = [[0, 0, 0] for _ in MULTIPLES]
    for name, make in FAMILIES.items():
        if options.families and name not in options.families.split(","):
            continue
        drawn = [found for number in range(options.draws) if (found := draw(make, number, options.method))]
        if not drawn:
            print(f"{name:28s} {0:6d}   nothing resolves")
            continue
        limit = statistics.median(found[0][1] for found in drawn)
        cells = []
        for index, total in enumerate(totals):
            fails = sum(found[index][0] is Outcome.FAIL for found in drawn)
            unsettled = sum(found[index][0] is Outcome.INCONCLUSIVE for found in drawn)
            total[:] = [total[0] + len(drawn), total[1] + fails, total[2] + unsettled]
            cells.append(f"{fails:6d} {unsettled:3d}     ")
        print(f"{name:28s} {len(drawn):6d} {limit:8.1e}  " + "  ".join(cells), flush=True)
    for multiple, (count, fails, unsettled) in zip(MULTIPLES, totals, strict=True):
        print(
            f"at {multiple:g} times the limit: {fails} of {count} fail ({100 * fails / max(count, 1):.2f} %), "
            f"{unsettled} inconclusive, {count - fails - unsettled} pass"
        )


if __name__ == "__main__":
    main()
