"""Ten versions in a real registry, three of them hostile: the sweep finishes and marks the other seven."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from mlflow.tracking import MlflowClient

from flows.one_audit.one_version import Target, audit_version
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import list_versions
from tests.hostile.artifacts import Payload
from tests.hostile.witnesses import Witnesses, attack_source
from tests.stores import register_linear

#: What each hostile version does, and the words that say so. Time is the processor's, so that a busy machine is none.
HOSTILE = {
    "m2 <img src=x onerror=alert(1)>": ("spin", "used up its CPU time"),
    "m5": ("greed", "its memory limit"),
    "m8": ("flood", "its output limit"),
}


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_sweep_survives_its_hostile_versions(client: MlflowClient, witnesses: Witnesses, tmp_path: Path) -> None:
    names = [next((name for name in HOSTILE if name.split()[0] == f"m{index}"), f"m{index}") for index in range(10)]
    for name in names:
        register_linear(name, pickled=True)
    for version in list_versions(client):
        if version.name in HOSTILE:
            replace_model(client, version.name, attack_source(HOSTILE[version.name][0], {}))
    settings = GradauditSettings.load(
        tracking_uri=client.tracking_uri, results=str(tmp_path / "results"), device="cpu",
        isolation="auto", cpu_limit=6.0, memory_limit=1.0, time_limit=120.0,
    )  # fmt: skip
    for version in list_versions(client):
        audit_version(Target(version, "night"), client, settings)
    for version in list_versions(client):
        tags = version.tags
        if version.name in HOSTILE:
            assert tags["audit.outcome"] == "inconclusive", version.name
            note = client.get_run(tags["audit.run_id"]).data.tags.get("mlflow.note.content", "")
            assert HOSTILE[version.name][1] in note, (version.name, note)
            assert "<img src=x" not in note
        else:
            assert tags["audit.outcome"] == "pass", (version.name, tags)
    assert witnesses.findings(tmp_path / "results") == set()


def replace_model(client: MlflowClient, name: str, source: str) -> None:
    """Put a hostile pickle where the registered model's is, as somebody with access to the storage could."""
    folder = Path(unquote(urlparse(client.get_model_version_download_uri(name, "1")).path))
    found = list((folder if folder.is_dir() else Path(folder)).rglob("model.pth"))
    assert len(found) == 1, (folder, found)
    torch.save(Payload(source), found[0])
