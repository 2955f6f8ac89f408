"""Every method passes the tutorial's model and fails its twin with a wrong backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.outcomes import Lane, Outcome
from tests.audits.gradients.cases import FINITE, Activation, ScaledSwish, Swish, audit, classes, failing, net, outcomes

METHODS = ("auto", "probe", "exact", "elementwise", "gradcheck")
TUTORIAL = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "y": torch.tensor([[3.0], [7.0]])}


def squared_error(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_tutorial_passes(method: str, dtype: torch.dtype) -> None:
    batch = {key: value.to(dtype) for key, value in TUTORIAL.items()}
    rows = audit(nn.Linear(2, 1).to(dtype), batch, squared_error, method=method)
    assert outcomes(rows) == {"weight": Outcome.PASS, "bias": Outcome.PASS}
    for row in rows:
        assert row.lane is Lane.FLOAT64
        assert row.dtype == str(dtype)
        assert row.parameter in row.message
        assert row.module == "Linear"


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_backward_fails_upstream_and_only_there(method: str) -> None:
    batch = classes()
    width = 4 if method in ("elementwise", "gradcheck", "exact") else 12
    # the whole gradient larger, so that gradcheck's absolute tolerance of 1e-5 does not hide the 1 %
    loss = lambda model, b: 30 * F.cross_entropy(model(b["x"]), b["y"])  # noqa: E731
    assert not failing(audit(net(Activation(Swish), width), batch, loss, method=method))
    assert failing(audit(net(Activation(ScaledSwish), width), batch, loss, method=method)) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("method", ["probe", "exact", "elementwise"])
def test_zero_gradients_pass_as_absolute(method: str) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 3), nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    rows = audit(Unused(), classes(), method=method)
    by_name = {row.parameter: row for row in rows}
    assert by_name["unused"].outcome is Outcome.PASS
    assert by_name["unused"].cause == "zero gradient"
    assert by_name["used.weight"].outcome is Outcome.PASS


def test_elementwise_is_the_tutorials_formula() -> None:
    model = nn.Linear(2, 1).double()
    batch = {key: value.double() for key, value in TUTORIAL.items()}
    row = next(r for r in audit(model, batch, squared_error, method="elementwise") if r.parameter == "bias")
    numeric = []
    with torch.no_grad():
        for sign in (1, -1):
            model.bias += sign * 1e-7
            numeric.append(float(squared_error(model, batch)))
            model.bias -= sign * 1e-7
    squared_error(model, batch).backward()
    analytic = float(model.bias.grad)
    expected = (numeric[0] - numeric[1]) / 2e-7
    assert row.measured == analytic
    assert row.expected == pytest.approx(expected, rel=1e-6)
    assert row.error == pytest.approx(abs(analytic - row.expected) / max(abs(analytic), abs(row.expected)))
    assert row.threshold == 1e-5


def test_filters() -> None:
    rows = audit(net(nn.Tanh()), classes(), parameters=("2.*",), method="probe")
    assert {row.parameter for row in rows} == {"2.weight", "2.bias"}
    assert audit(net(nn.Tanh()), classes(), checks=("update.*",)) == []


def test_exact_by_vmap_and_by_loop_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from audits.gradients.methods import exact

    torch.manual_seed(3)
    model, batch = net(nn.Tanh()), classes()
    by_vmap = audit(model, batch, method="exact")
    monkeypatch.setattr(exact, "batched_elements", lambda *_: None)
    by_loop = audit(model, batch, method="exact")
    for one, other in zip(by_vmap, by_loop, strict=True):
        assert one.outcome is other.outcome is Outcome.PASS
        assert one.detection_limit == pytest.approx(other.detection_limit, rel=0.5)
    assert failing(audit(net(Activation(ScaledSwish), 4), batch, method="exact")) == {"0.weight", "0.bias"}


def test_exact_by_vmap_finds_one_wrong_element() -> None:
    model = net(nn.Tanh())

    def flip(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[77] *= 1.001
        return gradient

    model[2].weight.register_hook(flip)
    rows = audit(model, classes(), method="exact")
    assert failing(rows) == {"2.weight"}
    assert "element 77" in next(row for row in rows if row.parameter == "2.weight").message


def test_check_names() -> None:
    from audits.checks.gradient import CHECKS

    assert [check.name for check in CHECKS][:3] == [FINITE, "gradient.native-dtype", "gradient.input"]


@pytest.mark.slow
def test_exact_finds_what_it_states_though_noise_hides_most() -> None:
    def offset(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return 1e4 + nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    for seed in range(4):
        torch.manual_seed(seed)
        model, batch = net(nn.Tanh()), classes()
        rows = {row.parameter: row for row in audit(model, batch, offset, method="exact")}
        limit = rows["0.weight"].detection_limit
        assert limit is not None
        assert limit > 1e-5, "the noise is what limits"
        assert rows["0.weight"].outcome is Outcome.PASS
        model[0].weight.register_hook(lambda gradient, factor=1 + limit: gradient * factor)
        assert failing(audit(model, batch, offset, method="exact")) == {"0.weight"}
