"""Hostile artifacts: refused by what the parent reads, or harmless in the child; nothing of them reaches anything."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import mlflow.pytorch
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits.errors import ArtifactError, InputError
from audits.outcomes import Outcome
from audits.report import AuditReport
from audits.settings import AuditSettings
from flows.one_audit.one_snapshot import audit_snapshot
from flows.one_audit.one_version import Target, audit_directory, audit_version, fresh_occasion
from flows.sandbox import Level
from flows.sandbox.artifact import rewritten, shown
from flows.settings.environment import GradauditSettings
from registry_models.artifacts.archives import refuse_expanding
from registry_models.artifacts.snapshot import read_snapshot
from registry_models.recipes.recipe_files import load_yaml
from registry_models.registry.versions import RECIPE_TAG, list_versions
from registry_models.report.rendering import render_html
from tests.hostile.artifacts import Payload, model_directory, solved, zip_bomb
from tests.hostile.conftest import need
from tests.hostile.witnesses import Witnesses, attack_source
from tests.stores import register_linear

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def settings(level: str, **more: object) -> GradauditSettings:
    return GradauditSettings.load(isolation=level, device="cpu", **more)


def audited(model: Path, work: Path, level: str) -> AuditReport:
    work.mkdir()
    return audit_snapshot(read_snapshot(model), work, settings(level), AuditSettings())


def touches(canary: Path) -> str:
    return f"open({str(canary)!r}, 'a').write('# attacked')\n"


def test_a_nosy_pickle_is_audited_in_bubblewrap_and_touches_nothing(
    witnesses: Witnesses, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need(Level.BUBBLEWRAP)
    caplog.set_level("DEBUG", "flows.one_audit.one_snapshot")
    model, work = tmp_path / "model", tmp_path / "work"
    targets = witnesses.targets(snapshot=model)
    model_directory(model, Payload(attack_source("nosy", targets)))
    report = audited(model, work, "bubblewrap")
    assert report.outcome is Outcome.PASS, report.headline
    printed = next(r.getMessage() for r in caplog.records if "printed" in r.getMessage())
    found, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])
    assert not any(found.values()), found
    assert witnesses.findings(work, texts=(json.dumps(report.to_dict()),)) == set()
    assert not rewritten(read_snapshot(model))


def test_control_the_same_pickle_in_a_plain_process_gets_out_and_its_rewriting_is_noticed(
    witnesses: Witnesses, tmp_path: Path
) -> None:
    model, work = tmp_path / "model", tmp_path / "work"
    targets = witnesses.targets(snapshot=model)
    model_directory(model, Payload(attack_source("nosy", targets)))
    report = audited(model, work, "process")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "rewrote its own files" in report.headline
    assert witnesses.findings() == {"connection", "outside"}


def test_code_that_shadows_a_library_is_refused_before_it_runs(witnesses: Witnesses, tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model", solved())
    (model / "code" / "torch.py").write_text(touches(witnesses.outside / "canary"))
    report = audited(model, tmp_path / "work", "process")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "would replace the library 'torch'" in report.headline
    assert witnesses.findings() == set(), "at the weakest level: it was not run at all"
    control = f"import sys; sys.path.insert(0, {str(model / 'code')!r}); import torch"
    subprocess.run([sys.executable, "-c", control], check=True)
    assert witnesses.findings() == {"outside"}


def test_the_module_that_pickle_module_info_names_is_not_imported(
    witnesses: Witnesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's loader imports it; ours does not read that file."""
    model = model_directory(tmp_path / "model", solved())
    (model / "data" / "pickle_module_info.txt").write_text("named_by_the_model")
    (model / "code" / "named_by_the_model.py").write_text(touches(witnesses.outside / "canary"))
    report = audited(model, tmp_path / "work", "process")
    assert report.outcome is Outcome.PASS, report.headline
    assert witnesses.findings() == set()
    monkeypatch.setattr(sys, "path", [*sys.path])
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        mlflow.pytorch.load_model(str(model))
    assert witnesses.findings() == {"outside"}


def test_names_with_markup_and_escapes_are_shown_as_text(tmp_path: Path) -> None:
    module = solved()
    evil = "<img src=x onerror=alert(1)>\x1b]0;owned\x07\u202e"
    module.register_parameter(evil, nn.Parameter(torch.ones(1)))
    module.train()
    report = audited(model_directory(tmp_path / "model", module), tmp_path / "work", "auto")
    texts = [report.headline, *(f"{row.parameter} {row.message}" for row in report.rows)]
    assert any("<img" in text for text in texts), "the name is in the report"
    assert not any(character in "".join(texts) for character in "\x1b\x07\u202e")
    page = render_html(report, rerun="gradaudit audit")
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


