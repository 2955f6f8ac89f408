"""A Lightning callback: ``Trainer(callbacks=[GradauditCallback("my-model")])`` registers an auditable version.

The step is a real Lightning Trainer's, with the flags and callbacks of this one. The loss is the module's
``training_step`` (in manual optimization: what it gives to ``manual_backward``), optimizers and schedules are the
trainer's live ones, the batches are those that training saw last.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
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
from registry_models.inference.lightning import TrainingStepLoss, lightning_phases, steps_often
from registry_models.integrations.lightning_step import LightningStep
from registry_models.integrations.own_objects import is_gradaudits, object_to_plain, overridden
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
        self._modes: dict[str, bool] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the last optimizer step's batches, on the CPU, and the rates and modes that were used."""
        steps = max(1, int(trainer.accumulate_grad_batches))
        if batch_idx % steps == 0:
            self._batches = []
            self._rates.note(trainer.optimizers, [each.scheduler for each in _declarable(trainer)])
        self._batches.append({"batch": _kept(batch)})
        self._modes = {name: module.training for name, module in pl_module.named_modules()}

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
        precision = _PRECISIONS.get(str(trainer.precision))
        if precision is None:
            raise RecipeError(f"precision {trainer.precision!r} cannot be audited: attach a recipe by hand")
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        batch = map_tensors(self._batches[0]["batch"], lambda tensor: tensor.to(device))
        optimizers, configs = list(trainer.optimizers), _declarable(trainer)
        schedulers = [each.scheduler for each in configs]
        by_value = trainer.gradient_clip_val if _algorithm(trainer) == "value" else None
        expect = self._expect if by_value is None else {"clip_grad_value": float(by_value), **self._expect}
        batches = self._batches[0] if len(self._batches) == 1 else self._batches
        with (
            _modes(module, self._modes),
            random_state_kept(),
            torch.enable_grad(),
            self._rates.put_back(optimizers, schedulers),
        ):
            live = [(o, next((s for s in schedulers if s.optimizer is o), None)) for o in optimizers]
            found = lightning_phases(module, batch, live)
            phases = [
                Phase(
                    phase.name,
                    loss=_storable(phase.loss),
                    optimizer=phase.optimizer,
                    scheduler=phase.scheduler,
                    clip_grad_norm=trainer.gradient_clip_val if by_value is None and trainer.gradient_clip_val
                    else phase.clip_grad_norm,
                )
                for phase in found
            ]  # fmt: skip
            step = None if steps_often(module, batch, len(optimizers)) else self._step(trainer, module, phases, configs)
            return Recipe.capture(
                module, batch=batches, phases=phases, step=step, precision=precision, normalize="mean", expect=expect
            )

    def _step(self, trainer: Any, module: Any, phases: list[Phase], configs: list[Any]) -> CallableReference:
        names = {id(phase.optimizer): phase.name for phase in phases}
        callbacks = [each for each in trainer.callbacks if _acts(each)]
        arguments: dict[str, Any] = {
            "phases": [names.get(id(optimizer)) for optimizer in trainer.optimizers],
            "schedulers": [
                [names[id(each.scheduler.optimizer)], str(each.interval)]
                for each in configs
                if id(each.scheduler.optimizer) in names
            ],
            "flags": {
                "accumulate_grad_batches": int(trainer.accumulate_grad_batches),
                "gradient_clip_val": trainer.gradient_clip_val,
                "gradient_clip_algorithm": _algorithm(trainer),
                "precision": str(trainer.precision),
            },
            "callbacks": [object_to_plain(each) for each in callbacks],
            "left_in_eval": not self._modes.get("", True),
            "methods": _methods(module, callbacks),
        }
        return CallableReference(
            "registry_models.integrations.lightning_step:LightningStep", arguments, LightningStep(**arguments)
        )


#: Hooks of module and callbacks that decide an optimizer step, by the checks that judge it.
_HOOKS = {
    "step.gradient": ("training_step", "backward", "manual_backward", "on_after_backward", "on_before_backward",
                      "on_before_optimizer_step", "on_before_zero_grad", "optimizer_zero_grad", "zero_grad",
                      "configure_gradient_clipping", "optimizer_step", "on_train_batch_start"),
    "step.gradient-present": ("training_step", "backward", "on_after_backward", "on_before_optimizer_step",
                              "optimizer_zero_grad", "optimizer_step"),
    "step.clipping": ("configure_gradient_clipping", "clip_gradients", "on_before_optimizer_step", "optimizer_step",
                      "on_after_backward", "training_step"),
    "step.count": ("optimizer_step", "training_step", "on_train_batch_end", "on_train_batch_start"),
    "step.learning-rate": ("lr_scheduler_step", "optimizer_step", "training_step", "on_train_batch_start",
                           "on_train_batch_end", "on_train_epoch_end"),
    "step.mode": ("training_step", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "forward"),
    "update.outside-step": ("on_train_batch_end", "on_train_batch_start", "training_step", "on_before_zero_grad"),
}  # fmt: skip
_ALL_HOOKS = tuple(dict.fromkeys(name for names in _HOOKS.values() for name in names))


def _methods(module: Any, callbacks: list[Any]) -> dict[str, list[str]]:
    """By check, the user's own methods that decide it."""
    owners = [(module, _base(module, "LightningModule")), *((each, Callback) for each in callbacks)]
    return {
        check: [f"{type(o).__name__}.{name}" for o, base in owners for name in overridden(type(o), base, names)]
        for check, names in _HOOKS.items()
    }


def _algorithm(trainer: Any) -> str | None:
    algorithm = trainer.gradient_clip_algorithm
    return None if algorithm is None else str(getattr(algorithm, "value", algorithm)).lower()


def _base(thing: Any, name: str) -> type:
    return next(cls for cls in type(thing).__mro__ if cls.__name__ == name)


def _acts(callback: Any) -> bool:
    """Whether it is a user's callback that does something around an optimizer step."""
    library = type(callback).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
    return not library and not is_gradaudits(callback) and bool(overridden(type(callback), Callback, _ALL_HOOKS))


def _declarable(trainer: Any) -> list[Any]:
    """The schedules whose rates follow from the number of steps (or epochs) alone."""
    return [
        each
        for each in trainer.lr_scheduler_configs
        if not getattr(each, "reduce_on_plateau", False) and int(getattr(each, "frequency", 1)) == 1
    ]


@contextlib.contextmanager
def _modes(module: Any, modes: Mapping[str, bool]) -> Iterator[None]:
    """Put the modules into the modes they trained in; a module in eval altogether is an oversight, no declaration."""
    before = {name: each.training for name, each in module.named_modules()}
    try:
        module.train()
        if modes.get("", False):
            for name, each in module.named_modules():
                each.training = modes.get(name, each.training)
        yield
    finally:
        for name, each in module.named_modules():
            each.training = before[name]


def _storable(loss: TrainingStepLoss) -> CallableReference:
    arguments = {"optimizers": loss.optimizers, "position": loss.position}
    return CallableReference("registry_models.inference.lightning:TrainingStepLoss", arguments, loss)


def _kept(batch: Any) -> Any:
    """A list would mean micro-batches to a recipe; Lightning's loaders give lists for tuples."""
    plain = tuple(batch) if isinstance(batch, list) else dict(batch) if isinstance(batch, Mapping) else batch
    return map_tensors(plain, lambda tensor: tensor.detach().cpu().clone())
