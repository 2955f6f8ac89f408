"""``gradaudit webhook``: MLflow's registration events in, flow runs of Prefect out, and the reconciling loop beside it.

It grants nothing beyond asking for the audit of a version that exists, and answers with success only after the work is
durably Prefect's: any other answer makes MLflow try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from mlflow.tracking import MlflowClient
from starlette.requests import ClientDisconnect

from audits.errors import ArtifactError, InfrastructureError, SettingsError
from audits.naming import reference_to, visible
from flows.choosing.due import without_result
from flows.choosing.outside import set_aside
from flows.service.handing_over import Handover, hand_over, prefect_answers
from flows.service.reconciling import INTERVAL, SINCE_HOURS, LastLook, Reconciler
from flows.service.registering import register_webhook
from flows.service.setup import configured_api
from flows.service.signatures import DELIVERY, Deliveries, RefusedError, verify
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import LARGEST_VERSION, RECIPE_TAG, VersionReference, answers

_log = logging.getLogger(__name__)

#: Bytes of the largest event taken; MLflow's are below 10 kB, descriptions included.
BODY_LIMIT = 256 * 1024

#: Seconds within which an event's body has come; MLflow sends it at once.
BODY_SECONDS = 10.0

#: Connections at one time; MLflow's server sends from at most 10 threads.
CONNECTIONS = 100

#: Where MLflow is to send its events.
PATH = "/webhook"

#: Longest name of a registered model in MLflow's databases.
LONGEST_NAME = 256

#: Seconds an event waits for those before it; MLflow waits 30 for the answer.
TURN = 15.0

#: Looks that may be missed before the health endpoint says so.
MISSED_LOOKS = 6


@dataclass(frozen=True)
class WebhookOptions:
    """What a person may choose.

    Attributes:
        host: address to listen at.
        port: port to listen at; 0: any free one.
        insecure: take unsigned events.
        register: create or correct the webhook in MLflow.
        public_url: the address at which MLflow reaches this process; ``http://HOST:PORT`` otherwise.
        interval: seconds between the loop's looks.
        since_hours: hours back within which a registration is the loop's business.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    insecure: bool = False
    register: bool = False
    public_url: str | None = None
    interval: float = INTERVAL
    since_hours: float = SINCE_HOURS

    @property
    def url(self) -> str:
        """The address MLflow is told."""
        return (self.public_url or f"http://{self.host}:{self.port}").rstrip("/") + PATH


def run_webhook(options: WebhookOptions, settings: GradauditSettings) -> int:
    """Serve until SIGINT or SIGTERM; requests under way are answered.

    Raises:
        SettingsError: there is no secret, and ``--insecure`` was not said; no Prefect server; a port that is taken.
    """
    secret = settings.webhook_secret.get_secret_value()
    if not secret and not options.insecure:
        raise SettingsError(
            "GRADAUDIT_WEBHOOK_SECRET is not set: give it the secret that MLflow signs with "
            "(python -c 'import secrets; print(secrets.token_hex(32))'), or take unsigned events by --insecure"
        )
    configured_api()
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((options.host, options.port), family=family, backlog=200)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"--host, --port: {options.host}:{options.port} cannot be listened at: {error}") from error
    options = dataclasses.replace(options, port=listener.getsockname()[1])
    reconciler = Reconciler(settings, interval=options.interval, since_hours=options.since_hours)
    application = make_app(settings, reconciler, options)
    server = _Server(
        uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=20,
            timeout_keep_alive=5,
            limit_concurrency=CONNECTIONS,
        )
    )
    _log.warning("listening at %s, reconciling every %g s", options.url, options.interval)
    with listener:
        server.run(sockets=[listener])
    return 0 if server.started else 2


