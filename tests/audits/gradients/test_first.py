from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from audits.gradients import check_gradients
from audits.outcomes import Outcome
from audits.recipe import Recipe
from audits.settings import AuditSettings
from audits.subject import open_subject


def test_tutorial_passes_every_method() -> None:
    batch = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "y": torch.tensor([[3.0], [7.0]])}
    model = nn.Linear(2, 1)
    recipe = Recipe.capture(
        model,
        batch=batch,
        loss=lambda m, b: F.mse_loss(m(b["x"]), b["y"]),
        optimizer=torch.optim.SGD(model.parameters()),
    )
    for method in ("auto", "probe", "exact", "elementwise", "gradcheck"):
        with open_subject(model, recipe, AuditSettings(method=method)) as subject:
            rows = check_gradients(subject)
        assert [row.outcome for row in rows if row.check == "gradient.finite-difference"] == [
            Outcome.PASS,
            Outcome.PASS,
        ]
