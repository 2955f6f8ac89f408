"""From a loaded version without a recipe to a recipe, and what in it is assumed."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError
from audits.live.state import ModuleState
from audits.random_state import random_state_kept, seed_everything
from audits.recipe.callables import MODEL_LOSS, CallableReference, as_loss
from audits.recipe.capture import unwrap
from audits.recipe.recipe import Recipe
from audits.structures import map_tensors
from registry_models.artifacts.flavours import nothing_to_train
from registry_models.artifacts.loading import LoadedModel
from registry_models.inference.examples import Example, find_example
from registry_models.inference.lightning import is_lightning, lightning_phases
from registry_models.inference.losses import call_model, fitting_targets, random_projection
from registry_models.inference.optimizers import choose_optimizer
from registry_models.inference.transformers import is_transformers, labelled_batches, model_inputs

#: What to write when nothing can be inferred.
NO_RECIPE = (
    "this version has no recipe and no input example, so nobody knows what to feed it: register it with "
    "registry_models.log_model(model, name, recipe=Recipe.capture(...)), give it a recipe with "
    "registry_models.attach_recipe('models:/NAME/VERSION', recipe), or log it with an input_example"
)


class NothingToTrainError(RecipeError):
    """A module without trainable parameters, of which nobody says how it is trained either."""


@dataclass(frozen=True)
class Inferred:
    """A recipe and, for each of its fields, where it comes from.

    Attributes:
        recipe: what is assumed in it is in its ``assumed``.
        provenance: ``batch``, ``loss``, ``optimizer`` -> a phrase.
    """

    recipe: Recipe
    provenance: Mapping[str, str]


def infer_recipe(
    folder: Path, loaded: LoadedModel, run_params: Mapping[str, str], *, loss: CallableReference | None = None
) -> Inferred:
    """Infer how the version is trained.

    Args:
        folder: the model directory.
        loaded: its module.
        run_params: what the source run logged.
        loss: a loss that is declared elsewhere, for which only a batch and an optimizer are missing.

    Raises:
        RecipeError: there is nothing to feed the model; the text names the cure.
        NothingToTrainError: no parameter of it is trainable.
    """
    model = unwrap(loaded.module)
    model.train()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NothingToTrainError(nothing_to_train().why)
    example = find_example(folder, loaded)
    with random_state_kept(), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_lightning(model) and loss is None and _defines_step(model):
            return _lightning(model, example)
        if is_transformers(model):
            return _transformers(model, example, folder, run_params, loss)
        if example is None or example.texts:
            raise RecipeError(NO_RECIPE)
        return _generic(model, example, run_params, loss)


def _defines_step(model: nn.Module) -> bool:
    step = getattr(type(model), "training_step", None)
    return step is not None and not str(getattr(step, "__module__", "")).startswith(
        ("lightning.", "pytorch_lightning.")
    )


def _lightning(model: Any, example: Example | None) -> Inferred:
    problem = NO_RECIPE
    for source, batch in _lightning_batches(model, example):
        try:
            with _kept(model):
                phases = lightning_phases(model, batch)
                for phase in phases:
                    _require_loss(phase.loss(model, {"batch": batch}))
        except Exception as error:  # the next candidate may fit
            problem = f"training_step could not be run on {source}: {type(error).__name__}: {error}"
            continue
        recipe = Recipe.capture(model, batch={"batch": batch}, phases=phases)
        names = ", ".join(type(phase.optimizer).__name__ for phase in phases)
        return Inferred(
            dataclasses.replace(recipe, assumed=frozenset({"batch"})),
            {
                "batch": f"assumed: {source}",
                "loss": "the module's own training_step",
                "optimizer": f"the module's own configure_optimizers ({names})",
            },
        )
    raise RecipeError(f"no batch could be made for this LightningModule. {problem}. Cure: attach a recipe")


def _lightning_batches(model: Any, example: Example | None) -> Iterator[tuple[str, Any]]:
    own = getattr(type(model), "train_dataloader", None)
    if own is not None and not str(getattr(own, "__module__", "")).startswith(("lightning.", "pytorch_lightning.")):
        try:
            batch = next(iter(model.train_dataloader()))
            yield "the first batch of its train_dataloader", _as_tuple(batch)
        except Exception:  # data that is not here
            pass
    for candidate in _variants(example):
        inputs = candidate.arguments or tuple(candidate.keywords.values())
        if not inputs:
            continue
        with _kept(model), torch.no_grad():
            try:
                output = model(*candidate.arguments, **candidate.keywords)
            except Exception:
                output = None
        for target in fitting_targets(output):
            yield f"{candidate.source}, with made-up targets", (*inputs, target)
        if candidate.keywords:
            yield candidate.source, dict(candidate.keywords)
        yield candidate.source, inputs[0] if len(inputs) == 1 else inputs
        yield candidate.source, inputs


def _transformers(
    model: Any, example: Example | None, folder: Path, params: Mapping[str, str], loss: CallableReference | None
) -> Inferred:
    inputs, source = model_inputs(model, example, folder)
    own = CallableReference(MODEL_LOSS)
    for batch in labelled_batches(model, inputs) if loss is None or loss.path == MODEL_LOSS else ():
        try:
            with _kept(model):
                _require_loss(as_loss(own)(model, dict(batch)))
        except Exception:  # the next candidate may fit
            continue
        return _captured(model, batch, own, f"{source}, with made-up labels", "the model's own loss", False, params)
    return _generic(model, Example(source, (), inputs), params, loss)


def _generic(model: nn.Module, example: Example, params: Mapping[str, str], loss: CallableReference | None) -> Inferred:
    problem: Exception | None = None
    for candidate in _variants(example):
        batch: dict[str, Any]
        if len(candidate.arguments) == 1 and not candidate.keywords:
            batch = {"inputs": candidate.arguments[0]}
        else:
            batch = {"arguments": candidate.arguments, "keywords": dict(candidate.keywords)}
        try:
            with _kept(model):
                output = call_model(model, batch)
                if loss is None:
                    _require_loss(random_projection(model, batch))
        except Exception as error:
            problem = error
            continue
        if loss is None:
            reference = CallableReference(None, None, random_projection)
            told = "assumed: a fixed random projection of the output"
            return _captured(model, batch, reference, candidate.source, told, True, params)
        for made in ({**dict(candidate.keywords), **batch, "targets": t} for t in fitting_targets(output)):
            fitted = _fits(model, loss, made)
            if fitted:
                return _captured(
                    model, made, loss, f"{candidate.source}, with made-up targets", "declared", False, params
                )
        return _captured(model, batch, loss, candidate.source, "declared", False, params)
    text = f"{type(problem).__name__}: {problem}"
    raise RecipeError(
        f"the model could not be run on {example.source} ({text}): log it with an input_example that fits, or attach a "
        "recipe with registry_models.attach_recipe('models:/NAME/VERSION', recipe)"
    )


def _fits(model: nn.Module, loss: CallableReference, batch: Any) -> bool:
    try:
        with _kept(model), warnings.catch_warnings():
            warnings.simplefilter("error")  # torch broadcasts a wrong target and only warns
            _require_loss(as_loss(loss)(model, batch))
    except Exception:
        return False
    return True


def _captured(
    model: nn.Module,
    batch: Any,
    loss: CallableReference,
    batch_source: str,
    loss_source: str,
    loss_assumed: bool,
    params: Mapping[str, str],
) -> Inferred:
    chosen = choose_optimizer(model, params)
    recipe = Recipe.capture(
        model, batch=batch, loss=loss, optimizer=chosen.optimizer, clip_grad_norm=chosen.clip_grad_norm
    )
    assumed = {"batch"} | ({"loss"} if loss_assumed else set()) | ({"optimizer"} if chosen.assumed else set())
    return Inferred(
        dataclasses.replace(recipe, assumed=frozenset(assumed)),
        {
            "batch": f"assumed: {batch_source}",
            "loss": loss_source,
            "optimizer": f"assumed: {chosen.source}" if chosen.assumed else chosen.source,
        },
    )


def _variants(example: Example | None) -> Iterator[Example]:
    """The example as it is, then, of a single row, as several: norms over a batch need more than one."""
    if example is None or example.texts:
        return
    yield example
    if example.single:
        yield example.widened()


def _require_loss(value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise RecipeError("no loss that depends on a trainable parameter")
    if not bool(torch.isfinite(value)):
        raise RecipeError("the loss is not finite")


def _as_tuple(batch: Any) -> Any:
    """A list would mean micro-batches."""
    plain = dict(batch) if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, list) else batch
    return map_tensors(plain, lambda tensor: tensor)


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Try something on the model: buffers and modes are put back, and every try draws alike."""
    state = ModuleState(model)
    seed_everything(0)
    try:
        yield
    finally:
        state.restore()
