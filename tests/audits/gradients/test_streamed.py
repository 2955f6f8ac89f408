"""The gradient part on a model whose tensors are too large to be held: the same verdicts, and nothing model-sized."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from audits import AuditSettings, Outcome, Recipe, audit
from audits.lanes import directions
from audits.lanes.arithmetic import PIECE
from audits.lanes.directions import LEVEL, Given, Random, Unit, held_names, values_of
from audits.lanes.evaluation import Point
from audits.lanes.lifted_loss import lifted_loss
from audits.live.subject import open_subject


def _net(dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(40, 300), nn.LayerNorm(300), nn.ReLU(), nn.Linear(300, 260), nn.Tanh(),
                        nn.Linear(260, 5)).to(dtype)  # fmt: skip
    with torch.no_grad():
        net[5].bias.zero_()
    return net, {"x": torch.randn(16, 40, dtype=dtype), "y": torch.randint(0, 5, (16,))}


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(batch["x"])
    return nn.functional.cross_entropy(logits.float() if logits.dtype is torch.bfloat16 else logits, batch["y"])


def _report(model: nn.Module, batch: dict[str, torch.Tensor], method: str = "probe") -> dict[str, object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=_loss, optimizer=optimizer)
    settings = AuditSettings(checks=("gradient.*",), method=method)
    report = audit(model, recipe, settings=settings, device="cpu")
    return {f"{r.check} {r.parameter or (r.module, r.message[:40])}": r for r in report.rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_the_same_whether_tensors_are_held_or_not(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held tensors go the old way: theta, gradient and direction each a tensor of the model's size."""
    held = _report(*_net(dtype))
    monkeypatch.setattr(directions, "HELD_ELEMENTS", 0)
    streamed = _report(*_net(dtype))
    assert held.keys() == streamed.keys()
    for key, one in held.items():
        other = streamed[key]
        assert other.outcome == one.outcome, key
        assert (other.cause, other.threshold is None) == (one.cause, one.threshold is None)
        if one.parameter is None:
            continue
        for field in ("measured", "expected", "parameter_norm", "gradient_norm"):
            assert getattr(other, field) == pytest.approx(getattr(one, field), rel=1e-9, abs=1e-14), (key, field)
        # the noise is measured anew: a bound is as large within the noise's own scatter
        assert other.detection_limit == pytest.approx(one.detection_limit, rel=0.9)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_in_one_large_tensor_is_named(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if streamed:
        monkeypatch.setattr(directions, "HELD_ELEMENTS", 0)
    model, batch = _net(torch.float32)
    model[3].weight.register_hook(lambda g: g * 1.001)
    rows = _report(model, batch)
    failing = [k for k, r in rows.items() if r.outcome is Outcome.FAIL]
    assert failing == ["gradient.finite-difference 3.weight"]


@pytest.mark.parametrize("streamed", [False, True])
def test_one_flipped_sign_is_found_in_a_tensor_that_is_not_held(
    streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(directions, "HELD_ELEMENTS", 0)
    model, batch = _net(torch.float32)

    def flipped(gradient: torch.Tensor) -> torch.Tensor:
        wrong = gradient.clone()
        wrong.view(-1)[777] *= -1
        return wrong

    model[5].weight.register_hook(flipped)
    row = _report(model, batch)["gradient.finite-difference 5.weight"]
    assert row.outcome is Outcome.FAIL
    assert "element 777" in row.message


def test_gradients_that_come_in_parts_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reentrant checkpoint runs a backward within the backward: a shared weight's gradient comes twice."""
    monkeypatch.setattr(directions, "HELD_ELEMENTS", 0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).tanh()
            for _ in range(3):
                x = checkpoint(lambda x: self.shared(x).tanh(), x, use_reentrant=True)
            return self.last(x)

    torch.manual_seed(0)
    model, batch = Twice(), {"x": torch.randn(7, 6), "y": torch.randint(0, 5, (7,))}
    rows = _report(model, batch)
    assert {r.outcome for k, r in rows.items() if r.parameter} == {Outcome.PASS}
    loss = _loss(model.double(), {"x": batch["x"].double(), "y": batch["y"]})
    loss.backward()
    expected = float(model.shared.weight.grad.norm())
    assert rows["gradient.finite-difference shared.weight"].gradient_norm == pytest.approx(expected, rel=1e-6)


def test_a_point_holds_no_large_gradient_and_gives_it_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "HELD_ELEMENTS", 1000)  # of 5, 260, 300, 300 and 300 elements the first four
    model, batch = _net(torch.float32)
    recipe = Recipe.capture(model, batch=batch, loss=_loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with open_subject(model, recipe, device="cpu") as subject, lifted_loss(subject, subject.phases[0]) as problem:
        unit = Unit(1, 1)
        point = Point(problem, units=[unit])
        assert set(point.gradients._held) == {"5.bias", "3.bias", "0.bias", "1.weight"}
        problem.before()
        exact = torch.autograd.grad(problem.loss(), list(problem.tensors.values()))
        direction = point.random(unit, dict.fromkeys(point.names, 0.5))
        total = math.fsum(float((g * values_of(direction, n)).sum()) for n, g in zip(point.names, exact, strict=True))
        assert point.gradients.products(direction).total == pytest.approx(total, rel=1e-10)
        weight = point.gradients["3.weight"]
        assert torch.equal(weight, exact[point.names.index("3.weight")])
        assert "3.weight" not in point.gradients._held
        given = Given({"3.weight": values_of(direction, "3.weight")})
        alone = point.random(unit, {"3.weight": 0.5})
        assert point.gradients.products(given).total == pytest.approx(point.gradients.products(alone).total, rel=1e-12)
        moved = {n: t.detach() + 1e-3 * values_of(direction, n) for n, t in problem.tensors.items()}
        point.along(direction, 1e-3)
        for name, tensor in problem.tensors.items():
            torch.testing.assert_close(tensor.detach(), moved[name], rtol=1e-15, atol=1e-15)
        point.restore()
        assert all(torch.equal(t.detach(), subject.native_value(n).double()) for n, t in problem.tensors.items())


def test_a_direction_is_the_same_in_pieces_and_whole() -> None:
    like = torch.zeros(3 * PIECE + 17, dtype=torch.float64)
    direction = Random(Unit(5, 2), {"a": torch.zeros(2), "t": like}, {"t": 2.0})
    whole = direction.whole("t")
    again = torch.cat([direction.piece("t", slice(i, min(i + PIECE, len(like)))) for i in range(0, len(like), PIECE)])
    assert torch.equal(whole, again)
    sizes = (whole * LEVEL).abs()
    assert 0.5 < float(sizes.min()) < 0.501
    assert 1.499 < float(sizes.max()) < 1.5
    assert abs(float(sizes.mean()) - 1) < 3 / math.sqrt(12 * len(like))
    assert abs(float(whole.sign().mean())) < 4 / math.sqrt(len(like))
    other = Random(Unit(5, 3), {"a": torch.zeros(2), "t": like}, {"t": 2.0}).whole("t")
    assert abs(float((whole * other).mean()) * LEVEL**2) < 5 / math.sqrt(len(like))


def test_the_smallest_tensors_are_held() -> None:
    assert held_names({"a": 2**21, "b": 5, "c": 7}) == {"b", "c"}
    assert held_names({"a": 100, "b": 5}) == {"a", "b"}
