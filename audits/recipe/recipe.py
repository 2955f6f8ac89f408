"""What one training step of a model is, as plain data: batch, loss, optimizer, phases.

A `Recipe` is made by `Recipe.capture` from live objects (`audits.recipe.capture`), stored and read by
`registry_models.recipes.recipe_files`, and made live again by `audits.live.subject`. It holds parameter *names*, never
parameters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError, suggest, unknown_among
from audits.recipe.callables import CallableReference
from audits.recipe.compiled_parts import compiled_parts
from audits.recipe.moulds import Kept
from audits.recipe.overlaps import Overlap
from audits.short_digests import shortened

#: What ``precision`` may be. Autocast recipes run their forward under `torch.autocast`; fp16 also scales the loss.
PRECISIONS = ("native", "bf16-autocast", "fp16-autocast")

#: What ``expect`` may declare; everything that is not declared is not compared.
EXPECTATIONS = (
    "optimizer",
    "optimizer_rule",
    "lr",
    "weight_decay",
    "betas",
    "momentum",
    "eps",
    "amsgrad",
    "nesterov",
    "maximize",
    "frozen",
    "trainable",
    "shared",
    "ema",
    "clip_grad_value",
    "writes_outside_step",
    "custom_gradient",
    "step_hooks",
    "optimizer_rule",
    "input_gradients",
)


_RULE = "expect['optimizer_rule']"


@dataclass(frozen=True)
class Phase:
    """One backward and one optimizer step inside a training step, given as live objects.

    Args:
        name: how rows name it; a single phase is named ``"step"``.
        loss: ``(model, batch) -> scalar``, its import path, a name of `torch.nn.functional`, a loss module, or
            ``"model"``.
        optimizer: the live `torch.optim.Optimizer`; its tensors are matched to the model's by identity.
        clip_grad_norm: the norm that gradients are clipped to, if they are.
        accumulate: micro-batches per step.
        scheduler: the live learning-rate scheduler, if there is one.
    """

    name: str
    _: KW_ONLY
    loss: Any
    optimizer: torch.optim.Optimizer
    clip_grad_norm: float | None = None
    accumulate: int = 1
    scheduler: Any = None


@dataclass(frozen=True)
class UnknownTensor:
    """A tensor that the optimizer holds and the model does not have.

    ``likely`` is the model's parameter that it probably was: same shape, and no optimizer holds that parameter.
    """

    position: int
    shape: tuple[int, ...]
    dtype: str
    likely: str | None = None

    @property
    def label(self) -> str:
        """How rows name it."""
        return f"<stale tensor #{self.position}>"


@dataclass(frozen=True)
class ParameterGroup:
    """One param group: its options and its tensors, by name where the model has them."""

    options: Mapping[str, Any]
    parameters: tuple[str | UnknownTensor, ...]


@dataclass(frozen=True)
class OptimizerRecipe:
    """An optimizer as data: class path, constructor defaults, groups, and state by parameter name.

    ``kept`` is what it holds beyond these (attributes, hooks, a ``step`` of its own), None where that is nothing. In
    the process that captured it also the class itself, and what puts the wrapper back that it was given in.
    """

    class_path: str
    defaults: Mapping[str, Any]
    groups: tuple[ParameterGroup, ...]
    state: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    kept: Kept | None = field(default=None, compare=False, repr=False)
    live_class: type[torch.optim.Optimizer] | None = field(default=None, compare=False, repr=False)
    rewrap: Callable[[torch.optim.Optimizer], Any] | None = field(default=None, compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's parameters it holds, in order, repeated ones repeated."""
        return tuple(p for group in self.groups for p in group.parameters if isinstance(p, str))

    @property
    def unknown(self) -> tuple[UnknownTensor, ...]:
        """Tensors it holds that the model does not have."""
        return tuple(p for group in self.groups for p in group.parameters if isinstance(p, UnknownTensor))


