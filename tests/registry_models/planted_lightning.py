"""The planted model as a LightningModule, and Lightning versions registered with nothing of gradaudit's."""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import mlflow
import torch
from torch import nn

from audits import Recipe
from audits.recipe.callables import CallableReference
from registry_models.inference.lightning import TrainingStepLoss
from tests.registry_models import planted
from tests.registry_models.lightning_modules import Adversaries, Classifier


class PlantedModule(lightning.LightningModule):
    """Trains a planted model as its optimizer says."""

    def __init__(self, model: planted.Planted) -> None:
        super().__init__()
        self.model = model
        self.example_input_array = planted.batch()["inputs"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return planted.optimizer_of(self.model)


def recipe(module: PlantedModule, fault: str) -> Recipe:
    """The module's own training step, with what was meant."""
    loss = TrainingStepLoss(1)
    reference = CallableReference(
        "registry_models.inference.lightning:TrainingStepLoss", {"optimizers": 1, "position": None}, loss
    )
    data = planted.batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Recipe.capture(
            module,
            batch={"batch": (data["inputs"], data["targets"])},
            loss=reference,
            optimizer=planted.optimizer_of(module.model),
            expect=planted.expectations(fault, "model."),
        )


def register_autologged(name: str) -> None:
    """Train with MLflow's autolog and nothing else."""
    mlflow.pytorch.autolog(registered_model_name=name)
    try:
        data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,)))
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=4))
    finally:
        mlflow.pytorch.autolog(disable=True)


def register_adversaries(name: str) -> None:
    """Log a GAN by MLflow's own call."""
    mlflow.pytorch.log_model(
        Adversaries(),
        name="model",
        registered_model_name=name,
        serialization_format="pickle",
        pip_requirements=["torch"],
    )
