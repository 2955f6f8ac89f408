"""The weights inside a pt2 archive, read as raw bytes: no pickle, no graph, no import of `torch.export`."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from audits.errors import ArtifactError
from registry_models.artifacts.archives import refuse_expanding

#: `torch._export.serde.schema.ScalarType`: the numbers that archives use for dtypes.
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
}

_CONFIG = "data/weights/model_weights_config.json"


def read_pt2_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a pt2 archive. Tied tensors come under each of their names.

    Raises:
        ArtifactError: the archive is broken, or of a form this torch cannot read.
    """
    refuse_expanding(path)
    try:
        with zipfile.ZipFile(path) as archive:
            root = next((n.removesuffix(_CONFIG) for n in archive.namelist() if n.endswith(_CONFIG)), None)
            if root is None:
                raise ArtifactError(f"{path.name} is not a pt2 archive with weights in it")
            config = json.loads(archive.read(root + _CONFIG))["config"]
            folder = f"{root}data/weights/"
            return {name: _tensor(entry, archive, folder) for name, entry in config.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"the weights inside {path.name} cannot be read ({type(error).__name__}: {error}): the file is corrupt, "
            "or written by another torch; log the model again"
        ) from error


def _tensor(entry: dict[str, Any], archive: zipfile.ZipFile, folder: str) -> torch.Tensor:
    if entry["use_pickle"]:
        raise ArtifactError(f"the weight {entry['path_name']!r} inside the pt2 archive is pickled: refused")
    meta = entry["tensor_meta"]
    dtype = _DTYPES[meta["dtype"]]
    shape = [size["as_int"] for size in meta["sizes"]]
    strides = [stride["as_int"] for stride in meta["strides"]]
    content = bytearray(archive.read(folder + entry["path_name"]))
    if not content:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(content, dtype=dtype)
    return flat.as_strided(shape, strides, meta["storage_offset"]["as_int"])
