"""``python -m audits.afresh FOLDER SCRIPT`` audits what `audits.repeating.fresh_process` carried here.

What it unpickles was written by the process that started it just before, in a folder that only this user can read.
"""

from __future__ import annotations

import pickle
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import torch

from audits.repeating.fresh_process import ANSWER, CARRIED
from audits.run import audit_once


def main(folder: Path, script: str) -> None:
    """Read what was carried, audit it, write the answer."""
    if script:  # as multiprocessing does for its spawned children: the script's definitions, under __main__
        module = types.ModuleType("__mp_main__")
        module.__dict__.update(runpy.run_path(script, run_name="__mp_main__"))
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    carried: dict[str, Any] = torch.load(folder / CARRIED, weights_only=False)
    report = audit_once(carried["model"], carried["recipe"], settings=carried["settings"], device=carried["device"])
    (folder / ANSWER).write_bytes(pickle.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
