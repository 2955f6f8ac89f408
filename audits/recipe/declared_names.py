"""What a recipe declares by name is there: module paths of `stop_gradient`, parameter globs and the rest of `expect`.

A name that matches nothing would be a declaration that nobody checks, so it is an error, at capture and at the audit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import nn

from audits.errors import RecipeError, SettingsError, suggest
from audits.globs import globs_of, matching
from audits.leaves import LOSS, kept_in_model
from audits.recipe.constructing import mould_of_recipe
from audits.recipe.moulds import STEP_HOOKS, callable_name, declared_hook, hooks_of, own_step
from audits.structures import tensors_in

if TYPE_CHECKING:
    from audits.recipe.recipe import Recipe

#: Reentrant checkpointing's own Function.
_CHECKPOINT = torch.utils.checkpoint.CheckpointFunction.__qualname__

#: Keys of ``expect`` that hold globs of parameters.
_GLOBS = ("frozen", "trainable", "shared", "writes_outside_step")

#: Keys of ``expect`` that hold a value, or a mapping of phases, of globs, or of phases of globs, to values.
_BY_GLOB = ("lr", "weight_decay", "betas", "momentum", "eps", "amsgrad", "nesterov", "maximize")

#: What ``expect["ema"][prefix]["buffers"]`` may say; "left" is for buffers that `update_bn` computes at the end.
BUFFERS_FOLLOW = ("copied", "averaged", "left")

#: What ``expect["ema"][prefix]["when"]`` may say: weights after the step, or those from before it.
WHEN_FOLLOWED = ("after", "before")


def check_names(recipe: Recipe, model: nn.Module) -> None:
    """Check every name that the recipe declares against the model.

    Args:
        recipe: the recipe.
        model: the module it was captured from, or is to be carried out on.

    Raises:
        RecipeError: a name matches nothing; the text says where it stands and what is nearest.
    """
    names = _Names(model, [phase.name for phase in recipe.phases])
    if not isinstance(model, torch.fx.GraphModule):  # an exported graph keeps the parameters' names, not the modules'
        for path in recipe.stop_gradient:
            names.require_module(path)
    for key in _GLOBS:
        for glob in globs_of(recipe.expect.get(key)):
            if key == "frozen" and (glob.startswith(f"{LOSS}.") or matching(_unregistered(model), glob)):
                continue  # what the loss, or the model, holds without registering it may be frozen too
            names.require_parameter(glob, f"expect[{key!r}]")
    for key in _BY_GLOB:
        names.require_mapping(recipe.expect.get(key), f"expect[{key!r}]")
    for glob in globs_of(recipe.expect.get("step_hooks")):
        _require_hook(glob, recipe)
    inputs = _floating_inputs(recipe.batch)
    for glob in globs_of(recipe.expect.get("input_gradients")):
        if not matching(inputs, glob):
            place = f"expect['input_gradients'] names {glob!r}, and the batch has no such floating tensor"
            raise RecipeError(place + (suggest(glob, inputs) or f"; it has {', '.join(inputs) or 'none'}"))
    optimizer = recipe.expect.get("optimizer")
    for phase in optimizer if isinstance(optimizer, Mapping) else ():
        names.require_phase(phase, "expect['optimizer']")
    for prefix, what in _shadows(recipe.expect.get("ema")).items():
        names.require_prefix(prefix, "expect['ema']")
        names.require_prefix(what["source"], f"expect['ema'][{prefix!r}]['source']")


def _shadows(declared: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return what ``expect["ema"]`` declares.

    Raises:
        RecipeError: it has another form, of which nothing would be checked.
    """
    if declared is None:
        return {}
    form = "expect['ema'] maps a shadow to what it follows, {'teacher': {'source': 'student', 'decay': 0.99}}"
    if not isinstance(declared, Mapping):
        raise RecipeError(f"{form}; it is {declared!r}")
    for prefix, what in declared.items():
        if not isinstance(what, Mapping) or not isinstance(what.get("source"), str):
            raise RecipeError(f"{form}; for {prefix!r} it has {what!r}")
        if unknown := sorted(set(map(str, what)) - {"source", "decay", "buffers", "when"}):
            raise RecipeError(f"{form}, and 'buffers' or 'when' on demand; for {prefix!r} it has {unknown[0]!r}")
        decay = what.get("decay")
        number = isinstance(decay, (int, float)) and not isinstance(decay, bool)
        if decay is not None and not (number and 0 <= decay <= 1):
            raise RecipeError(f"expect['ema'][{prefix!r}]['decay'] is {decay!r}: it is a number from 0 to 1")
        for key, words in (("buffers", BUFFERS_FOLLOW), ("when", WHEN_FOLLOWED)):
            if (word := what.get(key)) is not None and word not in words:
                raise RecipeError(f"expect['ema'][{prefix!r}][{key!r}] is {word!r}: it is one of {', '.join(words)}")
    return declared


def _unregistered(model: nn.Module) -> list[str]:
    """Return the paths of leaves that require a gradient and that the model keeps without registering them."""
    return [place.path for place in kept_in_model(model).values()]


def _require_hook(glob: str, recipe: Recipe) -> None:
    """A declared step hook is on some phase's optimizer; what a stored recipe is missing may be it."""
    names: list[str] = []
    for phase in recipe.phases:
        kept = phase.optimizer.kept
        if kept is not None and not kept.live and kept.missing:
            return
        mould = mould_of_recipe(phase.optimizer)
        if mould is None:
            continue
        step = own_step(mould)
        names += [callable_name(hook) for _, hook in hooks_of(mould, STEP_HOOKS)]
        names += [] if step is None else [callable_name(step)]
    if not any(declared_hook(name, {"step_hooks": [glob]}) for name in names):
        found = f"; there are {', '.join(names)}" if names else ""
        raise RecipeError(f"expect['step_hooks'] names {glob!r}, but no optimizer has a step hook of that name{found}")