@pytest.mark.parametrize("code", ["../..", "/etc", "code/../../outside"])
def test_a_code_path_that_leaves_the_model_is_refused(tmp_path: Path, code: str) -> None:
    mlmodel = f"flavors:\n  pytorch:\n    model_data: data\n    code: {code}\n"
    model = model_directory(tmp_path / "model", solved(), mlmodel=mlmodel)
    with pytest.raises(ArtifactError, match="leaves the model's folder"):
        audit_directory(model, settings("process"))


@pytest.mark.parametrize("place", ["data/link", "code/link", "extra_files/audit/link"])
def test_symbolic_links_are_refused(witnesses: Witnesses, tmp_path: Path, place: str) -> None:
    model = model_directory(tmp_path / "model", solved())
    (model / place).symlink_to(witnesses.home / ".aws" / "credentials")
    with pytest.raises(ArtifactError, match="symbolic link"):
        audit_directory(model, settings("process"))


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:{port}/recipe", "file:///etc", "runs:/../../etc", "models:/m/../../..", "s3://bucket/x"]
)
def test_a_recipe_tag_fetches_nothing_from_elsewhere(
    client: MlflowClient, witnesses: Witnesses, tmp_path: Path, uri: str
) -> None:
    register_linear("m", with_recipe=False)
    port = witnesses.listeners[0].getsockname()[1]
    client.set_model_version_tag("m", "1", RECIPE_TAG, uri.format(port=port))
    target = Target(list_versions(client)[0], fresh_occasion())
    report = audit_version(target, client, settings("process", results=str(tmp_path / "results")), write=False)
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "of the same server only" in report.headline
    assert witnesses.findings() == set()


def test_of_a_recipe_folder_only_the_recipe_is_shown(witnesses: Witnesses, tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model", solved())
    project = tmp_path / "project"
    (model / "extra_files" / "audit").rename(project)
    (project / ".env").write_text(witnesses.secret)
    (project / "link.yaml").symlink_to(witnesses.home / ".aws" / "credentials")
    names = {path.name for path in shown(read_snapshot(model, overlay=project))}
    assert names == {"model", "recipe.yaml", "batch.safetensors"}


BOMBS = {
    "laughs": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "\n".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]" for i in range(1, 12)),
    "merge keys": "a: &a {x: 1}\nb: {<<: *a}\n",
    "object tag": "!!python/object/apply:os.system ['echo attacked > CANARY']\n",
    "object tag inside": "flavors: {pytorch: !!python/name:os.system }\n",
    "large": "x: " + "y" * (33 << 20),
    "binary": "\x00\x01\x02",
}


@pytest.mark.parametrize("bomb", list(BOMBS))
def test_yaml_neither_expands_nor_builds_objects(witnesses: Witnesses, tmp_path: Path, bomb: str) -> None:
    model = model_directory(tmp_path / "model", solved())
    text = BOMBS[bomb].replace("CANARY", str(witnesses.outside / "canary"))
    for name, aliases in (("MLmodel", True), ("extra_files/audit/recipe.yaml", False)):
        (model / name).write_text(text)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        if aliases and bomb == "laughs":
            load_yaml(model / name, aliases=True)  # shared, not copied: MLmodel files of others use aliases
        else:
            with pytest.raises(InputError):
                load_yaml(model / name, aliases=aliases)
        with pytest.raises(InputError):
            audit_directory(model, settings("process"))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
        assert time.monotonic() - began < 5
    assert witnesses.findings() == set()


@pytest.mark.end_to_end
def test_deeply_nested_yaml_does_not_crash_the_parent(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("a: " + "[" * 20_000 + "]" * 20_000)
    source = "import sys; from pathlib import Path; from registry_models.recipes.recipe_files import load_yaml\n"
    source += "try: load_yaml(Path(sys.argv[1]))\nexcept ValueError: print('refused')"
    command = [sys.executable, "-c", source, str(tmp_path / "MLmodel")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "refused", done.returncode


@pytest.mark.slow
def test_a_zip_bomb_is_refused_from_its_description(tmp_path: Path) -> None:
    zip_bomb(tmp_path / "model.pt2", mebibytes=512)
    assert (tmp_path / "model.pt2").stat().st_size < 2 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match="would expand"):
        refuse_expanding(tmp_path / "model.pt2")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.end_to_end
def test_a_zip_bomb_in_a_pt2_is_inconclusive(tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model", solved())
    (model / "data" / "model.pth").unlink()
    zip_bomb(model / "data" / "model.pt2", mebibytes=512)
    report = audited(model, tmp_path / "work", "auto")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "expand" in report.headline, report.headline
