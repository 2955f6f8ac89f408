"""Training steps as they are run and recorded: contexts, retries, candidates, narrowing, leaving no trace."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from audits.checks import CHECKS
from audits.live.subject import open_subject
from audits.outcomes import Outcome
from audits.recipe.phases import Phase
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from audits.updates import check_updates
from audits.updates.audit import worst
from tests.audits.updates.subjects import audited, failed, of
from tests.wrong_on_purpose.updates import models


def _mlp_case(**more: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, batch = models.mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer, **more}


def test_the_checks_are_those_of_the_design() -> None:
    families = {check.family for check in CHECKS.values()}
    assert families >= {"registration", "step", "update", "optimizer", "buffers"}


def test_every_row_is_of_a_known_check_and_says_something() -> None:
    model, arguments = _mlp_case()
    for r in audited(model, **arguments):
        assert r.check in CHECKS
        assert len(r.message) > 10
        if r.parameter:
            assert r.numel is not None
            assert r.module is not None


def test_what_only_our_own_step_could_get_wrong_is_skipped() -> None:
    model, arguments = _mlp_case(clip_grad_norm=1.0)
    rows = audited(model, **arguments)
    for check in ("step.clipping", "step.count", "step.mode", "step.learning-rate"):
        assert [(r.outcome, r.cause) for r in of(rows, check)] == [(Outcome.SKIPPED, "canonical step")]


def test_settings_narrow_checks_and_parameters() -> None:
    model, arguments = _mlp_case()
    settings = AuditSettings(checks=("update.rule",), parameters=("head.*",))
    rows = audited(model, settings, **arguments)
    assert {r.check for r in rows} == {"update.rule"}
    assert {r.parameter for r in rows} == {"head.weight", "head.bias"}


def test_model_is_left_as_it_was() -> None:
    model, batch = models.conv()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    models.train(model, batch, models.classify, optimizer)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    live = {p: {k: v.clone() for k, v in s.items() if v is not None} for p, s in optimizer.state.items()}
    state = torch.get_rng_state()

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(m, b).backward()
        m.head.weight = nn.Parameter(m.head.weight.detach().clone())
        context.optimizer.step()

    audited(model, batch=batch, loss=models.classify, optimizer=optimizer, step=step)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, live[p][k]) for p, s in optimizer.state.items() for k, v in s.items() if v is not None)
    assert dict(model.named_parameters())["head.weight"] is optimizer.param_groups[0]["params"][-2]


def test_overflow_of_the_scaled_loss_is_tried_again_at_a_smaller_scale() -> None:
    model, batch = models.mlp()
    scales: list[float] = []

    def loss(m: Any, b: Any) -> torch.Tensor:
        return models.classify(m, b) * 50.0

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            value = loss(m, b)
        scales.append(context.scaler.get_scale())
        context.scaler.scale(value).backward()
        context.scaler.step(context.optimizer)
        context.scaler.update()

    rows = audited(model, batch=batch, loss=loss, step=step, precision="fp16-autocast",
                   optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))  # fmt: skip
    assert failed(rows) == []
    assert scales[0] > scales[-1]
    assert {r.outcome for r in of(rows, "step.count")} == {Outcome.PASS}


def test_step_that_raises_is_open_not_a_fault() -> None:
    def step(m: Any, b: Any, context: Any) -> None:
        raise KeyError("learning_rate")

    model, arguments = _mlp_case(step=step)
    rows = audited(model, **arguments)
    assert failed(rows) == []
    assert "KeyError" in next(r.message for r in of(rows, "update.rule") if r.cause == "step raised")


@pytest.mark.parametrize("phase", ["before the optimizer", "inside it", "after it"])
def test_nothing_a_raising_step_half_did_is_judged(phase: str) -> None:
    """An optimizer step that ended before it is judged; writes, frozen tensors and buffers of half a step are not."""

    class Breaking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(0.5)
            raise RuntimeError("half of it")

    model, batch = models.conv()
    model.head.bias.requires_grad_(False)
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = Breaking(held, lr=0.1) if phase == "inside it" else torch.optim.SGD(held, lr=0.1)

    def half_done(m: Any) -> None:
        with torch.no_grad():
            m.head.bias.add_(1.0)
            m.head.weight.mul_(0.5)
            m.norm.running_mean.add_(1.0)
        raise RuntimeError("half of it")

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(m, b).backward()
        if phase == "before the optimizer":
            half_done(m)
        context.optimizer.step()
        half_done(m)

    rows = audited(model, batch=batch, loss=models.classify, step=step, optimizer=optimizer,
                   expect={"optimizer": "SGD", "frozen": ["head.bias"]})  # fmt: skip
    assert [r for r in rows if r.outcome is Outcome.FAIL and r.check not in ("optimizer.probe",)] == []
    (raised,) = [r for r in rows if r.cause == "step raised"]
    assert raised.outcome is Outcome.INCONCLUSIVE
    assert raised.message == "training step 1 raised RuntimeError: half of it"
    passed = {r.parameter for r in of(rows, "update.rule") if r.outcome is Outcome.PASS and r.step == 1}
    assert passed == ({n for n, p in model.named_parameters() if p.requires_grad} if phase == "after it" else set())


def test_an_optimizer_step_that_ended_is_judged_though_the_training_step_raised_after_it() -> None:
    model, batch = models.mlp()

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        (2 * models.classify(m, b)).backward()
        context.optimizer.step()
        raise RuntimeError("after it")

    rows = audited(
        model, batch=batch, loss=models.classify, step=step, optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )
    assert {n for c, n in failed(rows) if c == "step.gradient"} == {n for n, _ in model.named_parameters()}


def test_scripted_parts_are_audited() -> None:
    class Piece(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        piece = torch.jit.script(Piece())
    model = nn.Sequential(nn.Linear(6, 8), piece, nn.Linear(8, 3))
    _, batch = models.mlp()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "update.rule")} == {Outcome.PASS}


def test_schedule_that_starts_at_zero_is_entered_at_its_first_positive_rate() -> None:
    model, batch = models.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 10)

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(m, b).backward()
        context.optimizer.step()
        context.scheduler.step()

    arguments = {"batch": batch, "loss": models.classify, "optimizer": optimizer, "scheduler": scheduler}
    for more in ({}, {"step": step}):
        rows = audited(model, **arguments, **more)
        assert failed(rows) == []
        assert {r.outcome for r in of(rows, "update.rule", "head.weight")} == {Outcome.PASS}
    rates = of(rows, "step.learning-rate")
    assert {r.outcome for r in rates} == {Outcome.PASS}


def test_scheduler_that_runs_once_per_epoch_is_open() -> None:
    model, batch = models.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(m, b).backward()
        context.optimizer.step()

    rows = audited(model, batch=batch, loss=models.classify, optimizer=optimizer, scheduler=scheduler, step=step)
    assert failed(rows) == []
    assert {r.cause for r in of(rows, "step.learning-rate")} == {"not stepped"}


def test_undeclared_clipping_warns_and_its_gradient_is_compared_clipped() -> None:
    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(m, b).backward()
        nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        context.optimizer.step()

    model, arguments = _mlp_case(step=step)
    rows = audited(model, **arguments)
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "step.clipping")} == {Outcome.WARN}


def test_all_backwards_before_all_steps_is_healthy() -> None:
    """Actor and critic: gradients of both are computed before either moves."""
    model, batch = models.mlp()
    trunk, head = [*model.first.parameters(), *model.second.parameters()], list(model.head.parameters())
    phases = [Phase("trunk", loss=models.classify, optimizer=torch.optim.SGD(trunk, lr=0.1)),
              Phase("head", loss=models.classify, optimizer=torch.optim.SGD(head, lr=0.1))]  # fmt: skip

    def step(m: Any, b: Any, context: Any) -> None:
        m.zero_grad()
        models.classify(m, b).backward()
        for optimizer in context.optimizers.values():
            optimizer.step()

    rows = audited(model, batch=batch, phases=phases, step=step)
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "step.gradient", "head.weight")} == {Outcome.PASS}


def test_random_draws_before_the_loss_are_replayed() -> None:
    model, batch = models.vae()

    def step(m: Any, b: Any, context: Any) -> None:
        torch.rand(3)  # an augmentation that the declared loss knows nothing of
        context.optimizer.zero_grad()
        models.evidence_bound(m, b).backward()
        context.optimizer.step()

    rows = audited(model, batch=batch, loss=models.evidence_bound, step=step,
                   optimizer=torch.optim.SGD(model.parameters(), lr=0.1))  # fmt: skip
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "step.gradient", "encoder.weight")} == {Outcome.PASS}


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_closures_and_tensor_rates_are_recorded(options: dict[str, Any]) -> None:
    model, batch = models.mlp()

    def step(m: Any, b: Any, context: Any) -> None:
        def closure() -> torch.Tensor:
            context.optimizer.zero_grad()
            value = models.classify(m, b)
            value.backward()
            return value

        context.optimizer.step(closure)

    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3), **options)
    rows = audited(model, batch=batch, loss=models.classify, optimizer=optimizer, step=step)
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "step.gradient")} == {Outcome.PASS}
    assert {r.outcome for r in of(rows, "update.rule")} == {Outcome.PASS}


def test_fault_of_the_build_is_told_from_a_fault_of_the_model() -> None:
    """CPU fused SGD skips blocks of low-precision weights in torch 2.13 (pytorch#191763)."""
    model, batch = models.mlp()
    model, batch = model.bfloat16(), {"x": batch["x"].bfloat16(), "y": batch["y"]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    rows = audited(model, batch=batch, loss=models.classify, optimizer=optimizer)
    if not failed(rows):
        pytest.skip(f"torch {torch.__version__} has no such fault")
    assert {r.cause for r in rows if r.outcome is Outcome.FAIL} == {"environment"}
    assert "plain loop" in of(rows, "optimizer.probe")[0].message


def test_unknown_optimizer_is_held_to_relations() -> None:
    from tests.wrong_on_purpose.updates.foreign import Foreign

    model, batch = models.mlp()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=Foreign(model.parameters()))
    assert failed(rows) == []
    relations = "relations, no reference rule"
    assert [(r.outcome, r.cause) for r in of(rows, "optimizer.invariants")] == [(Outcome.PASS, relations)]
    assert {(r.outcome, r.cause) for r in of(rows, "update.rule")} == {(Outcome.PASS, relations)}


def test_zero_sized_scalar_and_complex_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.none = nn.Parameter(torch.zeros(0, 3))
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def loss(m: Any, b: Any) -> torch.Tensor:
        return (m.scale * (m.phase * b["x"]).abs().square().sum() + m.none.sum()) * 0.1

    torch.manual_seed(0)
    for make in (torch.optim.Adam, torch.optim.SGD):
        model = Odd()
        rows = audited(model, batch={"x": torch.randn(4)}, loss=loss, optimizer=make(model.parameters(), lr=1e-2))
        assert failed(rows) == []
        assert {r.outcome for r in of(rows, "update.rule", "phase")} == {Outcome.PASS}
        assert {r.outcome for r in of(rows, "update.rule", "scale")} == {Outcome.PASS}


def test_failure_that_a_second_seed_does_not_show_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = _mlp_case()
    recipe = Recipe.capture(model, **arguments)
    seeds: list[int] = []

    def flaky(m: Any, b: Any) -> torch.Tensor:
        value = models.classify(m, b)
        return value * (float("nan") if torch.initial_seed() == seeds[0] else 1.0)

    with open_subject(model, recipe, device="cpu") as subject:
        seeds.append(subject.seed)
        for phase in subject.phases:
            monkeypatch.setattr(phase, "loss_function", flaky)
        rows = check_updates(subject)
    assert failed(rows) == []
    assert {(r.outcome, r.cause) for r in of(rows, "step.loss-finite")} == {(Outcome.INCONCLUSIVE, "not reproduced")}


def test_worst_row_of_the_steps_is_kept() -> None:
    model, arguments = _mlp_case()
    rows = audited(model, **arguments)
    assert worst(rows) == rows
    assert len(of(rows, "update.finite", "head.bias")) == 1


def test_declared_writes_outside_the_optimizer_only_warn() -> None:
    """A critic whose weights are clipped after every step, as in the first Wasserstein GANs."""

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(m, b).backward()
        context.optimizer.step()
        for parameter in m.parameters():
            parameter.data.clamp_(-0.05, 0.05)

    model, arguments = _mlp_case(step=step)
    assert ("update.outside-step", "first.weight") in failed(audited(model, **arguments))
    model, arguments = _mlp_case(step=step, expect={"writes_outside_step": True})
    rows = audited(model, **arguments)
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "update.outside-step", "first.weight")} == {Outcome.WARN}


