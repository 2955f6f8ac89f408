"""``gradaudit watch``: the reconciling loop alone, for registries that cannot reach a webhook."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

from flows.service.reconciling import Reconciler
from flows.service.setup import configured_api
from flows.settings.environment import GradauditSettings

_log = logging.getLogger(__name__)


def run_watch(settings: GradauditSettings, *, interval: float, since_hours: float) -> int:
    """Reconcile until SIGINT or SIGTERM.

    Raises:
        SettingsError: no Prefect server is configured.
    """
    configured_api()
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    _log.warning("watching %s every %g s", settings.tracking_uri, interval)
    Reconciler(settings, interval=interval, since_hours=since_hours).run(stop)
    return 0
