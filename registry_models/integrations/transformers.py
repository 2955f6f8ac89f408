"""A transformers callback: ``Trainer(..., callbacks=[GradauditCallback("my-model")])`` registers an auditable version.

The step is a real Trainer's, with the arguments, the callbacks and the methods of this one; the loss is the model's own
mean over the labels (a subclass's ``compute_loss``, where there is one); the optimizer and the schedule are the
Trainer's live ones, the batches are of its data loader.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from mlflow.models.model import ModelInfo

from audits.random_state import random_state_kept
from audits.recipe.callables import CallableReference
from audits.recipe.compiled_parts import MODEL
from audits.recipe.recipe import Recipe
from audits.structures import map_tensors
from registry_models.integrations.rates import LastRates
from registry_models.integrations.trainer_parts import TrainerParts, is_causal, labels_counted, options_of, takes_count
from registry_models.integrations.trainer_step import COUNTED, TrainerLoss, TrainerStep, counted_labels
from registry_models.logging_models import log_model

try:
    import transformers
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("this needs transformers: pip install 'gradaudit[transformers]'") from error

_STEP = "registry_models.integrations.trainer_step"


class GradauditCallback(TrainerCallback):
    """Captures how the Trainer trains and registers the model when training ends.

    Args:
        name: the registered model's name.
        expect: what was meant, as in `audits.Recipe.capture`.
        log_options: passed on to `registry_models.log_model`; ``factory`` replaces the one made from the configuration.

    Attributes:
        version: MLflow's `ModelInfo` of the registered version, once training has ended.
    """

    def __init__(self, name: str, *, expect: Mapping[str, Any] | None = None, **log_options: Any) -> None:
        self.name = name
        self.version: ModelInfo | None = None
        self._expect = dict(expect or {})
        self._log_options = log_options
        self._rates = LastRates()
        self._modes: dict[str, bool] = {}
        self._trainer: Any = lambda: None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember whose callback this is: a Trainer hands its callbacks everything but itself."""
        frame: Any = sys._getframe()
        while frame is not None:
            if isinstance(found := frame.f_locals.get("self"), transformers.Trainer):
                self._trainer = weakref.ref(found)
                return
            frame = frame.f_back

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the rates; a schedule may have ended at 0 when training ends."""
        if kwargs.get("optimizer") is not None:
            scheduler = kwargs.get("lr_scheduler")
            self._rates.note([_inner(kwargs["optimizer"])], [] if scheduler is None else [scheduler])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember which modules trained in which mode."""
        model = kwargs["model"]
        if model.training:  # a model in eval mode altogether is an oversight, and no declaration
            self._modes = {name: module.training for name, module in _unwrapped(model).named_modules()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture and register, on the first process only."""
        if not state.is_world_process_zero:
            return
        model = _unwrapped(kwargs["model"])
        recipe = self.capture(
            args, model, _inner(kwargs["optimizer"]), kwargs["train_dataloader"], kwargs.get("lr_scheduler")
        )
        options = {**_factory(model), **self._log_options}
        self.version = log_model(model, self.name, recipe=recipe, **options)

    def capture(
        self, args: Any, model: Any, optimizer: torch.optim.Optimizer, loader: Any, scheduler: Any = None
    ) -> Recipe:
        """Return the recipe of one optimizer step of this Trainer.

        Raises:
            RecipeError: something of the user's own that the step needs cannot be found by another process.
        """
        trainer = self._trainer()
        parts = _stock(args) if trainer is None else TrainerParts.of(trainer)
        shifted = labels_counted(model, trainer)
        steps = max(1, int(args.gradient_accumulation_steps))
        with random_state_kept():
            batches = [dict(batch) for batch, _ in zip(loader, range(steps), strict=False)]
        batches = [map_tensors(batch, lambda tensor: tensor.detach().cpu()) for batch in batches]
        counted = [counted_labels(batch, shifted) for batch in batches]
        by_labels = len(batches) > 1 and all(mask is not None for mask in counted)
        if by_labels:
            batches = [{**batch, COUNTED: mask} for batch, mask in zip(batches, counted, strict=True)]
        schedulers = [] if scheduler is None else [scheduler]
        modes = {name: module.training for name, module in model.named_modules()}
        _set_modes(model, self._modes)
        try:
            with self._rates.put_back([optimizer], schedulers):
                recipe = Recipe.capture(
                    model,
                    batch=batches[0] if len(batches) == 1 else batches,
                    loss=_loss(parts, model, shifted, float(args.label_smoothing_factor)),
                    optimizer=optimizer,
                    scheduler=scheduler,
                    step=_reference("TrainerStep", dataclasses.asdict(parts)),
                    clip_grad_norm=float(args.max_grad_norm) if args.max_grad_norm else None,
                    precision="bf16-autocast" if args.bf16 else "fp16-autocast" if args.fp16 else "native",
                    normalize=f"tokens:{COUNTED}" if by_labels else "mean",
                    expect=self._expect,
                )
        finally:
            _set_modes(model, modes)
        # the Trainer compiles a wrapper of its own and hands out the model inside
        return dataclasses.replace(recipe, compiled=(MODEL,)) if getattr(args, "torch_compile", False) else recipe


def _stock(args: Any) -> TrainerParts:
    """The parts of transformers' own Trainer with these arguments."""
    return TrainerParts({"class": {"import": "transformers:Trainer"}}, options_of(args))


def _reference(name: str, arguments: dict[str, Any]) -> CallableReference:
    target = {"TrainerStep": TrainerStep, "TrainerLoss": TrainerLoss}[name](**arguments)
    return CallableReference(f"{_STEP}:{name}", arguments, target)


def _loss(parts: TrainerParts, model: Any, shifted: bool, smoothing: float) -> CallableReference:
    arguments: dict[str, Any] = {"counts": takes_count(model), "shifted": shifted}
    if (noise := parts.options["options"].get("neftune_noise_alpha")) is not None:
        arguments["noise"] = noise
    if parts.whose_loss is not None:
        arguments["trainer"] = dataclasses.asdict(dataclasses.replace(parts, callbacks=()))
    elif smoothing and getattr(model.config, "problem_type", None) != "multi_label_classification":
        arguments |= {"smoothing": smoothing, "shifted": shifted or is_causal(model)}
    return _reference("TrainerLoss", arguments)


def _set_modes(model: Any, modes: Mapping[str, bool]) -> None:
    if not modes:
        model.train()
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]


def _unwrapped(model: Any) -> Any:
    """The model without accelerate's wrappers around it and around its forward."""
    accelerate = importlib.import_module("accelerate.utils")
    return accelerate.extract_model_from_parallel(model, keep_fp32_wrapper=False)


def _factory(model: Any) -> dict[str, Any]:
    """The factory that builds from the configuration, where the class is transformers' own."""
    if getattr(transformers, type(model).__name__, None) is not type(model):
        return {}
    arguments = {
        "architecture": type(model).__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "attention": getattr(model.config, "_attn_implementation", None),
    }
    return {"factory": "registry_models.artifacts.transformers_files:build", "factory_args": arguments}
