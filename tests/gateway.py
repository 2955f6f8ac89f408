"""A company's front door: HTTP basic authentication before a real MLflow server, with rights by user.

MLflow's own basic-auth application answers alike (401 and 403 with plain text) and needs a further package.

    with guarded_mlflow(tmp_path) as door:
        MlflowClient(tracking_uri=door.url)  # with MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

from flows.service.plan import HOST
from tests.servers import plan_for, running

#: Users and their passwords; what each may not do, as a pattern of method and path.
USERS = {"writer": "w-secret", "reader": "r-secret"}
_WRITES = r"(POST|PATCH|DELETE|PUT) .*/mlflow/(runs|experiments|registered-models|model-versions)/(?!.*search)"
FORBIDDEN = {"reader": re.compile(_WRITES)}

#: The path under which MLflow is served.
PREFIX = "/ml"


@dataclasses.dataclass
class Door:
    """The gateway as it stands.

    Attributes:
        url: the tracking URI.
        log: what was asked, ``METHOD PATH STATUS``.
        broken: a pattern of ``METHOD PATH`` that is answered with ``status`` instead; None answers all.
    """

    url: str
    log: list[str] = dataclasses.field(default_factory=list)
    broken: re.Pattern[str] | None = None
    status: int = 500


@contextlib.contextmanager
def guarded_mlflow(folder: Path) -> Iterator[Door]:
    """Run MLflow's server under a prefix, artifacts through it, behind the gateway; yield the gateway."""
    plan = plan_for(folder)
    service = plan.mlflow()
    service = dataclasses.replace(service, command=(*service.command, "--static-prefix", PREFIX))
    with running(service, plan, f"{plan.mlflow_url}{PREFIX}/health"), _serving(plan.mlflow_url) as door:
        yield door


@contextlib.contextmanager
def _serving(upstream: str) -> Iterator[Door]:
    door = Door("")
    server = uvicorn.Server(uvicorn.Config(_application(upstream, door), host=HOST, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    door.url = f"http://{HOST}:{server.servers[0].sockets[0].getsockname()[1]}{PREFIX}"
    try:
        yield door
    finally:
        server.should_exit = True
        thread.join(10)


def _application(upstream: str, door: Door) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def pass_on(request: Request) -> Response:
        answer = await _answer(request, upstream, door)
        door.log.append(f"{request.method} {request.url.path} {answer.status_code}")
        return answer

    return app


async def _answer(request: Request, upstream: str, door: Door) -> Response:
    query = f"?{request.url.query}" if request.url.query else ""
    asked = f"{request.method} {request.url.path}{query}"
    user = _user(request.headers.get("authorization", ""))
    if user is None:
        return Response("You are not authenticated.", 401, {"WWW-Authenticate": 'Basic realm="mlflow"'})
    if user in FORBIDDEN and FORBIDDEN[user].match(asked):
        return Response("Permission denied", 403)
    if door.broken is not None and door.broken.match(asked):
        return Response("broken on purpose", door.status)
    kept = {k: v for k, v in request.headers.items() if k not in ("host", "authorization", "content-length")}
    async with httpx.AsyncClient(base_url=upstream, timeout=60) as client:
        found = await client.request(
            request.method, request.url.path + query, headers=kept, content=await request.body()
        )
    dropped = ("content-length", "content-encoding", "transfer-encoding", "connection")
    return Response(found.content, found.status_code, {k: v for k, v in found.headers.items() if k not in dropped})


def _user(header: str) -> str | None:
    with contextlib.suppress(ValueError):
        name, _, password = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
        if USERS.get(name) == password:
            return name
    return None
