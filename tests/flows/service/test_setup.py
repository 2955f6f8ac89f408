"""Deployments, pools and automations on a real, empty Prefect server."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from audits.errors import SettingsError
from flows.service.setup import QUEUES, SetupOptions, deployments_file, set_up, shipped_file

DEPLOYMENTS = {"nightly-audit/nightly", "audit-versions/nightly", "audit-versions/on-registration"}


def test_every_deployment_fits_its_flow() -> None:
    names = set()
    for deployment in yaml.safe_load(shipped_file().read_text())["deployments"]:
        module, _, function = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), function)
        names.add(f"{flow.name}/{deployment['name']}")
        assert deployment["enforce_parameter_schema"] is True
        assert deployment["work_pool"]["work_queue_name"] in QUEUES[deployment["work_pool"]["name"]]
        asked = [deployment.get("parameters") or {}, *(t["parameters"] for t in deployment.get("triggers") or ())]
        for parameters in asked:
            assert set(parameters) <= set(flow.parameters.properties)
    assert names == DEPLOYMENTS


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cron": "every night"}, "--cron / --timezone: 'every night'"),
        ({"timezone": "Mars/Olympus"}, "'Mars/Olympus'"),
        ({"file": Path("/nowhere/prefect.yaml")}, "--file: /nowhere/prefect.yaml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        deployments_file(SetupOptions(**options))


def test_no_server_is_refused_with_the_cure() -> None:
    with pytest.raises(SettingsError, match=r"PREFECT_API_URL.*gradaudit up"):
        set_up(SetupOptions())
