"""One line a parameter: which row stands for it, and in which order."""

from __future__ import annotations

import dataclasses
import doctest
import math

import pytest

from audits.outcomes import Outcome, ResultRow, Severity
from registry_models.report import lines as lines_module
from registry_models.report import scale as scale_module
from registry_models.report.lines import parameter_lines, relative_error
from registry_models.report.scale import LogScale
from registry_models.report.text import escape_markdown, number, shortened
from registry_models.untrusted_text import for_xml, neutralised

GRADIENT = ResultRow(check="gradient.finite-difference", outcome=Outcome.PASS, parameter="w")


def test_docstrings_tell_the_truth() -> None:
    for module in (lines_module, scale_module):
        assert doctest.testmod(module).failed == 0


def test_lines_follow_the_gradient_rows_and_end_with_what_nobody_judged() -> None:
    rows = [
        ResultRow(check="registration.coverage", outcome=Outcome.FAIL, parameter="z"),
        dataclasses.replace(GRADIENT, parameter="b"),
        dataclasses.replace(GRADIENT, parameter="a"),
    ]
    lines = parameter_lines(rows, ["z", "unseen"])
    assert [line.name for line in lines] == ["b", "a", "z", "unseen"]
    assert [line.worst for line in lines] == [Outcome.PASS, Outcome.PASS, Outcome.FAIL, Outcome.SKIPPED]


def test_the_worst_phase_stands_for_the_parameter_and_a_skipped_one_does_not() -> None:
    rows = [
        dataclasses.replace(GRADIENT, phase="generator", outcome=Outcome.SKIPPED),
        dataclasses.replace(GRADIENT, phase="discriminator", gradient_norm=2.0),
    ]
    assert parameter_lines(rows)[0].gradient is Outcome.PASS
    assert parameter_lines(rows)[0].gradient_norm == 2.0
    rows.append(dataclasses.replace(GRADIENT, outcome=Outcome.FAIL, gradient_norm=3.0))
    assert parameter_lines(rows)[0].gradient is Outcome.FAIL
    assert parameter_lines(rows)[0].gradient_norm == 3.0


def test_only_the_evidence_itself_passes_a_column() -> None:
    rows = [
        dataclasses.replace(GRADIENT, outcome=Outcome.SKIPPED),
        dataclasses.replace(GRADIENT, check="gradient.native-dtype"),
    ]
    assert parameter_lines(rows)[0].gradient is Outcome.SKIPPED


def test_a_failure_that_only_warns_is_a_warning() -> None:
    row = ResultRow(check="update.lost-to-rounding", outcome=Outcome.FAIL, severity=Severity.WARN, parameter="w")
    assert parameter_lines([row])[0].update is Outcome.WARN


@pytest.mark.parametrize(
    ("fields", "relative"),
    [
        ({"measured": 2.0, "expected": 1.0}, 0.5),
        ({"measured": 0.0, "expected": 0.0}, 0.0),
        ({"measured": 1e-17, "expected": 0.0, "threshold": 1e-16}, None),
        ({"error": 0.25}, 0.25),
        ({"measured": math.nan, "expected": 1.0}, None),
        ({"measured": 1.0, "expected": 0.5, "error": 0.5, "threshold": 1.0, "detection_limit": 1e-3}, None),
    ],
)
def test_relative_error(fields: dict[str, float], relative: float | None) -> None:
    assert relative_error(dataclasses.replace(GRADIENT, **fields)) == relative


def test_a_scale_holds_zero_on_a_rail_of_its_own() -> None:
    scale = LogScale.of([0.0, 1e-6, 1.0, None, math.inf])
    assert scale is not None
    assert scale.share(0.0) == 0.0
    assert 0 < scale.share(1e-6) < scale.share(1e-3) < scale.share(1.0) == 1.0
    assert LogScale.of([None, math.nan]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (3.0, "3"),
        (0.0065, "0.0065"),
        (3e-11, "3e-11"),
        (1.23456e7, "1.23e7"),
        (99999.5, "100000"),
        (math.inf, "infinite"),
        (-1.5e-9, "-1.5e-9"),
        (4096.0, "4096"),
        (12345.6, "12346"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_text() -> None:
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert escape_markdown("a_b\n<i>\x1b[0m") == "a\\_b \\<i\\>\\[0m"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("see http://evil.com now", r"see http\://evil.com now"),
        ("www.evil.com", r"www\.evil.com"),
        ("mailto:a@b.c", r"mailto\:a@b.c"),
        ("# heading", r"\# heading"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("---", r"\---"),
        ("2.weight", "2.weight"),
        ("-3", "-3"),
    ],
)
def test_no_text_becomes_a_link_or_a_block(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


@pytest.mark.parametrize("before", ["", " ", "\u00a0", "\ufeff", "\u200b", "\u2003", "\x00", "\t", "\n"])
@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@x"])
def test_no_cell_is_a_formula(before: str, formula: str) -> None:
    assert neutralised(before + formula).startswith("'")
    assert neutralised(f"a{before}{formula}").startswith("a")


def test_what_xml_cannot_hold_is_left_out() -> None:
    assert for_xml("a\ufffe\uffff\x0b\ud800b\U0001f600") == "ab\U0001f600"
