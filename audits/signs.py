"""The sign that stands before each outcome, in a terminal, a notebook, a note and a page alike."""

from __future__ import annotations

from audits.outcomes import Outcome

#: One character each, so that columns line up; the word stands beside it, for the sign alone is no text.
SIGNS = {
    Outcome.PASS: "✓",
    Outcome.WARN: "!",
    Outcome.FAIL: "✗",
    Outcome.INCONCLUSIVE: "?",
    Outcome.SKIPPED: "–",
}
