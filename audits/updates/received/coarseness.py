"""How coarse the products are that a gradient went through, where torch's switches allow TF32 or bfloat16."""

from __future__ import annotations

import weakref

import torch

from audits.lanes.precision import INSIDE_EPS, Product, inside_products, products_in
from audits.live.subject import Subject
from audits.updates.received.agreement import plain

#: `step.gradient` in eps of the arithmetic inside the products: as for bfloat16, whose gradients are of that kind.
GRADIENT_THRESHOLD = 4.0

#: `step.gradient` of a float64 gradient that is a sum weighted by counts: torch's quotient of two whole numbers is a
#: float32, whose rounding a step that weighs with it hands on; 2 roundings, the quotient's and the weighted loss's.
COUNTED_THRESHOLD = 2 * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps

#: A gradient that is pure cancellation (a bias before BatchNorm) is then rounding of that size as well: a tenth of an
#: eps of its neighbours, emulated; the threshold times this is four tenths.
GRADIENT_FLOOR = 0.1


#: What was found of the models under audit: a scan of all modules for each parameter's row would be quadratic.
_found: weakref.WeakKeyDictionary[Subject, frozenset[Product]] = weakref.WeakKeyDictionary()


def _products(subject: Subject) -> frozenset[Product]:
    if subject not in _found:
        _found[subject] = frozenset(products_in(subject.model))
    return _found[subject]


def gradient_threshold(subject: Subject, dtype: torch.dtype) -> tuple[float, float]:
    """Return the threshold of ``step.gradient`` in eps of the gradient's dtype, and the floor of its unit.

    Two runs of one step agree to the bit, or differ by the order of their sums; where products may round to TF32, a
    run may also have taken the algorithm that does where the other did not (benchmarked algorithms, another layout).

    Args:
        subject: the model, on its device.
        dtype: of the gradient, real.
    """
    threshold, floor = plain(dtype)
    if dtype is torch.float64 and any(w.count is not None or w.fixed for w in subject.weighings.values()):
        threshold = COUNTED_THRESHOLD
    inside = inside_products(_products(subject), subject.device) if dtype is torch.float32 else None
    if inside is None:
        return threshold, floor
    coarse = GRADIENT_THRESHOLD * INSIDE_EPS[inside] / torch.finfo(dtype).eps
    return max(threshold, coarse), max(floor, GRADIENT_FLOOR)


def dtype_name(subject: Subject, dtype: torch.dtype) -> str:
    """Return how a row names a parameter's dtype: ``torch.float32 (tf32)`` where its products may be coarser."""
    inside = inside_products(_products(subject), subject.device) if dtype in (torch.float32, torch.complex64) else None
    return f"{dtype} ({inside})" if inside else str(dtype)
