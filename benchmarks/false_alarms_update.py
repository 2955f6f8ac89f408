"""False alarms of the update audit over healthy configurations of every optimizer of torch.optim.

Every configuration trains a correct model with a correct optimizer: options x for-loop/foreach/fused x float32,
bfloat16, float64 x fresh and captured state. Any ``fail`` is a false alarm, except those whose cause is
``environment`` (a fused kernel of this torch build that is really wrong), which are listed apart.

    python benchmarks/false_alarms_update.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from audits.live.subject import open_subject
from audits.outcomes import Outcome
from audits.recipe.recipe import Recipe
from audits.updates import check_registration, check_updates

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

#: Options of every class; None is the default configuration.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
        {"lr": 0.1, "weight_decay": 1e-2, "maximize": True},
        {"lr": 1e-5, "momentum": 0.5},
    ],
    "Adam": [
        {},
        {"weight_decay": 1e-2},
        {"amsgrad": True, "eps": 1e-4},
        {"maximize": True, "betas": (0.5, 0.9)},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"lr": 2e-5},
    ],
    "AdamW": [{}, {"weight_decay": 0.1, "betas": (0.9, 0.95)}, {"amsgrad": True}, {"maximize": True}, {"lr": 2e-5}],
    "NAdam": [{}, {"weight_decay": 1e-2}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"maximize": True}],
    "RAdam": [{}, {"weight_decay": 1e-2}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"betas": (0.8, 0.9)}],
    "Adamax": [{}, {"weight_decay": 1e-2}, {"maximize": True}],
    "Adagrad": [{}, {"lr_decay": 0.1, "weight_decay": 1e-2}, {"initial_accumulator_value": 0.1}, {"maximize": True}],
    "Adadelta": [{}, {"lr": 0.5, "rho": 0.8, "weight_decay": 1e-2}, {"maximize": True}],
    "RMSprop": [{"lr": 1e-3}, {"lr": 1e-3, "centered": True}, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-2},
                {"lr": 1e-3, "momentum": 0.9, "centered": True, "maximize": True}],
    "Rprop": [{}, {"lr": 1e-3, "etas": (0.4, 1.3), "step_sizes": (1e-5, 1.0)}, {"maximize": True}],
    "ASGD": [{}, {"lr": 0.1, "lambd": 1e-2, "weight_decay": 1e-2, "t0": 1}, {"maximize": True}],
    "Adafactor": [{}, {"lr": 1e-3, "weight_decay": 0.1}, {"eps": (1e-8, 1e-2), "d": 2.0}, {"maximize": True}],
    "Muon": [{}, {"nesterov": False, "weight_decay": 0.0}, {"adjust_lr_fn": "match_rms_adamw"}],
    "SparseAdam": [{}, {"lr": 0.1, "betas": (0.8, 0.9)}, {"maximize": True}],
    "LBFGS": [{}, {"lr": 0.5, "max_iter": 5}, {"line_search_fn": "strong_wolfe", "history_size": 3}],
}  # fmt: skip

FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
NO_FOREACH = ("SparseAdam", "LBFGS")


class Net(nn.Module):
    """Embedding, convolution, BatchNorm and a tied head."""

    def __init__(self, *, matrices_only: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16, sparse=sparse)
        if sparse:
            return
        self.first = nn.Linear(16, 32, bias=not matrices_only)
        self.second = nn.Linear(32, 16, bias=not matrices_only)
        if not matrices_only:
            self.norm = nn.BatchNorm1d(32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        if hasattr(self, "first"):
            hidden = self.first(hidden)
            if hasattr(self, "norm"):
                hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
            hidden = self.second(torch.relu(hidden))
        return (
            hidden @ self.embedding.weight.T.detach()
            if not hasattr(self, "first")
            else hidden @ self.embedding.weight.T
        )


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Next-token cross entropy."""
    logits = model(batch["tokens"])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())


def configurations(quick: bool) -> Iterator[tuple[str, dict[str, Any], torch.dtype, bool]]:
    for name, options in OPTIONS.items():
        implementations: list[dict[str, Any]] = [{}]
        if name not in NO_FOREACH:
            implementations = [{"foreach": False}, {"foreach": True}] if name != "Muon" else [{}]
        if name in FUSED:
            implementations.append({"fused": True})
        for chosen, how, dtype in itertools.product(options[:2] if quick else options, implementations, DTYPES):
            for trained in (False,) if quick else (False, True):
                if name == "LBFGS" and dtype is torch.bfloat16:
                    continue
                yield name, {**chosen, **how}, dtype, trained


def audit_one(name: str, options: dict[str, Any], dtype: torch.dtype, trained: bool) -> list[Any]:
    torch.manual_seed(0)
    model = Net(matrices_only=name == "Muon", sparse=name == "SparseAdam").to(dtype)
    tokens = torch.randint(0, 23, (4, 9))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    if trained:

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            return value

        for _ in range(3):
            if name == "LBFGS":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)
    with open_subject(model, recipe, device="cpu") as subject:
        return check_registration(subject) + check_updates(subject)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer options, fresh state only")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    worst: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    count: dict[str, int] = defaultdict(int)
    unresolved: dict[str, int] = defaultdict(int)
    alarms, environment = [], []
    started = time.perf_counter()
    for name, options, dtype, trained in configurations(quick):
        rows = audit_one(name, options, dtype, trained)
        count[name] += 1
        for r in rows:
            if r.outcome is Outcome.FAIL:
                state = "captured" if trained else "fresh"
                where = f"{name} {options} {dtype} {state}: {r.check} {r.parameter}: {r.message}"
                (environment if r.cause == "environment" else alarms).append(where)
            if (
                r.check in ("update.rule", "optimizer.probe")
                and r.error is not None
                and r.threshold
                and r.cause != "environment"
            ):
                key = (name, r.check)
                worst[key] = max(worst[key], (r.error / r.threshold, r.error))
            if r.check == "update.rule" and r.outcome is Outcome.INCONCLUSIVE:
                unresolved[name] += 1
    print(f"{'optimizer':<12}{'audits':>8}{'open rows':>11}{'worst update.rule':>20}{'worst optimizer.probe':>24}")
    for name in count:
        rule, probe = worst[name, "update.rule"], worst[name, "optimizer.probe"]
        print(
            f"{name:<12}{count[name]:>8}{unresolved[name]:>11}{rule[1]:>13.3g} ({rule[0]:.0%})"
            f"{probe[1]:>17.3g} ({probe[0]:.0%})"
        )
    print(f"{sum(count.values())} healthy audits in {time.perf_counter() - started:.0f} s: {len(alarms)} false alarms")
    for text in alarms:
        print("FALSE ALARM", text)
    for text in sorted(set(environment)):
        print("environment", text)
    return 1 if alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
