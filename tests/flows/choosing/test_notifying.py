"""New failures are told once: a real Prefect server, a real flow, its events read back, its messages received."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from flows.choosing.notifying import NEWLY_FAILED
from flows.service.automations import NOTIFY, keep_automations
from flows.service.embedded_prefect import prefect_server
from registry_models import log_model
from tests.stores import BATCH, register_linear


def register_failing(name: str) -> None:
    """Register a model whose recipe expects another optimizer than it has."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recipe = Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer, expect={"optimizer": "Adam"})
    log_model(model, name, recipe=recipe, factory="torch.nn:Linear", factory_args={"in_features": 2, "out_features": 1})


def told(url: str, *, at_least: int) -> list[dict[str, Any]]:
    """The events on the server; events are stored in batches, every few seconds."""
    body = {"filter": {"event": {"name": [NEWLY_FAILED]}}}
    deadline = time.monotonic() + 40
    events: list[dict[str, Any]] = []
    while time.monotonic() < deadline and len(events) < at_least:
        events = httpx.post(f"{url}/events/filter", json=body, timeout=30).raise_for_status().json()["events"]
        time.sleep(0.5)
    return events


@contextlib.contextmanager
def receiver() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the address of a team's chat, and what it has received."""
    received: list[dict[str, str]] = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", received
    finally:
        server.shutdown()
        server.server_close()


async def notify(url: str) -> None:
    """As ``gradaudit setup --notify custom-webhook/team`` does."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        await CustomWebhookNotificationBlock.register_type_and_schema()
        message = {"subject": "{{subject}}", "text": "{{body}}"}
        given: dict[str, Any] = {"name": "team", "url": url, "json_data": message}
        await CustomWebhookNotificationBlock(**given).save("team")  # type: ignore[misc]
        assert f"automation {NOTIFY}, new" in await keep_automations(client, "custom-webhook/team")


#: In a process of its own, as a worker has it: Prefect's sender of events stays with the first server it met.
SWEEPS = """
from flows.audit_versions import audit_versions

for versions, occasion in (
    (["models:/fine/1", "models:/broken/1"], "night-1"),
    (["models:/broken/1"], "night-1"),  # a retry: its audit is there already
    (["models:/broken/1"], "night-2"),  # fails still
    (["models:/broken/2"], "night-2"),  # another version: the last event, so the others have had their time
):
    state = audit_versions(versions, occasion, return_state=True)
    assert state.is_completed(), state.message
"""


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_new_failure_is_told_once_and_a_repeat_or_a_success_never(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_linear("fine")
    register_failing("broken")
    register_failing("broken")
    monkeypatch.setenv("GRADAUDIT_TRACKING_URI", client.tracking_uri)
    monkeypatch.setenv("GRADAUDIT_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    with prefect_server() as url, receiver() as (chat, messages):
        asyncio.run(notify(chat))
        done = subprocess.run([sys.executable, "-c", SWEEPS], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        events = told(url, at_least=2)
        deadline = time.monotonic() + 30
        while len(messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
    assert sorted(event["resource"]["prefect.resource.id"] for event in events) == [
        "gradaudit.version.broken.1",
        "gradaudit.version.broken.2",
    ]
    payload = next(event["payload"] for event in events if event["payload"]["version"] == 1)
    assert payload["model"] == "broken"
    assert payload["checks"] == "registration.hyperparameters"
    assert payload["cause"] == "the optimizer's options are not those declared"
    assert payload["finding"] == "the optimizer of phase 'step' is SGD, expect declares Adam"
    assert payload["previous"] == "never audited"
    run = client.get_run(payload["run_id"])
    assert run.data.tags["audit.model"] == "broken"
    assert payload["link"] == f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"

    assert sorted(message["subject"] for message in messages) == [
        "gradaudit: broken v1 fails",
        "gradaudit: broken v2 fails",
    ]
    text = next(message["text"] for message in messages if " v1 " in message["subject"])
    assert text.split("\n") == [
        "broken v1 fails: the optimizer's options are not those declared (registration.hyperparameters).",
        "the optimizer of phase 'step' is SGD, expect declares Adam",
        payload["link"],
    ]
