"""A recipe made live on a model: batch on the device, losses to call, optimizers to build."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from audits.devices import choose_device
from audits.errors import RecipeError
from audits.leaves import StrayState
from audits.live.fitting import FirstForward, compiled_here, match_names, set_modes, try_losses
from audits.live.given_batch import GivenBatch, copy_of_plain
from audits.live.rates import AssumedRate, audited_at
from audits.live.state import ModuleState, Originals, ParameterState, borrowed
from audits.live.weighing import IGNORED_LABEL as IGNORED_LABEL
from audits.live.weighing import ITEMS, Weighing, as_list, asks_for, declared_weighing, split
from audits.random_state import seed_everything
from audits.recipe.callables import as_loss
from audits.recipe.capture import canonical_names, unwrap
from audits.recipe.compiled_parts import eager
from audits.recipe.declared_names import check_names
from audits.recipe.lone_optimizers import others_refused
from audits.recipe.optimizers import build_optimizer, keeps_state_aside
from audits.recipe.overlaps import Overlap, overlaps_of
from audits.recipe.phases import PhaseRecipe
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from audits.structures import map_tensors
from audits.wording import module_label


@dataclass(frozen=True)
class Owner:
    """The module that holds a parameter."""

    path: str
    module: nn.Module

    @property
    def label(self) -> str:
        """``class at path``, for rows: ``ScaledGelu (blocks.1.act)``."""
        return module_label(type(self.module), self.path)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class LivePhase:
    """One phase of the training step on the subject's model."""

    def __init__(self, recipe: PhaseRecipe, parameters: Mapping[str, nn.Parameter]) -> None:
        #: As captured; `recipe` is the same at rates that move something.
        self.captured = recipe
        recipe, assumed, self.schedule_ended = audited_at(recipe)
        #: By parameter, the rate that was assumed for its group because the captured one is 0.
        self.assumed_rates: dict[str, AssumedRate] = {
            name: rate
            for index, rate in assumed.items()
            for name in recipe.optimizer.groups[index].parameters
            if isinstance(name, str)
        }
        self.recipe = recipe
        self.name = recipe.name
        #: Trainable parameters in this phase's optimizer, by canonical name, in the optimizer's order.
        self.parameters = {
            n: parameters[n] for n in dict.fromkeys(recipe.optimizer.names) if parameters[n].requires_grad
        }
        self._all = parameters
        #: ``(model, batch) -> scalar``.
        self.loss_function = as_loss(recipe.loss)
        #: Whether the loss asks for ``num_items_in_batch``; and the whole batch's count, which it is told then.
        self.asks_for_items = asks_for(ITEMS, self.loss_function)
        self.items: int | None = None
        #: Whether the loss changes its batch in place: it then gets tensors of its own too.
        self.writes_batch = False

    def call_loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss of one micro-batch; the loss gets containers of its own, so it may pop from them."""
        told = {ITEMS: self.items} if self.asks_for_items else {}
        own = copy_of_plain if self.writes_batch else _same
        return self.loss_function(model, map_tensors(batch, own), **told)

    def weighted_loss(self, model: nn.Module, batch: Any, weight: float) -> torch.Tensor:
        """Return ``weight * loss(model, batch)``: a micro-batch's part in the loss of a step."""
        loss = self.call_loss(model, batch)
        return loss if weight == 1.0 else loss * weight

    def build_optimizer(self, *, with_state: bool = True) -> torch.optim.Optimizer:
        """Return a fresh optimizer as the recipe describes it, on the subject's parameters."""
        return build_optimizer(self.recipe.optimizer, self._all, with_state=with_state and not self.starts_fresh)

    @functools.cached_property
    def starts_fresh(self) -> bool:
        """Whether its training steps begin from fresh state, whatever was recorded: see `keeps_state_aside`."""
        return keeps_state_aside(self.recipe.optimizer)


