"""Custom Functions are seen through names bound before the audit, where the process is ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from audits.lanes.watching import FunctionDepth

PROGRAM = """
import torch
from audits.lanes.watching import FunctionDepth, see_functions_from_now_on
{install}
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, g): return g * 2
double = Double.apply
seen = []
with FunctionDepth().watching(lambda cls, args, kwargs: seen.append(cls.__name__)):
    double(torch.ones(1, requires_grad=True)).backward()
double(torch.ones(1))
print(seen)
"""


def seen(install: str) -> str:
    command = [sys.executable, "-c", PROGRAM.format(install=install)]
    root = Path(__file__).resolve().parents[3]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.end_to_end
def test_a_name_bound_before_is_seen_in_a_process_of_our_own() -> None:
    assert seen("see_functions_from_now_on()") == "['Double']"
    assert seen("") == "[]"


class Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return Inner.apply(x) * 1.0  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + 0.0

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_only_the_outermost_call_is_shown_and_torch_is_left_as_it_was() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    shown: list[str] = []
    with FunctionDepth().watching(lambda cls, args, kwargs: shown.append(cls.__name__)), FunctionDepth().watching():
        Outer.apply(torch.ones(1, requires_grad=True))
    assert shown == ["Outer"]
    assert torch.autograd.Function.__dict__["apply"] is before
