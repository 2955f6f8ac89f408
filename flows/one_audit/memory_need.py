"""Memory that auditing a version needs on a device, from its recipe and from what was measured; nothing is loaded.

An estimate from below: what does not fit by it does not fit, and what runs out of memory all the same is audited on
the CPU after that. The bytes are those of ``benchmarks/memory.py`` (`docs/measurements.md`, "Memory").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from audits.errors import RecipeError
from registry_models.artifacts.files_below import files_in
from registry_models.artifacts.snapshot import Snapshot
from registry_models.recipes.plain_yaml import load_yaml
from registry_models.recipes.recipe_names import RECIPE_FILE

#: Bytes of a CUDA context with torch's kernels and libraries loaded.
CONTEXT_BYTES = 2**30

#: The gradient checks hold every parameter in float64, and three tensors as large as the largest in its backward.
FLOAT64 = 8
LARGEST_IN_BACKWARD = 3

#: The update checks hold what the training step does: weights, gradients and the optimizer's state; and, while it is
#: worked out, the reference gradient beside that which arrived.
GRADIENTS = 2

#: Bytes of an element.
_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "complex64": 8, "complex128": 16}

#: Model-sized tensors in the state of torch's optimizers. Of any other none is assumed.
_STATE = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adadelta": 2, "Adagrad": 1, "RMSprop": 1,
          "Rprop": 2, "ASGD": 1, "SparseAdam": 2, "Muon": 1}  # fmt: skip

#: Options that bring one more where they are set.
_MORE = {"SGD": ("momentum",), "Adam": ("amsgrad",), "AdamW": ("amsgrad",), "RMSprop": ("momentum", "centered")}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A parameter as a recipe tells it: number of elements, bytes of one, and whether it is trained."""

    count: int
    size: int
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Need:
    """What an audit needs.

    Attributes:
        gradient: bytes of the gradient checks.
        update: bytes of the update checks.
        text: where the numbers come from, for the report.
    """

    gradient: int
    update: int
    text: str

    @property
    def total(self) -> int:
        """Bytes at the peak, with what a device needs for itself."""
        return CONTEXT_BYTES + max(self.gradient, self.update)


def needed(snapshot: Snapshot) -> Need:
    """Return what auditing a snapshot needs; without a recipe, what its files would be as float64 weights."""
    folder = snapshot.recipe_folder
    try:
        plain = load_yaml(folder / RECIPE_FILE) if folder is not None else None
        return _of_files(snapshot) if plain is None else needed_by(_weights(plain["parameters"]), plain["phases"])
    except (RecipeError, OSError, ValueError, KeyError, TypeError, AttributeError):  # said by whoever reads the recipe
        return _of_files(snapshot)


def needed_by(weights: Mapping[str, Weights], phases: Iterable[Mapping[str, Any]]) -> Need:
    """Return what auditing a model needs.

    Args:
        weights: its parameters by name.
        phases: those of its recipe, as written; their optimizers and what they hold count.
    """
    count, native = sum(w.count for w in weights.values()), sum(w.count * w.size for w in weights.values())
    largest = max((w.count for w in weights.values()), default=0)
    optimizers = [phase["optimizer"] for phase in phases]
    held = [_held(weights, optimizer) for optimizer in optimizers]
    gradient = FLOAT64 * (count + LARGEST_IN_BACKWARD * largest)
    state = sum(state_copies(optimizer) * size for optimizer, size in zip(optimizers, held, strict=True))
    update = native + state + GRADIENTS * max(held, default=0)
    names = " and ".join(sorted({str(optimizer["class"]).rpartition(".")[2] for optimizer in optimizers}))
    text = (
        f"{count:,} parameters of {native / max(count, 1):g} bytes each, {names or 'no optimizer'}: "
        f"{gradient / max(count, 1):.1f} bytes a parameter for the gradient checks, "
        f"{update / max(count, 1):.1f} for the update checks"
    )
    return Need(gradient, update, text)


def state_copies(optimizer: Mapping[str, Any]) -> int:
    """Return how many model-sized tensors an optimizer's state holds, by its class and options as a recipe has them."""
    module, _, name = str(optimizer["class"]).rpartition(".")
    if not module.startswith("torch.optim"):
        return 0
    options = [group["options"] for group in optimizer["groups"]]
    return _STATE.get(name, 0) + min((sum(bool(o.get(key)) for key in _MORE.get(name, ())) for o in options), default=0)


def _held(weights: Mapping[str, Weights], optimizer: Mapping[str, Any]) -> int:
    """Return the bytes of the parameters that an optimizer holds and that are trained."""
    names = {name for group in optimizer["groups"] for name in group["parameters"]} & weights.keys()
    return sum(weights[name].count * weights[name].size for name in names if weights[name].trained)


def _weights(parameters: Iterable[Mapping[str, Any]]) -> dict[str, Weights]:
    return {
        str(p["name"]): Weights(
            math.prod(p["shape"]), _SIZES.get(str(p["dtype"]).removeprefix("torch."), 1), bool(p["trainable"])
        )
        for p in parameters
    }


def _of_files(snapshot: Snapshot) -> Need:
    size = sum(path.stat().st_size for path in files_in(snapshot.folder))
    return Need(size, size, f"no recipe tells the dtype: files of {size / 2**30:.1f} GiB")