class _Server(uvicorn.Server):
    """Ends by itself after SIGINT and SIGTERM; uvicorn's own raises the signal again, as if it had been killed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield


def make_app(settings: GradauditSettings, reconciler: Reconciler, options: WebhookOptions) -> FastAPI:
    """Return the application; its lifespan runs the reconciling loop."""
    client, deliveries = MlflowClient(tracking_uri=settings.tracking_uri), Deliveries()
    secret = settings.webhook_secret.get_secret_value()
    turn = threading.Lock()  # a bulk import's events at once would only hold each other up in Prefect's database

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        threads = [threading.Thread(target=reconciler.run, args=(stop,), name="reconciling", daemon=True)]
        if options.register:
            threads.append(
                threading.Thread(target=_register, args=(client, options.url, secret, stop), daemon=True)
            )  # fmt: skip
        for thread in threads:
            thread.start()
        yield
        stop.set()
        await run_in_threadpool(threads[0].join, 5.0)

    app = FastAPI(title="gradaudit webhook", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post(PATH)
    async def receive(request: Request) -> Response:
        body = await _body_of(request)
        if isinstance(body, Response):
            return body
        try:
            if not options.insecure:
                verify(secret, request.headers, body)
            wanted = wanted_version(body)
        except RefusedError as error:
            _log.warning("refused an event: %s", error)
            return _answer(401, str(error))
        except ValueError as error:
            return _answer(400, str(error))
        delivery = request.headers.get(DELIVERY, "")
        if wanted is None:
            return Response(status_code=204)
        if delivery and delivery in deliveries:
            return _answer(200, "this delivery has been answered before")
        try:
            text = await run_in_threadpool(_hand_over, wanted, client, settings, turn)
        except ArtifactError as error:
            return _answer(404, str(error))  # MLflow's own trial delivery too: its example does not exist
        except InfrastructureError as error:
            _log.warning("%s could not be handed over: %s", visible(wanted), error)
            return _answer(503, str(error))
        if delivery:
            deliveries.remember(delivery)
        return _answer(200, text)

    @app.get("/health")
    def health() -> Response:
        return _health(client, reconciler.last, options.interval)

    return app


async def _body_of(request: Request) -> bytes | Response:
    """Return an event's body, or the answer to one that is too large, too slow or gone."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > BODY_LIMIT:
                    return _answer(413, f"an event of more than {BODY_LIMIT} bytes does not come from MLflow")
    except TimeoutError:
        return _answer(408, f"the event did not come within {BODY_SECONDS:g} s", headers={"Connection": "close"})
    except ClientDisconnect:  # nobody is there to be answered
        return Response(status_code=400)
    return bytes(body)


def _health(client: MlflowClient, last: LastLook, interval: float) -> Response:
    """Return the state of both services and of the reconciling loop; 503 where one of them is not well."""
    now = datetime.datetime.now(datetime.UTC)
    late = last.at is None or (now - last.at).total_seconds() > MISSED_LOOKS * max(interval, 10.0)
    state: dict[str, Any] = {
        "registry": "ok" if answers(client) else "does not answer",
        "prefect": "ok" if prefect_answers() else "does not answer",
        "last_reconciled": last.at.isoformat(timespec="seconds") if last.at else None,
        "handed_over_by_reconciling": last.handed_over,
        "trouble": last.trouble or None,
    }
    well = state["registry"] == state["prefect"] == "ok" and not late
    return JSONResponse({"status": "ok" if well else "degraded", **state}, status_code=200 if well else 503)


def wanted_version(body: bytes) -> str | None:
    """Return the ``models:/NAME/VERSION`` that an event asks to audit; None where it asks for nothing.

    Raises:
        ValueError: the body is no event of MLflow's.
    """
    try:
        event = json.loads(body)
        entity, action, data = event["entity"], event["action"], event["data"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("the body is not an event of MLflow's, which is JSON with entity, action and data") from None
    asked = (entity, action) == ("model_version", "created") or (
        (entity, action) == ("model_version_tag", "set") and isinstance(data, dict) and data.get("key") == RECIPE_TAG
    )
    if not asked:
        return None
    name, version = (data.get("name"), str(data.get("version"))) if isinstance(data, dict) else (None, "")
    if not isinstance(name, str) or not name or not (version.isascii() and version.isdigit()):
        raise ValueError("the event names no model version")
    if len(name) > LONGEST_NAME or any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError("the event names a model as no registry can")
    if len(version) > len(str(LARGEST_VERSION)) or int(version) > LARGEST_VERSION:
        raise ValueError("the event names a version as no registry can")
    return reference_to(name, int(version))


def _hand_over(reference: str, client: MlflowClient, settings: GradauditSettings, turn: threading.Lock) -> str:
    version = VersionReference.parse(reference).resolve(client)
    if version.unready:
        return version.unready
    due = without_result([version], settings)
    if not due:
        return "it has a result"
    _, aside = set_aside([version], client, settings.results)
    if aside:
        return f"it is outside the audit: {aside[0].why}"
    if not turn.acquire(timeout=TURN):
        raise InfrastructureError("too many events at once: send it again")
    try:
        (handed,) = hand_over(due)
    finally:
        turn.release()
    if handed is Handover.FULL:
        raise InfrastructureError(str(handed))
    return str(handed)


def _register(client: MlflowClient, url: str, secret: str, stop: threading.Event) -> None:
    """Create the webhook in MLflow, again and again until MLflow answers."""
    while not stop.is_set():
        try:
            _log.warning("MLflow's webhook: %s", register_webhook(client, url, secret))
            return
        except InfrastructureError as error:
            _log.warning("the webhook could not be registered in MLflow for now: %s", error)
        except ArtifactError as error:
            _log.error(
                "MLflow refuses the webhook: %s; reconciling goes on without it. For an address like %s MLflow's "
                "server needs MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https and MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true",
                error,
                url,
            )
            return
        stop.wait(30.0)


def _answer(code: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": text}, status_code=code, headers=headers)
