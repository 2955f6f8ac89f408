"""An optimizer nobody declared: from what the source run logged, else SGD at 0.01."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Names under which training frameworks log the optimizer and its rate (MLflow's autologs, transformers' arguments).
_NAMES = ("optimizer_name", "optimizer", "optim")
_RATES = ("lr", "learning_rate", "optimizer_lr")

#: transformers' ``optim`` values that are torch's own optimizers.
_TRANSFORMERS = {"adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "sgd": "SGD", "adagrad": "Adagrad"}

#: transformers' names for options.
_RENAMED = {"eps": "adam_epsilon"}

#: transformers keeps weight decay off these, whatever the arguments say.
_NOT_DECAYED = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class ChosenOptimizer:
    """A live optimizer and where it comes from.

    Attributes:
        optimizer: on the model's trainable parameters.
        source: for the report.
        assumed: whether nothing said so.
        clip_grad_norm: the clipping that was logged with it.
    """

    optimizer: torch.optim.Optimizer
    source: str
    assumed: bool
    clip_grad_norm: float | None = None


def choose_optimizer(model: nn.Module, params: Mapping[str, str]) -> ChosenOptimizer:
    """Return the optimizer that the source run's parameters describe, else SGD at 0.01, assumed."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    logged = _logged(model, trainable, params)
    if logged is not None:
        return logged
    return ChosenOptimizer(torch.optim.SGD([p for _, p in trainable], lr=0.01), "SGD at 0.01", assumed=True)


def _logged(
    model: nn.Module, trainable: list[tuple[str, nn.Parameter]], params: Mapping[str, str]
) -> ChosenOptimizer | None:
    name = next((params[key] for key in _NAMES if params.get(key)), "")
    arguments = "adam_beta1" in params  # transformers.TrainingArguments were logged
    name = _TRANSFORMERS.get(name.rpartition(".")[2].lower(), name)
    optimizer_class = getattr(torch.optim, name.rpartition(".")[2], None)
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, torch.optim.Optimizer)):
        return None
    options: dict[str, Any] = {}
    for option in inspect.signature(optimizer_class).parameters:
        if option in ("params", "self", "foreach", "capturable", "differentiable", "fused"):
            continue
        text = params.get(option, params.get(_RENAMED.get(option, ""), None)) if option != "lr" else None
        if option == "lr":
            text = next((params[key] for key in _RATES if key in params), None)
        if text is not None:
            value = _value(text)
            if value is not None:
                options[option] = value
    if arguments and "betas" in inspect.signature(optimizer_class).parameters:
        options["betas"] = (_value(params["adam_beta1"]), _value(params.get("adam_beta2", "0.999")))
    groups: list[Any] = [p for _, p in trainable]
    if arguments and options.get("weight_decay"):
        decayed = _decayed(model)
        groups = [
            {"params": [p for n, p in trainable if n in decayed]},
            {"params": [p for n, p in trainable if n not in decayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    try:
        optimizer = optimizer_class(groups, **options)
    except (TypeError, ValueError):
        return None
    clip = _value(params.get("max_grad_norm", "")) if arguments else None
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    return ChosenOptimizer(
        optimizer,
        f"the source run's parameters ({optimizer_class.__name__}{': ' if said else ''}{said})",
        assumed=False,
        clip_grad_norm=float(clip) if isinstance(clip, (int, float)) and clip > 0 else None,
    )


def _decayed(model: nn.Module) -> set[str]:
    """Parameters that transformers' Trainer decays: none of a norm, no bias."""
    spared = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, _NOT_DECAYED) or "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    return {name for name, _ in model.named_parameters() if name not in spared and "bias" not in name.split(".")[-1]}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
