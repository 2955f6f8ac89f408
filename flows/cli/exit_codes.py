"""The exit codes of verdicts: 0 passed (warnings allowed), 1 failed, 2 could not judge; and of refused attestations."""

from __future__ import annotations

from audits.outcomes import Outcome

EXIT_CODES = {Outcome.PASS: 0, Outcome.WARN: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 2, Outcome.SKIPPED: 2}

#: What ``gradaudit verify`` ends with when it believes an attestation not, by why (`registry_models.attestation`).
REFUSAL_CODES = {"signature": 3, "key": 4, "foreign": 5, "expired": 6, "kind": 7}
