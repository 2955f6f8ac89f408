"""The only reader of the environment: every setting is a ``GRADAUDIT_...`` variable with a default.

The command line wins over the environment, the environment over the settings file (`flows.settings.settings_files`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as UnreadableError

from audits.errors import SettingsError, suggest
from audits.globs import matches
from audits.settings import AuditSettings
from flows.settings.settings_files import SettingsFile, find_settings_file
from flows.settings.settings_values import ModelSettings, Origin, inner, typed
from flows.settings.tracking_uris import usable_uri

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


#: Variables that are no settings: the settings file's place, and how much the log says.
_OTHER_VARIABLES = ("GRADAUDIT_CONFIG", "GRADAUDIT_LOG_LEVEL")


class GradauditSettings(BaseSettings):
    """Where things are and how much an audit may use."""

    model_config = SettingsConfigDict(env_prefix="GRADAUDIT_", extra="ignore", env_nested_delimiter="__")

    tracking_uri: str = Field(default="", description="MLflow tracking and registry URI; MLFLOW_TRACKING_URI otherwise")
    results: str = Field(default="results", description="results store: a folder or an object-store URI")
    experiment: str = Field(default="gradaudit", description="MLflow experiment that audits are published to")
    recipes: str = Field(default="", description="trusted recipe repository: a folder of NAME.yaml by model-name glob")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or any type torch finds")
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
    severity: dict[str, str] = Field(
        default_factory=dict, description="check or glob -> fail or warn: what an unmet claim does; as JSON"
    )
    models: tuple[ModelSettings, ...] = Field(
        default=(), description="audit settings and severities of models by glob, the last that matches wins; as JSON"
    )
    waivers: str = Field(default="", description="the waivers file, YAML")
    webhook_secret: SecretStr = Field(default=SecretStr(""), description="what MLflow signs its webhooks with")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, **overrides: Any) -> GradauditSettings:
        """Read settings file and environment; given values win.

        Raises:
            SettingsError: a value that cannot be, or a setting that does not exist; the text names where it stands.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        file = _settings_file(cls)
        origins = dict.fromkeys((*file.values, *inner(file.values)), file.label)
        _refuse_unknown_variables(cls.model_fields)
        origins |= _variables(cls.model_fields) | dict.fromkeys(given, "command line")
        try:
            settings = cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            raise SettingsError(f"{_place(first['loc'], origins)}: {first['msg']}") from error
        except UnreadableError as error:
            raise SettingsError(f"GRADAUDIT_...: {error}; write it as JSON") from error
        if not settings.tracking_uri or origins.get("tracking_uri") == file.label:
            if uri := os.environ.get("MLFLOW_TRACKING_URI", ""):
                settings.tracking_uri, origins["tracking_uri"] = uri, "MLFLOW_TRACKING_URI"
            elif not settings.tracking_uri:
                settings.tracking_uri = _default_tracking_uri()
        try:
            settings.tracking_uri = usable_uri(settings.tracking_uri)
        except SettingsError as error:
            raise SettingsError(f"{origins.get('tracking_uri', 'default')}: {error}") from error
        settings._origins = origins
        settings._validate()
        return settings

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, environment, settings file: in this order."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, dict(_settings_file(settings_cls).values))

    def _validate(self) -> None:
        """Refuse impossible audit settings and severities now, wherever they stand, rather than in the night."""
        for own, where in ((None, ""), *((model, f"models {model.match!r}: ") for model in self.models)):
            try:
                typed(self._audit(() if own is None else (own,)))
            except SettingsError as error:
                named = ("models",) if own else ("audit", "severity")
                places = dict.fromkeys(self._origins[name] for name in named if name in self._origins)
                raise SettingsError(f"{' and '.join(places) or 'settings'}: {where}{error}") from error

    def _audit(self, models: tuple[ModelSettings, ...], narrowing: Mapping[str, Any] | None = None) -> dict[str, Any]:
        merged: dict[str, Any] = dict(self.audit)
        severity = {**self.severity, **merged.get("severity", {})}
        for model in models:
            merged |= model.audit
            severity |= {**model.severity, **model.audit.get("severity", {})}
        return merged | {"severity": severity} | dict(narrowing or {})

    def for_model(self, name: str, narrowing: Mapping[str, Any] | None = None) -> AuditSettings:
        """Return the settings of one model's audits.

        Args:
            name: the registered model's name.
            narrowing: what the command line says besides.

        Raises:
            SettingsError: an unknown or impossible one.
        """
        return typed(self._audit(self._matching(name), narrowing))

    def _matching(self, name: str) -> tuple[ModelSettings, ...]:
        return tuple(model for model in self.models if matches(name, model.match))

    def origins(self) -> list[Origin]:
        """Return every setting in force with where it comes from; secrets only as set or not."""
        shown = []
        for name, described in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, SecretStr) or name in secret_names(type(self)):
                value = "set" if value and str(value) else ""
            if isinstance(value, tuple):
                value = [i.model_dump(exclude_defaults=True) if isinstance(i, BaseModel) else i for i in value]
            shown.append(Origin(name, value, self._origins.get(name, "default"), described.description or ""))
        return shown

    def audit_origins(self, name: str) -> list[Origin]:
        """Return the audit settings of one model, each with where it comes from."""
        where = {key: self._origins.get(f"audit.{key}", "") for key in self.audit}
        where |= {f"severity {glob}": self._origins.get(f"severity.{glob}", "") for glob in self.severity}
        for model in self._matching(name):
            label = f"{self._origins.get('models', '')}, models {model.match!r}"
            where |= dict.fromkeys(model.audit, label)
            where |= {f"severity {glob}": label for glob in model.severity}
        plain = self.for_model(name).to_mapping()
        severity = {f"severity {glob}": value for glob, value in plain.pop("severity").items()}
        return [Origin(key, value, where.get(key, "default")) for key, value in {**plain, **severity}.items()]

    @property
    def recipes_folder(self) -> Path | None:
        """The trusted recipe repository, if there is one."""
        return Path(self.recipes) if self.recipes else None

    @property
    def audit_settings(self) -> AuditSettings:
        """The settings of each audit of which no model's say otherwise.

        Raises:
            SettingsError: an unknown or impossible one.
        """
        return typed(self._audit(()))


