"""What only a process's first call does wrong: shown again by a fresh process it fails, else it stays open."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import audits
from audits.causes import Cause
from audits.findings.confirming import REPEATS, confirmed
from audits.outcomes import Outcome, ResultRow
from audits.repeating.settling import settled, suspected
from audits.run import audit_once, refused
from tests.audits.repeating import first_call_models as models

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    models.TUNED.clear()
    yield
    models.TUNED.clear()


def _caused(report: audits.AuditReport, cause: str) -> set[tuple[str, str | None, Outcome]]:
    return {(r.check, r.parameter, r.outcome) for r in report.rows if r.cause == cause}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_correct_twin_passes(dtype: torch.dtype) -> None:
    model, recipe = models.case("none", dtype)
    report = audits.audit(model, recipe, device="cpu")
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0)
    assert [r.outcome for r in report.rows if r.check == "step.first-call"] == [Outcome.PASS]


@pytest.mark.sampled(cases=2)
@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("fault", "dtype", "expected"),
    [
        ("backward", torch.float32, {("step.first-call", "scale"), ("gradient.finite-difference", "scale")}),
        ("forward", torch.float32, {("step.first-call", None), ("gradient.finite-difference", None)}),
        ("initialisation", torch.float64, {("step.first-call", "first.weight")}),
        ("optimizer", torch.float64, {("update.rule", "first.weight"), ("update.rule", "head.bias")}),
    ],
)
def test_a_fault_of_the_first_call_fails_when_a_fresh_process_shows_it_again(
    fault: str, dtype: torch.dtype, expected: set[tuple[str, str | None]]
) -> None:
    model, recipe = models.case(fault, dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = audits.audit(model, recipe, device="cpu")
    assert report.outcome is Outcome.FAIL
    assert {(*key, Outcome.FAIL) for key in expected} <= _caused(report, Cause.FIRST_CALL_ONLY)
    assert all("first call only" in r.message for r in report.rows if r.cause == Cause.FIRST_CALL_ONLY)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.slow
def test_in_one_process_alone_it_is_suspected_and_open() -> None:
    model, recipe = models.case("optimizer")
    report = audit_once(model, recipe, device="cpu")
    assert suspected(report)
    assert ("update.rule", "first.weight", Outcome.INCONCLUSIVE) in _caused(report, Cause.FIRST_CALL)
    second = audit_once(model, recipe, device="cpu")
    assert not suspected(second), "this process's first call is over"
    told = settled(report, second)
    assert ("update.rule", "first.weight", Outcome.INCONCLUSIVE) in _caused(told, Cause.NOT_REPRODUCED)


def test_what_cannot_be_carried_to_a_fresh_process_stays_open_and_says_why() -> None:
    model, recipe = models.case("backward", loss=lambda m, b: models.loss(m, b))
    report = audits.audit(model, recipe, device="cpu")
    assert report.outcome is not Outcome.FAIL
    found = [r for r in report.rows if r.cause == Cause.FIRST_CALL]
    assert found
    assert all("no fresh process could be asked (the model cannot be sent to it: " in r.message for r in found)


@pytest.mark.slow
def test_a_gradient_that_is_merely_random_is_no_first_call() -> None:
    for _ in range(3):
        model, recipe = models.case("noise")
        report = audits.audit(model, recipe, device="cpu")
        assert not _caused(report, Cause.FIRST_CALL_ONLY)
        assert not _caused(report, Cause.FIRST_CALL)
        row = next(r for r in report.rows if r.check == "step.first-call")
        assert (row.outcome, row.cause) == (Outcome.SKIPPED, "not deterministic")


def _runs(*outcomes: str) -> tuple[list[ResultRow], list[int], list[ResultRow]]:
    """What `confirmed` makes of a first run and those after it: f fails, p passes."""
    seeds: list[int] = []

    def row(what: str) -> list[ResultRow]:
        outcome = Outcome.FAIL if what == "f" else Outcome.PASS
        return [ResultRow(check="update.rule", outcome=outcome, parameter="w", message="wrong")]

    def run(seed: int) -> list[ResultRow]:
        seeds.append(seed)
        return row(outcomes[len(seeds)])

    first = row(outcomes[0])
    return confirmed(first, run, 3, 10), seeds, first


def test_a_failure_stands_where_a_second_seed_shows_it() -> None:
    rows, seeds, first = _runs("f", "f")
    assert (rows, seeds) == (first, [10])
    assert _runs("p")[1] == []


@pytest.mark.parametrize("position", range(REPEATS))
def test_a_failure_that_a_repeat_shows_is_chance_or_the_seeds(position: int) -> None:
    pattern = ["p"] * position + ["f"]
    rows, seeds, _ = _runs("f", "p", *pattern)
    assert (rows[0].outcome, rows[0].cause) == (Outcome.INCONCLUSIVE, Cause.NOT_REPRODUCED)
    assert seeds == [10] + [3] * (position + 1)


def test_a_failure_that_nothing_repeats_is_suspected_of_the_first_call() -> None:
    rows, seeds, _ = _runs("f", "p", *["p"] * REPEATS)
    assert (rows[0].outcome, rows[0].cause) == (Outcome.INCONCLUSIVE, Cause.FIRST_CALL)
    assert seeds == [10] + [3] * REPEATS
    report = refused("x")
    report = type(report)(rows=tuple(rows), coverage_of=report.coverage_of, identity=report.identity)
    assert settled(report, report).rows[0].outcome is Outcome.FAIL
    stopped = settled(report, refused("the audit ran out of memory")).rows[0]
    assert (stopped.outcome, stopped.cause) == (Outcome.INCONCLUSIVE, Cause.FIRST_CALL)
    assert "the audit ran out of memory" in stopped.message


SCRIPT = """
import sys
import torch
import audits
from tests.audits.repeating import first_call_models as models

class Own(models.Net):
    pass

def loss(model, batch):
    return models.loss(model, batch)

def main():
    print("trained")
    model = Own("backward")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recipe = audits.Recipe.capture(model, batch={"x": torch.ones(4, 3), "y": torch.ones(4, 2)}, loss=loss,
                                   optimizer=optimizer)
    report = audits.audit(model, recipe, device="cpu")
    for row in report.rows:
        if row.check == "step.first-call":
            print(row.outcome, row.cause, row.message)

"""


@pytest.mark.end_to_end
@pytest.mark.parametrize("guarded", [True, False], ids=["main guard", "none"])
def test_a_class_of_the_script_itself_travels_where_the_script_has_a_main_guard(guarded: bool, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + ("if __name__ == '__main__':\n    main()\n" if guarded else "main()\n"))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120,
                          env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained") == 1
    if guarded:
        assert f"fail {Cause.FIRST_CALL_ONLY}" in done.stdout
    else:
        assert f"inconclusive {Cause.FIRST_CALL}" in done.stdout
        assert "a script without if __name__ == '__main__'" in done.stdout


@pytest.mark.end_to_end
@pytest.mark.parametrize("fault", ["none", "optimizer"])
def test_a_versions_second_child_tells_its_first_call(fault: str, tmp_path: Path) -> None:
    from flows.one_audit.one_version import audit_directory
    from flows.settings.environment import GradauditSettings

    report = audit_directory(models.write(tmp_path / "model", fault), GradauditSettings.load(device="cpu"))
    if fault == "none":
        assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0)
        return
    assert report.outcome is Outcome.FAIL
    assert ("update.rule", "first.weight", Outcome.FAIL) in _caused(report, Cause.FIRST_CALL_ONLY)
