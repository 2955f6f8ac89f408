"""Lightning modules that can be imported where versions are loaded."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import nn


class Classifier(lightning.LightningModule):
    """Automatic optimization, dropout, a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Adversaries(lightning.LightningModule):
    """Manual optimization with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(2, 4)
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.example_input_array = torch.randn(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.discriminator(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        of_generator, of_discriminator = self.optimizers()
        fake = self.generator(torch.randn(real.shape[0], 2))
        judged = nn.functional.softplus(-self(real)).mean() + nn.functional.softplus(self(fake.detach())).mean()
        of_discriminator.zero_grad()
        self.manual_backward(judged)
        of_discriminator.step()
        fooled = nn.functional.softplus(-self(fake)).mean()
        of_generator.zero_grad()
        self.manual_backward(fooled)
        of_generator.step()

    def configure_optimizers(self) -> Any:
        generator = torch.optim.Adam(self.generator.parameters(), lr=1e-3)
        return [generator, torch.optim.Adam(self.discriminator.parameters(), lr=1e-3)], []
