"""From a snapshot's files to a torch module. Runs the model's own code: only ever called in an audit's child."""

from __future__ import annotations

import pickle
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from audits.errors import ArtifactError
from registry_models.artifacts.archives import is_torchscript, refuse_expanding
from registry_models.artifacts.exported import ExportedGraph, load_exported
from registry_models.artifacts.factory_files import read_factory
from registry_models.artifacts.files_below import files_in
from registry_models.artifacts.flavours import unsupported
from registry_models.artifacts.mlmodel import read_mlmodel
from registry_models.artifacts.transformers_files import load_transformers
from registry_models.recipes.recipe_names import FOLDER

#: Top-level names that a version's own code may not replace.
PROTECTED = frozenset(sys.stdlib_module_names) | {
    "torch",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "yaml",
    "audits",
    "registry_models",
    "flows",
    "mlflow",
    "prefect",
}

_TORCHSCRIPT = (
    "unsupported artifact kind: TorchScript archives hold no Python model and cannot be audited; log the eager module "
    "with registry_models.log_model(model, name, recipe=..., factory=...)"
)


@dataclass(frozen=True)
class LoadedModel:
    """A version's module and what its artifact kind could not bring back.

    Attributes:
        module: the module, on the CPU.
        artifact_kind: as `registry_models.artifacts.snapshot` names it.
        exported: what exporting did, for an exported graph.
    """

    module: nn.Module
    artifact_kind: str
    exported: ExportedGraph | None = None


def load_model(folder: Path, artifact_kind: str, code_folders: tuple[Path, ...] = ()) -> LoadedModel:
    """Load the version's module, on the CPU.

    Args:
        folder: the model directory.
        artifact_kind: as `registry_models.artifacts.snapshot` found it.
        code_folders: the version's own code and its recipe's, put on the import path, the first one first.

    Raises:
        ArtifactError: the kind is not supported, or the files are broken; the text says what to do.
    """
    for code in reversed(code_folders):
        refuse_shadowing(code)
        sys.path.insert(0, str(code))
    if artifact_kind == "eager":
        return LoadedModel(read_factory(folder / "extra_files" / FOLDER), artifact_kind)
    if artifact_kind == "pickle":
        return LoadedModel(_unpickle(folder / "data" / "model.pth"), artifact_kind)
    if artifact_kind == "transformers":
        return LoadedModel(load_transformers(folder), artifact_kind)
    if artifact_kind == "exported":
        graph = load_exported(folder / "data" / "model.pt2")
        return LoadedModel(graph.module, artifact_kind, graph)
    if "pytorch" in _flavors(folder) or not _flavors(folder):
        raise ArtifactError(
            "data/model.pth, the model itself, is not among the version's files: its upload was cut off, or it was "
            "deleted; register it again"
        )
    described = read_mlmodel(folder) if (folder / "MLmodel").is_file() else None
    names = [path.relative_to(folder).as_posix() for path in files_in(folder)]
    raise ArtifactError(f"unsupported artifact kind: {unsupported(described or {}, names)}")


def _flavors(folder: Path) -> tuple[str, ...]:
    """The flavors that the MLmodel file names."""
    described = read_mlmodel(folder) if (folder / "MLmodel").is_file() else None
    flavors = described.get("flavors") if isinstance(described, dict) else None
    return tuple(flavors) if isinstance(flavors, dict) else ()


def refuse_shadowing(code_folder: Path) -> None:
    """Refuse code that would replace a library the audit itself runs on.

    Raises:
        ArtifactError: a name in ``code/`` collides; the text names it.
    """
    for path in code_folder.iterdir():
        name = path.name.partition(".")[0]
        if name in PROTECTED and (path.is_dir() or path.suffix in (".py", ".so", ".pyc")):
            raise ArtifactError(
                f"the version's code/ holds {path.name!r}, which would replace the library {name!r}: refused; "
                "rename that module"
            )


def _cure(error: Exception) -> str:
    """Return what to install, for code of a package that is not there; empty otherwise."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return f"install {name.partition('.')[0]!r} where audits run, or " if name else ""


def _unpickle(path: Path) -> nn.Module:
    if is_torchscript(path):
        raise ArtifactError(_TORCHSCRIPT)
    if zipfile.is_zipfile(path):
        refuse_expanding(path)
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the modules that a pickle imports
            loaded = torch.load(stream, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise ArtifactError(
            f"the pickled model needs code that is not there ({error}): {_cure(error)}log it with code_paths=[...], or "
            "with factory=..."
        ) from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"the model file {path.name} is truncated or corrupt: {text}") from error
    if isinstance(loaded, torch.jit.ScriptModule):
        raise ArtifactError(_TORCHSCRIPT)
    if isinstance(loaded, dict) and loaded and all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ArtifactError(
            f"{path.name} holds weights alone (a state dict), and weights name no module: register the model with "
            "registry_models.log_model(model, name, recipe=..., factory=...)"
        )
    if not isinstance(loaded, nn.Module):
        raise ArtifactError(f"the pickle holds a {type(loaded).__name__}, not a torch.nn.Module")
    return loaded
