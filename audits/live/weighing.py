"""How a step's micro-batches weigh: by what each one's loss counts for in the loss of the whole batch."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from audits.errors import RecipeError, suggest
from audits.recipe.callables import TARGET_KEYS
from audits.structures import map_tensors, tensors_in

#: Label value that torch's losses ignore.
IGNORED_LABEL = -100

#: The default of a recipe's ``normalize``: the weights are found from the losses.
AUTO = "auto"

#: How ``normalize`` names the batch's key whose targets count.
TOKENS = "tokens:"

#: The name under which a loss is told how many targets the whole batch has, as transformers' losses are.
ITEMS = "num_items_in_batch"

#: Further values that labels are ignored by: padding is mostly 0 (a vocabulary's first entry), or -1.
_PADDING = (0, -1)


@dataclass(frozen=True)
class Count:
    """A number that a micro-batch has: of rows, elements, or targets that count.

    Attributes:
        text: what is counted, for a sentence: ``"the targets in 'labels' that are not -100"``.
        of: ``micro-batch -> number``.
    """

    text: str
    of: Callable[[Any], float]


@dataclass(frozen=True)
class Weighing:
    """The weights w_i of ``L(whole batch) = sum_i w_i L(micro-batch i)``.

    Attributes:
        count: what the weights are proportional to; None where all weigh alike.
        total: every weight is 1: the loss is a sum over the batch, or told the whole batch's count.
        fixed: the weights themselves, where they follow from the losses and from nothing that can be counted.
        unit: why the micro-batches are the unit, and not the batch; "" where the loss separates.
        accepted: other weighings that a step may use, where the losses do not tell which is right.
        others: weighings that explain a step that is wrong.
    """

    count: Count | None = None
    total: bool = False
    fixed: tuple[float, ...] = ()
    unit: str = ""
    accepted: tuple[Weighing, ...] = ()
    others: tuple[Weighing, ...] = ()

    @property
    def text(self) -> str:
        """How the micro-batches weigh, for a sentence."""
        if self.total:
            return "each in full (the loss is a sum over the batch)"
        if self.fixed:
            return f"as {', '.join(f'{w:.4g}' for w in self.fixed)}, which the losses tell"
        return f"by {self.count.text}" if self.count is not None else "alike"

    def weights(self, batches: Sequence[Any]) -> tuple[float, ...]:
        """Return the weight of each micro-batch's loss.

        Raises:
            RecipeError: none of the micro-batches has anything that counts.
        """
        if self.total:
            return (1.0,) * len(batches)
        if self.fixed and len(self.fixed) == len(batches):
            return self.fixed
        if self.count is None:
            return (1.0 / len(batches),) * len(batches)
        try:
            counts = [self.count.of(batch) for batch in batches]
        except (KeyError, IndexError):  # batches of the step's own, which lack what the recipe's have
            return (1.0 / len(batches),) * len(batches)
        if not sum(counts):
            raise RecipeError(f"the batch has none of {self.count.text}")
        return tuple(count / sum(counts) for count in counts)


#: A mean over micro-batches.
ALIKE = Weighing()

#: A sum over micro-batches.
SUMMED = Weighing(total=True)


def declared_weighing(normalize: str) -> Weighing:
    """Return the weighing that a recipe's ``normalize`` names; all alike where it is to be found."""
    if not normalize.startswith(TOKENS):
        return ALIKE
    key = normalize.removeprefix(TOKENS)

    def of(batch: Any) -> float:
        if key not in batch:
            raise RecipeError(f"normalize='{TOKENS}{key}': the batch has no {key!r}{suggest(key, batch)}")
        return _counting(batch[key])

    return Weighing(Count(f"the targets in {key!r} that count (normalize={normalize!r})", of), others=(ALIKE,))


def _counting(targets: torch.Tensor) -> float:
    return float((targets if targets.dtype == torch.bool else targets != IGNORED_LABEL).sum())


def as_list(batch: Any) -> list[Any]:
    """Return the micro-batches that a recipe gives as a list, or its one batch in a list."""
    return list(batch) if isinstance(batch, list) else [batch]


