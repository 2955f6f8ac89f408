"""Every Python block of README and docs runs, page by page and in order, in a folder of its own.

A block whose first line is ``# name.py`` is that file: it is written, and run as a script; functions ``test_...`` of a
file ``test_....py`` are called. `tests.docs.prepared` makes what a page takes for granted: a model, a batch, results. A
block that cannot run says so on the page: ``<!-- not run: reason -->`` before it.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from audits.outcomes import Outcome
from tests.docs import prepared
from tests.docs.blocks import DOCS, PAGES, Block, blocks, name_of
from tests.registry_models.auditing import audited

RUN = [page for page in PAGES if any(b.language == "python" and b.not_run is None for b in blocks(page))]


@pytest.fixture
def folder(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a page's blocks: importable, with a registry of its own."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    monkeypatch.setattr(sys, "argv", ["python"])
    mlflow.set_experiment("models")
    known = set(sys.modules)
    yield place
    for name in set(sys.modules) - known:
        if str(place) in (
            getattr(sys.modules[name], "__file__", None) or str(getattr(sys.modules[name], "__path__", ""))
        ):
            del sys.modules[name]


def run(block: Block, names: dict[str, object], folder: Path) -> None:
    source = "\n" * block.line + block.text  # so that a traceback names the page's own line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library's; what the code does is what counts
        if block.file is None:
            exec(compile(source, block.place, "exec"), names)
            return
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        defined = runpy.run_path(str(path), run_name="__main__")
        if path.name.startswith("test_"):
            tests = [value for name, value in defined.items() if name.startswith("test_")]
            assert tests, f"{block.place} tests nothing"
            for test in tests:
                test()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_blocks_of_a_page_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "page"}
    prepare = getattr(prepared, page.stem.lower(), None)
    if prepare is not None:
        names |= prepare(folder)
    for block in blocks(page):
        if block.language == "python" and block.not_run is None:
            run(block, names, folder)


@pytest.mark.slow
def test_the_first_hour_ends_with_a_version_that_passes(client: MlflowClient, folder: Path) -> None:
    page = DOCS / "start" / "first_hour.md"
    for block in blocks(page):
        if block.language == "python":
            run(block, {}, folder)
    assert "gradaudit audit models:/spirals/1" in page.read_text(encoding="utf-8")
    assert audited(client, "models:/spirals/1", folder / "audit").outcome is Outcome.PASS


def test_nothing_is_prepared_for_pages_that_are_gone() -> None:
    prepares = {name for name, value in vars(prepared).items() if getattr(value, "__module__", "") == prepared.__name__}
    assert {name for name in prepares if not name.startswith("_")} - {"store_results"} <= {
        page.stem.lower() for page in RUN
    }


def test_a_block_that_is_wrong_fails(tmp_path: Path) -> None:
    wrong = Block(PAGES[0], 3, "python", "from audits import Recipes\n", None)
    with pytest.raises(ImportError, match="Recipes"):
        run(wrong, {"__name__": "page"}, tmp_path)


def test_a_block_is_left_out_only_for_a_reason() -> None:
    left_out = {b.place.partition(":")[0]: b.not_run for page in PAGES for b in blocks(page) if b.not_run}
    assert len(left_out) <= 4, left_out
