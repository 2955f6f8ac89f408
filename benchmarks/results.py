"""The results store at size: bytes a row, one parameter's history, last night's failures, compaction.

    python benchmarks/results.py                                  5 nights of 300,000 rows, in a minute
    python benchmarks/results.py --nights 30 --rows 3000000       90 million rows: 4 GB of disk, half an hour

Rows are synthetic and shaped like real ones: 25 parameters and 12 checks a model, the checks' own sentences, the
columns each check fills, random figures. The last night is written as nightly audits write it, two files an audit, and
merged by the real compaction; the nights before it are written by the same writer, as a compaction of their day leaves
them. Every time is of a new DuckDB connection, the median of five.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from audits.history.parameter_history import history
from audits.results.compaction import ROW_GROUP, compact, compact_months
from audits.results.files import Layer
from audits.results.format import AUDITS_SCHEMA, ROWS_SCHEMA
from audits.results.queries import query
from audits.results.store import ResultsStore, writing_atomically

LAST_NIGHT = datetime.date(2026, 10, 31)
LAYERS = ("attention.projections", "attention.output", "mlp.0", "mlp.2")
#: check -> its sentence, and the columns that it fills with figures.
CHECKS = {
    "registration.coverage": ("{p} is in the optimizer of phase step", ()),
    "gradient.finite-difference": (
        "the gradient of '{p}' is the loss's derivative along a random direction through all tensors; an error of "
        "{x:.1e} would have been found",
        ("measured", "expected", "error", "threshold", "detection_limit", "parameter_norm", "gradient_norm"),
    ),
    "gradient.native-dtype": ("the gradient of {p} in torch.float32 agrees with float64 ({x:.1e} of 1.2e-05)",
                              ("measured", "error")),
    "update.rule": ("{p} moved as AdamW's rule says (step 1)",
                    ("measured", "expected", "error", "detection_limit", "parameter_norm", "update_norm")),
    "update.state": ("{p}: the optimizer's exp_avg_sq after step 1 is the rule's", ("error",)),
    "update.lost-to-rounding": ("{p}: 0% of the norm of step 1's update was lost", ()),
    "step.gradient-present": ("{p}'s gradient arrived at the optimizer of phase 'step' in step 1", ()),
    "step.gradient": ("{p} received the declared loss's gradient (step 1, phase 'step')", ("measured", "expected")),
    "update.finite": ("{p} is finite after step 1", ()),
    "health.exploding": ("{p}: gradient norm {x:.3g}", ("measured", "gradient_norm")),
    "health.all-zero": ("{p}: gradient not all zero", ()),
    "health.update-ratio": ("{p}: a step moves it by {x:.3g} of itself", ("measured", "error")),
}  # fmt: skip
FIGURES = ("measured", "expected", "error", "threshold", "detection_limit", "parameter_norm", "gradient_norm",
           "update_norm")  # fmt: skip


def parameters() -> list[str]:
    blocks = [f"blocks.{b}.{layer}.{kind}" for b in range(3) for layer in LAYERS for kind in ("weight", "bias")]
    return [*blocks, "head.weight"]


class Synthetic:
    """Audits of one model version each: the same rows every night but for their figures."""

    def __init__(self, models: int, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.models = sorted(f"team-{m % 40:02d}/model-{m:05d}" for m in range(models))
        self.digests = [self.random.bytes(16).hex() for _ in range(3 * models)]
        pairs = [(check, p) for check in CHECKS for p in parameters()]
        self.rows_per_audit = len(pairs)
        self.check, self.parameter = ([pair[i] for pair in pairs] for i in (0, 1))
        self.filled = {c: np.array([c in CHECKS[check][1] for check, _ in pairs]) for c in FIGURES}

    def night(self, date: datetime.date, block: int = 200) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield rows and audits of some models at a time."""
        for start in range(0, len(self.models), block):
            yield self.audits_of(date, range(start, min(start + block, len(self.models))))

    def audits_of(self, date: datetime.date, which: range) -> tuple[pa.Table, pa.Table]:
        n, per = len(which), self.rows_per_audit
        began = datetime.datetime.combine(date, datetime.time(2), datetime.UTC)
        failed = self.random.random(n) < 0.005
        at = [began + datetime.timedelta(seconds=int(s)) for s in self.random.integers(0, 4 * 3600, n)]
        identity = {
            "audit_id": [self.random.bytes(12).hex() for _ in which], "audited_at": at,
            "model_name": [self.models[i] for i in which], "model_version": [1 + i % 5 for i in which],
            "model_digest": [self.digests[3 * i] for i in which],
            "recipe_digest": [self.digests[3 * i + 1][:16] for i in which], "settings_digest": ["5d41402abc4b2a76"] * n,
            "torch": ["2.13.0"] * n, "device": ["NVIDIA H100 80GB HBM3"] * n, "driver": ["13.0"] * n,
            "artifact_kind": ["eager"] * n, "isolation": ["bubblewrap"] * n,
        }  # fmt: skip
        figures = {}
        for column in FIGURES:
            values = np.exp(self.random.normal(-6, 3, n * per))
            figures[column] = pa.array(values, mask=~np.tile(self.filled[column], n))
        outcome = np.full((n, per), "pass", dtype=object)
        outcome[failed, 30:33] = "fail"
        shown = np.exp(self.random.normal(-6, 3, n * per)).tolist()
        sentences = [CHECKS[check][0] for check in self.check]
        message = [sentences[i % per].format(p=self.parameter[i % per], x=shown[i]) for i in range(n * per)]
        columns: dict[str, pa.Array] = {
            "row": pa.array(np.tile(np.arange(per, dtype=np.int32), n)), "check": pa.array(self.check * n),
            "outcome": pa.array(outcome.ravel().tolist()), "severity": pa.array(["fail"] * (n * per)),
            "phase": pa.array(["step"] * (n * per)), "step": pa.array(np.ones(n * per, np.int16)),
            "lane": pa.array(["native"] * (n * per)), "parameter": pa.array(self.parameter * n),
            "module": pa.array([f"Linear ({p.rpartition('.')[0]})" for p in self.parameter] * n),
            "numel": pa.array(np.tile(np.arange(per) * 64, n)), "dtype": pa.array(["torch.float32"] * (n * per)),
            "seed": pa.array(np.zeros(n * per, np.int64)), "message": pa.array(message),
            "cause": pa.nulls(n * per, pa.string()), "where_to_look": pa.nulls(n * per, pa.string()), **figures,
        }  # fmt: skip
        each = pa.array(np.repeat(np.arange(n), per))
        typed = {name: pa.array(values, ROWS_SCHEMA.field(name).type) for name, values in identity.items()}
        rows = pa.table(
            [columns[f.name] if f.name in columns else typed[f.name].take(each) for f in ROWS_SCHEMA],
            schema=ROWS_SCHEMA,
        )
        n_fail = np.where(failed, 3, 0)
        lines = {
            **identity, "outcome": ["fail" if f else "pass" for f in failed], "coverage": [1.0] * n,
            "coverage_elements": [1.0] * n, "n_pass": (per - n_fail).tolist(), "n_warn": [0] * n,
            "n_fail": n_fail.tolist(), "n_inconclusive": [0] * n, "n_skipped": [0] * n, "seconds": [4.1] * n,
            "run_id": [self.random.bytes(16).hex() for _ in which], "fingerprint": identity["audit_id"],
            "due_key": identity["audit_id"], "occasion": [date.isoformat()] * n,
            "message": ["PASS: 300 claims hold; 100% of the trainable parameters covered."] * n,
            "parts": [[("weights", self.digests[3 * i]), ("optimizer", self.digests[3 * i + 1])] for i in which],
            "provenance": [[("loss", "declared")]] * n, "limits": [[]] * n, "unresolved": [[]] * n,
        }  # fmt: skip
        audits = pa.table(
            {f.name: pa.array(lines.get(f.name, [None] * n), f.type) for f in AUDITS_SCHEMA}, schema=AUDITS_SCHEMA
        )
        return rows, audits


