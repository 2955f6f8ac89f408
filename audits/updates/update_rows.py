"""Result rows of the update audit, filled with what a row carries about its parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from audits.checks import CHECKS
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow, finite

#: Elements that are looked at at a time: torch makes a copy of all that it is given, wide for a norm. On a GPU, where a
#: launch costs as much as a pass over 32 MiB, more.
_PIECE, _PIECE_ON_DEVICE = 2**20, 2**24


def row(
    subject: Subject, check: str, outcome: Outcome, message: str, *, parameter: str | None = None, **fields: Any
) -> ResultRow:
    """Return a row of ``check``; its severity, and the parameter's size, dtype and module, are filled in."""
    claim = CHECKS[check]
    if parameter is not None and parameter in subject.parameters:
        tensor = subject.parameters[parameter]
        fields.setdefault("numel", tensor.numel())
        fields.setdefault("dtype", str(tensor.dtype))
        fields.setdefault("module", subject.owner(parameter).label)
    for name in ("measured", "expected", "error", "threshold", "parameter_norm", "gradient_norm", "update_norm"):
        if name in fields:
            fields[name] = finite(fields[name])
    shown = outcome in (Outcome.FAIL, Outcome.WARN)
    return ResultRow(
        check=check,
        outcome=outcome,
        severity=claim.severity,
        parameter=parameter,
        seed=subject.seed,
        message=message,
        where_to_look=claim.where_to_look if shown else None,
        **fields,
    )


def norm(tensor: torch.Tensor) -> float:
    """Return the Euclidean norm, computed in float64."""
    norms = [torch.linalg.vector_norm(part, dtype=wide(tensor.dtype)).real for part in _parts(tensor)]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def not_finite(tensor: torch.Tensor) -> int:
    """Return how many elements are infinite or no number."""
    counts = [(~torch.isfinite(part)).sum() for part in _parts(tensor)]
    return int(torch.stack(counts).sum()) if counts else 0


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    size = _PIECE if tensor.device.type == "cpu" else _PIECE_ON_DEVICE
    return tensor.detach().reshape(-1).split(size) if tensor.numel() else ()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over ``dtype`` are taken: complex128 or float64."""
    return torch.complex128 if dtype.is_complex else torch.float64
