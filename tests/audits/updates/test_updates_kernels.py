"""Fused and capturable implementations: healthy ones are resolved at tight tolerances, wrong kernels are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits.live.subject import open_subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.updates.judge.apply_rule import rule_for, rule_options
from audits.updates.judge.kernels import ROUNDOFF, scalar_slack, scalars_of_build
from audits.updates.rules.scalars import EXACT, Scalars, as_single
from tests.audits.updates.cuda_kernels import allow_capturable, use_cuda_fused_adam
from tests.audits.updates.subjects import audited, failed, of
from tests.wrong_on_purpose.updates import models

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

FUSED: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {}), ("Adam", {"weight_decay": 1e-2, "amsgrad": True}), ("AdamW", {}), ("AdamW", {"lr": 2e-5}),
    ("AdamW", {"maximize": True, "betas": (0.8, 0.95)}),
]  # fmt: skip
CAPTURABLE: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"amsgrad": True}), ("AdamW", {}), ("AdamW", {"foreach": False}), ("NAdam", {"weight_decay": 1e-2}),
    ("NAdam", {"foreach": False, "weight_decay": 1e-2, "decoupled_weight_decay": True}), ("Adamax", {}),
    ("Adamax", {"foreach": False}), ("Adadelta", {}), ("ASGD", {}), ("ASGD", {"foreach": False, "lambd": 1e-2}),
    ("RMSprop", {"centered": True, "lr": 1e-3}), ("Rprop", {"lr": 1e-3}),
    ("AdamW", {"lr": torch.tensor(1e-3)}),
]  # fmt: skip


def _gpt(dtype: torch.dtype, optimizer: str, trained: bool, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, batch = models.gpt()
    model = model.to(dtype)
    build = getattr(torch.optim, optimizer)(model.parameters(), **options)
    if trained:
        models.train(model, batch, models.next_token, build)
    return model, {"batch": batch, "loss": models.next_token, "optimizer": build}


def _resolved(rows: list[ResultRow]) -> set[str | None]:
    return {r.parameter for r in of(rows, "update.rule") if r.outcome is Outcome.PASS}


def _healthy(rows: list[ResultRow], model: nn.Module) -> None:
    # loading NAdam's scalar state in bfloat16 rounds it: a fault of torch's, and told as such
    assert [r for r in rows if r.outcome is Outcome.FAIL and r.check != "registration.state-round-trip"] == []
    assert _resolved(rows) == {n for n, _ in model.named_parameters()}
    (probe,) = of(rows, "optimizer.probe")
    assert probe.outcome is Outcome.PASS


@pytest.mark.sampled("name,options", "dtype,trained")
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), FUSED, ids=str)
def test_cuda_fused_kernels_pass_and_are_resolved(
    name: str, options: Any, dtype: torch.dtype, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cuda_fused_adam(monkeypatch)
    model, recipe = _gpt(dtype, name, trained, fused=True, **options)
    _healthy(audited(model, **recipe), model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_older_kernel_with_double_betas_passes_as_well(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda_fused_adam(monkeypatch, single=False)
    model, recipe = _gpt(dtype, "AdamW", True, fused=True)
    _healthy(audited(model, **recipe), model)


@pytest.mark.sampled("name,options", "dtype,trained")
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CAPTURABLE, ids=str)
def test_capturable_paths_pass_and_are_resolved(
    name: str, options: Any, dtype: torch.dtype, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_capturable(monkeypatch)
    model, recipe = _gpt(dtype, name, trained, capturable=True, **options)
    _healthy(audited(model, **recipe), model)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_the_cpus_own_fused_kernels_are_resolved(name: str) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2} if name == "SGD" else {"weight_decay": 1e-2}
    model, recipe = _gpt(torch.float32, name, True, fused=True, **options)
    _healthy(audited(model, **recipe), model)


@pytest.mark.parametrize("foreach", [False, True])
def test_radams_capturable_path_is_a_note_on_the_build(foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_capturable(monkeypatch)
    model, recipe = _gpt(torch.float32, "RAdam", True, capturable=True, foreach=foreach, weight_decay=1e-2)
    rows = audited(model, **recipe)
    assert failed(rows) == []
    assert _resolved(rows) == {n for n, _ in model.named_parameters()}
    (probe,) = of(rows, "optimizer.probe")
    assert (probe.outcome, probe.cause) == (Outcome.WARN, "environment")
    assert "float32" in probe.message
    plain, recipe = _gpt(torch.float32, "RAdam", True, foreach=foreach, weight_decay=1e-2)
    (probe,) = of(audited(plain, **recipe), "optimizer.probe")
    assert probe.outcome is Outcome.PASS


def _without_decay(scalars: dict[str, float]) -> dict[str, float]:
    return {**scalars, "weight_decay": 0.0}


class _FirstGroup:
    """A kernel launched once with the first group's ``beta2`` for all groups."""

    def __init__(self) -> None:
        self._beta2: float | None = None

    def __call__(self, scalars: dict[str, float]) -> dict[str, float]:
        self._beta2 = self._beta2 or scalars["beta2"]
        return {**scalars, "beta2": self._beta2}


