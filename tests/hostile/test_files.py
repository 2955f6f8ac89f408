"""Files that a stranger wrote and this process reads: refused in one sentence, in a second, in little memory."""

from __future__ import annotations

import os
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from audits.errors import ArtifactError, RecipeError
from flows.sandbox.removing import remove_tree
from registry_models.artifacts.archives import MAXIMUM_RECORDS, refuse_expanding
from registry_models.artifacts.files_below import MAXIMUM_DEPTH
from registry_models.artifacts.mlmodel import MAXIMUM_BYTES, read_mlmodel
from registry_models.artifacts.snapshot import read_snapshot
from registry_models.recipes.recipe_files import load_yaml
from tests.hostile.artifacts import model_directory, solved

MLMODEL = "flavors:\n  pytorch:\n    model_data: data\n    code: code\n"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model") / "model", solved(), mlmodel=MLMODEL)


@pytest.fixture
def bounded() -> Any:
    """At most two seconds (one on an idle machine) and 300 MiB."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < 2.0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 300


@pytest.mark.parametrize(
    "line",
    [
        "x: 2001-99-99", f"x: {'9' * 5000}", "x: !!int zz", "x: !!float zz", "x: !!bool zz", "x: !!timestamp zz",
        "x: !!binary '%'", "x: .inf", "x: 1_000:99", "2001-99-99: x", "!!int zz: x", "x: [1, {y: 2}]",
        "x: !!set {a, b}",
    ],
)  # fmt: skip
def test_what_looks_like_a_value_and_is_none_is_a_text(healthy: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "MLmodel").write_text(f"{MLMODEL}{line}\n")
    described = read_mlmodel(tmp_path)
    assert described is not None
    assert described["flavors"] == {"pytorch": {"model_data": "data", "code": "code"}}
    assert described.keys() >= {"flavors"}


def test_control_the_usual_reader_of_yaml_cannot_make_them(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text(f"{MLMODEL}x: 2001-99-99\n")
    with pytest.raises(RecipeError, match="not plain YAML"):
        load_yaml(tmp_path / "MLmodel")


MANY = "flavors:\n" + "  - a\n" * 250_000


@pytest.mark.parametrize(
    "text",
    [
        "[" * 500 + "]" * 500, "x: &a [1]\ny: {<<: *a}", "x: !!python/object:os.system []", "x: !own y",
        "? [a, b]\n: c",
        "\0", "x: \x01", "%YAML 9.9\n---\nx", MANY, "x" * (MAXIMUM_BYTES + 1), "flavors: [", "- 1\n- 2",
        "", "~", "flavors: 3",
        "flavors:\n  pytorch:\n    code: \"a\\0b\"\n", f"flavors:\n  pytorch:\n    code: {'a' * 5000}\n",
        "flavors:\n  pytorch:\n    code: ../..\n",
    ],
)  # fmt: skip
def test_a_broken_mlmodel_is_refused(healthy: Path, tmp_path: Path, text: str, bounded: None) -> None:
    (tmp_path / "MLmodel").write_text(text)
    with pytest.raises(ArtifactError):
        read_snapshot(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_bytes(b"flavors: \xff\xfe\x00")
    with pytest.raises(ArtifactError):
        read_snapshot(tmp_path)


def deep(folder: Path) -> None:
    place = os.open(folder, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=place)
        place, above = os.open("d", os.O_RDONLY, dir_fd=place), place
        os.close(above)
    os.close(place)


def many(folder: Path) -> None:
    (folder / "many").mkdir()
    for number in range(20_001):
        (folder / "many" / str(number)).touch()


def not_utf8(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff\xfe")).touch()


@pytest.mark.slow
@pytest.mark.parametrize("plant", [deep, many, not_utf8])
def test_folders_beyond_a_model_s_are_refused(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    folder = model_directory(tmp_path / "model", solved(), mlmodel=MLMODEL)
    plant(folder)
    try:
        with pytest.raises(ArtifactError, match="refused"):
            read_snapshot(folder)
    finally:
        assert remove_tree(folder), "pytest could not"


def test_folders_as_deep_as_a_model_may_have_them_are_read(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", solved(), mlmodel=MLMODEL)
    inner = folder.joinpath(*["d"] * MAXIMUM_DEPTH)
    inner.mkdir(parents=True)
    (inner / "file").write_text("x")
    before = read_snapshot(folder).digest
    (inner / "file").write_text("y")
    assert read_snapshot(folder).digest != before


def test_only_mlflow_s_own_file_is_no_content(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", solved(), mlmodel=MLMODEL)
    before = read_snapshot(folder).digest
    (folder / "registered_model_meta").write_text("model_name: m\n")
    assert read_snapshot(folder).digest == before
    (folder / "code" / "registered_model_meta").write_text("anything")
    assert read_snapshot(folder).digest != before


def claiming(path: Path, records: int) -> None:
    """A zip of one record whose end says that there are more."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x05\x06")
    struct.pack_into("<HH", content, at + 8, min(records, 65535), min(records, 65535))
    path.write_bytes(content)


def test_an_archive_with_too_long_a_table_is_refused_before_it_is_read(tmp_path: Path, bounded: None) -> None:
    claiming(tmp_path / "model.pth", MAXIMUM_RECORDS + 1)
    with pytest.raises(ArtifactError, match="more than"):
        refuse_expanding(tmp_path / "model.pth")


def test_control_an_archive_of_a_model_s_size_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        for number in range(2000):
            archive.writestr(f"a/{number}", "b")
    refuse_expanding(tmp_path / "model.pth")


def test_a_recipe_that_is_too_large_is_not_read(tmp_path: Path, bounded: None) -> None:
    with (tmp_path / "recipe.yaml").open("wb") as stream:
        stream.truncate(700 * 2**20)
    with pytest.raises(RecipeError, match="larger than"):
        load_yaml(tmp_path / "recipe.yaml")
