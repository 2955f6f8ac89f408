"""What an optimizer is beyond its class, options and state: attributes set by hand or by its constructor, hooks, steps.

An optimizer built anew from class, options and state is another one wherever these matter. `mould_of` copies the live
object, with stand-ins for its parameters; `cast_from` makes an optimizer of that, on any other parameters.
"""

from __future__ import annotations

import contextlib
import copy
import os.path
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.optim.optimizer as torch_optimizer

from audits.globs import globs_of, matches
from audits.recipe.copying import GONE, SAME, Copier, alike, attributes_of

#: Where torch's own code is.
_TORCH = os.path.dirname(torch.__file__) + os.sep

#: Where torch keeps an optimizer's hooks; those of the step are part of what a training step does.
STEP_HOOKS = {"step pre-hook": "_optimizer_step_pre_hooks", "step post-hook": "_optimizer_step_post_hooks"}
OTHER_HOOKS = {
    "state_dict pre-hook": "_optimizer_state_dict_pre_hooks",
    "state_dict post-hook": "_optimizer_state_dict_post_hooks",
    "load_state_dict pre-hook": "_optimizer_load_state_dict_pre_hooks",
    "load_state_dict post-hook": "_optimizer_load_state_dict_post_hooks",
}
HOOKS = STEP_HOOKS | OTHER_HOOKS

#: Hooks that run at the step of every optimizer of the process.
_GLOBAL: dict[str, Any] = {
    STEP_HOOKS["step pre-hook"]: torch_optimizer._global_optimizer_pre_hooks,
    STEP_HOOKS["step post-hook"]: torch_optimizer._global_optimizer_post_hooks,
}

