"""Keys that nobody reads are refused with the nearest that somebody does, whoever reads the file."""

from __future__ import annotations

from typing import Any

import pytest

from audits.errors import RecipeError, unknown_among
from audits.recipe.keys import check_keys


def test_the_first_unknown_name_and_the_nearest_known_one() -> None:
    assert unknown_among({"loss": 1, "optimiser": 2}, ("loss", "optimizer")) == "'optimiser'; did you mean 'optimizer'?"
    assert unknown_among([7], ("loss",)) == "7"
    assert unknown_among({"loss": 1}, ("loss", "optimizer")) == ""


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ([], "phases[0] must be a mapping, not list"),
        ({"nam": "step"}, "phases[0] has unknown key 'nam'; did you mean 'name'?"),
        ({"loss": "model"}, "phases[0] lacks the key 'name'"),
    ],
)
def test_a_message_names_place_key_and_cure(plain: Any, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check_keys(plain, "phases[0]", ("name", "loss"), required=("name",))
    assert str(refused.value) == message


def test_known_keys_pass() -> None:
    check_keys({"name": "step"}, "phases[0]", ("name", "loss"), required=("name",))
