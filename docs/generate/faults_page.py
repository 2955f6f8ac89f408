"""docs/reference/planted_faults.md: the bugs that the tests plant in training steps."""

from __future__ import annotations

from tests.wrong_on_purpose.updates import table as faults


def planted_faults_page() -> str:
    """Return the bugs that the tests plant in training steps, and which check catches each."""
    return f"""
# Planted faults

The tests plant each of these {len(faults.CATALOGUE)} bugs in a training step. A test asks for the check that must
catch it and the parameter that it must name. Each has a correct twin that must pass. The bugs that are
planted in gradients are in `tests/wrong_on_purpose/gradients/`.
What each artifact kind shows of a fault: [artifact kinds](artifact_kinds.md).

{faults.table()}
"""
