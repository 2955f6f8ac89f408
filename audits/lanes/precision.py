"""Which arithmetic an operation really ran in: its tensors' dtype, or something coarser that a switch allows.

torch multiplies float32 matrices in TF32 (10 bits of mantissa in place of 23) where it is allowed to: on CUDA in
convolutions and RNNs by default, in matrix products where the user says so; oneDNN does the same on CPUs, in TF32 or
bfloat16. Whoever compares a gradient with a finer one asks here how fine it can be.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from audits.lanes.lifting import traits
from audits.structures import tensors_in

#: Spacing of the numbers around 1 in the arithmetic inside a float32 product, `torch.finfo`'s ``eps``: twice the unit
#: roundoff, which is 2^-11 for TF32 (NVIDIA, Ampere white paper: 10 explicit bits) and 2^-8 for bfloat16.
INSIDE_EPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}

#: First compute capability whose tensor cores know TF32.
TF32_FROM = 8

#: Dimensions of a convolution's weight, at least: whatever module or function applies it.
CONVOLUTION_DIMENSIONS = 3

#: float32, and its complex counterpart, are multiplied in coarser arithmetic; no other dtype is.
_SINGLE = (torch.float32, torch.complex64)


class Product(StrEnum):
    """Kinds of operations that have a precision switch of their own."""

    MATMUL = "matmul"
    CONVOLUTION = "conv"
    RECURRENT = "rnn"


@dataclass(frozen=True)
class Arithmetic:
    """What an operation computed in.

    Attributes:
        dtype: of the tensors it was given, or of what autocast made of them.
        eps: spacing around 1 of the coarsest number it rounds its factors to: `torch.finfo`'s ``eps`` convention.
        inside: name of an arithmetic coarser than the dtype, if it may have run in one.
    """

    dtype: torch.dtype
    eps: float
    inside: str | None = None

    @property
    def roundoff(self) -> float:
        """Unit roundoff: half the spacing."""
        return self.eps / 2

    def __str__(self) -> str:
        return f"{self.dtype} ({self.inside})" if self.inside else str(self.dtype)


#: Matrix products by name. Decompositions and solvers call cuBLAS, and their backwards are products.
_MATMUL = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr", "linear", "matmul", "einsum",
    "_addmm_activation", "linear_backward", "mkldnn_linear", "_mkldnn_linear", "_trilinear", "_grouped_mm",
    "_euclidean_dist", "_cdist_forward", "_cdist_backward", "matmul_backward", "triangular_solve", "cholesky_inverse",
    "cholesky_solve", "cholesky", "_transformer_encoder_layer_fwd", "_native_multi_head_attention", "conv_tbc",
    "conv_tbc_backward",
})  # fmt: skip
#: Reductions and views that bear the names of decompositions.
_NO_PRODUCT = frozenset({
    "linalg_vector_norm", "linalg_norm", "linalg_cross", "linalg_diagonal", "linalg_vecdot", "lu_unpack",
})  # fmt: skip
_MATMUL_STARTS = ("linalg_", "_linalg_", "lu_", "_scaled_dot_product_", "_efficient_attention_", "_flash_attention_")


@functools.cache
def product_of(operation: str) -> Product | None:
    """Return the kind of product an operation is by its name (``addmm``, ``convolution_backward``), or None."""
    if operation in _NO_PRODUCT:
        return None
    if "rnn" in operation and operation.strip("_").startswith(("cudnn", "mkldnn", "miopen")):
        return Product.RECURRENT
    if operation in _MATMUL or operation.startswith(_MATMUL_STARTS):
        return Product.MATMUL
    if "convolution" in operation or "_conv" in operation or operation.startswith("conv"):
        return Product.CONVOLUTION
    return None


def float32_precision(device: torch.device, product: Product) -> str:
    """Return what torch's switches let a float32 product on a device run in: ``ieee``, ``tf32`` or ``bf16``.

    The names of torch 2.9 and newer are read where they exist (there they always answer, whichever names the user
    set); the old ones elsewhere. Reading the old ones in a newer torch raises once the new ones were set.
    """
    if device.type == "cuda":
        return _on_cuda(device, product)
    if device.type in ("cpu", "xpu"):  # both run oneDNN
        return _switch(_mkldnn(), product.value) or _old_mkldnn()
    return "ieee"


def _on_cuda(device: torch.device, product: Product) -> str:
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0" or not _has_tf32(device):
        return "ieee"
    backends = torch.backends
    if product is Product.MATMUL:
        return _switch(backends.cuda, "matmul") or _old(lambda: backends.cuda.matmul.allow_tf32)
    found = _switch(backends.cudnn, product.value) or _old(lambda: backends.cudnn.allow_tf32)
    if found == "ieee" and product is Product.CONVOLUTION:
        # What cuDNN does not do falls back to matrix products.
        return float32_precision(device, Product.MATMUL)
    return found


def _has_tf32(device: torch.device) -> bool:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return torch.version.hip is not None
    return torch.cuda.get_device_capability(device)[0] >= TF32_FROM


def _mkldnn() -> Any:
    return torch.backends.mkldnn


def _switch(backend: Any, name: str) -> str | None:
    """Return the new switch's answer, None where this torch has none."""
    try:
        found = getattr(backend, name).fp32_precision
    except (AttributeError, RuntimeError):
        return None
    return "ieee" if found in (None, "none") else str(found)


