"""A transformers callback: ``Trainer(..., callbacks=[GradauditCallback("my-model")])`` registers an auditable version.

The loss is the model's own with the Trainer's normalisation, the optimizer is the Trainer's live one, the batch is one
of its data loader. A Trainer with a ``compute_loss`` of its own has another loss than this: capture by hand then.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from mlflow.models.model import ModelInfo

from audits.errors import RecipeError
from audits.live.subject import IGNORED_LABEL
from audits.random_state import random_state_kept
from audits.recipe.callables import MODEL_LOSS
from audits.recipe.compiled_parts import MODEL
from audits.recipe.recipe import Recipe
from audits.structures import map_tensors
from registry_models.integrations.rates import LastRates
from registry_models.logging_models import log_model

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("this needs transformers: pip install 'gradaudit[transformers]'") from error


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

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the rates; a schedule may have ended at 0 when training ends."""
        if kwargs.get("optimizer") is not None:
            self._rates.note([_inner(kwargs["optimizer"])])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture and register, on the first process only."""
        if not state.is_world_process_zero:
            return
        model = _unwrapped(kwargs["model"])
        recipe = self.capture(args, model, _inner(kwargs["optimizer"]), kwargs["train_dataloader"])
        options = {**_factory(model), **self._log_options}
        self.version = log_model(model, self.name, recipe=recipe, **options)

    def capture(self, args: Any, model: Any, optimizer: torch.optim.Optimizer, loader: Any) -> Recipe:
        """Return the recipe of one optimizer step of this Trainer.

        Raises:
            RecipeError: the Trainer's loss is not the model's own.
        """
        if args.label_smoothing_factor:
            raise RecipeError("label_smoothing_factor is the Trainer's own loss: capture the recipe by hand")
        steps = max(1, int(args.gradient_accumulation_steps))
        with random_state_kept():
            batches = [dict(batch) for batch, _ in zip(loader, range(steps), strict=False)]
        batches = [map_tensors(batch, lambda tensor: tensor.detach().cpu()) for batch in batches]
        if _takes_count(model):
            # The Trainer divides the summed loss by the step's labels. A recipe averages k micro-batches, so each
            # gets the k-th part of the count: (1/k) sum_i S_i / (N/k) = sum_i S_i / N.
            count = sum(int((b["labels"] != IGNORED_LABEL).sum()) for b in batches if "labels" in b)
            if count:
                batches = [{**batch, "num_items_in_batch": count / len(batches)} for batch in batches]
        precision = "bf16-autocast" if args.bf16 else "fp16-autocast" if args.fp16 else "native"
        with self._rates.put_back([optimizer]):
            recipe = Recipe.capture(
                model,
                batch=batches[0] if len(batches) == 1 else batches,
                loss=MODEL_LOSS,
                optimizer=optimizer,
                clip_grad_norm=float(args.max_grad_norm) if args.max_grad_norm else None,
                precision=precision,
                normalize="mean",
                expect=self._expect,
            )
        # the Trainer compiles a wrapper of its own and hands out the model inside
        return dataclasses.replace(recipe, compiled=(MODEL,)) if getattr(args, "torch_compile", False) else recipe


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]


def _unwrapped(model: Any) -> Any:
    """The model without accelerate's wrappers around it and around its forward."""
    accelerate = importlib.import_module("accelerate.utils")
    return accelerate.extract_model_from_parallel(model, keep_fp32_wrapper=False)


def _takes_count(model: Any) -> bool:
    """Whether the Trainer passes ``num_items_in_batch`` to this model's loss, by the Trainer's own rule."""
    declared = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _factory(model: Any) -> dict[str, Any]:
    """The factory that builds from the configuration, where the class is transformers' own."""
    transformers = importlib.import_module("transformers")
    if getattr(transformers, type(model).__name__, None) is not type(model):
        return {}
    arguments = {
        "architecture": type(model).__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "attention": getattr(model.config, "_attn_implementation", None),
    }
    return {"factory": "registry_models.artifacts.transformers_files:build", "factory_args": arguments}