def split(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into equal micro-batches along dim 0.

    Raises:
        RecipeError: its size is not divisible.
    """
    sizes = {tensor.shape[0] for _, tensor in tensors_in(batch) if tensor.dim()}
    size = max(sizes, default=0)
    if not size or size % parts:
        raise RecipeError(
            f"accumulate={parts} needs a batch whose first dimension it divides, not {size}; give the "
            "micro-batches as a list instead"
        )
    width = size // parts
    return [
        map_tensors(batch, lambda t, i=i: t[i * width : (i + 1) * width] if t.dim() and t.shape[0] == size else t)  # type: ignore[misc]
        for i in range(parts)
    ]


def joined(batches: Sequence[Any]) -> Any:
    """Return the whole batch that the micro-batches make, rows behind rows; the shorter ones are padded.

    Labels are padded with -100, what else is missing with 0. A tensor without rows of its own (a scale, a causal mask)
    must be the same in all.

    Raises:
        ValueError: the micro-batches do not fit together.
    """
    held = [dict(tensors_in(batch)) for batch in batches]
    sizes = [_rows(tensors) for tensors in held]
    whole: dict[str, torch.Tensor] = {}
    for path, first in held[0].items():
        if any(path not in tensors for tensors in held):
            raise ValueError(f"the micro-batches do not all have {path!r}")
        parts = [tensors[path] for tensors in held]
        if all(part.dim() and part.shape[0] == size for part, size in zip(parts, sizes, strict=True)):
            whole[path] = torch.cat([_padded(path, part, parts) for part in parts])
        elif all(part.shape == first.shape and torch.equal(part, first) for part in parts):
            whole[path] = first
        else:
            raise ValueError(f"{path!r} differs between micro-batches and has no row for each of theirs")
    places = iter(whole.values())  # in the order in which `map_tensors` meets them
    return map_tensors(batches[0], lambda _: next(places))


def _rows(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the number of rows of a batch: the length that most of its tensors have."""
    lengths = Counter(tensor.shape[0] for tensor in tensors.values() if tensor.dim())
    return lengths.most_common(1)[0][0] if lengths else 0


def _padded(path: str, part: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len({other.dim() for other in parts}) > 1:
        raise ValueError(f"{path!r} has another number of dimensions from micro-batch to micro-batch")
    shape = [part.shape[0], *(max(other.shape[d] for other in parts) for d in range(1, part.dim()))]
    if list(part.shape) == shape:
        return part
    fill = IGNORED_LABEL if not part.is_floating_point() and part.dtype != torch.bool and _is_target(path, parts) else 0
    padded = part.new_full(shape, fill)
    padded[tuple(slice(length) for length in part.shape)] = part
    return padded


def _is_target(path: str, parts: Sequence[torch.Tensor]) -> bool:
    return path.rpartition(".")[2] in TARGET_KEYS or any(bool((part == IGNORED_LABEL).any()) for part in parts)


def counts_of(batch: Any, padding: Sequence[int] = ()) -> list[Count]:
    """Return what of a micro-batch its loss may be a mean over, likeliest first.

    Targets that are not ignored, also when a causal model moves its labels by one; rows of a mask; sums of weights;
    rows and elements.

    Args:
        batch: one of the micro-batches.
        padding: further label values to ignore, such as the model's padding token.
    """
    tensors = sorted(tensors_in(batch), key=lambda held: held[0].rpartition(".")[2] not in TARGET_KEYS)
    found: list[Count] = []
    for path, tensor in tensors:
        whole_numbers = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
        if whole_numbers and tensor.dim():
            for value in dict.fromkeys((IGNORED_LABEL, *padding, *_PADDING)):
                found.append(_not_equal(path, value, shifted=False))
                if tensor.dim() > 1:
                    found.append(_not_equal(path, value, shifted=True))
        if not tensor.is_complex() and tensor.dim():
            found.append(Count(f"the sum of {path!r}", functools.partial(_sum, path, 0)))
            if tensor.dim() > 1:
                found.append(Count(f"the sum of {path!r} but its first column", functools.partial(_sum, path, 1)))
    found += [Count(f"the elements of {path!r}", functools.partial(_elements, path)) for path, _ in tensors]
    return [ROWS, *found]


def targets_of(batch: Any) -> Count | None:
    """Return the count of a batch's targets that are not ignored; None where it has no targets of whole numbers."""
    for path, tensor in tensors_in(batch):
        if not tensor.is_floating_point() and tensor.dim() and path.rpartition(".")[2] in TARGET_KEYS:
            return _not_equal(path, IGNORED_LABEL, shifted=False)
    return None


def items_of(batches: Sequence[Any]) -> int | None:
    """Return how many targets the micro-batches have that are not ignored; rows, where they have no such targets."""
    count = targets_of(batches[0]) or ROWS
    try:
        return int(sum(count.of(batch) for batch in batches))
    except KeyError:  # a micro-batch without the targets of the first
        return None


def asks_for(name: str, loss: Callable[..., Any]) -> bool:
    """Whether a loss has an argument of this name."""
    try:
        return name in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False


def _not_equal(path: str, value: int, *, shifted: bool) -> Count:
    def of(batch: Any) -> float:
        tensor = dict(tensors_in(batch))[path]
        return float(((tensor[:, 1:] if shifted else tensor) != value).sum())

    columns = ", its first column left out," if shifted else ""
    return Count(f"the targets in {path!r}{columns} that are not {value}", of)


def _sum(path: str, first: int, batch: Any) -> float:
    tensor = dict(tensors_in(batch))[path]
    return float((tensor[:, first:] if first else tensor).sum(dtype=torch.float64))


def _elements(path: str, batch: Any) -> float:
    return float(dict(tensors_in(batch))[path].numel())


ROWS = Count("its rows", lambda batch: float(_rows(dict(tensors_in(batch)))))
