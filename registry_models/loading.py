"""From a snapshot's files to a torch module. Runs the model's own code: only ever called in an audit's child."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn

from audits.errors import ArtifactError
from registry_models.factory_files import read_factory
from registry_models.recipe_files import FOLDER

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


def load_module(folder: Path, artifact_kind: str, code_folder: Path | None) -> nn.Module:
    """Return the version's module, on the CPU.

    Args:
        folder: the model directory.
        artifact_kind: as `registry_models.snapshot` found it.
        code_folder: the version's own code, put on the import path.

    Raises:
        ArtifactError: the kind is not supported, or the files are broken; the text says what to do.
    """
    if code_folder is not None:
        refuse_shadowing(code_folder)
        sys.path.insert(0, str(code_folder))
    if artifact_kind == "eager":
        return read_factory(folder / "extra_files" / FOLDER)
    if artifact_kind == "pickle":
        return _unpickle(folder / "data" / "model.pth")
    raise ArtifactError(
        f"unsupported artifact kind {artifact_kind!r}: log the model with registry_models.log_model(model, "
        "name, recipe=..., factory=...)"
    )


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


def _unpickle(path: Path) -> nn.Module:
    try:
        with path.open("rb") as stream:
            loaded = torch.load(stream, map_location="cpu", weights_only=False)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ArtifactError(
            f"the pickled model needs code that is not there ({error}): log it with code_paths=[...], or with "
            "factory=..."
        ) from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"the model file {path.name} is truncated or corrupt: {text}") from error
    if isinstance(loaded, torch.jit.ScriptModule):
        raise ArtifactError("unsupported artifact kind: TorchScript archives cannot be audited; log the eager module")
    if not isinstance(loaded, nn.Module):
        raise ArtifactError(f"the pickle holds a {type(loaded).__name__}, not a torch.nn.Module")
    return loaded
