"""``gradaudit attest``, ``verify`` and ``gate --require-attestation``: the valid one is believed, and no other."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from registry_models.artifacts.snapshot import download_version
from registry_models.attestation.kept import FILE
from registry_models.attestation.signing import sign
from registry_models.registry.versions import RECIPE_TAG, VersionReference
from tests.flows.cli.test_audit_command import gradaudit
from tests.flows.cli.test_gate import register_wrong
from tests.flows.cli.test_levels import gradaudit as at_level
from tests.registry_models.attestation.keys import make_keys
from tests.stores import register_linear


@pytest.fixture
def run(client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    return lambda *arguments: gradaudit(*map(str, arguments), monkeypatch=monkeypatch, tmp_path=tmp_path)


def files_of(client: MlflowClient, name: str, folder: Path) -> Path:
    folder.mkdir()
    return download_version(VersionReference(name, 1).resolve(client), client, folder).folder


def put(envelope: dict[str, Any], client: MlflowClient, name: str, folder: Path) -> None:
    """Put an envelope where a version's own is, as somebody could who may write to the registry and has no key."""
    (folder / FILE).write_text(json.dumps(envelope))
    client.log_artifact(client.get_model_version(name, "1").tags["audit.run_id"], str(folder / FILE))


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_verdict_is_attested_and_verified_and_others_are_refused(  # type: ignore[no-untyped-def]
    run, client: MlflowClient, tmp_path: Path, capsys
) -> None:
    (private, public), (thief, other) = make_keys(tmp_path / "ours"), make_keys(tmp_path / "theirs")
    for name in ("right", "copied"):
        register_linear(name)
    assert run("attest", "models:/right/1", "--key", private) == 2
    assert "has no audit as it is now and in this environment" in capsys.readouterr().err
    for name in ("right", "copied"):
        assert run("gate", f"models:/{name}/1") == 0
    assert run("gate", "models:/right/1", "--require-attestation", "--key", public) == 2
    none = "right v1 has no attestation: `gradaudit attest models:/right/1 --key KEY` makes one"
    assert none in capsys.readouterr().err
    file = tmp_path / "right.json"
    assert run("attest", "models:/right/1", "--key", private, "--expires", "30d", "--out", file) == 0
    assert capsys.readouterr().out.startswith("attested: right v1 is pass by audit ")
    run_id = client.get_model_version("right", "1").tags["audit.run_id"]
    assert FILE in {artifact.path for artifact in client.list_artifacts(run_id)}
    said = json.loads(base64.b64decode(json.loads(file.read_text())["payload"]))
    predicate = said["predicate"]
    assert (predicate["outcome"], predicate["coverage"], predicate["runId"]) == ("pass", 1.0, run_id)
    assert predicate["checks"]["update.rule"] == "pass"
    assert "torch" in predicate["environment"]["description"]
    assert predicate["recipe"]["digest"]

    # Of the registry: valid, and the gate believes it.
    assert run("verify", "models:/right/1", "--key", public) == 0
    assert capsys.readouterr().out.startswith("✓ pass: models:/right/1, audit ")
    assert run("gate", "models:/right/1", "--require-attestation", "--key", public, "--max-age", "1h") == 0
    assert "attested by key" in capsys.readouterr().out

    # Of a directory, offline, at the light level with the extra `attest`; MLflow's own file beside them does not count.
    files = files_of(client, "right", tmp_path / "downloaded")
    offline = ("verify", str(files), "--key", str(public), "--envelope", str(file))
    assert at_level("attest", tmp_path, *offline).returncode == 0
    (files / "registered_model_meta").write_text("model_name: right\n")
    assert run(*offline) == 0
    capsys.readouterr()

    # Expired, foreign, forged, another key: each by its own exit code and sentence, and none gets through the gate.
    assert run(*offline, "--max-age", "0m") == 6
    assert "it is too old: the audit is of " in capsys.readouterr().out
    (files / "MLmodel").write_text((files / "MLmodel").read_text() + "\n")
    assert run(*offline) == 5
    assert "it is about other files: about models:/right/1" in capsys.readouterr().out
    assert run("verify", "models:/copied/1", "--key", public, "--envelope", file) == 5
    assert run("verify", "models:/right/1", "--key", other) == 4
    assert "it is signed by another key" in capsys.readouterr().out
    good = json.loads(file.read_text())
    forged = {**good, "payload": base64.b64encode(json.dumps(said | {"extra": 1}).encode()).decode()}
    stolen = sign(base64.b64decode(good["payload"]), thief)
    ended = sign(json.dumps(said | {"predicate": predicate | {"expires": "2020-01-01T00:00:00Z"}}).encode(), private)
    for envelope, name, code, told in (
        (forged, "right", 3, "its signature is wrong"),
        (stolen, "right", 4, "it is signed by another key"),
        (good, "copied", 5, "it is about "),
        (ended, "right", 6, "it has expired: it was valid until 2020-01-01T00:00:00Z"),
        (sign(b"{}", private), "right", 7, "it is signed and is no statement about an audit"),
    ):
        put(envelope, client, name, tmp_path)
        assert run("verify", f"models:/{name}/1", "--key", public) == code
        assert f"✗ refused: the attestation of models:/{name}/1: {told}" in capsys.readouterr().out
        assert run("gate", f"models:/{name}/1", "--require-attestation", "--key", public) == 2
        assert f"? no verdict: {name} v1: its attestation is refused: {told}" in capsys.readouterr().out
    put(good, client, "right", tmp_path)
    assert run("gate", "models:/right/1", "--require-attestation", "--key", public) == 0

    # The same files, and another environment or recipe than the attested ones.
    capsys.readouterr()
    assert run("gate", "models:/right/1", "--require-attestation", "--key", public, "--device", "cpu") == 2
    assert "it is about another environment" in capsys.readouterr().out
    client.set_model_version_tag("right", "1", RECIPE_TAG, f"runs:/{run_id}/plots")
    assert run("gate", "models:/right/1", "--require-attestation", "--key", public) == 2
    client.delete_model_version_tag("right", "1", RECIPE_TAG)

    # Files that changed in their place since the audit: not attested, and the old attestation is foreign.
    _change(client, "right")
    capsys.readouterr()
    assert run("attest", "models:/right/1", "--key", private) == 2
    assert "the files of right v1 have changed since audit" in capsys.readouterr().err
    assert run("gate", "models:/right/1", "--require-attestation", "--key", public) == 2
    assert "it is about other files" in capsys.readouterr().out


