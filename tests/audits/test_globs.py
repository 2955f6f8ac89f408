"""What is declared as one glob, as several, or as something else altogether."""

from __future__ import annotations

from typing import Any

import pytest

from audits.globs import globs_of, matches, matching


@pytest.mark.parametrize(
    ("declared", "globs"),
    [("a.*", ("a.*",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ((), ()), (None, ()), (True, ()), ({"a": 1}, ())],
)
def test_globs_of_whatever_is_declared(declared: Any, globs: tuple[str, ...]) -> None:
    assert globs_of(declared) == globs


def test_names_match_whole_and_by_case() -> None:
    assert matches("blocks.0.weight", "blocks.*")
    assert matches("blocks.0.weight", ["head.*", "*.weight"])
    assert not matches("blocks.0.weight", "blocks")
    assert not matches("blocks.0.weight", "Blocks.*")
    assert not matches("blocks.0.weight", ())
    assert matching(["b", "a", "ab"], "a*") == ["a", "ab"]