class Subject:
    """A model under audit; made by `open_subject`.

    Attributes:
        model: the unwrapped module, in the recipe's mode, on `device`.
        parameters: every parameter by canonical name, frozen ones included.
        trainable: names of those with ``requires_grad``.
        phases: the live phases in the step's order.
        seed: the settings' seed, or the recipe's.
        overlaps: distinct Parameters on one memory, at capture or now; during the audit each has its own.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        settings: AuditSettings,
        device: torch.device,
        overlaps: tuple[Overlap, ...] = (),
        originals: Originals | None = None,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.settings = settings
        self.device = device
        self.overlaps = tuple(dict.fromkeys((*overlaps, *recipe.overlaps)))
        self.seed = recipe.seed if settings.seed is None else settings.seed
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        match_names(recipe, self.parameters, model)
        check_names(recipe, model)
        for record in recipe.parameters:
            self.parameters[record.name].requires_grad_(record.trainable)
        set_modes(model, recipe)
        self.trainable = tuple(name for name, p in self.parameters.items() if p.requires_grad)
        self._names = canonical_names(model)
        self._owners = _owners(model)
        self.given = GivenBatch(as_list(recipe.batch), device)
        #: Tensors of the batch that a declared loss changes in place.
        self.written_batch: tuple[str, ...] = ()
        self.phases = tuple(LivePhase(phase, self.parameters) for phase in recipe.phases)
        #: What is compiled, here or where the recipe was made, and how the model itself was, where that is known.
        self.compiled: tuple[str, ...] = recipe.compiled
        self.compiled_with: Any = None
        #: How the micro-batches of each phase weigh; `audits.lanes.separation.find_weighings` finds it.
        self.weighed = False
        self.weighings = dict.fromkeys((phase.name for phase in recipe.phases), declared_weighing(recipe.normalize))
        self._module_state = ModuleState(model)
        self._parameter_state = ParameterState(model, originals)
        #: By phase, the leaves that reach its loss, were there before it, and are no parameters of the model.
        self.strays: dict[str, list[torch.Tensor]] = {phase.name: [] for phase in recipe.phases}
        self._stray_state = StrayState(())
        #: By phase; what a process does at its first call and never again shows nowhere else.
        self.first_forwards: dict[str, FirstForward] = {}

    def left_by_loss(self, phase: LivePhase) -> list[Any]:
        """Return the micro-batches as a phase's loss leaves them, in memory of their own."""
        copies = [map_tensors(batch, torch.clone) for _, batch in self.micro_batches(phase)]
        phase.writes_batch = False
        try:
            with self.autocast():
                for batch in copies:
                    phase.call_loss(self.model, batch)
        finally:
            phase.writes_batch = True
        return copies

    def remember_strays(self) -> None:
        """Remember storage and gradients of the leaves that reach a loss and are not the model's, to be put back."""
        self._stray_state = StrayState({id(t): t for found in self.strays.values() for t in found}.values())

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """Return the canonical name of a parameter, by identity."""
        return self._names.get(id(parameter))

    def native_value(self, name: str) -> torch.Tensor:
        """Return a parameter's native values at the audit's start, on its device; not to be written."""
        return self._parameter_state.value(self.parameters[name])

    def held_value(self, name: str) -> torch.Tensor:
        """Return them where they wait, in host memory mostly; not to be written."""
        return self._parameter_state.held(self.parameters[name])

    def owner(self, name: str) -> Owner:
        """Return the module that holds the parameter."""
        return self._owners[name]

    def micro_batches(
        self, phase: LivePhase, given: Sequence[Any] | None = None, weighing: Weighing | None = None, *,
        uncut: Sequence[Any] | None = None,
    ) -> list[tuple[float, Any]]:  # fmt: skip
        """Return the step's micro-batches with the weight of each one's loss.

        ``normalize="auto"`` weighs them as the losses tell (`audits.lanes.separation`), ``"mean"`` all alike,
        ``"tokens:KEY"`` by the number of targets in ``batch[KEY]`` that are not -100 (of True elements for a mask).

        Args:
            phase: whose.
            given: micro-batches to weigh instead of the recipe's.
            weighing: how to weigh them instead.
            uncut: other values of the recipe's batch, to be cut into micro-batches as it is.
        """
        batches = list(self.given.batches if uncut is None else uncut) if given is None else list(given)
        if given is None and len(batches) == 1 and phase.recipe.accumulate > 1:
            batches = split(batches[0], phase.recipe.accumulate)
        weights = (weighing or self.weighings[phase.name]).weights(batches)
        return list(zip(weights, batches, strict=True))

    def loss(self, phase: LivePhase, batches: Sequence[tuple[float, Any]] | None = None) -> torch.Tensor:
        """Return the loss of a whole step of this phase; seeds nothing.

        ``L = sum_i w_i * l(model, batch_i)`` over the step's micro-batches, with the weights of `micro_batches`.

        Args:
            phase: whose.
            batches: weights and micro-batches instead of the recipe's.
        """
        total: torch.Tensor | None = None
        for weight, batch in self.micro_batches(phase) if batches is None else batches:
            if weight:  # a micro-batch without a target that counts: its mean is nan
                value = phase.weighted_loss(self.model, batch, weight)
                total = value if total is None else total + value
        assert total is not None
        return total

    def fingerprints(self) -> dict[str, tuple[float, float]]:
        """Return (sum, Euclidean norm) of every parameter: what a forward that writes weights changes."""
        values = ((n, p.detach()) for n, p in self.parameters.items() if p.is_floating_point())
        wide = torch.float64
        return {n: (float(v.sum(dtype=wide)), float(torch.linalg.vector_norm(v, dtype=wide))) for n, v in values}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the recipe's precision, for native evaluations."""
        if self.recipe.precision == "native":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.recipe.precision.startswith("bf16") else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def kept_leaves(self) -> list[torch.Tensor]:
        """Return the leaf tensors, buffers among them, that model or losses keep without registering them."""
        leaves = {id(leaf): leaf for leaf in (*self._module_state.leaves(), *self._stray_state.leaves)}
        return list(leaves.values())

    def reset(self, *, seed: int | None = None) -> None:
        """Put the model back to the audit's start and seed the generators: the same evaluation again."""
        self.given.restore()
        self._stray_state.restore()
        self._module_state.restore()
        self._parameter_state.restore()
        seed_everything(self.seed if seed is None else seed)


