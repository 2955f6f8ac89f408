"""A version's MLmodel file: what a stranger wrote, read as texts, lists and mappings and nothing else.

YAML makes dates, numbers and sets of what looks like one, and some of these cannot be made (``2001-99-99``, a number
of 5,000 digits). Nothing here needs them: only empty values are told from texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from registry_models.recipes.plain_yaml import SafeLoader, load_yaml

#: MLflow's own are below 100 kB, signatures of wide tables included.
MAXIMUM_BYTES = 2**20

_STANDARD = "tag:yaml.org,2002:"
_NULL = f"{_STANDARD}null"

#: YAML's own tags; others ask for objects.
_TAGS = {
    f"{_STANDARD}{name}"
    for name in ("null", "bool", "int", "float", "binary", "timestamp", "str", "seq", "map", "set", "omap", "pairs")
}


def read_mlmodel(folder: Path) -> Mapping[str, Any] | None:
    """Return what the MLmodel file of a model directory says; None where it says nothing that has names.

    Raises:
        RecipeError: the file is missing, too large, nested too deep, or no plain YAML.
    """
    described = load_yaml(folder / "MLmodel", aliases=True, limit=MAXIMUM_BYTES, loader=_TextLoader)
    return described if isinstance(described, Mapping) else None


class _TextLoader(SafeLoader):  # type: ignore[misc]
    """Makes texts of all scalars but the empty ones."""

    yaml_implicit_resolvers = {  # PyYAML's own name
        letter: [(tag, pattern) for tag, pattern in resolvers if tag == _NULL]
        for letter, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: dict[Any, Any] = {}


def _made(loader: Any, node: yaml.Node) -> Any:
    if node.tag not in _TAGS:
        raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag!r} is not allowed", node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else loader.construct_scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [loader.construct_object(item, deep=True) for item in node.value]
    if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise yaml.constructor.ConstructorError(None, None, "a key that is not text", node.start_mark)
    return {key.value: loader.construct_object(item, deep=True) for key, item in node.value}


_TextLoader.add_constructor(None, _made)
