"""A transformers ``Trainer`` as plain values and back: its class, its arguments, the user's callbacks and attributes.

What only says where to write, what to report, when to evaluate and how data is loaded is left out: a training step of
an audit has none of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError
from audits.random_state import random_state_kept
from audits.recipe.callables import import_object
from audits.recipe.plain_values import UnstorableError
from registry_models.artifacts.transformers_files import import_transformers
from registry_models.inference.peft_parts import inner_model
from registry_models.integrations.own_objects import (
    from_plain,
    give_attributes,
    import_path,
    is_gradaudits,
    object_from_plain,
    object_to_plain,
    overridden,
    to_plain,
)

#: Options that change no optimizer step, by what their name begins with.
_LEFT_OUT = (
    "auto_find", "data", "ddp", "debug", "deepspeed", "disable_tqdm", "do_", "enable_jit", "eval", "fsdp", "full_",
    "greater", "group_by", "hub", "ignore_data", "include", "jit", "length_column", "load_best", "local_rank", "log",
    "max_steps", "metric", "mp_param", "num_train_epochs", "output_dir", "overwrite", "parallelism", "per_device",
    "predict", "project", "push", "ray", "remove_unused", "report_to", "restore", "resume", "run_name", "save",
    "skip_memory", "torch_compile", "torchdynamo", "tp_size", "train_sampling", "trackio", "use_cpu", "no_cuda",
    "use_mps", "use_ipex", "accelerator_config",
)  # fmt: skip

#: What stands in their place.
_HARMLESS: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "remove_unused_columns": False,
    "log_level": "error",
}

#: Methods and events that decide what an optimizer step does, by the checks that judge it.
_GRADIENT_METHODS = ("compute_loss", "training_step", "_get_num_items_in_batch", "get_batch_samples",
                     "_prepare_inputs", "_inner_training_loop", "_run_epoch", "train")  # fmt: skip
_EVENTS = ("on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step",
           "on_optimizer_step", "on_step_end", "on_epoch_end", "on_train_end")  # fmt: skip
_METHODS = {
    "step.gradient": (*_GRADIENT_METHODS, "_clip_grad_norm"),
    "step.gradient-present": _GRADIENT_METHODS,
    "step.clipping": ("_clip_grad_norm", *_GRADIENT_METHODS),
    "step.count": ("training_step", "_inner_training_loop", "_run_epoch", "train"),
    "step.learning-rate": ("training_step", "compute_loss", "_inner_training_loop", "_run_epoch", "train"),
    "step.mode": ("training_step", "compute_loss", "_prepare_inputs"),
}
_OPTIONS = {
    "step.gradient": ("gradient_accumulation_steps", "label_smoothing_factor", "max_grad_norm", "bf16", "fp16"),
    "step.gradient-present": ("gradient_accumulation_steps",),
    "step.clipping": ("max_grad_norm",),
    "step.count": ("gradient_accumulation_steps",),
    "step.learning-rate": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
}


#: What goes wrong in most losses of one's own.
_TOLD = "it is told num_items_in_batch, and loss_is_scaled_for_ga says whether it divides by it"


@dataclasses.dataclass(frozen=True)
class TrainerParts:
    """A Trainer as plain values.

    Attributes:
        trainer: its class and the attributes that its own class gave it.
        options: class of its `TrainingArguments`, and those that differ from the default.
        callbacks: the user's callbacks that act in an optimizer step.
        loss_function: what it was given as ``compute_loss_func``.
    """

    trainer: Mapping[str, Any]
    options: Mapping[str, Any]
    callbacks: Sequence[Mapping[str, Any]] = ()
    loss_function: Any = None

    @classmethod
    def of(cls, trainer: Any) -> TrainerParts:
        """Describe a live Trainer.

        Raises:
            RecipeError: its class or loss function cannot be found by another process.
        """
        transformers = import_transformers()
        loss_function = getattr(trainer, "compute_loss_func", None)
        try:
            plain_loss = None if loss_function is None else to_plain(loss_function)
        except UnstorableError:
            raise RecipeError(
                f"compute_loss_func {loss_function!r} is a lambda, closure or notebook cell: it cannot be stored. "
                "Cure: move it to a module that can be imported"
            ) from None
        own: dict[str, Any] = {"class": {"import": import_path(type(trainer))}}
        if type(trainer) is not transformers.Trainer:
            own = object_to_plain(trainer, without=_of_the_library())
        callbacks = [_callback(each, trainer) for each in _acting(trainer.callback_handler.callbacks)]
        return cls(own, options_of(trainer.args), callbacks, plain_loss)

    @property
    def whose_loss(self) -> str | None:
        """The user's own loss function, in words; None where the loss is the library's."""
        if self.loss_function is not None:
            return "compute_loss_func"
        base = import_transformers().Trainer
        changed = overridden(self.trainer_class, base, ("compute_loss",))
        set_here = "compute_loss" in (self.trainer.get("attributes") or {})
        return f"{self.trainer_class.__name__}.compute_loss" if changed or set_here else None

    @property
    def trainer_class(self) -> type:
        """The Trainer's class."""
        return import_object(self.trainer["class"]["import"], role="Trainer")  # type: ignore[no-any-return]

    @property
    def described(self) -> list[Mapping[str, Any]]:
        """The objects that are described by their attributes."""
        return [self.trainer, *self.callbacks]

    def build(
        self, model: nn.Module, device: torch.device, folder: str, optimizers: tuple[Any, Any] = (None, None)
    ) -> Any:
        """Return a Trainer of this kind around a model; the random generators stay where they are.

        Args:
            model: what it trains.
            device: where.
            folder: its ``output_dir``.
            optimizers: optimizer and scheduler; none is made otherwise.

        Raises:
            RecipeError: the installed transformers does not know an option.
        """
        transformers = import_transformers()
        made: Any = object.__new__(self.trainer_class)
        with random_state_kept(), _configuration_kept(model):
            arguments = self._arguments(device, folder)
            callbacks = [object_from_plain(plain) for plain in self.callbacks]
            keywords = {} if self.loss_function is None else {"compute_loss_func": from_plain(self.loss_function)}
            transformers.Trainer.__init__(
                made, model=model, args=arguments, callbacks=callbacks, optimizers=optimizers, train_dataset=[0],
                **keywords,
            )  # fmt: skip
            give_attributes(made, self.trainer)
        for callback, plain in zip(callbacks, self.callbacks, strict=True):
            for name in plain.get("holds_trainer") or ():
                setattr(callback, name, made)
        made.remove_callback(transformers.PrinterCallback)
        return made

    def _arguments(self, device: torch.device, folder: str) -> Any:
        cls = import_object(self.options["class"]["import"], role="TrainingArguments")
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        options = from_plain(self.options["options"])
        for name in options:
            if name not in known:
                raise RecipeError(f"the installed transformers has no option {name!r} in {cls.__name__}")
        on_cpu = device.type == "cpu"
        if on_cpu:
            options.pop("fp16", None)  # accelerate refuses or ignores it there: the step brings autocast and scaler
        harmless = {name: value for name, value in _HARMLESS.items() if name in known}
        arguments = cls(**{**options, **harmless, "output_dir": folder, "use_cpu": on_cpu})
        assert arguments.device is not None  # the devices are counted here, once
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments

    def where_to_look(self, check: str) -> str | None:
        """Return what of the user's own code, else which options, decide what a check judges."""
        transformers = import_transformers()
        cls = self.trainer_class
        found = [f"{cls.__name__}.{name}" for name in overridden(cls, transformers.Trainer, _METHODS.get(check, ()))]
        if self.loss_function is not None and check.startswith("step.gradient"):
            found.append(f"compute_loss_func ({self.loss_function.get('import', '')})")
        found = [f"{name} ({_TOLD})" if name.endswith(".compute_loss") else name for name in found]
        for plain in self.callbacks:
            callback = import_object(plain["class"]["import"], role="callback")
            events = overridden(callback, transformers.TrainerCallback, _EVENTS)
            found += [f"{callback.__name__}.{event}" for event in events]
        if found:
            return f"Look at {', '.join(found)}."
        options = self.options["options"]
        known = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
        texts = [
            f"{name}={options.get(name, known[name].default)}" for name in _OPTIONS.get(check, ()) if name in known
        ]
        if not texts:
            return None
        return f"The Trainer's own code did this, with TrainingArguments({', '.join(texts)})."


