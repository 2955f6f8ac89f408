"""What people hand over as optimizer, scheduler and phases: wrappers looked through, everything else refused in words.

A wrapper is looked through where the optimizer inside is what trains (accelerate's, Lightning's, Fabric's: they decide
*when* to step). One that changes gradients or weights around the inner step (LARC, SAM, Lookahead) is refused: judging
the inner optimizer in silence would be a verdict about another training.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError
from audits.recipe.phases import Phase

#: Wrapper class -> attribute that holds what it wraps; by class name in the mro and the package that it comes from.
_OPTIMIZERS = {
    "AcceleratedOptimizer": "optimizer",
    "LightningOptimizer": "_optimizer",
    "_FabricOptimizer": "_optimizer",
}
_SCHEDULERS = {"AcceleratedScheduler": "scheduler", "LRSchedulerConfig": "scheduler"}
_MODULES = {"_FabricModule": "module"}
_PACKAGES = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")

#: Fabric's names of mixed precision -> the recipe's.
_FABRIC_PRECISIONS = {"bf16-mixed": "bf16-autocast", "16-mixed": "fp16-autocast"}


def checked_phases(phases: Any) -> list[Phase]:
    """Return the phases of ``phases=``.

    Raises:
        RecipeError: it is no sequence of `Phase`.
    """
    cure = "give a list, phases=[Phase('name', loss=..., optimizer=...), ...]"
    if isinstance(phases, (Phase, str, Mapping)) or not isinstance(phases, Iterable):
        raise RecipeError(f"phases= is {_named(phases)}: {cure}")
    listed = list(phases)
    for position, phase in enumerate(listed):
        if not isinstance(phase, Phase):
            raise RecipeError(f"phases[{position}] is {_named(phase)}, not a Phase: {cure}")
    return listed


def training_optimizer(given: Any, place: str = "optimizer=") -> torch.optim.Optimizer:
    """Return the `torch.optim.Optimizer` that really trains: ``given``, or what its transparent wrappers hold.

    Args:
        given: what the caller passed.
        place: how messages name the argument.

    Raises:
        RecipeError: it is no optimizer, or one whose wrapper changes what the inner optimizer does.
    """
    while (held := _held(given, _OPTIMIZERS)) is not None:
        given = held
    if isinstance(given, torch.optim.Optimizer):
        _refuse_two_steps(given, place)
        return given
    raise RecipeError(f"{place} {_no_optimizer(given)}")


def refuse_unbuildable(optimizer: torch.optim.Optimizer, place: str, build: Callable[[], object]) -> None:
    """Refuse an optimizer that holds another one and cannot be built anew from its groups and options.

    Raises:
        RecipeError: ``build`` failed.
    """
    if (inner := _inner_optimizer(optimizer)) is None:
        return
    try:
        build()
    except Exception as error:
        raise RecipeError(f"{place} {_wraps(optimizer, *inner)}") from error


def rewrapping(given: Any) -> Callable[..., Any] | None:
    """Return what puts accelerate's wrapper around the optimizer or schedule that a step function is handed.

    Under ``accelerator.accumulate`` the wrappers let ``step`` and ``zero_grad`` through at every k-th micro-batch only.
    An optimizer's with a loss scaler stays off: the audit's own ``context.scaler`` scales. None for anything else.
    """
    if not hasattr(given, "gradient_state"):
        return None
    wrapper: Callable[..., Any] = type(given)
    if _held(given, _SCHEDULERS) is not None:  # what the schedule replays is per training step already
        return functools.partial(wrapper, step_with_optimizer=given.step_with_optimizer, split_batches=True)
    if _held(given, _OPTIMIZERS) is None or given.scaler is not None:
        return None
    return functools.partial(wrapper, device_placement=False)


def training_scheduler(given: Any, optimizer: torch.optim.Optimizer, place: str = "scheduler=") -> Any:
    """Return the scheduler that really sets the rates, looked for inside wrappers and Lightning's configurations.

    Raises:
        RecipeError: it is no scheduler, or one of another optimizer.
    """
    if isinstance(given, Mapping) and "scheduler" in given:
        given = given["scheduler"]
    while (held := _held(given, _SCHEDULERS)) is not None:
        given = held
    if isinstance(given, type):
        raise RecipeError(f"{place} is the class {given.__name__}: build it, {given.__name__}(optimizer, ...), and "
                          "pass the scheduler itself")  # fmt: skip
    if isinstance(given, (list, tuple, dict)):
        raise RecipeError(f"{place} is {_named(given)}: pass the one scheduler that is stepped with the optimizer; "
                          "torch.optim.lr_scheduler.ChainedScheduler makes one of several")  # fmt: skip
    if isinstance(given, torch.optim.Optimizer):
        raise RecipeError(f"{place} is the optimizer {type(given).__name__}: pass it as optimizer=, and its "
                          "learning-rate scheduler here")  # fmt: skip
    driven = getattr(given, "optimizer", None)
    if driven is None or not callable(getattr(given, "step", None)):
        raise RecipeError(f"{place} is {_named(given)}, which drives no optimizer: pass the live "
                          "torch.optim.lr_scheduler object, or leave it out and set the rate in step=")  # fmt: skip
    while (held := _held(driven, _OPTIMIZERS)) is not None:
        driven = held
    if not _same_groups(driven, optimizer):
        raise RecipeError(f"{place} ({type(given).__name__}) drives another optimizer ({type(driven).__name__}) than "
                          "the one given: the rates it sets never reach this one; build it on the optimizer that "
                          "trains")  # fmt: skip
    return given


def steps_at_once(given: Any) -> int:
    """Return how often one ``step()`` of the given scheduler steps the inner one: accelerate's, once per process."""
    if _held(given, _SCHEDULERS) is None or type(given).__name__ != "AcceleratedScheduler":
        return 1
    if given.split_batches or not given.step_with_optimizer:
        return 1
    states = (getattr(optimizer, "accelerator_state", None) for optimizer in given.optimizers)
    return max(int(getattr(state, "num_processes", 1)) for state in states)


