"""Optimizers, schedulers and phases as people hand them over: looked through where right, else told the cure."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import audits
from audits import Phase, Recipe, RecipeError
from audits.outcomes import Outcome

SGD, StepLR = torch.optim.SGD, torch.optim.lr_scheduler.StepLR


class Larc:
    """What apex's LARC is: no Optimizer, and gradients are changed before the inner step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups, self.optim = optimizer.param_groups, optimizer

    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(min(0.02 * float(p.norm() / p.grad.norm()) / group["lr"], 1.0))
        self.optim.step()


class Sam(torch.optim.Optimizer):
    """The usual SAM: an ascent, then the base optimizer's step from the old weights."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def first_step(self) -> None: ...

    def second_step(self) -> None:
        self.base_optimizer.step()


class Lookahead(torch.optim.Optimizer):
    """An Optimizer around an Optimizer that is not built from parameters."""

    def __init__(self, base: torch.optim.Optimizer, k: int = 6) -> None:
        self.base, self.k = base, k
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, base.state

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


class Owner(torch.optim.Optimizer):
    """Holds an optimizer that it makes itself: it can be built anew, and nothing is refused."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = SGD(self.param_groups, lr=lr)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def _trained() -> tuple[nn.Linear, torch.optim.SGD]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, SGD(model.parameters(), lr=0.01, momentum=0.9)


def _batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(8, width, generator=generator).to(dtype) for name, width in (("x", 3), ("y", 2))}


def _report(model: nn.Module, batch: Any = None, **arguments: Any) -> audits.AuditReport:
    recipe = Recipe.capture(model, batch=batch or _batch(), **{"loss": "mse_loss", **arguments})
    return audits.audit(model, recipe, device="cpu")


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate", reason="accelerate is not installed")
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield module
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_accelerates_prepared_objects_are_looked_through(accelerate: Any, dtype: torch.dtype) -> None:
    model, optimizer = _trained()
    model = model.to(dtype)
    scheduler = StepLR(optimizer, 1, 0.5)
    prepared = accelerate.Accelerator(cpu=True).prepare(model, optimizer, scheduler)
    recipe = Recipe.capture(prepared[0], batch=_batch(dtype), loss="mse_loss", optimizer=prepared[1],
                            scheduler=prepared[2])  # fmt: skip
    phase = recipe.phases[0]
    assert phase.optimizer.class_path == "torch.optim.SGD"
    assert phase.scheduler is not None
    assert phase.scheduler.class_path == "torch.optim.lr_scheduler.StepLR"
    assert [rates[0] for rates in phase.scheduler.learning_rates[:3]] == [0.01, 0.005, 0.0025]
    report = audits.audit(prepared[0], recipe, device="cpu")
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0)


def test_a_scheduler_built_on_the_prepared_optimizer_is_that_optimizers(accelerate: Any) -> None:
    model, optimizer = _trained()
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    report = _report(model, optimizer=prepared, scheduler=StepLR(prepared, 1, 0.5))
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0)


@pytest.mark.parametrize("precision", ["native", "bf16-autocast"])
def test_a_forward_that_accelerate_patched_is_audited_as_it_is(accelerate: Any, precision: str) -> None:
    model, optimizer = _trained()
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model, optimizer)
    assert "forward" in vars(prepared[0])
    report = _report(prepared[0], optimizer=prepared[1], precision=precision)
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0)


