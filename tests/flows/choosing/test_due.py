"""What a night audits: what owners changed at once, a changed environment by sample, the rest in its turn."""

from __future__ import annotations

import datetime
from importlib import metadata
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from audits.results.committed import CommittedAudits
from audits.results.compaction import compact
from audits.results.store import ResultsStore
from flows.choosing.due import Plan, Reason, plan_night, without_result
from flows.choosing.due_keys import FRAMEWORKS, environment
from flows.choosing.night_summary import summarise_night
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import RECIPE_TAG, Version, list_versions
from tests.flows.choosing.committing import commit

ELSEWHERE = "gradaudit 0.0.9, torch 2.9.0, device auto"


@pytest.fixture
def settings(tmp_path: Path) -> GradauditSettings:
    return GradauditSettings.load(results=str(tmp_path / "results"))


def registered(client: MlflowClient, models: int, versions: int = 1) -> list[Version]:
    for index in range(models):
        client.create_registered_model(f"m{index}")
        for _ in range(versions):
            client.create_model_version(f"m{index}", source="file:///nowhere/1")
    return sorted(list_versions(client), key=lambda v: (v.name, v.version))


def chosen(plan: Plan, reason: Reason) -> list[str]:
    return [due.version.label for due in plan.due if due.reason is reason]


