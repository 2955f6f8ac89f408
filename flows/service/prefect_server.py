"""Prefect's server on SQLite, with room for every connection.

Prefect 3.8 leaves SQLAlchemy's pool for a SQLite file at 15 connections and offers no setting. A request that holds
the database's write lock and needs a second connection then waits for one of 15 requests that wait for the lock: all
of them stand still until SQLite's timeout of 60 s. Thirty registrations at once bring it about; a wider pool, in which
the holder always finds a connection, does not stand still.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

#: Connections to the SQLite file: more than the requests and services that are ever under way at once.
CONNECTIONS = 200


def create_app() -> FastAPI:
    """Return Prefect's server, for ``uvicorn --factory``."""
    from prefect.server.api.server import create_app as prefect_app
    from prefect.server.database import configurations

    configurations.create_async_engine = wide_engine  # type: ignore[attr-defined]
    return prefect_app()


def wide_engine(url: str | URL, **options: Any) -> AsyncEngine:
    """Create an engine as Prefect asks for it; one on a SQLite file gets the wide pool."""
    if str(url).startswith("sqlite") and "poolclass" not in options:
        options |= {"pool_size": CONNECTIONS, "max_overflow": 0}
    return create_async_engine(url, **options)
