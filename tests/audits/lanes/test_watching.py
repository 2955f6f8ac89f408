"""Custom Functions are seen, also through names that were bound before the audit."""

from __future__ import annotations

from typing import Any

import torch

from audits.lanes.watching import FunctionDepth, standing_in


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class WithContext(torch.autograd.Function):
    """Its context is set up apart, its arguments have defaults."""

    @staticmethod
    def forward(x: torch.Tensor, factor: float = 3.0) -> torch.Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


double = Double.apply


def test_a_name_bound_before_is_seen_while_somebody_watches() -> None:
    shown: list[str] = []
    with FunctionDepth().watching(lambda cls, args, kwargs: shown.append(cls.__name__)):
        double(torch.ones(1, requires_grad=True)).backward()
    double(torch.ones(1))
    assert shown == ["Double"]


def test_arguments_are_seen_with_their_defaults() -> None:
    shown: list[Any] = []
    x = torch.ones(1, requires_grad=True)
    with FunctionDepth().watching(lambda cls, args, kwargs: shown.append((cls, args[1]))):
        WithContext.apply(x).backward()
    assert shown == [(WithContext, 3.0)]
    assert x.grad == 3.0


def test_what_stands_for_a_result_goes_on() -> None:
    x = torch.ones(1, requires_grad=True)
    with standing_in(lambda function, args, result: result + 5 if function is Double else result):
        assert double(x).item() == 7.0
        assert WithContext.apply(x).item() == 3.0
    assert double(x).item() == 2.0


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
    before = torch.autograd.Function.__dict__["apply"], torch.autograd.function._SingleLevelFunction.apply
    shown: list[str] = []
    with FunctionDepth().watching(lambda cls, args, kwargs: shown.append(cls.__name__)), FunctionDepth().watching():
        Outer.apply(torch.ones(1, requires_grad=True))
    assert shown == ["Outer"]
    assert torch.autograd.Function.__dict__["apply"] is before[0]
    assert torch.autograd.function._SingleLevelFunction.apply == before[1]
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)
