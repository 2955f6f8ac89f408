"""What an audit's process does: reads the request on its standard input, loads, audits, answers.

It holds no credentials. What every audit needs is imported first and the request read then: a process that was started
before its turn has only the audit left to do. Without a request it ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audits.causes import Cause
from audits.errors import GradauditError, InputError
from audits.gradients import check as _imported_before  # noqa: F401  (what an audit imports on its way otherwise)
from audits.refusals import refused
from audits.report import AuditReport
from audits.run import audit_once
from audits.settings import AuditSettings
from registry_models.artifacts.loading import load_model
from registry_models.child.answer import write_answer
from registry_models.child.assembling import assemble
from registry_models.child.caveats import with_limits
from registry_models.inference.infer import NO_RECIPE, NothingToTrainError
from registry_models.recipes.recipe_sources import RecipeSource, Trust, code_folders

_log = logging.getLogger("gradaudit.child")


def run(request: dict[str, object]) -> AuditReport:
    """Carry out one request; whatever goes wrong becomes an inconclusive report with its cause."""
    try:
        folder, code = Path(str(request["folder"])), request["code_folder"]
        settings = AuditSettings.from_mapping(request["settings"])  # type: ignore[arg-type]
        sources = _sources(request)
        code_paths = code_folders(None if code is None else Path(str(code)), sources)
        loaded = load_model(folder, str(request["artifact_kind"]), code_paths)
        params: Any = request.get("run_params") or {}
        assembled = assemble(folder, loaded, sources, {str(k): str(v) for k, v in params.items()})
        device = str(request["device"])
        if loaded.exported is not None and loaded.exported.device is not None:
            device = loaded.exported.device
        report = audit_once(loaded.module, assembled.recipe, settings=settings, device=device)
        return with_limits(report, loaded, assembled, settings)
    except NothingToTrainError as error:
        return refused(str(error), cause=Cause.NOTHING_TO_TRAIN)
    except InputError as error:
        return refused(str(error), cause=Cause.NO_RECIPE if str(error) == NO_RECIPE else Cause.REFUSED)
    except GradauditError as error:
        return refused(str(error), cause=Cause.STOPPED)
    except MemoryError:
        return refused("out of memory while loading or auditing the model", cause=Cause.OUT_OF_MEMORY)
    except Exception as error:
        _log.exception("the audit stopped")
        return refused(f"the audit stopped: {type(error).__name__}: {error}", cause=Cause.STOPPED)


def _sources(request: Mapping[str, object]) -> list[RecipeSource]:
    """The request's recipe sources; ``recipe_folder`` alone means the version's own."""
    listed: Any = request.get("recipe_sources")
    if listed is not None:
        return [RecipeSource.from_plain(plain) for plain in listed]
    folder = request.get("recipe_folder")
    return [] if folder is None else [RecipeSource(Trust.VERSION, "the version", Path(str(folder)))]


def main() -> int:
    """Read the request, answer it, return 0; an answer that cannot be written is the only failure."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    importlib.import_module("torch._dynamo")  # 1.1 s; every audit needs it: torch imports it with its first optimizer
    gc.freeze()
    gc.enable()
    with os.fdopen(os.dup(0), "rb") as stream:
        text = stream.read()
    if not text:  # nobody needs it any more
        return 0
    with open(os.devnull, "rb") as nothing:  # a model that asks its user for something gets no answer
        os.dup2(nothing.fileno(), 0)
    request = json.loads(text)
    with os.fdopen(request["answer"], "wb") as stream:
        write_answer(run(request), stream)
    return 0