def check_asked_parameters(globs: Sequence[str], model: nn.Module) -> None:
    """Check the parameters that an audit is narrowed to: what looks at none of them would find nothing.

    Globs of buffers, and of the batch's tensors (``<batch x>``), name what has rows too.

    Raises:
        SettingsError: a glob matches nothing that the model has; the text names the nearest.
    """
    names = _Names(model, [])
    for glob in globs:
        if not glob.startswith("<") and not matching(names.tensors, glob):
            raise SettingsError(f"--parameter {glob!r} matches no parameter of the model{names.near(glob)}")


def _floating_inputs(batch: Any) -> list[str]:
    """Return the paths of a batch's (its micro-batches') floating tensors."""
    batches = batch if isinstance(batch, list) else [batch]
    found = (path for each in batches for path, t in tensors_in(each) if t.is_floating_point() or t.is_complex())
    return list(dict.fromkeys(found))


def declares_functions(recipe: Recipe) -> bool:
    """Whether the recipe names custom autograd Functions."""
    return bool(recipe.expect.get("custom_gradient"))


def check_functions(recipe: Recipe, model: nn.Module, losses: Sequence[torch.Tensor]) -> None:
    """Check the names in ``expect["custom_gradient"]``: of Functions that the loss applies, or of modules.

    Args:
        recipe: the recipe.
        model: the module.
        losses: every phase's loss, with its graph.

    Raises:
        RecipeError: a name is neither.
    """
    declared = globs_of(recipe.expect.get("custom_gradient"))
    if not declared or isinstance(model, torch.fx.GraphModule):  # an exported graph has lost its Functions
        return
    applied = set().union(*map(_functions_in, losses))
    if _CHECKPOINT in applied:  # it runs its forward without a graph: what is inside does not show
        return
    known = {*applied, *(path for path, _ in model.named_modules()), LOSS}
    for name in declared:
        if name not in known:
            raise RecipeError(
                f"expect['custom_gradient'] names {name!r}, but the losses apply no Function of that name, and "
                f"no module has it{suggest(name, sorted(known))}"
            )


def _functions_in(loss: torch.Tensor) -> set[str]:
    """Return the names of the custom Functions in a loss's graph."""
    found: set[str] = set()
    seen: set[Any] = set()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is not None:
            found.add(function.__qualname__.rpartition("<locals>.")[2])
        pending += [following for following, _ in node.next_functions]
    return found


class _Names:
    """The names that a model has."""

    def __init__(self, model: nn.Module, phases: list[str]) -> None:
        self._phases = phases
        self._parameters = [name for name, _ in model.named_parameters()]
        self._first = {id(p): name for name, p in model.named_parameters()}
        self._tied = {n: self._first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        self._tensors = [*self._tied, *(name for name, _ in model.named_buffers(remove_duplicate=False))]
        modules = {id(module): path for path, module in model.named_modules()}
        self._modules = {path: modules[id(m)] for path, m in model.named_modules(remove_duplicate=False)}

    @property
    def tensors(self) -> list[str]:
        """Parameters and buffers, under every name they have."""
        return self._tensors

    def near(self, glob: str) -> str:
        """Suggest a parameter, or what several begin with."""
        return self._near(glob, self._parameters)

    def require_module(self, path: str) -> None:
        if path == LOSS or self._modules.get(path) == path:
            return
        place = f"stop_gradient names {path!r}"
        if path in self._modules:
            raise RecipeError(f"{place}, which is the module {self._modules[path]!r}: declare it by that name")
        if any(sign in path for sign in "*?["):
            raise RecipeError(f"{place}: it takes paths of modules and no globs{self._near(path, self._modules)}")
        raise RecipeError(f"{place}, and the model has no such module{self._near(path, [*self._modules, LOSS])}")

    def require_parameter(self, glob: str, place: str) -> None:
        if matching(self._parameters, glob):
            return
        for name in matching(self._tied, glob):
            raise RecipeError(f"{place} names {name!r}, which is tied to {self._tied[name]!r}: declare it by that name")
        raise RecipeError(f"{place}: {glob!r} matches no parameter of the model{self._near(glob, self._parameters)}")

    def require_mapping(self, meant: Any, place: str) -> None:
        for key, value in meant.items() if isinstance(meant, Mapping) else ():
            if key in self._phases:
                self.require_mapping(value, f"{place}[{key!r}]")
            else:
                self.require_parameter(str(key), place)

    def require_phase(self, phase: str, place: str) -> None:
        if phase not in self._phases:
            raise RecipeError(f"{place} names the phase {phase!r}, which is not there{suggest(phase, self._phases)}")

    def require_prefix(self, prefix: str, place: str) -> None:
        stem = prefix.removesuffix("*").removesuffix(".")
        if stem and not any(name == stem or name.startswith(f"{stem}.") for name in self._tensors):
            raise RecipeError(
                f"{place} names {prefix!r}, under which the model has no tensor{self._near(prefix, self._modules)}"
            )

    def _near(self, glob: str, known: Iterable[str]) -> str:
        """Suggest among the names and, for globs and prefixes, among what they begin with."""
        stem = glob.strip("*?.[]")
        names = [name for name in known if name]
        stems = [".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)]
        found = suggest(stem, dict.fromkeys([*stems, *names]))
        return found or (f"; it has {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else "")
