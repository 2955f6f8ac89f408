"""Inputs that nobody wrote: what this process reads of strangers raises its own errors and no others.

The same inputs every time, a minute of them; ``FUZZ_EXAMPLES`` asks for more of each.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from audits.errors import GradauditError
from audits.outcomes import Lane, Outcome, ResultRow, Severity
from audits.report import AuditReport
from audits.run import refused
from flows.cli.junit import junit_xml
from flows.service.signatures import RefusedError, verify
from flows.service.webhook import wanted_version
from registry_models.artifacts.archives import is_torchscript, refuse_expanding
from registry_models.artifacts.snapshot import read_snapshot
from registry_models.artifacts.version_parts import version_parts
from registry_models.child.answer import read_answer, write_answer
from registry_models.recipes.recipe_files import read_recipe
from registry_models.report.note import render_markdown
from registry_models.report.plots import render_plots
from registry_models.report.rendering import render_html
from registry_models.waiver_files import read_waivers

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None if EXAMPLES > 60 else 2000,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

#: Texts that mean something to a reader somewhere, and any others.
TEXTS = st.one_of(
    st.sampled_from(
        ["", "=1", "<b>", "http://x", "\ufffe", "\u202e", "\ud800", "\0", "\x1b[31m", "9" * 5000, "nan", "..", "a\nb"]
    ),
    st.text(max_size=40),
    st.text(st.characters(), max_size=20),
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([1e400, -0.0, 5e-324, 1.7e308, -1.7e308])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)


def typed(read: Callable[[], Any], *errors: type[Exception]) -> None:
    """Read; an error is one of the project's own."""
    try:
        read()
    except (GradauditError, *errors):
        pass


def mangled(content: bytes) -> st.SearchStrategy[bytes]:
    """An honest file with a few bytes changed, a part cut out or put in."""
    places = st.integers(0, max(len(content) - 1, 0))
    change = st.tuples(places, st.integers(0, 30), st.binary(max_size=20))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        made = content
        for at, length, instead in changes:
            made = made[:at] + instead + made[at + length :]
        return made

    return st.lists(change, max_size=4).map(apply)


def a_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="test-fuzz-")


MLMODEL = b"""artifact_path: model
flavors:
  pytorch:
    code: code
    model_data: data
    pytorch_version: 2.13.0
  python_function: {env: {conda: conda.yaml}, loader_module: mlflow.pytorch}
model_id: m-0123456789abcdef
saved_input_example_info: {artifact_path: input_example.json, type: ndarray}
signature:
  inputs: '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 2]}}]'
utc_time_created: '2026-01-31 02:00:00.000000'
"""


@FUZZ
@given(
    st.one_of(
        mangled(MLMODEL), st.binary(max_size=200), JSON.map(lambda v: json.dumps(v).encode("utf-8", "surrogatepass"))
    )
)
@example(b"x: 2001-99-99")
@example(b'flavors: {pytorch: {code: "\\0"}}')
def test_an_mlmodel(content: bytes) -> None:
    with a_folder() as name:
        Path(name, "MLmodel").write_bytes(content)
        typed(lambda: read_snapshot(Path(name)))


RECIPE = b"""schema: 1
expect: {frozen: [a.*]}
batch: {x: {tensor: batch.x}, y: 3}
precision: float32
phases:
- name: step
  loss: {path: 'm:loss', arguments: null}
  optimizer: {class: torch.optim.SGD, defaults: {lr: 0.1}, groups: [{options: {lr: 0.1}, parameters: [w]}]}
"""


@FUZZ
@given(st.one_of(mangled(RECIPE), st.binary(max_size=200)), st.binary(max_size=100))
@example(RECIPE, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}")
@example(RECIPE, b'\x0a\0\0\0\0\0\0\0{"a":1e999')
def test_a_recipe(content: bytes, tensors: bytes) -> None:
    with a_folder() as name:
        Path(name, "recipe.yaml").write_bytes(content)
        Path(name, "batch.safetensors").write_bytes(tensors)
        typed(lambda: read_recipe(Path(name)))


WAIVERS = b"""waivers:
- id: w1
  models: [m]
  checks: [update.rule]
  reason: known
  owner: me@example.com
  until: 2027-01-31
"""


@FUZZ
@given(st.one_of(mangled(WAIVERS), st.binary(max_size=200)))
def test_waivers(content: bytes) -> None:
    with a_folder() as name:
        path = Path(name, "waivers.yaml")
        path.write_bytes(content)
        typed(lambda: read_waivers(path))


def honest_answer() -> bytes:
    with a_folder() as name, Path(name, "a").open("w+b") as stream:
        write_answer(refused("no reason"), stream)
        stream.seek(0)
        return stream.read()


ROW = json.loads(honest_answer().splitlines()[0])
LAST = json.loads(honest_answer().splitlines()[1])
FIELDS = st.sampled_from(list(ResultRow.__dataclass_fields__))


