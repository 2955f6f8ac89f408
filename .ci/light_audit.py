"""Audit in a training script without MLflow and Prefect, as a user of the light level would."""

import sys
from importlib.util import find_spec

import torch

from audits import Recipe, audit


class Doubled(torch.autograd.Function):
    """The identity, with a gradient that is twice too large."""

    @staticmethod
    def forward(ctx, x):  # noqa: D102
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # noqa: D102
        return 2 * gradient


class Net(torch.nn.Module):
    """One layer, wrong or right."""

    def __init__(self, *, wrong: bool) -> None:
        super().__init__()
        self.layer, self.wrong = torch.nn.Linear(2, 1), wrong

    def forward(self, inputs):  # noqa: D102
        out = self.layer(inputs)
        return Doubled.apply(out) if self.wrong else out


batch = {"inputs": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "targets": torch.tensor([[3.0], [7.0]])}
for wrong in (False, True):
    torch.manual_seed(0)
    model = Net(wrong=wrong)
    recipe = Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    report = audit(model, recipe)
    report.to_frame()
    assert report.passed is not wrong, report
assert "Doubled" in str(report), report
for name in ("mlflow", "prefect"):
    assert name not in sys.modules, name
if find_spec("mlflow") is None:
    said = ""
    try:
        from registry_models import log_model  # noqa: F401
    except ImportError as error:
        said = str(error)
    assert "pip install 'gradaudit[mlflow]'" in said, said
print("light: a right model passes, a wrong one fails by its cause")
