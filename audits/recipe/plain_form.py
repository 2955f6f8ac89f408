"""A recipe as plain values and back: the shape of ``recipe.yaml``. Tensors (batch, state) travel beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audits.errors import RecipeError
from audits.recipe.attributes import option_from_plain, option_to_plain, storable_option
from audits.recipe.callables import CallableReference
from audits.recipe.keys import check_keys
from audits.recipe.moulds import Kept
from audits.recipe.overlaps import Overlap
from audits.recipe.phases import (
    OptimizerRecipe,
    ParameterGroup,
    ParameterRecord,
    PhaseRecipe,
    SchedulerRecipe,
    UnknownTensor,
)
from audits.recipe.recipe import Recipe

#: Version of the stored format.
SCHEMA = 1

_RECIPE_KEYS = (
    "schema",
    "phases",
    "step",
    "precision",
    "normalize",
    "mode",
    "module_modes",
    "seed",
    "expect",
    "stop_gradient",
    "parameters",
    "ties",
    "overlaps",
    "captured_in_eval",
    "assumed",
    "compiled",
)
_PHASE_KEYS = ("name", "loss", "optimizer", "clip_grad_norm", "accumulate", "scheduler")
_OPTIMIZER_KEYS = ("class", "defaults", "groups", "attributes", "missing")
_GROUP_KEYS = ("options", "parameters")
_STALE_KEYS = ("stale", "shape", "dtype", "likely", "path")
_OVERLAP_KEYS = ("first", "second", "elements")
_PARAMETER_KEYS = ("name", "shape", "dtype", "trainable")


def recipe_to_plain(recipe: Recipe, *, storable: bool = True) -> dict[str, Any]:
    """Return everything but the tensors, in plain lists and dicts.

    Args:
        recipe: the recipe.
        storable: refuse callables that no other process could find; False names them by what they call themselves.

    Raises:
        RecipeError: a lambda or closure in a recipe that is to be stored.
    """
    return {
        "schema": SCHEMA,
        "mode": recipe.mode,
        "precision": recipe.precision,
        "normalize": recipe.normalize,
        "seed": recipe.seed,
        "step": None if recipe.step is None else _callable_to_plain(recipe.step, storable),
        "expect": _expect_to_plain(recipe.expect, storable),
        "stop_gradient": list(recipe.stop_gradient),
        "assumed": sorted(recipe.assumed),
        **({"compiled": list(recipe.compiled)} if recipe.compiled else {}),
        "phases": [_phase_to_plain(phase, storable) for phase in recipe.phases],
        "module_modes": dict(recipe.module_modes),
        "ties": [list(names) for names in recipe.ties],
        **_seldom_to_plain(recipe),
        "parameters": [
            {"name": p.name, "shape": list(p.shape), "dtype": p.dtype, "trainable": p.trainable}
            for p in recipe.parameters
        ],
    }


def _seldom_to_plain(recipe: Recipe) -> dict[str, Any]:
    """Keys of findings at capture, left out where there are none: digests of healthy recipes stay as they were."""
    plain: dict[str, Any] = {}
    if recipe.overlaps:
        plain["overlaps"] = [{"first": o.first, "second": o.second, "elements": o.elements} for o in recipe.overlaps]
    if recipe.captured_in_eval:
        plain["captured_in_eval"] = True
    return plain


def recipe_from_plain(plain: Mapping[str, Any], *, batch: Any, state: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Build a recipe from plain values and its tensors.

    Args:
        plain: what `recipe_to_plain` returns; optional keys may be left out.
        batch: the batch, or list of micro-batches.
        state: optimizer state by phase name, then parameter name.

    Raises:
        RecipeError: an unknown or missing key, named with its place and the nearest known one.
    """
    check_keys(plain, "recipe", _RECIPE_KEYS, required=("schema", "phases"))
    if plain["schema"] != SCHEMA:
        raise RecipeError(f"recipe.schema is {plain['schema']!r}; this gradaudit reads {SCHEMA}")
    phases = plain["phases"]
    if not isinstance(phases, list):
        raise RecipeError(f"recipe.phases must be a list, not {type(phases).__name__}")
    return Recipe(
        batch=batch,
        phases=tuple(_phase_from_plain(p, f"recipe.phases[{i}]", state) for i, p in enumerate(phases)),
        parameters=tuple(_parameter(p, f"recipe.parameters[{i}]") for i, p in enumerate(plain.get("parameters") or [])),
        ties=tuple(tuple(names) for names in plain.get("ties") or []),
        overlaps=tuple(_overlap(o, f"recipe.overlaps[{i}]") for i, o in enumerate(plain.get("overlaps") or [])),
        captured_in_eval=bool(plain.get("captured_in_eval", False)),
        step=None if plain.get("step") is None else _callable_from_plain(plain["step"], "recipe.step"),
        precision=plain.get("precision", "native"),
        normalize=plain.get("normalize", "auto"),
        mode=plain.get("mode", "train"),
        module_modes=dict(plain.get("module_modes") or {}),
        seed=int(plain.get("seed", 0)),
        expect=dict(plain.get("expect") or {}),
        stop_gradient=tuple(plain.get("stop_gradient") or ()),
        assumed=frozenset(plain.get("assumed") or ()),
        compiled=tuple(plain.get("compiled") or ()),
    )


