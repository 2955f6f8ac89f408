"""Published optimizers: each rule against a public implementation; planted faults caught, correct ones passed."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import lion_pytorch
import pytest
import pytorch_optimizer
import schedulefree
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from audits.outcomes import Outcome, ResultRow
from audits.recipe.optimizers import RUNNING
from audits.updates.rules import PUBLISHED, Rule, plain_name
from audits.updates.rules.base import PACKAGE
from audits.updates.rules.matrix_kin import rmsprop_tensorflow
from tests.audits.updates.subjects import audited, of
from tests.wrong_on_purpose.updates import published

#: (public class, options): every variant that a rule is written for.
CASES: list[tuple[Any, dict[str, Any]]] = [
    (lion_pytorch.Lion, {"weight_decay": 0.1}),
    (lion_pytorch.Lion, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (pytorch_optimizer.Lion, {"weight_decay": 0.1, "maximize": True}),
    (pytorch_optimizer.Lion, {"weight_decay": 0.1, "weight_decouple": False, "foreach": False}),
    (pytorch_optimizer.Tiger, {"weight_decay": 0.1, "fixed_decay": True}),
    (pytorch_optimizer.SignSGD, {"weight_decay": 0.1}),
    (pytorch_optimizer.SignSGD, {"momentum": 0.0}),
    (pytorch_optimizer.Lamb, {"weight_decay": 0.1}),
    (pytorch_optimizer.Lamb, {"weight_decay": 0.1, "weight_decouple": False}),
    (pytorch_optimizer.Lamb, {"grad_averaging": False, "adam": True}),
    (pytorch_optimizer.LARS, {"weight_decay": 0.1}),
    (pytorch_optimizer.LARS, {"nesterov": True, "dampening": 0.1}),
    (pytorch_optimizer.NovoGrad, {"weight_decay": 0.1}),
    (pytorch_optimizer.NovoGrad, {"weight_decay": 0.1, "weight_decouple": True, "grad_averaging": True}),
    (pytorch_optimizer.AdaBelief, {"weight_decay": 0.1}),
    (pytorch_optimizer.AdaBelief, {"weight_decay": 0.1, "weight_decouple": False}),
    (pytorch_optimizer.Adan, {"weight_decay": 0.1}),
    (pytorch_optimizer.Adan, {"weight_decay": 0.1, "weight_decouple": True}),
    (pytorch_optimizer.AdEMAMix, {"weight_decay": 0.1}),
    (pytorch_optimizer.AdEMAMix, {"weight_decay": 0.1, "weight_decouple": True, "t_alpha_beta3": 5}),
    (pytorch_optimizer.Yogi, {"weight_decay": 0.1}),
    (pytorch_optimizer.StableAdamW, {"weight_decay": 0.1}),
    (pytorch_optimizer.StableAdamW, {"weight_decay": 0.1, "weight_decouple": False}),
    (pytorch_optimizer.QHAdam, {"nus": (0.7, 0.9), "weight_decay": 0.1}),
    (pytorch_optimizer.ADOPT, {"weight_decay": 0.1, "weight_decouple": True}),
    (pytorch_optimizer.ADOPT, {"weight_decay": 0.1, "clip_lambda": None}),
    (pytorch_optimizer.AdaBound, {"weight_decay": 0.1}),
    (schedulefree.SGDScheduleFree, {"weight_decay": 0.1, "warmup_steps": 3, "lr": 0.1}),
    (schedulefree.AdamWScheduleFree, {"weight_decay": 0.1, "warmup_steps": 3, "r": 0.5}),
    (pytorch_optimizer.ScheduleFreeSGD, {"weight_decay": 0.1}),
    (pytorch_optimizer.ScheduleFreeAdamW, {"weight_decay": 0.1, "warmup_steps": 3}),
    (pytorch_optimizer.MADGRAD, {"weight_decay": 0.1}),
    (pytorch_optimizer.MADGRAD, {"momentum": 0.0}),
    (pytorch_optimizer.MADGRAD, {"weight_decay": 0.1, "weight_decouple": True}),
    (pytorch_optimizer.SGDW, {"momentum": 0.9, "weight_decay": 0.1}),
    (pytorch_optimizer.SGDW, {"momentum": 0.9, "nesterov": True, "dampening": 0.1}),
    (transformers.Adafactor, {"weight_decay": 0.1}),
    (transformers.Adafactor, {"warmup_init": True}),
    (transformers.Adafactor, {"lr": 0.01, "relative_step": False, "scale_parameter": False, "beta1": 0.9}),
    (pytorch_optimizer.AdaFactor, {"weight_decay": 0.1}),
    (pytorch_optimizer.AdaFactor, {"momentum_dtype": torch.float64, "relative_step": False, "weight_decay": 0.1}),
    (pytorch_optimizer.AdaFactor, {"betas": (None, 0.99), "weight_decouple": False, "weight_decay": 0.1}),
    (pytorch_optimizer.RAdam, {"weight_decay": 0.1, "betas": (0.9, 0.99)}),
    (pytorch_optimizer.RAdam, {"weight_decay": 0.1, "betas": (0.9, 0.99), "degenerated_to_sgd": True}),
    (pytorch_optimizer.Muon, {"weight_decay": 0.1}),
    (pytorch_optimizer.Muon, {"use_adjusted_lr": True, "nesterov": False}),
    (pytorch_optimizer.Muon, {"use_muon": False, "weight_decay": 0.1}),
]

#: Relative distance allowed: scalars in float32 (QHAdam's weights); a root that transformers takes of float32 (eps2's
#: norm is rounded through ``rsqrt``); Newton-Schulz in bfloat16.
COARSER = {"QHAdam": 1e-6, "Adafactor": 1e-6, "Muon": 0.12}


def _built(cls: Any, parameter: nn.Parameter, options: dict[str, Any]) -> torch.optim.Optimizer:
    given: Any = [parameter]
    if cls is pytorch_optimizer.Muon:
        options = dict(options)
        given = [{"params": [parameter], "use_muon": options.pop("use_muon", True)}]
    optimizer = cls(given, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def _rule_for(cls: Any, optimizer: torch.optim.Optimizer) -> Rule:
    """The first of that name that the class has the options of."""
    several = PUBLISHED[plain_name(cls.__name__)]
    known = {**vars(optimizer), **optimizer.defaults, PACKAGE: cls.__module__.partition(".")[0]}
    ones = torch.ones(2, 2, dtype=torch.float64)
    for rule in several[:-1]:
        with contextlib.suppress(KeyError):
            rule.update(ones, ones, {}, known)
            return rule
    return several[-1]


@pytest.mark.parametrize("shape", [(6, 4), (7,)], ids=str)
@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_rule_agrees_with_a_public_implementation(cls: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    if cls is pytorch_optimizer.Muon and len(shape) == 1 and options.get("use_muon", True):
        shape = (4, 6)
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = _built(cls, parameter, options)
    rule = _rule_for(cls, optimizer)
    attributes = {k: v for k, v in vars(optimizer).items() if k not in ("defaults", "state", "param_groups")}
    defaults = {k: v for k, v in optimizer.defaults.items() if k not in RUNNING}
    state: dict[str, Any] = {}
    for scale in (1.0, -0.5, 0.0, 100.0, 1e-3, 1.0, 1.0, 1e-3, 0.3):
        gradient = torch.randn(shape, dtype=torch.float64) * scale
        before = parameter.detach().clone()
        chosen = {**attributes, **defaults, **optimizer.param_groups[0], PACKAGE: cls.__module__.partition(".")[0]}
        expected = rule.update(before, gradient.clone(), state, chosen)
        parameter.grad = gradient.clone()
        optimizer.step()
        actual = parameter.detach() - before
        # ten digits: an update of LARS's 1e-5 of the weights shows no more
        tolerance = COARSER.get(cls.__name__, 1e-9)
        assert float((actual - expected).norm()) <= tolerance * float(expected.norm()) + 1e-15


def test_every_published_rule_has_a_public_witness() -> None:
    rules = {id(rule): rule.name for several in PUBLISHED.values() for rule in several}
    small = nn.Parameter(torch.ones(4, 6, dtype=torch.float64))
    seen = {id(_rule_for(cls, _built(cls, small, options))) for cls, options in CASES}
    assert {name for key, name in rules.items() if key not in seen} == {"RMSpropTF"}  # by hand, below


def test_paper_forms_by_hand() -> None:
    one = {"theta": torch.tensor([3.0, 4.0], dtype=torch.float64), "gradient": torch.tensor([2.0, -2.0]).double()}
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.5, PACKAGE: "mine"}
    # first step: m_hat / sqrt(v_hat) is the sign; r = (1, -1) + 0.5 (3, 4); |theta| = 5
    found = PUBLISHED["lamb"][0].update(**one, state={}, options=options)
    assert found.tolist() == pytest.approx([-0.1 * 5 / math.hypot(2.5, 1.0) * r for r in (2.5, 1.0)])
    # v starts at one: 0.9 + 0.1 * 4 = 1.3
    options = {"lr": 0.1, "alpha": 0.9, "eps": 0.2, "momentum": 0.5, "weight_decay": 0.0}
    found = rmsprop_tensorflow(**one, state={}, options=options)
    assert found.tolist() == pytest.approx([-0.1 * g / math.sqrt(1.5) for g in (2.0, -2.0)])
    centered = rmsprop_tensorflow(**one, state={}, options={**options, "centered": True, "momentum": 0.0})
    assert centered.tolist() == pytest.approx([-0.1 * g / math.sqrt(1.5 - 0.04) for g in (2.0, -2.0)])


def _model(dtype: torch.dtype, cls: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    bias = cls is not published.Muon
    # Muon's last matrix has the full rank that a loss over three classes cannot give it
    model = nn.Sequential(nn.Linear(12, 40, bias=bias), nn.Tanh(), nn.Linear(40, 5, bias=bias)).to(dtype)
    return model, {"x": torch.randn(32, 12, dtype=dtype), "y": torch.randn(32, 5, dtype=dtype)}


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def _audited(cls: Any, mistake: str, dtype: torch.dtype, *, trained: bool, **options: Any) -> list[ResultRow]:
    model, batch = _model(dtype, cls)
    given = {"mistake": mistake} if issubclass(cls, published.Own) else {}
    optimizer = cls(model.parameters(), **given, **options)
    if hasattr(optimizer, "train") and trained:  # captured fresh, the audit does it
        optimizer.train()
    for _ in range(3 if trained else 0):
        optimizer.zero_grad()
        _loss(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return audited(model, batch=batch, loss=_loss, optimizer=optimizer)


_SIX = [(cls, dtype, trained) for cls in published.PUBLISHED
        for dtype in (torch.float32, torch.bfloat16) for trained in (False, True)]  # fmt: skip


@pytest.mark.sampled("cls,dtype", "cls,trained")
@pytest.mark.parametrize(("cls", "dtype", "trained"), _SIX, ids=lambda v: getattr(v, "__name__", str(v)))
def test_correct_published_optimizer_passes(cls: Any, dtype: torch.dtype, trained: bool) -> None:
    rows = _audited(cls, "", dtype, trained=trained)
    assert [(r.check, r.message) for r in rows if r.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)] == []
    judged = of(rows, "update.rule")
    assert judged
    assert all(f"found by the name {cls.__name__}" in r.message for r in judged)
    assert of(rows, "update.state")  # kept under names of its own, and found


_PUBLIC: list[tuple[Any, dict[str, Any]]] = [
    (lion_pytorch.Lion, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (pytorch_optimizer.Lion, {"weight_decay": 0.1}),
    (pytorch_optimizer.Lamb, {"weight_decay": 0.1}),
    (pytorch_optimizer.AdEMAMix, {"weight_decay": 0.1}),
    (pytorch_optimizer.Adan, {"weight_decay": 0.1}),
    (pytorch_optimizer.NovoGrad, {"weight_decay": 0.1}),
    (schedulefree.AdamWScheduleFree, {"weight_decay": 0.1, "warmup_steps": 10}),
    (pytorch_optimizer.ScheduleFreeSGD, {"lr": 0.1}),
    (transformers.Adafactor, {"weight_decay": 0.1}),
    (transformers.Adafactor, {"lr": 0.01, "relative_step": False, "beta1": 0.9}),
    (pytorch_optimizer.AdaFactor, {"weight_decay": 0.1}),  # its momentum is in bfloat16
    (pytorch_optimizer.MADGRAD, {"weight_decay": 0.1}),  # its count is in its state under no tensor
    (pytorch_optimizer.MADGRAD, {"momentum": 0.0}),
    (pytorch_optimizer.RAdam, {"weight_decay": 0.1}),
]


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("cls", "options"), _PUBLIC, ids=lambda v: getattr(v, "__name__", str(v)))
def test_public_implementation_passes(cls: Any, options: dict[str, Any], trained: bool, dtype: torch.dtype) -> None:
    rows = _audited(cls, "", dtype, trained=trained, **options)
    assert [(r.check, r.message) for r in rows if r.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)] == []
    assert of(rows, "update.rule")


_FAULTS = [(cls, mistake, dtype, trained) for cls, dtype, trained in _SIX for mistake in cls.mistakes]


@pytest.mark.sampled("cls,mistake", "cls,dtype", "cls,trained")
@pytest.mark.parametrize(("cls", "mistake", "dtype", "trained"), _FAULTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_planted_fault_is_caught(cls: Any, mistake: str, dtype: torch.dtype, trained: bool) -> None:
    rows = _audited(cls, mistake, dtype, trained=trained)
    caught = [r for r in rows if r.outcome is Outcome.FAIL and r.check in ("update.rule", "optimizer.probe")]
    # Two fresh steps of Lion seldom tell one beta from another: the probe's eight do. Muon's iteration in bfloat16
    # scatters more on random matrices than a shape's factor of 1.19: the real steps show it.
    assert caught
    assert all("expect={'optimizer_rule'" in r.message for r in caught)
