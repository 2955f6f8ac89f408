"""What audits of one flow run share: claims against other sweeps, room on the disk, an end for all of them."""

from __future__ import annotations

import datetime
import socket
import threading
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from audits.errors import InfrastructureError
from flows.choosing.due_keys import due_key
from flows.choosing.sweeping import REGISTRATION, DiskBudget, NotTriedError, Stopped, Sweep
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import list_versions
from tests.flows.choosing.committing import commit


class Watched(threading.Event):
    """What says that a sweep has ended; whoever waits looks at it again and again, and is seen to wait by that."""

    def __init__(self) -> None:
        super().__init__()
        self._looks = threading.Semaphore(0)

    def is_set(self) -> bool:
        self._looks.release()
        return super().is_set()

    def was_waited_under(self) -> bool:
        """Wait until somebody has looked twice: he has waited in between, and has not got what he waits for."""
        return all(self._looks.acquire(timeout=30) for _ in range(2))


@pytest.fixture
def settings(tmp_path: Path) -> GradauditSettings:
    return GradauditSettings.load(results=str(tmp_path / "results"))


def test_a_claimed_version_waits_and_then_finds_the_other_s_result(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    client.create_registered_model("m")
    client.create_model_version("m", source="file:///nowhere")
    (version,) = list_versions(client)
    key = due_key(version, settings, settings.audit_settings)
    now = datetime.datetime.now(datetime.UTC)
    stopping, found = Watched(), []

    def second() -> None:
        with Sweep(settings, client, "tonight", now, stopping).claim(version, key) as result:
            found.append(result)

    other = threading.Thread(target=second)
    with Sweep(settings, client, REGISTRATION, None).claim(version, key) as result:
        assert result is None
        other.start()
        assert stopping.was_waited_under(), "it waits"
        assert not found
        # ended before the other chose its versions, committed after
        commit(tmp_path, version, settings, days_ago=1e-3, occasion=REGISTRATION)
    other.join(10)
    assert found[0] is not None
    assert found[0].occasion == REGISTRATION

    def taken(occasion: str, chosen_at: datetime.datetime | None = None, of: str = key) -> bool:
        with Sweep(settings, client, occasion, chosen_at).claim(version, of) as result:
            return result is not None

    assert taken(REGISTRATION), "told twice, audited once"
    assert not taken("manual-1"), "asked for by hand: again"
    assert not taken("tonight", now + datetime.timedelta(hours=1)), "its turn, an hour later"
    assert not taken("tonight", now, of="another recipe")
    commit(tmp_path, version, settings, occasion="tonight", ran_in="another torch")
    assert not taken("tonight"), "another environment's verdict is another verdict"


def test_downloads_wait_for_room_and_one_always_fits() -> None:
    disk_budget, never, nexts = DiskBudget(100), threading.Event(), Watched()
    order: list[str] = []

    def next_one() -> None:
        with disk_budget.for_bytes(60, nexts):
            order.append("next")

    with disk_budget.for_bytes(1000, never):
        waiting = threading.Thread(target=next_one)
        waiting.start()
        assert nexts.was_waited_under()
        order.append("first leaves")
    waiting.join(10)
    assert order == ["first leaves", "next"]
    stopping = threading.Event()
    stopping.set()
    with disk_budget.for_bytes(100, never), pytest.raises(Stopped), disk_budget.for_bytes(1, stopping):
        raise AssertionError("there is no room")


def test_the_rest_is_not_tried_once_the_registry_is_gone(
    client: MlflowClient, settings: GradauditSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = MlflowClient(tracking_uri=f"http://127.0.0.1:{probe.getsockname()[1]}")
    for registry, given_up in ((client, False), (gone, True)):
        sweep = Sweep(settings, registry, "tonight", None)
        for label in ("a v1", "b v1", "c v1"):
            with pytest.raises(InfrastructureError, match="no answer"), sweep.counting_failures(label):
                raise InfrastructureError(f"no answer for {label}")
        with pytest.raises(InfrastructureError, match="again"), sweep.counting_failures("c v1"):
            raise InfrastructureError("again: a retry of a version that failed is always tried")
        if given_up:
            with pytest.raises(NotTriedError, match="no answer for a v1"), sweep.counting_failures("d v1"):
                raise AssertionError("it was tried")
        else:
            with sweep.counting_failures("d v1"):
                pass
            assert sweep.failures == {}, "three bad versions in a row are no dead registry"
