"""What MLflow's stores take as a value: texts of a bounded length without what a database cannot hold."""

from __future__ import annotations

from registry_models.untrusted_text import clean

#: MLflow's REST API and its databases take tags of model versions and runs of at most this length.
MAXIMUM_TAG = 5000

_CUT = " …"


def tag_value(text: str, limit: int = MAXIMUM_TAG) -> str:
    """Return a tag's value: cleaned, and cut where it is longer than MLflow takes.

    Args:
        text: the value; names in it come from a model.
        limit: characters.
    """
    value = clean(text)
    return value if len(value) <= limit else value[: limit - len(_CUT)] + _CUT
