"""The run's note and its plots."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from audits.run import refused
from registry_models.report.note import render_markdown
from registry_models.report.plots import render_plots
from tests.registry_models.report.synthetic import HOSTILE, report_of

NAMES = ["gradient_norm.png", "gradient_error.png", "update_ratio.png"]


@pytest.mark.slow
@pytest.mark.parametrize("tensors", [5, 148, 2000])
def test_plots_are_pictures_of_a_sensible_size(tensors: int) -> None:
    plots = render_plots(report_of(tensors, failing=(1, 2), inconclusive=(3,), warned=(4,)))
    assert list(plots) == NAMES
    for png in plots.values():
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", png[16:24])
        assert 900 <= width <= 2000
        assert 300 <= height <= 1000
        assert len(png) < 500_000


def test_plots_take_any_name_as_text() -> None:
    assert list(render_plots(report_of(names=[*HOSTILE, "層.重み"], failing=(0, 1, 5, 6)))) == NAMES


def test_nothing_measured_gives_no_plot() -> None:
    assert render_plots(refused("corrupt")) == {}


def test_the_first_line_is_plain_text() -> None:
    first = render_markdown(report_of(148, failing=(3,)), links={}).splitlines()[0]
    assert first.startswith("FAIL: ")
    assert first.strip("#*_`>- ") == first


def test_findings_reasons_and_links_follow() -> None:
    note = render_markdown(report_of(148, failing=tuple(range(20))), links={"Open the report": "#/a (b)/c"})
    assert note.count("**fail**") == 1, "one cause, one finding"
    assert "20 parameters, from" in note
    assert "step.clipping" in note
    assert note.endswith("[Open the report](#/a%20%28b%29/c)")
    assert len(note) < 5000


def test_many_causes_are_cut_with_their_number() -> None:
    report = report_of(148, failing=tuple(range(20)))
    rows = tuple(dataclasses.replace(r, cause=f"wrong backward of F{i} in M") for i, r in enumerate(report.rows))
    note = render_markdown(dataclasses.replace(report, rows=rows), links={})
    assert note.count("**fail**") == 8
    assert "12 more findings" in note
    assert len(note) < 5000


def test_names_are_escaped_and_stay_on_their_line() -> None:
    names = [f"{name}\n# heading" for name in HOSTILE]
    note = render_markdown(report_of(names=names, failing=tuple(range(len(names)))), links={})
    assert len(note) < 5000
    assert "\x1b" not in note
    assert "\n# heading" not in note
    for forbidden in ("<script", "](y)", " <", "`*"):
        assert forbidden not in note.replace("\\<", "").replace("\\]", "").replace("\\`", "")
