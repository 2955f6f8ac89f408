"""What one training step of a model is, as plain data: batch, loss, optimizer, phases.

A `Recipe` is made by `Recipe.capture` from live objects (`audits.recipe.capture`), stored and read by
`registry_models.recipes.recipe_files`, and made live again by `audits.live.subject`. It holds parameter *names*, never
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError, suggest, unknown_among
from audits.recipe.callables import CallableReference
from audits.recipe.capture import captured_fields, unwrap
from audits.recipe.compiled_parts import compiled_parts
from audits.recipe.declared_names import check_names
from audits.recipe.overlaps import Overlap
from audits.recipe.phases import ParameterRecord, Phase, PhaseRecipe

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
    "input_gradients",
)


_RULE = "expect['optimizer_rule']"


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
    normalize: str = "auto"
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
                f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}"
                f"{suggest(self.precision, PRECISIONS)}"
            )
        if self.mode not in ("train", "eval"):
            raise RecipeError(f"mode must be 'train' or 'eval', not {self.mode!r}")
        if self.normalize not in ("auto", "mean") and not self.normalize.startswith("tokens:"):
            raise RecipeError(f"normalize must be 'auto', 'mean' or 'tokens:KEY', not {self.normalize!r}")
        for phase in self.phases:
            if phase.accumulate < 1:
                raise RecipeError(f"accumulate must be at least 1, not {phase.accumulate}")
            if phase.clip_grad_norm is not None and not phase.clip_grad_norm > 0:
                raise RecipeError(f"clip_grad_norm must be positive, not {phase.clip_grad_norm}")
        if unknown := unknown_among(self.expect, EXPECTATIONS):
            raise RecipeError(f"expect has unknown key {unknown}")

    @classmethod
    def capture(
        cls,
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
        normalize: str = "auto",
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
            normalize: how micro-batches weigh: ``"auto"`` (as the losses tell, so that the step belongs to the loss
                of the whole batch), ``"mean"`` (mean of micro-batch losses) or ``"tokens:KEY"`` (by the targets in
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
        fields = captured_fields(
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
        recipe = cls(**fields)
        check_names(recipe, unwrap(model))
        return recipe

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
