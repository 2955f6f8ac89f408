"""No pass while a claim is open; no pass without a learning signal; what a step measures or sets itself is its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import AuditReport, Outcome, Phase, Recipe, audit
from audits.outcomes import Coverage, ResultRow, Severity, decisive, open_claims, verdict

DTYPES = (torch.float32, torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.first(x))))


def subject(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Net().to(dtype), {"x": torch.randn(8, 6, dtype=dtype), "y": torch.arange(8) % 3}


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def report(model: nn.Module, batch: Any, *, loss: Any = classify, **more: Any) -> AuditReport:
    if "phases" not in more:
        more = {"loss": loss, "optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
                **more}  # fmt: skip
    return audit(model, Recipe.capture(model, batch=batch, **more), device="cpu")


def found(result: AuditReport, check: str) -> set[Outcome]:
    return {row.outcome for row in result.rows if row.check == check}


def test_step_that_raises_the_second_time_is_no_pass() -> None:
    model, batch = subject()

    def step(model: nn.Module, batch: Any, context: Any) -> None:
        optimizer = context.optimizer
        if optimizer.state:
            raise RuntimeError("out of data")
        optimizer.zero_grad()
        classify(model, batch).backward()
        optimizer.step()

    result = report(model, batch, step=step, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "training step 2 raised RuntimeError: out of data" in result.headline


def test_loss_times_zero_is_no_pass() -> None:
    model, batch = subject()
    result = report(model, batch, loss=lambda m, b: classify(m, b) * 0.0)
    assert result.outcome is Outcome.INCONCLUSIVE
    assert result.coverage == 0.0


@pytest.mark.parametrize("method", ["auto", "exact", "probe"])
def test_confirmed_zero_gradients_are_no_coverage(method: str) -> None:
    """The loss varies with an input that no parameter touches, so the finite differences are there, and zero."""
    from audits.settings import AuditSettings

    model, batch = subject()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return batch["x"].square().mean() + 0.0 * classify(model, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)
    result = audit(model, recipe, settings=AuditSettings(method=method), device="cpu")
    assert result.outcome is Outcome.INCONCLUSIVE
    assert result.coverage == 0.0


class Adapted(nn.Module):
    """A trainable copy of a frozen layer; a wrong forward still calls the original."""

    def __init__(self, *, bypassed: bool) -> None:
        super().__init__()
        self.original = nn.Linear(6, 8)
        self.trained = copy.deepcopy(self.original)
        self.original.requires_grad_(False)
        self.head = nn.Linear(8, 3)
        self.bypassed = bypassed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh((self.original if self.bypassed else self.trained)(x)))


@pytest.mark.parametrize("bypassed", [False, True])
def test_declared_trainable_parameters_without_gradient_fail(bypassed: bool) -> None:
    _, batch = subject()
    result = report(Adapted(bypassed=bypassed), batch, expect={"trainable": ["trained.*", "head.*"]})
    assert result.outcome is (Outcome.FAIL if bypassed else Outcome.PASS)
    if bypassed:
        assert result.failed_checks == ["step.gradient-present"]
        assert result.failed_parameters == ["trained.weight", "trained.bias"]


def test_undeclared_copy_without_gradient_is_no_pass() -> None:
    _, batch = subject()
    assert report(Adapted(bypassed=True), batch).outcome is Outcome.INCONCLUSIVE


class Critic(nn.Module):
    """A Wasserstein critic and its generator: the critic's last bias has the derivative 1 - 1 = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(4, 6)
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def critic_loss(model: Any, batch: Any) -> torch.Tensor:
    real, fake = batch["x"].clone().requires_grad_(), model.generator(batch["z"]).detach()
    score = model.critic(real)
    slope = torch.autograd.grad(score.sum(), real, create_graph=True)[0]
    return model.critic(fake).mean() - score.mean() + 10 * (slope.norm(dim=1) - 1).square().mean()