def _accumulating(accelerator: Any, wrong: bool) -> Any:
    def step(model: Any, batches: Any, context: Any) -> None:
        for batch in batches:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(batch["x"]), batch["y"])
                accelerator.backward(loss * (2.0 if wrong else 1.0))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1 if not wrong else 1e9)
                context.optimizer.step()
                context.scheduler.step()
                context.optimizer.zero_grad()

    return step


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_a_step_function_may_accumulate_with_accelerate(accelerate: Any, wrong: bool) -> None:
    model, optimizer = _trained()
    scheduler = StepLR(optimizer, 1, 0.5)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    halves = [{k: v[i : i + 4] for k, v in _batch().items()} for i in (0, 4)]
    report = _report(model, halves, optimizer=optimizer, scheduler=scheduler, clip_grad_norm=0.1,
                     step=_accumulating(accelerator, wrong))  # fmt: skip
    failing = {row.check for row in report.rows if row.outcome is Outcome.FAIL}
    if wrong:
        assert "step.clipping" in failing
    else:
        assert (report.outcome, report.coverage, failing) == (Outcome.PASS, 1.0, set())
    resolved = {row.check for row in report.rows if row.outcome is Outcome.PASS}
    assert wrong or {"step.count", "step.clipping", "step.learning-rate", "step.gradient"} <= resolved


def test_a_step_function_that_steps_the_live_optimizer_is_stopped_before_it_does(accelerate: Any) -> None:
    model, optimizer = _trained()
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())

    def step(m: Any, batch: Any, context: Any) -> None:
        accelerator.backward(nn.functional.mse_loss(m(batch["x"]), batch["y"]))
        prepared.step()

    report = _report(model, optimizer=prepared, step=step)
    assert report.outcome is Outcome.INCONCLUSIVE
    assert any("use context.optimizers" in row.message for row in report.rows if row.cause == "step raised")
    assert optimizer.state_dict() == before


@pytest.mark.slow
def test_lightnings_optimizer_is_looked_through() -> None:
    optimizers = pytest.importorskip("lightning.pytorch.core.optimizer", reason="lightning is not installed")
    model, optimizer = _trained()
    report = _report(model, optimizer=optimizers.LightningOptimizer(optimizer),
                     scheduler={"scheduler": StepLR(optimizer, 1), "interval": "step"})  # fmt: skip
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabrics_module_and_optimizer_are_looked_through(precision: Any) -> None:
    fabric = pytest.importorskip("lightning.fabric", reason="lightning is not installed")
    model, optimizer = _trained()
    wrapped = fabric.Fabric(accelerator="cpu", devices=1, precision=precision).setup(model, optimizer)
    recipe = Recipe.capture(wrapped[0], batch=_batch(), loss="mse_loss", optimizer=wrapped[1])
    assert recipe.phases[0].optimizer.names == ("weight", "bias")
    assert recipe.precision == ("native" if precision == "32-true" else "bf16-autocast")
    report = audits.audit(wrapped[0], recipe, device="cpu")
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0)


@pytest.mark.parametrize(
    ("wrap", "texts"),
    [
        (Larc, ("is larc, which wraps SGD in .optim", "optimizer=larc.optim", "what Larc adds is then not audited")),
        (lambda o: Sam(o.param_groups, SGD, lr=0.1), ("is Sam", "steps twice", "optimizer=sam.base_optimizer")),
        (Lookahead, ("is Lookahead", "optimizer=lookahead.base", "SGD's own rule")),
    ],
    ids=["larc", "sam", "lookahead"],
)
def test_a_wrapper_that_changes_the_step_is_refused_with_its_cure(wrap: Any, texts: tuple[str, ...]) -> None:
    model, optimizer = _trained()
    wrapper = wrap(optimizer)
    with pytest.raises(RecipeError) as caught:
        Recipe.capture(model, batch=_batch(), loss="mse_loss", optimizer=wrapper)
    for text in texts:
        assert text.lower() in str(caught.value).lower()
    inner = next(v for v in vars(wrapper).values() if isinstance(v, torch.optim.Optimizer))
    assert (lambda r: (r.outcome, r.coverage))(_report(model, optimizer=inner)) == (Outcome.PASS, 1.0)


