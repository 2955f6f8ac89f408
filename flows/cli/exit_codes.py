"""The exit codes of verdicts: 0 passed (warnings allowed), 1 failed, 2 could not judge."""

from __future__ import annotations

from audits.outcomes import Outcome

EXIT_CODES = {Outcome.PASS: 0, Outcome.WARN: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 2, Outcome.SKIPPED: 2}
