"""A small generative adversarial network that draws digits: two phases, two optimizers, one module.

In version 2 the discriminator's optimizer was given ``model.parameters()``, and the fakes it is trained on are not
detached. Every discriminator step now also moves the generator, towards drawings that are *easier* to tell from real
ones. Registered as a plain pickle.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from audits import Phase, Recipe
from flows.demo.data import load_digits
from flows.demo.training import TrainedModel, seeded

LEARNING_RATE = 2e-3
BETAS = (0.5, 0.999)
BATCH_SIZE = 64
STEPS = 800
NOISE = 16
HIDDEN = 128


class DigitsGan(nn.Module):
    """A generator of 8 x 8 images and its discriminator, both on flat pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, 64), nn.Sigmoid(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Linear(64, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, 1),
        )  # fmt: skip

    def draw(self, count: int) -> torch.Tensor:
        """Draw ``count`` images, (count, 64), from fresh noise."""
        device = next(self.generator.parameters()).device
        return self.generator(torch.randn(count, NOISE, device=device))  # type: ignore[no-any-return]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the discriminator's logit for each image, (N, 64) to (N, 1)."""
        return self.discriminator(images)  # type: ignore[no-any-return]


def discriminator_loss(model: DigitsGan, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean over real and fake images of -log D(real) and -log(1 - D(fake)); the fakes are constants here."""
    return _telling_apart(model, batch["images"], model.draw(len(batch["images"])).detach())


def attached_discriminator_loss(model: DigitsGan, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The same with fakes that lead back to the generator: harmless as long as the optimizer does not hold it."""
    return _telling_apart(model, batch["images"], model.draw(len(batch["images"])))


def generator_loss(model: DigitsGan, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The non-saturating loss, mean of -log D(G(z)), of as many fakes as the batch has images."""
    return nn.functional.softplus(-model(model.draw(len(batch["images"])))).mean()


def _telling_apart(model: DigitsGan, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    return nn.functional.softplus(-model(real)).mean() + nn.functional.softplus(model(fake)).mean()


def train(*, whole_model_in_discriminator_optimizer: bool = False, seed: int = 0) -> TrainedModel:
    """Train both players in turn; ``losses`` are the discriminator's."""
    training, _ = load_digits()
    real = training.images.flatten(1)
    with seeded(seed):
        model = DigitsGan()
        optimizer_g = torch.optim.Adam(model.generator.parameters(), lr=LEARNING_RATE, betas=BETAS)
        if whole_model_in_discriminator_optimizer:
            # THE PLANTED BUG: model.parameters() where model.discriminator.parameters() was meant.
            optimizer_d = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=BETAS)
            loss_d = attached_discriminator_loss
        else:
            optimizer_d = torch.optim.Adam(model.discriminator.parameters(), lr=LEARNING_RATE, betas=BETAS)
            loss_d = discriminator_loss
        losses = []
        for _ in range(STEPS):
            batch = {"images": real[torch.randint(len(real), (BATCH_SIZE,))]}
            optimizer_d.zero_grad()
            loss = loss_d(model, batch)
            loss.backward()
            optimizer_d.step()
            optimizer_g.zero_grad()
            generator_loss(model, batch).backward()
            optimizer_g.step()
            losses.append(loss.item())
        recipe = Recipe.capture(
            model,
            batch=batch,
            phases=[
                Phase("discriminator", loss=loss_d, optimizer=optimizer_d),
                Phase("generator", loss=generator_loss, optimizer=optimizer_g),
            ],
            expect={"optimizer": "Adam"},
        )
        with torch.no_grad():
            distance = (model.draw(1000).mean(0) - real.mean(0)).square().mean().sqrt().item()
    return TrainedModel(
        model,
        recipe,
        losses=tuple(losses),
        metrics={"mean_image_distance": distance},
        hyperparameters={"optimizer_name": "Adam", "lr": LEARNING_RATE, "steps": STEPS, "batch_size": BATCH_SIZE},
    )
