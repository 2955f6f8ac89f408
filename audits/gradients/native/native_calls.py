"""The operations of one native forward, each with the inputs it got: what `audits.gradients.native.native` judges."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from audits.lanes.lifting import LIFTED_DTYPE, lift_call, traits
from audits.lanes.problem import quiet
from audits.lanes.tape import draws
from audits.lanes.watching import FunctionDepth, ModuleStack
from audits.live.subject import LivePhase, Subject
from audits.structures import map_tensors, tensors_in

#: Copies of inputs, parameters apart, kept for judging, in bytes: past it further signatures are left out.
KEPT_BYTES = 2**30

#: Moves values without arithmetic, or draws: nothing to judge.
_SKIPPED = frozenset({"clone", "detach", "lift_fresh", "_local_scalar_dense", "copy", "alias", "_to_copy"})


@dataclass(frozen=True)
class NativeCall:
    """One operation with the inputs it got in the native run; parameters are the model's own, not copies.

    Attributes:
        own: whether it is a custom Function.
        writes: whether it may write into its arguments.
    """

    name: str
    path: str
    label: str
    run: Callable[..., Any]
    lifted: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: bool = False
    writes: bool = True


class _Collector(TorchDispatchMode):
    """Keep one call per operation, shapes, dtypes and options."""

    def __init__(self, stack: ModuleStack, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.calls: dict[Any, NativeCall] = {}
        self.left_out = 0
        self._stack = stack
        self._bytes = 0
        self._parameters = {place for p in parameters if (place := _storage(p))}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = traits(func)
        if not (known.is_view or known.base in _SKIPPED or "out" in kwargs or draws(func, args, kwargs)):
            self.keep(known.base, _as_trained(func), _in_float64(func), args, kwargs)
        return func(*args, **kwargs)

    def keep(self, name: str, run: Any, lifted: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
             own: bool = False) -> None:  # fmt: skip
        """Copy the inputs of a call unless an equal one is kept."""
        if not any(is_low_float(t) for t in tensors_of((args, kwargs))):
            return
        key = (run, _signature(args), _signature(kwargs))
        if key in self.calls:
            return
        size = sum(t.numel() * t.element_size() for t in tensors_of((args, kwargs)) if not self._is_parameter(t))
        if self._bytes + size > KEPT_BYTES:
            self.left_out += 1
            return
        self._bytes += size
        path = self._stack.path
        kept = map_tensors(args, self._kept), map_tensors(kwargs, self._kept)
        writes = own or bool(traits(run).written)
        self.calls[key] = NativeCall(name, path, self._stack.label(path), run, lifted, *kept, own=own, writes=writes)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach() if self._is_parameter(tensor) else tensor.detach().clone()

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._parameters


def collect_calls(subject: Subject, phase: LivePhase) -> tuple[list[NativeCall], int]:
    """Run the phase's loss natively; return its differentiable operations and how many were left out for memory."""
    subject.reset()
    stack = ModuleStack(subject.model)
    collector = _Collector(stack, subject.model.parameters())

    def observe(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not cls.__module__.startswith("torch."):
            collector.keep(cls.__qualname__.rpartition("<locals>.")[2], cls.apply, cls.apply, args, kwargs,
                           own=True)  # fmt: skip

    with quiet(), subject.autocast(), stack.watching(), FunctionDepth().watching(observe), collector:
        subject.loss(phase)
    return list(collector.calls.values()), collector.left_out


#: The backend of torch's fused attention by its operator.
_FUSED_ATTENTION = {
    "_scaled_dot_product_flash_attention": SDPBackend.FLASH_ATTENTION,
    "_scaled_dot_product_efficient_attention": SDPBackend.EFFICIENT_ATTENTION,
    "_scaled_dot_product_cudnn_attention": SDPBackend.CUDNN_ATTENTION,
}


@functools.cache
def _as_trained(func: Any) -> Callable[..., Any]:
    """Return the operation as training calls it: fused attention by the public function, held to the backend that ran.

    The inner operator's contract is torch's own affair: which of its outputs its backward needs, in what layout.
    """
    backend = _FUSED_ATTENTION.get(traits(func).base)
    return func if backend is None else _attention(func, backend)


@functools.cache
def _in_float64(func: Any) -> Callable[..., Any]:
    """Return the operation for float64 arguments: fused attention kernels are replaced by plain attention."""
    base = traits(func).base
    if base.startswith("_scaled_dot_product_") and not base.endswith("_for_cpu"):
        return _attention(func, SDPBackend.MATH)

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs, _ = lift_call(func, args, kwargs)
        return func(*args, **kwargs)

    return run


def _attention(func: Any, backend: SDPBackend) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        a = traits(func).bind(args, kwargs)
        if a.get("dropout_p"):
            raise NotImplementedError("fused dropout inside attention")
        q, k, v = a["query"], a["key"], a["value"]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=a.get("attn_bias", a.get("attn_mask")), is_causal=bool(a.get("is_causal")),
                scale=a.get("scale"), enable_gqa=q.shape[-3] != k.shape[-3],
            )  # fmt: skip

    return run


def is_low_float(tensor: torch.Tensor) -> bool:
    """Whether a kernel of less than float64 works on the tensor."""
    return tensor.dtype in LIFTED_DTYPE and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors in an operation's arguments or results."""
    return [tensor for _, tensor in tensors_in(value)]


def _storage(tensor: torch.Tensor) -> int:
    """Return where a tensor's values lie; 0 where that is no place (meta) or several (sparse)."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_signature(item) for item in value)
    return repr(value)