def test_schedule_that_has_ended_is_audited_at_its_initial_rate() -> None:
    model, batch = models.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0 if k else 1.0)
    models.train(model, batch, models.classify, optimizer, 1)
    scheduler.step()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=optimizer, scheduler=scheduler)
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "update.rule", "head.weight")} == {Outcome.PASS}


def test_batch_norm_of_ones_own_is_open() -> None:
    class Ghost(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(2)])

    model, batch = models.conv()
    model.norm = Ghost(4)
    rows = audited(model, batch=batch, loss=models.classify, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert failed(rows) == []
    assert {(r.outcome, r.cause) for r in of(rows, "buffers.batch-norm")} == {(Outcome.INCONCLUSIVE, "own class")}


def test_large_models_are_judged_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def outcomes() -> list[tuple[Any, ...]]:
        model, batch = models.gpt()
        optimizer = torch.optim.AdamW(model.bfloat16().parameters(), weight_decay=0.1)
        rows = audited(model, batch=batch, loss=models.next_token, optimizer=optimizer)
        return [(r.step, r.parameter, r.outcome, r.lane, r.error) for r in of(rows, "update.rule")]

    whole = outcomes()
    monkeypatch.setattr("audits.updates.judge.replay.PART", 300)
    assert sorted(outcomes(), key=str) == sorted(whole, key=str)


def test_optimizer_that_only_works_on_its_own_tensors_is_open_not_a_crash() -> None:
    class Picky(torch.optim.SGD):
        """Has a kernel for float32 tensors of the model's shapes only."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.dtype is not torch.float32 or p.shape[0] not in (3, 16):
                        raise NotImplementedError("kernel")
                    if p.grad is not None:
                        p.data.add_(p.grad, alpha=-group["lr"])

    model, batch = models.mlp()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=Picky(model.parameters(), lr=0.1),
                   expect={"optimizer": "SGD"})  # fmt: skip
    assert failed(rows) == []
    assert {r.cause for r in of(rows, "optimizer.probe")} == {"probe raised"}
    assert {r.outcome for r in of(rows, "update.rule", "head.weight")} == {Outcome.PASS}


def test_own_class_with_other_option_names_has_no_rule() -> None:
    class Renamed(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 1e-3, beta1: float = 0.9) -> None:
            super().__init__(params, {"lr": lr, "beta1": beta1})

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.sub_(group["lr"] * p.grad.sign())

    model, batch = models.mlp()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=Renamed(model.parameters()),
                   expect={"optimizer": "Adam"})  # fmt: skip
    assert failed(rows) == []
    assert {r.cause for r in of(rows, "update.rule")} == {"relations, no reference rule"}
