"""A state coarser than the weights, as its name or an option declares: held to the rule where rounding is known."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import nn

import audits
from audits import AuditReport, Outcome, Recipe
from audits.updates.rules.coarse_names import bare_name
from tests.wrong_on_purpose.updates import coarse


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch["x"]).float(), batch["y"])


def judged(cls: Any, dtype: torch.dtype = torch.float32, steps: int = 0, **options: Any) -> AuditReport:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5)).to(dtype)
    batch = {"x": torch.randn(16, 9, dtype=dtype), "y": torch.randn(16, 5)}
    held = list(model.parameters())
    optimizer = cls([{"params": held[:2]}, {"params": held[2:], "lr": 3e-3}], **{"weight_decay": 0.1, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return audits.audit(model, Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer), device="cpu")


def failing(report: AuditReport) -> dict[str, str]:
    return {row.check: row.message for row in report.rows if row.outcome is Outcome.FAIL}


class BeforeUse(coarse.AdamW8bit):
    """Eight bits whose rounding the very step is made of: small gradients come out as none."""

    made_of_what_is_kept = True


BeforeUse.__name__ = "AdamW8bit"


class AdamWFp8(coarse.AdamW8bit):
    """Moments in float8 beside a scale."""

    def held(self, state: dict[str, Any], name: str, like: torch.Tensor) -> torch.Tensor:
        return (
            (state[name].float() * state[f"{name}_scale"]).to(like.dtype) if name in state else torch.zeros_like(like)
        )

    def keep(self, state: dict[str, Any], name: str, value: torch.Tensor) -> None:
        scale = state[f"{name}_scale"] = value.abs().max().float().clamp(min=1e-30)
        state[name] = (value.float() / scale).to(torch.float8_e4m3fn)


class AdamW4bit(coarse.AdamW8bit):
    """Two codes of four bits in a byte, from the least to the largest number of the whole tensor."""

    def held(self, state: dict[str, Any], name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in state:
            return torch.zeros_like(like)
        codes = torch.stack([state[name] // 16, state[name] % 16], dim=1).reshape(-1)[: like.numel()]
        least, spacing = state[f"{name}_scale"]
        return (least + codes.float() * spacing).view(like.shape).to(like.dtype)

    def keep(self, state: dict[str, Any], name: str, value: torch.Tensor) -> None:
        flat = value.float().reshape(-1)
        least, spacing = flat.min(), ((flat.max() - flat.min()) / 15).clamp(min=1e-30)
        state[f"{name}_scale"] = torch.stack([least, spacing])
        codes = F.pad(((flat - least) / spacing).round(), (0, flat.numel() % 2)).to(torch.uint8).view(-1, 2)
        state[name] = codes[:, 0] * 16 + codes[:, 1]


CORRECT = (
    coarse.AdamW8bit,
    coarse.CoarseAdamW,
    coarse.CoarseAncestor,
    pytorch_optimizer.FlashAdamW,
    AdamWFp8,
    AdamW4bit,
)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("cls", CORRECT, ids=lambda c: c.__qualname__)
def test_a_correct_one_passes_fresh_and_trained(cls: Any, steps: int, dtype: torch.dtype) -> None:
    report = judged(cls, dtype, steps)
    assert (failing(report), report.coverage) == ({}, 1.0), report.headline
    (probe,) = [row for row in report.rows if row.check == "optimizer.probe"]
    assert probe.outcome is Outcome.PASS
    assert "keeps its state in torch." in probe.message
    assert {row.outcome for row in report.rows if row.check == "update.rule"} == {Outcome.PASS}


@pytest.mark.sampled("cls,mistake", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [coarse.AdamW8bit, coarse.CoarseAdamW], ids=lambda c: c.__qualname__)
@pytest.mark.parametrize("mistake", coarse.MISTAKES)
def test_a_wrong_one_fails(cls: Any, mistake: str, dtype: torch.dtype) -> None:
    for steps in (0, 3):
        report = judged(cls, dtype, steps, mistake=mistake)
        assert report.outcome is Outcome.FAIL
        told = "" if mistake == "state by shape" else "more than rounding explains"  # that one keeps it elsewhere
        assert told in failing(report)["optimizer.probe"]


@pytest.mark.sampled
@pytest.mark.parametrize("decay", [0.1, 1e-3])
@pytest.mark.parametrize("cls", [*CORRECT[:3], AdamWFp8, AdamW4bit], ids=lambda c: c.__qualname__)
def test_a_small_decay_is_seen_beside_any_rounding(cls: Any, decay: float) -> None:
    message = failing(judged(cls, weight_decay=decay, mistake="decay missing"))["optimizer.probe"]
    assert "the decay is another" in message or "off" in message


def test_what_rounding_hides_is_open_and_says_the_cure() -> None:
    report = judged(BeforeUse)
    assert failing(report) == {}
    left = [row.message for row in report.rows if row.outcome is Outcome.INCONCLUSIVE]
    assert left
    assert all("audit it with its state in float32" in message for message in left)
    assert "optimizer.probe" in failing(judged(BeforeUse, mistake="decay missing"))


def test_a_coarse_state_that_nobody_declares_fails() -> None:
    class Silent(coarse.CoarseAncestor):
        def __init__(self, params: Any, weight_decay: float) -> None:
            torch.optim.AdamW.__init__(self, params, lr=1e-3, weight_decay=weight_decay)
            self.mistake = ""

        moments_dtype = torch.bfloat16

    assert "update.rule" in failing(judged(Silent))


def test_names_are_bared_of_how_the_state_is_kept() -> None:
    names = ("AdamW8bit", "PagedAdamW8bit", "AdamWFp8", "AdamW4bit", "FlashAdamW", "BF16AdamW", "CPUOffloadAdamW",
             "AdamWBFloat16State")  # fmt: skip
    assert {bare_name(name) for name in names} == {"adamw"}


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_master_copies_are_what_the_rule_moves(steps: int, dtype: torch.dtype) -> None:
    right = judged(coarse.MasterAdamW, dtype, steps)
    assert (right.outcome, right.coverage) == (Outcome.PASS, 1.0), right.headline
    for mistake in ("decay missing", "bias not corrected"):
        assert "update.rule" in failing(judged(coarse.MasterAdamW, dtype, steps, mistake=mistake))


def test_a_master_copy_that_is_read_back_from_the_weights_loses_what_it_is_for() -> None:
    report = judged(coarse.MasterAdamW, torch.bfloat16, 3, mistake="copy follows the weights")
    assert "update.rule" in failing(report)
