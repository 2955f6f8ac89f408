"""A Prefect server of our own for the time of one command, unless one is configured.

Prefect starts one by itself too, but that one outlives a killed parent; this one dies with us.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO

from audits.errors import InfrastructureError
from flows.processes import UVICORN, die_with_parent

#: What a server of one command does without: its UI, and the services that schedule runs for days to come.
_LEAN = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}

#: Seconds a server may take to answer; 8 to 16 are usual, more on a busy machine.
STARTUP_SECONDS = 90.0


@contextlib.contextmanager
def prefect_server() -> Iterator[str]:
    """Provide a Prefect API and yield its URL.

    A configured server (``PREFECT_API_URL`` or a profile) is used as it is. Otherwise one is started on a free port
    of 127.0.0.1, with its SQLite database in ``PREFECT_HOME``, and ended on leaving.

    Raises:
        InfrastructureError: the server did not start; the text holds its last words.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    configured = get_current_settings().api.url
    if configured:
        yield configured
        return
    parent = os.getpid()
    # the socket is ours from now on: a number alone would be anyone's for the seconds that the server takes to start
    with tempfile.TemporaryFile() as log, socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        server = subprocess.Popen(
            [
                *UVICORN,
                "flows.service.prefect_server:create_app",
                "--fd",
                str(listening.fileno()),
                "--log-level",
                "error",
                "--lifespan",
                "on",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listening.fileno()],
            start_new_session=True,
            env={**os.environ, **_LEAN},
            preexec_fn=lambda: die_with_parent(parent),
        )
        listening.close()  # the server's alone: once it is dead, who calls is refused and does not hang
        try:
            _wait_until_it_answers(server, url, log)
            os.environ["PREFECT_API_URL"] = url
            refresh_global_settings_context()
            yield url
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            refresh_global_settings_context()
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_until_it_answers(server: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return
        time.sleep(0.1)
    log.seek(0)
    words = log.read().decode("utf-8", "replace").strip().splitlines()
    raise InfrastructureError(
        f"Prefect's embedded server did not start within {STARTUP_SECONDS:.0f} s: "
        f"{words[-1] if words else 'it said nothing'}"
    )
