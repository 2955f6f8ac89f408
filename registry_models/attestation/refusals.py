"""Why an attestation is not believed."""

from __future__ import annotations

from enum import StrEnum

from audits.errors import InputError


class Refusal(StrEnum):
    """The reason, one word; the error's text says it as a sentence."""

    SIGNATURE = "signature"
    KEY = "key"
    FOREIGN = "foreign"
    EXPIRED = "expired"
    KIND = "kind"


class RefusedAttestationError(InputError):
    """An attestation that is not believed.

    Attributes:
        reason: why, in one word.
    """

    def __init__(self, reason: Refusal, text: str) -> None:
        super().__init__(text)
        self.reason = reason
