"""Hostile code in an audit's process, at every level this host offers; the weakest level is the positive control."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.sandbox import Level, confinement
from flows.sandbox.isolation import ChildEnd
from flows.sandbox.levels import variants_of
from flows.sandbox.memory_group import memory_group
from tests.hostile.conftest import TIGHT, need
from tests.hostile.witnesses import Witnesses, attack_source

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(sys.platform != "linux", reason="the levels above 'process' need Linux"),
]

Attack = Callable[..., ChildEnd]
ROOT = Path(__file__).resolve().parents[2]


def loot(end: ChildEnd) -> dict[str, list[str]]:
    """What an attack got hold of, as it says."""
    return json.loads(end.log[end.log.index("{") :])


def test_in_bubblewrap_nothing_is_read_written_or_called(
    as_child: Attack, witnesses: Witnesses, tmp_path: Path
) -> None:
    end = as_child("nosy", Level.BUBBLEWRAP)
    assert end.cause is None, end
    assert loot(end) == {
        "secrets": [], "connected": [], "wrote": [], "writable": [], "namespaces": [],
    }  # fmt: skip
    work = tmp_path / "nosy-bubblewrap"
    assert witnesses.findings(work / "work", work / "model", texts=(end.log,)) == set()
    assert (work / "model" / "MLmodel").read_text() == "flavors: {}\n"
    assert "\x1b" not in end.log


def test_below_bubblewrap_there_is_no_network_but_the_users_files_are_open(
    as_child: Attack, witnesses: Witnesses
) -> None:
    end = as_child("nosy", Level.NETWORK)
    assert end.cause is None
    found = loot(end)
    assert found["connected"] == []
    assert found["secrets"] == ["home"], "the parent's environment is out of sight, its files are not"
    assert found["namespaces"] == []
    assert witnesses.findings() == {"outside"}


def test_control_in_a_plain_process_the_same_code_connects_reads_and_writes(
    as_child: Attack, witnesses: Witnesses
) -> None:
    end = as_child("nosy", Level.PROCESS)
    assert end.cause is None
    found = loot(end)
    assert found["connected"] == ["AF_INET", "AF_UNIX"]
    assert "home" in found["secrets"]
    assert "environment" not in found["secrets"], "scrubbed at every level"
    assert len(found["wrote"]) == 4
    assert witnesses.findings() == {"connection", "outside"}


def test_control_run_directly_it_reads_the_environment(witnesses: Witnesses, tmp_path: Path) -> None:
    source = attack_source("nosy", witnesses.targets(snapshot=tmp_path))
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert {"environment", "environment of another process", "home"} <= set(found["secrets"])
    assert witnesses.findings(texts=(str(found),)) == {"connection", "outside"}


@pytest.mark.parametrize("level", list(Level))
def test_a_fork_bomb_ends(as_child: Attack, level: Level) -> None:
    end = as_child("fork_bomb", level, replace(TIGHT, seconds=3))
    assert end.cause in ("process limit", "time limit"), end
    assert end.seconds < 10


def test_in_bubblewrap_the_kernel_refuses_the_fork(as_child: Attack) -> None:
    end = as_child("fork_bomb", Level.BUBBLEWRAP, replace(TIGHT, seconds=1.5))
    if end.cause == "process limit":
        pytest.skip("the caller's user id is counted over the whole machine here; polling ended it instead")
    assert int(end.log.split()[-1]) < 41


@pytest.mark.parametrize("level", list(Level))
def test_memory_is_counted_over_all_processes(as_child: Attack, level: Level) -> None:
    """Each of two processes stays below the limit, together they do not."""
    assert as_child("allocation", level).cause == "memory limit"


def test_control_the_allocation_goes_through_with_room(as_child: Attack) -> None:
    end = as_child("allocation", Level.PROCESS, replace(TIGHT, memory_bytes=2**30, seconds=2.5))
    assert (end.cause, end.log.count("held")) == ("time limit", 2)


@pytest.mark.parametrize("level", list(Level))
def test_memory_that_no_process_holds_is_refused(as_child: Attack, level: Level) -> None:
    end = as_child("memory_without_owner", level)
    assert (end.cause, end.log.strip()) == (None, "taken []")


def test_control_run_directly_it_takes_memory_that_no_process_holds() -> None:
    source = attack_source("memory_without_owner", {"memory_folders": []})
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "taken ['memfd', 'shm']"


@pytest.mark.parametrize("level", list(Level))
def test_a_hang_that_ignores_signals_ends(as_child: Attack, level: Level) -> None:
    end = as_child("hang", level, replace(TIGHT, seconds=1.0))
    assert (end.cause, end.log.strip()) == ("time limit", "hanging")
    assert end.seconds < 5


@pytest.mark.parametrize("level", list(Level))
def test_a_gigabyte_of_output_ends_the_audit_and_reaches_no_disk(
    as_child: Attack, level: Level, tmp_path: Path
) -> None:
    end = as_child("flood", level)
    assert end.cause == "output limit"
    assert len(end.log) <= 4000
    assert "\x1b" not in end.log
    assert sum(path.stat().st_size for path in (tmp_path / f"flood-{level}").rglob("*") if path.is_file()) < 10_000


@pytest.mark.parametrize("level", list(Level))
def test_an_answer_without_end_ends_the_audit(as_child: Attack, level: Level, tmp_path: Path) -> None:
    end = as_child("big_answer", level)
    assert end.cause == "answer limit"
    assert (tmp_path / f"big_answer-{level}" / "work" / "answer.jsonl").stat().st_size <= TIGHT.answer_bytes


WAYS = [
    *((Level.BUBBLEWRAP, name) for name in ("own user", "user namespace, none inside", "user namespace")),
    (Level.NETWORK, "user namespace"),
]


@pytest.mark.parametrize(("level", "name"), WAYS)
def test_the_first_process_inside_is_confined_and_out_of_reach(
    as_child: Attack, level: Level, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = next((variant for variant in variants_of(level) if variant.name == name), None)
    if variant is None:
        pytest.skip(f"this host or user has no {level} by {name}")
    monkeypatch.setattr(confinement, "variants_of", lambda _: (variant,))
    found = json.loads(as_child("first_process", level).log)
    assert (found["Seccomp"], found["NoNewPrivs"], int(found["CapEff"], 16)) == ("2", "1", 0)
    assert [found[name] for name in ("mem", "environ", "maps")] == ["PermissionError"] * 3
    assert found["own"]["Seccomp"] == "2"
    if level is Level.BUBBLEWRAP:
        assert found["settings"] == []
    if variant.own_user:
        assert int(found["own"]["CapBnd"], 16) == 0


def test_control_the_first_process_of_a_plain_level_is_the_hosts(as_child: Attack) -> None:
    assert json.loads(as_child("first_process", Level.PROCESS).log)["own"]["Seccomp"] == "2"


@pytest.mark.parametrize("level", list(Level))
def test_a_program_that_uses_up_its_processor_time_is_told_apart(as_child: Attack, level: Level) -> None:
    end = as_child("spin", level, replace(TIGHT, cpu_seconds=1.0))
    assert (end.cause, end.message.split(":")[0]) == ("time limit", "the audit used up its CPU time")


@pytest.mark.parametrize("level", list(Level))
def test_what_it_leaves_behind_is_removed_and_links_lead_nowhere(
    as_child: Attack, witnesses: Witnesses, tmp_path: Path, level: Level
) -> None:
    before = witnesses.outside.stat().st_mode
    assert as_child("deep_home", level).cause in (None, "disk limit")
    work = tmp_path / f"deep_home-{level}" / "work"
    assert sorted(path.name for path in work.iterdir() if path.is_dir()) == []
    assert witnesses.outside.stat().st_mode == before
    assert witnesses.findings() == set()


@pytest.mark.parametrize("level", [Level.NETWORK, Level.PROCESS])
@pytest.mark.parametrize("how", ["unlinked", "closed"])
def test_disk_without_names_is_counted(as_child: Attack, level: Level, how: str) -> None:
    if how == "closed" and os.geteuid() == 0:
        pytest.skip("root reads every folder, and counts it")
    assert as_child("hidden_disk", level, how=how).cause == "disk limit"


@pytest.mark.parametrize("level", list(Level))
def test_kernel_memory_that_nobody_holds_is_refused(as_child: Attack, level: Level) -> None:
    assert as_child("semaphores", level).log.strip() == "taken []"


@pytest.mark.parametrize("level", list(Level))
def test_buffers_of_sockets_are_counted_where_there_is_a_memory_group(as_child: Attack, level: Level) -> None:
    with memory_group(TIGHT) as group:
        if group is None:
            pytest.skip("this host lets nobody make a memory cgroup")
    assert as_child("sockets", level, replace(TIGHT, seconds=15)).cause == "memory limit"


def test_control_run_directly_it_takes_semaphores() -> None:
    source = attack_source("semaphores", {})
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    assert "semaphores" in done.stdout


#: A parent of its own, which an attack may kill: runs each level named, in this order.
_PARENT = """
import os, sys
from pathlib import Path
from flows.sandbox import Level, Limits, isolation, starting
base = Path(sys.argv[1])
starting.own_root = lambda: base / "own"
for name in sys.argv[2:]:
    folder = base / name
    folder.mkdir(parents=True)
    limits = Limits(seconds=20, memory_bytes=2**30, file_bytes=2**20)
    end = isolation.run_child({}, folder, limits, level=Level(name), readable=[base / "own"])
    print(name, end.cause, end.log, flush=True)
"""


def test_an_attack_on_its_parent_hits_nothing_but_the_control_kills_it(witnesses: Witnesses, tmp_path: Path) -> None:
    """Kills its parent; reads the environment its parent was started with."""
    need(Level.NETWORK)
    package = tmp_path / "own" / "registry_models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    spy = attack_source("nosy", witnesses.targets(snapshot=tmp_path / "none"))
    (package / "child.py").write_text(spy + (Path(__file__).parent / "attacks" / "kill.py").read_text())
    levels = [level for level in ("bubblewrap", "network", "process") if level != "bubblewrap" or _offered()]
    done = subprocess.run(
        [sys.executable, "-c", _PARENT, str(tmp_path), *levels],
        cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=60, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, f"the control: a plain process kills its parent\n{done.stderr}"
    told = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("bubblewrap", "network"))]
    assert told == levels[:-1], "above 'process' the parent lives on"
    assert "environment of another process" not in done.stdout


def _offered() -> bool:
    return bool(variants_of(Level.BUBBLEWRAP))
