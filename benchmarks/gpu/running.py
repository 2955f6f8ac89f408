"""Cases, each one line of output: run in order until the time is spent, and counted."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from audits import AuditSettings, Outcome, audit
from audits.outcomes import ResultRow
from audits.report import AuditReport


class LeftOutError(Exception):
    """The case cannot be run here; the text says why."""


@dataclass(frozen=True)
class Bench:
    """Where the cases run.

    Attributes:
        device: ``cuda``, or ``cpu`` to try the cases themselves.
        quick: smaller models, and one of several like cases.
        deadline: `time.perf_counter` at which no further case is begun.
    """

    device: str
    quick: bool
    deadline: float

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.perf_counter()

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(self.device) for key, value in batch.items()}

    def audit(self, model: Any, recipe: Any, **settings: Any) -> AuditReport:
        return audit(model, recipe, device=self.device, settings=AuditSettings(**settings))


@dataclass(frozen=True)
class Found:
    """What a case came to: complaints (none if all is as it should be), and a note for its line."""

    complaints: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One thing to try.

    Attributes:
        group: which part of the list.
        name: what it is.
        run: does it.
        needs: packages without which it is left out.
        cuda: whether it makes sense on a CUDA device alone.
    """

    group: str
    name: str
    run: Callable[[Bench], Found]
    needs: tuple[str, ...] = ()
    cuda: bool = False


def healthy(report: AuditReport, *, note: str = "") -> Found:
    """Expect a whole audit that passes: no failure, and no open question that keeps the version from its verdict."""
    complaints: tuple[str, ...] = ()
    if report.outcome not in (Outcome.PASS, Outcome.WARN) or _rows(report, Outcome.FAIL):
        complaints = (f"the audit ended {report.outcome}, coverage {report.coverage:.2f}",
                      *told(report, [Outcome.FAIL, Outcome.INCONCLUSIVE]))  # fmt: skip
    return Found(complaints, note or f"{report.outcome}, coverage {report.coverage:.2f}")


def no_alarm(report: AuditReport) -> Found:
    """Expect no failing row, whatever stays open: for audits of some checks alone, which have no verdict."""
    still_open = len(_rows(report, Outcome.INCONCLUSIVE))
    complaints = told(report, [Outcome.FAIL])
    complaints += tuple(row.message for row in report.rows if row.check == "audit.completed")
    return Found(complaints, f"no alarm, {still_open} open" if still_open else "no alarm")


def _rows(report: AuditReport, outcome: Outcome) -> list[ResultRow]:
    return [row for row in report.rows if row.outcome is outcome]


def wrong(report: AuditReport, *, check: str, named: str = "", parameters: set[str] | None = None) -> Found:
    """Expect a failing row of a check (a prefix), whose text names the culprit, for exactly these parameters."""
    rows = [row for row in _rows(report, Outcome.FAIL) if row.check.startswith(check)]
    complaints = []
    if not rows:
        complaints = [f"no {check} failed: the audit ended {report.outcome}", *told(report, [Outcome.INCONCLUSIVE])]
    elif named and not any(named in f"{row.message} {row.module} {row.cause}" for row in rows):
        complaints = [f"nothing names {named!r}: {rows[0].message}"]
    if rows and parameters is not None and {row.parameter for row in rows} != parameters:
        complaints.append(f"{check} names {sorted(str(row.parameter) for row in rows)}")
    return Found(tuple(complaints), f"found by {rows[0].check}" if rows else "")


def told(report: AuditReport, outcomes: list[Outcome]) -> tuple[str, ...]:
    """Return the first few messages of some outcomes."""
    rows = [row for row in report.rows if row.outcome in outcomes]
    texts = [f"{row.outcome} {row.check} {row.parameter or row.module or ''}: {row.message}" for row in rows[:3]]
    return (*texts, *([f"and {len(rows) - 3} more"] if len(rows) > 3 else []))


@contextlib.contextmanager
def switches(**changes: Any) -> Iterator[None]:
    """Set torch's precision switches by path (``cuda__matmul__allow_tf32=True``) and put all of them back."""
    places = [("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn")]
    before = {place: _switch(*place) for place in places}
    legacy = torch.get_float32_matmul_precision()
    allow = torch.backends.cudnn.allow_tf32
    try:
        for path, value in changes.items():
            *way, name = path.split("__")
            target: Any = torch.backends
            for step in way:
                target = getattr(target, step)
            setattr(target, name, value)
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        if any(value is None for value in before.values()):
            torch.backends.cudnn.allow_tf32 = allow  # a torch before 2.9 has no other switch
        for (backend, name), value in before.items():
            if value is not None:
                getattr(getattr(torch.backends, backend), name).fp32_precision = value


def _switch(backend: str, name: str) -> str | None:
    try:
        return str(getattr(getattr(torch.backends, backend), name).fp32_precision)
    except (AttributeError, RuntimeError):
        return None


def missing(names: tuple[str, ...]) -> str:
    """Return which of some packages this Python has not, as text."""
    return ", ".join(name for name in names if importlib.util.find_spec(name) is None)


def run_all(cases: list[Case], bench: Bench, *, verbose: bool) -> int:
    """Run the cases, print a line each and a tally; return the exit code."""
    right = bad = 0
    left: dict[str, int] = {}
    began = time.perf_counter()
    for case in cases:
        line, reason = f"{case.group:11s} {case.name:58s}", ""
        if case.cuda and not bench.cuda:
            reason = "needs a CUDA device"
        elif absent := missing(case.needs):
            reason = f"no {absent} here"
        elif bench.seconds_left <= 0:
            reason = "the time is spent"
        if not reason:
            _clear(bench)
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = case.run(bench)
            except LeftOutError as error:
                reason = str(error)
            except Exception as error:
                found = Found((f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",))
                if verbose:
                    traceback.print_exc()
        if reason:
            left[reason] = left.get(reason, 0) + 1
            print(f"left  {line} {reason}", flush=True)
            continue
        seconds = time.perf_counter() - start
        memory = f" {torch.cuda.max_memory_allocated() / 2**30:6.2f} GiB" if bench.cuda else ""
        right, bad = right + (not found.complaints), bad + bool(found.complaints)
        print(f"{'WRONG' if found.complaints else 'ok   '} {line} {seconds:6.2f} s{memory}  {found.note}", flush=True)
        for text in found.complaints:
            print(f"        {text[:400]}", flush=True)
    print(f"{right} as they should be, {bad} not, {sum(left.values())} left out; {time.perf_counter() - began:.0f} s")
    for reason, count in left.items():
        print(f"  left out: {count} ({reason})")
    return 1 if bad else 0


def _clear(bench: Bench) -> None:
    gc.collect()
    torch.manual_seed(0)
    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
