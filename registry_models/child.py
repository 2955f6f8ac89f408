"""The child's entry: ``python -m registry_models.child REQUEST.json``. Loads, audits, answers; holds no credentials."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from audits.errors import GradauditError, InputError
from audits.report import AuditReport
from audits.run import audit, refused
from audits.settings import AuditSettings
from registry_models.answer import write_answer
from registry_models.loading import load_module
from registry_models.recipe_files import read_recipe

_log = logging.getLogger("gradaudit.child")

NO_RECIPE = (
    "this version has no recipe, so nobody knows its loss and optimizer: register it with "
    "registry_models.log_model(model, name, recipe=Recipe.capture(...)), or give it one with "
    "registry_models.attach_recipe('models:/NAME/VERSION', recipe)"
)


def run(request: dict[str, object]) -> AuditReport:
    """Carry out one request; whatever goes wrong becomes an inconclusive report with its cause."""
    try:
        code, recipe_folder = request["code_folder"], request["recipe_folder"]
        folder = Path(str(request["folder"]))
        model = load_module(folder, str(request["artifact_kind"]), None if code is None else Path(str(code)))
        if recipe_folder is None:
            return refused(NO_RECIPE, cause="no recipe")
        recipe = read_recipe(Path(str(recipe_folder)))
        settings = AuditSettings.from_mapping(request["settings"])  # type: ignore[arg-type]
        return audit(model, recipe, settings=settings, device=str(request["device"]))
    except InputError as error:
        return refused(str(error))
    except GradauditError as error:
        return refused(str(error), cause="stopped")
    except MemoryError:
        return refused("out of memory while loading or auditing the model", cause="out of memory")
    except Exception as error:
        _log.exception("the audit stopped")
        return refused(f"the audit stopped: {type(error).__name__}: {error}", cause="stopped")


def main(arguments: list[str]) -> int:
    """Read the request, answer it, return 0; an answer that cannot be written is the only failure."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    write_answer(run(request), Path(request["answer_folder"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
