"""`gradaudit up` as a person runs it: ports, secrets, a process that dies, a restart, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from audits.errors import SettingsError
from flows.service.plan import Plan
from flows.service.up import UpOptions, answers, free_ports, visible_gpus


@pytest.mark.end_to_end
def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "flows.cli", "up", "--folder", str(tmp_path / "d"), "--mlflow-port", "0"]
        done = subprocess.run([*command, "--prefect-port", str(port)], capture_output=True, text=True)
        assert done.returncode == 2
        assert f"--prefect-port: port {port} on 127.0.0.1 is taken" in done.stderr
        assert not (tmp_path / "d" / "logs").exists()
    assert len(set(free_ports(UpOptions(tmp_path, 0, 0, 0)))) == 3


def test_gpus_that_are_not_there_are_refused() -> None:
    assert visible_gpus("none") == ()
    with pytest.raises(SettingsError, match="--gpus: '97' is not there"):
        visible_gpus("97")


def test_one_worker_per_gpu_and_secrets_only_where_they_are_needed(tmp_path: Path) -> None:
    plan = Plan(tmp_path, 1, 2, 3, ("0", "3"), {"PREFECT_API_KEY": "of another server"})
    workers = {worker.name: worker for worker in plan.workers()}
    assert list(workers) == ["worker-sweep", "worker-gpu-0", "worker-gpu-3", "worker-registration"]
    assert workers["worker-gpu-3"].environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert workers["worker-registration"].environment["CUDA_VISIBLE_DEVICES"] == "0"
    secrets = plan.secrets()
    assert plan.secrets() == secrets, "made once"
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    for service in (*workers.values(), plan.prefect()):
        assert not set(secrets.values()) & set(service.environment.values()), service.name
        assert "PREFECT_API_KEY" not in service.environment
    assert plan.webhook().environment["GRADAUDIT_WEBHOOK_SECRET"] == secrets["webhook_secret"]


class Up:
    """A running ``gradaudit up``."""

    def __init__(self, folder: Path) -> None:
        self.folder, out, err = folder, folder / "out", folder / "err"
        command = [sys.executable, "-m", "flows.cli", "up", "--folder", str(folder / "data"), "--gpus", "none"]
        ports = ["--mlflow-port", "0", "--prefect-port", "0", "--webhook-port", "0"]
        environment = {**os.environ, "HOME": str(folder)}
        with out.open("w") as stdout, err.open("w") as stderr:
            self.process = subprocess.Popen([*command, *ports], env=environment, stdout=stdout, stderr=stderr)
        deadline = time.monotonic() + 240
        while "is up after" not in out.read_text():
            assert self.process.poll() is None, err.read_text()
            assert time.monotonic() < deadline, err.read_text()
            time.sleep(0.3)
        self.places = dict(re.findall(r"^  (\w+) +(\S+)", out.read_text(), re.M))

    def left(self) -> list[int]:
        """Return the processes that carry the folder in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if str(self.folder / "data").encode() in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found

    def mlflow_process(self) -> int:
        for pid in self.left():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"mlflow" in line and b"server" in line:
                    return pid
        raise AssertionError("MLflow is not running")


def wait(what: str, seconds: float, holds: object) -> None:
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_everything_starts_survives_and_ends(tmp_path: Path) -> None:
    import mlflow

    up = Up(tmp_path)
    try:
        client = mlflow.MlflowClient(up.places["MLflow"])
        client.create_registered_model("kept")
        os.kill(up.mlflow_process(), signal.SIGKILL)
        wait(
            "MLflow is started again",
            120,
            lambda: "mlflow ended (SIGKILL), started again" in (tmp_path / "err").read_text(),
        )
        wait("MLflow answers again", 120, lambda: answers(f"{up.places['MLflow']}/health"))
    finally:
        up.process.kill()  # no chance to end its children itself
        up.process.wait()
    wait("the watchdog ends everything", 30, lambda: not up.left())

    again = Up(tmp_path)
    try:
        client = mlflow.MlflowClient(again.places["MLflow"])
        assert client.get_registered_model("kept").name == "kept"
    finally:
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(90) == 0
    assert again.left() == []
    assert "nothing is left running" in (tmp_path / "err").read_text()
