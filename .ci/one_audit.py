"""Register the tutorial's model, as a user of the installed wheel would."""

import mlflow
import torch

from audits import Recipe
from registry_models import log_model

mlflow.set_tracking_uri("sqlite:///mlflow.db")
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
batch = {"inputs": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "targets": torch.tensor([[3.0], [7.0]])}
recipe = Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=optimizer)
log_model(model, "first", recipe=recipe, factory="torch.nn:Linear", factory_args={"in_features": 2, "out_features": 1})
