"""Whether a model can be written as pt2 beside its factory: weights without pickle, and a graph that MLflow serves."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import nn

from audits.recipe import Recipe
from audits.state import borrowed
from audits.subject import open_subject

_log = logging.getLogger(__name__)


class _InputsSeen(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward as soon as its inputs are known."""


def pt2_options(model: nn.Module, recipe: Recipe | None, given: Any = None) -> dict[str, Any] | None:
    """Return MLflow's options for writing the model as pt2, or None when it cannot be exported.

    Args:
        model: the model, in whatever mode; it is exported in eval mode, for serving.
        recipe: its recipe: the inputs that its loss gives the model are the example.
        given: the caller's own input example, as arrays or tensors.
    """
    inputs = _as_tensors(given) if given is not None else _inputs_of(model, recipe)
    if not inputs:
        return None
    try:
        with _in_eval_mode(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            shapes = [{0: torch.export.Dim.AUTO} if t.dim() else None for t in inputs]
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
            names = set(program.state_dict)
            signature = _signature(model, inputs)
    except Exception as error:  # whatever export cannot do is a reason to write safetensors instead
        text = str(error).splitlines()[0] if str(error) else ""
        _log.info("the model cannot be exported (%s: %s)", type(error).__name__, text)
        return None
    if names != set(model.state_dict()):
        return None
    plain = [t.numpy() for t in inputs if t.dtype is not torch.bfloat16]
    single = plain[0] if len(inputs) == len(plain) == 1 else None
    example = single if single is not None else list(inputs)
    return {"serialization_format": "pt2", "input_example": example, "signature": signature}


@contextlib.contextmanager
def on_cpu(model: nn.Module) -> Iterator[nn.Module]:
    """Give the model, or a copy of it on the CPU: an archive's tensors cannot be moved to another device."""
    tensors = [*model.parameters(), *model.buffers()]
    yield model if all(t.device.type == "cpu" for t in tensors) else copy.deepcopy(model).to("cpu")


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_eval_mode(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Put the model into eval mode for a while."""
    return _in_eval_mode(model)


def _inputs_of(model: nn.Module, recipe: Recipe | None) -> tuple[torch.Tensor, ...]:
    """What the first phase's loss calls the model with; nothing when that is more than positional tensors."""
    if recipe is None:
        return ()
    seen: list[tuple[Any, ...]] = []

    def remember(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not keywords and arguments and all(isinstance(a, torch.Tensor) for a in arguments):
            seen.append(tuple(a.detach().cpu().clone() for a in arguments))
        raise _InputsSeen

    try:
        with borrowed(model, torch.device("cpu")):
            handle = model.register_forward_pre_hook(remember, with_kwargs=True)
            try:
                with open_subject(model, recipe, device="cpu"):
                    pass
            finally:
                handle.remove()
    except Exception as error:  # a recipe that does not work is the audit's to report
        _log.debug("no inputs seen: %s", error)
    return seen[0] if seen else ()


def _as_tensors(given: Any) -> tuple[torch.Tensor, ...]:
    values = given if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(v, (np.ndarray, torch.Tensor)) for v in values):
        return ()
    return tuple(torch.as_tensor(v) for v in values)


def _signature(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> ModelSignature:
    names = list(inspect.signature(model.forward).parameters)[: len(inputs)]
    specs = []
    for name, tensor in zip(names, inputs, strict=False):
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        shape = (-1, *tensor.shape[1:]) if tensor.dim() else ()
        specs.append(TensorSpec(dtype, shape, name if len(inputs) > 1 else None))
    return ModelSignature(inputs=Schema(specs))
