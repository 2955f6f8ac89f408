"""How calm the audit is: models and optimizers that are right, and what it says about them.

    python benchmarks/calm.py --groups families,ordinary,modules,optimizers,transformers,classifiers --seconds 900

A subject is calm when the audit passes it plainly. Printed are alarms, inconclusives and warnings by check and by
group, and each of them with its subject. Not written by those who wrote the checks are `torch.testing`'s databases of
modules and optimizers, and the configurations that transformers ships with its architectures, made small, weights at
random; the families of `benchmarks/models/correct.py` and the ordinary models of `benchmarks/models/ordinary` are ours.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import itertools
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import audits
from audits.outcomes import Outcome
from audits.recipe.callables import CallableReference, as_loss
from benchmarks.models.architectures import transformers
from benchmarks.models.correct import FAMILIES
from benchmarks.models.databases import modules, optimizers
from benchmarks.models.ordinary import ORDINARY
from benchmarks.models.pictures_and_sounds import classifiers
from benchmarks.models.subjects import Made, Subjects, adamw

#: A subject that takes longer is left out, and counted.
SECONDS = 60


class TooSlow(BaseException):
    """A subject's time is over. No `Exception`: the audit takes those that a model's code raises for its answer."""


def families() -> Subjects:
    """The families of correct models, with SGD."""
    for name, make in FAMILIES.items():

        def made(make: Any = make) -> Made:
            model, batch, loss = make()
            held = [p for p in model.parameters() if p.requires_grad]
            return model, batch, loss, torch.optim.SGD(held, lr=0.01, momentum=0.9)

        yield name, made


def ordinary() -> Subjects:
    """Ordinary models, with AdamW."""
    for name, make in ORDINARY.items():

        def made(make: Any = make) -> Made:
            model, batch, loss = make()
            return model, batch, loss, adamw(model)

        yield name, made


GROUPS: dict[str, Callable[[], Subjects]] = {
    "families": families,
    "ordinary": ordinary,
    "modules": modules,
    "optimizers": optimizers,
    "transformers": transformers,
    "classifiers": classifiers,
}


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _require_training(model: nn.Module, batch: Any, loss: Any) -> None:
    """Leave out what is not healthy: a database's inputs at which the loss is not finite, or asks for no change.

    Raises:
        ValueError: it is such.
    """
    function = as_loss(CallableReference.of(loss, role="loss"))
    model = copy.deepcopy(model)
    value = function(model, batch)
    if not bool(torch.isfinite(value)):
        raise ValueError("the loss is not finite")
    held = [p for p in model.parameters() if p.requires_grad]
    value.backward()
    if not any(p.grad is not None and bool(p.grad.to_dense().any()) for p in held):
        raise ValueError("every gradient is zero")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, over all groups")
    parser.add_argument("--only", default="", help="subjects whose name holds this")
    parser.add_argument("--share", default="1/1", help="1/4: every fourth subject, to run four processes side by side")
    parser.add_argument("--verbose", action="store_true", help="print the rows that are no pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    share, shares = (int(part) for part in options.share.split("/"))
    total: collections.Counter[str] = collections.Counter()
    by_check: dict[str, collections.Counter[str]] = {}
    for group in options.groups.split(","):
        tally: collections.Counter[str] = collections.Counter()
        for name, make in itertools.islice(GROUPS[group](), share - 1, None, shares):
            if options.only not in name:
                continue
            if time.perf_counter() - started > options.seconds:
                tally["not reached"] += 1
                continue
            torch.manual_seed(0)
            try:
                with limited(SECONDS):
                    model, batch, loss, optimizer = make()
                    _require_training(model, batch, loss)
            except (Exception, TooSlow) as error:
                tally["not made"] += 1
                print(f"  {group} {name}: not made: {type(error).__name__}: {str(error)[:100]}", flush=True)
                continue
            try:
                with limited(SECONDS):
                    declared = getattr(loss, "declared", {})
                    recipe = audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, **declared)
                    report = audits.audit(model, recipe)
            except TooSlow:
                tally["too slow"] += 1
                print(f"  {group} {name}: too slow", flush=True)
                continue
            except Exception as error:
                tally["raised"] += 1
                print(f"  {group} {name}: {type(error).__name__}: {str(error)[:160]}", flush=True)
                continue
            tally[report.outcome.value] += 1
            found = [r for r in report.rows if r.outcome in (Outcome.FAIL, Outcome.WARN, Outcome.INCONCLUSIVE)]
            if report.outcome is Outcome.PASS:
                continue
            for check in dict.fromkeys(r.check for r in found):
                worst = min((r for r in found if r.check == check), key=lambda r: list(Outcome).index(r.outcome))
                by_check.setdefault(check, collections.Counter())[worst.outcome.value] += 1
                print(f"  {group} {name}: {report.outcome} {check} {worst.outcome} {worst.parameter} "
                      f"[{worst.cause}] {worst.message[:200]}", flush=True)  # fmt: skip
        print(f"{group}: {dict(tally)}", flush=True)
        total += tally
    judged = sum(total[o.value] for o in Outcome)
    print(f"total: {dict(total)}; of {judged} judged")
    for check, counts in sorted(by_check.items()):
        print(f"  {check}: {dict(counts)}")


if __name__ == "__main__":
    main()
