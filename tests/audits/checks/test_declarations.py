"""What a check is, is declared once: its text, its thresholds in force, its family, the settings that change it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from audits.causes import Cause
from audits.checks import CHECKS
from audits.checks.check import Threshold
from audits.checks.update import L2, MAX
from audits.outcomes import Family
from audits.settings import AuditSettings
from audits.updates.compare import THRESHOLDS
from flows.cli.main import app

DEFAULTS = {field.name: field.default for field in dataclasses.fields(AuditSettings)}


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda check: check.name)
def test_a_check_says_all_that_a_reader_needs(check) -> None:
    assert check.claim.endswith(".")
    assert check.threshold()
    assert check.where_to_look
    assert check.family is Family(check.name.partition(".")[0])
    assert all(one.source or one.setting or one.of for one in check.thresholds)


@pytest.mark.parametrize(
    "one",
    [t for check in CHECKS.values() for t in check.thresholds if t.setting],
    ids=lambda one: one.setting,
)
def test_a_threshold_that_a_setting_changes_is_the_settings_default(one: Threshold) -> None:
    assert DEFAULTS[one.setting] == one.value
    changed = AuditSettings(**{one.setting: one.value * 3})
    assert one.in_force(changed) == one.value * 3
    assert one.text(changed) != one.text()


def test_the_judge_reads_the_declared_numbers() -> None:
    assert THRESHOLDS[torch.float32] == (L2.value, MAX.value)


def test_explain_shows_the_threshold_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADAUDIT_AUDIT", '{"exploding_norm": 12.5}')
    found = json.loads(CliRunner().invoke(app, ["explain", "health.exploding", "--json"]).stdout)
    assert [one["value"] for one in found["thresholds"] if one["setting"] == "exploding_norm"] == [12.5]
    assert "12.5 (norm)" in found["threshold"]
    text = CliRunner().invoke(app, ["explain", "health.exploding"]).stdout
    assert "12.5" in text
    assert "70" not in text


@pytest.mark.parametrize("cause", Cause, ids=str)
def test_a_cause_reads_as_it_was_written(cause: Cause) -> None:
    assert Cause.read(str(cause)) == (cause, "")
    assert Cause.read(cause.at("Scaled in Block (blocks.0)")) == (cause, "Scaled in Block (blocks.0)")


def test_a_text_of_one_case_is_no_cause() -> None:
    assert Cause.read("it is explained by the rule without momentum") == (
        None,
        "it is explained by the rule without momentum",
    )
    assert Cause.read(None) == (None, "")
