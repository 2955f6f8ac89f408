"""YAML that nobody vouches for, read within bounds: recipes, MLmodel files, waivers. Knows no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from audits.errors import RecipeError

#: MLmodel files and recipes nest about ten levels.
MAXIMUM_DEPTH = 100

#: A recipe of a model with 2,000 parameters is about 200 kB and has 20,000 names, values, lists and mappings; a file
#: beyond this is no recipe. A MiB of YAML takes 300 MB and 4 s at the worst.
MAXIMUM_RECIPE_BYTES = 4 * 2**20
MAXIMUM_EVENTS = 500_000

#: The C parser where PyYAML was built with it: a recipe of 2,000 parameters reads in 0.1 s instead of 1 s.
SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(
    path: Path, *, aliases: bool = False, limit: int = MAXIMUM_RECIPE_BYTES, loader: Any = None
) -> Any:  # fmt: skip
    """Read YAML safely: no tags that build objects, capped size, nothing that expands.

    Args:
        path: the file.
        aliases: allow ``*name`` references, which other writers use; merge keys (``<<``), with which a few lines
            expand to gigabytes, stay refused.
        limit: bytes that the file may have.
        loader: what makes values of the nodes; PyYAML's safe one otherwise.

    Raises:
        RecipeError: the file is missing, too large or no plain YAML.
    """
    if not path.is_file():
        raise RecipeError(f"there is no {path.name}")
    if path.stat().st_size > limit:
        raise RecipeError(f"{path.name} is larger than {limit // 2**20} MiB")
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=SafeLoader)):
            if number > MAXIMUM_EVENTS:
                raise RecipeError(f"{path.name} has more than {MAXIMUM_EVENTS:,} values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAXIMUM_DEPTH:  # the C parser's composer would recurse until the process dies
                raise RecipeError(f"{path.name}: nested deeper than {MAXIMUM_DEPTH} levels")
            if isinstance(event, yaml.AliasEvent) and not aliases:
                raise RecipeError(f"{path.name}: aliases (*{event.anchor}) are not allowed")
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<":
                raise RecipeError(f"{path.name}: merge keys (<<) are not allowed")
        return yaml.load(text, Loader=loader or SafeLoader)
    except RecipeError:
        raise
    except Exception as error:  # PyYAML's own errors, and whatever a value raises that cannot be made: a date, a number
        raise RecipeError(f"{path.name} is not plain YAML: {str(error)[:500]}") from error
