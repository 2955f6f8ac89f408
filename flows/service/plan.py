"""The processes of ``gradaudit up``: their commands, their environments, their secrets."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.processes import PYTHON, UVICORN
from flows.service.supervising import Service
from flows.settings.settings_files import FILE, PROJECT_FILE

#: Everything listens here alone.
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Plan:
    """Which processes there are, and what each of them is told."""

    folder: Path
    mlflow_port: int
    prefect_port: int
    webhook_port: int
    gpus: tuple[str, ...]
    inherited: Mapping[str, str]

    @property
    def mlflow_url(self) -> str:
        """MLflow's server and UI."""
        return f"http://{HOST}:{self.mlflow_port}"

    @property
    def prefect_url(self) -> str:
        """Prefect's server and UI."""
        return f"http://{HOST}:{self.prefect_port}"

    @property
    def webhook_url(self) -> str:
        """The webhook's process."""
        return f"http://{HOST}:{self.webhook_port}"

    @property
    def results(self) -> Path:
        """The results store."""
        return self.folder / "results"

    def environment(self, **more: str) -> dict[str, str]:
        """Return what every process gets, and ``more``; servers configured elsewhere have no say here."""
        kept = {n: v for n, v in self.inherited.items() if not n.startswith(("PREFECT_API_", "PREFECT_SERVER_"))}
        return {
            **kept,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
            "PREFECT_UI_API_URL": f"{self.prefect_url}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "GRADAUDIT_TRACKING_URI": self.mlflow_url,
            "GRADAUDIT_RESULTS": self.inherited.get("GRADAUDIT_RESULTS", str(self.results)),
            **self.settings_file(),
            **more,
        }

    def settings_file(self) -> dict[str, str]:
        """Name the settings file of the folder that this was started in: workers start their runs elsewhere."""
        named = self.inherited.get("GRADAUDIT_CONFIG")
        found = [Path(name).resolve() for name in ([named] if named else (FILE, PROJECT_FILE)) if Path(name).is_file()]
        return {"GRADAUDIT_CONFIG": str(found[0])} if found else {}

    def mlflow(self) -> Service:
        """MLflow's server: its artifacts go through it, its webhooks may reach the loopback address."""
        command = [
            *(*PYTHON, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.mlflow_port)),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"),
            *("--artifacts-destination", (self.folder / "artifacts").as_uri()),
        ]
        more = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight helper processes that nothing here asks for
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            # Without it MLflow makes a new key at each start and can no longer read the webhook's secret.
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": self.secrets()["mlflow_encryption_key"],
        }
        environment = self.environment(**more)
        environment.pop("MLFLOW_TRACKING_URI")
        return Service("mlflow", command, environment, serves=True)

    def prefect(self) -> Service:
        """Prefect's server with all its services in one process."""
        command = [
            *(*UVICORN, "flows.service.prefect_server:create_app", "--host", HOST),
            *("--port", str(self.prefect_port), "--lifespan", "on", "--timeout-keep-alive", "5"),
            *("--timeout-graceful-shutdown", "3", "--log-level", "warning"),
        ]
        return Service("prefect", command, self.environment(PREFECT__SERVER_FINAL="1"), serves=True)

    def workers(self) -> list[Service]:
        """One worker for the sweep itself, one per GPU for its lists (or one on the CPU), one for registrations."""
        first = self.gpus[:1]
        workers = [self._worker("sweep", "cpu", "default", ())]
        workers += [self._worker(f"gpu-{gpu}", "gpu", "nightly", (gpu,)) for gpu in self.gpus]
        if not self.gpus:
            workers.append(self._worker("audits", "gpu", "nightly", ()))
        return [*workers, self._worker("registration", "gpu", "registration", first)]

    def webhook(self) -> Service:
        """The webhook with its reconciling loop; it registers itself in MLflow."""
        command = [
            *(*PYTHON, "-m", "flows.cli", "webhook", "--register"),
            *("--host", HOST, "--port", str(self.webhook_port)),
        ]
        return Service("webhook", command, self.environment(GRADAUDIT_WEBHOOK_SECRET=self.secrets()["webhook_secret"]))

    def secrets(self) -> dict[str, str]:
        """Return the secrets of this folder, made at the first start; only their owner can read the file."""
        file = self.folder / "secrets.json"
        if not file.is_file():
            made = {"webhook_secret": os.urandom(32).hex(), "mlflow_encryption_key": _fernet_key()}
            with contextlib.suppress(FileNotFoundError):
                file.with_suffix(".tmp").unlink()
            descriptor = os.open(file.with_suffix(".tmp"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as out:
                json.dump(made, out)
            file.with_suffix(".tmp").replace(file)
        found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _worker(self, name: str, pool: str, queue: str, gpus: tuple[str, ...]) -> Service:
        command = [
            *(*PYTHON, "-m", "prefect", "worker", "start", "--pool", pool, "--work-queue", queue),
            *("--type", "process", "--limit", "1", "--name", name),
        ]
        device = {} if gpus else {"GRADAUDIT_DEVICE": "cpu"}
        environment = self.environment(CUDA_VISIBLE_DEVICES=",".join(gpus), **device)
        return Service(f"worker-{name}", command, environment)


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(os.urandom(32)).decode()
