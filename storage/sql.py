"""What every SQL index of the run folders does alike, in SQLite beside the data and in PostgreSQL by URL.

Such an index holds nothing of its own: it can be made anew from the folders.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.types import TypeDecorator
from sqlmodel import Session, SQLModel, create_engine

__all__ = ["Database", "Utc"]

_INSERTS: dict[str, Callable[..., Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
# PostgreSQL, s and ms: a server that does not answer is given up, and tried again later.
_CONNECT_TIMEOUT_S = 5
_STATEMENT_TIMEOUT_MS = 10_000
# Any number will do, as long as all services take the same.
_TABLES_LOCK = 0x4E4C4341


class Utc(TypeDecorator[datetime]):
    """A moment: kept in UTC without a zone, which both databases do alike."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: object) -> datetime | None:
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _dialect: object) -> datetime | None:
        return value and value.replace(tzinfo=UTC)


class Database:
    """Some tables in one database; safe from any thread. Nothing is asked of it before it is needed."""

    def __init__(self, url: str, tables: Sequence[type[SQLModel]]) -> None:
        self.engine = create_engine(url, **_engine_options(url))
        if self.engine.dialect.name == "sqlite":
            _use_wal(self.engine)
        self._tables = [table.__table__ for table in tables]  # type: ignore[attr-defined]
        self._has_tables = False
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """Where it is, without a password."""
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction, committed at the end; the tables are there."""
        self._make_tables()
        with Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    def upsert(self, session: Session, rows: Sequence[SQLModel]) -> None:
        """Insert or update rows of one table: another process may be writing the same, so nothing is looked up first.

        Of rows with the same key the last one holds.
        """
        if not rows:
            return
        table = type(rows[0]).__table__  # type: ignore[attr-defined]
        insert = _INSERTS[self.engine.dialect.name](table)
        keys = [column.name for column in table.primary_key]
        values = {c.name: insert.excluded[c.name] for c in table.columns if c.name not in keys}
        # Rows as parameters: with rows in the statement, SQLAlchemy would compile each anew (5 ms).
        session.execute(insert.on_conflict_do_update(index_elements=keys, set_=values), [r.model_dump() for r in rows])

    def close(self) -> None:
        self.engine.dispose()

    def _make_tables(self) -> None:
        with self._lock:
            if self._has_tables:
                return
            with self.engine.begin() as connection:
                if self.engine.dialect.name == "postgresql":
                    # Two services that begin at once would both find no tables, and one would fail.
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_TABLES_LOCK})"))
                # Not `create_all`, which looks first: in SQLite another process may be between its look and its table.
                for table in self._tables:
                    connection.execute(CreateTable(table, if_not_exists=True))
                    for index in table.indexes:
                        connection.execute(CreateIndex(index, if_not_exists=True))
            self._has_tables = True


def _engine_options(url: str) -> dict[str, Any]:
    if make_url(url).get_backend_name() != "postgresql":
        return {}
    timeouts = {"connect_timeout": _CONNECT_TIMEOUT_S, "options": f"-c statement_timeout={_STATEMENT_TIMEOUT_MS}"}
    return {"pool_pre_ping": True, "connect_args": timeouts}


def _use_wal(engine: Engine) -> None:
    """Readers never wait for the writer; a power loss may cost the last rows, which a rebuild brings back."""

    @event.listens_for(engine, "connect")
    def _configure(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()
