"""Deliveries as MLflow signs them, and everything else."""

from __future__ import annotations

import time

import pytest
from mlflow.webhooks.delivery import _generate_hmac_signature

from flows.service.signatures import (
    DELIVERY,
    REMEMBERED,
    SIGNATURE,
    TIMESTAMP,
    TOLERANCE,
    Deliveries,
    RefusedError,
    sign,
    verify,
)

BODY = b'{"entity": "model_version"}'
NOW = 1_800_000_000.0


def headers(*, secret: str = "s", at: str = "1800000000", body: bytes = BODY) -> dict[str, str]:
    return {SIGNATURE: sign(secret, "d", at, body), TIMESTAMP: at, DELIVERY: "d"}


def test_mlflow_s_own_signature_is_right() -> None:
    at = str(int(time.time()))
    theirs = _generate_hmac_signature("s", "d", at, BODY.decode())
    verify("s", {SIGNATURE: theirs, TIMESTAMP: at, DELIVERY: "d"}, BODY)


@pytest.mark.parametrize("off", [-TOLERANCE, 0.0, TOLERANCE])
def test_five_minutes_are_allowed(off: float) -> None:
    verify("s", headers(), BODY, now=NOW + off)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        ({}, "not signed"),
        ({k: v for k, v in headers().items() if k != DELIVERY}, "not signed"),
        (headers(secret="other"), "another secret"),
        (headers(body=b"{}"), "another secret"),
        (headers() | {DELIVERY: "e"}, "another secret"),
        (headers() | {TIMESTAMP: "1800000001"}, "another secret"),
        (headers() | {SIGNATURE: "v1,é"}, "another secret"),
        (headers(at=str(int(NOW - TOLERANCE - 1))), "compare the clocks"),
        (headers(at=str(int(NOW + TOLERANCE + 1))), "compare the clocks"),
        (headers(at="nan"), "not a number"),
        (headers(at="9" * 5000), "not a number"),
    ],
)
def test_anything_else_is_refused(sent: dict[str, str], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        verify("s", sent, BODY, now=NOW)


def test_deliveries_are_remembered_up_to_a_bound() -> None:
    deliveries = Deliveries()
    for number in range(REMEMBERED + 5):
        deliveries.remember(str(number))
    assert "4" not in deliveries
    assert "5" in deliveries
    assert str(REMEMBERED + 4) in deliveries
