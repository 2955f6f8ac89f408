"""A newcomer's journeys: a package of one's own with two bugs, the documented GAN, diffusion, LoRA, a waiver.

The fourth, flags and typos, is `tests.flows.cli.test_wrong_arguments`; ``gradaudit up`` is in `tests.flows.service`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Outcome, Recipe, audit
from registry_models import log_model
from registry_models.registry.versions import VersionReference
from tests.flows.cli.test_audit_command import gradaudit
from tests.registry_models.auditing import audited

PACKAGE = """
import torch
from torch import nn


class Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * BACKWARD


class Classifier(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.inner, self.head = nn.Linear(8, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(Squash.apply(self.inner(x)))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def train(steps=5):
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    REPLACED
    batch = {"x": torch.randn(24, 8), "y": torch.arange(24) % 3}
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model, batch, optimizer
"""

RIGHT, WRONG = "(1 - y * y)", "(1 - y)"
HEAD = "model.head = nn.Linear(16, 3)  # fine-tuned for three classes"


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes and imports the newcomer's package, right or wrong."""
    monkeypatch.syspath_prepend(str(tmp_path / "work"))

    def written(*, backward: str, replaced: str) -> ModuleType:
        package = tmp_path / "work" / "shapes"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
        (package / "model.py").write_text(PACKAGE.replace("BACKWARD", backward).replace("REPLACED", replaced))
        for name in [name for name in sys.modules if name.partition(".")[0] == "shapes"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module("shapes.model")

    yield written
    for name in [name for name in sys.modules if name.partition(".")[0] == "shapes"]:
        del sys.modules[name]


@pytest.mark.end_to_end
def test_two_bugs_are_found_named_and_mended(
    shapes: Any, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a source rewritten within a second has the same stamp

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = gradaudit(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
        return code, *capsys.readouterr()

    def register(module: ModuleType) -> None:
        mlflow.set_experiment("models")
        model, batch, optimizer = module.train()
        recipe = Recipe.capture(model, batch=batch, loss="shapes.model:loss", optimizer=optimizer)
        log_model(model, "shapes", recipe=recipe, factory="shapes.model:Classifier")

    register(shapes(backward=WRONG, replaced=HEAD))
    code, out, err = run("audit", "models:/shapes/1", "--html", "report.html")
    assert code == 1
    text = " ".join(out.split())
    for told in ("gradient.finite-difference", "registration.coverage", "Squash", "head.weight", "Build the optimizer"):
        assert told in text, out
    stages = [line.partition(" shapes")[0] for line in err.splitlines()]
    assert stages[:1] == ["looking up models:/shapes/1"]
    assert {"downloading", "auditing", "publishing"} <= set(stages), err
    assert "results: ./results is made now" in err
    assert "results: ./results (`gradaudit report models:/shapes/1` shows this audit again)" in err
    assert re.search(r"run: [0-9a-f]{32} in sqlite:", err)

    register(shapes(backward=RIGHT, replaced=""))
    code, out, err = run("audit", "models:/shapes/2", "--json")
    assert code == 0, out
    assert json.loads(out)["findings"] == []
    assert "is made now" not in err
    assert VersionReference("shapes", 2).resolve(client).tags["audit.outcome"] == "pass"

    code, out, _ = run("diff", "models:/shapes/1", "models:/shapes/2")
    assert code == 0
    assert "fixed" in out
    code, out, _ = run("history", "shapes", "--parameter", "head.weight")
    assert code == 0
    assert out.count("head.weight") == 2
    code, out, err = run("sql", "select check from rows")
    assert code == 2
    assert '"check" is a word of SQL: write the column in double quotes' in err


def documented(heading: str) -> str:
    """The first Python block after a sentence of docs/how_to/own_model.md."""
    text = (Path(__file__).parents[3] / "docs" / "how_to" / "own_model.md").read_text(encoding="utf-8")
    return text[text.index(heading) :].split("```python\n", 1)[1].split("```", 1)[0]


@pytest.mark.slow
def test_the_documented_gan_passes_and_its_version_too(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "gan.py").write_text(documented("A GAN's step in full"))
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    gan = importlib.import_module("gan")
    try:
        model = gan.Gan()
        recipe = gan.recipe_of(model)
        report = audit(model, recipe)
        assert report.outcome is Outcome.PASS, str(report)
        assert len(str(report).splitlines()) <= 10
        mlflow.set_experiment("models")
        log_model(model, "gan", recipe=recipe, factory=gan.Gan)
        assert audited(client, "models:/gan/1", tmp_path / "a").outcome is Outcome.PASS
    finally:
        sys.modules.pop("gan", None)


def lost_head(*, frozen: bool) -> tuple[nn.Module, Recipe]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model[2].requires_grad_(not frozen)
    expect = {"frozen": ["2.*"]} if frozen else None
    optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.01)
    batch = {"x": torch.randn(6, 4), "y": torch.tensor([0, 1, 0, 1, 0, 1])}
    return model, Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer, expect=expect)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_waived_head_is_no_pass_and_a_frozen_one_is(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    mlflow.set_experiment("models")
    for frozen in (False, True):
        model, recipe = lost_head(frozen=frozen)
        log_model(model, "head", recipe=recipe)
    waiver = "waivers: [{model: head, check: registration.*, reason: r, owner: o, expires: 2999-01-01}]"
    (tmp_path / "waivers.yaml").write_text(waiver)

    def run(version: int) -> tuple[int, str]:
        capsys.readouterr()
        code = gradaudit("audit", f"models:/head/{version}", monkeypatch=monkeypatch, tmp_path=tmp_path)
        return code, " ".join(capsys.readouterr().out.split())

    assert run(1)[0] == 1
    code, out = run(2)
    assert code == 0, out
    monkeypatch.setenv("GRADAUDIT_WAIVERS", "waivers.yaml")
    code, out = run(1)
    assert code == 2
    assert "INCONCLUSIVE: not enough could be checked (2.weight, 2.bias)" in out


class LowRank(nn.Module):
    """A frozen layer and its low-rank addition, as LoRA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 12).requires_grad_(False)
        self.down, self.up = nn.Linear(12, 2, bias=False), nn.Linear(2, 12, bias=False)
        nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + self.up(self.down(x))
        return y


def test_low_rank_adapters_pass_and_a_decayed_base_fails() -> None:
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(16, 12), "targets": torch.randn(16, 12)}
    for wrong in (False, True):
        model = LowRank()
        held = list(model.parameters()) if wrong else [p for p in model.parameters() if p.requires_grad]
        if wrong:
            model.base.requires_grad_(True)
        optimizer = torch.optim.AdamW(held, lr=1e-3, weight_decay=0.1)
        recipe = Recipe.capture(
            model, batch=batch, loss="mse_loss", optimizer=optimizer, expect={"frozen": ["base.*"]}
        )  # fmt: skip
        report = audit(model, recipe)
        assert report.passed is not wrong, str(report)
        if wrong:
            assert "update.frozen" in report.failed_checks
            assert set(report.failed_parameters) >= {"base.weight", "base.bias"}
