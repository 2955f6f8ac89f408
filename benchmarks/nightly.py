"""What a night costs per version beyond the audits' own seconds, and how that grows with the number of versions.

Registers small models in a fresh MLflow (SQLite), runs ``gradaudit nightly`` on them in a process of its own, and reads
the results store. The overhead is the night's wall-clock time less the seconds that audits report; it holds
the start of every audit's confined process, and ``import torch`` in it, besides downloads, rows, runs and marks.

``--rival`` also times one flow run per version: each started as a worker starts them, in a process of its own.

``--plan 10000`` audits nothing: it times the choice of what is due among so many versions, in a process of its own, on
the first night (all are due) and on a later one (a tenth has changed since its audit, the rest take their turns).
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from audits.outcomes import Outcome
from audits.results.format import audits_table
from audits.results.identity import AuditIdentity
from audits.results.store import ResultsStore
from flows.choosing.due_keys import due_key
from flows.choosing.due_keys import environment as present_environment
from flows.service.embedded_prefect import prefect_server
from flows.settings.environment import GradauditSettings, quiet_defaults
from registry_models import log_model
from registry_models.registry.versions import list_versions

#: Versions of one registered model, as a team has them.
PER_MODEL = 10

_ONE = "import sys; from flows.audit_versions import audit_versions; audit_versions([sys.argv[1]], 'rival')"

#: Plans as a night does. The registry was asked once before, so that what MLflow imports then is not the plan's.
_PLAN = """
import time
from pathlib import Path
from mlflow.tracking import MlflowClient
from flows.choosing.due import plan_night
from flows.settings.environment import GradauditSettings
settings = GradauditSettings.load()
client = MlflowClient(tracking_uri=settings.tracking_uri)
client.search_model_versions(max_results=1)
def mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, wall, cpu = mib("VmRSS"), time.perf_counter(), time.process_time()
plan = plan_night(client, settings)
wall, cpu, grown = time.perf_counter() - wall, time.process_time() - cpu, mib("VmHWM") - before
each = grown / max(1, plan.looked_at) * 1000
print(f"{len(plan.due)} due of {plan.looked_at}: {wall:.1f} s, {cpu:.1f} s of CPU, "
      f"{grown:.0f} MiB more at the peak, {each:.1f} MiB per thousand")
