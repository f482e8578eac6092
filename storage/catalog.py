"""The catalog: an SQL index of runs, for listing and searching. Every fact in it is in the run folders.

SQLite beside the data by default, PostgreSQL by URL, where many services write into one;
`rebuild` makes it anew from the folders. A service writes through a `CatalogWriter`, so that no
database can hold it up.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Field, SQLModel, delete, select

from storage.errors import NearlineError
from storage.models import RunState
from storage.run_folder import RunFolder, find_runs
from storage.sql import Database, Utc

__all__ = ["Catalog", "CatalogWriter", "Rebuilt", "RunRow", "StreamRow", "default_url", "note_runs"]

log = logging.getLogger("nearline.catalog")

_COUNTS_EVERY_S = 1.0
_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 30.0


class RunRow(SQLModel, table=True):
    """One run."""

    __tablename__ = "run"
    experiment: str = Field(primary_key=True)
    run: int = Field(primary_key=True)
    started_at: datetime = Field(sa_type=Utc)
    state: str = RunState.live
    sample: str | None = None
    folder: str


class StreamRow(SQLModel, table=True):
    """One data source of a run; frame counts are those at its last commit or end."""

    __tablename__ = "stream"
    experiment: str = Field(primary_key=True)
    run: int = Field(primary_key=True)
    data_source: str = Field(primary_key=True)
    kind: str
    parent: str | None = None
    series_unique_id: str | None = Field(default=None, index=True)
    planned: int = Field(default=0, sa_type=BigInteger)
    announced: int = Field(default=0, sa_type=BigInteger)


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild took in, and what it had to leave out, in words."""

    n_runs: int
    left_out: list[str]


def default_url(root: Path) -> str:
    """SQLite in the data folder."""
    return f"sqlite:///{root / 'catalog.sqlite'}"


class Catalog:
    """Opened once per process; safe from any thread. Nothing is asked of the database before it is needed."""

    def __init__(self, url: str) -> None:
        self._database = Database(url, (RunRow, StreamRow))

    @property
    def place(self) -> str:
        """Where it is, without a password."""
        return self._database.place

    def record(self, folder: RunFolder, announced: dict[str, int] | None = None) -> None:
        """Bring the rows of one run up to what its folder says.

        Raises
        ------
        DamagedFile : a header, event or commit of the run cannot be read.
        """
        streams = [_stream_row(folder, name, (announced or {}).get(name)) for name in folder.data_sources()]
        self._write(_run_row(folder), streams)

    def runs(self, experiment: str | None = None) -> list[RunRow]:
        """All runs, or those of one experiment, by experiment and number."""
        query = select(RunRow).order_by(RunRow.experiment, RunRow.run)  # type: ignore[arg-type]
        if experiment is not None:
            query = query.where(RunRow.experiment == experiment)
        with self._database.session() as session:
            return list(session.exec(query))

    def streams(self, experiment: str, run: int) -> list[StreamRow]:
        """The data sources of one run."""
        query = select(StreamRow).where(StreamRow.experiment == experiment, StreamRow.run == run)
        with self._database.session() as session:
            return sorted(session.exec(query), key=lambda row: row.data_source)

    def rebuild(self, root: Path, progress: Callable[[int, int], None] | None = None) -> Rebuilt:
        """Read everything again from the run folders below ``root``; rows of other data folders stay.

        A run that cannot be read is left out and named, as is a stream of it; the rest goes in.
        """
        left_out: list[str] = []
        folders = list(find_runs(root, left_out=left_out.append))
        recorded: set[tuple[str, int]] = set()
        for n_done, folder in enumerate(folders, 1):
            try:
                self._write(_run_row(folder), _readable_streams(folder, left_out))
                recorded.add((folder.header.experiment, folder.header.run))
            except (NearlineError, OSError) as error:
                left_out.append(str(error))
            if progress:
                progress(n_done, len(folders))
        self._forget_others(root, recorded)
        return Rebuilt(len(recorded), left_out)

    def close(self) -> None:
        self._database.close()

    def _write(self, run: RunRow, streams: list[StreamRow]) -> None:
        """Insert or update: another service may be writing the same rows, so nothing is looked up first."""
        with self._database.session() as session:
            self._database.upsert(session, [run])
            self._database.upsert(session, streams)
            gone = delete(StreamRow).where(StreamRow.experiment == run.experiment, StreamRow.run == run.run)  # type: ignore[arg-type]
            session.exec(gone.where(StreamRow.data_source.not_in([s.data_source for s in streams])))  # type: ignore[attr-defined]

    def _forget_others(self, root: Path, recorded: set[tuple[str, int]]) -> None:
        """Remove the rows of this data folder whose runs are not there (any more)."""
        below = f"{root.absolute()}/"
        for row in self.runs():
            key = (row.experiment, row.run)
            if row.folder.startswith(below) and key not in recorded:
                with self._database.session() as session:
                    session.exec(delete(StreamRow).where(StreamRow.experiment == key[0], StreamRow.run == key[1]))  # type: ignore[arg-type]
                    session.exec(delete(RunRow).where(RunRow.experiment == key[0], RunRow.run == key[1]))  # type: ignore[arg-type]


def note_runs(root: Path, folders: Iterable[RunFolder], url: str | None = None) -> str | None:
    """Bring the rows of runs that somebody has changed up to date; why that failed in words, else None.

    Nothing is done where a data folder has no catalog: it is an index, and can be made at any time.

    Parameters
    ----------
    url : the catalog's; by default the one in the data folder, if there is one.
    """
    if url is None and not (root / "catalog.sqlite").exists():
        return None
    catalog = Catalog(url or default_url(root))
    try:
        for folder in folders:
            catalog.record(folder)
    except (SQLAlchemyError, NearlineError) as error:
        return f"the catalog is behind (`nearline catalog rebuild` brings it up): {error}"
    finally:
        catalog.close()
    return None


