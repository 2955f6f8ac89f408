"""What a pull request is audited by: a small configuration of the real model, its loss and its optimizer."""

import torch

from audits import Recipe


def audit_classifier():
    """Return the model and how it is trained for one step."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = {"inputs": torch.randn(16, 4), "targets": torch.randint(0, 3, (16,))}
    return model, Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer)