"""


def register(folder: Path, number: int) -> str:
    """Register ``number`` versions of a small classifier; they share the files of one logged model."""
    import mlflow

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(tracking_uri=uri)
    for name in ("models", "gradaudit"):
        client.create_experiment(name, artifact_location=(folder / "artifacts" / name).as_uri())
    mlflow.set_experiment("models")
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    batch = {"inputs": torch.randn(16, 8), "targets": torch.randint(0, 4, (16,))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recipe = Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer)
    arguments = {"in_features": 8, "out_features": 4}
    logged = log_model(model, "model-000", recipe=recipe, factory="torch.nn:Linear", factory_args=arguments)
    for index in range(1, number):
        name = f"model-{index // PER_MODEL:03d}"
        if index % PER_MODEL == 0:
            client.create_registered_model(name)
        client.create_model_version(name, source=logged.model_uri, model_id=logged.model_id)
    return uri


def environment(folder: Path, uri: str) -> dict[str, str]:
    own = {"MLFLOW_TRACKING_URI": uri, "HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect")}
    return {**os.environ, **own, "GRADAUDIT_RESULTS": str(folder / "results")}


def night(folder: Path, number: int, minutes: float) -> None:
    """Run the sweep on ``number`` versions, end it after ``minutes``, and print what each version cost."""
    began = time.perf_counter()
    uri = register(folder, number)
    print(f"{number} versions registered in {time.perf_counter() - began:.1f} s", flush=True)
    command = [sys.executable, "-m", "flows.cli", "nightly"]
    with (folder / "log").open("w") as log:
        began, at = time.perf_counter(), pd.Timestamp.now("UTC")
        sweep = subprocess.Popen(command, cwd=folder, env=environment(folder, uri), stdout=log, stderr=log)
        used = [(0, 0.0)]  # versions committed, CPU seconds of the sweep's own process
        while sweep.poll() is None and time.perf_counter() - began < minutes * 60:
            used.append((committed(folder), cpu_seconds(sweep.pid) or used[-1][1]))
            time.sleep(2)
        wall, whole = time.perf_counter() - began, sweep.poll() is not None
        if not whole:
            sweep.terminate()
        sweep.wait()
    audits = ResultsStore(folder / "results").read("audits").to_pandas().sort_values("audited_at")
    done = len(audits)
    if (whole and done != number) or done < 3:
        raise SystemExit(f"{done} versions were audited:\n{(folder / 'log').read_text()[-3000:]}")
    own = audits["seconds"].sum()
    beyond = audits["audited_at"].diff().dt.total_seconds() - audits["seconds"]
    first = (audits["audited_at"].iloc[0] - at).total_seconds()
    print(
        f"{done} of {number} versions audited: {wall:.0f} s, {wall / done:.2f} s each; the audits' own "
        f"{own / done:.2f} s, overhead {(wall - own) / done:.2f} s each; first result after {first:.1f} s",
        flush=True,
    )
    tenth = max(2, done // 10)
    print(
        f"  from one result to the next, less the audit: median {beyond.median():.2f} s; first tenth "
        f"{beyond.iloc[1 : tenth + 1].median():.2f} s, last tenth {beyond.iloc[-tenth:].median():.2f} s",
        flush=True,
    )
    half = next(index for index, (count, _) in enumerate(used) if count >= done // 2)
    (low, early), (middle, half_way), (high, late) = (
        next(entry for entry in used if entry[0] >= 1),
        used[half],
        max(used),  # the night merges the day's files at its end: their number falls again
    )
    print(
        f"  CPU of the sweep's own process: {(half_way - early) / max(1, middle - low):.2f} s each in the first half, "
        f"{(late - half_way) / max(1, high - middle):.2f} s in the second",
        flush=True,
    )
    if whole:
        began = time.perf_counter()
        again = subprocess.run(
            command, cwd=folder, env=environment(folder, uri), capture_output=True, text=True, check=False
        )
        print(f"  again: {time.perf_counter() - began:.1f} s ({again.stdout.strip()})", flush=True)


def plan(folder: Path, number: int) -> None:
    """Print what choosing among ``number`` versions takes, before any has been audited and afterwards."""
    began = time.perf_counter()
    uri = register(folder, number)
    print(f"{number} versions registered in {time.perf_counter() - began:.1f} s", flush=True)
    own = environment(folder, uri)
    for night_ in ("first night", "later night"):
        if night_ == "later night":
            commit_audits(MlflowClient(tracking_uri=uri), Path(own["GRADAUDIT_RESULTS"]))
        done = subprocess.run(
            [sys.executable, "-c", _PLAN], env={**own, "PYTHONPATH": os.getcwd()}, check=True, capture_output=True
        )
        print(f"  {night_}: {done.stdout.decode().strip()}", flush=True)


def commit_audits(client: MlflowClient, results: Path) -> None:
    """Commit an audit of every version, as a compacted night leaves them; a tenth has another due key now."""
    settings = GradauditSettings.load(tracking_uri=client.tracking_uri, results=str(results))
    at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    counts = {f"n_{outcome}": 0 for outcome in Outcome}
    lines = []
    for index, version in enumerate(list_versions(client)):
        key = due_key(version, settings, settings.for_model(version.name)) if index % 10 else "changed"
        identity = AuditIdentity(
            audit_id=f"bench-{index}", audited_at=at, model_name=version.name, model_version=version.version
        )
        line = audits_table(
            identity, outcome="pass", coverage=1.0, coverage_elements=1.0, seconds=1.0, run_id="r", fingerprint="f",
            due_key=key, occasion="o", message="passed", environment=present_environment(settings), **counts,
        )  # fmt: skip
        lines.append(line)
    ResultsStore(results).write("audits", pa.concat_tables(lines), date=at.date(), audit_id="bench")


def committed(folder: Path) -> int:
    return len(ResultsStore(folder / "results").files("audits"))


def cpu_seconds(pid: int) -> float | None:
    """CPU seconds that a process has used, its children's not counted; None once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rival(folder: Path, number: int) -> None:
    """Time one flow run per version, each in a process of its own, under one Prefect server."""
    uri = register(folder, number)
    os.environ["PREFECT_HOME"] = str(folder / "prefect")
    seconds = []
    with prefect_server() as url:
        for index in range(number):
            reference = f"models:/model-{index // PER_MODEL:03d}/{index % PER_MODEL + 1}"
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", _ONE, reference],
                cwd=folder,
                env={**environment(folder, uri), "PREFECT_API_URL": url},
                check=True,
                capture_output=True,
            )
            seconds.append(time.perf_counter() - began)
    own = ResultsStore(folder / "results").read("audits").to_pandas()["seconds"].median()
    typical = statistics.median(seconds)
    print(
        f"one flow run per version, {number} of them: median {typical:.2f} s each, the audits' own {own:.2f} s, "
        f"overhead {typical - own:.2f} s each",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", type=int, nargs="*", default=[20], help="sizes of the registry")
    parser.add_argument("--minutes", type=float, default=600.0, help="end a sweep that takes longer")
    parser.add_argument("--rival", type=int, nargs="?", const=10, help="versions for one flow run each")
    parser.add_argument("--plan", type=int, help="audit nothing: time the plan of a night over so many versions")
    options = parser.parse_args()
    quiet_defaults()
    if options.plan:
        with tempfile.TemporaryDirectory(prefix="gradaudit-bench-") as temporary:
            plan(Path(temporary), options.plan)
        return
    for number in options.versions:
        with tempfile.TemporaryDirectory(prefix="gradaudit-bench-") as temporary:
            night(Path(temporary), number, options.minutes)
    if options.rival:
        with tempfile.TemporaryDirectory(prefix="gradaudit-bench-") as temporary:
            rival(Path(temporary), options.rival)


if __name__ == "__main__":
    main()