def options_of(arguments: Any) -> dict[str, Any]:
    """Return a `TrainingArguments` as plain values: what differs from the default and matters for a step."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if not field.init or field.name.startswith(_LEFT_OUT) or value == default:
            continue
        with contextlib.suppress(UnstorableError):
            options[field.name] = to_plain(value)
    return {"class": {"import": import_path(type(arguments))}, "options": options}


def takes_count(model: Any) -> bool:
    """Whether the Trainer passes ``num_items_in_batch`` to this model's loss, by the Trainer's own rule."""
    model = inner_model(model)
    declared = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _of_the_library() -> set[str]:
    """Names of what `transformers.Trainer` itself keeps on an instance: stores to ``self`` in its own code."""
    base = import_transformers().Trainer
    names = {"args", "model", "model_wrapped", "optimizer", "lr_scheduler", "accelerator", "callback_handler"}
    for value in vars(base).values():
        code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
        if code is not None:
            names.update(each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR")
    return names - {"loss_is_scaled_for_ga"}


def _acting(callbacks: Sequence[Any]) -> Iterator[Any]:
    """Yield the user's callbacks that do something around an optimizer step."""
    base = import_transformers().TrainerCallback
    for callback in callbacks:
        library = type(callback).__module__.partition(".")[0] == "transformers"
        if not library and not is_gradaudits(callback) and overridden(type(callback), base, _EVENTS):
            yield callback


def _callback(callback: Any, trainer: Any) -> dict[str, Any]:
    holding = [name for name, value in vars(callback).items() if value is trainer]
    plain = object_to_plain(callback, without=holding)
    return {**plain, **({"holds_trainer": holding} if holding else {})}


@contextlib.contextmanager
def _configuration_kept(model: Any) -> Iterator[None]:
    """A Trainer switches the cache of its model's configuration off."""
    configuration: Any = getattr(model, "config", None)
    before = getattr(configuration, "use_cache", None)
    try:
        yield
    finally:
        if before is not None:
            configuration.use_cache = before


def labels_counted(model: Any, trainer: Any = None) -> bool:
    """Whether the first label of every row is no target: a causal model predicts the next token.

    Args:
        model: the model, without wrappers.
        trainer: its Trainer, which knows where it is new enough.
    """
    known = getattr(trainer, "_loss_shifts_labels", None)
    if known is not None:
        return bool(known)
    return is_causal(model)


def is_causal(model: Any) -> bool:
    """Whether transformers lists the model's class among the causal language models."""
    model = inner_model(model)
    names = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return type(model).__name__ in set(names.values()) and not encoder_decoder
