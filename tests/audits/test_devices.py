"""Devices by name, draws on them, and flags that a process has frozen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audits.devices import Draws, choose_device, device_name
from audits.errors import RecipeError
from tests import accelerator

ROOT = Path(__file__).resolve().parents[2]


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert device_name(torch.device("cpu")) == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["xpu", "mps:0", "meta"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    kind = name.partition(":")[0]
    if kind != "meta" and getattr(torch, kind).is_available():
        pytest.skip(f"this machine has {kind}")
    with pytest.raises(RecipeError, match=f"torch finds no {kind} device; use 'cpu' or 'auto'"):
        choose_device(name)


def test_a_device_that_torch_does_not_know_is_refused() -> None:
    with pytest.raises(RecipeError, match="device 'gpu' is unknown to torch"):
        choose_device("gpu")


def test_draws_are_those_of_one_generator() -> None:
    generator, draws = torch.Generator().manual_seed(5), Draws(5)
    for _ in range(2):
        assert torch.equal(torch.randn(7, **draws.on(torch.device("cpu"))), torch.randn(7, generator=generator))


AUDIT = """
import torch
from torch import nn
import audits
{register}
torch.backends.disable_global_flags()
model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
batch = {{"x": torch.randn(16, 1, 8), "y": torch.randint(0, 3, (16,))}}
optimizer = torch.optim.AdamW(model.parameters())
recipe = audits.Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer)
flags = (torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
report = audits.audit(model, recipe, device={device!r})
assert flags == (torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
assert torch.backends.flags_frozen()
found = [r.message for r in report.rows if r.outcome.value in ("fail", "inconclusive")]
print(report.outcome.value, report.coverage, found)
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize("device", ["cpu", accelerator.NAME])
def test_an_audit_works_where_global_flags_are_frozen(device: str) -> None:
    """On a device the audit chooses deterministic algorithms, which plain assignment could not any more."""
    register = ""
    if device != "cpu":
        try:
            accelerator.built()
        except accelerator.NoCompilerError as error:
            pytest.skip(str(error))
        register = "from tests.accelerator import register\nregister()"
    code = AUDIT.format(register=register, device=device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "pass 1.0 []", done.stdout + done.stderr
