"""A phase's loss as a function of its parameters, in float64 or the model's own dtypes; lifted in place, put back."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from audits.devices import deterministic_algorithms, seed_generators
from audits.lanes.lifting import LIFTED_DTYPE, lift_tensor
from audits.lanes.precision import full_float32
from audits.lanes.problem import LaneError, Problem, may_step, quiet
from audits.lanes.program import TapeOnly
from audits.lanes.tape import Tape
from audits.live.state import ModuleState
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane
from audits.structures import map_tensors, tensors_in


@contextlib.contextmanager
def lifted_loss(
    subject: Subject, phase: LivePhase, *, precision: Lane = Lane.FLOAT64, inputs: bool = False
) -> Iterator[Problem]:
    """Lend the phase's loss as a function of the phase's own parameters, in float64 unless told otherwise.

    The model's parameters and buffers keep their identity and get float64 storage (never a copy of the model: patched
    forwards and hooks would go on pointing at the native one). On leaving, the subject is reset to its native state.

    Args:
        subject: the open subject.
        phase: whose loss, and whose optimizer's parameters.
        precision: ``FLOAT32`` keeps the model's own dtypes, for models without float64 kernels.
        inputs: make it a function of the batch's floating tensors (named ``<batch x>``) instead.

    Yields:
        The problem.

    Raises:
        LaneError: the native loss is not finite.
    """
    tape = _native_tape(subject, phase)
    dtypes = {name: str(parameter.dtype) for name, parameter in phase.parameters.items()}
    with _native_afterwards(subject):
        subject.reset()
        if precision is Lane.FLOAT64:
            _lift_in_place(subject)
            torch.set_default_dtype(torch.float64)
        state = ModuleState(subject.model)
        batches = [
            (weight, map_tensors(batch, lift_tensor) if precision is Lane.FLOAT64 else batch)
            for weight, batch in subject.micro_batches(phase)
        ]

        native: dict[str, tuple[str, torch.Tensor]] = {}
        tensors: dict[str, torch.Tensor] = dict(phase.parameters)
        if inputs:
            native = _inputs(subject.micro_batches(phase))
            dtypes = {name: str(tensor.dtype) for name, (_, tensor) in native.items()}
            batches = [(weight, map_tensors(batch, _leaf)) for weight, batch in batches]
            tensors = {name: tensor for name, (_, tensor) in _inputs(batches).items()}

        def before() -> None:
            state.restore()
            _seed(subject.seed)

        def loss() -> torch.Tensor:
            given = [(w, map_tensors(b, _used)) for w, b in batches] if inputs else batches
            return one_number(subject.loss(phase, given))

        coarse = full_float32() if precision is Lane.FLOAT32 else contextlib.nullcontext()
        with _plain_kernels(), _deterministic(subject), coarse:
            yield Problem(
                tensors,
                loss,
                before,
                tape,
                precision,
                dtypes=dtypes,
                asked=frozenset(name for name, (_, tensor) in native.items() if tensor.requires_grad),
                paths={name: path for name, (path, _) in native.items()},
                model=None if inputs else subject.model,
                hooked=may_step(subject.model),
                batches=batches,
                native={} if inputs else {name: subject.native_value(name) for name in tensors},
            )


@contextlib.contextmanager
def _native_afterwards(subject: Subject) -> Iterator[None]:
    """Put the default dtype and the subject back to what they are natively."""
    previous = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
        for parameter in subject.model.parameters():
            parameter.grad = None
        subject.reset()


def one_number(loss: torch.Tensor) -> torch.Tensor:
    """Return a loss of one element without its dimensions."""
    return loss.reshape(()) if loss.dim() else loss


def _seed(seed: int) -> None:
    """Seed the generators before every evaluation, without `torch.manual_seed`.

    Without a CUDA context that one keeps a formatted stack per call for later, a millisecond each.
    """
    torch.default_generator.manual_seed(seed)
    seed_generators(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _inputs(batches: list[tuple[float, Any]]) -> dict[str, tuple[str, torch.Tensor]]:
    """Return the batches' floating tensors by the name that rows have for them, each with its path in its batch."""
    number = (lambda i: "") if len(batches) == 1 else (lambda i: f"{i} ")
    return {
        f"<batch {number(i)}{path}>": (path, tensor)
        for i, (_, batch) in enumerate(batches)
        for path, tensor in tensors_in(batch)
        if _differentiable(tensor)
    }


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_() if _differentiable(tensor) else tensor


def _used(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy the forward may change in place, which a leaf must not be."""
    return tensor.clone() if tensor.requires_grad else tensor


def _native_tape(subject: Subject, phase: LivePhase) -> Tape:
    """Record the noise of the native forward."""
    subject.reset()
    tape = Tape()
    with quiet(), subject.autocast(), TapeOnly(tape):
        value = subject.loss(phase)
    if not math.isfinite(float(value.detach())):
        raise LaneError(f"the loss is {float(value.detach())} in the model's own dtype")
    return tape


def _lift_in_place(subject: Subject) -> None:
    for tensor in (*subject.model.parameters(), *subject.model.buffers(), *subject.kept_leaves()):
        if tensor.dtype in LIFTED_DTYPE:
            tensor.data = lift_tensor(tensor.data)


def _deterministic(subject: Subject) -> contextlib.AbstractContextManager[None]:
    """Choose deterministic algorithms on a device; on the CPU there is nothing to choose."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in subject.model.parameters())
    return contextlib.nullcontext() if on_cpu else deterministic_algorithms()


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Keep opaque fused paths off: TorchScript's fusers would merge operators the modes have to see."""
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        yield
