"""The catalog: an SQL index of runs, for listing and searching. Every fact in it is in the run folders.

SQLite beside the data by default, PostgreSQL by URL; `rebuild` makes it anew from the folders.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from sqlalchemy import Engine, event
from sqlmodel import Field, Session, SQLModel, create_engine, delete, select

from storage.models import RunState
from storage.run_folder import RunFolder, find_runs

__all__ = ["Catalog", "RunRow", "StreamRow", "default_url"]


class RunRow(SQLModel, table=True):
    """One run."""

    __tablename__ = "run"
    experiment: str = Field(primary_key=True)
    run: int = Field(primary_key=True)
    started_at: datetime
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
    planned: int = 0
    announced: int = 0


def default_url(root: Path) -> str:
    """SQLite in the data folder."""
    return f"sqlite:///{root / 'catalog.sqlite'}"


class Catalog:
    """Opened once per process; safe from any thread."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            _use_wal(self._engine)
        SQLModel.metadata.create_all(self._engine, tables=[RunRow.__table__, StreamRow.__table__])  # type: ignore[attr-defined]

    def record(self, folder: RunFolder, announced: dict[str, int] | None = None) -> None:
        """Bring the rows of one run up to what its folder says."""
        header = folder.header
        with self._session() as session:
            session.merge(
                RunRow(
                    experiment=header.experiment,
                    run=header.run,
                    started_at=header.started_at,
                    state=folder.state,
                    sample=header.sample,
                    folder=str(folder.path),
                )
            )
            for name in folder.data_sources():
                session.merge(_stream_row(folder, name, (announced or {}).get(name)))

    def runs(self, experiment: str | None = None) -> list[RunRow]:
        """All runs, or those of one experiment, by experiment and number."""
        query = select(RunRow).order_by(RunRow.experiment, RunRow.run)  # type: ignore[arg-type]
        if experiment is not None:
            query = query.where(RunRow.experiment == experiment)
        with self._session() as session:
            return list(session.exec(query))

    def streams(self, experiment: str, run: int) -> list[StreamRow]:
        """The data sources of one run."""
        query = select(StreamRow).where(StreamRow.experiment == experiment, StreamRow.run == run)
        with self._session() as session:
            return list(session.exec(query))

    def rebuild(self, root: Path) -> int:
        """Forget everything and read it again from the run folders below ``root``; the number of runs."""
        with self._session() as session:
            session.exec(delete(StreamRow))
            session.exec(delete(RunRow))
        n_runs = 0
        for folder in find_runs(root):
            self.record(folder)
            n_runs += 1
        return n_runs

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session:
            yield session
            session.commit()


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


def _use_wal(engine: Engine) -> None:
    """Readers never wait for the writer; a power loss may cost the last rows, which a rebuild brings back."""

    @event.listens_for(engine, "connect")
    def _configure(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()
