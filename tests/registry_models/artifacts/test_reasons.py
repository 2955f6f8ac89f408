"""Why a version cannot be audited: by its own place, with the cure, and nothing unregistered is marked."""

from __future__ import annotations

import shutil
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits.errors import ArtifactError
from audits.report import AuditReport
from flows.choosing.due import plan_night, without_result
from flows.one_audit.one_version import Target, audit_version
from flows.settings.environment import GradauditSettings
from registry_models import log_model
from registry_models.artifacts.flavours import OutsideError
from registry_models.registry.versions import FAILED, PENDING, VersionReference, list_versions, registered
from tests.registry_models.registry.test_versions import fetch
from tests.stores import register_linear


def place_of(client: MlflowClient, name: str) -> Path:
    return Path(unquote(urlparse(client.get_model_version_download_uri(name, "1")).path))


def set_status(client: MlflowClient, name: str, status: str, message: str = "") -> None:
    """As a registry does that copies files before a version is ready."""
    with sqlite3.connect(client.tracking_uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE model_versions SET status=?, status_message=? WHERE name=?", (status, message, name))


@pytest.fixture
def settings(client: MlflowClient, tmp_path: Path) -> GradauditSettings:
    return GradauditSettings.load(tracking_uri=client.tracking_uri, results=str(tmp_path / "results"), device="cpu")


@pytest.fixture
def audited(client: MlflowClient, settings: GradauditSettings) -> Callable[[str], AuditReport]:
    def audit(name: str) -> AuditReport:
        return audit_version(Target(VersionReference(name, 1).resolve(client), "t"), client, settings, write=False)

    return audit


def test_missing_files_are_named_by_the_users_place(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("gone")
    place = place_of(client, "gone")
    shutil.rmtree(place)
    with pytest.raises(ArtifactError, match=f"there is nothing at .*{place}, where the files of gone v1 should be"):
        fetch(client, "models:/gone/1", tmp_path / "a")
    place.mkdir()
    torch.save(nn.Linear(2, 1).state_dict(), place / "state_dict.pth")
    with pytest.raises(ArtifactError, match=r"weights alone \(state_dict\.pth, .*factory="):
        fetch(client, "models:/gone/1", tmp_path / "b")
    (place / "state_dict.pth").rename(place / "notes.txt")
    with pytest.raises(ArtifactError, match=f"at .*{place} there is no MLmodel file"):
        fetch(client, "models:/gone/1", tmp_path / "c")


@pytest.mark.end_to_end
def test_a_missing_model_file_is_no_unknown_kind(client: MlflowClient, audited: Callable[[str], AuditReport]) -> None:
    register_linear("cut", pickled=True)
    (model,) = place_of(client, "cut").rglob("model.pth")
    torch.save(nn.Linear(2, 1).state_dict(), model)
    assert "holds weights alone (a state dict)" in audited("cut").headline
    model.unlink()
    assert "data/model.pth, the model itself, is not among the version's files" in audited("cut").headline


class Needy(nn.Module):
    """Needs a package that is not there when it is unpickled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 1)

    def __reduce__(self) -> tuple[object, ...]:
        return __import__, ("a_package_nobody_has.inside",)


@pytest.mark.end_to_end
def test_a_missing_package_is_to_be_installed(client: MlflowClient, audited: Callable[[str], AuditReport]) -> None:
    register_linear("needy", pickled=True)
    (model,) = place_of(client, "needy").rglob("model.pth")
    torch.save(Needy(), model)
    assert "install 'a_package_nobody_has' where audits run" in audited("needy").headline


@pytest.mark.end_to_end
def test_nothing_trainable_is_said(client: MlflowClient, audited: Callable[[str], AuditReport]) -> None:
    mlflow.set_experiment("models")
    frozen = nn.Linear(2, 1).requires_grad_(False)
    log_model(frozen, "frozen", input_example=torch.ones(1, 2).numpy())
    with pytest.raises(OutsideError, match=r"frozen v1 is outside the audit: .* no trainable parameter") as told:
        audited("frozen")
    assert "input_example" not in str(told.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.log_model(  # by MLflow's own call nothing beside the weights says so
            frozen, name="m", registered_model_name="plain", serialization_format="pickle", pip_requirements=["torch"]
        )
    with pytest.raises(OutsideError, match=r"plain v1 is outside the audit: .* no trainable parameter"):
        audited("plain")


@pytest.mark.end_to_end
def test_cures_hold_the_versions_own_name(client: MlflowClient, audited: Callable[[str], AuditReport]) -> None:
    register_linear("my net", pickled=True, with_recipe=False)
    headline = audited("my net").headline
    assert "registry_models.attach_recipe('models:/my net/1', recipe)" in headline
    assert "registry_models.log_model(model, 'my net', recipe=" in headline
    assert "NAME" not in headline


@pytest.mark.end_to_end
def test_a_limit_names_its_setting(client: MlflowClient, settings: GradauditSettings) -> None:
    register_linear("big")
    version = VersionReference("big", 1).resolve(client)
    small = settings.model_copy(update={"memory_limit": 0.05, "attempts": 1})
    report = audit_version(Target(version, "t"), client, small, write=False)
    assert "GRADAUDIT_MEMORY_LIMIT" in report.headline


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (PENDING, r"m v1 is still being registered \(copying\)"),
        (FAILED, r"the registration of m v1 failed \(copying\)"),
    ],
)
def test_what_is_not_registered_is_passed_over(
    client: MlflowClient, settings: GradauditSettings, status: str, words: str
) -> None:
    register_linear("m")
    register_linear("ready")
    set_status(client, "m", status, "copying")
    with pytest.raises(ArtifactError, match=words):
        registered(VersionReference("m", 1).resolve(client), client, seconds=0.1)
    plan = plan_night(client, settings, force=True)
    assert [due.version.name for due in plan.due] == ["ready"]
    (sentence,) = plan.unready
    assert sentence.startswith(("m v1 is still", "the registration of m v1 failed"))
    assert [version.name for version, _ in without_result(list_versions(client), settings)] == ["ready"]
    set_status(client, "m", "READY")
    assert registered(VersionReference("m", 1).resolve(client), client).unready == ""
    assert {due.version.name for due in plan_night(client, settings).due} == {"m", "ready"}


@pytest.mark.parametrize("number", ["0", "2147483648", "9" * 40])
def test_an_impossible_number_is_no_such_version(client: MlflowClient, number: str) -> None:
    register_linear("m")
    with pytest.raises(ArtifactError, match=f"models:/m/{number}: there is no such version; it has versions 1"):
        VersionReference.parse(f"models:/m/{number}").resolve(client)
