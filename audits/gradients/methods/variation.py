"""The loss off its data's special case: uniform weights vary, zero-initialised parameters are not zero.

The batch, the buffers and the parameters are changed where the training step gets them, not at the Function that is
judged: what is computed from them (a sum of weights, a statistic) goes on fitting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from audits.gradients.methods.domains import is_special, varied
from audits.lanes.problem import Problem
from audits.lanes.tape import Tape
from audits.structures import map_tensors, tensors_in

#: Names of tensors that are masks whatever their values.
_MASK = "mask"


@contextlib.contextmanager
def off_special_case(problem: Problem, *, seed: int) -> Iterator[tuple[Problem, list[str]]]:
    """Vary what is special in batch, parameters and buffers; yield the problem there and what was varied.

    Args:
        problem: a phase's loss on its model.
        seed: of the factors.
    """
    generator = torch.Generator().manual_seed(seed + 53)
    names: list[str] = []
    problem.before()
    batches = list(problem.batches)
    parameters: list[tuple[torch.Tensor, torch.Tensor]] = []
    buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before() -> None:
        problem.before()
        for buffer, value in buffers:
            buffer.copy_(value)

    try:
        problem.batches[:] = [(weight, _varied_batch(batch, generator, names)) for weight, batch in batches]
        for name, tensor, is_parameter in _model_tensors(problem):
            if not _may_vary(name, tensor):
                continue
            value = varied(tensor.detach(), generator, data=False)
            names.append(name)
            if is_parameter:
                if not bool(tensor.detach().any()):
                    # an initial zero has no sign to keep
                    value = value * (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1).to(value)
                parameters.append((tensor, tensor.detach().clone()))
                tensor.data.copy_(value)
            else:
                buffers.append((tensor, value))
        tape = Tape(list(problem.tape.draws), dict(problem.tape.by_state))
        yield replace(problem, before=before, tape=tape, native={}, observe=None), names
    finally:
        problem.batches[:] = batches
        for tensor, value in parameters:
            tensor.data.copy_(value)
        problem.before()


def _model_tensors(problem: Problem) -> Iterator[tuple[str, torch.Tensor, bool]]:
    if problem.model is not None:
        yield from ((name, tensor, True) for name, tensor in problem.model.named_parameters())
        yield from ((name, tensor, False) for name, tensor in problem.model.named_buffers())


def _varied_batch(batch: Any, generator: torch.Generator, names: list[str]) -> Any:
    paths = {id(tensor): path for path, tensor in tensors_in(batch)}

    def change(tensor: torch.Tensor) -> torch.Tensor:
        path = paths.get(id(tensor), "")
        if not _may_vary(path, tensor):
            return tensor
        names.append(f"batch {path}")
        return varied(tensor, generator, data=True).requires_grad_(tensor.requires_grad)

    return map_tensors(batch, change)


def _may_vary(name: str, tensor: torch.Tensor) -> bool:
    real = tensor.layout is torch.strided and tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return real and _MASK not in name.lower() and is_special(tensor.detach())
