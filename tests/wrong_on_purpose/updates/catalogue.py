"""What a planted fault is, and the catalogue that the fault files fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

#: ``(wrong) -> (model, arguments of Recipe.capture)``; an optional third element changes the model after capture.
Build = Callable[[bool], tuple[Any, ...]]


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        name: what is wrong.
        kind: rule, registration, step, phases, persistence, precision, buffers.
        architecture: of the model it is planted in.
        check: the check that must say ``fail`` (or ``warn``, where that is the check's severity).
        parameter: the parameter it must name; None where the claim is about the whole step.
        build: makes the faulty recipe, or its correct twin.
    """

    name: str
    kind: str
    architecture: str
    check: str
    parameter: str | None
    build: Build = field(compare=False)
    outcome: str = "fail"


CATALOGUE: list[Fault] = []


def fault(
    name: str, kind: str, architecture: str, check: str, parameter: str | None = None, outcome: str = "fail"
) -> Callable[[Build], Build]:
    """Register a builder under the fault's name."""

    def register(build: Build) -> Build:
        CATALOGUE.append(Fault(name, kind, architecture, check, parameter, build, outcome))
        return build

    return register


def after_capture(model: nn.Module) -> None:
    """Change nothing: what most faults do to the model between capture and audit."""