def secret_names(settings: type[BaseSettings]) -> set[str]:
    """Names of the settings that belong in the environment only and are never shown."""
    return {
        name
        for name, described in settings.model_fields.items()
        if described.annotation is SecretStr or name.endswith(("secret", "token", "password"))
    }


def _settings_file(settings: type[BaseSettings]) -> SettingsFile:
    chosen = os.environ.get("GRADAUDIT_CONFIG", "")
    return find_settings_file(Path.cwd(), chosen, settings.model_fields.keys(), secret_names(settings))


def _variables(names: Iterable[str]) -> dict[str, str]:
    """The variables that set a setting, or one entry of it (``audit.seed``)."""
    found: dict[str, str] = {}
    for variable, text in sorted(os.environ.items()):
        name, _, key = variable.upper().removeprefix("GRADAUDIT_").lower().partition("__")
        if not variable.upper().startswith("GRADAUDIT_") or name not in names:
            continue
        found[name] = f"{found[name]}, {variable}" if name in found else variable
        if key:
            found[f"{name}.{key}"] = variable
        elif text.lstrip().startswith("{"):
            try:
                found |= dict.fromkeys(inner({name: json.loads(text)}), variable)
            except ValueError:
                continue  # said better by whoever reads the value
    return found


def _refuse_unknown_variables(names: Iterable[str]) -> None:
    """Refuse ``GRADAUDIT_...`` variables that set nothing: whoever set one believes that it does.

    Raises:
        SettingsError: the text names the variable and the nearest.
    """
    known = [*(f"GRADAUDIT_{name.upper()}" for name in names), *_OTHER_VARIABLES]
    for variable in sorted(os.environ):
        upper = variable.upper()
        if upper.startswith("GRADAUDIT_") and upper.partition("__")[0] not in known:
            raise SettingsError(f"there is no setting {variable}{suggest(upper, known)}")


def _place(location: tuple[int | str, ...], origins: Mapping[str, str]) -> str:
    name = str(location[0]) if location else ""
    where = origins.get(name, f"GRADAUDIT_{name.upper()}")
    variable = where.startswith("GRADAUDIT_")
    return where if variable and len(location) == 1 else f"{where}: {'.'.join(str(part) for part in location)}"


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