@dataclass
class _Waiting:
    """A run whose rows are to be brought up to date, and the latest counts told of its streams."""

    folder: RunFolder
    announced: dict[str, int] = field(default_factory=dict)
    # Monotonic s: not written before.
    due: float = math.inf


class CatalogWriter:
    """Writes the catalog in a thread of its own: who records never waits for a database, nor hears its errors.

    Records of one run that come while it waits are one; how far its streams are is written once a second
    at most. What a database that is away misses is written when it is back; what is lost when the process
    ends, `Catalog.rebuild` restores.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._changed = threading.Condition()
        self._waiting: dict[Path, _Waiting] = {}
        # Counts are not written before this, monotonic s.
        self._counts_due = 0.0
        self._is_writing = self._is_closed = False
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="catalog", daemon=True)
        self._thread.start()

    def record(self, folder: RunFolder, announced: dict[str, int] | None = None) -> None:
        """Ask for the rows of one run to be brought up to date; returns at once.

        With ``announced``, only these counts of its streams have changed, and there is no hurry.
        """
        with self._changed:
            waiting = self._waiting.setdefault(folder.path, _Waiting(folder))
            waiting.announced.update(announced or {})
            waiting.due = min(waiting.due, self._counts_due if announced else 0.0)
            self._changed.notify_all()

    def status(self) -> dict[str, Any]:
        """``behind`` by so many runs, and the ``error`` of the last attempt, None if it succeeded."""
        with self._changed:
            behind = len(self._waiting) + self._is_writing
            return {"place": self._catalog.place, "behind": behind, "error": self._error}

    def flush(self, timeout: float) -> bool:
        """Have all that was recorded written now, and wait for it; whether it is."""
        with self._changed:
            for waiting in self._waiting.values():
                waiting.due = 0.0
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting and not self._is_writing, timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """Write what is waiting and stop; after ``timeout`` s, give it up. Whether all was written."""
        is_written = self.flush(timeout)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if not is_written:
            log.warning("the catalog %s is behind; `nearline catalog rebuild` brings it up", self._catalog.place)
        self._thread.join(0 if not is_written else timeout)
        return is_written

    def _run(self) -> None:
        try:
            self._write_until_closed()
        finally:
            if not self._is_closed:  # a fault of ours: it must not look like a catalog that is up to date
                self._error = "the catalog's writer has stopped, the log says why; restart the service"

    def _write_until_closed(self) -> None:
        pause = _FIRST_RETRY_S
        while (entry := self._next()) is not None:
            if self._attempt(entry):
                pause = _FIRST_RETRY_S
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, pause)
            pause = min(2 * pause, _LAST_RETRY_S)

    def _attempt(self, entry: _Waiting) -> bool:
        """Write one run; False if the database could not, and the run waits again."""
        error: str | None = None
        is_away = False
        try:
            self._catalog.record(entry.folder, entry.announced)
        except (NearlineError, OSError) as problem:
            # The run's own: trying again would not help it, and others wait.
            error = str(problem)
        except SQLAlchemyError as problem:
            error, is_away = _first_line(problem), True
        with self._changed:
            if is_away:
                newer = self._waiting.get(entry.folder.path)
                entry.announced.update(newer.announced if newer else {})
                entry.due = 0.0
                self._waiting[entry.folder.path] = entry
            if error and error != self._error:
                log.error("the catalog is behind: %s", error)
            self._error, self._is_writing = error, False
            self._changed.notify_all()
        return not is_away

    def _next(self) -> _Waiting | None:
        """The run that is due first; None when closed."""
        with self._changed:
            while not self._is_closed:
                first = min(self._waiting.values(), key=lambda entry: entry.due, default=None)
                now = time.monotonic()
                if first is not None and first.due <= now:
                    self._counts_due = now + _COUNTS_EVERY_S
                    self._is_writing = True
                    return self._waiting.pop(first.folder.path)
                self._changed.wait(None if first is None else first.due - now)
            return None


def _run_row(folder: RunFolder) -> RunRow:
    header = folder.header
    return RunRow(
        experiment=header.experiment,
        run=header.run,
        started_at=header.started_at,
        state=folder.state,
        sample=header.sample,
        folder=str(folder.path.absolute()),
    )


def _readable_streams(folder: RunFolder, left_out: list[str]) -> list[StreamRow]:
    """The rows of all streams that can be read; the others are named."""
    rows = []
    for name in folder.data_sources():
        try:
            rows.append(_stream_row(folder, name, None))
        except (NearlineError, OSError) as error:
            left_out.append(str(error))
    return rows


def _stream_row(folder: RunFolder, name: str, announced: int | None) -> StreamRow:
    header = folder.stream_header(name)
    if announced is None:
        paths = folder.stream(name)
        finished, commits = folder.finished(name), paths.commits()
        announced = finished["announced"] if finished else (paths.read_commit(commits[-1]).stop if commits else 0)
    return StreamRow(
        experiment=header.experiment,
        run=header.run,
        data_source=name,
        kind=header.kind,
        parent=header.parent,
        series_unique_id=header.series.series_unique_id if header.series else None,
        planned=header.planned,
        announced=announced,
    )


def _first_line(error: SQLAlchemyError) -> str:
    """The database's own words, without the statement."""
    return str(getattr(error, "orig", error)).strip().splitlines()[0]
