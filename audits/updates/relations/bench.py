"""One optimizer on tensors of our own: built, fed gradients, stepped, as often and in as many ways as a relation needs.

Every tensor has a loss of its own, ``sum(c_t * p) + 1/2 sum(h * p^2)`` with ``h > 0``: its gradient ``c_t + h * p``
follows the weights (what a rule that moves them elsewhere first is told, is right there), the Hessian is there for
those that ask, and no tensor hears of another, so that whatever one does to another is the optimizer's.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from audits.errors import RecipeError
from audits.random_state import random_state_kept, seed_everything
from audits.recipe.constructing import constructed, optimizer_class
from audits.recipe.optimizers import build_optimizer
from audits.recipe.phases import OptimizerRecipe, ParameterGroup
from audits.updates.record.modes import in_train_mode
from audits.updates.relations.bench_loss import DtypeListener, Leaf, Problem

#: Steps of most runs; the state is saved half-way.
STEPS = 6

#: Counters that a live optimizer keeps in its groups and that no constructor takes.
COUNTS = ("step", "k", "n", "t", "step_count", "_step_count")


@dataclass(frozen=True)
class Group:
    """A param group: its options and its tensors' names, in order."""

    options: Mapping[str, Any]
    names: tuple[str, ...]


#: Weights by name at the start and after each step, in float64.
Path = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Run:
    """What a run gave: the weights after each step, the optimizer at the end, and its tensors."""

    path: Path
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    drew: bool = False
    dtypes: frozenset[torch.dtype] = frozenset()


@dataclass(frozen=True)
class StepRequest:
    """How an optimizer is asked for a step: with a closure, with gradients that can be differentiated again."""

    closure: bool = False
    graph: bool = False

    @property
    def description(self) -> str:
        """Half a sentence for the report; empty for a plain step."""
        if self.closure:
            return "stepped with a closure" + (" under create_graph" if self.graph else "")
        return "given gradients under create_graph" if self.graph else ""


#: A plain step.
PLAIN = StepRequest()


