"""Prefect's server as we start it: room for every connection to its SQLite file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.service.prefect_server import CONNECTIONS, wide_engine

_POOL = """
import asyncio
from flows.service.prefect_server import create_app
create_app()
from prefect.server.database import provide_database_interface
async def main():
    engine = await provide_database_interface().engine()
    print(engine.pool.size(), engine.pool._max_overflow)
asyncio.run(main())
"""


@pytest.mark.end_to_end
def test_prefects_own_engine_on_a_sqlite_file_has_the_wide_pool(tmp_path: Path) -> None:
    database = {"PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}"}
    environment = {**os.environ, **database, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _POOL], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(CONNECTIONS), "0"], done.stderr[-2000:]


def test_what_chose_its_pool_or_is_no_sqlite_keeps_it() -> None:
    from sqlalchemy.pool import AsyncAdaptedQueuePool

    chosen = wide_engine("sqlite+aiosqlite:///:memory:", poolclass=AsyncAdaptedQueuePool, pool_size=1)
    assert chosen.pool.size() == 1
    assert wide_engine("postgresql+asyncpg://nobody@localhost/nothing").pool.size() == 5
