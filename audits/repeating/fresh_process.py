"""The same audit in a fresh process: model and recipe are carried there, where pickle can; nothing is forked.

`audits.afresh` is the other side.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from audits.recipe.recipe import Recipe
from audits.report import AuditReport
from audits.settings import AuditSettings

#: A fresh process imports torch (seconds) and does what this one did; it may be slower on a busy machine.
START_SECONDS, SLOWER = 120.0, 5.0

CARRIED, ANSWER = "carried.pt", "answer.pkl"


def audited_afresh(
    model: nn.Module, recipe: Recipe, settings: AuditSettings, device: str, seconds: float
) -> tuple[AuditReport | None, str]:
    """Run the audit in a fresh process.

    Args:
        model: the live module.
        recipe: its recipe.
        settings: of the audit.
        device: of the audit.
        seconds: how long it took in this process.

    Returns:
        The report, or None and why there is none: something cannot be pickled, or the process did not end by itself.
    """
    with tempfile.TemporaryDirectory(prefix="gradaudit-") as name:
        folder = Path(name)
        try:
            carried = {"model": model, "recipe": recipe, "settings": settings, "device": device}
            torch.save(carried, folder / CARRIED)
        except Exception as error:  # pickle calls what the user's classes define
            return None, f"the model cannot be sent to it: {' '.join(str(error).split())[:200]}"
        main = _main_file(folder / CARRIED)
        if isinstance(main, Refusal):
            return None, main.why
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        command = [sys.executable, "-m", "audits.afresh", str(folder), main]
        limit = START_SECONDS + SLOWER * seconds
        try:
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, f"it did not end by itself: {error}"
        if ended.returncode or not (folder / ANSWER).is_file():
            said = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            return None, f"it stopped: {said[-1][:200]}"
        answer: AuditReport = pickle.loads((folder / ANSWER).read_bytes())
        return answer, ""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why something cannot be done."""

    why: str


def _main_file(carried: Path) -> str | Refusal:
    """The script that defines what was carried, "" if none does; a script without a main guard would train again."""
    if b"__main__" not in carried.read_bytes():
        return ""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None or not Path(path).is_file():
        return Refusal("the model's class is defined in a notebook or an interactive session")
    if not _guarded(ast.parse(Path(path).read_bytes())):
        return Refusal("the model's class is defined in a script without if __name__ == '__main__':")
    return str(Path(path).resolve())


def _guarded(tree: ast.Module) -> bool:
    return any(isinstance(s, ast.If) and "__name__" in ast.unparse(s.test) and "__main__" in ast.unparse(s.test)
               for s in tree.body)  # fmt: skip
