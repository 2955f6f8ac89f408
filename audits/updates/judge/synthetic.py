"""Synthetic tensors and gradients for an optimizer build: no forward pass, and gradients a batch rarely has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from audits.live.subject import LivePhase, Subject
from audits.recipe.optimizers import RUNNING
from audits.recipe.phases import OptimizerRecipe, ParameterGroup
from audits.updates.compare import real_dtype, rms, to_double
from audits.updates.judge.apply_rule import copy_state, reference_update, rule_options
from audits.updates.judge.kernels import with_scalar_options
from audits.updates.rules import Rule, State

#: Steps of the probe: RAdam's rectification starts at the sixth.
PROBE_STEPS = 8

#: Gradient scale per step, times the sign-flipped or fresh draw: unit, flipped, zero, large, small (amsgrad shows
#: only when a small gradient follows a large one), half zero, unit, small.
SCALES = (1.0, -0.5, 0.0, 100.0, 1e-3, 1.0, 1.0, 1e-3)

#: float16 squares overflow above 255.
LARGEST_HALF = 10.0

#: Long enough for several SIMD blocks and a tail; a matrix whose rows are no multiple of a block; a short vector.
SHAPES: tuple[tuple[int, ...], ...] = ((1031,), (17, 24), (3,))
MATRICES: tuple[tuple[int, ...], ...] = ((17, 24), (24, 17), (32, 32))
TABLES: tuple[tuple[int, ...], ...] = ((23, 5), (40, 8))

#: Distinct option sets that are probed: layer-wise rates repeat the same kernel.
MAX_GROUPS = 6

#: Smallest weight scale in float16, whose spacing does not shrink below 6e-5.
SMALLEST_HALF = 1e-3


@dataclass
class Synthetic:
    """Weights and gradients for every probe step of one phase's optimizer.

    Attributes:
        recipe: the optimizer on synthetic names instead of the model's.
        native: the native dtype of each tensor.
        options: each tensor's group options.
        weights: per step, in the native dtype: of the size of the update, so that the update shows.
        wide: per step, in float64 at unit scale: the float64 lane's.
        gradients: per step, in the native dtype.
    """

    recipe: OptimizerRecipe
    native: dict[str, torch.dtype]
    options: dict[str, dict[str, Any]]
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    wide: list[dict[str, torch.Tensor]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor | None]] = field(default_factory=list)


def synthesize(subject: Subject, phase: LivePhase, rule: Rule | None, seed: int) -> Synthetic:
    """Draw the probe's tensors for a phase's optimizer.

    Args:
        subject: for the dtypes of the parameters and the device.
        phase: whose optimizer.
        rule: its rule, which sizes the weights and chooses shapes; None for a class without one.
        seed: seed of the draws; the global generators are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    synthetic = _layout(subject, phase, rule)
    previous: dict[str, torch.Tensor] = {}
    states: dict[str, State] = {name: {} for name in synthetic.native}
    shapes = {name: _shape_of(name, rule, synthetic) for name in synthetic.native}
    for scale in SCALES[:PROBE_STEPS]:
        weights: dict[str, torch.Tensor] = {}
        wide: dict[str, torch.Tensor] = {}
        gradients: dict[str, torch.Tensor | None] = {}
        for name, dtype in synthetic.native.items():
            draw = _normal(shapes[name], dtype, generator)
            base = previous.get(name, draw) if scale < 0 else draw
            previous[name] = base
            if len(gradients) % 2 and scale == 1.0:
                base = base * (_normal(shapes[name], torch.float64, generator) > 0)
            limit = LARGEST_HALF if dtype is torch.float16 else abs(scale)
            value = (base * (scale if abs(scale) <= limit else limit)).to(dtype)
            gradient = _sparse(value, generator) if rule is not None and rule.sparse else value
            unit = _normal(shapes[name], dtype, generator)
            size = _update_size(phase, rule, unit, gradient, states[name], synthetic.options[name], dtype)
            if dtype is torch.float16:
                size = max(size, SMALLEST_HALF)
            weights[name] = (unit * size).to(dtype).to(subject.device)
            wide[name] = unit.to(subject.device)
            gradients[name] = gradient.to(subject.device)
        synthetic.weights.append(weights)
        synthetic.wide.append(wide)
        synthetic.gradients.append(gradients)
    return synthetic


