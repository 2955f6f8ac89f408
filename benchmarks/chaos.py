"""SIGKILL whatever runs while versions are audited, again and again; then everything must have come right by itself.

    .venv/bin/python benchmarks/chaos.py --versions 30 --rounds 20

A real `gradaudit up` audits; each round registers new versions and starts the sweep, every second round a second
sweep of the same versions beside it. Webhooks are duplicated (a signed event of every third version comes two more
times at once, and once again as a replay) and dropped (in every third round MLflow sends none; in every second of those
no sweep runs either, so that only the reconciling loop can find the versions). At seeded random moments a process is
killed: an audit's child, a flow run, a worker, the webhook, Prefect's server, MLflow's server; one round in five fills
the disk of the results instead (where a small tmpfs can be mounted). `gradaudit up` starts again what it lost, Prefect
what crashed. Then rows, runs and tags are compared.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flows.settings.environment import quiet_defaults

quiet_defaults()
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "8"  # our own questions outlive a server's restart

VICTIMS = {
    "audit": r"registry_models\.child|flows\.sandbox\.entry",
    "flow run": r"prefect\.(flow_)?engine|flow-run execute|prefect\.runner\._",
    "worker": r"prefect worker start",
    "webhook": r"flows\.cli webhook",
    "prefect server": r"flows\.service\.prefect_server:create_app",
    "mlflow server": r"mlflow server|mlflow\.server",
}
LIVE = ["RUNNING", "PENDING", "CANCELLING"]

#: Seconds without any run after which the next night is taken to have come; the reconciling loop looks every 10 s.
IDLE = 60.0


@dataclass
class Tally:
    """What happened, and what was found wrong."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    rounds: int = 0
    versions: int = 0
    audits: int = 0
    sweeps_again: int = 0
    full_disks: int = 0
    doubled: collections.Counter[int] = field(default_factory=collections.Counter)
    dropped: int = 0
    wrong: list[str] = field(default_factory=list)


def processes(leader: int) -> dict[int, str]:
    """Return the command lines of the descendants of ``leader``."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    found, pending = {}, [leader]
    while pending:
        parent = pending.pop()
        children = [pid for pid, above in parents.items() if above == parent]
        found.update({pid: lines.get(pid, "") for pid in children})
        pending += children
    return found


def remains(marker: str) -> list[str]:
    """Return the processes, of any parent, that carry our folder in their environment or command line."""
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if marker.encode() in line + (entry / "environ").read_bytes():
                    left.append(f"{entry.name} {line.replace(bytes(1), b' ').decode(errors='replace')[:150]}")
    return left


class Fleet:
    """A running ``gradaudit up`` and what the outside can ask it."""

    def __init__(self, folder: Path, results: Path) -> None:
        self.folder, self.results = folder, results
        environment = {
            **os.environ,
            "GRADAUDIT_RESULTS": str(results),
            "GRADAUDIT_ISOLATION": os.environ.get("GRADAUDIT_ISOLATION", "process"),
            "GRADAUDIT_STATE": str(folder / "state"),
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
        }
        command = [sys.executable, "-m", "flows.cli", "up", "--folder", str(folder / "data"), "--gpus", "none"]
        ports = ["--mlflow-port", "0", "--prefect-port", "0", "--webhook-port", "0"]
        self.out = folder / "up.out"
        with self.out.open("w") as out, (folder / "up.err").open("w") as err:
            self.process = subprocess.Popen([*command, *ports], cwd=folder, env=environment, stdout=out, stderr=err)
        places = self._places()
        self.mlflow, self.prefect = places["MLflow"], f"{places['Prefect']}/api"
        self.webhook = places["webhook"] + "/webhook"
        self.secret = json.loads((folder / "data" / "secrets.json").read_text())["webhook_secret"]

    def _places(self) -> dict[str, str]:
        deadline = time.monotonic() + 300
        while "is up after" not in self.out.read_text() or "logs " not in self.out.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"gradaudit up did not start: {(self.folder / 'up.err').read_text()}")
            time.sleep(0.5)
        return dict(re.findall(r"^  (\w+) +(http\S+?)(?:/health)?$", self.out.read_text(), re.M))

    def ask(self, path: str, body: object) -> Any:
        """Ask Prefect's API; it may be starting again."""
        for _ in range(120):
            request = urllib.request.Request(
                f"{self.prefect}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise SystemExit("Prefect's server did not come back within two minutes")

    def start_run(self, deployment: str, parameters: dict[str, Any]) -> None:
        with urllib.request.urlopen(f"{self.prefect}/deployments/name/{deployment}", timeout=60) as answer:
            identity = json.load(answer)["id"]
        self.ask(f"/deployments/{identity}/create_flow_run", {"parameters": parameters, "state": {"type": "SCHEDULED"}})

    def live_runs(self) -> list[dict[str, Any]]:
        """Return the runs under way, and those waiting to start now (the cron's lie in the future)."""
        found = self.ask("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": [*LIVE, "SCHEDULED"]}}}})
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 600))
        return [r for r in found if r["state_type"] in LIVE or (r["next_scheduled_start_time"] or "") < now]

    def kill(self, kind: str, chance: random.Random) -> bool:
        pids = [pid for pid, line in processes(self.process.pid).items() if re.search(VICTIMS[kind], line)]
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(sorted(pids)), signal.SIGKILL)
            return True
        return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(120)
        self.process.kill()
        self.process.wait()