@FUZZ
@given(
    st.one_of(
        mangled(honest_answer()),
        st.tuples(
            st.dictionaries(FIELDS, JSON, max_size=4), st.dictionaries(st.sampled_from(sorted(LAST)), JSON, max_size=2)
        ).map(
            lambda both: b"".join(
                json.dumps(line).encode() + b"\n" for line in ({**ROW, **both[0]}, {**LAST, **both[1]})
            )
        ),
    )
)
def test_an_answer(content: bytes) -> None:
    with a_folder() as name:
        path = Path(name, "answer.jsonl")
        path.write_bytes(content)
        read: list[AuditReport] = []
        typed(lambda: read.append(read_answer(path, seconds=30.0)))
        for report in read:
            shown(report)


def shown(report: AuditReport) -> None:
    """Everything that is made of a report can be made of it."""
    import xml.etree.ElementTree as ET

    render_html(report, rerun="gradaudit audit {options}").encode()
    render_markdown(report, links={}).encode()
    ET.fromstring(junit_xml(report).partition("?>")[2])
    report.to_table()
    json.dumps(report.to_dict()).encode()


NAMES = st.one_of(st.none(), TEXTS)
FLOATS = st.one_of(st.none(), st.floats(), st.sampled_from([5e-324, 1.7e308, -1.7e308, 1e-200]))


SIZES = FLOATS.map(lambda value: None if value is None else abs(value))
ROWS = st.builds(
            ResultRow,
            check=st.sampled_from(["update.rule", "gradient.finite-difference", "step.gradient", "health.vanishing"]),
            outcome=st.sampled_from(list(Outcome)), severity=st.sampled_from(list(Severity)),
            parameter=NAMES, module=NAMES, phase=NAMES,
            lane=st.one_of(st.none(), st.sampled_from(list(Lane))), numel=st.one_of(st.none(), st.integers(0, 2**62)),
            measured=FLOATS, expected=FLOATS, error=FLOATS, threshold=FLOATS, detection_limit=SIZES,
            parameter_norm=SIZES, gradient_norm=SIZES, update_norm=SIZES, cause=st.one_of(st.none(), TEXTS),
            message=TEXTS,
        )  # fmt: skip


@settings(FUZZ, max_examples=max(20, EXAMPLES // 3))
@given(st.lists(ROWS, max_size=6))
def test_any_numbers_and_names_can_be_shown(rows: list[ResultRow]) -> None:
    """As they are once they have been through an answer."""
    base = refused("x")
    with a_folder() as name:
        path = Path(name, "answer.jsonl")
        with path.open("wb") as stream:
            write_answer(AuditReport(rows=tuple(rows), coverage_of=base.coverage_of, identity=base.identity), stream)
        report = read_answer(path, seconds=30.0)
    shown(report)


@settings(FUZZ, max_examples=max(4, EXAMPLES // 30), deadline=None)
@given(st.lists(ROWS, max_size=6))
def test_any_numbers_and_names_can_be_drawn(rows: list[ResultRow]) -> None:
    base = refused("x")
    render_plots(AuditReport(rows=tuple(rows), coverage_of=base.coverage_of, identity=base.identity))


def an_archive() -> bytes:
    with a_folder() as name:
        path = Path(name, "m.pth")
        with zipfile.ZipFile(path, "w") as archive:
            for part in ("m/data.pkl", "m/data/0", "m/version", "m/code/x.py", "m/constants.pkl"):
                archive.writestr(part, b"x" * 10)
        return path.read_bytes()


@FUZZ
@given(st.one_of(mangled(an_archive()), st.binary(max_size=300)))
def test_an_archive(content: bytes) -> None:
    with a_folder() as name:
        path = Path(name, "model.pth")
        path.write_bytes(content)
        typed(lambda: refuse_expanding(path))
        typed(lambda: is_torchscript(path))
        version_parts(Path(name), [(path, "digest")], None)


EVENT = b'{"entity": "model_version", "action": "created", "data": {"name": "m", "version": "3"}}'


@FUZZ
@given(
    st.one_of(
        mangled(EVENT),
        st.binary(max_size=200),
        st.tuples(TEXTS, JSON).map(
            lambda p: json.dumps({**json.loads(EVENT), "data": {"name": p[0], "version": p[1]}}).encode()
        ),
    ),
    st.dictionaries(
        st.sampled_from(["x-mlflow-signature", "x-mlflow-timestamp", "x-mlflow-delivery-id"]), TEXTS, max_size=3
    ),
)  # fmt: skip
def test_a_delivery(body: bytes, headers: dict[str, str]) -> None:
    given = {name: value.encode("latin-1", "replace").decode("latin-1") for name, value in headers.items()}
    typed(lambda: verify("secret", given, body), RefusedError)
    found: list[str | None] = []
    typed(lambda: found.append(wanted_version(body)), ValueError)
    for reference in found:
        assert reference is None or reference.encode()


def test_control_an_error_of_another_kind_is_noticed() -> None:
    with pytest.raises(KeyError):
        typed(lambda: {}["nothing"])
