"""What can be audited, as people write it."""

from __future__ import annotations

from pathlib import Path

from audits.errors import ArtifactError
from audits.naming import no_reference, read_reference


def refuse_target(target: str) -> None:
    """Refuse what is no target, before the seconds that MLflow's and torch's imports take.

    Raises:
        ArtifactError: it is neither a reference nor a directory.
    """
    if not target.strip():
        raise ArtifactError("the target is empty: write models:/NAME/VERSION, models:/NAME@ALIAS or a model directory")
    if target.startswith("models:"):
        if read_reference(target) is None:
            raise ArtifactError(no_reference(target))
    elif not Path(target).is_dir():
        hint = "" if "/" in target else f"; for the registered model {target} write models:/{target}/VERSION"
        raise ArtifactError(
            f"{target!r} is neither models:/NAME/VERSION, models:/NAME@ALIAS nor a model directory{hint}"
        )


def refuse_reference(target: str) -> None:
    """Refuse what names no registered version, before the seconds that MLflow's import takes.

    Raises:
        ArtifactError: it is no reference.
    """
    if read_reference(target) is None:
        raise ArtifactError(no_reference(target))
