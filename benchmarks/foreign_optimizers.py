"""Every optimizer of four public packages on a correct model: judged by a rule or by relations, with what outcome.

Every class of `pytorch_optimizer`, `schedulefree` and `lion_pytorch`, and transformers' Adafactor, trains a correct
two-layer net for one audit. A class is built with ``cls(model.parameters(), lr=1e-3)`` or, where it refuses, in the
other ways of `WAYS`. A package that is not installed is left out. A line says how the class was judged, the outcome,
the seconds of CPU time of the update audit, and the first message of a finding; the last lines are the tally.

    python benchmarks/foreign_optimizers.py [NAME ...]
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

from audits.causes import Cause
from audits.errors import RecipeError
from audits.live.subject import open_subject
from audits.outcomes import WORST_FIRST, Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.updates import check_registration, check_updates

#: Ways of building a class, in the order in which they are tried: plainly; without lr; in Muon's groups; around another
#: optimizer, given or named; with the model; with what single classes ask for.
WAYS: tuple[Callable[[Any, nn.Module], Any], ...] = (
    lambda cls, model: cls(model.parameters(), lr=1e-3),
    lambda cls, model: cls([{"params": [p], "use_muon": p.dim() == 2} for p in model.parameters()], lr=1e-3),
    lambda cls, model: cls(model.parameters()),
    lambda cls, model: cls(model.parameters(), base_optimizer=torch.optim.AdamW, lr=1e-3),
    lambda cls, model: cls(torch.optim.AdamW(model.parameters(), lr=1e-3)),
    lambda cls, model: cls(model, lr=1e-3),
    lambda cls, model: cls(model.parameters(), lr=1e-3, num_iterations=100),
    lambda cls, model: cls(model.parameters(), lr=1e-3, num_data=8),
)

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
    first: Exception | None = None
    for bias in (True, False):  # a class may take matrices alone
        for way in WAYS:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 16, bias=bias), nn.Tanh(), nn.Linear(16, 5, bias=bias))
            batch = {"x": torch.randn(8, 12), "y": torch.randint(0, 5, (8,))}
            try:
                optimizer = way(own, model)
                if not bias or _steps(optimizer, model, batch):
                    return model, Recipe.capture(model, batch=batch, loss=classify, optimizer=way(own, model))
            except RecipeError as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())}"
            except Exception as error:  # the class is somebody else's
                first = first or error
    return f"{type(first).__name__}: {' '.join(str(first).split())}"


def _steps(optimizer: Any, model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Whether a step, asked for plainly, does not refuse the tensors of a layer with biases."""
    classify(model, batch).backward()
    try:
        optimizer.step()
    except Exception as error:  # that it asks for more than a plain step is the audit's to find
        return "2D" not in str(error)
    return True


def how_judged(rows: list[ResultRow]) -> str:
    """Return ``relations`` or ``rule``."""
    return "relations" if any(r.cause == Cause.RELATIONS or r.check == "optimizer.invariants" for r in rows) else "rule"


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
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for name, own in classes(sys.argv[1:]):
        made = recipe_for(own)
        if isinstance(made, str):
            how = "refused in words" if made.startswith("RecipeError") else "cannot be built"
            tally[how, "-"] += 1
            print(f"{name:40} {how}: {made[:300]}", flush=True)
            continue
        began = time.process_time()
        with open_subject(*made, device="cpu") as subject:
            rows = check_registration(subject) + check_updates(subject)
        outcome, message = worst_of(rows)
        how = how_judged(rows)
        tally[how, str(outcome)] += 1
        seconds[how].append(time.process_time() - began)
        print(f"{name:40} {how:9} {outcome:12} {seconds[how][-1]:6.2f} s  {message[:1200]}", flush=True)
    for (how, outcome), count in sorted(tally.items()):
        print(f"{how:16} {outcome:12} {count}")
    for how, spent in sorted(seconds.items()):
        print(f"{how:16} {median(spent):.2f} s of CPU time, the median; {max(spent):.2f} s at most")


if __name__ == "__main__":
    main()
