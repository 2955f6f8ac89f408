"""From the live objects of a training script to a `Recipe`: what the optimizer *really* holds, by identity."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from audits.errors import RecipeError
from audits.leaves import Place, kept_in_loss, kept_in_model
from audits.recipe.attributes import storable_option, to_plain
from audits.recipe.callables import CallableReference
from audits.recipe.compiled_parts import compiled_parts
from audits.recipe.constructing import twin_of
from audits.recipe.moulds import Kept, is_plain, mould_of, patched_step
from audits.recipe.optimizers import build_optimizer
from audits.recipe.overlaps import overlaps_of
from audits.recipe.phases import (
    OptimizerRecipe,
    ParameterGroup,
    ParameterRecord,
    Phase,
    PhaseRecipe,
    SchedulerRecipe,
    UnknownTensor,
)
from audits.recipe.wrappers import (
    checked_phases,
    inner_module,
    precision_of_wrapper,
    refuse_unbuildable,
    rewrapping,
    steps_at_once,
    training_optimizer,
    training_scheduler,
)
from audits.structures import map_tensors

#: Steps of a learning-rate schedule that are simulated and kept: more than the audit takes.
SCHEDULE_STEPS = 16

#: Sharded training keeps parameters where one process cannot see them whole.
_REFUSED = ("FullyShardedDataParallel", "ZeroRedundancyOptimizer", "DTensor", "FSDPModule")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel, `torch.compile` and Fabric's wrappers.

    Raises:
        RecipeError: the model is sharded (FSDP), which one process cannot audit.
    """
    while True:
        if type(model).__name__ in _REFUSED or any(c.__name__ in _REFUSED for c in type(model).__mro__):
            raise RecipeError(
                f"{type(model).__name__} shards its parameters over processes: audit the full model, "
                "built and loaded on one process"
            )
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast("nn.Module", model._orig_mod)
        elif (inner := inner_module(model)) is not None:
            model = inner
        else:
            return model


def canonical_names(model: nn.Module) -> dict[int, str]:
    """Return ``id(parameter) -> name``, the first name of a tied parameter."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def captured_fields(
    model: nn.Module,
    *,
    batch: Any,
    loss: Any,
    optimizer: torch.optim.Optimizer | None,
    phases: Sequence[Phase] | None,
    step: Any,
    clip_grad_norm: float | None,
    accumulate: int,
    scheduler: Any,
    mode: str,
    **fields: Any,
) -> dict[str, Any]:
    """Return the fields of a recipe; `Recipe.capture` documents the arguments."""
    if fields.get("precision") == "native":
        fields["precision"] = precision_of_wrapper(model) or "native"
    wrapped, model = model, unwrap(model)
    if phases is None:
        if loss is None or optimizer is None:
            raise RecipeError("capture needs loss= and optimizer=, or phases=[Phase(...), ...]")
        only = {"clip_grad_norm": clip_grad_norm, "accumulate": accumulate, "scheduler": scheduler}
        phases = [Phase("step", loss=loss, optimizer=optimizer, **only)]
    elif loss is not None or optimizer is not None or clip_grad_norm is not None or accumulate != 1 or scheduler:
        raise RecipeError("with phases=, give loss, optimizer, clip_grad_norm, accumulate and scheduler to each Phase")
    else:
        phases = checked_phases(phases)
    optimizers = [training_optimizer(phase.optimizer, _place("optimizer=", phase)) for phase in phases]
    parameters = dict(model.named_parameters())
    held_somewhere = {id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    orphans = {name: p for name, p in parameters.items() if id(p) not in held_somewhere and p.requires_grad}

    @functools.cache
    def kept() -> dict[int, Place]:
        """Where model and losses keep what is registered nowhere: the optimizer may hold it all the same."""
        in_losses = [kept_in_loss(phase.loss, model) for phase in phases]
        return {key: place for found in (*in_losses, kept_in_model(model)) for key, place in found.items()}

    return dict(
        batch=map_tensors(batch, lambda t: t.detach().cpu().clone().requires_grad_(t.requires_grad)),
        phases=tuple(
            _phase_recipe(phase, live, parameters, orphans, kept)
            for phase, live in zip(phases, optimizers, strict=True)
        ),
        parameters=tuple(
            ParameterRecord(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in parameters.items()
        ),
        ties=ties_of(model),
        overlaps=overlaps_of(model),
        captured_in_eval=mode == "train" and not model.training and any(map(depends_on_mode, model.modules())),
        step=None if step is None else CallableReference.of(step, role="step"),
        mode=mode,
        module_modes=_module_modes(model, mode),
        compiled=compiled_parts(wrapped, [("step", step), *((f"loss {p.name}", p.loss) for p in phases)]),
        **fields,
    )


def _phase_recipe(
    phase: Phase,
    live: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    orphans: dict[str, nn.Parameter],
    kept: Callable[[], Mapping[int, Place]],
) -> PhaseRecipe:
    return PhaseRecipe(
        name=phase.name,
        loss=CallableReference.of(phase.loss, role=_place("loss", phase)),
        optimizer=_captured(phase, live, parameters, orphans, kept),
        clip_grad_norm=phase.clip_grad_norm,
        accumulate=phase.accumulate,
        scheduler=None if phase.scheduler is None else _capture_scheduler(phase, live),
    )


def ties_of(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names that are one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _module_modes(model: nn.Module, mode: str) -> dict[str, bool]:
    """Modules whose mode differs from the declared one; only knowable while the model itself is in that mode."""
    declared = mode == "train"
    if model.training is not declared:
        return {}
    return {name: module.training for name, module in model.named_modules() if module.training is not declared}


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a module asks for its own mode: some method of its class reads ``training``, or cannot be looked into."""
    for base in type(module).__mro__:
        if base is nn.Module:
            break
        for value in vars(base).values():
            code = getattr(value, "__code__", None)
            if code is not None and "training" in code.co_names:
                return True
    return isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule))