#: What torch, its schedulers and its loss scaler keep on an optimizer for themselves, or a recipe holds already.
TORCHS_OWN = ("defaults", "param_groups", "state", "step", "_zero_grad_profile_name", "_opt_called", "grad_scale",
              "found_inf", "_warned_capturable_if_run_uncaptured", *HOOKS.values())  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Stands for a parameter: its name in the model, or the label of a tensor that the model does not have."""

    name: str


@dataclass(frozen=True)
class IdOf:
    """Stands for ``id(parameter)``, by which an optimizer may file what it keeps of it."""

    name: str


@dataclass(eq=False)
class Kept:
    """What is kept of an optimizer beyond class, options and state.

    Attributes:
        attributes: the same as plain values (`audits.recipe.attributes`); None where a recipe does not say.
        missing: what could not be made plain, in words: an audit of the stored recipe goes without it.
        mould: a copy of the live object, in the process that captured it.
        live: whether the mould is of the live object: nothing is missing then.
        fresh: values before the first step of those attributes that a step changes; found once.
        replaced: whether the instance's own ``step`` was seen never to reach that of its class.
        begun: whether the constructor itself leaves state for its parameters (Adagrad's sums); None before it is known.
    """

    attributes: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()
    mould: torch.optim.Optimizer | None = None
    live: bool = False
    fresh: dict[str, Any] | None = field(default=None, repr=False)
    replaced: bool = False
    begun: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only this process has: another one goes by the plain values, as a stored recipe does."""
        return {**vars(self), "mould": None, "live": False, "fresh": None}


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether class, options and state are all there is: a class of torch's own, no hook, no ``step`` of its own."""
    own = type(optimizer)
    torchs = getattr(torch.optim, own.__name__, None) is own
    hooked = any(getattr(optimizer, place, None) for place in HOOKS.values()) or any(_GLOBAL.values())
    return torchs and not hooked and own_step(optimizer) is None and not list(_unheld_state(optimizer))


def own_step(optimizer: torch.optim.Optimizer) -> Callable[..., Any] | None:
    """Return the ``step`` that was set on the instance; None where it is the class's, maybe in torch's own wrapping.

    A learning-rate scheduler wraps ``step`` to see that it was called, `torch.compile` to run it faster, accelerate
    puts the class's back as an attribute.
    """
    step = vars(optimizer).get("step")
    if step is None:
        return None
    inside, owners = _within_torchs(step)
    if inside is _within_torchs(type(optimizer).step)[0] and all(owner is optimizer for owner in owners):
        return None
    return cast("Callable[..., Any]", step if isinstance(step, types.MethodType) else inside)


def _within_torchs(function: Any) -> tuple[Any, list[Any]]:
    """Return what torch's own wrappers call in the end, and what the methods among them are bound to.

    A wrapper of the user's is the end, also where `functools.wraps` made it look like another function.
    """
    owners = []
    while True:
        if isinstance(function, types.MethodType):
            owners.append(function.__self__)
            function = function.__func__
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        inner = getattr(function, "__wrapped__", None) or getattr(function, "_torchdynamo_orig_callable", None)
        if inner is None or not file.startswith(_TORCH):
            return function, owners
        function = inner


def patched_step(cls: type[torch.optim.Optimizer]) -> str | None:
    """Return the name of what stands in the place of a torch class's ``step``; None where that is torch's own."""
    if getattr(torch.optim, cls.__name__, None) is not cls:
        return None
    function: Any = cls.step
    while function is not None:
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        if not file.startswith(_TORCH):
            return callable_name(function) if function.__module__ != cls.__module__ else f"a function of {file or 'C'}"
        function = getattr(function, "__wrapped__", None)
    return None


def callable_name(function: Any) -> str:
    """Return ``package.module.function`` of a hook or a wrapped step, for messages and ``expect['step_hooks']``."""
    while hasattr(function, "func") and hasattr(function, "keywords"):
        function = function.func
    if not hasattr(function, "__qualname__"):
        function = type(function)
    return f"{function.__module__}.{function.__qualname__}"


def declared_hook(hook: str, expect: Mapping[str, Any]) -> bool:
    """Whether ``expect["step_hooks"]`` names a hook, in full or from its module's or its own name on."""
    globs = [glob.replace(":", ".") for glob in globs_of(expect.get("step_hooks"))]
    names = {hook, hook.rpartition(".")[2], hook.replace(":", ".")}
    return any(matches(name, globs) for name in names)


def hooks_of(optimizer: torch.optim.Optimizer, kinds: Mapping[str, str] = HOOKS) -> Iterator[tuple[str, Any]]:
    """Yield (kind, hook) in the order in which they run."""
    for kind, place in kinds.items():
        for hook in (getattr(optimizer, place, None) or {}).values():
            yield kind, hook


def mould_of(optimizer: torch.optim.Optimizer, labels: Mapping[int, str]) -> torch.optim.Optimizer:
    """Return a copy of a live optimizer that holds stand-ins for its parameters; its ``step`` is never to be called.

    Args:
        optimizer: the live one; not touched.
        labels: ``id(parameter) -> name or label`` of every parameter of the model and every tensor it holds.
    """

    def replace(given: Any) -> Any:
        if isinstance(given, torch.Tensor) and id(given) in labels:
            return Held(labels[id(given)])
        return IdOf(labels[given]) if type(given) is int and given in labels else SAME

    copier = Copier(replace, _clone)
    mould = blank(type(optimizer))
    copier.remember(optimizer, mould)
    mould.state = copier.remember(optimizer.state, defaultdict(dict))
    copier.into(mould, optimizer, without=("state", "step", "_opt_called", "grad_scale", "found_inf"))
    mould.state.update({copier.value(key): copier.value(value) for key, value in _unheld_state(optimizer)})
    for place, hooks in _GLOBAL.items():  # torch runs those of all optimizers outermost
        others = [copier.value(hook) for hook in hooks.values()]
        own = list(getattr(mould, place).values())
        ordered = [*others, *own] if place == STEP_HOOKS["step pre-hook"] else [*own, *others]
        if others:
            setattr(mould, place, OrderedDict(enumerate(ordered)))
    if (step := own_step(optimizer)) is not None:
        vars(mould)["step"] = copier.value(step)
    return mould


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """Keep hooks on all optimizers off while the body runs: a mould has them as hooks of its own."""
    before = {place: dict(hooks) for place, hooks in _GLOBAL.items()}
    for hooks in _GLOBAL.values():
        hooks.clear()
    try:
        yield
    finally:
        for place, hooks in _GLOBAL.items():
            hooks.clear()
            hooks.update(before[place])


def blank(cls: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return an optimizer that was never initialised: no constructor ran."""
    made = object.__new__(cls)
    made.defaults, made.param_groups, made.state = {}, [], defaultdict(dict)
    for place in HOOKS.values():
        setattr(made, place, OrderedDict())
    made._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
    made._patch_step_function()
    return made


def cast_from(
    mould: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    *,
    place: Callable[[torch.Tensor], torch.Tensor],
    hooks: bool,
    own: bool,
    with_state: bool = True,
    instead: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Return an optimizer made of a mould, on other parameters; what has no parameter there is left out.

    Args:
        mould: what `mould_of` made.
        parameters: by name or label.
        place: the copy of a tensor, where the parameters are.
        hooks: whether the step's hooks come along.
        own: whether the instance's own ``step`` does.
        with_state: whether state that belongs to no parameter comes along.
        instead: values of attributes that take the place of the mould's.
    """

    def replace(given: Any) -> Any:
        if isinstance(given, Held):
            return parameters.get(given.name, GONE)
        if isinstance(given, IdOf):
            return id(parameters[given.name]) if given.name in parameters else GONE
        return SAME

    copier = Copier(replace, place)
    made = blank(type(mould))
    instead = instead or {}
    left_out = (*instead, *(() if own else ("step",)), *(() if hooks else STEP_HOOKS.values()))
    copier.into(made, mould, without=left_out)
    for name, value in instead.items():
        if value is not GONE:
            object.__setattr__(made, name, copier.value(value))
    if not with_state:
        made.state.clear()
    return made


def changed_by(optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> dict[str, Any]:
    """Return the values, before ``step`` ran, of the attributes that it changed."""
    before = {name: Copier(lambda _: SAME, _clone).value(value) for name, value in _private(optimizer)}
    step()
    after = dict(_private(optimizer))
    return {name: value for name, value in before.items() if not alike(value, after.get(name, GONE))}


def emptied(value: Any) -> Any:
    """Return what a counter, a sum or a collection begins with, where no constructor tells."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if type(value) in (int, float):
        return type(value)(0)
    if isinstance(value, (dict, list, set, deque)):
        made = copy.copy(value)
        made.clear()
        return made
    return value


def _private(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in attributes_of(optimizer) if name not in TORCHS_OWN)


def _unheld_state(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, Any]]:
    """Yield the entries of an optimizer's state that are filed under no tensor."""
    return ((key, value) for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor))


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    made = tensor.detach().clone()
    return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made