def generator_loss(model: Any, batch: Any) -> torch.Tensor:
    return -model.critic(model.generator(batch["z"])).mean()


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
def test_gradient_penalty_of_an_earlier_phase_is_evaluated(dtype: torch.dtype, own: bool) -> None:
    torch.manual_seed(0)
    model = Critic().to(dtype)
    batch = {"x": torch.randn(8, 6, dtype=dtype), "z": torch.randn(8, 4, dtype=dtype)}
    losses = {"critic": critic_loss, "generator": generator_loss}

    def step(model: nn.Module, batch: Any, context: Any) -> None:
        for name, loss in losses.items():
            context.optimizers[name].zero_grad()
            loss(model, batch).backward()
            context.optimizers[name].step()

    def forgetful(model: nn.Module, batch: Any, context: Any) -> None:
        for name, loss in losses.items():
            context.optimizers[name].zero_grad() if name == "critic" else None
            loss(model, batch).backward()
            context.optimizers[name].step()

    def result_of(chosen: Any) -> AuditReport:
        phases = [Phase(n, loss=losses[n], optimizer=torch.optim.Adam(getattr(model, n).parameters())) for n in losses]
        return report(model, batch, phases=phases, step=chosen)

    result = result_of(step if own else None)
    assert result.outcome is Outcome.PASS, result.headline
    assert result.coverage == 1.0
    assert result.coverage_of.silent == ("critic.2.bias",)
    assert {r.parameter for r in result.rows if r.cause == "cancels"} == {"critic.2.bias"}  # real less fake
    if own:
        assert result_of(forgetful).failed_checks == ["step.gradient"]


def test_measuring_in_eval_mode_is_no_training_in_eval_mode() -> None:
    model, batch = subject()

    def measuring(model: nn.Module, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        classify(model, batch).backward()
        context.optimizer.step()
        model.eval()
        with torch.no_grad():
            classify(model, batch)
        classify(model, batch)  # without no_grad it leads to no gradient either
        model.train()

    def training(model: nn.Module, batch: Any, context: Any) -> None:
        model.eval()
        context.optimizer.zero_grad()
        classify(model, batch).backward()
        context.optimizer.step()
        model.train()

    assert report(model, batch, step=measuring).outcome is Outcome.PASS
    wrong = report(model, batch, step=training)
    assert wrong.failed_checks == ["step.mode"]
    assert "the model ran in eval mode" in wrong.findings[0].message


def test_frozen_part_in_the_wrong_mode_counts_by_what_it_leads_to() -> None:
    """A backbone without gradients has no gradient of its own, and its mode matters all the same."""
    _, batch = subject()
    model = Adapted(bypassed=True)
    model.original = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)).requires_grad_(False)  # type: ignore[assignment]
    model.trained = nn.Identity()  # type: ignore[assignment]

    def step(model: Any, batch: Any, context: Any) -> None:
        model.original.eval()
        context.optimizer.zero_grad()
        classify(model, batch).backward()
        context.optimizer.step()

    assert "step.mode" in report(model, batch, step=step).failed_checks


def _in_backward(model: nn.Module, batch: Any, step_of: Any, scale: float = 1.0) -> None:
    handles = [p.register_post_accumulate_grad_hook(step_of(n)) for n, p in model.named_parameters()]
    (scale * classify(model, batch)).backward()
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_optimizer_per_parameter_inside_the_backward(dtype: torch.dtype, scale: float) -> None:
    model, batch = subject(dtype)

    def step(model: nn.Module, batch: Any, context: Any) -> None:
        def step_of(name: str) -> Any:
            def hook(parameter: torch.Tensor) -> None:
                context.optimizers[name].step()
                context.optimizers[name].zero_grad()

            return hook

        _in_backward(model, batch, step_of, scale)

    phases = [Phase(n, loss=classify, optimizer=torch.optim.Adam([p], lr=1e-3)) for n, p in model.named_parameters()]
    result = report(model, batch, phases=phases, step=step)
    assert result.failed_checks == ([] if scale == 1.0 else ["step.gradient"])
    assert result.outcome is (Outcome.PASS if scale == 1.0 else Outcome.FAIL)


@pytest.mark.parametrize("skipped", [None, "head.bias"])
def test_one_optimizer_that_steps_as_each_gradient_arrives(skipped: str | None) -> None:
    model, batch = subject()

    def step(model: nn.Module, batch: Any, context: Any) -> None:
        def step_of(name: str) -> Any:
            def hook(parameter: torch.Tensor) -> None:
                if name != skipped:
                    context.optimizer.step()
                parameter.grad = None

            return hook

        _in_backward(model, batch, step_of)

    result = report(model, batch, step=step, optimizer=torch.optim.Adam(model.parameters()))
    if skipped is None:
        assert result.outcome is Outcome.PASS, result.headline
        assert {r.measured for r in result.rows if r.check == "step.count"} == {1.0}
    else:
        assert (result.outcome, set(result.failed_parameters)) == (Outcome.FAIL, {skipped})


