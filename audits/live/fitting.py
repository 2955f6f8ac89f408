"""Whether a recipe fits a model: its names and shapes are the model's, its losses can be computed on its batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from audits.devices import mixes_devices
from audits.errors import DeviceError, RecipeError, suggest
from audits.leaves import BUFFER, kept_in_model, leaves_of
from audits.live.weighing import items_of
from audits.recipe.compiled_parts import compiled_parts, without_wrappers
from audits.recipe.declared_names import check_functions, declares_functions
from audits.recipe.recipe import Recipe
from audits.structures import tensors_in

if TYPE_CHECKING:
    from audits.live.subject import LivePhase, Subject


#: Of so many tensors in the batch is tried which of them are to be on the CPU.
MOST_LENGTHS = 4


@dataclass(frozen=True)
class FirstForward:
    """What a phase's first forward in this process gave: each micro-batch's loss, fingerprints of the weights after."""

    losses: tuple[float, ...]
    weights: dict[str, tuple[float, float]]


def compiled_here(wrapped: nn.Module, recipe: Recipe) -> tuple[tuple[str, ...], Any]:
    """Return what is compiled, here or where the recipe was made, and how the model itself was."""
    references = [(f"loss {phase.name}", phase.loss) for phase in recipe.phases]
    if recipe.step is not None:
        references.append(("step", recipe.step))
    here = compiled_parts(wrapped, [(role, reference.resolve(role=role)) for role, reference in references])
    return tuple(dict.fromkeys((*recipe.compiled, *here))), without_wrappers(wrapped)[1]


def try_losses(subject: Subject) -> None:
    """Run every loss once, so that a recipe that cannot work is told from a model that is wrong.

    Where a loss refuses the batch's device, tensors that may be lengths are left on the CPU, as few as will do.

    Raises:
        RecipeError: a loss raises, or is not one number that depends on a trainable parameter.
    """
    try:
        return _try_losses(subject)
    except DeviceError:
        lengths = subject.given.lengths()[:MOST_LENGTHS]
        for count in range(1, len(lengths) + 1):
            for paths in itertools.combinations(lengths, count):
                with contextlib.suppress(RecipeError), subject.given.leaving_on_cpu(paths):
                    return _try_losses(subject)
        raise


def _try_losses(subject: Subject) -> None:
    applied: list[torch.Tensor] = []
    for phase in subject.phases:
        subject.reset()
        try:
            if phase.asks_for_items:
                phase.items = items_of([batch for _, batch in subject.micro_batches(phase)])
            with subject.autocast():
                losses = [phase.call_loss(subject.model, batch) for _, batch in subject.micro_batches(phase)]
                parts = zip(subject.micro_batches(phase), losses, strict=True)
                value = sum(loss if w == 1.0 else loss * w for (w, _), loss in parts if w)
        except RecipeError:
            raise
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"out of memory in the loss of phase {phase.name!r}: use a smaller batch or device='cpu' "
                f"({str(error).splitlines()[0]})"
            ) from error
        except Exception as error:
            if subject.device.type != "cpu" and mixes_devices(error):
                kept = [place for place in kept_in_model(subject.model).values() if place.how != BUFFER]
                which = f"; {kept[0].path} is kept {kept[0].how}, which .to() does not move" if kept else ""
                raise DeviceError(
                    f"the loss of phase {phase.name!r} makes tensors on another device than {subject.device}, the "
                    f"batch's{which}: give them device=..., or audit on the CPU with device='cpu' "
                    f"({str(error).splitlines()[0]})"
                ) from error
            raise RecipeError(
                f"the loss of phase {phase.name!r} ({phase.recipe.loss.describe()}) raised {type(error).__name__}: "
                f"{error}; does the recipe's batch ({_describe(subject.recipe.batch)}) fit the model?"
            ) from error
        if written := subject.given.changed_since(subject.given.first):
            subject.written_batch = tuple(dict.fromkeys((*subject.written_batch, *written)))
            phase.writes_batch = True
            subject.given.restore(surely=True)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise RecipeError(f"the loss of phase {phase.name!r} must return one number, not {got}: add .mean()")
        if not value.requires_grad:
            raise RecipeError(f"the loss of phase {phase.name!r} depends on no trainable parameter: nothing to audit")
        if declares_functions(subject.recipe):
            applied.append(value)
        found = tuple(float(loss.detach()) for loss in losses)
        subject.first_forwards[phase.name] = FirstForward(found, subject.fingerprints())
        subject.strays[phase.name] = _strays(subject, phase, value)
    check_functions(subject.recipe, subject.model, applied)
    subject.remember_strays()


def _strays(subject: Subject, phase: LivePhase, first: torch.Tensor) -> list[torch.Tensor]:
    """Return the leaves of a loss that are neither the model's nor the batch's, nor made by the loss itself.

    What the loss makes (the points of a gradient penalty) is another tensor in a second evaluation.
    """
    known = {id(parameter) for parameter in subject.parameters.values()}
    known |= {id(tensor) for _, tensor in tensors_in(subject.given.batches)}
    found = [leaf for leaf in leaves_of(first) if id(leaf) not in known]
    if not found:
        return []
    subject.reset()
    with subject.autocast():
        again = {id(leaf) for leaf in leaves_of(subject.loss(phase))}
    return [leaf for leaf in found if id(leaf) in again]


def match_names(recipe: Recipe, parameters: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Refuse a recipe whose parameters are not the model's.

    Raises:
        RecipeError: the text names the parameter and the nearest there is.
    """
    wanted = {record.name: record.shape for record in recipe.parameters}
    for phase in recipe.phases:
        wanted.update({name: wanted.get(name, ()) for name in phase.optimizer.names})
    known_shapes = {record.name for record in recipe.parameters}
    aliases = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in wanted.items():
        if name not in aliases:
            raise RecipeError(
                f"the recipe names the parameter {name!r}, which the model does not have{suggest(name, parameters)}"
            )
        if name not in parameters:
            raise RecipeError(
                f"the recipe names {name!r} as a parameter of its own; in the model it is tied to another"
            )
        if name in known_shapes and tuple(aliases[name].shape) != shape:
            raise RecipeError(f"parameter {name!r} has shape {tuple(aliases[name].shape)}, the recipe says {shape}")


def set_modes(model: nn.Module, recipe: Recipe) -> None:
    """Put the model and its modules into the modes of the recipe."""
    model.train(recipe.mode == "train")
    modules = dict(model.named_modules())
    for name, training in recipe.module_modes.items():
        if name in modules:
            modules[name].training = training


def _describe(batch: Any) -> str:
    return ", ".join(f"{path}: {tuple(t.shape)} {t.dtype}" for path, t in tensors_in(batch))
