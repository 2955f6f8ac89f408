"""One recipe from all the places that say something about it, field by field, and who said what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from audits.errors import RecipeError
from audits.globs import matching
from audits.recipe.capture import unwrap
from audits.recipe.recipe import Recipe
from registry_models.artifacts.loading import LoadedModel
from registry_models.inference import infer_recipe
from registry_models.recipes.recipe_files import RECIPE_FILE, read_recipe
from registry_models.recipes.recipe_sources import RecipeSource, Trust
from registry_models.recipes.trusted_recipes import declared_loss, lay_over, read_trusted

#: Fields whose origin reports show.
FIELDS = ("batch", "loss", "optimizer", "step", "expect", "stop_gradient")

#: What ``expect`` may hold that makes an audit look away.
_LENIENT = ("frozen", "custom_gradient", "writes_outside_step", "shared")


@dataclass(frozen=True)
class Lowered:
    """What a recipe that nobody vouches for takes out of the audit.

    Attributes:
        source: where it comes from.
        fields: the fields, with what they say.
        parameters: trainable parameters that they excuse; they count as not covered.
    """

    source: str
    fields: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Assembled:
    """A recipe and where it comes from.

    Attributes:
        recipe: what is audited.
        provenance: field -> a phrase; starts with ``declared`` or ``assumed`` where it is one of both.
        lowered: what a tag's recipe excuses, or None.
    """

    recipe: Recipe
    provenance: Mapping[str, str]
    lowered: Lowered | None


def assemble(
    folder: Path, loaded: LoadedModel, sources: Sequence[RecipeSource], run_params: Mapping[str, str]
) -> Assembled:
    """Take every field from the first source that has it.

    Args:
        folder: the model directory.
        loaded: the version's module.
        sources: best first.
        run_params: what the source run logged.

    Raises:
        RecipeError: a broken recipe, or nothing to infer one from.
    """
    model = unwrap(loaded.module)
    partial = [(source, read_trusted(source.path)) for source in sources if source.trust is Trust.TRUSTED]
    whole = next((s for s in sources if s.trust is not Trust.TRUSTED and (s.path / RECIPE_FILE).is_file()), None)
    named = next((s for s in sources if s.trust is Trust.TAG and not (s.path / RECIPE_FILE).is_file()), None)
    if named is not None:
        raise RecipeError(f"{named.label} names no recipe: there is no {RECIPE_FILE}")
    if whole is not None:
        recipe = read_recipe(whole.path)
        provenance = {
            field: f"assumed in {whole.label}" if field in recipe.assumed else f"declared in {whole.label}"
            for field in FIELDS
            if _says(recipe, field)
        }
    else:
        loss = next((found for _, plain in partial if (found := declared_loss(plain)) is not None), None)
        inferred = infer_recipe(folder, loaded, run_params, loss=loss)
        recipe, provenance = inferred.recipe, dict(inferred.provenance)
    untouched = recipe
    for source, plain in reversed(partial):  # the first one is laid on top
        recipe = lay_over(recipe, plain, model, source.label)
        provenance.update(dict.fromkeys(plain, f"declared in {source.label}"))
    lowered = _lowered(whole, untouched, recipe, model) if whole is not None and whole.trust is Trust.TAG else None
    return Assembled(recipe, provenance, lowered)


def _says(recipe: Recipe, field: str) -> bool:
    return field in ("batch", "loss", "optimizer") or bool(getattr(recipe, field))


def _lowered(source: RecipeSource, tagged: Recipe, final: Recipe, model: nn.Module) -> Lowered | None:
    """What the tag's recipe, as far as it was taken, excuses."""
    live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fields: list[str] = []
    excused: dict[str, None] = {}
    if tagged.stop_gradient and final.stop_gradient == tagged.stop_gradient:
        fields.append(f"stop_gradient={list(tagged.stop_gradient)}")
        for path in tagged.stop_gradient:
            excused.update(dict.fromkeys(n for n in live if not path or n == path or n.startswith(f"{path}.")))
    frozen = [record.name for record in tagged.parameters if not record.trainable and record.name in live]
    if frozen:
        fields.append(f"frozen parameters ({len(frozen)})")
        excused.update(dict.fromkeys(frozen))
    for key in _LENIENT:
        if key in tagged.expect and final.expect.get(key) == tagged.expect[key]:
            fields.append(f"expect.{key}={tagged.expect[key]!r}")
            excused.update(dict.fromkeys(matching(live, tagged.expect[key])))
    return Lowered(source.label, tuple(fields), tuple(excused)) if fields else None
