"""The gradient checks on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.gradients import check_gradients
from audits.live.subject import open_subject
from audits.outcomes import Outcome
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from tests.audits.gradients.cases import Activation, ScaledSwish, Swish

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")


class Attending(nn.Module):
    def __init__(self, function: type) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(50, 64), nn.Linear(64, 192)
        self.act, self.head = Activation(function), nn.Linear(64, 50)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        q, k, v = self.block(h).view(*x.shape, 3, 2, 32).permute(2, 0, 3, 1, 4)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.drop(self.act(h)))


@pytest.mark.parametrize("precision", ["native", "bf16-autocast"])
@pytest.mark.parametrize(("function", "wrong"), [(Swish, False), (ScaledSwish, True)])
def test_attention_with_dropout(function: type, wrong: bool, precision: str) -> None:
    model = Attending(function)
    x = torch.randint(0, 50, (4, 16))
    loss = lambda m, b: F.cross_entropy(m(b["x"]).flatten(0, 1), b["x"].flatten())  # noqa: E731
    recipe = Recipe.capture(
        model, batch={"x": x}, loss=loss, optimizer=torch.optim.AdamW(model.parameters()), precision=precision
    )
    with open_subject(model, recipe, AuditSettings(method="probe"), device="cuda") as subject:
        rows = check_gradients(subject)
    failing = {row.parameter for row in rows if row.outcome is Outcome.FAIL}
    assert failing == ({"embed.weight", "block.weight", "block.bias"} if wrong else set())
    assert sum(row.outcome is Outcome.PASS for row in rows if row.check == "gradient.finite-difference") >= 2