def write_merged(store: ResultsStore, made: Synthetic, date: datetime.date) -> None:
    """A past night, as its compaction left it."""
    root = Path(store.root)
    day = f"audit_date={date.isoformat()}"
    with (
        writing_atomically(root / "rows" / day / "merged-0.parquet", ROWS_SCHEMA) as rows_file,
        writing_atomically(root / "audits" / day / "merged-0.parquet", AUDITS_SCHEMA) as audits_file,
    ):
        for rows, audits in made.night(date):
            rows = rows.sort_by([("model_name", "ascending"), ("parameter", "ascending"), ("row", "ascending")])
            rows_file.write_table(rows, row_group_size=ROW_GROUP[Layer.DAY])
            audits_file.write_table(audits)


def write_as_audits(store: ResultsStore, made: Synthetic, date: datetime.date) -> int:
    """Last night: two files an audit."""
    number = 0
    for rows, audits in made.night(date):
        for index in range(audits.num_rows):
            audit_id = audits.column("audit_id")[index].as_py()
            own = rows.slice(index * made.rows_per_audit, made.rows_per_audit)
            store.write("rows", own, date=date, audit_id=audit_id)
            store.write("audits", audits.slice(index, 1), date=date, audit_id=audit_id)
            number += 1
    return number


def median(action: Callable[[], int]) -> tuple[float, float, int]:
    """Seconds by the clock and of the processor, medians of five, and what was found."""
    times, work, found = [], [], 0
    for _ in range(5):
        began, busy = time.perf_counter(), time.process_time()
        found = action()
        times.append(time.perf_counter() - began)
        work.append(time.process_time() - busy)
    return statistics.median(times), statistics.median(work), found


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


