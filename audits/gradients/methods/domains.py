"""A tensor moved without leaving what it is: positive stays positive, probabilities go on adding up to one.

A Function that is judged alone gets its arguments out of their context. Whatever holds of a tensor's values exactly (a
sign, a range, a sum, a norm, a symmetry, zeros) may be what the Function relies on, so it is kept: the tensor is
written as ``x = valid(z)`` and z is what moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Sums and norms count as one within this many roundoffs of the dtype that made them (float32: a softmax over 50,000
#: classes adds up to one within 2e-6).
ONE = 1e-5

#: A product with its own transpose is symmetric but for the order of its sums: 64 roundoffs of float32, as in the
#: native-dtype check.
SYMMETRIC = 64 * 2.0**-24

#: Constant tensors are varied by factors from this range: never away from zero, so that a bound of one stays one.
LEAST, MOST = 0.5, 1.0

#: What zeros become (a zero-initialised weight or bias): a tenth of what an untrained layer's output has.
SMALL = 0.1


@dataclass(frozen=True)
class Domain:
    """A tensor as a function of unconstrained values.

    Attributes:
        free: the values z at which ``valid`` gives the tensor.
        valid: from values near z to a tensor of the same kind.
    """

    free: torch.Tensor
    valid: Callable[[torch.Tensor], torch.Tensor]


def domain_of(tensor: torch.Tensor) -> Domain:
    """Return the tensor as a function of values that may move freely.

    Args:
        tensor: a real or complex tensor, detached.
    """
    if tensor.is_complex() or not tensor.numel() or not bool(tensor.isfinite().all()):
        return Domain(tensor, lambda z: z.clone())
    held = tensor == 0
    inner = _kept_sign(tensor, held)
    outer = _kept_whole(tensor)
    if bool(held.all()) or not bool(held.any()):
        return Domain(inner.free, lambda z: outer(inner.valid(z)))
    return Domain(inner.free, lambda z: outer(torch.where(held, tensor, inner.valid(z))))


def _kept_sign(tensor: torch.Tensor, held: torch.Tensor) -> Domain:
    """Keep the open range that the values lie in; elements that are held do not count."""
    values = tensor[~held]
    if not values.numel():
        return Domain(tensor, lambda z: z.clone())
    least, most = float(values.min()), float(values.max())
    safe = torch.where(held, torch.full_like(tensor, float(values[0])), tensor)
    if least > 0 and most < 1:
        return Domain(torch.logit(safe), torch.sigmoid)
    if least > 0:
        return Domain(safe.log(), torch.exp)
    if most < 0:
        return Domain((-safe).log(), lambda z: -z.exp())
    if least > -1 and most < 1:
        return Domain(torch.atanh(safe), torch.tanh)
    return Domain(tensor, lambda z: z.clone())


def _kept_whole(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keep what holds of whole rows: a sum or a norm of one, a matrix's symmetry."""
    for dim in range(-1, -tensor.dim() - 1, -1):
        if tensor.shape[dim] < 2:
            continue
        if bool((tensor >= 0).all()) and _all_one(tensor.sum(dim)):
            return lambda x, dim=dim: x / x.sum(dim, keepdim=True)  # type: ignore[misc]
        if _all_one(tensor.square().sum(dim)):
            return lambda x, dim=dim: x / x.square().sum(dim, keepdim=True).sqrt()  # type: ignore[misc]
    if tensor.dim() > 1 and tensor.numel() > 1 and bool((tensor >= 0).all()) and _all_one(tensor.sum()):
        return lambda x: x / x.sum()
    square = tensor.dim() >= 2 and tensor.shape[-1] == tensor.shape[-2] > 1
    if square and bool((tensor - tensor.mT).abs().max() <= SYMMETRIC * tensor.abs().max()):
        return lambda x: (x + x.mT) / 2
    return lambda x: x


def _all_one(sums: torch.Tensor) -> bool:
    return bool((sums - 1).abs().le(ONE).all())


def is_special(tensor: torch.Tensor) -> bool:
    """Whether the values are a special case that hides mistakes: all zero, all the same, or the same along a dim."""
    if tensor.numel() < 2 or not bool(tensor.isfinite().all()):
        return False
    if bool((tensor == 0).all()):
        return True
    return any(size > 1 and bool((tensor == tensor.narrow(dim, 0, 1)).all()) for dim, size in enumerate(tensor.shape))


def varied(tensor: torch.Tensor, generator: torch.Generator, *, data: bool) -> torch.Tensor:
    """Return a special tensor with its values told apart, within what it is.

    Constants get factors from 0.5 to 1, and rows that added up to one still do. In data, ones and zeros may as well be
    a mask: they become ones and zeros at random. Elsewhere zeros become small positive numbers.

    Args:
        tensor: a special real tensor.
        generator: where the factors come from.
        data: whether it comes with the batch.
    """
    draws = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    if data and bool(((tensor == 0) | (tensor == 1)).all()):
        pattern = (draws < LEAST).to(tensor.dtype)
        flat = pattern.reshape(-1)
        flat[0], flat[-1] = 1.0, 0.0
        return flat.view(tensor.shape)
    factors = (LEAST + (MOST - LEAST) * draws).to(tensor.dtype)
    if bool((tensor == 0).all()):
        return SMALL * factors
    return _kept_whole(tensor)(tensor * factors)