def _phase_to_plain(phase: PhaseRecipe, storable: bool) -> dict[str, Any]:
    return {
        "name": phase.name,
        "loss": _callable_to_plain(phase.loss, storable),
        "clip_grad_norm": phase.clip_grad_norm,
        "accumulate": phase.accumulate,
        "scheduler": None
        if phase.scheduler is None
        else {
            "class": phase.scheduler.class_path,
            "learning_rates": [list(rates) for rates in phase.scheduler.learning_rates],
        },
        "optimizer": {
            "class": phase.optimizer.class_path,
            "defaults": _options_to_plain(phase.optimizer.defaults),
            "groups": [
                {
                    "options": _options_to_plain(group.options),
                    "parameters": [_held_to_plain(p) for p in group.parameters],
                }
                for group in phase.optimizer.groups
            ],
            **_kept_to_plain(phase.optimizer.kept),
        },
    }


def _phase_from_plain(plain: Any, place: str, state: Mapping[str, Mapping[str, Any]]) -> PhaseRecipe:
    check_keys(plain, place, _PHASE_KEYS, required=("name", "loss", "optimizer"))
    optimizer = plain["optimizer"]
    check_keys(optimizer, f"{place}.optimizer", _OPTIMIZER_KEYS, required=("class", "groups"))
    groups = []
    for index, group in enumerate(optimizer["groups"]):
        where = f"{place}.optimizer.groups[{index}]"
        check_keys(group, where, _GROUP_KEYS, required=("parameters",))
        held = tuple(_held_from_plain(p, where) for p in group["parameters"])
        groups.append(ParameterGroup(_options_from_plain(group.get("options")), held))
    scheduler = plain.get("scheduler")
    if scheduler is not None:
        check_keys(scheduler, f"{place}.scheduler", ("class", "learning_rates"), required=("class", "learning_rates"))
        rates = tuple(tuple(float(rate) for rate in step) for step in scheduler["learning_rates"])
        scheduler = SchedulerRecipe(scheduler["class"], rates)
    return PhaseRecipe(
        name=plain["name"],
        loss=_callable_from_plain(plain["loss"], f"{place}.loss"),
        optimizer=OptimizerRecipe(
            class_path=optimizer["class"],
            defaults=_options_from_plain(optimizer.get("defaults")),
            groups=tuple(groups),
            state=state.get(plain["name"], {}),
            kept=_kept_from_plain(optimizer, f"{place}.optimizer"),
        ),
        clip_grad_norm=plain.get("clip_grad_norm"),
        accumulate=int(plain.get("accumulate", 1)),
        scheduler=scheduler,
    )


def _kept_to_plain(kept: Kept | None) -> dict[str, Any]:
    """Left out for torch's own optimizers with nothing added to them: their digests stay as they were."""
    if kept is None or kept.attributes is None:
        return {}
    return {"attributes": kept.attributes, **({"missing": list(kept.missing)} if kept.missing else {})}


