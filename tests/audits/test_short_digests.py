"""Digests stay what they were: verdicts are stored under them."""

from __future__ import annotations

import hashlib
import io

from audits.short_digests import short_digest, shortened
from flows.choosing.due_keys import digest


def test_the_beginning_of_a_sha256() -> None:
    whole = hashlib.sha256(b"gradaudit").hexdigest()
    assert short_digest("gradaudit") == short_digest(b"gradaudit") == whole[:16]
    assert short_digest("gradaudit", 24) == whole[:24]
    assert short_digest(["grad", b"audit"]) == whole[:16], "one after the other"
    assert shortened(hashlib.file_digest(io.BytesIO(b"gradaudit"), "sha256"), 12) == whole[:12]


def test_stored_digests_keep_their_value() -> None:
    assert digest("char-gpt", 3, "") == "ed4008cfa1592f95865d7487"
    assert short_digest("\0".join(["a/files.parquet", "b/files.parquet"])) == "03b0389fad9c02c3"