def added_up(losses: Iterable[tuple[float, Any]]) -> Any:
    """Return ``sum_i w_i loss_i`` of (w_i, loss_i); what weighs nothing (no target that counts: nan) is left out."""
    total: Any = None
    for weight, value in losses:
        if not weight:
            continue
        value = value if weight == 1.0 else value * weight
        total = value if total is None else total + value
    return total


@contextlib.contextmanager
def open_subject(
    model: nn.Module, recipe: Recipe, settings: AuditSettings | None = None, device: str = "auto"
) -> Iterator[Subject]:
    """Make a recipe live on a model; on leaving, the model is as it was, bit for bit.

    Raises:
        RecipeError: the recipe does not fit the model, or its loss cannot be computed on its batch.
    """
    chosen = choose_device(device)
    wrapped, model = model, unwrap(model)
    lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise RecipeError(f"parameter {lazy[0]!r} is lazy and was never initialised: run one forward before capture")
    overlaps = overlaps_of(model)
    with borrowed(model, chosen) as originals, torch.enable_grad(), warnings.catch_warnings(), eager():
        subject = Subject(model, recipe, settings or AuditSettings(), chosen, overlaps, originals)
        subject.compiled, subject.compiled_with = compiled_here(wrapped, recipe)
        try_losses(subject)
        subject.reset()
        with others_refused(subject._names):
            yield subject


def _owners(model: nn.Module) -> dict[str, Owner]:
    owners = {}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            owners[f"{path}.{name}" if path else name] = Owner(path, module)
    return owners
