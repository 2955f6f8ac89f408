"""The few numbers that a rule multiplies whole tensors with, in the precision an implementation works them out in.

A plain loop has them as Python floats. A fused CUDA kernel takes float32 copies of the betas (of torch 2.10 and newer;
`adam_math` in aten/src/ATen/native/cuda/fused_adam_utils.cuh), so that its ``1 - beta2`` is off by up to
``eps beta / (1 - beta)``: 1.3e-5 for 0.999, which is 108 eps. Capturable and differentiable optimizers keep the step in
a float32 tensor and work out ``1 - beta^t`` from it. Neither is wrong; a reference with the same numbers can be tight.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

#: Relative change of a scalar under which a float64 update shows ten digits of its response.
STRETCH = 1e-6


@dataclass(frozen=True)
class Scalars:
    """In which precision an implementation works out its scalars.

    Attributes:
        moments: dtype of the betas in the moments' averages.
        corrections: dtype of ``beta^t`` and of what is made of it.
        device: where float32 powers are taken: their last bit is that device's. None is the CPU.
        stretched: the scalar that is changed by `STRETCH` to see what it does.
        seen: collects the scalars that a rule asks for.
    """

    moments: torch.dtype = torch.float64
    corrections: torch.dtype = torch.float64
    device: torch.device | None = None

    stretched: Hashable = None
    seen: list[Hashable] | None = field(default=None, compare=False, hash=False)

    @property
    def single(self) -> bool:
        """Whether corrections are worked out in float32."""
        return self.corrections is torch.float32

    def beta(self, beta: float) -> float:
        """Return a beta as the moments have it."""
        return as_single(beta) if self.moments is torch.float32 else beta

    def power(self, base: float, exponent: float) -> float:
        """Return ``base^exponent``."""
        return self._turned(("power", base, exponent), self._power(base, exponent))

    def correction(self, beta: float, t: float) -> float:
        """Return ``1 - beta^t``."""
        return self._turned(("correction", beta), self.rounded(1.0 - self._power(beta, t)))

    def rounded(self, value: float) -> float:
        """Return the result of one operation on corrections."""
        return as_single(value) if self.single else value

    def _power(self, base: float, exponent: float) -> float:
        return _single_power(base, exponent, self.device) if self.single else float(base**exponent)

    def _turned(self, key: Hashable, value: float) -> float:
        if self.seen is not None and key not in self.seen:
            self.seen.append(key)
        return value * (1.0 + STRETCH) if key == self.stretched else value


#: Python floats throughout.
EXACT = Scalars()


def as_single(value: float) -> float:
    """Return the nearest float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


@functools.lru_cache(maxsize=1024)
def _single_power(base: float, exponent: float, device: torch.device | None) -> float:
    """Return a float32 power as the device takes it; it is remembered, as fetching it waits for the device."""
    return float(torch.pow(base, torch.tensor(exponent, dtype=torch.float32, device=device)))
