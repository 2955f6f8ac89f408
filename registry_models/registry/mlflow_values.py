"""What MLflow's stores take as a value: texts of a bounded length without what a database cannot hold."""

from __future__ import annotations

from registry_models.untrusted_text import clean

#: MLflow's REST API and its databases take tags of model versions and runs of at most this length.
MAXIMUM_TAG = 5000

_CUT = " …"


def tag_value(text: str) -> str:
    """Return a tag's value: cleaned, since names come from a model, and cut where MLflow takes no more."""
    value = clean(text)
    return value if len(value) <= MAXIMUM_TAG else value[: MAXIMUM_TAG - len(_CUT)] + _CUT
