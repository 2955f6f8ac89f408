"""The only reader of the environment: every setting is a ``GRADAUDIT_...`` variable with a default."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from audits.errors import SettingsError
from audits.settings import AuditSettings

#: MLflow's clients retry a server's 500s for minutes otherwise; a flow's own retry is the better place.
_MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

#: What an embedded Prefect needs: room to start on a busy machine, and no chatter.
_PREFECT_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
    "PREFECT_CLI_PROMPT": "false",
    # A run beats every 30 s, the least there is; the automation of `gradaudit setup` misses it after 90.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}


class GradauditSettings(BaseSettings):
    """Where things are and how much an audit may use."""

    model_config = SettingsConfigDict(env_prefix="GRADAUDIT_", extra="ignore", env_nested_delimiter="__")

    tracking_uri: str = Field(default="", description="MLflow tracking and registry URI; MLFLOW_TRACKING_URI otherwise")
    results: str = Field(default="results", description="results store: a folder or an object-store URI")
    experiment: str = Field(default="gradaudit", description="MLflow experiment that audits are published to")
    recipes: str = Field(default="", description="trusted recipe repository: a folder of NAME.yaml by model-name glob")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    time_limit: float = Field(default=1800.0, gt=0, description="seconds one audit may take before it is ended")
    memory_limit: float = Field(default=0.0, ge=0, description="GiB one audit may hold; 0: 80 % of the machine's")
    cpu_limit: float = Field(default=0.0, ge=0, description="CPU seconds of one process; 0: time limit times cores")
    process_limit: int = Field(default=0, ge=0, description="processes and threads at a time; 0: 256 and 8 a core")
    file_limit: float = Field(default=4.0, gt=0, description="GiB the largest file an audit writes may have")
    answer_limit: float = Field(default=0.5, gt=0, description="GiB an audit may leave on disk altogether")
    log_limit: float = Field(default=0.015625, gt=0, description="GiB an audit may print")
    scratch_limit: float = Field(default=2.0, gt=0, description="GiB of an audit's in-memory /tmp (bubblewrap)")
    isolation: Literal["auto", "required", "bubblewrap", "network", "process"] = Field(
        default="auto", description="how an audit's process is confined: the best there is, or no less than this"
    )
    readable_paths: tuple[str, ...] = Field(
        default=(), description="further paths an audit may read, for libraries outside the installation; as JSON"
    )
    rotation_days: float = Field(
        default=7.0, ge=0, description="days within which every unchanged version is audited again; 0: never"
    )
    rotation_hours: float = Field(
        default=0.0, ge=0, description="hours of audits that unchanged versions may add to a night; 0: no limit"
    )
    shard_minutes: float = Field(default=20.0, gt=0, description="minutes of audits in one flow run of a worker")
    shards_at_once: int = Field(default=8, ge=1, description="flow runs that a night has on the workers at a time")
    ahead_limit: float = Field(
        default=20.0, ge=0, description="GiB of models on disk at a time before the next download waits"
    )
    state: str = Field(default="", description="this host's folder of GPU locks and canary stamps; in /tmp otherwise")
    attempts: int = Field(default=3, ge=1, description="how often a version is tried when its audit's process dies")
    audit: dict[str, Any] = Field(default_factory=dict, description="audits.AuditSettings, as JSON")

    @classmethod
    def load(cls, **overrides: Any) -> GradauditSettings:
        """Read the environment; given values win.

        Raises:
            SettingsError: a value that cannot be; the text names the variable.
        """
        try:
            settings = cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            place = "__".join(str(part) for part in first["loc"]).upper()
            raise SettingsError(f"GRADAUDIT_{place}: {first['msg']}") from error
        if not settings.tracking_uri:
            settings.tracking_uri = os.environ.get("MLFLOW_TRACKING_URI", "") or _default_tracking_uri()
        return settings

    @property
    def recipes_folder(self) -> Path | None:
        """The trusted recipe repository, if there is one."""
        return Path(self.recipes) if self.recipes else None

    @property
    def audit_settings(self) -> AuditSettings:
        """The settings of each audit.

        Raises:
            SettingsError: an unknown or impossible one.
        """
        return AuditSettings.from_mapping(self.audit)


def _default_tracking_uri() -> str:
    return f"sqlite:///{Path('mlflow.db').absolute()}"


def visible_gpus() -> list[str] | None:
    """Return the GPUs that ``CUDA_VISIBLE_DEVICES`` names, as it writes them; None where it is not set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [entry.strip() for entry in value.split(",") if entry.strip() not in ("", "-1")]


def quiet_defaults() -> None:
    """Set what MLflow and Prefect need unless the user has set it; call before importing either."""
    for name, value in {**_MLFLOW_DEFAULTS, **_PREFECT_DEFAULTS}.items():
        os.environ.setdefault(name, value)
