"""A training step that is Lightning's own: a real ``Trainer`` fits the module on one step's batches.

Accumulation, clipping, autocast, loss scaling and schedules are the library's code, ``training_step``, the hooks and
manual optimization are the module's.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError
from audits.random_state import random_state_kept
from registry_models.integrations.own_objects import missing_of, object_from_plain
from registry_models.integrations.surroundings import nothing_left_behind

#: Hooks of a module that fetch, make or move what an audit has already.
_DONE_ALREADY: dict[str, Any] = {
    "prepare_data": lambda: None,
    "setup": lambda stage=None: None,
    "teardown": lambda stage=None: None,
    "configure_model": lambda: None,
    "configure_callbacks": list,
    "on_before_batch_transfer": lambda batch, dataloader_idx: batch,
    "transfer_batch_to_device": lambda batch, device, dataloader_idx: batch,
    "on_after_batch_transfer": lambda batch, dataloader_idx: batch,
}

_MIXED = ("bf16-mixed", "16-mixed")


class LightningStep:
    """``(model, batch, context) -> None``: one epoch of a Lightning Trainer over the micro-batches of one step.

    Args:
        phases: for each optimizer of ``configure_optimizers`` the phase that it is, None for one that never steps.
        schedulers: for each scheduler handed to Lightning, in its order, the phase and the interval.
        flags: ``accumulate_grad_batches``, ``gradient_clip_val``, ``gradient_clip_algorithm`` and ``precision``.
        callbacks: the user's callbacks that act in an optimizer step, as `own_objects` describes them.
        left_in_eval: whether the module was in eval mode altogether while it trained.
        methods: by check, what of the user's own code decides it.
    """

    def __init__(
        self,
        phases: Sequence[str | None],
        schedulers: Sequence[Sequence[str]],
        flags: Mapping[str, Any],
        callbacks: Sequence[Mapping[str, Any]] = (),
        left_in_eval: bool = False,
        methods: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._phases, self._schedulers, self._flags = list(phases), [tuple(each) for each in schedulers], dict(flags)
        self._callbacks, self._left_in_eval, self._methods = list(callbacks), left_in_eval, dict(methods or {})
        self.__qualname__ = "Trainer.fit"

    def __call__(self, model: nn.Module, batch: Any, context: Any) -> None:
        """Take one optimizer step (in manual optimization one of each) on the micro-batches.

        Raises:
            RecipeError: a callback misses something that could not be stored.
        """
        batches = [each["batch"] for each in (batch if isinstance(batch, list) else [batch])]
        lightning = package_of(model)
        with nothing_left_behind() as folder, _lent(model, self._configuration(context)):
            with random_state_kept():
                callbacks = [object_from_plain(plain) for plain in self._callbacks]
                trainer = self._trainer(lightning, folder, context, callbacks, len(batches))
            if self._left_in_eval:
                model.eval()
            try:
                trainer.fit(model, train_dataloaders=_Loader(batches))
            except AttributeError as error:
                what = missing_of(error, self._callbacks)
                if what is None:
                    raise
                raise RecipeError(
                    f"the training step needs {what}, which could not be stored with the recipe: keep plain values, "
                    "small tensors and importable functions there"
                ) from error

    def _trainer(self, lightning: ModuleType, folder: str, context: Any, callbacks: list[Any], batches: int) -> Any:
        device, precision = context.device, self._flags.get("precision", "32-true")
        plugins = []
        if (
            precision in _MIXED
        ):  # the Trainer replaces fp16 by bfloat16 on a CPU; and the scale is the audit's to choose
            mixed = importlib.import_module(f"{lightning.__name__}.plugins.precision").MixedPrecision
            plugins = [mixed(precision, device.type, context.scaler if precision == "16-mixed" else None)]
        keywords = {"plugins": plugins} if plugins else {"precision": precision}
        logger = importlib.import_module(f"{lightning.__name__}.loggers.logger").DummyLogger()
        return lightning.Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            strategy=_in_place(lightning)(device),
            devices=1 if device.type == "cpu" else [device.index or 0],
            max_epochs=1,
            limit_train_batches=batches,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            accumulate_grad_batches=self._flags.get("accumulate_grad_batches", 1),
            gradient_clip_val=self._flags.get("gradient_clip_val"),
            gradient_clip_algorithm=self._flags.get("gradient_clip_algorithm"),
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=callbacks,
            **keywords,
        )

    def _configuration(self, context: Any) -> tuple[list[Any], list[Any]]:
        """What ``configure_optimizers`` gives: the audit's optimizers and schedules."""
        unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)
        optimizers = [unused if name is None else context.optimizers[name] for name in self._phases]
        schedulers = [
            {"scheduler": _Schedule(context.schedulers[name]), "interval": interval}
            for name, interval in self._schedulers
            if name in context.schedulers
        ]
        return optimizers, schedulers

    def where_to_look(self, check: str) -> str | None:
        """Return which of the user's own methods, else which flags, decide what a check judges."""
        if check == "step.mode" and self._left_in_eval:
            return "The module was in eval mode when it was fitted: call module.train() before Trainer.fit."
        flags = [f"{name}={value!r}" for name, value in self._flags.items() if value is not None]
        found = self._methods.get(check)
        if not found and not check.startswith("step."):
            return None
        look = f"Look at {', '.join(found)}" if found else "Lightning's own code did this"
        return f"{look}; the flags are Trainer({', '.join(flags)})."


def package_of(module: nn.Module) -> ModuleType:
    """Return the package whose LightningModule this is: ``lightning.pytorch`` or ``pytorch_lightning``."""
    tops = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    return importlib.import_module("pytorch_lightning" if "pytorch_lightning" in tops else "lightning.pytorch")


class _Loader:
    """The recipe's micro-batches in order, as a data loader."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class _Schedule(torch.optim.lr_scheduler.LRScheduler):
    """The audit's replayed schedule as one of torch's, which Lightning asks for."""

    def __init__(self, replayed: Any) -> None:
        self._replayed = replayed
        self.optimizer = replayed.optimizer

    def step(self, *_: Any) -> None:
        """Go on to the next rates."""
        self._replayed.step()

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Return the rate of every group now."""
        return self._replayed.get_last_lr()  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return self._replayed.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position."""
        self._replayed.load_state_dict(state_dict)


def _in_place(lightning: ModuleType) -> type:
    """A strategy that leaves the module on its device when the fit ends."""
    base = importlib.import_module(f"{lightning.__name__}.strategies").SingleDeviceStrategy

    def teardown(self: Any) -> None:
        self.precision_plugin.teardown()

    return type("InPlaceStrategy", (base,), {"teardown": teardown, "strategy_name": "in_place"})


@contextlib.contextmanager
def _lent(model: nn.Module, configuration: tuple[list[Any], list[Any]]) -> Iterator[None]:
    """Give the module the audit's optimizers for a while, and keep it from fetching data."""
    zero_grad = model.zero_grad

    def clear(*arguments: Any, **keywords: Any) -> None:
        """A fit begins by clearing gradients; here it goes on with the step before, whose gradients may be left."""
        if not sys._getframe(1).f_globals.get("__name__", "").endswith(".trainer.trainer"):
            zero_grad(*arguments, **keywords)

    replaced = {**_DONE_ALREADY, "configure_optimizers": lambda: configuration, "zero_grad": clear}
    own = vars(model)
    before = {name: own[name] for name in (*replaced, "_trainer") if name in own}
    own.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            own.pop(name, None)
        own.update(before)