def _captured(
    phase: Phase,
    live: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    orphans: Mapping[str, nn.Parameter],
    kept: Callable[[], Mapping[int, Place]],
) -> OptimizerRecipe:
    """The optimizer as data, with what only this process has: the wrapper that it was given in."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    captured = _capture_optimizer(live, names, orphans, kept)
    refuse_unbuildable(live, _place("optimizer=", phase), lambda: build_optimizer(captured, parameters))
    return dataclasses.replace(captured, kept=_kept(live, captured, names), rewrap=rewrapping(phase.optimizer))


def _kept(live: torch.optim.Optimizer, captured: OptimizerRecipe, names: Mapping[int, str]) -> Kept | None:
    """What the optimizer holds beyond class, options and state; None for torch's own with nothing added."""
    options = {key: value for held in (captured.defaults, *(g.options for g in captured.groups))
               for key, value in held.items() if not storable_option(value)}  # fmt: skip
    if is_plain(live) and not options and patched_step(type(live)) is None:
        return None
    held = (tensor for group in live.param_groups for tensor in group["params"])
    known = (p for group in captured.groups for p in group.parameters)
    labels = {id(t): p if isinstance(p, str) else p.label for t, p in zip(held, known, strict=True)}
    mould = mould_of(live, {**names, **labels})
    attributes, missing = to_plain(mould, lambda: twin_of(captured))
    if (patched := patched_step(type(live))) is not None:
        missing = (*missing, f"the step of its class, which {patched} has taken the place of")
    unplain = (f"the option {key!r} of its groups ({type(value).__name__})" for key, value in options.items())
    return Kept(attributes, (*missing, *unplain), mould, live=True)


def _capture_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    orphans: Mapping[str, nn.Parameter],
    kept: Callable[[], Mapping[int, Place]],
) -> OptimizerRecipe:
    if type(optimizer).__name__ in _REFUSED:
        raise RecipeError(f"{type(optimizer).__name__} shards its state over processes: audit the plain optimizer")
    unclaimed = dict(orphans)
    position = 0
    groups = []
    state: dict[str, Mapping[str, Any]] = {}
    for group in optimizer.param_groups:
        held: list[str | UnknownTensor] = []
        for tensor in group["params"]:
            if type(tensor.data).__name__ == "DTensor":
                raise RecipeError("the optimizer holds DTensors: audit the full model on one process")
            name = names.get(id(tensor))
            if name is None:
                place = kept().get(id(tensor))
                likely = next((n for n, p in unclaimed.items() if p.shape == tensor.shape), None)
                unclaimed.pop(likely or "", None)
                path = place.path if place is not None else None
                held.append(UnknownTensor(position, tuple(tensor.shape), str(tensor.dtype), likely, path))
            else:
                held.append(name)
                if optimizer.state.get(tensor):
                    state[name] = map_tensors(dict(optimizer.state[tensor]), lambda t: t.detach().cpu().clone())
            position += 1
        options = {key: _plain_option(value) for key, value in group.items() if key not in ("params", "param_names")}
        groups.append(ParameterGroup(options, tuple(held)))
    cls = type(optimizer)
    return OptimizerRecipe(
        class_path=optimizer_class_path(cls),
        defaults={key: _plain_option(value) for key, value in optimizer.defaults.items()},
        groups=tuple(groups),
        state=state,
        live_class=cls,
    )


def optimizer_class_path(cls: type[torch.optim.Optimizer]) -> str:
    """Return ``torch.optim.AdamW`` rather than the private module it lives in."""
    if getattr(torch.optim, cls.__name__, None) is cls:
        return f"torch.optim.{cls.__name__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def _plain_option(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(_plain_option(item) for item in value)
    return value


def _place(argument: str, phase: Phase) -> str:
    """How a message names a phase's argument."""
    return argument if phase.name == "step" else f"{argument} of phase {phase.name!r}"


def _capture_scheduler(phase: Phase, live: torch.optim.Optimizer) -> SchedulerRecipe:
    """Simulate the schedule on a copy that drives a stand-in optimizer, so that the live one is not touched."""
    scheduler = training_scheduler(phase.scheduler, live, _place("scheduler=", phase))
    optimizer, at_once = scheduler.optimizer, steps_at_once(phase.scheduler)
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(())) for _ in optimizer.param_groups], lr=0.0)
    stand_in.param_groups = [
        {
            **{k: map_tensors(v, torch.clone) for k, v in group.items() if k != "params"},  # a rate kept in a tensor
            "params": stand_in.param_groups[0]["params"],
        }
        for group in optimizer.param_groups
    ]
    simulated = copy.deepcopy(scheduler, memo={id(optimizer): stand_in, id(live): stand_in})
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "scheduler.step() before optimizer.step()": nothing is trained here
        for _ in range(SCHEDULE_STEPS):
            rates.append(tuple(float(group["lr"]) for group in stand_in.param_groups))
            try:
                for _ in range(at_once):
                    simulated.step()
            except TypeError:  # ReduceLROnPlateau wants a metric: its rate is constant until it gets one
                pass
            except ValueError:  # OneCycleLR refuses to step past its end: the rate stays at the last one
                pass
    cls = type(scheduler)
    return SchedulerRecipe(f"{cls.__module__}.{cls.__qualname__}", tuple(rates), rewrapping(phase.scheduler))
