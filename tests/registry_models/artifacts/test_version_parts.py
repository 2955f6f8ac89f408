"""A retrained version and a rewritten one are told apart by their files, without unpacking any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from registry_models.artifacts.snapshot import read_snapshot


def version(
    folder: Path,
    model: nn.Module,
    *,
    factory: dict[str, object] | None = None,
    code: str = "",
    example: str = "{}",
    stamp: int = 0,
) -> dict[str, str]:
    """Write a model directory as MLflow does, pickled or for a factory, and return its parts."""
    (folder / "data").mkdir(parents=True)
    flavor = {"pytorch": {"code": "code", "model_data": "data"}}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": flavor, "utc_time_created": stamp}))
    (folder / "requirements.txt").write_text(f"torch\n# {stamp}\n")
    (folder / "input_example.json").write_text(example)
    (folder / "code").mkdir()
    (folder / "code" / "net.py").write_text(code)
    torch.save(model, folder / "data" / "model.pth")
    if factory is not None:
        own = folder / "extra_files" / "audit"
        own.mkdir(parents=True)
        (own / "factory.yaml").write_text(yaml.safe_dump(factory))
    return dict(read_snapshot(folder).parts)


def linear(weight: float, bias: bool = True) -> nn.Module:
    model = nn.Linear(2, 1, bias=bias)
    nn.init.constant_(model.weight, weight)
    if bias:
        nn.init.zeros_(model.bias)
    return model


@pytest.mark.parametrize("factory", [None, {"factory": "net:build", "arguments": {"width": 1}}])
def test_what_differs_has_a_name(tmp_path: Path, factory: dict[str, object] | None) -> None:
    base = version(tmp_path / "base", linear(1.0), factory=factory)
    assert set(base) == {"weights", "files"}

    def differing(name: str, model: nn.Module, **changed: object) -> set[str]:
        other = version(tmp_path / name, model, **{"factory": factory, **changed})  # type: ignore[arg-type]
        return {part for part in base if base[part] != other[part]}

    assert differing("again", linear(1.0), stamp=7, example="[1]") == set(), "another night, the same model"
    assert differing("retrained", linear(2.0)) == {"weights"}
    assert differing("rewritten", linear(1.0), code="x = 1\n") == {"files"}
    if factory is None:
        assert "files" in differing("reshaped", linear(1.0, bias=False))
    else:
        assert differing("other", linear(1.0), factory={**factory, "arguments": {"width": 2}}) == {"files"}


def test_a_broken_archive_is_only_a_file(tmp_path: Path) -> None:
    base = version(tmp_path / "a", linear(1.0))
    (tmp_path / "a" / "data" / "model.pth").write_bytes(b"PK\x03\x04 broken")
    parts = read_snapshot(tmp_path / "a").parts
    assert parts["weights"] != base["weights"]
