"""Handed over once, again after a failure, not for ever; by webhook or by the loop, on a real Prefect and MLflow."""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed, Running

from audits.errors import ArtifactError, InfrastructureError, SettingsError
from flows.service import handing_over
from flows.service.embedded_prefect import prefect_server
from flows.service.handing_over import ATTEMPTS, DEPLOYMENT, Handover, hand_over
from flows.service.reconciling import Reconciler
from flows.service.registering import register_webhook
from flows.service.setup import SetupOptions, set_up
from flows.service.signatures import DELIVERY, SIGNATURE, TIMESTAMP, sign
from flows.service.webhook import BODY_LIMIT, PATH, WebhookOptions, make_app, run_webhook
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import RECIPE_TAG, Version, list_versions
from tests.flows.choosing.committing import commit

SECRET = "a long random text"
pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def _prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with prefect_server():
            set_up(SetupOptions())
            yield


@pytest.fixture(autouse=True)
def _no_runs(_prefect: None) -> Iterator[None]:
    yield
    with get_client(sync_client=True) as prefect:
        for run in prefect.read_flow_runs():
            prefect.delete_flow_run(run.id)


@pytest.fixture
def settings(client: MlflowClient, tmp_path: Path) -> GradauditSettings:
    return GradauditSettings.load(
        tracking_uri=client.tracking_uri, results=str(tmp_path / "results"), webhook_secret=SECRET
    )


@pytest.fixture
def http(settings: GradauditSettings) -> TestClient:
    """The webhook without its loop: no lifespan is run."""
    return TestClient(make_app(settings, Reconciler(settings), WebhookOptions()))


def handed() -> list[FlowRun]:
    with get_client(sync_client=True) as prefect:
        deployment = prefect.read_deployment_by_name(DEPLOYMENT)
        runs = [run for run in prefect.read_flow_runs() if run.deployment_id == deployment.id]
    return sorted(runs, key=lambda run: run.name)


def set_state(run: FlowRun, state: Any) -> None:
    """Force a state; not `Crashed`, for Prefect starts such a run again by the automation of `gradaudit setup`."""
    with get_client(sync_client=True) as prefect:
        prefect.set_flow_run_state(run.id, state, force=True)


def register(client: MlflowClient, name: str = "m") -> Version:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = client.create_model_version(name, source="file:///nowhere/1")
    return Version.of(client.get_model_version(name, str(made.version)))


def created(version: Version | None, **more: object) -> dict[str, object]:
    data = {"name": version.name if version else "nobody", "version": str(version.version if version else 1)}
    return {"entity": "model_version", "action": "created", "data": data, **more}


def deliver(http: TestClient, event: object, *, delivery: str | None = None, secret: str = SECRET) -> int:
    body = json.dumps(event).encode()
    delivery, at = delivery or str(uuid.uuid4()), str(int(time.time()))
    sent = {SIGNATURE: sign(secret, delivery, at, body), TIMESTAMP: at, DELIVERY: delivery}
    return http.post(PATH, content=body, headers=sent).status_code


def test_a_delivery_becomes_one_flow_run(client: MlflowClient, http: TestClient) -> None:
    version = register(client)
    assert deliver(http, created(version), delivery="d") == 200
    assert deliver(http, created(version), delivery="d") == 200, "MLflow's own repeat"
    assert deliver(http, created(version)) == 200, "another hook's"
    (run,) = handed()
    assert run.parameters == {"versions": ["models:/m/1"], "occasion": "registration"}
    assert deliver(http, created(version), secret="another") == 401
    assert deliver(http, created(None)) == 404
    assert deliver(http, created(version, entity="prompt")) == 204
    assert deliver(http, {"no": "event"}) == 400
    assert http.post(PATH, content=b"x" * (BODY_LIMIT + 1)).status_code == 413
    assert len(handed()) == 1


def test_another_recipe_is_another_flow_run(client: MlflowClient, http: TestClient) -> None:
    version = register(client)
    assert deliver(http, created(version)) == 200
    data = {"name": "m", "version": "1", "key": RECIPE_TAG, "value": "runs:/1/audit"}
    assert deliver(http, created(version) | {"entity": "model_version_tag", "action": "set", "data": data}) == 200
    assert len(handed()) == 1, "the registry has no such tag yet: the version is as it was"
    client.set_model_version_tag("m", "1", RECIPE_TAG, "runs:/1/audit")
    tag_set = created(version) | {"entity": "model_version_tag", "action": "set", "data": data}
    assert deliver(http, tag_set | {"data": data | {"key": "note"}}) == 204
    assert deliver(http, tag_set) == 200
    assert len(handed()) == 2