def deliver(fleet: Fleet, name: str, delivery: str) -> int:
    """Send the signed event of a registration, as MLflow does; return the answer's code, 0 where nothing answered."""
    from flows.service.signatures import DELIVERY, SIGNATURE, TIMESTAMP, sign

    body = json.dumps({"entity": "model_version", "action": "created", "data": {"name": name, "version": "1"}}).encode()
    now = str(int(time.time()))
    headers = {SIGNATURE: sign(fleet.secret, delivery, now, body), TIMESTAMP: now, DELIVERY: delivery}
    try:
        with urllib.request.urlopen(urllib.request.Request(fleet.webhook, body, headers), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def deliver_again(fleet: Fleet, names: list[str], tally: Tally) -> None:
    """Deliver two more events a version at once, then one of them again."""
    events = [(name, f"{name}-{copy}") for name in names for copy in range(2)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda event: deliver(fleet, *event), events + events[::2]))
    tally.doubled.update(answers)
    if odd := set(answers) - {0, 200, 503}:
        tally.wrong.append(f"the webhook answered {odd} to a repeated event")


@contextlib.contextmanager
def no_webhooks(fleet: Fleet) -> Iterator[None]:
    """MLflow sends no events: each registration's is lost."""
    from mlflow.entities.webhook import WebhookStatus
    from mlflow.tracking import MlflowClient

    client = MlflowClient(fleet.mlflow)
    hooks = [hook.webhook_id for hook in client.list_webhooks()]
    for hook in hooks:
        client.update_webhook(hook, status=WebhookStatus.DISABLED)
    try:
        yield
    finally:
        for hook in hooks:
            client.update_webhook(hook, status=WebhookStatus.ACTIVE)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a tmpfs of 64 MB on ``folder``; yield whether that could be done."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fill the disk of ``folder`` to its last byte, free it again on leaving."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as out:
        while out.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


def register(fleet: Fleet, number: int, versions: int) -> list[str]:
    """Register new models: the first is logged, the others are copies of it; return their names."""
    from mlflow.tracking import MlflowClient

    from tests.stores import register_linear

    client = MlflowClient(fleet.mlflow)
    names = [f"round{number}-{index:02d}" for index in range(versions)]
    if number == 0:
        import mlflow

        mlflow.set_tracking_uri(fleet.mlflow)
        register_linear("original")
    for name in names:
        client.copy_model_version("models:/original/1", name)
    return names


def committed(results: Path) -> Any:
    from audits.results.store import ResultsStore

    return ResultsStore(results).read("audits").to_pandas()


def converge(fleet: Fleet, names: list[str], tally: Tally, pattern: str, seconds: float) -> None:
    """Wait until every version is committed and no run is under way; a sweep that gave up is followed by the next."""
    deadline = time.monotonic() + seconds
    busy = time.monotonic()
    while time.monotonic() < deadline:
        missing = set(names) - set(committed(fleet.results)["model_name"])
        live = fleet.live_runs()
        if not missing and not live:
            return
        busy = time.monotonic() if live else busy
        if missing and time.monotonic() - busy > IDLE:
            tally.sweeps_again += 1  # as the next night does
            fleet.start_run("nightly-audit/nightly", {"models": [pattern]})
            busy = time.monotonic()
        time.sleep(3)
    missing = set(names) - set(committed(fleet.results)["model_name"])
    live_names = [f"{r['name']} {r['state_name']}" for r in fleet.live_runs()]
    tally.wrong.append(f"{pattern} did not come right in {seconds:.0f} s: missing {sorted(missing)}, live {live_names}")


