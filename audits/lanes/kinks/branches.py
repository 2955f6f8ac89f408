"""The table of branch rules: every operator that has one, and the rule itself."""

from __future__ import annotations

import functools
from typing import Any

from audits.lanes.kinks import (
    fake_quantization,  # noqa: F401  (each registers its rules)
    rules_backward,  # noqa: F401
    rules_conventions,  # noqa: F401
    rules_distances,  # noqa: F401
    rules_elementwise,  # noqa: F401
    rules_grid,  # noqa: F401
    rules_losses,  # noqa: F401
    rules_reductions,  # noqa: F401
)
from audits.lanes.kinks.rule import Rule, registered
from audits.lanes.lifting import traits


def all_rules() -> dict[str, Rule]:
    """Return every rule by operator name."""
    return dict(registered())


@functools.cache
def rule_for(func: Any) -> Rule | None:
    """Return the rule of an operator overload, or None."""
    known = traits(func)
    return registered().get(known.base) if known.name.startswith("aten::") else None
