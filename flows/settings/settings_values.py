"""Settings of models by glob, typed values of audit settings, and where a setting comes from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from audits.errors import SettingsError
from audits.settings import AuditSettings


class ModelSettings(BaseModel):
    """Settings of the models whose names match a glob."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = Field(min_length=1, description="glob of registered models' names")
    audit: dict[str, Any] = Field(default_factory=dict, description="audits.AuditSettings")
    severity: dict[str, str] = Field(default_factory=dict, description="check or glob -> fail or warn")


@dataclass(frozen=True)
class Origin:
    """One setting's value in force and where it comes from."""

    name: str
    value: Any
    where: str
    text: str = ""


def inner(values: Mapping[str, Any]) -> list[str]:
    """The entries of the settings that are tables: ``audit.seed``."""
    return [f"{name}.{key}" for name, table in values.items() if isinstance(table, dict) for key in table]


def typed(values: Mapping[str, Any]) -> AuditSettings:
    """Audit settings of values as TOML, JSON or a variable writes them.

    Raises:
        SettingsError: an unknown name, or a value of another type.
    """
    taken = {}
    for name, value in values.items():
        try:
            taken[name] = _adapters()[name].validate_python(value) if name in _adapters() else value
        except ValidationError as error:
            raise SettingsError(f"{name}: {error.errors()[0]['msg']}") from error
    return AuditSettings.from_mapping(taken)


@functools.cache
def _adapters() -> dict[str, TypeAdapter[Any]]:
    return {name: TypeAdapter(hint) for name, hint in get_type_hints(AuditSettings).items()}