def test_optimizer_that_is_not_the_audits_is_stopped_before_it_writes() -> None:
    model, batch = subject()
    live = torch.optim.Adam(model.parameters(), lr=0.05)
    handles = [p.register_post_accumulate_grad_hook(lambda _: live.step()) for p in model.parameters()]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = report(model, batch, optimizer=live, step=lambda m, b, context: classify(m, b).backward())
    for handle in handles:
        handle.remove()
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "use context.optimizers['PHASE']" in result.headline
    assert [r.check for r in result.rows if r.outcome is Outcome.FAIL] == []
    assert not live.state, "the user's optimizer was never asked to step"
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(("expect", "outcome", "rate"), [
    ({}, Outcome.SKIPPED, 0.05), ({"lr": 0.05}, Outcome.PASS, 0.05), ({"lr": {"head.*": 0.05}}, Outcome.PASS, 0.05),
    ({"lr": 0.1}, Outcome.FAIL, 0.05), ({}, Outcome.PASS, 0.1),
])  # fmt: skip
def test_rate_that_the_step_sets_itself(expect: dict[str, Any], outcome: Outcome, rate: float) -> None:
    model, batch = subject()

    def step(model: nn.Module, batch: Any, context: Any) -> None:
        for group in context.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        context.optimizer.zero_grad()
        classify(model, batch).backward()
        context.optimizer.step()

    heads = torch.optim.SGD([{"params": list(model.head.parameters())},  # type: ignore[union-attr]
                             {"params": [*model.first.parameters(), *model.norm.parameters()]}], lr=0.1)  # type: ignore[union-attr]  # fmt: skip
    result = report(model, batch, step=step, expect=expect, optimizer=heads)
    assert found(result, "step.learning-rate") >= {outcome}
    assert result.outcome is (Outcome.FAIL if outcome is Outcome.FAIL else Outcome.PASS), result.headline


def row(check: str, outcome: Outcome, parameter: str | None = None, **more: Any) -> ResultRow:
    return ResultRow(check=check, outcome=outcome, parameter=parameter, **more)


FULL = Coverage(tensors=1.0, elements=1.0, unresolved=())
CLAIMS = ("registration.coverage", "gradient.finite-difference", "step.gradient", "update.rule")
JUDGED = [row(check, Outcome.PASS, n) for n in "abcd" for check in CLAIMS]


@pytest.mark.parametrize(("extra", "outcome"), [
    ([], Outcome.PASS),
    ([row("update.rule", Outcome.INCONCLUSIVE)], Outcome.INCONCLUSIVE),
    ([row("audit.completed", Outcome.INCONCLUSIVE)], Outcome.INCONCLUSIVE),
    ([row("audit.completed", Outcome.INCONCLUSIVE, severity=Severity.WARN)], Outcome.PASS),
    ([row("step.gradient", Outcome.INCONCLUSIVE, "e")], Outcome.INCONCLUSIVE),
    ([row("step.gradient", Outcome.INCONCLUSIVE, "a")], Outcome.PASS),
    ([row("buffers.ema", Outcome.INCONCLUSIVE)], Outcome.WARN),
    ([row("registration.requires-grad", Outcome.INCONCLUSIVE)], Outcome.WARN),
    ([row("update.rule", Outcome.SKIPPED)], Outcome.PASS),
], ids=["none", "step raised", "part stopped", "health stopped", "gradient open", "settled by another step", "buffer",
        "declaration", "skipped"])  # fmt: skip
def test_open_claims_and_the_verdict(extra: list[ResultRow], outcome: Outcome) -> None:
    assert verdict([*JUDGED, *extra], FULL) is outcome


def test_few_open_gradients_of_many_warn() -> None:
    many = [row(r.check, r.outcome, f"{r.parameter}{i}") for r in JUDGED for i in range(10)]
    one = row("step.gradient", Outcome.INCONCLUSIVE, "z")
    assert verdict([*many, one], FULL) is Outcome.WARN
    assert open_claims([*many, one]) == [one]
    assert decisive([*many, one]) == []
