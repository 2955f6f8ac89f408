"""Inputs for a model nobody gave a batch for: MLflow's input example, the pt2's sample inputs, the signature."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from audits.errors import RecipeError
from audits.structures import map_tensors, tensors_in
from registry_models.artifacts.loading import LoadedModel
from registry_models.artifacts.mlmodel import read_mlmodel

#: Rows of a made-up batch, and the length of a dimension that a signature leaves open.
ROWS, OPEN_DIMENSION = 4, 8

#: Largest input example that is read.
MAXIMUM_EXAMPLE_BYTES = 256 * 2**20

_SEED = 20_240_601


@dataclass(frozen=True)
class Example:
    """What a model is called with.

    Attributes:
        source: where it comes from, for the report.
        arguments: positional inputs.
        keywords: keyword inputs.
        texts: the example's texts, where it holds texts: they need the version's tokenizer.
    """

    source: str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ()

    def widened(self) -> Example:
        """Return a batch of several rows made from a single one: floats vary a little, whole numbers repeat."""
        generator = torch.Generator().manual_seed(_SEED)

        def widen(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.dim() or tensor.shape[0] != 1:
                return tensor
            repeated = tensor.repeat(ROWS, *[1] * (tensor.dim() - 1))
            if repeated.is_floating_point():
                repeated = repeated * (1 + 0.1 * torch.randn(repeated.shape, generator=generator, dtype=repeated.dtype))
            return repeated

        return Example(
            f"{self.source}, repeated to {ROWS} rows",
            tuple(map_tensors(a, widen) for a in self.arguments),
            {k: map_tensors(v, widen) for k, v in self.keywords.items()},
        )

    @property
    def single(self) -> bool:
        """Whether it has one row."""
        sizes = {t.shape[0] for _, t in tensors_in([list(self.arguments), dict(self.keywords)]) if t.dim()}
        return sizes == {1}


def find_example(folder: Path, loaded: LoadedModel) -> Example | None:
    """Return the best example there is, or None."""
    described = read_mlmodel(folder)
    return (
        _input_example(folder, described, loaded.module)
        or _sample_inputs(loaded)
        or _own_example(loaded.module)
        or _from_signature(described, loaded.module)
    )


def _sample_inputs(loaded: LoadedModel) -> Example | None:
    graph = loaded.exported
    if graph is None or graph.arguments is None:
        return None
    return Example("the sample inputs inside the pt2 file", graph.arguments, graph.keywords)


def _own_example(module: nn.Module) -> Example | None:
    """Lightning's ``example_input_array``."""
    found = getattr(module, "example_input_array", None)
    if found is None:
        return None
    if isinstance(found, dict):
        return Example("the module's example_input_array", (), found)
    return Example("the module's example_input_array", found if isinstance(found, tuple) else (found,))


def _input_example(folder: Path, described: Any, module: nn.Module) -> Example | None:
    info = described.get("saved_input_example_info") if isinstance(described, Mapping) else None
    if not isinstance(info, Mapping) or not isinstance(info.get("artifact_path"), str):
        return None
    path = (folder / info["artifact_path"]).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    if path.stat().st_size > MAXIMUM_EXAMPLE_BYTES:
        raise RecipeError(f"the input example {path.name} is larger than {MAXIMUM_EXAMPLE_BYTES // 2**20} MiB")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the input example {path.name} is truncated or corrupt: {error}") from error
    if info.get("type") == "ndarray" and isinstance(value, Mapping) and set(value) == {"inputs"}:
        value = value["inputs"]
    elif info.get("type") == "dataframe" and isinstance(value, Mapping) and "data" in value:
        value = value["data"]
    return _example_of(value, _tensor_specs(described), module)


def _example_of(value: Any, specs: Mapping[str | None, tuple[str, list[int]]], module: nn.Module) -> Example | None:
    source = "MLflow's input example"
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if texts and all(isinstance(text, str) for text in texts):
        return Example(source, texts=texts)
    if isinstance(value, Mapping):
        tensors = {name: _tensor(item, specs.get(name)) for name, item in value.items()}
        if any(tensor is None for tensor in tensors.values()):
            return None
        accepted = inspect.signature(module.forward).parameters
        if set(tensors) <= set(accepted) or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            return Example(source, (), tensors)
        return Example(source, tuple(tensors.values()))
    tensor = _tensor(value, next(iter(specs.values()), None))
    return None if tensor is None else Example(source, (tensor,))


def _tensor(value: Any, spec: tuple[str, list[int]] | None) -> torch.Tensor | None:
    try:
        array = np.asarray(value, dtype=None if spec is None else spec[0])
    except (ValueError, TypeError):
        return None
    if array.dtype.kind not in "fiub" or (array.size == 0 and array.ndim == 1):
        return None
    if spec is None and array.dtype.kind == "f":
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))


def _tensor_specs(described: Any) -> dict[str | None, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of a signature's tensors."""
    signature = described.get("signature") if isinstance(described, Mapping) else None
    if not isinstance(signature, Mapping) or not isinstance(signature.get("inputs"), str):
        return {}
    try:
        entries = json.loads(signature["inputs"])
        return {
            entry.get("name"): (str(entry["tensor-spec"]["dtype"]), [int(n) for n in entry["tensor-spec"]["shape"]])
            for entry in entries
            if entry.get("type") == "tensor"
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _from_signature(described: Any, module: nn.Module) -> Example | None:
    specs = _tensor_specs(described)
    if not specs:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    tensors = {name: _random(dtype, shape, module, generator) for name, (dtype, shape) in specs.items()}
    source = "random tensors of the signature"
    if None in tensors or not set(tensors) <= set(inspect.signature(module.forward).parameters):
        return Example(source, tuple(tensors.values()))
    return Example(source, (), {str(name): tensor for name, tensor in tensors.items()})


def _random(dtype: str, shape: list[int], module: nn.Module, generator: torch.Generator) -> torch.Tensor:
    if len(shape) > 16 or any(size < -1 for size in shape):
        raise RecipeError(f"the signature's shape {shape} cannot be")
    sizes = [(ROWS if i == 0 else OPEN_DIMENSION) if size < 0 else size for i, size in enumerate(shape)]
    kind = getattr(torch, dtype, torch.float32)
    if kind.is_floating_point or kind.is_complex:
        return torch.randn(sizes, generator=generator, dtype=kind)
    tables = [m.num_embeddings for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return torch.randint(0, min(tables, default=2), sizes, generator=generator).to(kind)
