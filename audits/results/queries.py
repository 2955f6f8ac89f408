"""SQL over the results store, by DuckDB in this process: three views, nothing else, nothing written.

* ``audits``: one row per committed audit, its newest writing.
* ``rows``: the rows of those audits, each once.
* ``failures``: the rows that fail their version.

Besides the columns of the result format each has ``audit_date``, the UTC day of ``audited_at``.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from audits.errors import InfrastructureError, InputError
from audits.results.files import Layer, StoreFile, while_files_move
from audits.results.format import AUDITS_SCHEMA, ROWS_SCHEMA
from audits.results.store import ResultsStore

if TYPE_CHECKING:
    import duckdb

#: The views and what they hold.
VIEWS = {
    "rows": "one row per audit, phase, step, lane, check and parameter",
    "audits": "one row per audit: outcome, coverage, counts, MLflow run",
    "failures": "the rows that fail their version: of severity fail, and not waived",
}

_SCHEMAS = {"rows": ROWS_SCHEMA, "audits": AUDITS_SCHEMA}
_TYPES = {
    pa.string(): "VARCHAR",
    pa.float64(): "DOUBLE",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.timestamp("us", tz="UTC"): "TIMESTAMP WITH TIME ZONE",
    pa.list_(pa.string()): "VARCHAR[]",
    pa.map_(pa.string(), pa.string()): "MAP(VARCHAR, VARCHAR)",
}

#: What a query may hold; beyond it DuckDB spills to a temporary folder.
MEMORY_LIMIT = "2GB"

#: What keeps a query inside the store: no other file, no network, no extension, no Python variable, no way back.
_LOCKED = (
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET python_enable_replacements = false",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)


def query(
    store: ResultsStore,
    sql: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    since: datetime.date | None = None,
    until: datetime.date | None = None,
) -> pa.Table:
    """Run one SELECT over the store's views.

    Args:
        store: the results store; one that is empty has empty views.
        sql: one statement that reads; ``$name`` stands for a parameter.
        parameters: their values.
        since: look at no file of an earlier day; the views then have the audits of later days only.
        until: look at no file of a later day.

    Raises:
        InputError: DuckDB cannot run it, or it is no single SELECT; the text has DuckDB's words and the views' names.
        InfrastructureError: the store cannot be read.
    """
    return while_files_move(lambda: _query(store, sql, parameters, since, until))


def _query(
    store: ResultsStore,
    sql: str,
    parameters: Mapping[str, Any] | None,
    since: datetime.date | None,
    until: datetime.date | None,
) -> pa.Table:
    import duckdb

    with open_views(store, since=since, until=until) as connection:
        try:
            statements = connection.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise InputError(f"write one statement that reads (SELECT, FROM, WITH, DESCRIBE, SUMMARIZE); {_VIEWS}")
            found = connection.sql(sql, params=dict(parameters or {}))
            return found.to_arrow_table()
        except duckdb.IOException as error:
            if "No such file" in str(error):
                raise InfrastructureError("a result file is gone") from FileNotFoundError(str(error))
            raise InfrastructureError(f"results in {store.root} cannot be read: {_words(error)}") from error
        except duckdb.OutOfMemoryException as error:
            raise InfrastructureError(f"the query needs more memory than there is: {_words(error)}") from error
        except duckdb.Error as error:
            raise InputError(f"{_words(error)}{_quoting(error)}\n{_VIEWS}") from error


_VIEWS = "views: " + ", ".join(f"{name} ({text})" for name, text in VIEWS.items()) + "; DESCRIBE rows lists columns"


def _quoting(error: Exception) -> str:
    """Say what to do about the one column whose name is a word of SQL."""
    return '\n"check" is a word of SQL: write the column in double quotes' if 'near "check"' in str(error) else ""


def _words(error: Exception) -> str:
    """DuckDB's message, whose marker stands under the place; without the kind it begins with."""
    return re.sub(r"^(\w+ )+Error: ", "", str(error).strip())