def _old(read: Any) -> str:
    try:
        return "tf32" if read() else "ieee"
    except (AttributeError, RuntimeError):
        return "ieee"


def _old_mkldnn() -> str:
    return "bf16" if torch.get_float32_matmul_precision() == "medium" else "ieee"


def products_in(model: nn.Module) -> set[Product]:
    """Return the kinds of products that a model's backward may run through, by its parameters and modules.

    A matrix product can be anywhere; a convolution has a weight of three or more dimensions.
    """
    found = {Product.MATMUL}
    if any(p.dim() >= CONVOLUTION_DIMENSIONS for p in model.parameters()):
        found.add(Product.CONVOLUTION)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        found.add(Product.RECURRENT)
    return found


def inside_products(products: Iterable[Product], device: torch.device) -> str | None:
    """Return the coarsest arithmetic that a model's float32 products may run in, None for float32 itself."""
    answers = {float32_precision(device, product) for product in products}
    coarse = [name for name in answers if name in INSIDE_EPS]
    return max(coarse, key=lambda name: INSIDE_EPS[name], default=None)


def arithmetic(
    operation: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    autocast: torch.dtype | None = None,
    length: int = 1,
) -> Arithmetic:
    """Return the arithmetic an operation ran in, forward and backward.

    Args:
        operation: its name without namespace and overload.
        dtype: of its floating tensors, the coarsest one.
        device: where they are.
        autocast: autocast's dtype, if the operation was called under it (and not seen below it).
        length: the longest dimension of its tensors: numbers that a product may add up.
    """
    product = product_of(operation)
    if product is not None and autocast is not None and dtype in _SINGLE:
        dtype = autocast
    eps = torch.finfo(dtype).eps
    if product is None:
        return Arithmetic(dtype, eps)
    if dtype in _SINGLE:
        inside = float32_precision(device, product)
        if inside in INSIDE_EPS:
            return Arithmetic(dtype, INSIDE_EPS[inside], inside)
    elif dtype is torch.float16 and device.type == "cuda" and _adds_in_float16():
        # Each of n additions rounds: independent roundings grow with the root of their number.
        return Arithmetic(dtype, eps * math.sqrt(max(length, 1)), "float16 accumulation")
    # Reduced-precision reductions (on by default in CUDA) round a few partial sums to the dtype itself: that is the
    # rounding its eps already stands for.
    return Arithmetic(dtype, eps)


def _adds_in_float16() -> bool:
    return bool(getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False))


class Observing(TorchDispatchMode):
    """Note the coarsest arithmetic of the products that run, in forwards and backwards.

    Attributes:
        found: the coarsest so far; None while no product ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Arithmetic | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = traits(func).base
        if product_of(name) is not None:
            floats = [t for _, t in tensors_in((args, kwargs)) if t.dtype.is_floating_point or t.dtype.is_complex]
            if floats:
                dtype = max((t.dtype for t in floats), key=lambda d: torch.finfo(d).eps)
                length = max((size for t in floats for size in t.shape), default=1)
                seen = arithmetic(name, dtype, floats[0].device, length=length)
                if self.found is None or seen.eps > self.found.eps:
                    self.found = seen
        return func(*args, **kwargs)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Let float32 products run in float32 for the while: where float32 is the instrument, not what is judged.

    Switches that allow nothing coarser are left alone, and what is changed is put back to what it was. They are set by
    the names of torch 2.9, which need no leave from `torch.backends.disable_global_flags`; an older torch is left as
    it is, and its noise is measured like any other.
    """
    changed: list[tuple[Any, str]] = []
    try:
        for backend, name in (
            (torch.backends.cuda, "matmul"), (torch.backends.cudnn, "conv"), (torch.backends.cudnn, "rnn"),
            (_mkldnn(), "matmul"), (_mkldnn(), "conv"), (_mkldnn(), "rnn"),
        ):  # fmt: skip
            found = _switch(backend, name)
            if found in INSIDE_EPS:
                assert found is not None
                changed.append((getattr(backend, name), found))
                getattr(backend, name).fp32_precision = "ieee"
        yield
    finally:
        for switch, found in reversed(changed):
            switch.fp32_precision = found
