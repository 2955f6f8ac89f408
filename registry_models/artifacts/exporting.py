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
from mlflow.models import ModelSignature, convert_input_example_to_serving_input
from mlflow.types import Schema, TensorSpec
from torch import nn

from audits.errors import ArtifactError
from audits.live.state import borrowed
from audits.live.subject import open_subject
from audits.recipe.recipe import Recipe

_log = logging.getLogger(__name__)


class _InputsSeen(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward as soon as its inputs are known."""


class NotExportableError(ArtifactError):
    """The model cannot be written as pt2; the text says why."""


def pt2_options(model: nn.Module, recipe: Recipe | None, given: Any = None) -> dict[str, Any]:
    """Return MLflow's options for writing the model as pt2.

    Args:
        model: the model, in whatever mode; it is exported in eval mode, for serving.
        recipe: its recipe: the inputs that its loss gives the model are the example.
        given: the caller's own input example, as arrays or tensors.

    Raises:
        NotExportableError: it cannot be exported, or its inputs are more than positional tensors.
    """
    inputs = _as_tensors(given) if given is not None else _inputs_of(model, recipe)
    try:
        with _in_eval_mode(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            signature = _signature(model, inputs)
            shapes = [{0: torch.export.Dim.AUTO} if t.dim() else None for t in inputs]
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
            names = set(program.state_dict)
    except NotExportableError:
        raise
    except Exception as error:  # whatever export cannot do is a reason to write safetensors instead
        text = str(error).splitlines()[0] if str(error) else ""
        raise NotExportableError(f"torch.export cannot export it ({type(error).__name__}: {text})") from error
    if names != set(model.state_dict()):
        raise NotExportableError("torch.export names its tensors otherwise than the model does")
    plain = [t.numpy() for t in inputs]
    # MLflow stores one array as an example; several it takes as a tuple, unstored, for a list it would write as JSON.
    example = plain[0] if len(plain) == 1 else tuple(inputs)
    return {"serialization_format": "pt2", "input_example": example, "signature": signature}


def example_for_mlflow(given: Any) -> Any:
    """Return the caller's input example as MLflow stores it, or None where it takes no such example."""
    if isinstance(given, torch.Tensor):
        given = _array(given)
    elif isinstance(given, dict):
        given = {key: _array(value) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    try:
        convert_input_example_to_serving_input(given)
    except Exception:  # MLflow's refusals, and those of the JSON it writes
        return None
    return given


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
    """What the first phase's loss calls the model with, in the order of its forward's parameters.

    Raises:
        NotExportableError: that is more than tensors that can be given by position.
    """
    if recipe is None:
        raise NotExportableError("neither a recipe nor input_example= says what its inputs are")
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def remember(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((arguments, keywords))
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
        _log.debug("the loss ended with %s", error)
    if not seen:
        raise NotExportableError("the recipe's loss does not call the model itself")
    arguments = _by_position(model, *seen[0])
    if not arguments or not all(isinstance(value, torch.Tensor) for value in arguments):
        raise NotExportableError(f"its loss calls the model with {_forms(*seen[0])}; pt2 takes tensors by position")
    return tuple(value.detach().cpu().clone() for value in arguments)


def _by_position(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """The call's arguments by position; empty where one can be given by name alone, or stands after one left out."""
    try:
        bound = inspect.signature(model.forward).bind(*arguments, **keywords)
    except (TypeError, ValueError):  # the forward itself will say so
        return ()
    return () if bound.kwargs else bound.args


def _forms(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What a call was made of, such as ``a Tensor, a dict, t= a Tensor``."""
    parts = [_form(value) for value in arguments] + [f"{name}= {_form(value)}" for name, value in keywords.items()]
    return ", ".join(parts) or "nothing"


def _form(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _as_tensors(given: Any) -> tuple[torch.Tensor, ...]:
    values = given if isinstance(given, (tuple, list)) else (given,)
    if not values or not all(isinstance(v, (np.ndarray, torch.Tensor)) for v in values):
        raise NotExportableError(f"the input example is {_form(given)}, not arrays or tensors alone")
    return tuple(torch.as_tensor(v).detach().cpu() for v in values)


def _array(tensor: torch.Tensor) -> Any:
    """The tensor as an array, or as it is where numpy has no such type."""
    try:
        return tensor.detach().cpu().numpy()
    except (TypeError, RuntimeError):
        return tensor


def _signature(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> ModelSignature:
    """The inputs' types and shapes, the first dimension free.

    Raises:
        NotExportableError: an element type that MLflow does not know, or a forward that takes any number of inputs.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    if len(names) < len(inputs):
        raise NotExportableError("its forward takes any number of tensors")
    specs = []
    for name, tensor in zip(names, inputs, strict=False):
        try:
            dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        except TypeError as error:
            raise NotExportableError(f"MLflow stores no {str(tensor.dtype).removeprefix('torch.')} inputs") from error
        shape = (-1, *tensor.shape[1:]) if tensor.dim() else ()
        specs.append(TensorSpec(dtype, shape, name if len(inputs) > 1 else None))
    return ModelSignature(inputs=Schema(specs))
