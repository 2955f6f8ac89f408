"""Faults between phases: a GAN whose two optimizers, losses and gradients get in each other's way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from audits.recipe.phases import Phase
from tests.wrong_on_purpose.updates import models
from tests.wrong_on_purpose.updates.catalogue import fault

Built = tuple[Any, ...]


def _gan(
    *, d_loss: Any = models.discriminate, d_params: Any = None, g_params: Any = None, trained: bool = False,
    step: Any = None, adam: bool = True, decay: float = 0.0, **more: Any,
) -> Built:  # fmt: skip
    model, batch = models.gan()
    d_params = list((d_params or (lambda m: m.discriminator.parameters()))(model))
    g_params = list((g_params or (lambda m: m.generator.parameters()))(model))
    make = torch.optim.AdamW if adam else torch.optim.SGD
    discriminator = make(d_params, lr=2e-3, weight_decay=decay)
    generator = make(g_params, lr=2e-3, weight_decay=decay)
    if trained:
        for _ in range(3):
            for loss, optimizer in ((models.discriminate, discriminator), (models.generate, generator)):
                optimizer.zero_grad()
                model.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
        model.zero_grad()
    phases = [Phase("discriminator", loss=d_loss, optimizer=discriminator),
              Phase("generator", loss=models.generate, optimizer=generator)]  # fmt: skip
    return model, {"batch": batch, "phases": phases, **({"step": step} if step else {}), **more}


for _trained in (False, True):
    _home = "gan, trained" if _trained else "gan"

    @fault(
        "discriminator's optimizer holds the generator too", "phases", _home, "update.isolation", "generator.0.weight"
    )
    def _(wrong: bool, trained: bool = _trained) -> Built:
        return _gan(d_params=(lambda m: m.parameters()) if wrong else None, trained=trained, decay=0.01)

    @fault("the same, and the fake is not detached", "phases", _home, "update.isolation", "generator.2.bias")
    def _(wrong: bool, trained: bool = _trained) -> Built:
        loss = models.discriminate_attached if wrong else models.discriminate
        return _gan(d_loss=loss, d_params=(lambda m: m.parameters()) if wrong else None, trained=trained)


@fault("generator's optimizer holds the discriminator", "phases", "gan", "update.isolation", "discriminator.0.weight")
def _(wrong: bool) -> Built:
    """The generator then also trains the discriminator, to believe it."""
    return _gan(g_params=(lambda m: m.parameters()) if wrong else None, adam=False)


@fault("the two optimizers swapped", "phases", "gan", "step.gradient-present", "generator.0.weight")
def _(wrong: bool) -> Built:
    if not wrong:
        return _gan()
    return _gan(
        d_params=lambda m: m.generator.parameters(), g_params=lambda m: m.discriminator.parameters(), adam=False
    )


def _adversarial(mistake: str) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        d, g = context.optimizers["discriminator"], context.optimizers["generator"]
        if mistake == "one zero_grad":
            d.zero_grad()
            g.zero_grad()
        else:
            d.zero_grad()
        fake = model.generator(models.noise(batch))
        if mistake != "fake not detached":
            fake = fake.detach()
        (F.softplus(-model.discriminator(batch["x"])).mean() + F.softplus(model.discriminator(fake)).mean()).backward()
        if mistake != "discriminator stepped by the generator's phase":
            d.step()
        if mistake not in ("one zero_grad", "fake not detached"):
            g.zero_grad()
        if mistake == "sign of the generator's loss":
            (-F.softplus(-model.discriminator(model.generator(models.noise(batch)))).mean()).backward()
        elif mistake == "generator on the real loss":
            F.softplus(model.discriminator(model.generator(models.noise(batch)))).mean().backward()
        else:
            F.softplus(-model.discriminator(model.generator(models.noise(batch)))).mean().backward()
        if mistake == "generator stepped through the discriminator":
            with torch.no_grad():
                for parameter in model.discriminator.parameters():
                    parameter.sub_(1e-3 * parameter.grad)
        g.step()
        if mistake == "discriminator stepped by the generator's phase":
            d.step()

    return step


def _leftover(mistake: bool) -> Any:
    """The generator's backward leaves gradients in the discriminator; only the first step may ignore them."""

    def step(model: Any, batch: Any, context: Any) -> None:
        d, g = context.optimizers["discriminator"], context.optimizers["generator"]
        if not mistake:
            d.zero_grad()
        models.discriminate(model, batch).backward()
        d.step()
        if mistake:  # cleared too early: the generator's backward fills it again
            d.zero_grad()
        g.zero_grad()
        models.generate(model, batch).backward()
        g.step()

    return step


@fault("generator's gradients left in the discriminator", "phases", "gan", "step.gradient", "discriminator.0.weight")
def _(wrong: bool) -> Built:
    return _gan(step=_leftover(wrong))


@fault("fake not detached and gradients kept", "phases", "gan", "step.gradient", "generator.0.weight")
def _(wrong: bool) -> Built:
    return _gan(step=_adversarial("fake not detached" if wrong else ""))


@fault("generator minimises its own failure", "phases", "gan", "step.gradient", "generator.2.weight")
def _(wrong: bool) -> Built:
    return _gan(step=_adversarial("sign of the generator's loss" if wrong else ""))


@fault("generator's labels are wrong", "phases", "gan", "step.gradient", "generator.0.bias")
def _(wrong: bool) -> Built:
    return _gan(step=_adversarial("generator on the real loss" if wrong else ""), adam=False)


@fault("generator's phase writes the discriminator", "phases", "gan", "update.outside-step", "discriminator.2.weight")
def _(wrong: bool) -> Built:
    return _gan(step=_adversarial("generator stepped through the discriminator" if wrong else ""))


@fault(
    "discriminator stepped after the generator's backward", "phases", "gan", "step.gradient", "discriminator.0.weight"
)
def _(wrong: bool) -> Built:
    return _gan(step=_adversarial("discriminator stepped by the generator's phase" if wrong else ""))


@fault("discriminator stepped twice a round", "phases", "gan", "step.count")
def _(wrong: bool) -> Built:
    plain = _adversarial("")

    def step(model: Any, batch: Any, context: Any) -> None:
        plain(model, batch, context)
        if wrong:
            context.optimizers["discriminator"].step()

    return _gan(step=step)


@fault("all backwards before any step, one sign wrong", "phases", "gan", "step.gradient", "generator.0.weight")
def _(wrong: bool) -> Built:
    def careful(model: Any, batch: Any, context: Any) -> None:
        d, g = context.optimizers["discriminator"], context.optimizers["generator"]
        d.zero_grad()
        models.discriminate(model, batch).backward()
        g.zero_grad()
        model.discriminator.requires_grad_(False)
        loss = models.generate(model, batch)
        (-loss if wrong else loss).backward()
        model.discriminator.requires_grad_(True)
        d.step()
        g.step()

    return _gan(step=careful)
