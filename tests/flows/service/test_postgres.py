"""A night against Postgres behind both servers, as a team would run it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from audits.results.store import ResultsStore
from flows.service.up import UpOptions, answers, free_ports
from tests.stores import register_linear


def _programs() -> Path | None:
    """Return the folder with Postgres' programs: Debian keeps initdb off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


PROGRAMS = _programs()


def _user() -> list[str]:
    """Return what runs a command as another than root, which Postgres refuses."""
    return ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of its own on a free port of 127.0.0.1, with two databases; yields ``HOST:PORT``."""
    if PROGRAMS is None:
        pytest.skip("Postgres is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="the extra gradaudit[postgres] is not installed")
    import tempfile

    with tempfile.TemporaryDirectory(prefix="gradaudit-postgres-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if _user():
            shutil.chown(folder, "postgres")
        data, log = folder / "data", folder / "log"
        port = free_ports(UpOptions(folder, 0, 0, 0))[0]

        def pg(*command: str) -> None:
            done = subprocess.run(
                [*_user(), str(PROGRAMS / command[0]), *command[1:]],  # type: ignore[operator]
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, done.stdout

        pg("initdb", "-D", str(data), "-U", "gradaudit", "--auth", "trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        pg("pg_ctl", "start", "-w", "-D", str(data), "-l", str(log), "-o", options)
        try:
            for database in ("mlflow", "prefect"):
                pg("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "gradaudit", database)
            yield f"127.0.0.1:{port}"
        finally:
            pg("pg_ctl", "stop", "-D", str(data), "-m", "immediate")


@contextlib.contextmanager
def _server(command: list[str], environment: dict[str, str], health: str, log: Path) -> Iterator[None]:
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while not answers(health):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_night_with_both_servers_on_postgres(postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    mlflow_port, prefect_port, _ = free_ports(UpOptions(tmp_path, 0, 0, 0))
    tracking, prefect = f"http://127.0.0.1:{mlflow_port}", f"http://127.0.0.1:{prefect_port}"
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://gradaudit@{postgres}/prefect",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "GRADAUDIT_RESULTS": str(tmp_path / "results"),
        "GRADAUDIT_STATE": str(tmp_path / "state"),
    }
    mlflow_server = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port)),
        *("--backend-store-uri", f"postgresql://gradaudit@{postgres}/mlflow", "--workers", "1"),
        *("--artifacts-destination", (tmp_path / "artifacts").as_uri()),
    ]
    prefect_server = [
        *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
        *("--host", "127.0.0.1", "--port", str(prefect_port), "--lifespan", "on", "--log-level", "warning"),
    ]
    with (
        _server(mlflow_server, environment, f"{tracking}/health", tmp_path / "mlflow.log"),
        _server(prefect_server, environment, f"{prefect}/api/health", tmp_path / "prefect.log"),
    ):
        mlflow.set_tracking_uri(tracking)
        try:
            register_linear("on-postgres")
            ours = {**environment, "PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": tracking}
            setup = subprocess.run(
                [sys.executable, "-m", "flows.cli", "setup"],
                env=ours,
                capture_output=True,
                text=True,
                cwd=tmp_path,
            )
            assert setup.returncode == 0, setup.stderr
            night = subprocess.run(
                [sys.executable, "-m", "flows.cli", "nightly"],
                env=ours,
                capture_output=True,
                text=True,
                cwd=tmp_path,
            )
            assert night.returncode == 0, night.stdout + night.stderr
            client = mlflow.MlflowClient()
            tags = client.get_model_version("on-postgres", "1").tags
            assert tags["audit.outcome"] == "pass"
            assert client.get_run(tags["audit.run_id"]).info.status == "FINISHED"
        finally:
            mlflow.set_tracking_uri(None)
        with urllib.request.urlopen(
            urllib.request.Request(f"{prefect}/api/flow_runs/filter", b"{}", {"content-type": "application/json"})
        ) as answer:
            runs = answer.read().decode()
        assert '"state_type":"COMPLETED"' in runs, "the night ran on this server"
        assert '"auto_scheduled":true' in runs, "and the next nights are scheduled"
    audits = ResultsStore(tmp_path / "results").read("audits").to_pylist()
    assert [audit["model_name"] for audit in audits] == ["on-postgres"]
