"""``gradaudit attach``: a recipe for a version that is registered without one."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from flows.arguments import recipe_folder
from flows.output import console, print_json
from flows.settings.environment import GradauditSettings
from registry_models.logging_models import attach_recipe_folder
from registry_models.registry.connecting import connect
from registry_models.registry.versions import VersionReference


def attach_folder(version: str, folder: Path, settings: GradauditSettings, *, as_json: bool) -> int:
    """Store the recipe, name it in the version's tag, print where it is; return 0.

    Raises:
        RecipeError: the folder holds no usable recipe; the text names what is wrong.
        ArtifactError: there is no such version.
        InfrastructureError: the registry does not answer.
    """
    VersionReference.parse(version)
    uri = attach_recipe_folder(version, recipe_folder(folder), client=connect(settings.tracking_uri))
    if as_json:
        print_json({"version": version, "recipe": uri}, indent=None)
    else:
        console.print(Text(f"{version} has the recipe {uri} now; `gradaudit audit {version}` uses it."), soft_wrap=True)
    return 0
