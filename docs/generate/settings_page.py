"""docs/reference/settings.md: every setting there is."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, SecretStr

from audits.settings import AuditSettings
from docs.generate.markdown import attributes, code, default_of, plain, sentence, table
from flows.settings import environment
from flows.settings.environment import GradauditSettings
from flows.settings.settings_values import ModelSettings


def settings_page() -> str:
    """Return every setting: the tool's own, those of each audit, those by model, and what else is read or set."""
    own = [
        (
            code(f"GRADAUDIT_{name.upper()}"),
            sentence(known.description or ""),
            _own_default(known),
            _kind(known),
        )
        for name, known in GradauditSettings.model_fields.items()
    ]
    told = attributes(AuditSettings)
    audit = [
        (
            code(known.name),
            told[known.name],
            default_of(_factory(known)),
            plain(_type(typing.get_type_hints(AuditSettings)[known.name])),
        )
        for known in dataclasses.fields(AuditSettings)
    ]
    models = [
        (
            code(name),
            sentence(known.description or ""),
            "" if known.is_required() else default_of(known.get_default(call_default_factory=True)),
        )
        for name, known in ModelSettings.model_fields.items()
    ]
    others = [(code(name), sentence(text)) for name, text in _OTHERS.items()]
    preset = [
        (code(name), code(value))
        for name, value in {**environment._MLFLOW_DEFAULTS, **environment._PREFECT_DEFAULTS}.items()
    ]
    assert set(environment._OTHER_VARIABLES) <= set(_OTHERS)
    return f"""
# Settings

[How to configure](../how_to/configure.md) says where settings are written and which of two wins.
`gradaudit settings` prints what is in force and where each value comes from.

## The tool

Each is a variable of the environment. In `gradaudit.toml` it has the name without `GRADAUDIT_`, in small letters.

{table(("setting", "meaning", "default", "value"), own)}

## Of each audit

The fields of `audits.AuditSettings`. Write them in `audit = {{...}}` of `gradaudit.toml`, in `GRADAUDIT_AUDIT` as
JSON, or one at a time as `GRADAUDIT_AUDIT__NAME`.

{table(("setting", "meaning", "default", "value"), audit)}

## Of some models

The entries of one `[[models]]` table of `gradaudit.toml`. Where several match, the last wins.

{table(("entry", "meaning", "default"), models)}

## Other variables that are read

{table(("variable", "meaning"), others)}

## Variables that gradaudit sets unless you have

{table(("variable", "value"), preset)}
"""


_OTHERS = {
    "GRADAUDIT_CONFIG": "path of the settings file; `gradaudit.toml` in the working directory otherwise",
    "GRADAUDIT_LOG_LEVEL": "how much the log on stderr says: DEBUG, INFO, WARNING or ERROR; WARNING otherwise",
    "MLFLOW_TRACKING_URI": "MLflow's server or store, where GRADAUDIT_TRACKING_URI says none; `mlflow.db` in the "
    "working directory otherwise",
    "PREFECT_API_URL": "the Prefect server that `gradaudit setup`, `webhook` and `watch` use",
    "CUDA_VISIBLE_DEVICES": "which GPUs a process sees",
}


def _factory(known: dataclasses.Field[Any]) -> object:
    return known.default_factory() if known.default_factory is not dataclasses.MISSING else known.default


def _own_default(known: Any) -> str:
    """The default of one of the tool's settings; a secret has none to show."""
    return "none" if known.annotation is SecretStr else default_of(known.get_default(call_default_factory=True))


def _kind(known: Any) -> str:
    limits = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    found = [f"{words} {getattr(m, key):g}" for m in known.metadata for key, words in limits.items() if hasattr(m, key)]
    return ", ".join([_type(known.annotation), *found])


def _type(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is SecretStr:
        return "secret text"
    if origin is typing.Literal:
        return ", ".join(str(value) for value in inner)
    if inner and type(None) in inner:
        return _type(next(one for one in inner if one is not type(None)))
    if origin is tuple:
        return "list of tables" if isinstance(inner[0], type) and issubclass(inner[0], BaseModel) else "list of texts"
    if origin is not None and issubclass(origin, Mapping):
        return "table"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[hint]