def inspect(fleet: Fleet, names: list[str], tally: Tally) -> None:
    """Compare rows, runs and tags of the round's versions."""
    import pyarrow.dataset as ds
    from mlflow.tracking import MlflowClient

    client, wrong = MlflowClient(fleet.mlflow), tally.wrong
    audits = committed(fleet.results)
    audits = audits[audits["model_name"].isin(names)]
    tally.audits += len(audits)
    doubled = audits["audit_id"][audits["audit_id"].duplicated()]
    wrong += [f"audit {audit_id} is visible twice" for audit_id in doubled]
    twice = audits.groupby("model_name")["audit_id"].nunique()
    wrong += [f"{name} was audited {count} times" for name, count in twice.items() if count > 1]
    rows = ds.dataset(fleet.results / "rows", partitioning="hive").to_table(columns=["audit_id"])["audit_id"]
    with_rows = set(rows.to_pylist())
    experiment = client.get_experiment_by_name("gradaudit").experiment_id
    runs = client.search_runs([experiment], max_results=50_000)
    wrong += [f"MLflow run {r.info.run_name} is left RUNNING" for r in runs if r.info.status == "RUNNING"]
    of_audit: dict[str, list[Any]] = collections.defaultdict(list)
    for run in runs:
        if "superseded" not in run.data.tags and run.info.status == "FINISHED":
            of_audit[run.data.tags.get("audit.id", "")].append(run)
    for name in names:
        tags = client.get_model_version(name, "1").tags
        known = audits[audits["model_name"] == name]
        if tags.get("audit.outcome") != "pass":
            wrong.append(f"{name} is marked {tags.get('audit.outcome')}")
        for audit_id in known["audit_id"]:
            if audit_id not in with_rows:
                wrong.append(f"{name}: audit {audit_id} has no rows")
            if len(of_audit[audit_id]) != 1:
                wrong.append(f"{name}: audit {audit_id} has {len(of_audit[audit_id])} visible runs")
        marked = client.get_run(tags["audit.run_id"]) if "audit.run_id" in tags else None
        if marked is None or marked.data.tags.get("audit.id") not in set(known["audit_id"]):
            wrong.append(f"{name} is marked by a run whose audit is not committed")
    # Parts become visible by their final name; whatever else a killed writer left must not be one.
    for file in fleet.results.rglob("*"):
        if file.is_file() and file.suffix == ".parquet":
            try:
                ds.dataset(file).schema  # noqa: B018
            except Exception as error:
                wrong.append(f"partial file {file.name} is visible: {error}")
    stale = fleet.ask("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": LIVE}}}})
    wrong += [f"Prefect run {r['name']} is left {r['state_name']}" for r in stale]


def one_round(fleet: Fleet, number: int, options: argparse.Namespace, tally: Tally, *, mounted: bool) -> None:
    chance = random.Random(f"{options.seed}-{number}")
    pattern = f"round{number}-*"
    drop = number % 3 == 2
    with no_webhooks(fleet) if drop else contextlib.nullcontext():
        names = register(fleet, number, options.versions)
    tally.dropped += len(names) if drop else 0
    sweep = number % 6 != 5
    if sweep:
        fleet.start_run("nightly-audit/nightly", {"models": [pattern]})
    deliver_again(fleet, [] if drop else names[::3], tally)
    if sweep and number % 2:  # what a second sweep sends; without `chosen_at` it would ask for an audit of its own
        now = datetime.datetime.now(datetime.UTC)
        second = {"occasion": now.date().isoformat(), "chosen_at": now.isoformat()}
        versions = [f"models:/{name}/1" for name in names]
        fleet.start_run("audit-versions/on-registration", {"versions": versions, **second})
    if mounted and number % 5 == 4:
        time.sleep(chance.uniform(8, 20))
        with full(fleet.results.parent):
            time.sleep(20)
        tally.full_disks += 1
    else:
        kinds = options.victims
        for kind in (kinds[number % len(kinds)], chance.choice(kinds)):
            time.sleep(chance.uniform(4, 15))
            for _ in range(600):  # an audit lasts seconds, a flow run takes some to start
                if fleet.kill(kind, chance):
                    tally.kills[kind] += 1
                    break
                time.sleep(0.1)
    converge(fleet, names, tally, pattern, options.patience)
    before = len(tally.wrong)
    inspect(fleet, names, tally)
    tally.rounds, tally.versions = tally.rounds + 1, tally.versions + len(names)
    said = "; ".join(tally.wrong[before:]) or "all right"
    print(f"round {number + 1}: kills so far {dict(tally.kills)}: {said}", flush=True)


def run(options: argparse.Namespace) -> Tally:
    tally, began = Tally(), time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="gradaudit-chaos-", ignore_cleanup_errors=True))
        )
        mounted = stack.enter_context(small_disk(folder / "disk"))
        fleet = Fleet(folder, folder / "disk" / "results")
        try:
            for number in range(options.rounds):
                if time.monotonic() - began > 60 * options.minutes:
                    break
                one_round(fleet, number, options, tally, mounted=mounted)
        finally:
            fleet.stop()
            if options.keep:
                subprocess.run(["cp", "-r", str(folder), options.keep], check=False)
        time.sleep(2)
        tally.wrong += [f"left running: {line}" for line in remains(str(folder))]
    return tally


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=30, help="new versions a round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=900.0, help="seconds a round has to come right")
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS), help="what is killed")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no round after this long")
    parser.add_argument("--keep", help="copy databases, logs and results to this folder")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    tally = run(options)
    print(
        f"\n{tally.rounds} rounds, {tally.versions} versions, {tally.audits} audits, {time.monotonic() - began:.0f} s"
    )
    print(f"SIGKILLs: {dict(tally.kills)}; full disks: {tally.full_disks}; sweeps started again: {tally.sweeps_again}")
    print(
        f"repeated events by their answer: {dict(tally.doubled)}; registrations whose event was lost: {tally.dropped}"
    )
    print(
        "\n".join(tally.wrong)
        or "every version audited once, with its rows, its run and its mark; nothing left running"
    )
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
