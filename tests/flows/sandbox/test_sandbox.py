"""Which level of isolation is reached, what is shown inside, and what the settings say about it."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from audits.errors import SettingsError
from flows.one_audit.one_version import audit_directory
from flows.sandbox import Level, Limits, confine, reached_level
from flows.sandbox import confinement as confinement_module
from flows.sandbox import levels as levels_module
from flows.sandbox.bubblewrap import bubblewrap_command
from flows.sandbox.levels import Variant, spare_uid, variants_of, why_not
from flows.sandbox.limits import limits_of
from flows.sandbox.needed_paths import needed_paths
from flows.sandbox.starting import Conditions
from flows.sandbox.system_calls import filter_program
from flows.settings.environment import GradauditSettings

ROOT = Path(__file__).resolve().parents[3]
LIMITS = Limits(seconds=10, memory_bytes=2**30, file_bytes=2**20)


def forget() -> None:
    levels_module.variants_of.cache_clear()
    levels_module._trials.cache_clear()


@pytest.fixture
def without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    forget()
    yield
    forget()


@pytest.mark.usefixtures("without_bubblewrap")
def test_required_refuses_below_bubblewrap_and_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="apt-get install bubblewrap") as told:
        reached_level("required")
    assert "GRADAUDIT_ISOLATION=required" in str(told.value)
    assert "no bwrap" in str(told.value)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").write_text("flavors: {}\n")
    with pytest.raises(SettingsError, match="GRADAUDIT_ISOLATION"):
        audit_directory(tmp_path / "model", GradauditSettings.load(isolation="required"))


@pytest.mark.end_to_end
@pytest.mark.usefixtures("without_bubblewrap")
def test_auto_takes_the_next_level() -> None:
    assert reached_level("auto") in (Level.NETWORK, Level.PROCESS)
    assert reached_level("process") is Level.PROCESS


@pytest.mark.end_to_end
def test_a_bubblewrap_that_does_not_work_is_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that forbids namespaces: the program is there and fails."""
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    forget()
    try:
        assert variants_of(Level.BUBBLEWRAP) == ()
        if sys.platform == "linux":
            assert "No permissions" in why_not(Level.BUBBLEWRAP)
    finally:
        forget()


@pytest.mark.end_to_end
def test_the_order_of_levels() -> None:
    assert list(Level) == ["bubblewrap", "network", "process"]
    best = reached_level("auto")
    for level in Level:
        if variants_of(level):
            assert best is level
            break


def test_an_unknown_level_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADAUDIT_ISOLATION", "some")
    with pytest.raises(SettingsError, match="GRADAUDIT_ISOLATION"):
        GradauditSettings.load()


def test_limits_come_from_the_settings() -> None:
    settings = GradauditSettings.load(
        time_limit=5, cpu_limit=7, memory_limit=2, process_limit=9, file_limit=1, answer_limit=0.5, log_limit=0.25
    )
    limits = limits_of(settings)
    assert limits == Limits(5, 2 * 2**30, 2**30, 7, 9, 2**29, 2**28, 2 * 2**30)
    assert (limits.cpu, limits.tasks) == (7, 9)
    automatic = replace(limits, cpu_seconds=0.0, processes=0)
    assert automatic.cpu >= 5
    assert automatic.tasks > 256


def test_what_is_shown_holds_the_rooms_and_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    paths = needed_paths(ROOT, gpu=False, extra=["~"])
    assert tmp_path in paths, "a path from the settings"
    paths = needed_paths(ROOT, gpu=False)
    for room in ("audits", "flows", "registry_models"):
        assert any((ROOT / room).is_relative_to(path) for path in paths)
    for hidden in (tmp_path, ROOT, ROOT / ".git", Path("/"), Path("/etc"), Path("/home"), Path("/root"), Path("/var")):
        assert not any(hidden.is_relative_to(path) for path in paths), hidden
    assert not any(one != other and one.is_relative_to(other) for one in paths for other in paths)


def test_the_command_confines(tmp_path: Path) -> None:
    options = {"folder": tmp_path, "readable": [Path("/usr")], "scratch_bytes": 4096, "gpu": False}
    command = bubblewrap_command("bwrap", **options, own_user=False, no_nested=True)  # type: ignore[arg-type]
    for option in ("--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--new-session"):
        assert option in command
    assert command[command.index("--uid") + 1] == "65534"
    assert "--disable-userns" in command
    assert "--bind" not in command, "no folder of the host's can be written"
    assert "--as-pid-1" in command
    assert not any(part.startswith("--dev-bind") for part in command)
    as_root = bubblewrap_command("bwrap", **options, own_user=True, no_nested=False)  # type: ignore[arg-type]
    assert "--unshare-user" not in as_root
    assert as_root[as_root.index("--cap-drop") + 1] == "ALL"


def test_gpu_nodes_are_shown_unless_the_device_is_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the command only: with a real GPU this has not been run."""
    monkeypatch.setattr("flows.sandbox.starting.gpu_nodes", lambda: [Path("/dev/null")])
    monkeypatch.setattr("flows.sandbox.bubblewrap.gpu_nodes", lambda: [Path("/dev/null")])
    monkeypatch.setattr(confinement_module, "variants_of", lambda level: (Variant("user namespace"),))
    for device, shown in (("auto", True), ("cuda:1", True), ("cpu", False)):
        gpu = Conditions.of(Level.BUBBLEWRAP, LIMITS, device=device).gpu
        command = confine(Level.BUBBLEWRAP, LIMITS, folder=tmp_path, gpu=gpu).command
        assert ("--dev-bind" in command) is shown


def test_files_that_only_root_may_read_choose_the_variant_that_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variants = (Variant("own user", own_user=True), Variant("user namespace"))
    monkeypatch.setattr(confinement_module, "variants_of", lambda level: variants)
    (tmp_path / "weights").write_bytes(b"x")
    (tmp_path / "weights").chmod(0o644)
    tmp_path.chmod(0o755)
    assert confinement_module._variant_for(Level.BUBBLEWRAP, [tmp_path]).own_user
    (tmp_path / "weights").chmod(0o600)
    assert not confinement_module._variant_for(Level.BUBBLEWRAP, [tmp_path]).own_user


def test_each_audit_of_roots_gets_a_user_of_its_own() -> None:
    found = {spare_uid() for _ in range(5)}
    assert None in found or 65534 in found or len(found) > 1
    assert 0 not in found


def test_the_filter_is_a_whole_number_of_instructions_that_ends_in_allow() -> None:
    program = filter_program(gpu=False)
    if program is None:
        pytest.skip("no filter for this machine's architecture")
    instructions = base64.b64decode(program)
    assert len(instructions) % 8 == 0
    assert instructions[-8:] == b"\x06\x00\x00\x00\x00\x00\xff\x7f"
    assert len(base64.b64decode(filter_program(gpu=True) or "")) < len(instructions)
