"""Rows of ``health.*``."""

from __future__ import annotations

from audits.checks import CHECKS
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow, Severity


def health_row(subject: Subject, check: str, bad: bool, message: str, **fields: object) -> ResultRow:
    """Return a row of a health check: a warning where it is bad.

    Args:
        subject: the model under audit.
        check: the check's name.
        bad: whether the claim does not hold.
        message: what was found.
        fields: of the row.
    """
    name = fields.get("parameter")
    if isinstance(name, str):
        tensor = subject.parameters[name]
        fields |= {"numel": tensor.numel(), "dtype": str(tensor.dtype), "module": subject.owner(name).label}
    outcome = Outcome.WARN if bad else Outcome.PASS
    return ResultRow(check=check, outcome=outcome, severity=Severity.WARN, message=message, seed=subject.seed,
                     where_to_look=CHECKS[check].where_to_look if bad else None, **fields)  # type: ignore[arg-type]  # fmt: skip