@dataclass(frozen=True)
class SchedulerRecipe:
    """A learning-rate schedule as data: the rates of every group over the next steps, simulated at capture.

    ``learning_rates[k][g]`` is group g's rate during the k-th step from now.
    """

    class_path: str
    learning_rates: tuple[tuple[float, ...], ...]
    rewrap: Callable[..., Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PhaseRecipe:
    """A phase as data."""

    name: str
    loss: CallableReference
    optimizer: OptimizerRecipe
    clip_grad_norm: float | None = None
    accumulate: int = 1
    scheduler: SchedulerRecipe | None = None


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter of the model as it was at capture."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained for one step; see `Recipe.capture`."""

    batch: Any = field(compare=False, repr=False)
    phases: tuple[PhaseRecipe, ...]
    parameters: tuple[ParameterRecord, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    #: Pairs of distinct Parameters that lay on one memory at capture: weights that are loaded are separate.
    overlaps: tuple[Overlap, ...] = ()
    #: Whether the model was in eval mode at capture though ``mode`` is "train": which modules train in eval is unknown.
    captured_in_eval: bool = False
    step: CallableReference | None = None
    precision: str = "native"
    normalize: str = "mean"
    mode: str = "train"
    module_modes: Mapping[str, bool] = field(default_factory=dict)
    seed: int = 0
    expect: Mapping[str, Any] = field(default_factory=dict)
    stop_gradient: tuple[str, ...] = ()
    assumed: frozenset[str] = frozenset()
    compiled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.phases:
            raise RecipeError("a recipe needs at least one phase: give loss= and optimizer=, or phases=[...]")
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise RecipeError(f"phase names must differ, not {names}")
        if self.precision not in PRECISIONS:
            raise RecipeError(
                f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}{suggest(self.precision, PRECISIONS)}"
            )
        if self.mode not in ("train", "eval"):
            raise RecipeError(f"mode must be 'train' or 'eval', not {self.mode!r}")
        if self.normalize != "mean" and not self.normalize.startswith("tokens:"):
            raise RecipeError(f"normalize must be 'mean' or 'tokens:KEY', not {self.normalize!r}")
        for phase in self.phases:
            if phase.accumulate < 1:
                raise RecipeError(f"accumulate must be at least 1, not {phase.accumulate}")
            if phase.clip_grad_norm is not None and not phase.clip_grad_norm > 0:
                raise RecipeError(f"clip_grad_norm must be positive, not {phase.clip_grad_norm}")
        if unknown := unknown_among(self.expect, EXPECTATIONS):
            raise RecipeError(f"expect has unknown key {unknown}")

    @staticmethod
    def capture(
        model: nn.Module,
        *,
        batch: Any,
        loss: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        phases: Sequence[Phase] | None = None,
        step: Any = None,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        precision: str = "native",
        scheduler: Any = None,
        normalize: str = "mean",
        mode: str = "train",
        seed: int = 0,
        expect: Mapping[str, Any] | None = None,
        stop_gradient: Sequence[str] = (),
    ) -> Recipe:
        """Describe how ``model`` is trained, from the live objects that train it.

        Args:
            model: the module being trained. DDP, DataParallel and compiled wrappers are unwrapped.
            batch: a dict of tensors (nested containers allowed), or a list of them: the micro-batches of one step.
            loss: ``(model, batch) -> scalar``, its import path, a name of `torch.nn.functional`, a loss module, or
                ``"model"`` (the output's ``.loss``).
            optimizer: the live optimizer. Which tensors it *really* holds is recorded by identity.
            phases: several `Phase` objects instead of loss and optimizer, for a GAN say.
            step: the real training step, ``(model, batch, context) -> None``; without it a canonical step is used and
                what only the real one could get wrong is skipped.
            clip_grad_norm: norm that gradients are clipped to.
            accumulate: cut the batch into so many equal micro-batches along dim 0.
            precision: ``"native"``, ``"bf16-autocast"`` or ``"fp16-autocast"``.
            scheduler: the live learning-rate scheduler.
            normalize: ``"mean"`` (mean of micro-batch losses) or ``"tokens:KEY"`` (weighted by the targets in
                ``batch[KEY]`` that are not -100).
            mode: ``"train"`` or ``"eval"``; modules that differ from it in a model in train mode are remembered.
            seed: seed set before every evaluation of the loss.
            expect: what was meant, compared with what is there: ``optimizer``, ``lr``, ``weight_decay`` (a value, or a
                dict of parameter globs), ``frozen`` and ``trainable`` (globs), ...
            stop_gradient: module paths whose gradients are stopped on purpose.

        Returns:
            The recipe, plain data that can be stored.

        Raises:
            RecipeError: something that cannot be; the text names the argument and the cure.
        """
        from audits.recipe.capture import (
            capture_recipe,  # capture needs Recipe: imported late to keep data and capture apart
        )

        return capture_recipe(
            model,
            batch=batch,
            loss=loss,
            optimizer=optimizer,
            phases=phases,
            step=step,
            clip_grad_norm=clip_grad_norm,
            accumulate=accumulate,
            precision=precision,
            scheduler=scheduler,
            normalize=normalize,
            mode=mode,
            seed=seed,
            expect=expect or {},
            stop_gradient=tuple(stop_gradient),
        )

    @property
    def optimizer_rules(self) -> tuple[CallableReference, ...]:
        """The user's own reference rules that ``expect["optimizer_rule"]`` names."""
        rule = self.expect.get("optimizer_rule")
        rules = list(rule.values()) if isinstance(rule, Mapping) else [] if rule is None else [rule]
        return tuple(CallableReference(r) if isinstance(r, str) else CallableReference.of(r, role=_RULE) for r in rules)

    def on(self, model: nn.Module) -> Recipe:
        """Return the recipe for a model that is compiled: what was captured from the bare module does not know it."""
        compiled = tuple(dict.fromkeys((*self.compiled, *compiled_parts(model, []))))
        return replace(self, compiled=compiled) if compiled != self.compiled else self

    def digest(self) -> str:
        """Return a digest of everything in the recipe, tensors included; a lambda counts by its name only."""
        from audits.recipe.plain_form import recipe_to_plain

        hasher = hashlib.sha256()
        feed(hasher, recipe_to_plain(self, storable=False))
        feed(hasher, self.batch)
        for phase in self.phases:
            feed(hasher, phase.optimizer.state)
        return shortened(hasher)


def feed(hasher: Any, value: Any) -> None:
    """Feed a nested value of tensors, mappings, lists and plain values to a hash."""
    if isinstance(value, torch.Tensor) and value.layout is not torch.strided:  # momentum of sparse gradients
        found = value.detach().to_sparse_coo().coalesce()
        feed(hasher, [list(found.shape), found.indices(), found.values()])
    elif isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        mark = "requires_grad" if value.requires_grad else ""  # a batch's marks decide what gradient.input may fail
        hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}{mark}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            feed(hasher, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            feed(hasher, item)
            hasher.update(b",")
    else:
        hasher.update(json.dumps(value, default=str).encode())
