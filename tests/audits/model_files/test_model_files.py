"""`audit_file`: functions of a file, audited without a registry, and the lines their findings go back to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from audits.errors import InputError
from audits.model_files.annotations import github_annotations, github_command, gitlab_report
from audits.model_files.model_file import AuditedFunction, audit_file, split_target
from audits.model_files.places import Place
from audits.outcomes import Outcome

FILE = Path(__file__).with_name("faulty.py")
ROOT = Path(__file__).resolve().parents[3]


def line_of(fault: str) -> int:
    """The line that says which fault it is."""
    (found,) = [n for n, line in enumerate(FILE.read_text().splitlines(), 1) if line.endswith(f"# fault: {fault}")]
    return found


def audited(function: str, root: Path = ROOT) -> AuditedFunction:
    (found,) = audit_file(FILE, function, root=root)
    return found


@pytest.mark.parametrize("function", ["audit_right", "audit_right64"])
def test_a_right_model_has_no_annotation(function: str) -> None:
    found = audited(function)
    assert found.report.passed
    assert github_annotations([found], ROOT) == []
    assert json.loads(gitlab_report([found], ROOT)) == []


@pytest.mark.parametrize(
    ("function", "fault", "check"),
    [
        ("audit_backward", "backward", "gradient.finite-difference"),
        ("audit_backward64", "backward", "gradient.finite-difference"),
        ("audit_stop", "stop", "gradient.finite-difference"),
        ("audit_optimizer", "optimizer", "update.rule"),
        ("audit_step", "step", "step.gradient"),
        ("audit_lost", "lost", "registration.stale"),
    ],
)
def test_a_fault_is_annotated_at_its_line(function: str, fault: str, check: str) -> None:
    found = audited(function)
    assert found.report.outcome is Outcome.FAIL
    first = github_annotations([found], ROOT)[0]
    where = f"file=tests/audits/model_files/faulty.py,line={line_of(fault)},title=gradaudit%3A "
    assert first.startswith(f"::error {where}"), first
    assert check in first
    assert "\n" not in first
    line = json.loads(gitlab_report([found], ROOT))[0]
    assert line["location"] == {"path": "tests/audits/model_files/faulty.py", "lines": {"begin": line_of(fault)}}
    assert (line["check_name"], line["severity"]) == (check, "critical")
    assert re.fullmatch(r"[0-9a-f]{64}", line["fingerprint"])


def test_others_code_is_never_at_fault(tmp_path: Path) -> None:
    found = audited("audit_backward", root=tmp_path)
    assert found.places[0] == Place(FILE, 1), "nothing lies in this root: what is left is the file"


def test_a_fingerprint_stays_when_lines_move() -> None:
    found = audited("audit_lost")
    moved = AuditedFunction(found.name, found.report, tuple(Place(p.file, p.line + 7) for p in found.places))
    before, after = (json.loads(gitlab_report([each], ROOT)) for each in (found, moved))
    assert [line["fingerprint"] for line in before] == [line["fingerprint"] for line in after]
    assert len({line["fingerprint"] for line in before}) == len(before)


def test_a_command_of_the_runner_is_escaped() -> None:
    said = github_command("error", "a: b, c%", "100%\r\n::error::x", Place(ROOT / "a,b:c.py", 3), ROOT)
    assert said == "::error file=a%2Cb%3Ac.py,line=3,title=a%3A b%2C c%25::100%25%0D%0A::error::x"


@pytest.mark.parametrize(
    ("source", "function", "told"),
    [
        ("x = 1\n", None, "has no function whose name begins with 'audit_'"),
        ("def audit_it():\n    return 1\n", None, "must return (model, recipe)"),
        ("def audit_it():\n    return 1\n", "audit_ti", "did you mean 'audit_it'?"),
        ("x = 1\n1 / 0\n", None, "cannot be imported: ZeroDivisionError: division by zero (line 2)"),
        ("def audit_it():\n\n    raise OSError('no data')\n", None, ":audit_it raised OSError: no data (line 3)"),
        ("def broken(:\n", None, "cannot be imported: SyntaxError"),
    ],
)
def test_what_a_file_lacks_is_said(source: str, function: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / f"file_{abs(hash((source, function)))}.py"
    path.write_text(source)
    with pytest.raises(InputError, match=re.escape(told)):
        audit_file(path, function, root=tmp_path)


def test_a_file_under_the_name_of_another_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def audit_it():\n    return 1\n")
    with pytest.raises(InputError, match="the name 'json' is another module's; rename the file"):
        audit_file((tmp_path / "json.py").resolve(), root=tmp_path)


def test_a_target_is_a_file_and_perhaps_a_function() -> None:
    assert split_target(str(FILE)) == (FILE, None)
    assert split_target(f"{FILE}:audit_right") == (FILE, "audit_right")
    for wrong in (f"{FILE}:a b", "none.py", str(FILE.parent), "models:/m/1"):
        with pytest.raises(InputError, match="does not name a Python file"):
            split_target(wrong)