def _beta2_of_the_first(name: str) -> Any:
    return _FirstGroup() if name == "beta2" else _without_decay


@pytest.mark.sampled("what,dtype", "trained")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("what", ["decay", "beta2", "eps", "lr"])
def test_wrong_fused_kernels_are_found(
    what: str, trained: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = models.gpt()
    model = model.to(dtype)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "betas": (0.9, 0.95), "weight_decay": 0.0}]
    if trained:
        use_cuda_fused_adam(monkeypatch)
    optimizer = torch.optim.AdamW(groups, fused=True)
    if trained:
        models.train(model, batch, models.next_token, optimizer)
    faults: dict[str, Any] = {
        "decay": _without_decay, "beta2": _FirstGroup(), "eps": lambda s: {**s, "eps": 1e-4},
        "lr": lambda s: {**s, "lr": 1.001 * s["lr"]},
    }  # fmt: skip
    use_cuda_fused_adam(monkeypatch, fault=faults[what])
    rows = audited(model, batch=batch, loss=models.next_token, optimizer=optimizer)
    wrong = failed(rows)
    expected = {"update.rule", "update.state", "optimizer.probe"}
    assert {check for check, _ in wrong} & expected
    named = {parameter for check, parameter in wrong if check in ("update.rule", "update.state")}
    names = {n for n, p in model.named_parameters() if (p.dim() > 1) or what != "decay"}
    if what == "decay":
        assert named == names
        assert any("without weight decay" in r.message for r in of(rows, "update.rule"))
    if what == "beta2":
        assert named == {n for n, p in model.named_parameters() if p.dim() < 2}
    if what == "lr":
        assert named == names