def _change(client: MlflowClient, name: str) -> None:
    """Rewrite a file of a version in the artifact store."""
    source = client.get_model_version(name, "1").source
    if source.startswith("models:/m-"):
        source = client.get_logged_model(source.removeprefix("models:/")).artifact_location
    folder = Path(source.removeprefix("file://"))
    described = folder / "MLmodel"
    assert described.is_file(), source
    described.write_text(described.read_text() + "\n")


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_failed_audit_is_attested_as_failed(run, client: MlflowClient, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    private, public = make_keys(tmp_path / "keys", "ecdsa")
    register_wrong("wrong")
    assert run("gate", "models:/wrong/1") == 1
    assert run("attest", "models:/wrong/1", "--key", private) == 0
    capsys.readouterr()
    assert run("verify", "models:/wrong/1", "--key", public, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["valid"], told["exit_code"], told["predicate"]["outcome"]) == (True, 1, "fail")
    assert told["predicate"]["checks"]["registration.stale"] == "fail"
    assert run("gate", "models:/wrong/1", "--require-attestation", "--key", public) == 1
    assert "registration.stale" in capsys.readouterr().out


@pytest.mark.end_to_end
def test_what_cannot_be_is_said_before_any_work(run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    private, public = make_keys(tmp_path / "keys")
    folder = tmp_path / "model"
    folder.mkdir()
    for arguments, told in (
        (("gate", "models:/m/1", "--key", public), "--require-attestation and --key belong together"),
        (("gate", "models:/m/1", "--require-attestation"), "--require-attestation and --key belong together"),
        (("gate", "models:/m/1", "--require-attestation", "--key", private), "is a private key"),
        (("verify", folder, "--key", public), "give its file, --envelope FILE"),
        (("verify", "none", "--key", public, "--envelope", public), "is neither models:/NAME/VERSION"),
        (("verify", folder, "--key", public, "--envelope", public), "holds no signed envelope"),
        (("attest", "models:/m/1", "--key", private, "--expires", "soon"), "such as 30m, 12h or 7d"),
    ):
        assert run(*arguments) == 2
        assert told in capsys.readouterr().err


@pytest.mark.end_to_end
def test_verifying_without_the_library_names_the_extra(tmp_path: Path) -> None:
    _, public = make_keys(tmp_path / "keys")
    shutil.copy(public, tmp_path / "a.json")
    arguments = ("verify", str(tmp_path), "--key", str(public), "--envelope", "a.json")
    done = at_level("light", tmp_path, *arguments)
    assert done.returncode == 2
    assert "pip install 'gradaudit[attest]'" in done.stderr
    assert "holds no signed envelope" in at_level("attest", tmp_path, *arguments).stderr
