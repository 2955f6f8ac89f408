"""A sandbox that starts before its turn: as confined as a fresh one, empty until then, and gone with its parent."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from audits.outcomes import Outcome
from flows.choosing.sweeping import Sweep
from flows.one_audit.one_version import Target, audit_directory, audit_version
from flows.sandbox import Level
from flows.sandbox.artifact import shown
from flows.sandbox.levels import variants_of, why_not
from flows.sandbox.limits import limits_of
from flows.sandbox.standby import standing_by
from flows.sandbox.starting import Conditions
from flows.settings.environment import GradauditSettings
from registry_models.artifacts.snapshot import read_snapshot
from registry_models.recipes.recipe_names import recipe_parts
from registry_models.reference.reference_files import EXPECTED_CHECKS, WRONG_PARAMETER, write_reference
from registry_models.registry.versions import VersionReference
from tests.flows.sandbox.test_isolation import carrying, gone
from tests.stores import register_linear

ROOT = Path(__file__).resolve().parents[3]

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent"),
]


def conditions_of(settings: GradauditSettings, level: Level) -> Conditions:
    return Conditions.of(level, limits_of(settings), device=settings.device, extra=settings.readable_paths)


@pytest.mark.parametrize("level", list(Level))
def test_the_files_arrive_when_their_turn_comes_and_the_verdict_is_the_known_one(level: Level) -> None:
    from flows.one_audit.one_snapshot import audit_snapshot

    if not variants_of(level):
        pytest.skip(f"this host does not offer {level}: {why_not(level)}")
    settings = GradauditSettings.load(device="cpu", isolation=str(level), attempts=1)
    with standing_by(settings) as standby:
        waiting = standby._child
        assert waiting is not None
        place = standby._shown
        snapshot = read_snapshot(write_reference(standby.folder / "model"))
        assert not list(place.iterdir()), "nothing of the model is shown before its turn"
        here = standby.hand_over(snapshot, shown(snapshot))
        assert here.folder.is_relative_to(place)
        assert here.recipe_folder is not None
        assert (here.recipe_folder / "recipe.yaml").is_file()
        assert not snapshot.folder.exists(), "moved, not copied"
        report = audit_snapshot(here, standby.folder, settings, settings.audit_settings, standby=standby)
        assert waiting.process.returncode == 0, "it was the waiting process that audited"
    assert set(report.failed_checks) == EXPECTED_CHECKS
    assert report.failed_parameters == [WRONG_PARAMETER]
    assert not standby.folder.exists()
    assert gone(waiting.process.pid)


def test_its_time_counts_from_its_turn_on(tmp_path: Path) -> None:
    model = write_reference(tmp_path / "model")
    settings = GradauditSettings.load(device="cpu", time_limit=20.0)
    with standing_by(settings, readable=[model]) as standby:
        time.sleep(4.0)
        report = audit_directory(model, settings, standby=standby)
    assert report.failed_parameters == [WRONG_PARAMETER]
    settings = GradauditSettings.load(device="cpu", time_limit=0.05)
    with standing_by(settings, readable=[model]) as standby:
        time.sleep(4.0)
        report = audit_directory(model, settings, standby=standby)
    assert [row.cause for row in report.rows] == ["time limit"], "a waiting process has its limits all the same"


def test_a_recipe_that_lies_elsewhere_is_read_by_the_waiting_process(tmp_path: Path) -> None:
    model = write_reference(tmp_path / "model")
    (recipe,) = (path.parent for path in model.rglob("recipe.yaml"))
    elsewhere = Path(shutil.copytree(recipe, tmp_path / "elsewhere"))
    (elsewhere / "notes.txt").write_text("no part of a recipe")
    settings = GradauditSettings.load(device="cpu", attempts=1)
    parts = recipe_parts(elsewhere)
    assert elsewhere / "recipe.yaml" in parts
    assert elsewhere / "notes.txt" not in parts
    with standing_by(settings, readable=[model, *parts]) as standby:
        assert standby._child is not None
        process = standby._child.process
        report = audit_directory(model, settings, recipe=elsewhere, standby=standby)
        assert process.returncode == 0, "it was the waiting process that audited"
    assert report.failed_parameters == [WRONG_PARAMETER]


def test_a_sweep_starts_the_next_process_while_a_version_is_audited(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANG", "mark-of-the-next")
    version = VersionReference("m", register_linear("m")).resolve(client)
    settings = GradauditSettings.load(device="cpu", results=str(tmp_path / "results"))
    sweep, stages = Sweep(settings, client, "tonight", None), list[str]()
    with ThreadPoolExecutor(1) as pool:
        with sweep.auditing:  # held by the version before it
            target = Target(version, "tonight")
            future = pool.submit(
                audit_version, target, client, settings, write=False, on_stage=stages.append, sweep=sweep
            )
            deadline = time.monotonic() + 60
            while not carrying("mark-of-the-next") and not future.done() and time.monotonic() < deadline:
                time.sleep(0.02)
            waiting = set(carrying("mark-of-the-next"))
            assert waiting
            assert stages == ["downloading"]
        report = future.result()
    assert report.outcome == Outcome.PASS, report.headline
    assert not carrying("mark-of-the-next")


@pytest.mark.parametrize("change", ["limits", "gpu", "extra", "environment", "readable", "ended"])
def test_one_started_under_other_conditions_is_not_taken(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GradauditSettings.load(device="cpu")
    with standing_by(settings) as standby:
        assert standby._child is not None
        process, wanted, readable = standby._child.process, standby._child.conditions, [standby._shown]
        match change:
            case "limits":
                wanted = dataclasses.replace(wanted, limits=dataclasses.replace(wanted.limits, memory_bytes=2**30))
            case "gpu":
                wanted = dataclasses.replace(wanted, gpu=True)
            case "extra":
                wanted = dataclasses.replace(wanted, extra=("/opt",))
            case "environment":
                monkeypatch.setenv("OMP_NUM_THREADS", "3")
                wanted = conditions_of(settings, wanted.level)
            case "readable":
                readable = [tmp_path]
            case "ended":
                process.kill()
                process.wait()
        assert standby.take(wanted, readable) is None
    assert gone(process.pid)


def test_one_that_fits_is_taken_once() -> None:
    settings = GradauditSettings.load(device="cpu")
    with standing_by(settings) as standby:
        assert standby._child is not None
        wanted = conditions_of(settings, standby._child.conditions.level)
        assert standby.take(wanted, [standby._shown]) is not None
        assert standby.take(wanted, [standby._shown]) is None


def test_files_that_only_root_may_read_are_not_left_to_another_user(tmp_path: Path) -> None:
    settings = GradauditSettings.load(device="cpu")
    with standing_by(settings) as standby:
        if standby._child is None or not standby._child.own_user:
            pytest.skip("audits run as this user here")
        closed = standby._shown / "closed"
        closed.write_text("")
        closed.chmod(0o600)
        wanted = conditions_of(settings, standby._child.conditions.level)
        assert standby.take(wanted, [standby._shown]) is None


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_python(pid: int) -> bool:
    """Whether a process is the audit's own, not what confines it."""
    try:
        first, *rest = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.path.basename(first).startswith(b"python") and b"registry_models.child" in rest


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("level", list(Level))
def test_no_waiting_process_outlives_its_parent(tmp_path: Path, level: Level, number: signal.Signals) -> None:
    if not variants_of(level):
        pytest.skip(f"this host does not offer {level}: {why_not(level)}")
    script = (
        "import time\n"
        "from flows.sandbox.standby import standing_by\n"
        "from flows.settings.environment import GradauditSettings\n"
        f"with standing_by(GradauditSettings.load(device='cpu', isolation={str(level)!r})):\n"
        "    print('waits', flush=True)\n"
        "    time.sleep(60)\n"
    )
    mark = f"mark-{level}-{number.name}"
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # an interrupted Python shows where it was
        env={**os.environ, "LANG": mark},
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "waits\n"
    wait_for(
        lambda: any(_is_python(pid) for pid in carrying(mark) if pid != parent.pid)
    )  # bubblewrap is past its start
    os.kill(parent.pid, number)
    parent.wait()
    deadline = time.monotonic() + 5
    while carrying(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not carrying(mark)
