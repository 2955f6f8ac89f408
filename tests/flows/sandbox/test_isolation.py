"""The child: scrubbed, limited, ended with everything it started, and gone when its parent is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from audits.errors import SettingsError
from flows.sandbox import Level, starting
from flows.sandbox.isolation import run_child
from flows.sandbox.levels import variants_of, why_not
from flows.sandbox.limits import Limits
from flows.settings.environment import GradauditSettings

ROOMY = Limits(seconds=60, memory_bytes=2**34, file_bytes=2**30)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Put a program of the test's in the place of the child's module."""

    def install(text: str) -> Path:
        package = tmp_path / "own" / "registry_models"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "child.py").write_text(textwrap.dedent(text))
        monkeypatch.setattr(starting, "own_root", lambda: tmp_path / "own")
        folder = tmp_path / "work"
        folder.mkdir()
        return folder

    return install


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.end_to_end
def test_no_secret_reaches_the_child(program, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_KEY", "GRADAUDIT_RESULTS", "HOME"):
        monkeypatch.setenv(name, "planted-secret")
    folder = program("import os, json; print(json.dumps(dict(os.environ)), open('/proc/self/environ').read())")
    end = run_child({}, folder, ROOMY)
    assert end.cause is None
    assert '"PATH"' in end.log
    assert "planted-secret" not in end.log
    assert not (folder / "home").exists(), "the private home is removed"


@pytest.mark.end_to_end
def test_the_request_arrives(program) -> None:  # type: ignore[no-untyped-def]
    folder = program("import json, sys; print(json.load(sys.stdin)['x'])")
    assert run_child({"x": "seen"}, folder, ROOMY).log.strip() == "seen"


@pytest.mark.end_to_end
def test_a_hanging_child_and_what_it_started_are_ended(program) -> None:  # type: ignore[no-untyped-def]
    folder = program("""
        import subprocess, sys, time
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(other.pid, flush=True)
        time.sleep(60)
    """)
    end = run_child({}, folder, Limits(seconds=1.5, memory_bytes=2**34, file_bytes=2**30))
    assert end.cause == "time limit"
    assert end.seconds < 10
    assert gone(int(end.log.split()[0]))


@pytest.mark.end_to_end
def test_a_greedy_child_is_ended(program) -> None:  # type: ignore[no-untyped-def]
    folder = program("import time; held = bytearray(300 * 2**20); print('held', flush=True); time.sleep(60)")
    end = run_child({}, folder, Limits(seconds=30, memory_bytes=150 * 2**20, file_bytes=2**30))
    assert end.cause == "memory limit"
    assert "GiB" in end.message


@pytest.mark.end_to_end
def test_what_a_child_prints_is_limited_and_touches_no_disk(program) -> None:  # type: ignore[no-untyped-def]
    folder = program("while True: print('x' * 2**16)")
    end = run_child({}, folder, replace(ROOMY, log_bytes=2**20))
    assert end.cause == "output limit"
    assert "1 MiB" in end.message
    assert [path.name for path in folder.iterdir()] == []


@pytest.mark.end_to_end
def test_a_file_is_limited(program) -> None:  # type: ignore[no-untyped-def]
    folder = program("open('big', 'wb').write(bytes(2**21))")
    end = run_child({}, folder, replace(ROOMY, file_bytes=2**20))
    assert end.cause == "crashed"
    assert "File too large" in end.log


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("i = 0\nwhile True: open(f'{i}', 'wb').write(bytes(2**20)); i += 1", "MiB on disk"),
        ("i = 0\nwhile True: open(f'{i}', 'wb'); i += 1", "more than 1,000 files on disk"),
    ],
)
def test_a_child_cannot_fill_the_disk(program, text: str, words: str) -> None:  # type: ignore[no-untyped-def]
    end = run_child({}, program(text), replace(ROOMY, answer_bytes=4 * 2**20))
    assert end.cause == "disk limit"
    assert words in end.message