def test_a_wrong_capturable_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_capturable(monkeypatch)
    model, recipe = _gpt(torch.float32, "AdamW", True, capturable=True)

    class Undecayed(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["weight_decay"], kept = 0.0, group["weight_decay"]
            found = super().step(closure)
            for group in self.param_groups:
                group["weight_decay"] = kept
            return found

    optimizer = Undecayed(model.parameters(), capturable=True)
    optimizer.load_state_dict(recipe["optimizer"].state_dict())
    rows = audited(model, **{**recipe, "optimizer": optimizer}, expect={"optimizer": "torch.optim.AdamW"})
    wrong = {parameter for check, parameter in failed(rows) if check == "update.rule"}
    assert wrong == {n for n, _ in model.named_parameters()}


def _measured(optimizer: torch.optim.Optimizer, model: nn.Module, batch: Any, lane: torch.dtype) -> Scalars:
    recipe = Recipe.capture(model, batch=batch, loss=models.next_token, optimizer=optimizer)
    with open_subject(model, recipe, None, device="cpu") as subject:
        (phase,) = subject.phases
        rule = rule_for(subject, phase)
        assert rule is not None
        options = rule_options(phase, phase.recipe.optimizer.groups[0].options, torch.float32)
        return scalars_of_build(phase, rule, options, lane)


def test_the_builds_scalars_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.gpt()
    fused = torch.optim.AdamW(model.parameters(), fused=True)
    assert _measured(fused, model, batch, torch.float32) == EXACT  # this CPU's kernel has double betas
    use_cuda_fused_adam(monkeypatch)
    found = _measured(fused, model, batch, torch.float32)
    assert (found.moments, found.corrections) == (torch.float32, torch.float32)
    assert _measured(fused, model, batch, torch.float64) == EXACT  # float64 weights have float64 scalars
    allow_capturable(monkeypatch)
    capturable = torch.optim.AdamW(model.parameters(), capturable=True)
    for lane in (torch.float32, torch.float64):
        found = _measured(capturable, model, batch, lane)
        assert (found.moments, found.corrections) == (torch.float64, torch.float32)


def test_the_slack_of_rounded_scalars() -> None:
    options = {"betas": (0.9, 0.999)}
    assert scalar_slack(EXACT, options, 1.0) == 0.0
    capturable = Scalars(torch.float64, torch.float32)
    assert scalar_slack(capturable, options, 1.0) == scalar_slack(capturable, options, 1e6) == 32 * ROUNDOFF
    fused = Scalars(torch.float32, torch.float32)
    assert scalar_slack(fused, options, 1.0) == pytest.approx(ROUNDOFF * (32 + 10 + 500))
    assert scalar_slack(fused, options, 1e6) == pytest.approx(ROUNDOFF * 33.5)
    assert abs((1 - as_single(0.999)) / (1 - 0.999) - 1) == pytest.approx(1.29e-5, rel=1e-2)


def _lbfgs(dtype: torch.dtype, kind: type[torch.optim.LBFGS], **options: Any) -> list[ResultRow]:
    model, batch = models.gpt()
    model = model.to(dtype)
    optimizer = kind(model.parameters(), **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = models.next_token(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return audited(model, batch=batch, loss=models.next_token, optimizer=optimizer)


class _Longer(torch.optim.LBFGS):
    """One per cent too far."""

    def step(self, closure: Any) -> Any:
        held = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in held]
        found = super().step(closure)
        with torch.no_grad():
            for p, old in zip(held, before, strict=True):
                p.add_(p - old, alpha=0.01)
        return found


@pytest.mark.slow
@pytest.mark.sampled("dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"lr": 0.1}, {"lr": 0.1, "max_iter": 5, "history_size": 3}], ids=str)
def test_lbfgs_is_no_false_alarm_where_weights_or_curvature_are_coarse(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    rows = _lbfgs(dtype, torch.optim.LBFGS, **options)
    assert failed(rows) == []
    (probe,) = of(rows, "optimizer.probe")
    assert probe.outcome is Outcome.PASS
    if dtype is torch.float32:
        assert {r.outcome for r in of(rows, "update.rule")} == {Outcome.PASS}
    for r in of(rows, "update.rule"):
        assert r.outcome is Outcome.PASS or r.cause in ("precision", "unresolved")
    assert any(check == "update.rule" for check, _ in failed(_lbfgs(dtype, _Longer, **options)))


def test_a_tensor_as_learning_rate() -> None:
    for foreach in (False, None):
        model, recipe = _gpt(torch.float32, "AdamW", True, lr=torch.tensor(1e-3), foreach=foreach)
        _healthy(audited(model, **recipe), model)


def test_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 cannot resolve is resolved in the float64 lane, where the kernel's scalars are float64."""
    use_cuda_fused_adam(monkeypatch)
    model, recipe = _gpt(torch.float32, "AdamW", True, fused=True)
    rows = of(audited(model, **recipe), "update.rule")
    assert {r.lane for r in rows} == {Lane.FLOAT64}
    assert all(r.detection_limit < 1e-2 for r in rows)
