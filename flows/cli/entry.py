"""The command ``gradaudit``: the whole command line where the pipeline is installed, the light one where it is not."""

from __future__ import annotations

import atexit
import gc
import sys
from importlib.util import find_spec

from audits.parts import EXTRAS

#: New objects after which the interpreter looks for cycles among them. Importing MLflow makes a million that stay; at
#: Python's own 700 the looking takes 0.3 s of an audit's 3.4.
LOOKED_THROUGH_AFTER = 50_000

#: Only one command each asks for these, and says so itself where they are missing.
ASKED_FOR_LATE = frozenset({"duckdb", "matplotlib", "securesystemslib"})


def main() -> None:
    """Run the command line that this installation has; what is missing is one sentence, never a traceback."""
    gc.set_threshold(LOOKED_THROUGH_AFTER)
    atexit.register(_end_without_a_search)
    packages = {package for _, of_an_extra in EXTRAS.values() for package in of_an_extra} - ASKED_FOR_LATE
    if any(find_spec(package) is None for package in packages):
        from flows.cli.light import run_light

        sys.exit(run_light(sys.argv[1:]))
    from flows.cli.main import main as run_whole

    run_whole()


def _end_without_a_search() -> None:
    """Keep the interpreter's end from searching MLflow, and all that it brings, for cycles: 0.8 s.

    DuckDB's bindings would report what that search does not find as leaks.
    """
    if "_duckdb" not in sys.modules:
        gc.freeze()
