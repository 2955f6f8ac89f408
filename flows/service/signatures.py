"""MLflow's webhook signatures: who sent it, when, and whether it has been here before."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Mapping

#: The headers that MLflow sends.
SIGNATURE, TIMESTAMP, DELIVERY = "x-mlflow-signature", "x-mlflow-timestamp", "x-mlflow-delivery-id"

#: Seconds by which a delivery's clock may differ from ours; MLflow gives up 8 s after the first try.
TOLERANCE = 300.0

#: Whole seconds since 1970, of this millennium and the next ones.
_SECONDS = re.compile(r"[0-9]{1,12}")

#: Longest id of a delivery that is taken; MLflow's are UUIDs.
LONGEST_ID = 200

#: Deliveries remembered; older ones are refused by their time.
REMEMBERED = 10_000


class RefusedError(Exception):
    """A delivery that is not MLflow's, or not of now; the text says why."""


def sign(secret: str, delivery: str, timestamp: str, body: bytes) -> str:
    """Return ``v1,`` and the base64 of HMAC-SHA256 over ``delivery.timestamp.body``, as MLflow 3.17 signs."""
    content = f"{delivery}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret.encode(), content, hashlib.sha256).digest()).decode()


def verify(secret: str, headers: Mapping[str, str], body: bytes, *, now: float | None = None) -> None:
    """Check a delivery's signature and time.

    Args:
        secret: what MLflow signs with.
        headers: the request's, names in lower case.
        body: the raw body.
        now: seconds since 1970; the clock's otherwise.

    Raises:
        RefusedError: the signature is missing or wrong, or its time is more than five minutes off.
    """
    signature, timestamp = headers.get(SIGNATURE, ""), headers.get(TIMESTAMP, "")
    delivery = headers.get(DELIVERY, "")
    if len(delivery) > LONGEST_ID:
        raise RefusedError("its id is too long for one of MLflow's")
    if not (signature and timestamp and delivery):
        raise RefusedError("it is not signed: the webhook in MLflow needs the same secret")
    if not hmac.compare_digest(sign(secret, delivery, timestamp, body).encode(), signature.encode("utf-8", "replace")):
        raise RefusedError("its signature is wrong: the webhook in MLflow has another secret")
    if not _SECONDS.fullmatch(timestamp):
        raise RefusedError("its time is not a number of seconds")
    off = abs((time.time() if now is None else now) - int(timestamp))
    if not off <= TOLERANCE:
        raise RefusedError(f"it was signed {off:.0f} s away from now, {TOLERANCE:.0f} are allowed; compare the clocks")


class Deliveries:
    """The deliveries that were answered for good, so that a repeated one does nothing."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, delivery: str) -> bool:
        return delivery in self._seen

    def remember(self, delivery: str) -> None:
        """Keep a delivery's id; the oldest goes when there are too many."""
        self._seen[delivery] = None
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
