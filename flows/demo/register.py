"""The demo's models trained and registered, each version once, however often this is run or interrupted."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.autologging_utils import MlflowEventsAndWarningsBehaviorGlobally

from audits.errors import InputError
from flows.demo.catalogue import DEMO_VERSIONS, DemoVersion
from registry_models.logging_models import log_model
from registry_models.registry.versions import list_versions

EXPERIMENT = "demo-training"

#: Tag of a training run that names its version. It is how a registered version is known to be the demo's own: the
#: version and its source run are written in one step, so an interruption cannot part them.
RUN_TAG = "gradaudit.demo"

#: Loggers that tell of every table created, every version made and every pickle written.
_TALKATIVE = ("mlflow", "alembic", "registry_models.logging_models", "torch.export")


@dataclass(frozen=True)
class Registered:
    """One of the demo's versions in the registry.

    Attributes:
        name: the registered model's name.
        version: its number.
        planted: what is wrong with it; None for a right one.
        reused: whether it was there before.
        run_id: the training run.
        seconds: what training and registering took; 0 if it was there before.
        final_loss: training loss of the last step; None if it was there before.
    """

    name: str
    version: int
    planted: str | None
    reused: bool
    run_id: str
    seconds: float = 0.0
    final_loss: float | None = None

    @property
    def uri(self) -> str:
        """``models:/NAME/VERSION``."""
        return f"models:/{self.name}/{self.version}"

    @property
    def label(self) -> str:
        """``NAME vVERSION``."""
        return f"{self.name} v{self.version}"


def register_demo(client: MlflowClient, *, on_progress: Callable[[Registered], None] | None = None) -> list[Registered]:
    """Train and register what is not registered yet.

    The tracking URI must be set (`mlflow.set_tracking_uri`) to the client's own. Training runs go to the experiment
    ``demo-training``; on SQLite its artifacts lie beside the database unless the experiment exists already.

    Args:
        client: MLflow client.
        on_progress: called with each version when it is there.

    Returns:
        Every version of the demo, in order.

    Raises:
        InputError: the registry has models of the same names that are not the demo's.
        InfrastructureError: the registry does not answer.
    """
    done = []
    with _quiet():
        experiment_id = _experiment(client)
        existing = _existing(client)
        for version in DEMO_VERSIONS:
            registered = existing.get((version.name, version.version)) or _register(client, version, experiment_id)
            done.append(registered)
            if on_progress is not None:
                on_progress(registered)
    return done


def _existing(client: MlflowClient) -> dict[tuple[str, int], Registered]:
    """The demo's versions that are there, after making sure that the missing ones will get the right numbers."""
    names = {version.name for version in DEMO_VERSIONS}
    found = {(v.name, v.version): v for v in list_versions(client) if v.name in names}
    planned = {(version.name, version.version): version for version in DEMO_VERSIONS}
    own: dict[tuple[str, int], Registered] = {}
    for key, wanted in planned.items():
        run_id = found[key].run_id if key in found else None
        if run_id and _run_tag(client, run_id) == wanted.label:
            own[key] = Registered(*key, wanted.planted, reused=True, run_id=run_id)
    for (name, number), wanted in planned.items():
        last = max((version for model, version in found if model == name), default=0)
        if number <= last and (name, number) not in own:
            raise InputError(
                f"the registry has {name} v{last}, but no {wanted.label} of the demo's: run the demo on a registry of "
                "its own, or delete the registered model"
            )
    return own


def _run_tag(client: MlflowClient, run_id: str) -> str | None:
    try:
        tag: str | None = client.get_run(run_id).data.tags.get(RUN_TAG)
    except MlflowException:  # the run was deleted for good
        return None
    return tag


def _register(client: MlflowClient, version: DemoVersion, experiment_id: str) -> Registered:
    began = time.perf_counter()
    trained = version.train()
    with mlflow.start_run(experiment_id=experiment_id, run_name=version.label, tags={RUN_TAG: version.label}) as run:
        mlflow.log_params({**trained.hyperparameters, "model": version.name})
        now = int(time.time() * 1000)
        history = [Metric("loss", loss, now, step) for step, loss in enumerate(trained.losses)]
        last = {**trained.metrics, "final_loss": trained.final_loss}
        client.log_batch(run.info.run_id, [*history, *(Metric(name, value, now, 0) for name, value in last.items())])
        info = log_model(
            trained.model, version.name,
            recipe=trained.recipe, factory=trained.factory, factory_args=trained.factory_args,
        )  # fmt: skip
    return Registered(
        version.name, int(info.registered_model_version), version.planted, reused=False, run_id=run.info.run_id,
        seconds=time.perf_counter() - began, final_loss=trained.final_loss,
    )  # fmt: skip


def _experiment(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    location = None
    database = mlflow.get_tracking_uri().removeprefix("sqlite:///")
    if database != mlflow.get_tracking_uri():
        location = (Path(database).absolute().parent / "artifacts" / EXPERIMENT).as_uri()
    return str(client.create_experiment(EXPERIMENT, artifact_location=location))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # MLflow prints "Created version '1' of ..." past its loggers; importing some of its modules opens that stream
        # again, unless it was closed by this counting switch.
        events = MlflowEventsAndWarningsBehaviorGlobally(
            disable_event_logs=True, disable_warnings=False, reroute_warnings=False
        )
        with warnings.catch_warnings(), events:
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
