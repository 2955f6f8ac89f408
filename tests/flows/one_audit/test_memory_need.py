"""The estimate of an audit's memory, held against measured peaks of processes that audit."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from audits.updates.judge.slices import SLICE
from benchmarks.memory import _BUILDS, in_child, made
from flows.one_audit.memory_need import CONTEXT_BYTES, Need, Weights, needed, needed_by, state_copies
from registry_models.artifacts.snapshot import read_snapshot
from registry_models.reference.reference_files import write_reference


def _phase(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Any]:
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    cls = type(optimizer)
    return {
        "optimizer": {"class": f"torch.optim.{cls.__name__}", "groups": [{"options": options, "parameters": names}]}
    }


def _need(params: str, dtype: str, optimizer: str) -> tuple[Need, int]:
    model, _ = made(params, getattr(torch, dtype), torch.device("cpu"))
    named = dict(model.named_parameters())
    weights = {name: Weights(p.numel(), p.element_size()) for name, p in named.items()}
    need = needed_by(weights, [_phase(_BUILDS[optimizer](named.values()), list(named))])
    return need, sum(w.count * w.size for w in weights.values())


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [("float32", "adamw"), ("bfloat16", "momentum"), ("float64", "adagrad")],
)
def test_the_estimate_is_below_the_measured_peak_and_of_its_size(dtype: str, optimizer: str) -> None:
    """What it asks for was used, so that nothing which fits is refused; and it is no empty promise."""
    arguments = argparse.Namespace(
        params="4M", dtype=dtype, optimizer=optimizer, device="cpu", threads=1, state=False, timeline=False
    )
    need, weights = _need("4M", dtype, optimizer)
    for part, asked in (("gradient", need.gradient), ("update", need.update)):
        found = in_child(arguments, part)
        assert "failed" not in found
        assert "fail" not in found["outcome"], (part, found)
        used = found["bytes"] + weights
        assert asked <= used, (part, asked, used)
        assert asked >= LEAST * (used - SLICES), (part, asked, used)


#: The process's peak counts host memory too, in which a GPU's audit lets tensors wait, and activations.
LEAST = 0.2

#: A dozen vectors of a slice in float64, whatever the model's size: more than 4 million parameters weigh.
SLICES = 12 * 8 * SLICE


def _optimizers() -> list[tuple[str, dict[str, Any]]]:
    return [
        ("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adam", {}), ("Adam", {"amsgrad": True}), ("AdamW", {}),
        ("NAdam", {}), ("RAdam", {}), ("Adamax", {}), ("Adadelta", {}), ("Adagrad", {}), ("RMSprop", {}),
        ("RMSprop", {"momentum": 0.9, "centered": True}), ("Rprop", {}), ("ASGD", {}), ("Muon", {}), ("Adafactor", {}),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), _optimizers())
def test_the_state_is_as_large_as_torch_makes_it(name: str, options: Mapping[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.01, **options)
    for _ in range(2):
        parameter.grad = torch.randn(64, 64)
        optimizer.step()
    held = sum(v.numel() for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.dim())
    assert state_copies(_phase(optimizer, ["w"])["optimizer"]) == held // parameter.numel()


def test_a_foreign_optimizer_is_assumed_to_keep_nothing() -> None:
    assert state_copies({"class": "somewhere.AdamW", "groups": [{"options": {"amsgrad": True}, "parameters": []}]}) == 0


def test_frozen_weights_have_neither_gradient_nor_state() -> None:
    phase = {"optimizer": {"class": "torch.optim.AdamW", "groups": [{"options": {}, "parameters": ["a", "b"]}]}}
    need = needed_by({"a": Weights(100, 2, trained=False), "b": Weights(10, 4)}, [phase])
    assert need.update == 200 + 40 + 2 * 40 + 2 * 40
    assert need.gradient == 8 * (110 + 3 * 100)
    assert need.total == CONTEXT_BYTES + need.gradient


def test_each_optimizer_counts_what_it_holds() -> None:
    phases = [
        {"optimizer": {"class": "torch.optim.AdamW", "groups": [{"options": {}, "parameters": ["g"]}]}},
        {"optimizer": {"class": "torch.optim.SGD", "groups": [{"options": {"momentum": 0}, "parameters": ["d"]}]}},
    ]
    need = needed_by({"g": Weights(100, 4), "d": Weights(50, 4)}, phases)
    assert need.update == 600 + 2 * 400 + 2 * 400
    assert "AdamW and SGD" in need.text


def test_the_recipe_of_a_version_tells_its_dtypes_and_its_optimizer(tmp_path: Path) -> None:
    folder = write_reference(tmp_path / "model")
    snapshot = read_snapshot(folder)
    file = folder / "extra_files" / "audit" / "recipe.yaml"
    plain = yaml.safe_load(file.read_text())
    shapes = [torch.Size(p["shape"]).numel() for p in plain["parameters"]]
    need = needed(snapshot)
    assert need.gradient == 8 * (sum(shapes) + 3 * max(shapes))
    assert need.update == 4 * sum(shapes) * 5  # weights, two gradients, AdamW's two averages
    assert f"{sum(shapes):,} parameters of 4 bytes each, AdamW" in need.text


@pytest.mark.parametrize("text", ["[", "phases: 3", "parameters: [{name: 2}]\nphases: []", "just words"])
def test_a_recipe_that_tells_nothing_leaves_the_files_own_size(text: str, tmp_path: Path) -> None:
    snapshot = read_snapshot(write_reference(tmp_path / "model"))
    files = sum(f.stat().st_size for f in snapshot.folder.rglob("*") if f.is_file())
    assert needed(dataclasses.replace(snapshot, recipe_folder=None)).total == CONTEXT_BYTES + files
    other = tmp_path / "recipe"
    other.mkdir()
    (other / "recipe.yaml").write_text(text)
    assert needed(dataclasses.replace(snapshot, recipe_folder=other)).total == CONTEXT_BYTES + files
