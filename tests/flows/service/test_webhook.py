"""What the webhook takes, refuses and sends back, against a real registry; Prefect is down where it matters."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from mlflow.tracking import MlflowClient
from mlflow.webhooks.delivery import _generate_hmac_signature
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from audits.errors import InfrastructureError, SettingsError
from flows.service import webhook
from flows.service.reconciling import Reconciler
from flows.service.signatures import REMEMBERED, Deliveries, RefusedError, sign, verify
from flows.service.webhook import BODY_LIMIT, WebhookOptions, make_app, run_webhook
from flows.settings.environment import GradauditSettings
from tests.stores import register_linear

pytestmark = pytest.mark.slow

SECRET = "a long random text"


@pytest.fixture
def settings(client: MlflowClient, tmp_path: Path) -> GradauditSettings:
    return GradauditSettings.load(
        tracking_uri=client.tracking_uri, results=str(tmp_path / "results"), webhook_secret=SECRET
    )


def signed(body: bytes, *, delivery: str = "d1", age: float = 0.0, secret: str = SECRET) -> dict[str, str]:
    timestamp = str(int(time.time() - age))
    return {
        "x-mlflow-delivery-id": delivery,
        "x-mlflow-timestamp": timestamp,
        "x-mlflow-signature": sign(secret, delivery, timestamp, body),
    }


def event(entity: str, action: str, **data: str) -> bytes:
    return json.dumps({"entity": entity, "action": action, "data": data}).encode()


def post(settings: GradauditSettings, body: bytes, *headers: dict[str, str]) -> list[int]:
    """The status codes of these deliveries to one process."""
    app = make_app(settings, Reconciler(settings), WebhookOptions())

    async def send() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return [(await http.post("/webhook", content=body, headers=given)).status_code for given in headers]

    return asyncio.run(send())


def test_the_signature_is_mlflows() -> None:
    assert sign(SECRET, "d", "17", b'{"a": 1}') == _generate_hmac_signature(SECRET, "d", "17", '{"a": 1}')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x-mlflow-signature": ""}, "not signed"),
        ({"x-mlflow-delivery-id": "another"}, "wrong"),
        ({"x-mlflow-timestamp": "1"}, "wrong"),
    ],
)
def test_a_forged_delivery_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        verify(SECRET, {**signed(b"{}"), **change}, b"{}")


def test_old_and_future_deliveries_are_refused() -> None:
    verify(SECRET, signed(b"{}", age=290), b"{}")
    for age in (310, -310):
        with pytest.raises(RefusedError, match="300 are allowed"):
            verify(SECRET, signed(b"{}", age=age), b"{}")


def test_remembered_deliveries_are_bounded() -> None:
    known = Deliveries()
    for number in range(REMEMBERED + 1):
        known.remember(str(number))
    assert ["0" in known, "1" in known, str(REMEMBERED) in known] == [False, True, True]


def test_what_the_door_keeps_out(settings: GradauditSettings) -> None:
    body = event("model_version", "created", name="none", version="1")
    assert post(settings, body, {}, signed(body, secret="guess"), signed(b"other"), signed(body)) == [
        401,
        401,
        401,
        404,
    ]
    big = b" " * (BODY_LIMIT + 1)
    assert post(settings, big, signed(big)) == [413]
    mark = event("model_version_tag", "set", name="m", version="1", key="audit.outcome", value="pass")
    for body, code in ((b"[]", 400), (b"\xff", 400), (mark, 204), (event("prompt", "created"), 204)):
        assert post(settings, body, signed(body)) == [code]


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"x-mlflow-timestamp": "9" * 400}, 401),
        ({"x-mlflow-timestamp": HUGE}, 401),
        ({"x-mlflow-timestamp": "1e9"}, 401),
        ({"x-mlflow-timestamp": "-5"}, 401),
        ({"x-mlflow-delivery-id": "d" * 5000}, 401),
        ({"x-mlflow-signature": "v1," + "A" * 5000}, 401),
    ],
)
def test_headers_beyond_any_bound_are_refused(settings: GradauditSettings, headers: dict[str, str], code: int) -> None:
    body = event("model_version", "created", name="none", version="1")
    given = {**signed(body), **headers}
    if "x-mlflow-timestamp" in headers:  # rightly signed, by somebody who has the secret
        given["x-mlflow-signature"] = sign(SECRET, given["x-mlflow-delivery-id"], given["x-mlflow-timestamp"], body)
    assert post(settings, body, given) == [code]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"name": "m", "version": HUGE}, 400),
        ({"name": "m", "version": "9" * 12}, 400),
        ({"name": "m", "version": "2147483648"}, 400),
        ({"name": "m", "version": "2147483647"}, 404),
        ({"name": "\ud800", "version": "1"}, 400),
        ({"name": "m" * 5000, "version": "1"}, 400),
        ({"name": "m\0", "version": "1"}, 404),
        ({"name": "../..", "version": "1"}, 404),
    ],
)
def test_names_and_versions_beyond_any_bound_are_refused(
    settings: GradauditSettings, data: dict[str, str], code: int
) -> None:
    body = event("model_version", "created", **data)
    assert post(settings, body, signed(body)) == [code]
    raw = body.replace(f'"{HUGE}"'.encode(), HUGE.encode())
    assert post(settings, raw, signed(raw)) == [code]


def test_a_body_that_does_not_end_is_not_waited_for(
    settings: GradauditSettings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a real socket: unfinished bodies are answered, dropped connections leave no line."""
    monkeypatch.setattr(webhook, "BODY_SECONDS", 0.5)
    app = make_app(settings, Reconciler(settings), WebhookOptions())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        head = b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
        kept = [socket.create_connection(listener.getsockname()) for _ in range(20)]
        for connection in kept:
            connection.sendall(head)
        for _ in range(20):
            with socket.create_connection(listener.getsockname()) as dropped:
                dropped.sendall(head)
        for connection in kept:
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            connection.close()
    finally:
        server.should_exit = True
        thread.join()
    assert "Traceback" not in capfd.readouterr().err


def test_without_a_secret_it_does_not_start(settings: GradauditSettings) -> None:
    without = GradauditSettings.load(tracking_uri=settings.tracking_uri)
    with pytest.raises(SettingsError, match="GRADAUDIT_WEBHOOK_SECRET"):
        run_webhook(WebhookOptions(), without)


def test_with_prefect_down_the_delivery_is_sent_back(settings: GradauditSettings) -> None:
    register_linear("m")
    body = event("model_version", "created", name="m", version="1")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        assert post(settings, body, signed(body), signed(body)) == [503, 503], "the retry counts: it is not remembered"
        with pytest.raises(InfrastructureError, match="Prefect does not answer"):
            Reconciler(settings).look()