@contextlib.contextmanager
def open_views(
    store: ResultsStore, *, since: datetime.date | None = None, until: datetime.date | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an in-memory DuckDB that has the views and can reach nothing but the store.

    Raises:
        InfrastructureError: the store cannot be listed.
    """
    import duckdb

    with (
        tempfile.TemporaryDirectory(prefix="gradaudit-sql-") as spill,
        contextlib.closing(
            duckdb.connect(":memory:", config={"temp_directory": spill, "memory_limit": MEMORY_LIMIT})
        ) as connection,
    ):
        connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false; CREATE SCHEMA store")
        for dataset in _SCHEMAS:
            files = store.files(dataset, since=since, until=until)
            everything = _source(connection, store, dataset, files)
            connection.execute(f"CREATE VIEW store.{dataset} AS FROM ({everything}) WHERE {_between(since, until)}")
        for view in _VIEW_SQL:
            connection.execute(view)
        folder = store.local_folder
        if folder is not None:
            places = ", ".join(_quoted(f"{folder}/{dataset}/") for dataset in _SCHEMAS)
            connection.execute(f"SET allowed_directories = [{places}]")
        for setting in _LOCKED:
            connection.execute(setting)
        yield connection


#: Of every audit id the newest committed writing; rows that no commit stands behind are not shown. Rows may be newer
#: than the commit: two workers on one audit, the later one killed in between, leave the later one's rows.
_VIEW_SQL = (
    """
    CREATE VIEW audits AS
    SELECT *, CAST(audited_at AS DATE) AS audit_date FROM store.audits
    QUALIFY row_number() OVER (PARTITION BY model_name, audit_id ORDER BY audited_at DESC) = 1
    """,
    """
    CREATE VIEW store.commits AS
    SELECT model_name, audit_id, max(audited_at) AS committed_at FROM store.audits GROUP BY model_name, audit_id
    """,
    # a plain join: DuckDB pushes a filter on the model's name into both sides, and reads few row groups
    """
    CREATE VIEW rows AS
    SELECT r.*, CAST(r.audited_at AS DATE) AS audit_date FROM store.rows AS r SEMI JOIN store.commits AS c
    ON c.model_name = r.model_name AND c.audit_id = r.audit_id AND r.audited_at >= c.committed_at
    AND CAST(r.audited_at AS DATE) = CAST(c.committed_at AS DATE)
    """,
    "CREATE VIEW failures AS SELECT * FROM rows WHERE outcome = 'fail' AND severity = 'fail' AND waiver IS NULL",
)


def _source(
    connection: duckdb.DuckDBPyConnection, store: ResultsStore, dataset: str, files: Sequence[StoreFile]
) -> str:
    """SQL for all rows of a dataset, without those that a finer file holds too: a compaction is under way, or broke."""
    layers: dict[tuple[Layer, str], list[StoreFile]] = {}
    for file in files:
        layers.setdefault((file.layer, "" if file.layer is Layer.AUDIT else file.period), []).append(file)
    plain = list(layers.pop((Layer.AUDIT, ""), []))
    selects = []
    for index, ((layer, period), coarse) in enumerate(sorted(layers.items())):
        finer = [f for f in files if f.layer > layer and (f.month if layer is Layer.MONTH else f.period) == period]
        if not finer:
            plain += coarse
            continue
        held = _scan(connection, store, dataset, finer, f"finer_{index}")
        here = _scan(connection, store, dataset, coarse, f"coarse_{index}")
        selects.append(
            f"SELECT c.* FROM {here} AS c ANTI JOIN {held} AS f "
            "ON f.audit_id = c.audit_id AND f.audited_at >= c.audited_at"
        )
    if plain or not selects:
        selects.insert(0, f"SELECT * FROM {_scan(connection, store, dataset, plain, 'plain')}")
    return " UNION ALL ".join(selects)


def _scan(
    connection: duckdb.DuckDBPyConnection, store: ResultsStore, dataset: str, files: Sequence[StoreFile], name: str
) -> str:
    """SQL for a table of these files: DuckDB's own reader for a local folder, Arrow's for an object store."""
    schema = _SCHEMAS[dataset]
    if store.local_folder is None or not files:
        paths = [file.path for file in files]
        name = f"{dataset}_{name}"
        connection.register(name, store.dataset(dataset, paths) if paths else schema.empty_table())
        return name
    columns = ", ".join(
        f"{_quoted(f.name)}: {{name: {_quoted(f.name)}, type: '{_TYPES[f.type]}', default_value: NULL}}" for f in schema
    )
    paths_sql = ", ".join(_quoted(file.path) for file in files)
    return f"read_parquet([{paths_sql}], schema = MAP {{{columns}}}, hive_partitioning = false)"


def _between(since: datetime.date | None, until: datetime.date | None) -> str:
    """SQL for the days: a merged month holds others too."""
    parts = [f"audited_at >= TIMESTAMPTZ '{since} 00:00:00+00'"] if since else []
    parts += [f"audited_at < TIMESTAMPTZ '{until + datetime.timedelta(1)} 00:00:00+00'"] if until else []
    return " AND ".join(parts) or "TRUE"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