@pytest.mark.slow
def test_unchanged_versions_take_turns_the_longest_unseen_first(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    versions = registered(client, 14)
    for age, version in enumerate(versions):
        commit(tmp_path, version, settings, days_ago=20 - age)
    plan = plan_night(client, settings)
    assert chosen(plan, Reason.ROTATION) == ["m0 v1", "m1 v1"], "a seventh each night, in seven nights all"
    assert len(plan.due) == 2
    assert plan.looked_at == 14
    commit(tmp_path, versions[0], settings)
    assert chosen(plan_night(client, settings), Reason.ROTATION) == ["m1 v1"], "a second sweep ends the night's share"
    commit(tmp_path, versions[1], settings)
    assert plan_night(client, settings).due == ()
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    turn = chosen(plan_night(client, settings, now=tomorrow), Reason.ROTATION)
    assert len(turn) == 2
    assert not {"m0 v1", "m1 v1"} & set(turn)
    assert plan_night(client, settings.model_copy(update={"rotation_days": 0.0}), now=tomorrow).due == ()


@pytest.mark.slow
def test_every_version_has_its_turn_within_the_days(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    versions = {v.label: v for v in registered(client, 10)}
    for version in versions.values():
        commit(tmp_path, version, settings, days_ago=10)
    seen: list[str] = []
    for night in range(-9, -2):
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=night)
        for due in plan_night(client, settings, now=now).due:
            seen.append(due.version.label)
            commit(tmp_path, due.version, settings, days_ago=-night)
    assert set(seen) == set(versions)


@pytest.mark.slow
def test_a_new_environment_is_no_storm(client: MlflowClient, settings: GradauditSettings, tmp_path: Path) -> None:
    versions = registered(client, 6, versions=5)
    for version in versions:
        kind = "exported" if version.name == "m0" else "eager"
        commit(tmp_path, version, settings, days_ago=3, ran_in=ELSEWHERE, kind=kind)
    plan = plan_night(client, settings)
    sample = chosen(plan, Reason.SAMPLE)
    assert sorted(sample) == [f"m{index} v5" for index in range(6)], "the newest of every kind and model"
    assert "m0 v5" in sample[:2], "kinds take turns"
    assert len(chosen(plan, Reason.ROTATION)) == 5, "a seventh of 30, beside the sample"
    assert chosen(plan, Reason.CHANGED) == []
    assert plan.outdated == 30
    assert without_result(list_versions(client), settings) == [], "nothing that an owner changed"
    for due in plan.due:
        commit(tmp_path, due.version, settings, kind="exported" if due.version.name == "m0" else "eager")
    client.set_model_version_tag("m3", "2", RECIPE_TAG, "runs:/1/audit")
    second = plan_night(client, settings)
    assert chosen(second, Reason.CHANGED) == ["m3 v2"]
    assert chosen(second, Reason.SAMPLE) == [], "every kind and model has been seen"
    assert second.outdated == 18


def test_a_gpu_worker_s_driver_is_not_held_against_a_night_planned_without_one(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    from flows.choosing.due_keys import environment

    (version,) = registered(client, 1)
    commit(tmp_path, version, settings, ran_in=f"{environment(settings)}, driver 550.54")
    assert plan_night(client, settings).outdated == 0


def test_rotation_keeps_to_the_night_s_hours(client: MlflowClient, settings: GradauditSettings, tmp_path: Path) -> None:
    for version in registered(client, 5):
        commit(tmp_path, version, settings, days_ago=9, seconds=1795.0)
    hours = settings.model_copy(update={"rotation_days": 1.0, "rotation_hours": 1.0})
    assert len(plan_night(client, hours).due) == 2, "half an hour each"
    tight = hours.model_copy(update={"rotation_hours": 0.1})
    assert len(plan_night(client, tight).due) == 1, "one at least: a fleet never stands still"
    client.create_model_version("m0", source="file:///nowhere/2")
    assert chosen(plan_night(client, tight), Reason.CHANGED) == ["m0 v2"], "what is new has no budget"


def test_a_night_tells_new_failures_from_old_ones(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    versions = {v.label: v for v in registered(client, 3, versions=2)}
    before = {"m0 v1": "fail", "m0 v2": "pass", "m1 v1": "fail", "m2 v1": "fail"}
    tonight = {"m0 v1": "fail", "m0 v2": "fail", "m1 v1": "pass", "m1 v2": "fail", "m2 v2": "pass"}
    for label, outcome in before.items():
        commit(tmp_path, versions[label], settings, days_ago=1, outcome=outcome)
    plan = plan_night(client, settings, force=True)
    for label, outcome in tonight.items():
        # one ended before the night was planned, and was committed after
        commit(tmp_path, versions[label], settings, outcome=outcome, days_ago=1e-4 if label == "m1 v1" else 0.0)
    committed = CommittedAudits(ResultsStore(settings.results))
    night = summarise_night(plan, committed, settings, troubles=["the disk is full"])
    assert [f"{s['model']} v{s['version']}" for s in night.newly_failed] == ["m0 v2", "m1 v2"]
    assert [f"{s['model']} v{s['version']}" for s in night.fixed] == ["m1 v1", "m2 v2"], "or since the version before"
    assert night.not_audited == ("models:/m2/1",)
    text = night.markdown()
    assert "5 of 6 versions audited: 3 fail, 2 pass; 2 newly failed; 2 fixed; 1 could not be audited" in text
    assert "the disk is full" in text
    assert night.metrics["night.newly_failed"] == 2


def test_the_index_of_audits_survives_compaction_and_rewriting(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    versions = registered(client, 3)
    committed = CommittedAudits(ResultsStore(settings.results))
    assert committed.refresh().latest() == []
    for days in (5, 4, 3, 2):
        for version in versions:
            commit(tmp_path, version, settings, days_ago=days, occasion=f"{days} days ago")
    assert [audit.occasion for audit in committed.refresh().of("m1", 1)] == [f"{d} days ago" for d in (4, 3, 2)]
    known = committed.of("m1", 1)
    assert compact(ResultsStore(settings.results), before=datetime.datetime.now(datetime.UTC).date()) > 0
    assert committed.refresh().of("m1", 1) == known
    commit(tmp_path, versions[1], settings, occasion="now")
    assert committed.refresh().of("m1", 1)[-1].occasion == "now"
    assert len(committed.latest()) == 3


def test_the_installed_frameworks_belong_to_the_environment(settings: GradauditSettings) -> None:
    said = environment(settings)
    for name in FRAMEWORKS:
        try:
            assert f", {name} {metadata.version(name)}," in said
        except metadata.PackageNotFoundError:
            assert f" {name} " not in said
