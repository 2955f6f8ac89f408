"""Cures are written by who does not know the version; its name is filled in as Python writes it."""

from __future__ import annotations

import ast

import pytest

from audits.naming import with_names

CURE = (
    "no recipe: register it with registry_models.log_model(model, name, recipe=Recipe.capture(...)), or "
    "registry_models.attach_recipe('models:/NAME/VERSION', recipe); see gradaudit report models:/NAME/VERSION"
)


@pytest.mark.parametrize("name", ["net", "my net", "it's", 'a"b', "a\nb", "c\td", "caf\u00e9", "{0}", r"\1", "NAME"])
def test_the_calls_of_a_cure_are_about_this_version(name: str) -> None:
    told = with_names(CURE, name, 7)
    assert told.isprintable(), "on one line"
    attach = told[told.index("attach_recipe(") + len("attach_recipe(") : told.index(", recipe);")]
    assert ast.literal_eval(attach) == f"models:/{name}/7"
    log = told[told.index("log_model(model, ") + len("log_model(model, ") : told.index(", recipe=Recipe")]
    assert ast.literal_eval(log) == name
    assert "VERSION" not in told


def test_other_spellings_of_the_placeholder() -> None:
    assert with_names("call attach_recipe(VERSION, recipe)", "m", 2) == "call attach_recipe('models:/m/2', recipe)"
    assert with_names("log_model(model, NAME)", "m", 2) == "log_model(model, 'm')"
    assert with_names("log_model(model, names)", "m", 2) == "log_model(model, names)", "a user's own word"
    assert with_names("nothing to fill in", "m", 2) == "nothing to fill in"