def _layout(subject: Subject, phase: LivePhase, rule: Rule | None) -> Synthetic:
    shapes = MATRICES if rule is not None and rule.matrices else TABLES if rule is not None and rule.sparse else SHAPES
    native: dict[str, torch.dtype] = {}
    options: dict[str, dict[str, Any]] = {}
    groups: list[ParameterGroup] = []
    seen: list[tuple[dict[str, Any], set[torch.dtype]]] = []
    for group in phase.recipe.optimizer.groups:
        chosen = {key: value for key, value in group.options.items() if key not in RUNNING}
        if not chosen.get("lr", 1.0):  # a schedule at 0 shows nothing: the probe takes the rate it started from
            chosen["lr"] = chosen.get("initial_lr") or phase.recipe.optimizer.defaults.get("lr") or 1e-3
        dtypes = {subject.parameters[n].dtype for n in group.parameters if isinstance(n, str)}
        if not dtypes or any(chosen == known and dtypes <= had for known, had in seen) or len(groups) >= MAX_GROUPS:
            continue
        seen.append((chosen, dtypes))
        names = []
        for dtype in sorted(dtypes, key=str):
            for index in range(len(shapes)):
                name = f"synthetic.{len(groups)}.{str(dtype).removeprefix('torch.')}.{index}"
                native[name], options[name] = dtype, chosen
                names.append(name)
        groups.append(ParameterGroup(chosen, tuple(names)))
    recipe = dataclasses.replace(phase.recipe.optimizer, groups=tuple(groups), state={})
    return Synthetic(recipe, native, options)


def _shape_of(name: str, rule: Rule | None, synthetic: Synthetic) -> tuple[int, ...]:
    shapes = MATRICES if rule is not None and rule.matrices else TABLES if rule is not None and rule.sparse else SHAPES
    return shapes[int(name.rpartition(".")[2])]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator)


def _sparse(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    rows = torch.randperm(value.shape[0], generator=generator)[: value.shape[0] // 2].sort().values
    return torch.sparse_coo_tensor(rows[None], value[rows], value.shape, check_invariants=False).coalesce()


def _update_size(
    phase: LivePhase, rule: Rule | None, unit: torch.Tensor, gradient: torch.Tensor, state: State,
    options: Mapping[str, Any], dtype: torch.dtype,
) -> float:  # fmt: skip
    """Return the rms of the rule's update of zero weights: weights of that size show it to their last digits."""
    if rule is None:
        return 1.0
    chosen = rule_options(phase, options, real_dtype(dtype))
    update = reference_update(rule, torch.zeros_like(to_double(unit)), gradient, state, chosen)
    return rms(update) or 1e-2


def reference_updates(
    phase: LivePhase, synthetic: Synthetic, rule: Rule, lane: str, overrides: Mapping[str, Any] | None = None
) -> list[dict[str, tuple[torch.Tensor, torch.Tensor, State, dict[str, Any]]]]:
    """Return per step and tensor (theta, d_ref, state before, options), the state running free.

    Args:
        phase: whose optimizer.
        synthetic: the probe's tensors.
        rule: the rule.
        lane: ``weights`` or ``wide``.
        overrides: options that choose another implementation.
    """
    states: dict[str, State] = {name: {} for name in synthetic.native}
    found = []
    for weights, gradients in zip(getattr(synthetic, lane), synthetic.gradients, strict=True):
        step = {}
        for name, weight in weights.items():
            theta = to_double(weight)
            native = real_dtype(synthetic.native[name])
            plain = rule_options(phase, {**synthetic.options[name], **(overrides or {})}, native)
            options = with_scalar_options(phase, rule, plain, states[name], torch.float64 if lane == "wide" else native)
            gradient = gradients[name]
            assert gradient is not None
            before = copy_state(states[name])
            step[name] = (theta, reference_update(rule, theta, gradient, states[name], options), before, options)
        found.append(step)
    return found
