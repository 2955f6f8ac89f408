"""The loop that misses nothing: every ten seconds, what was registered and has neither a result nor a flow run.

MLflow's webhooks are a best effort: four tries in eight seconds, lost at a restart, and never sent for what is written
straight into a database. The loop asks the registry itself. It is a thread of a long-lived process rather than a
Prefect deployment, whose 8,640 runs a day would say nothing.
"""

from __future__ import annotations

import datetime
import logging
import threading
from dataclasses import dataclass

from mlflow.tracking import MlflowClient

from audits.errors import GradauditError
from flows.choosing.due import without_result
from flows.choosing.outside import set_aside
from flows.service.handing_over import Handover, hand_over, tally
from flows.settings.environment import GradauditSettings
from registry_models.registry.arrivals import Arrivals

_log = logging.getLogger(__name__)

#: Seconds between looks.
INTERVAL = 10.0

#: Hours back from a look within which a registration is this loop's business; what is older belongs to the nightly
#: sweep, so that a first start beside ten thousand versions nobody audited is no storm.
SINCE_HOURS = 24.0


@dataclass
class LastLook:
    """How the last look went, for people and for the health endpoint."""

    at: datetime.datetime | None = None
    trouble: str = ""
    handed_over: int = 0


class Reconciler:
    """Looks again and again for versions that nobody has been told of.

    Args:
        settings: registry and results store.
        interval: seconds between looks.
        since_hours: how old a registration may be.
    """

    def __init__(
        self, settings: GradauditSettings, *, interval: float = INTERVAL, since_hours: float = SINCE_HOURS
    ) -> None:
        self.settings, self.interval, self.since = settings, interval, datetime.timedelta(hours=since_hours)
        self.last = LastLook()
        self._client = MlflowClient(tracking_uri=settings.tracking_uri)
        self._arrivals = Arrivals(self._client, self.since)
        self._given_up: set[tuple[str, str]] = set()

    def run(self, stop: threading.Event) -> None:
        """Look until ``stop``; a service that does not answer is told once and tried again."""
        while not stop.is_set():
            try:
                self.look()
            except GradauditError as error:
                self._trouble(str(error))
            except Exception as error:  # a loop that dies silently would miss everything from then on
                _log.exception("the look failed")
                self._trouble(f"{type(error).__name__}: {error}")
            stop.wait(self.interval)

    def look(self, *, now: datetime.datetime | None = None) -> list[Handover]:
        """Look once and hand over what is due; return what became of it.

        Raises:
            InfrastructureError: registry, results store or Prefect do not answer.
        """
        now = now or datetime.datetime.now(datetime.UTC)
        due = without_result(self._arrivals.look(now), self.settings)
        inside, _ = set_aside([version for version, _ in due], self._client, self.settings.results)
        due = [(version, key) for version, key in due if version in inside]
        handed = hand_over(due, now=now)
        for (version, key), state in zip(due, handed, strict=True):
            if state is Handover.NOW:
                _log.info("%s: %s", version.label, state)
            elif state in (Handover.GIVEN_UP, Handover.ELSEWHERE) and (version.uri, key) not in self._given_up:
                self._given_up.add((version.uri, key))
                _log.warning("%s: %s", version.label, state)
        new = sum(state is Handover.NOW for state in handed)
        if self.last.trouble:
            _log.warning("answering again: %s", tally(handed) or "nothing was missed")
        self.last = LastLook(at=now, handed_over=self.last.handed_over + new)
        return handed

    def _trouble(self, text: str) -> None:
        if text != self.last.trouble:
            _log.warning("nothing can be handed over for now: %s", text)
        self.last = LastLook(at=self.last.at, trouble=text, handed_over=self.last.handed_over)
