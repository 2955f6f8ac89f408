"""Weights and code of a version's files, each with its digest: what tells a retrained version from a rewritten one."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from audits.short_digests import shortened
from registry_models.artifacts.archives import opened_archive
from registry_models.artifacts.file_names import FACTORY_FILE
from registry_models.recipes.recipe_names import FOLDER

#: Members of a torch or pt2 archive that are tensors; the others are the module's or the graph's description.
_WEIGHT_FOLDERS = ("/data/", "/data/weights/", "/data/constants/")

#: Members that a change of neither weights nor code makes: sample inputs, versions, a random id of the archive.
_UNTOLD = ("/data/sample_inputs/", "/.data/", "/archive_", "/byteorder", "/version")

#: Files that MLflow writes anew for every version.
_ENVIRONMENT = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "pip-requirements.txt"}

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pt2", ".ckpt", ".npz", ".h5")


def version_parts(folder: Path, files: Sequence[tuple[Path, str]], code_folder: Path | None) -> dict[str, str]:
    """Return the digests of a version's ``weights`` and of its other ``files`` that define the model.

    Archives are told apart by their table of contents, which holds a checksum of every member: nothing is unpacked.
    Of a version that has a factory the archive's graph does not count; the factory builds the module.

    Args:
        folder: the model directory.
        files: its files, each with a digest of its content.
        code_folder: the version's own code, or None.
    """
    weights, code = hashlib.sha256(), hashlib.sha256()
    recipe, factory = folder / "extra_files" / FOLDER, folder / "extra_files" / FOLDER / FACTORY_FILE
    built = factory.is_file()
    for path, digest in files:
        name = path.relative_to(folder).as_posix()
        inside_code = code_folder is not None and path.is_relative_to(code_folder)
        if inside_code or path == factory:
            code.update(f"{name}\0{digest}\n".encode())
        elif path.parent == recipe and path.suffix == ".safetensors" and path.stem in ("batch", "optimizer"):
            continue
        elif path.suffix in _WEIGHT_SUFFIXES:
            members = _members(path)
            if members is None:
                weights.update(f"{name}\0{digest}\n".encode())
                continue
            for member, checksum, is_weight in members:
                if is_weight:
                    weights.update(f"{member}\0{checksum}\n".encode())
                elif not built:
                    code.update(f"{member}\0{checksum}\n".encode())
        elif path.parent == recipe or name in _ENVIRONMENT or "input_example" in name:
            continue
        elif not built:
            code.update(f"{name}\0{digest}\n".encode())
    return {"weights": shortened(weights), "files": shortened(code)}


def _members(path: Path) -> list[tuple[str, str, bool]] | None:
    """Name, checksum and whether it is a tensor, of every member that counts; None for a file that is no archive."""
    try:
        with opened_archive(path) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    found = []
    for member in listed:
        name = "/" + member.filename.partition("/")[2]  # the archive's own name comes first
        if name.startswith(_UNTOLD):
            continue
        is_weight = name.startswith(_WEIGHT_FOLDERS)
        found.append((name, f"{member.CRC:08x} {member.file_size}", is_weight))
    return found