def inner_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper of Lightning's Fabric, None for any other module."""
    held = _held(model, _MODULES)
    return held if isinstance(held, nn.Module) else None


def precision_of_wrapper(model: Any) -> str | None:
    """Return the recipe's name of the autocast that a Fabric wrapper runs its module under, None without one.

    accelerate changes the module's own ``forward``, which stays: what it does is done in every audit of the live model.
    """
    if _held(model, _MODULES) is None:
        return None
    strategy = getattr(model, "_strategy", None)
    return _FABRIC_PRECISIONS.get(str(getattr(getattr(strategy, "precision", None), "precision", None)))


def _held(given: Any, wrappers: Mapping[str, str]) -> Any:
    """What a known wrapper holds, None if ``given`` is none."""
    for cls in type(given).__mro__:
        if cls.__name__ in wrappers and cls.__module__.partition(".")[0] in _PACKAGES:
            return getattr(given, wrappers[cls.__name__])
    return None


def _refuse_two_steps(optimizer: torch.optim.Optimizer, place: str) -> None:
    """Refuse SAM and its kind: the gradient it steps with is taken at other weights than the ones it moves."""
    if not (callable(getattr(optimizer, "first_step", None)) and callable(getattr(optimizer, "second_step", None))):
        return
    name = type(optimizer).__name__
    inner = _inner_optimizer(optimizer)
    base = f"optimizer={name.lower()}.{inner[0]}" if inner else "the optimizer that makes its second step"
    raise RecipeError(
        f"{place} is {name}, which steps twice (first_step, second_step) with a gradient from other weights than those "
        f"it moves: pass {base} and no step=, which audits the loss's gradients and "
        f"{type(inner[1]).__name__ if inner else 'that optimizer'}'s own rule; {name}'s ascent is then not audited"
    )


def _no_optimizer(given: Any) -> str:
    """Say what was given in an optimizer's place, and the cure."""
    if given is None:
        return "is None: pass the live optimizer that trains the model"
    if isinstance(given, type):
        return f"is the class {given.__name__}: build it, {given.__name__}(...), and pass the optimizer that trains"
    if isinstance(given, str):
        return (f"is the text {given!r}: pass the live optimizer; what is meant is declared by "
                f"expect={{'optimizer': {given!r}}}")  # fmt: skip
    if isinstance(given, Mapping) and {"state", "param_groups"} <= given.keys():
        return "is a state_dict: pass the optimizer itself, whose state is captured with it"
    if isinstance(given, (Mapping, Sequence)):
        if len(given) == 1:
            return f"is {_named(given)}: pass the optimizer in it"
        return (
            f"is {_named(given)}: give each optimizer its phase, phases=[Phase('name', loss=..., optimizer=...), ...]"
        )
    if isinstance(given, nn.Module):
        return f"is the module {type(given).__name__}: pass the optimizer that trains it"
    if inspect.isroutine(given) or hasattr(given, "func"):
        return "is a function that makes an optimizer: pass the optimizer that it made and that trains the model"
    if (inner := _inner_optimizer(given)) is not None:
        if callable(getattr(given, "get_last_lr", None)):
            return (f"is the scheduler {type(given).__name__}: pass optimizer=scheduler.{inner[0]}, and the scheduler "
                    "as scheduler=")  # fmt: skip
        return _wraps(given, *inner)
    lacks = "" if hasattr(given, "param_groups") else " and has no param_groups"
    return (f"is {_named(given)}, which is not a torch.optim.Optimizer{lacks}: pass the torch.optim.Optimizer that "
            "trains the model")  # fmt: skip


def _wraps(given: Any, attribute: str, inner: torch.optim.Optimizer) -> str:
    name, rule = type(given).__name__, type(inner).__name__
    own = "" if isinstance(given, torch.optim.Optimizer) else " and is not a torch.optim.Optimizer itself"
    return (f"is {name}, which wraps {rule} in .{attribute}{own}: it cannot be rebuilt for an audit; pass "
            f"optimizer={name.lower()}.{attribute} and no step=, which audits the loss's gradients and {rule}'s own "
            f"rule; what {name} adds is then not audited")  # fmt: skip


def _inner_optimizer(given: Any) -> tuple[str, torch.optim.Optimizer] | None:
    """The attribute that holds an optimizer, and that optimizer."""
    own = getattr(given, "__dict__", None) or {}
    return next(((n, v) for n, v in own.items() if isinstance(v, torch.optim.Optimizer) and v is not given), None)


def _same_groups(one: Any, other: torch.optim.Optimizer) -> bool:
    """Whether two optimizers are one, or share their param groups, as a wrapper and what it wraps do."""
    if one is other:
        return True
    groups = {id(group) for group in getattr(one, "param_groups", ())}
    return any(id(group) in groups for group in other.param_groups)


def _named(value: Any) -> str:
    """``a list of 2``, ``None``, ``a GradScaler``: what a message calls a value."""
    if value is None:
        return "None"
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    size = f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else ""
    return f"{article} {name}{size}"
