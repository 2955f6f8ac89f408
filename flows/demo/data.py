"""The demo's data, all of it from files inside scikit-learn: no download, nothing generated."""

from __future__ import annotations

import functools
from importlib import resources
from typing import NamedTuple

import torch

#: Printable ASCII and the newline. Fixed, so that a model does not change its shape with scikit-learn's version.
VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))

#: Share of the digits that training sees; the rest measures accuracy.
TRAINING_SHARE = 0.8


class Digits(NamedTuple):
    """Handwritten digits.

    ``images``: (N, 8, 8) float32 in [0, 1]; ``labels``: (N,) int64.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def only(self, low: int, high: int) -> Digits:
        """Return the digits ``low``..``high``, relabelled from 0."""
        chosen = (self.labels >= low) & (self.labels <= high)
        return Digits(self.images[chosen], self.labels[chosen] - low)


@functools.cache
def load_digits() -> tuple[Digits, Digits]:
    """Return training and held-out digits, shuffled once and for all."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[order] / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)[order]
    cut = int(TRAINING_SHARE * len(order))
    return Digits(images[:cut], labels[:cut]), Digits(images[cut:], labels[cut:])


@functools.cache
def load_text() -> torch.Tensor:
    """Return scikit-learn's dataset descriptions, about 43,000 characters, as indices into `VOCABULARY`."""
    folder = resources.files("sklearn.datasets.descr")
    pages = sorted((page for page in folder.iterdir() if page.name.endswith(".rst")), key=lambda page: page.name)
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    index = {character: position for position, character in enumerate(VOCABULARY)}
    return torch.tensor([index.get(character, index[" "]) for character in text])
