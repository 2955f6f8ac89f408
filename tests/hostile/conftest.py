"""Witnesses around each hostile test, and the levels this host offers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.sandbox import Level, Limits, starting
from flows.sandbox.isolation import ChildEnd, run_child
from flows.sandbox.levels import variants_of, why_not
from tests.hostile.witnesses import Witnesses, attack_source

MIB = 2**20
TIGHT = Limits(
    seconds=20,
    memory_bytes=450 * MIB,
    file_bytes=256 * MIB,
    processes=40,
    answer_bytes=32 * MIB,
    log_bytes=4 * MIB,
    scratch_bytes=32 * MIB,
)


def need(level: Level) -> None:
    """Skip a test that needs a level this host does not offer."""
    if not variants_of(level):
        pytest.skip(f"this host does not offer {level}: {why_not(level)}")


@pytest.fixture
def witnesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Witnesses]:
    planted = Witnesses.plant(tmp_path)
    monkeypatch.setenv("HOME", str(planted.home))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", planted.secret)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", planted.secret)
    yield planted
    planted.close()


@pytest.fixture
def as_child(tmp_path: Path, witnesses: Witnesses, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ChildEnd]:
    """Run an attack in the place of a child's program: what a model's code is, without the seconds torch takes."""

    def attack(name: str, level: Level, limits: Limits = TIGHT, **more: Any) -> ChildEnd:
        need(level)
        base = tmp_path / f"{name}-{level}"
        package, folder, snapshot = base / "own" / "registry_models", base / "work", base / "model"
        for path in (package, folder, snapshot):
            path.mkdir(parents=True)
        (snapshot / "MLmodel").write_text("flavors: {}\n")
        targets = witnesses.targets(
            snapshot=snapshot,
            memory_folders=["/tmp", "/dev/shm"] if level is Level.BUBBLEWRAP else [],
            group=os.getpgid(0),
            **more,
        )
        (package / "__init__.py").write_text("")
        (package / "child.py").write_text(attack_source(name, targets))
        monkeypatch.setattr(starting, "own_root", lambda: base / "own")
        end = run_child({}, folder, limits, level=level, readable=[snapshot], answer=folder / "answer.jsonl")
        assert not left_running(base / "own"), "everything it started is gone"
        return end

    return attack


def left_running(own: Path) -> list[int]:
    """Processes that carry the child's environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(own).encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
