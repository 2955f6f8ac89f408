"""How far the whole model's native gradient is from float64's: measured, never judged."""

from __future__ import annotations

import math

import torch

from audits.lanes.gradient_sums import GivenInPartsError, differentiate_into
from audits.lanes.problem import may_step, quiet
from audits.live.subject import LivePhase, Subject

#: Elements of a tensor that are compared, evenly spread: the native gradient waits for the float64 one, and a sample of
#: a large tensor says as much as the whole.
SAMPLE = 2**18


class NativeGradient:
    """The native gradient of a phase, a sample of each tensor's elements, to be compared when float64's is there.

    Attributes:
        sampled: how many elements are compared.
        elements: how many there are.
    """

    def __init__(self, subject: Subject, phase: LivePhase) -> None:
        self.sampled = self.elements = 0
        self._native: dict[str, torch.Tensor] = {}
        self._compared: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}
        for name, parameter in phase.parameters.items():
            count = parameter.numel() * (2 if parameter.is_complex() else 1)
            kept = len(range(0, count, _stride(count)))
            self.elements, self.sampled = self.elements + count, self.sampled + kept
            self._weights[name] = count / kept if kept else 0.0
        in_parts: frozenset[str] = frozenset()
        while True:
            subject.reset()
            try:
                with quiet(), subject.autocast():
                    loss, hooked = subject.loss(phase), may_step(subject.model)
                    differentiate_into(loss, phase.parameters, self._keep, hooked=hooked, at_the_end=in_parts)
                return
            except GivenInPartsError as error:
                in_parts |= error.names
            finally:
                subject.reset()

    def _keep(self, name: str, gradient: torch.Tensor) -> bool:
        self._native[name] = _sample(gradient).clone()
        return False

    def observe(self, name: str, gradient: torch.Tensor) -> None:
        """Compare one tensor's float64 gradient; nothing is read from the device yet."""
        exact = _sample(gradient).double()
        native = self._native.get(name)
        off = exact if native is None else exact - native
        self._compared[name] = torch.stack([torch.linalg.vector_norm(off), torch.linalg.vector_norm(exact)])

    @property
    def observed(self) -> bool:
        """Whether float64's gradient was there."""
        return bool(self._compared)

    def relative(self) -> float:
        """Return ``||g_native - g_float64|| / ||g_float64||`` over all tensors, from the elements of the sample."""
        off = size = 0.0
        for name, weight in self._weights.items():
            if name in self._compared:
                error, norm = self._compared[name].tolist()
                off, size = off + weight * error**2, size + weight * norm**2
            elif name in self._native:  # float64 has none
                off += weight * float(torch.linalg.vector_norm(self._native[name].double())) ** 2
        return math.sqrt(off / size) if size else 0.0


def _stride(count: int) -> int:
    """Return the distance between compared elements: odd, so that it does not walk along a column."""
    return 1 if count <= SAMPLE else (count // SAMPLE) | 1


def _sample(gradient: torch.Tensor) -> torch.Tensor:
    flat = gradient.reshape(-1)
    return flat[:: _stride(flat.numel())]