class Bench:
    """Builds and runs one class of optimizer.

    Args:
        recipe: the optimizer; its class and constructor defaults are used, groups are each run's own.
        device: where it trains.
        dtype: of the tensors.
        request: how it is asked for a step.
        seed: set before every run, for torch, NumPy and Python.
        steps: of most runs.

    Attributes:
        faithful: whether what the constructor makes of the recorded options goes as the live object does; then options
            that differ are given to the constructor too.
        coupled: whether a tensor's step depends on the other tensors (a norm of all gradients); None while unknown.
    """

    def __init__(
        self, recipe: OptimizerRecipe, device: torch.device, dtype: torch.dtype, request: StepRequest, seed: int,
        steps: int = STEPS,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.device = device
        self.dtype = dtype
        self.request = request
        self.seed = seed
        self.steps = steps
        self.faithful = False
        self.coupled: bool | None = None
        self.name = optimizer_class(recipe).__name__

    def using(self, *, dtype: torch.dtype | None = None, steps: int | None = None) -> Bench:
        """Return a bench with another dtype, or with other steps."""
        other = Bench(self.recipe, self.device, dtype or self.dtype, self.request, self.seed, steps or self.steps)
        other.faithful = self.faithful
        return other

    @property
    def saved_after(self) -> int:
        """Step after which the state is saved, and a gradient goes missing."""
        return self.steps // 2

    def build(
        self,
        groups: tuple[Group, ...],
        parameters: Mapping[str, nn.Parameter],
        defaults: Mapping[str, Any] | None = None,
    ) -> torch.optim.Optimizer:
        """Return a fresh optimizer, in train mode where it has modes of its own."""
        recipe = dataclasses.replace(
            self.recipe,
            groups=tuple(ParameterGroup(dict(g.options), g.names) for g in groups),
            defaults={**self.recipe.defaults, **(defaults or {})},
            state={},
        )
        if defaults is not None and self.faithful:
            recipe = dataclasses.replace(recipe, kept=None)
        optimizer = build_optimizer(recipe, parameters, with_state=False, hooks=False, dtype=self.dtype)
        if recipe.kept is not None:
            self._begin_counts(optimizer, recipe, parameters)
        return in_train_mode(optimizer)

    def _begin_counts(
        self, optimizer: torch.optim.Optimizer, recipe: OptimizerRecipe, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Put what the live optimizer counts in its groups back to what a constructor begins with."""
        made: list[dict[str, Any]] = []
        with contextlib.suppress(RecipeError):
            held = [[parameters[str(n)] for n in group.parameters] for group in recipe.groups]
            made = constructed(recipe, held).param_groups
        for number, (group, chosen) in enumerate(zip(optimizer.param_groups, recipe.groups, strict=True)):
            first = made[number] if made else recipe.defaults
            for key in {*group, *first} - {"params", *chosen.options}:
                if key in first:
                    group[key] = copy.copy(first[key])
                elif key in COUNTS:
                    group.pop(key, None)

    def run(
        self,
        groups: tuple[Group, ...],
        leaves: Mapping[str, Leaf],
        *,
        steps: int | None = None,
        defaults: Mapping[str, Any] | None = None,
        sign: float = 1.0,
        silent: Mapping[str, int] | None = None,
        frozen: tuple[str, ...] = (),
        resume: str = "",
        watched: bool = False,
    ) -> Run:
        """Take ``steps`` steps and return the way that the weights took.

        Args:
            groups: the param groups.
            leaves: the tensors, by name; those in no group are left out.
            steps: how many; the bench's by default.
            defaults: constructor arguments that differ from the recipe's.
            sign: of the loss; -1 for ``maximize``.
            silent: tensors without gradient from a step on: name -> step, from 0.
            frozen: tensors that do not require gradients, and get none.
            resume: half-way go on in another optimizer: ``"state_dict"`` or ``"copy"``.
            watched: tell the dtypes that the optimizer computes in.
        """
        steps = steps or self.steps
        names = [name for group in groups for name in group.names]
        with random_state_kept(), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            _seed(self.seed, self.device)
            parameters = {
                n: nn.Parameter(leaves[n].start.to(self.device, self.dtype, copy=True), requires_grad=n not in frozen)
                for n in names
            }
            optimizer = self.build(groups, parameters, defaults)
            problem = Problem(leaves, self.device, self.dtype, sign, self.request.graph)
            before, watch = torch.get_rng_state(), DtypeListener()
            path: Path = [_values(parameters)]
            for step in range(steps):
                if resume and step == self.saved_after:
                    optimizer, parameters = self._resumed(resume, optimizer, parameters, groups, defaults)
                loud = {n: p for n, p in parameters.items() if n not in frozen and step < (silent or {}).get(n, steps)}
                with watch if watched else contextlib.nullcontext():
                    self._step(optimizer, parameters, loud, problem, step)
                path.append(_values(parameters))
            drew = not torch.equal(before, torch.get_rng_state())
        return Run(path, optimizer, parameters, drew, frozenset(watch.dtypes))

    def _step(
        self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], loud: dict[str, nn.Parameter],
        problem: Problem, step: int,
    ) -> None:  # fmt: skip
        def evaluate() -> torch.Tensor:
            with torch.enable_grad():
                for parameter in parameters.values():
                    parameter.grad = None
                return problem.differentiate(loud, step)

        if self.request.closure:
            optimizer.step(evaluate)  # type: ignore[arg-type]
        else:
            evaluate()
            optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None

    def _resumed(
        self, how: str, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter],
        groups: tuple[Group, ...], defaults: Mapping[str, Any] | None,
    ) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:  # fmt: skip
        if how == "copy":
            # Everything that the object holds: torch's own __getstate__ leaves out what a subclass sets in __init__.
            copied, held = copy.deepcopy((parameters, optimizer.__dict__))
            twin = optimizer.__class__.__new__(optimizer.__class__)
            twin.__dict__.update(held)
            return twin, copied
        fresh = {n: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for n, p in parameters.items()}
        loaded = self.build(groups, fresh, defaults)
        with io.BytesIO() as file:
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            loaded.load_state_dict(torch.load(file, weights_only=False))
        return loaded, fresh


def _seed(seed: int, device: torch.device) -> None:
    """Seed what runs on a device may draw from; on the CPU alone no queue of another device need hear of it."""
    if device.type != "cpu":
        seed_everything(seed)
        return
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _values(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {n: p.detach().to(torch.float64, copy=True) for n, p in parameters.items()}


def request_of(recipe: OptimizerRecipe) -> StepRequest:
    """Return how the class asks for its step, by its signature: a closure without a default is needed."""
    closure = inspect.signature(optimizer_class(recipe).step).parameters.get("closure")
    return StepRequest(closure=closure is not None and closure.default is inspect.Parameter.empty)
