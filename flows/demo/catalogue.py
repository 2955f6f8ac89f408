"""Every version of the demo, in the order of registration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from flows.demo import char_gpt, digits_classifier, digits_gan, frozen_features, tutorial_linear
from flows.demo.training import TrainedModel


@dataclass(frozen=True)
class DemoVersion:
    """One version of one of the demo's models.

    Attributes:
        name: the registered model's name.
        version: the number the version has to get.
        planted: what is wrong with it, in one line; None for a right one.
        train: trains it from nothing, the same way every time.
    """

    name: str
    version: int
    planted: str | None
    train: Callable[[], TrainedModel]

    @property
    def label(self) -> str:
        """``NAME vVERSION``."""
        return f"{self.name} v{self.version}"


DEMO_VERSIONS: tuple[DemoVersion, ...] = (
    DemoVersion("tutorial-linear", 1, None, tutorial_linear.train),
    DemoVersion("digits-classifier", 1, None, digits_classifier.train),
    DemoVersion(
        "digits-classifier", 2, "the activation's hand-written backward is zero for negative inputs",
        functools.partial(digits_classifier.train, activation="scaled-gelu"),
    ),
    DemoVersion("digits-gan", 1, None, digits_gan.train),
    DemoVersion(
        "digits-gan", 2, "the discriminator's optimizer also holds the generator's parameters",
        functools.partial(digits_gan.train, whole_model_in_discriminator_optimizer=True),
    ),
    DemoVersion("char-gpt", 1, None, char_gpt.train),
    DemoVersion(
        "char-gpt", 2, "the output head was replaced after the optimizer was built",
        functools.partial(char_gpt.train, fresh_head=True),
    ),
    DemoVersion("frozen-features", 1, None, frozen_features.train),
    DemoVersion(
        "frozen-features", 2, "the frozen backbone's gradients are zeroed, and weight decay moves it all the same",
        functools.partial(frozen_features.train, zero_gradients=True),
    ),
)  # fmt: skip
