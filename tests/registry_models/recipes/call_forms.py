"""A model whose losses call it in every form there is: what travels with a version must not depend on the form."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Denoiser(nn.Module):
    """Predicts noise from a sample and a time; scale, condition, mask and nested extras are optional."""

    def __init__(self, width: int = 4, dtype: str = "float32") -> None:
        super().__init__()
        self.inner = nn.Linear(width + 1, width, dtype=getattr(torch, dtype))

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor | None = None,
        scale: float | torch.Tensor = 1.0,
        condition: torch.Tensor | None = None,
        extras: Any = None,
    ) -> torch.Tensor:
        time = torch.ones_like(x[:, :1]) if t is None else t.to(x.dtype)[:, None]
        y: torch.Tensor = self.inner(torch.cat([x, time], 1)) * scale
        if condition is not None:
            y = y + condition
        if isinstance(extras, dict):
            y = y + extras["shift"][0]
        elif extras is not None:
            y = y + extras[0]
        return y


class Packed(nn.Module):
    """Takes one dictionary, as models of a collator's output do."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, packed: dict[str, Any]) -> torch.Tensor:
        y: torch.Tensor = self.inner(packed["x"])
        return y


class Variadic(Packed):
    """Takes any number of tensors."""

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y: torch.Tensor = self.inner(torch.stack(tensors).sum(0))
        return y


class KeywordOnly(Packed):
    """Takes its tensors by name alone."""

    def forward(self, *, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y: torch.Tensor = self.inner(x * t[:, None])
        return y


def _batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, generator=generator).to(dtype)
    return {"x": x, "t": torch.linspace(0.1, 0.9, 6).to(dtype), "noise": torch.flip(x, [0]), "c": x * 0.5}


def _squared(out: torch.Tensor, batch: Any) -> torch.Tensor:
    return ((out - batch["noise"]) ** 2).mean()


def one(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"]), batch)


def positional(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["t"]), batch)


def keyword(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(x=batch["x"], t=batch["t"]), batch)


def keyword_turned(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(t=batch["t"], x=batch["x"]), batch)


def mixed(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], t=batch["t"]), batch)


def over_a_default(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["t"], condition=batch["c"]), batch)


def plain_number(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["t"], 0.5), batch)


def nothing_between(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], None, 1.0, batch["c"]), batch)


def scalar_tensor(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["t"], torch.tensor(0.5, dtype=batch["x"].dtype)), batch)


def a_list(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["t"], extras=[batch["c"]]), batch)


def a_tuple(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["t"], extras=(batch["c"],)), batch)


def nested(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["t"], extras={"shift": [batch["c"]]}), batch)


def a_dict(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model({"x": batch["x"]}), batch)


def twice(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["t"]) + model(batch["c"], t=batch["t"]), batch)


def many(model: nn.Module, batch: Any) -> torch.Tensor:
    return _squared(model(batch["x"], batch["c"], batch["noise"]), batch)


#: name -> model class, its arguments, loss, and the batch: every form in which a loss calls a model.
FORMS: dict[str, tuple[type[nn.Module], dict[str, Any], Any, dict[str, torch.Tensor]]] = {
    **{
        loss.__name__: (Denoiser, {}, loss, _batch())
        for loss in (
            one,
            positional,
            keyword,
            keyword_turned,
            mixed,
            over_a_default,
            plain_number,
            nothing_between,
            scalar_tensor,
            a_list,
            a_tuple,
            nested,
            twice,
        )
    },
    "positional in bfloat16": (Denoiser, {"dtype": "bfloat16"}, positional, _batch(torch.bfloat16)),
    "one in bfloat16": (Denoiser, {"dtype": "bfloat16"}, one, _batch(torch.bfloat16)),
    "positional in float64": (Denoiser, {"dtype": "float64"}, positional, _batch(torch.float64)),
    "a dictionary": (Packed, {}, a_dict, _batch()),
    "any number": (Variadic, {}, many, _batch()),
    "by name alone": (KeywordOnly, {}, keyword, _batch()),
}
