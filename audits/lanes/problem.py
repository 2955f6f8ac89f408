"""What is evaluated: a scalar function of named tensors, and the conditions it is evaluated under."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from audits.devices import lengths_on_device
from audits.lanes.tape import Tape
from audits.outcomes import Lane
from audits.recipe.compiled_parts import eager

Tensors = Mapping[str, torch.Tensor]

#: Unit roundoff of the lanes' dtypes: half an ulp of 1.
UNIT_ROUNDOFF = {Lane.FLOAT64: 2.0**-53, Lane.FLOAT32: 2.0**-24}


class LaneError(Exception):
    """The loss cannot be evaluated in this lane; the text says why."""


@dataclass
class Problem:
    """A scalar function of named leaf tensors.

    Attributes:
        tensors: the leaf tensors, changed in place while probing.
        loss: evaluates the function at their present values.
        before: puts back whatever an evaluation changes by itself, and seeds.
        tape: the noise to play back.
        lane: the arithmetic it runs in.
        at_point: called before the first evaluation at a new theta.
        dtypes: the tensors' dtypes before the lane lifted them.
        asked: names of batch tensors whose gradient the recipe's batch asks for (``requires_grad``).
        paths: batch tensors' paths in the batch, by name.
        model: the module the tensors are parameters of, where they are.
        hooked: whether hooks of the model's parameters may step an optimizer inside a backward.
        batches: the micro-batches the loss is computed on, each with its weight; another one may take a place.
        native: the tensors' values before the lane lifted them, by name: cast up they are the values at the start, so
            that those need not be held twice. Not to be written.
        observe: called with autograd's gradient of each tensor at the start, when it is ready.
    """

    tensors: Tensors
    loss: Callable[[], torch.Tensor]
    before: Callable[[], None]
    tape: Tape = field(default_factory=Tape)
    lane: Lane = Lane.FLOAT64
    at_point: Callable[[], None] | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    paths: Mapping[str, str] = field(default_factory=dict)
    model: nn.Module | None = None
    hooked: bool = False
    batches: list[tuple[float, Any]] = field(default_factory=list)
    native: Tensors = field(default_factory=dict)
    observe: Callable[[str, torch.Tensor], None] | None = None

    @property
    def roundoff(self) -> float:
        """Unit roundoff u of the lane."""
        return UNIT_ROUNDOFF[self.lane]

    @property
    def lifts(self) -> bool:
        """Whether low-precision values inside the forward are lifted."""
        return self.lane is Lane.FLOAT64


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Return a real view: real and imaginary parts of a complex tensor are elements of their own."""
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def may_step(model: nn.Module) -> bool:
    """Whether hooks of the parameters may step an optimizer inside a backward."""
    return any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def differentiate(loss: torch.Tensor, tensors: Tensors, *, hooked: bool = False) -> dict[str, torch.Tensor | None]:
    """Return autograd's gradients by a plain backward; gradients of all other leaves are dropped.

    Args:
        loss: a scalar.
        tensors: the leaves.
        hooked: leave the hooks of the parameters out: an optimizer that steps there would take the gradients away.
    """
    if hooked:
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        return dict(zip(tensors, found, strict=True))
    for tensor in tensors.values():
        tensor.grad = None
    if not loss.requires_grad:
        return dict.fromkeys(tensors, None)
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    return gradients


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Evaluate with gradients on, autocast off, compiled parts eager, warnings held back."""
    with warnings.catch_warnings(), torch.enable_grad(), eager(), lengths_on_device():
        warnings.simplefilter("ignore")
        yield
