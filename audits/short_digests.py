"""Short digests: the beginning of a SHA-256, for what is compared and never for what is to be secret.

They are stored and compared with those of other releases: what is fed, and how much is kept, stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

#: Characters of most digests: 64 bits; among a million different things two are alike with probability 3e-8.
LENGTH = 16


class Hasher(Protocol):
    """What `hashlib.sha256` returns, as far as it is used."""

    def hexdigest(self) -> str:
        """Return what was fed, digested."""
        ...


def shortened(hasher: Hasher, length: int = LENGTH) -> str:
    """Return the beginning of what a hasher has come to."""
    return hasher.hexdigest()[:length]


def short_digest(content: str | bytes | Iterable[str | bytes], length: int = LENGTH) -> str:
    """Return the digest of a text, of bytes, or of several of them one after the other.

    Args:
        content: what to digest; texts as UTF-8.
        length: characters to keep, at most 64.
    """
    hasher = hashlib.sha256()
    for part in [content] if isinstance(content, (str, bytes)) else content:
        hasher.update(part.encode() if isinstance(part, str) else part)
    return shortened(hasher, length)
