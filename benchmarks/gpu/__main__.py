"""Run every case, within a time: `python -m benchmarks.gpu --help`."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import sys
import time

#: What the audits themselves need, and nothing else does.
NEEDED = ("torch", "numpy", "pandas", "pyarrow")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu tries what can be tried without a GPU")
    parser.add_argument("--quick", action="store_true", help="small models, and one of several like cases")
    parser.add_argument("--seconds", type=float, default=210.0, help="begin no case after so many seconds")
    parser.add_argument("--only", default="*", help="glob of 'group name'")
    parser.add_argument("--verbose", action="store_true", help="tracebacks")
    options = parser.parse_args()
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"{sys.executable} has no {', '.join(absent)}; PYTHON=... names another")
        return 2
    import torch

    from benchmarks.gpu import demo, nets, opaque, optimizers, sizes
    from benchmarks.gpu.running import Bench, Case, LeftOutError, missing, run_all

    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} sees none; nothing was tried. --device cpu tries the cases")
        return 2
    bench = Bench(options.device, options.quick, time.perf_counter() + options.seconds)
    known = missing(("mlflow", "prefect", "sklearn", "triton"))
    where = torch.cuda.get_device_name(0) if bench.cuda else "cpu"
    print(f"torch {torch.__version__} on {where}{f'; not installed: {known}' if known else ''}", flush=True)
    cases: list[Case] = []
    for source in (
        opaque.cases, nets.cases, sizes.cases, sizes.size_cases, optimizers.cases, demo.cases, nets.family_cases,
        demo.sandbox_cases,
    ):  # fmt: skip
        try:
            cases += source(bench)
        except LeftOutError as error:
            print(f"left  {source.__module__}: {error}")
    return run_all([c for c in cases if fnmatch.fnmatch(f"{c.group} {c.name}", options.only)], bench,
                   verbose=options.verbose)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