def test_services_that_are_down_mean_503(client: MlflowClient, settings: GradauditSettings, http: TestClient) -> None:
    version = register(client)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert deliver(http, created(version), delivery="d") == 503
    away = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    without = TestClient(make_app(away, Reconciler(away), WebhookOptions()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert deliver(without, created(version)) == 503
    assert handed() == []
    assert deliver(http, created(version), delivery="d") == 200, "the same delivery again, as MLflow sends it"
    assert len(handed()) == 1


def test_the_loop_finds_what_no_webhook_told_of(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    loop = Reconciler(settings)
    assert loop.look() == []
    version, other = register(client), register(client, "other")
    commit(tmp_path, other, settings)
    assert loop.look() == [Handover.NOW]
    assert loop.look() == [Handover.UNDER_WAY]
    assert Reconciler(settings).look() == [Handover.UNDER_WAY], "beside a second process"
    commit(tmp_path, version, settings)
    assert loop.look() == []
    client.set_model_version_tag("m", "1", RECIPE_TAG, "runs:/1/audit")
    assert loop.look() == [Handover.NOW]
    assert len(handed()) == 2


def test_old_versions_are_no_storm(client: MlflowClient, settings: GradauditSettings) -> None:
    for _ in range(3):
        register(client)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=25)
    loop = Reconciler(settings)
    assert loop.look(now=later) == []
    client.set_model_version_tag("m", "2", RECIPE_TAG, "runs:/1/audit")
    assert loop.look(now=later) == [Handover.NOW], "what is given a recipe counts, however old"
    assert [run.parameters["versions"] for run in handed()] == [["models:/m/2"]]


def test_a_bulk_import_waits_its_turn(
    client: MlflowClient, settings: GradauditSettings, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handing_over, "LIVE", 2)
    monkeypatch.setattr(handing_over, "_AT_ONCE", 1)
    versions = [register(client) for _ in range(4)]
    loop = Reconciler(settings)
    assert loop.look() == [Handover.NOW, Handover.NOW, Handover.FULL, Handover.FULL]
    assert deliver(http, created(versions[3])) == 503
    assert deliver(http, created(versions[0])) == 200, "it is under way"
    set_state(handed()[0], Failed())
    expected = [Handover.RESTING, Handover.UNDER_WAY, Handover.NOW, Handover.FULL]
    assert loop.look() == expected, "nothing failed is in the way"


def test_attempts_rest_longer_each_time_and_end(client: MlflowClient, settings: GradauditSettings) -> None:
    wanted = [(register(client), "key")]
    now = datetime.datetime.now(datetime.UTC)
    for attempt in range(1, ATTEMPTS + 1):
        assert hand_over(wanted, now=now) == [Handover.NOW]
        run = next(run for run in handed() if str(run.idempotency_key).endswith(f"-attempt{attempt}"))
        set_state(run, Running())
        assert hand_over(wanted, now=now) == [Handover.UNDER_WAY]
        set_state(run, Failed())
        now = datetime.datetime.now(datetime.UTC)
        rest = datetime.timedelta(seconds=handing_over.FIRST_REST * 2 ** (attempt - 1))
        if attempt < ATTEMPTS:
            assert hand_over(wanted, now=now + rest * 0.9) == [Handover.RESTING]
        now += rest * 1.1
    assert hand_over(wanted, now=now + datetime.timedelta(days=9)) == [Handover.GIVEN_UP]
    assert len(handed()) == ATTEMPTS
    assert hand_over([(wanted[0][0], "another key")], now=now) == [Handover.NOW], "as it is now it was never tried"


def test_a_result_elsewhere_is_not_asked_for_again(client: MlflowClient, settings: GradauditSettings) -> None:
    wanted = [(register(client), "key")]
    assert hand_over(wanted) == [Handover.NOW]
    set_state(handed()[0], Completed())
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    assert hand_over(wanted, now=later) == [Handover.ELSEWHERE]


def test_the_loop_outlives_services_that_are_down(client: MlflowClient, settings: GradauditSettings) -> None:
    register(client)
    loop = Reconciler(settings)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), pytest.raises(InfrastructureError):
        loop.look()
    assert loop.look() == [Handover.NOW]


def test_what_cannot_be_is_refused(client: MlflowClient, settings: GradauditSettings) -> None:
    with pytest.raises(SettingsError, match="GRADAUDIT_WEBHOOK_SECRET"):
        run_webhook(WebhookOptions(port=0), GradauditSettings.load())
    with pytest.raises(SettingsError, match="--port"):
        run_webhook(WebhookOptions(port=99999), settings)
    with pytest.raises(ArtifactError, match="MLFLOW_TRACKING_URI"):
        register_webhook(client, "http://127.0.0.1:1/webhook", SECRET)
    assert list_versions(client) == []
