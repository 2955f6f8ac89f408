"""What a stranger wrote is removed whatever its depth and modes, and nothing outside is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.sandbox.removing import remove_tree

ROOT = Path(__file__).resolve().parents[3]


def nested(folder: Path, depth: int) -> None:
    place = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deeper", dir_fd=place)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=place), "w") as stream:
        stream.write("content")
    os.close(place)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="test-removing-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def as_a_plain_user(folder: Path) -> bool:
    """Remove ``folder / "left"`` as a user who owns it, whoever runs the test."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom flows.sandbox.removing import remove_tree\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(remove_tree(Path(sys.argv[1])))"
    )
    if os.geteuid() == 0:
        for where, folders, files in os.walk(folder):
            for name in [*folders, *files]:
                os.lchown(os.path.join(where, name), 65534, 65534)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "left")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip() == "True"


@pytest.mark.slow
def test_any_depth_is_removed(folder: Path) -> None:
    left = folder / "left"
    left.mkdir()
    nested(left, 3000)
    with pytest.raises(RecursionError):
        shutil.rmtree(left)
    assert remove_tree(left)
    assert list(folder.iterdir()) == []


@pytest.mark.end_to_end
def test_modes_and_links_are_not_in_the_way_and_lead_nowhere(folder: Path) -> None:
    outside, left = folder / "outside", folder / "left"
    (outside / "inner").mkdir(parents=True)
    (outside / "kept").write_text("kept")
    for path in (left, left / "closed" / "inner" / "deep", left / "wide"):
        path.mkdir(parents=True)
    for place in (left, left / "closed", left / "closed" / "inner"):
        (place / "link").symlink_to(outside)
        (place / "to-a-file").symlink_to(outside / "kept")
    for number in range(500):
        (left / "wide" / str(number)).mkdir()
    os.mkfifo(left / "pipe")
    outside.chmod(0o755)
    for place in (left / "closed" / "inner" / "deep", left / "closed" / "inner", left / "closed", left / "wide"):
        place.chmod(0o000 if place.name == "deep" else 0o500)
    assert as_a_plain_user(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["outside"]
    assert outside.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in outside.iterdir()) == ["inner", "kept"]


def test_a_link_in_the_folders_place_is_not_followed(folder: Path) -> None:
    (folder / "outside").mkdir()
    (folder / "outside" / "kept").write_text("kept")
    (folder / "left").symlink_to(folder / "outside")
    assert not remove_tree(folder / "left")
    assert (folder / "outside" / "kept").read_text() == "kept"


def test_what_is_not_there_is_removed(folder: Path) -> None:
    assert remove_tree(folder / "nothing")
