"""The child's entry: ``python -m registry_models.child``, the request on its standard input; how it begins and ends."""

from __future__ import annotations

import gc
import logging
import os
import sys


def _carry_out() -> int:
    gc.disable()  # importing torch makes a million objects that stay: to search them for garbage takes a quarter of it
    from registry_models.child.carrying_out import main

    return main()


if __name__ == "__main__":
    status = _carry_out()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the interpreter's own end takes torch and what it brought apart, object by object: 0.9 s
