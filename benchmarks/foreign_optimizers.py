"""Every optimizer of four public packages on a correct model: judged by a rule or by relations, with what outcome.

Every class of `pytorch_optimizer`, `schedulefree` and `lion_pytorch` that can be built with
``cls(model.parameters(), lr=1e-3)``, and transformers' Adafactor, trains a correct two-layer net for one audit. A
package that is not installed is left out. A line says how the class was judged, the outcome, the seconds of the
update audit, and the first message of a finding; the last lines are the tally.

    python benchmarks/foreign_optimizers.py [NAME ...]
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from audits.outcomes import WORST_FIRST, Outcome, ResultRow
from audits.recipe import Recipe
from audits.subject import open_subject
from audits.updates import check_registration, check_updates
from audits.updates.relations import RELATIONS

PACKAGES = ("pytorch_optimizer", "schedulefree", "lion_pytorch", "transformers.optimization")


def classes(names: list[str]) -> Iterator[tuple[str, type[Any]]]:
    """Yield every optimizer class of the packages, or those of the given names."""
    for package in PACKAGES:
        try:
            module = importlib.import_module(package)
        except ImportError:
            print(f"{package} is not installed")
            continue
        for name in sorted(dir(module)):
            found = getattr(module, name)
            own = isinstance(found, type) and found.__module__.partition(".")[0] == package.partition(".")[0]
            if own and issubclass(found, torch.optim.Optimizer) and (not names or name in names):
                yield f"{package.partition('.')[0]}.{name}", found


def classify(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def recipe_for(own: type[Any]) -> tuple[nn.Module, Recipe] | str:
    """Return a model and its recipe, or why there is none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    batch = {"x": torch.randn(8, 12), "y": torch.randint(0, 5, (8,))}
    try:
        return model, Recipe.capture(model, batch=batch, loss=classify, optimizer=own(model.parameters(), lr=1e-3))
    except Exception as error:  # the class is somebody else's: a closure, the model itself, another optimizer
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def how_judged(rows: list[ResultRow]) -> str:
    """Return ``relations`` or ``rule``."""
    return "relations" if any(r.cause == RELATIONS or r.check == "optimizer.invariants" for r in rows) else "rule"


def worst_of(rows: list[ResultRow]) -> tuple[Outcome, str]:
    """Return the worst outcome that counts, and the message of its first row."""
    open_last = [r for r in rows if r.outcome not in (Outcome.SKIPPED, Outcome.PASS)]
    if not open_last:
        return Outcome.PASS, ""
    first = min(open_last, key=lambda r: WORST_FIRST.index(r.counted))
    return first.counted, f"{first.check}: {first.message}"


def main() -> None:
    """Audit them all and print the table and the tally."""
    warnings.simplefilter("ignore")
    tally: Counter[tuple[str, str]] = Counter()
    for name, own in classes(sys.argv[1:]):
        made = recipe_for(own)
        if isinstance(made, str):
            tally["cannot be built", "-"] += 1
            print(f"{name:40} cannot be built: {made[:140]}")
            continue
        began = time.perf_counter()
        with open_subject(*made, device="cpu") as subject:
            rows = check_registration(subject) + check_updates(subject)
        outcome, message = worst_of(rows)
        how = how_judged(rows)
        tally[how, str(outcome)] += 1
        print(f"{name:40} {how:9} {outcome:12} {time.perf_counter() - began:6.2f} s  {message[:1200]}", flush=True)
    for (how, outcome), count in sorted(tally.items()):
        print(f"{how:16} {outcome:12} {count}")


if __name__ == "__main__":
    main()
