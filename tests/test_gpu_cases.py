"""The cases of `make gpu`, tried on the CPU where they make sense there: the script itself works."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("benchmarks.gpu", reason="run from the checkout")

from benchmarks.gpu import nets, opaque, optimizers, sizes
from benchmarks.gpu.running import Bench, Case, Found, LeftOutError, run_all


def _bench() -> Bench:
    return Bench("cpu", True, time.perf_counter() + 600.0)


@pytest.mark.exhaustive
def test_healthy_cases_pass_and_wrong_ones_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    bench = _bench()
    chosen = [c for c in (*nets.cases(bench), *sizes.cases(bench)) if not c.cuda]
    chosen += [c for c in optimizers.cases(bench) if c.name.startswith(("AdamW", "fused AdamW", "Adagrad"))]
    assert run_all(chosen, bench, verbose=True) == 0
    shown = capsys.readouterr().out
    assert "found by update.state" in shown
    assert "found by gradient.native-dtype" in shown
    assert shown.count("\n") > len(chosen)


def test_every_optimizer_and_implementation_is_a_case() -> None:
    names = {case.name.split(" ")[0] for case in optimizers.cases(_bench())}
    assert set(optimizers.classes()) <= names
    assert "capturable loop" in optimizers.implementations("RAdam")
    assert optimizers.implementations("LBFGS") == ["plain"]


@pytest.mark.end_to_end
def test_what_goes_wrong_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(bench: Bench) -> Found:
        raise RuntimeError("no such kernel")

    def refusing(bench: Bench) -> Found:
        raise LeftOutError("too small a GPU")

    found = [
        Case("a", "complains", lambda bench: Found(("it failed",))), Case("a", "raises", raising),
        Case("a", "left out", refusing), Case("a", "absent", raising, needs=("no_such_package",)),
        Case("a", "needs one", raising, cuda=True), Case("a", "fine", lambda bench: Found((), "note")),
    ]  # fmt: skip
    assert run_all(found, _bench(), verbose=False) == 1
    shown = capsys.readouterr().out
    for text in ("it failed", "RuntimeError: no such kernel", "too small a GPU", "no no_such_package here",
                 "needs a CUDA device", "1 as they should be, 2 not, 3 left out"):  # fmt: skip
        assert text in shown
    late = Bench("cpu", True, time.perf_counter() - 1.0)
    assert run_all(found[-1:], late, verbose=False) == 0
    assert "the time is spent" in capsys.readouterr().out


def test_the_kernels_cases_name_their_faults() -> None:
    names = [case.name for case in opaque.cases(_bench())]
    assert len(names) == len(set(names))
    assert {f"numpy RMSNorm {fault}, float32" for fault in opaque.FAULTS} <= set(names)
