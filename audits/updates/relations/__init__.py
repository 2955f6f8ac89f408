"""An optimizer without a reference rule, held to what every optimizer keeps.

`bench` runs it on tensors of our own, `layout` chooses them, `contract`, `elements`, `options`, `numbers` and `descent`
hold the relations, `verdict` makes rows of them.
"""

from audits.updates.relations.verdict import (
    relation_limits,
    relation_rows,
    round_trip_rows,
    verdict_of,
    working_request,
)

__all__ = ["relation_limits", "relation_rows", "round_trip_rows", "verdict_of", "working_request"]
