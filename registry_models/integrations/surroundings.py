"""What a framework's trainer touches outside of the model, put back: environment, logging, accelerate's process state.

A training step of an audit runs the framework's own loop. It gets a temporary folder for whatever it writes, reports
nowhere, and reaches no network.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Loggers that say at every fit what their framework always says.
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning", "transformers", "accelerate")

#: Classes of accelerate that keep what they know once for the whole process.
_SHARED = ("PartialState", "AcceleratorState", "GradientState")


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[str]:
    """Give a temporary folder and put the process back as it was."""
    environment = dict(os.environ)
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with (
        tempfile.TemporaryDirectory(prefix="gradaudit-step-") as folder,
        warnings.catch_warnings(),
        ProcessState().lent(),
    ):
        warnings.simplefilter("ignore")  # the training itself has said it
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield folder
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            os.environ.clear()
            os.environ.update(environment)


class ProcessState:
    """A process state of accelerate's beside the present one: its device, precision and gradient accumulation."""

    def __init__(self) -> None:
        self._values: list[dict[str, Any]] = [{} for _ in _SHARED]

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Put this state in place of the present one for a while; at first it is empty, as in a new process."""
        places = _places()
        before = [dict(place) for place in places]
        _fill(places, self._values)
        try:
            yield
        finally:
            self._values = [dict(place) for place in places]
            _fill(places, before)

    @classmethod
    def now(cls) -> ProcessState:
        """Return the present one."""
        made = cls()
        made._values = [dict(place) for place in _places()]
        return made


def _places() -> list[dict[str, Any]]:
    if "accelerate" not in sys.modules and importlib.util.find_spec("accelerate") is None:
        return []
    state: Any = importlib.import_module("accelerate.state")
    return [getattr(state, name)._shared_state for name in _SHARED]


def _fill(places: list[dict[str, Any]], values: list[dict[str, Any]]) -> None:
    for place, held in zip(places, values, strict=False):
        place.clear()
        place.update(held)


def scale_with(accelerator: Any, scaler: torch.amp.GradScaler) -> None:
    """Let accelerate's fp16 use the audit's own scaler, also on a CPU."""
    accelerator.scaler = scaler
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"


@contextlib.contextmanager
def plain_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Take back the ``step`` that accelerate sets on an optimizer under fp16."""
    before = vars(optimizer).get("step")
    try:
        yield
    finally:
        if before is None:
            vars(optimizer).pop("step", None)
        else:
            vars(optimizer)["step"] = before


#: What accelerate leaves on a model that it has prepared; one that bears its mark is not prepared again.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


@contextlib.contextmanager
def prepared_for_a_while(model: nn.Module) -> Iterator[None]:
    """Let accelerate prepare a model anew, whatever a training left on it, and take back what it does to it."""
    before = {name: vars(model)[name] for name in _PREPARED if name in vars(model)}
    vars(model).pop("_is_accelerate_prepared", None)
    if "_original_forward" in before:
        vars(model)["forward"] = vars(model).pop("_original_forward")
    try:
        yield
    finally:
        for name in _PREPARED:
            vars(model).pop(name, None)
        vars(model).update(before)