def _kept_from_plain(plain: Mapping[str, Any], place: str) -> Kept | None:
    if "attributes" not in plain and "missing" not in plain:
        return None
    attributes = plain.get("attributes") or {}
    if not isinstance(attributes, Mapping):
        raise RecipeError(f"{place}.attributes must be a mapping, not {type(attributes).__name__}")
    return Kept(attributes, tuple(str(name) for name in plain.get("missing") or ()))


def _options_to_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain values, without those that cannot be: the optimizer's ``missing`` names them."""
    plain = {}
    for key, value in options.items():
        try:
            plain[str(key)] = _plain(value)
        except RecipeError:
            if storable_option(value):
                plain[str(key)] = _plain(option_to_plain(value))
    return plain


def _options_from_plain(plain: Any) -> dict[str, Any]:
    return {key: option_from_plain(_from_plain(value)) for key, value in (plain or {}).items()}


def _callable_to_plain(reference: CallableReference, storable: bool) -> Any:
    if reference.path is None and not storable:
        return f"<{reference.describe()}>"
    if reference.path is None:
        raise RecipeError(
            f"{reference.describe()} is a lambda, closure or notebook cell: it works in process but cannot be stored. "
            "Cure: move it to a module that can be imported, and pass it or its path 'package.module:function'"
        )
    if reference.arguments is None:
        return reference.path
    return {"module": reference.path, "arguments": _plain(reference.arguments)}


def _expect_to_plain(expect: Mapping[str, Any], storable: bool) -> Any:
    """Declarations are plain but for the user's own rule, a function (or one a phase): its import path."""

    def path(value: Any) -> Any:
        return _callable_to_plain(CallableReference.of(value, role="expect['optimizer_rule']"), storable)

    rule = expect.get("optimizer_rule")
    if isinstance(rule, Mapping):
        rule = {phase: path(value) for phase, value in rule.items()}
    elif rule is not None and not isinstance(rule, str):
        rule = path(rule)
    return _plain({**expect, "optimizer_rule": rule} if rule is not None else expect)


def _callable_from_plain(plain: Any, place: str) -> CallableReference:
    if isinstance(plain, str):
        return CallableReference(plain)
    check_keys(plain, place, ("module", "arguments"), required=("module",))
    return CallableReference(plain["module"], _from_plain(plain.get("arguments") or {}))


def _held_to_plain(held: str | UnknownTensor) -> Any:
    if isinstance(held, str):
        return held
    plain = {"stale": held.position, "shape": list(held.shape), "dtype": held.dtype, "likely": held.likely}
    return {**plain, **({"path": held.path} if held.path is not None else {})}


def _held_from_plain(plain: Any, place: str) -> str | UnknownTensor:
    if isinstance(plain, str):
        return plain
    check_keys(plain, f"{place}.parameters", _STALE_KEYS, required=("stale", "shape", "dtype"))
    shape, likely, path = tuple(plain["shape"]), plain.get("likely"), plain.get("path")
    return UnknownTensor(int(plain["stale"]), shape, plain["dtype"], likely, path)


def _parameter(plain: Any, place: str) -> ParameterRecord:
    check_keys(plain, place, _PARAMETER_KEYS, required=_PARAMETER_KEYS)
    return ParameterRecord(plain["name"], tuple(plain["shape"]), plain["dtype"], bool(plain["trainable"]))


def _overlap(plain: Any, place: str) -> Overlap:
    check_keys(plain, place, _OVERLAP_KEYS, required=_OVERLAP_KEYS)
    return Overlap(str(plain["first"]), str(plain["second"]), int(plain["elements"]))


def _plain(value: Any) -> Any:
    """Tuples become ``{"tuple": [...]}`` so that betas come back as what optimizers expect."""
    if isinstance(value, tuple):
        return {"tuple": [_plain(item) for item in value]}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecipeError(f"a recipe stores plain values, not {type(value).__name__}: {value!r}")


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"tuple"}:
            return tuple(_from_plain(item) for item in value["tuple"])
        return {key: _from_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    return value
