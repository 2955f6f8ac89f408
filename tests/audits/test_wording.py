"""Counts, lists, modules and signs read the same wherever they stand."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from torch import nn

from audits.outcomes import Outcome
from audits.signs import SIGNS
from audits.wording import and_more, as_sentence, listed, module_label, plural


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (["a", "b", "c", "d"], "a, b, c and 1 more"),
        ([str(i) for i in range(1203)], "0, 1, 2 and 1,200 more"),
    ],
)
def test_a_list_says_what_it_leaves_out(names: list[str], text: str) -> None:
    assert listed(names) == text
    assert listed(iter(names)) == text
    assert listed(dict.fromkeys(names)) == text


def test_nothing_is_left_out_in_silence() -> None:
    assert listed("abc", 1) == "a and 2 more"
    assert and_more(3) == "and 3 more"
    assert and_more(3, "more checks") == "and 3 more checks"
    assert and_more(0) == and_more(-2) == ""


def test_counts_have_their_nouns_number() -> None:
    assert [plural(n, "tensor") for n in (0, 1, 2000)] == ["0 tensors", "1 tensor", "2,000 tensors"]
    assert plural(2, "claim does", "claims do") == "2 claims do"


def test_a_module_has_its_class_and_its_path() -> None:
    assert module_label(nn.Linear, "blocks.0") == "Linear (blocks.0)"
    assert module_label(nn.Linear, "") == "Linear"


def test_one_sign_an_outcome_everywhere() -> None:
    assert set(SIGNS) == set(Outcome)
    assert len(set(SIGNS.values())) == len(SIGNS)
    css = (files("registry_models.report") / "templates" / "report.css").read_text()
    shown = dict(re.findall(r"^\.(\w+) \{ --tone.*--sign: \"(.)\"; \}$", css, re.MULTILINE))
    assert shown == {str(outcome): sign for outcome, sign in SIGNS.items()}


@pytest.mark.parametrize(
    ("text", "name", "meant"),
    [
        ("the scale is off", None, "The scale is off"),
        ("body.0.weight received zeros", None, "body.0.weight received zeros"),
        ("weight received zeros", "weight", "weight received zeros"),
        ("weight: it is frozen", "weight", "weight: it is frozen"),
        ("swish's backward is wrong", None, "swish's backward is wrong"),
        ("running_mean did not move", None, "running_mean did not move"),
        ("", None, ""),
    ],
)
def test_a_sentence_begins_with_a_capital_and_a_name_as_it_is(text: str, name: str | None, meant: str) -> None:
    assert as_sentence(text, name) == meant