@pytest.mark.end_to_end
def test_too_many_threads_end_the_audit(program) -> None:  # type: ignore[no-untyped-def]
    folder = program("""
        import threading, time
        for _ in range(200): threading.Thread(target=time.sleep, args=(20,)).start()
    """)
    end = run_child({}, folder, replace(ROOMY, processes=20))
    if os.geteuid() != 0:  # the kernel counts a plain user's, and refuses the next one
        assert "can't start new thread" in end.log
        return
    assert end.cause == "process limit"
    assert end.seconds < 10


@pytest.mark.end_to_end
def test_processor_time_is_limited(program) -> None:  # type: ignore[no-untyped-def]
    end = run_child({}, program("while True: pass"), replace(ROOMY, cpu_seconds=1.0))
    assert end.cause == "time limit"
    assert "CPU" in end.message


@pytest.mark.end_to_end
def test_who_leaves_the_session_is_ended_too(program) -> None:  # type: ignore[no-untyped-def]
    folder = program("""
        import os, time
        if os.fork() == 0:
            os.setsid()
            print(os.getpid(), flush=True)
            time.sleep(60)
        time.sleep(1)
    """)
    end = run_child({}, folder, ROOMY)
    assert end.cause is None
    assert gone(int(end.log.split()[0]), seconds=1.0)


@pytest.mark.end_to_end
def test_what_a_child_prints_holds_no_control_characters(program) -> None:  # type: ignore[no-untyped-def]
    end = run_child({}, program(r"print('\x1b[2J\x1b]0;owned\x07 seen \u202e')"), ROOMY)
    assert end.log.strip() == "[2J]0;owned seen"


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_crash_is_told_with_its_cause(program, text: str, words: str) -> None:  # type: ignore[no-untyped-def]
    end = run_child({}, program(text), ROOMY)
    assert end.cause == "crashed"
    assert words in end.message


def carrying(mark: str) -> list[int]:
    """Processes whose environment holds the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.mark.end_to_end
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.parametrize("level", list(Level))
def test_a_killed_parent_takes_its_child_along(tmp_path: Path, level: Level) -> None:
    if not variants_of(level):
        pytest.skip(f"this host does not offer {level}: {why_not(level)}")
    own, answer = tmp_path / "own", tmp_path / "work" / "answer.jsonl"
    (own / "registry_models").mkdir(parents=True)
    answer.parent.mkdir()
    (own / "registry_models" / "__init__.py").write_text("")
    (own / "registry_models" / "child.py").write_text(
        "import json, os, sys, time; os.write(json.load(sys.stdin)['answer'], b'started'); time.sleep(60)"
    )
    script = f"""
from pathlib import Path
from flows.sandbox import Level, isolation, starting
starting.own_root = lambda: Path({str(own)!r})
answer = Path({str(answer)!r})
isolation.run_child({{}}, answer.parent, isolation.Limits(60, 2**34, 2**30), level=Level({str(level)!r}), answer=answer)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[3])
    deadline = time.monotonic() + 30
    while not answer.exists():
        assert parent.poll() is None, "it ended before its child had started"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert carrying(str(own))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while carrying(str(own)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not carrying(str(own))


def test_settings_come_from_the_environment_and_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADAUDIT_TIME_LIMIT", "12")
    monkeypatch.setenv("GRADAUDIT_AUDIT", '{"seed": 3}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    settings = GradauditSettings.load()
    assert (settings.time_limit, settings.audit_settings.seed) == (12.0, 3)
    assert settings.tracking_uri == "http://127.0.0.1:1"
    monkeypatch.setenv("GRADAUDIT_TIME_LIMIT", "soon")
    with pytest.raises(SettingsError, match="GRADAUDIT_TIME_LIMIT"):
        GradauditSettings.load()
    monkeypatch.delenv("GRADAUDIT_TIME_LIMIT")
    monkeypatch.setenv("GRADAUDIT_AUDIT", '{"sed": 3}')
    with pytest.raises(SettingsError, match="did you mean 'seed'"):
        _ = GradauditSettings.load().audit_settings