def measure(store: ResultsStore, made: Synthetic, label: str) -> None:
    model = made.models[len(made.models) // 2]
    failures = 'SELECT model_name, model_version, "check", parameter, message FROM failures'
    questions: dict[str, Callable[[], int]] = {
        "one parameter's history": lambda: len(history(store, model, parameter="blocks.1.mlp.0.weight")),
        "last night's failures": lambda: query(store, failures, since=LAST_NIGHT).num_rows,
        "last night's failures, by a filter on audit_date": lambda: (
            query(store, f"{failures} WHERE audit_date = DATE '{LAST_NIGHT}'").num_rows
        ),
    }
    for question, ask in questions.items():
        seconds, work, found = median(ask)
        print(f"{label:24} {question:50} {seconds:7.3f} s, {work:.3f} s of CPU   {found:,} lines", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nights", type=int, default=5)
    options.add_argument("--rows", type=int, default=300_000, help="rows a night, 300 of each audit")
    options.add_argument("--folder", type=Path, help="where the store is made and left; a temporary one otherwise")
    chosen = options.parse_args()
    print(f"python {sys.version.split()[0]}, pyarrow {pa.__version__}, duckdb {duckdb.__version__}")
    with tempfile.TemporaryDirectory(prefix="gradaudit-results-", dir=chosen.folder) as temporary:
        run(ResultsStore(temporary), Synthetic(max(1, chosen.rows // 300)), chosen.nights)


def run(store: ResultsStore, made: Synthetic, nights: int) -> None:
    root = Path(store.root)
    rows = made.rows_per_audit * len(made.models)
    print(f"{nights} nights of {len(made.models):,} audits and {rows:,} rows", flush=True)
    began = time.perf_counter()
    for back in range(nights - 1, 0, -1):
        write_merged(store, made, LAST_NIGHT - datetime.timedelta(back))
    print(f"{nights - 1} nights written in {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    audits = write_as_audits(store, made, LAST_NIGHT)
    seconds = time.perf_counter() - began
    print(
        f"last night: {audits:,} audits, two files each, in {seconds:.0f} s: {1000 * seconds / audits:.1f} ms an audit"
    )
    measure(store, made, "last night as written")
    began = time.perf_counter()
    merged = compact(store, before=LAST_NIGHT + datetime.timedelta(1))
    print(f"{merged:,} files of last night merged in {time.perf_counter() - began:.0f} s")
    day = bytes_of(root / "rows" / f"audit_date={LAST_NIGHT}") / rows
    print(f"bytes a row, a night's file: {day:.1f}")
    measure(store, made, "every night merged")
    months = sorted({f.month for f in store.files("rows")})
    began = time.perf_counter()
    merged = compact_months(store, months, before=LAST_NIGHT + datetime.timedelta(1))
    print(f"{merged} files merged into {len(months)} months in {time.perf_counter() - began:.0f} s")
    print(f"bytes a row, a month's file: {bytes_of(root / 'rows') / (rows * nights):.1f}")
    measure(store, made, "the month merged")
    total = query(store, "SELECT count(*) AS n, count(DISTINCT audit_id) AS a FROM rows").to_pylist()[0]
    assert total == {"n": rows * nights, "a": len(made.models) * nights}, total
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{total['n']:,} rows of {total['a']:,} audits, none lost and none doubled; peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
