"""A Lightning callback: ``Trainer(callbacks=[GradauditCallback("my-model")])`` registers an auditable version.

The loss is the module's ``training_step`` (in manual optimization: what it gives to ``manual_backward``), the
optimizers are the trainer's live ones, the batch is one that training really saw.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mlflow.models.model import ModelInfo
from torch import nn

from audits.errors import RecipeError
from audits.random_state import random_state_kept
from audits.recipe.callables import CallableReference
from audits.recipe.phases import Phase
from audits.recipe.recipe import Recipe
from audits.structures import map_tensors
from registry_models.inference.lightning import TrainingStepLoss, lightning_phases
from registry_models.integrations.rates import LastRates
from registry_models.logging_models import log_model

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError("this needs Lightning: pip install 'gradaudit[lightning]'") from error

_log = logging.getLogger(__name__)

_PRECISIONS = {"32-true": "native", "64-true": "native", "bf16-mixed": "bf16-autocast", "16-mixed": "fp16-autocast"}


class GradauditCallback(Callback):
    """Captures how the module is trained and registers it when training ends.

    Args:
        name: the registered model's name.
        factory: function (or its import path) that builds the module, so that loading it needs no pickle.
        factory_args: its keyword arguments.
        expect: what was meant, as in `audits.Recipe.capture`.
        log_options: passed on to `registry_models.log_model`.

    Attributes:
        version: MLflow's `ModelInfo` of the registered version, once training has ended.
    """

    def __init__(
        self,
        name: str,
        *,
        factory: str | Callable[..., nn.Module] | None = None,
        factory_args: Mapping[str, Any] | None = None,
        expect: Mapping[str, Any] | None = None,
        **log_options: Any,
    ) -> None:
        super().__init__()
        self.name = name
        self.version: ModelInfo | None = None
        self._factory: dict[str, Any] = {"factory": factory, "factory_args": factory_args}
        self._expect = dict(expect or {})
        self._log_options = log_options
        self._batches: list[Any] = []
        self._rates = LastRates()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the last optimizer step's batches, on the CPU, and the rates that were used."""
        steps = max(1, int(trainer.accumulate_grad_batches))
        if batch_idx % steps == 0:
            self._batches = []
        self._batches.append({"batch": _kept(batch)})
        self._rates.note(trainer.optimizers)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Capture and register, on the first process only."""
        if not trainer.is_global_zero or not self._batches:
            return
        recipe = self.capture(trainer, pl_module)
        self.version = log_model(pl_module, self.name, recipe=recipe, **self._factory, **self._log_options)

    def capture(self, trainer: Any, module: Any) -> Recipe:
        """Return the recipe of the training step that just ran.

        Raises:
            RecipeError: the module optimizes in a way that no recipe can say; the text names the cure.
        """
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        batch = map_tensors(self._batches[0]["batch"], lambda tensor: tensor.to(device))
        optimizers = list(trainer.optimizers)
        training = module.training
        module.train()
        try:
            with random_state_kept(), torch.enable_grad(), self._rates.put_back(optimizers):
                found = lightning_phases(module, batch, [(optimizer, None) for optimizer in optimizers])
                clip = trainer.gradient_clip_val if trainer.gradient_clip_algorithm != "value" else None
                phases = [
                    Phase(phase.name, loss=_storable(phase.loss), optimizer=phase.optimizer, clip_grad_norm=clip)
                    for phase in found
                ]
                precision = _PRECISIONS.get(str(trainer.precision))
                if precision is None:
                    raise RecipeError(f"precision {trainer.precision!r} cannot be audited: attach a recipe by hand")
                batches = self._batches[0] if len(self._batches) == 1 else self._batches
                return Recipe.capture(module, batch=batches, phases=phases, precision=precision, expect=self._expect)
        finally:
            module.train(training)


def _storable(loss: TrainingStepLoss) -> CallableReference:
    arguments = {"optimizers": loss.optimizers, "position": loss.position}
    return CallableReference("registry_models.inference.lightning:TrainingStepLoss", arguments, loss)


def _kept(batch: Any) -> Any:
    """A list would mean micro-batches to a recipe; Lightning's loaders give lists for tuples."""
    plain = tuple(batch) if isinstance(batch, list) else dict(batch) if isinstance(batch, Mapping) else batch
    return map_tensors(plain, lambda tensor: tensor.detach().cpu().clone())