def test_an_optimizer_that_makes_its_own_inner_one_is_not_refused() -> None:
    model, _ = _trained()
    report = _report(model, optimizer=Owner(model.parameters()))
    assert all(row.outcome is not Outcome.FAIL for row in report.rows)
    assert all(row.check != "audit.completed" for row in report.rows)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda m, o: None, "give the live optimizer|needs loss= and optimizer="),
        (lambda m, o: SGD, r"is the class SGD: build it, SGD\(...\)"),
        (lambda m, o: functools.partial(SGD, lr=0.1), "is a function that makes an optimizer: pass the optimizer"),
        (lambda m, o: lambda p: SGD(p, lr=0.1), "is a function that makes an optimizer"),
        (lambda m, o: "AdamW", r"is the text 'AdamW': pass the live optimizer; .*expect=\{'optimizer': 'AdamW'\}"),
        (lambda m, o: [o], "is a list of 1: pass the optimizer in it"),
        (lambda m, o: [o, o], "is a list of 2: give each optimizer its phase"),
        (lambda m, o: {"a": o, "b": o}, "is a dict of 2: give each optimizer its phase"),
        (lambda m, o: o.state_dict(), "is a state_dict: pass the optimizer itself"),
        (lambda m, o: StepLR(o, 1), "is the scheduler StepLR: pass optimizer=scheduler.optimizer"),
        (lambda m, o: m, "is the module Linear: pass the optimizer that trains it"),
        (lambda m, o: m.parameters(), "is a generator, which is not a torch.optim.Optimizer and has no param_groups"),
        (lambda m, o: torch.amp.GradScaler("cpu"), "is a GradScaler, which is not a torch.optim.Optimizer"),
    ],
)
def test_what_is_no_optimizer_is_named_with_its_cure(make: Any, text: str) -> None:
    model, optimizer = _trained()
    with pytest.raises(RecipeError, match=text):
        Recipe.capture(model, batch=_batch(), loss="mse_loss", optimizer=make(model, optimizer))
    if make(model, optimizer) is not None:
        with pytest.raises(RecipeError, match=f"optimizer= of phase 'a' .*{text}"):
            Recipe.capture(
                model, batch=_batch(), phases=[Phase("a", loss="mse_loss", optimizer=make(model, optimizer))]
            )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: [None], r"phases\[0\] is None, not a Phase: give a list"),
        (lambda p: [p, "b"], r"phases\[1\] is a str, not a Phase"),
        (lambda p: p, "is a Phase: give a list"),
        (lambda p: {"a": p}, "is a dict of 1: give a list"),
        (lambda p: 3, "is an int: give a list"),
        (lambda p: [], "at least one phase"),
        (lambda p: [Phase("a", loss=None, optimizer=p.optimizer)], "loss of phase 'a' must be a callable"),
        (lambda p: [Phase("a", loss="mse_loss", optimizer=None)], "optimizer= of phase 'a' is None"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_list_of_phases_is_named_with_its_cure(make: Any, text: str) -> None:
    model, optimizer = _trained()
    phase = Phase("a", loss="mse_loss", optimizer=optimizer)
    with pytest.raises(RecipeError, match=text):
        Recipe.capture(model, batch=_batch(), phases=make(phase))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda o: o, "is the optimizer SGD: pass it as optimizer="),
        (lambda o: StepLR, "is the class StepLR: build it"),
        (lambda o: [StepLR(o, 1)], "is a list of 1: pass the one scheduler"),
        (lambda o: lambda k: 1.0, "is a function, which drives no optimizer"),
        (lambda o: "cosine", "is a str, which drives no optimizer"),
        (lambda o: StepLR(SGD(o.param_groups[0]["params"], lr=1.0), 1), "drives another optimizer"),
    ],
)
def test_what_is_no_scheduler_of_this_optimizer_is_named_with_its_cure(make: Any, text: str) -> None:
    model, optimizer = _trained()
    with pytest.raises(RecipeError, match=text):
        Recipe.capture(model, batch=_batch(), loss="mse_loss", optimizer=optimizer, scheduler=make(optimizer))
