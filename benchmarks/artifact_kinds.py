"""The two tables on artifact kinds of docs/measurements.md.

1. For each artifact kind, which of a fixed set of planted faults is seen, declared invisible, or missed.
2. Transformers architectures and a Lightning module registered with nothing of gradaudit's, audited with their own
   loss: any failure is a false alarm.

Run: python benchmarks/artifact_kinds.py [kinds|architectures]. Needs the extras ``lightning`` and ``transformers``.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"})
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.simplefilter("ignore")

from flows.settings.environment import quiet_defaults  # noqa: E402

quiet_defaults()

import mlflow  # noqa: E402
import torch  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from audits.outcomes import Outcome  # noqa: E402
from audits.report import AuditReport  # noqa: E402
from registry_models import attach_recipe, log_model  # noqa: E402
from tests.registry_models import planted, planted_lightning  # noqa: E402
from tests.registry_models.auditing import audited  # noqa: E402
from tests.registry_models.zoo import ZOO, register  # noqa: E402
from tests.stores import copy_store, make_store  # noqa: E402


def log_kind(kind: str, fault: planted.Fault, name: str) -> None:
    """Register the model with the fault as one artifact kind, its recipe with it."""
    options: dict[str, Any] = {"name": "model", "registered_model_name": name, "pip_requirements": ["torch"]}
    torch.manual_seed(0)
    model = planted.build(fault.name)
    trained = planted.build("none") if fault.name == "untied" else model
    recipe = planted.recipe(trained, fault.name)
    if kind == "eager":
        log_model(model, name, recipe=recipe, factory=planted.build, factory_args={"fault": fault.name})
        return
    if kind == "exported":
        mlflow.pytorch.log_model(model, input_example=planted.batch()["inputs"].numpy(), **options)
    elif kind == "lightning":
        module = planted_lightning.PlantedModule(model)
        recipe = planted_lightning.recipe(planted_lightning.PlantedModule(trained), fault.name)
        mlflow.pytorch.log_model(module, serialization_format="pickle", **options)
    else:
        mlflow.pytorch.log_model(model, serialization_format="pickle", **options)
    attach_recipe(f"models:/{name}/1", recipe)


def verdict(fault: planted.Fault, report: AuditReport) -> str:
    """Return what became of a planted fault: seen, seen in other words, declared invisible, or missed."""
    failed = [row for row in report.rows if row.outcome is Outcome.FAIL]
    if fault.name == "none":
        return "pass" if not failed else f"FALSE ALARM ({failed[0].check})"
    hit = [row for row in failed if row.check.startswith(fault.expected)]
    if hit:
        return f"seen (`{hit[0].check}`)"
    if failed:
        return f"seen (`{failed[0].check}`)"
    if report.outcome is Outcome.INCONCLUSIVE:
        return "not judged (inconclusive)"
    declared = [row for row in report.findings if row.check == "model.whole"]
    return "declared invisible" if declared and fault.lost_by_export else "MISSED"


def kinds(client: MlflowClient, folder: Path) -> int:
    """Print the first table; return how many faults were missed."""
    names = ["eager", "pickle", "lightning", "exported"]
    print("| planted fault | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    missed = 0
    for fault in planted.FAULTS:
        cells = []
        for kind in names:
            name = f"{fault.name}-{kind}"
            try:
                log_kind(kind, fault, name)
            except Exception as error:  # torch.export refuses some code altogether
                if kind != "exported":
                    raise
                cells.append(f"cannot be exported ({type(error).__name__})")
                continue
            report = audited(client, f"models:/{name}/1", folder / name)
            cells.append(verdict(fault, report))
        missed += sum("MISSED" in cell or "FALSE" in cell for cell in cells)
        print(f"| {fault.text} | " + " | ".join(cells) + " |", flush=True)
    return missed


def architectures(client: MlflowClient, folder: Path) -> int:
    """Print the second table; return the number of failures."""
    head = ("architecture", "outcome", "coverage", "gradients judged", "failures", "loss", "seconds")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    failures = 0
    todo: dict[str, Callable[[], None]] = {name: lambda name=name: register(name, name) for name in ZOO}  # type: ignore[misc]
    todo["Lightning: Classifier (autolog)"] = lambda: planted_lightning.register_autologged("classifier")
    todo["Lightning: Adversaries (manual, two optimizers)"] = lambda: planted_lightning.register_adversaries(
        "adversaries"
    )
    registered = {"Lightning: Classifier (autolog)": "classifier"}
    registered["Lightning: Adversaries (manual, two optimizers)"] = "adversaries"
    for label, log in todo.items():
        log()
        name = registered.get(label, label)
        began = time.perf_counter()
        report = audited(client, f"models:/{name}/1", folder / name)
        rows = [row for row in report.rows if row.check == "gradient.finite-difference" and row.parameter]
        parameters = {row.parameter for row in rows if row.outcome is not Outcome.SKIPPED}
        judged = {row.parameter for row in rows if row.outcome.resolved}
        failures += report.counts["fail"]
        print(
            f"| {label} | {report.outcome} | {report.coverage:.0%} | {len(judged)}/{len(parameters)} | "
            f"{report.counts['fail']} | {report.provenance.get('loss')} | {time.perf_counter() - began:.1f} |",
            flush=True,
        )
    return failures


def main(arguments: list[str]) -> int:
    """Print the tables that were asked for; 1 if anything was missed or any alarm was false."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "store").mkdir()
        uri = copy_store(make_store(folder), folder / "store")
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("models")
        client = MlflowClient(tracking_uri=uri)
        if not arguments or "kinds" in arguments:
            wrong += kinds(client, folder)
        print()
        if not arguments or "architectures" in arguments:
            wrong += architectures(client, folder)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
