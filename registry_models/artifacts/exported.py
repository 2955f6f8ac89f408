"""The ``exported`` artifact kind: `torch.export` archives (pt2), MLflow's default. A graph, not the model's code."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits.errors import ArtifactError
from registry_models.artifacts.archives import refuse_expanding

#: What every gradient row of an exported graph says.
NOT_VISIBLE = "exported graph: custom backward not visible"

#: The one line that gives full coverage.
CURE = "registry_models.log_model(model, NAME, recipe=recipe, factory='package.module:build') keeps the model itself"

#: Names under which aten's operations take the mode.
_MODE_ARGUMENTS = ("train", "training")


@dataclass(frozen=True)
class ExportedGraph:
    """A loaded graph and what exporting did to it.

    Attributes:
        module: the graph as a module; its parameters are the model's, ties joined again.
        arguments: positional sample inputs inside the archive, or None.
        keywords: keyword sample inputs.
        mode: ``train``, ``eval`` or ``mixed`` when the graph's operations have a mode baked in, else None.
        batch_size: the first dimension of the inputs, when it is baked in.
        ties: names that exporting had split and that are one parameter again.
        device: the device that operations of the graph make tensors on, when there are such operations.
    """

    module: nn.Module
    arguments: tuple[Any, ...] | None
    keywords: dict[str, Any]
    mode: str | None
    batch_size: int | None
    ties: tuple[tuple[str, ...], ...]
    device: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What exporting changed, a sentence each."""
        notes = []
        if self.mode is not None:
            notes.append(f"the mode {self.mode!r} is baked in: the recipe's mode does not reach dropout and norms")
        if self.batch_size is not None:
            notes.append(f"the batch size {self.batch_size} is baked in")
        if self.device is not None:
            notes.append(f"the device {self.device!r} is baked in: the audit runs there")
        if self.ties:
            names = "; ".join(" = ".join(group) for group in self.ties[:5])
            notes.append(f"exporting had split tied parameters, joined again for the audit: {names}")
        return tuple(notes)


def load_exported(path: Path) -> ExportedGraph:
    """Load a pt2 archive.

    Raises:
        ArtifactError: it is truncated, corrupt, or needs a device or operation that is not there.
    """
    refuse_expanding(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            program = torch.export.load(str(path))
            module = program.module()
    except Exception as error:
        text = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ArtifactError(
            f"the exported graph {path.name} cannot be loaded ({type(error).__name__}: {text}): it is truncated or "
            "corrupt, or was exported on a device or with custom operations that are not here"
        ) from error
    for method in ("train", "eval"):  # torch.export replaces them by refusals; the graph's own mode is baked in
        module.__dict__.pop(method, None)
    sample = program.example_inputs
    return ExportedGraph(
        module=module,
        arguments=None if sample is None else tuple(sample[0]),
        keywords={} if sample is None else dict(sample[1]),
        mode=_baked_mode(program),
        batch_size=_baked_batch_size(program),
        ties=_join_ties(module),
        device=next((str(n.kwargs["device"]) for n in program.graph.nodes if n.kwargs.get("device") is not None), None),
    )


def _baked_mode(program: torch.export.ExportedProgram) -> str | None:
    modes = set()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for index, argument in enumerate(schema.arguments):
            if argument.name in _MODE_ARGUMENTS:
                value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
                if isinstance(value, bool):
                    modes.add(value)
    if not modes:
        return None
    return "mixed" if len(modes) == 2 else "train" if modes == {True} else "eval"


def _baked_batch_size(program: torch.export.ExportedProgram) -> int | None:
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, torch.Tensor) and value.dim():
            return value.shape[0] if isinstance(value.shape[0], int) else None
    return None


def _join_ties(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Make one parameter again of those that share their storage: that is what a tie looks like in an archive."""
    groups: dict[Any, list[str]] = {}
    first: dict[Any, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if not parameter.numel():
            continue
        key = (parameter.data_ptr(), tuple(parameter.shape), parameter.stride(), parameter.dtype)
        groups.setdefault(key, []).append(name)
        if key in first:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, first[key])
        else:
            first[key] = parameter
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
