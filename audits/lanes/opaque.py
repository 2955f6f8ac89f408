"""Whether a loss runs through code that no tensor mode sees into: custom Functions and operators of others.

Such a kernel (Triton, a CUDA extension, NumPy) often computes in float32 whatever comes in, which the float64 lane
cannot lift: the loss is then a staircase of float32 steps.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free
from audits.lanes.watching import FunctionDepth

#: Noise, in units of u |f|, from which float32 inside is suspected. float32's own is 5e8, and less by the root of the
#: elements that it averages over; healthy float64 losses stand at 1.0 to 1.2, far from cancellation.
ROUGH_NOISE = 1e4

#: Operators of torch's own, which the lanes lift.
_OWN = frozenset({"aten", "prim", "prims", "profiler", "_c10d_functional", "higher_order", "rngprims", "quantized"})


class _Foreign(TorchDispatchMode):
    """Note whether an operator that is not torch's runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in _OWN:
            self.seen = True
        return func(*args, **(kwargs or {}))


def is_opaque(problem: Problem) -> bool:
    """Evaluate the loss once; return whether a custom Function or a foreign operator takes part in it."""
    functions: list[type] = []

    def observe(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not cls.__module__.startswith("torch."):
            functions.append(cls)

    foreign = _Foreign()
    problem.before()
    with quiet(), FunctionDepth().watching(observe), Free(problem.tape.cursor(), lift=problem.lifts), foreign:
        problem.loss()
    return bool(functions) or foreign.seen
