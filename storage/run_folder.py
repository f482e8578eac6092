"""A run on disk: where everything is, its header, and its immutable facts in order.

All facts of a run live here; the catalog is only an index of them.
"""

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from storage.errors import DamagedFile, RunNotFound, StreamNotFound, StreamOwned
from storage.files import is_local, make_folder, publish, read_many, remote_errors, to_path
from storage.models import Record, RunHeader, RunState, StreamHeader
from storage.names import check_name, check_run, run_key
from storage.states import StateRange

__all__ = [
    "LOCAL_EVENTS",
    "ChunkCommit",
    "ChunkVeto",
    "Event",
    "RunFolder",
    "StreamPaths",
    "claim_stream",
    "find_runs",
    "has_writer",
    "latest_epoch",
    "parse_file",
]

log = logging.getLogger("nearline.storage")

R = TypeVar("R", bound=Record)

# Facts of this copy of a run: another copy has its own.
LOCAL_EVENTS = ("run_deleted", "run_uploaded")

_STREAM_SUFFIX = ".stream.json"
_LOCK_ATTEMPTS = 20
_LOCK_PAUSE_S = 0.01


class Event(Record):
    """A fact about a run, written once."""

    number: int
    kind: str
    at: datetime
    payload: dict[str, Any]


class ChunkVeto(Record):
    """Frames of a sealed chunk that a veto removed: ``starts[i] <= frame_index < stops[i]``."""

    veto: str
    cause: str = Field(description="when, by whom and why, to be read behind `vetoed`")
    starts: list[int]
    stops: list[int]
    digest: str = Field(description="of the chunk before")


class ChunkCommit(Record):
    """The commit point of chunk k: once this file exists, the chunk is sealed.

    ``ranges`` say what the chunk was sealed with. A veto replaces the commit: of the frames that stay are then
    ``n_frames``, ``size_bytes`` and ``digest``, and the commit before is kept with the veto.
    """

    chunk: int
    start: int
    stop: int
    ranges: list[StateRange]
    n_frames: int
    size_bytes: int
    digest: str
    table_digest: str = Field("", description="blake3 of the frame table's file")
    epoch: int
    sealed_at: datetime
    vetoes: list[ChunkVeto] = Field(default_factory=list, description="what was removed since, in order")

    @property
    def vetoed(self) -> set[int]:
        """The frame indices that were removed."""
        return {
            index
            for veto in self.vetoes
            for start, stop in zip(veto.starts, veto.stops, strict=True)
            for index in range(start, stop)
        }


class StreamPaths:
    """Where one data source's files are inside a run folder."""

    def __init__(self, run: Path, data_source: str) -> None:
        self._run = run
        self.data_source = check_name(data_source, "data source")
        self.header = run / f"{data_source}{_STREAM_SUFFIX}"
        self.zarr = run / f"{data_source}.zarr"
        self.array = self.zarr / "data"
        self.frames = run / f"{data_source}.frames"
        self.chunks = run / f"{data_source}.chunks"
        self.journal = run / f"{data_source}.journal"
        self.accounts = self.journal / "accounts.journal"
        self.amendments = run / f"{data_source}.amendments"
        self.claims = run / f"{data_source}.claims"
        self.online_account = run / f"{data_source}.online.json"

    def shard(self, chunk: int, ndim: int) -> Path:
        """The shard of chunk k: frames along the first axis, one shard across the others."""
        return self.array / "c" / "/".join([str(chunk), *["0"] * ndim])

    def stored_shard(self, chunk: int, ndim: int) -> Path:
        """The shard of a sealed chunk where it is now: here, or where it was uploaded to before it was removed."""
        shard = self.shard(chunk, ndim)
        if not is_local(shard) or shard.exists():
            return shard
        places = [parse_file(Event, p).payload["to"] for p in sorted(self._run.glob("events/[0-9]*-run_uploaded.json"))]
        return to_path(places[-1]) / shard.relative_to(self._run).as_posix() if places else shard

    def frame_table(self, chunk: int) -> Path:
        return self.frames / f"{chunk:05d}.parquet"

    def commit(self, chunk: int) -> Path:
        return self.chunks / f"{chunk:05d}.json"

    def open_journal(self, chunk: int) -> Path:
        return self.journal / f"{chunk:05d}.journal"

    def journals(self) -> list[tuple[int, Path]]:
        """Chunks not sealed yet, in order."""
        return [(int(p.stem), p) for p in sorted(self.journal.glob("*.journal")) if p.stem.isdecimal()]

    def commits(self) -> list[int]:
        """Sealed chunks, in order."""
        return sorted(int(p.stem) for p in self.chunks.glob("*.json") if p.stem.isdecimal())

    def read_commits(self, chunks: Sequence[int]) -> list[ChunkCommit]:
        """The commits of some chunks; behind a URL ten thousand take a second or two, not minutes."""
        paths = [self.commit(chunk) for chunk in chunks]
        return [_parsed(ChunkCommit, path, content) for path, content in zip(paths, read_many(paths), strict=True)]

    def read_commit(self, chunk: int) -> ChunkCommit:
        return parse_file(ChunkCommit, self.commit(chunk))


class RunFolder:
    """One run: ``<root>/<experiment>/<run>/``."""

    def __init__(self, path: Path, header: RunHeader) -> None:
        self.path, self.header = path, header

    @classmethod
    def create(cls, root: Path, header: RunHeader) -> "RunFolder":
        """Make a new run's folder; FileExistsError when that run number is taken."""
        path = root / check_name(header.experiment, "experiment") / str(check_run(header.run))
        if not publish(path / "run.json", header.model_dump_json(indent=2).encode()):
            raise FileExistsError(f"run {header.experiment}/{header.run} exists already in {root}")
        folder = cls(path, header)
        folder.add_event("run_started", {})
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "RunFolder":
        """A run that is there, in a folder or behind a URL such as ``s3://bucket/lyso-2026/17``.

        Raises
        ------
        RunNotFound : no ``run.json`` in that folder, or one this version cannot read.
        PlaceUnavailable : the object store did not answer.
        """
        path = to_path(path)
        try:
            with remote_errors(path):
                content = (path / "run.json").read_bytes()
            return cls(path, RunHeader.model_validate_json(content))
        except (FileNotFoundError, NotADirectoryError):
            raise RunNotFound(
                f"no run in {path} (it has no run.json); give a run folder such as data/lyso-2026/17"
            ) from None
        except ValidationError as error:
            raise RunNotFound(f"{path / 'run.json'} is not a run header of this version: {error}") from error

    def stream(self, data_source: str) -> StreamPaths:
        return StreamPaths(self.path, data_source)

    def data_sources(self) -> list[str]:
        """Names of all streams of the run, derived ones included, sorted."""
        return sorted(p.name.removesuffix(_STREAM_SUFFIX) for p in self.path.glob(f"*{_STREAM_SUFFIX}"))

    def stream_header(self, data_source: str) -> StreamHeader:
        """The header of one data source.

        Raises
        ------
        StreamNotFound : the run has no such data source; the message lists those it has.
        DamagedFile : its header cannot be read.
        """
        try:
            return parse_file(StreamHeader, self.stream(data_source).header)
        except FileNotFoundError:
            have = ", ".join(self.data_sources()) or "none yet"
            raise StreamNotFound(
                f"run {self.header.experiment}/{self.header.run} has no data source {data_source!r}; it has: {have}"
            ) from None

    def add_stream(self, header: StreamHeader) -> None:
        """Record a stream's header; FileExistsError when the run has that data source already."""
        path = self.stream(header.data_source).header
        if not publish(path, header.model_dump_json(indent=2).encode()):
            raise FileExistsError(f"data source {header.data_source!r} exists already in {self.path}")

    def add_event(self, kind: str, payload: dict[str, Any]) -> Event:
        """Append a fact; never replaces one."""
        folder = self.path / "events"
        number = 1 + max((int(p.name[:6]) for p in folder.glob("[0-9]*.json")), default=0)
        while True:
            event = Event(number=number, kind=kind, at=datetime.now(UTC), payload=payload)
            if publish(folder / f"{number:06d}-{kind}.json", event.model_dump_json(indent=2).encode()):
                return event
            number += 1

    def events(self, kind: str | None = None) -> Iterator[Event]:
        """The facts in order, all or of one kind."""
        for path in sorted((self.path / "events").glob(f"[0-9]*-{kind or '*'}.json")):
            yield parse_file(Event, path)

    def finished(self, data_source: str) -> dict[str, Any] | None:
        """What was recorded when a stream ended: announced frames and counters; None while it is open."""
        for event in self.events("stream_finished"):
            if event.payload["data_source"] == data_source:
                return event.payload
        return None

    @property
    def deletion(self) -> Event | None:
        """The event that says who deleted the run's frames, and why; None while they are there."""
        return next(iter(self.events("run_deleted")), None)

    @property
    def state(self) -> RunState:
        """Terminal state if the run has ended, else live."""
        if self.deletion is not None:
            return RunState.deleted
        ends = list(self.events("run_finished"))
        return RunState(ends[-1].payload["state"]) if ends else RunState.live


def claim_stream(paths: StreamPaths, owner: str) -> tuple[int, int]:
    """Become the one writer of a stream: (epoch, file descriptor of the lock).

    The lock is the kernel's and ends with the process; the epoch stays in the folder, and a
    publication carries it.

    Raises
    ------
    StreamOwned : another process holds the lock.
    """
    make_folder(paths.claims)
    fd = os.open(paths.claims / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    if not _lock_soon(fd):
        os.close(fd)
        raise StreamOwned(
            f"{paths.data_source} in {paths.claims.parent} is being written by {last_claim(paths)}; "
            "stop that one first, or use another data folder"
        )
    try:
        epoch = 1 + max((int(p.stem) for p in paths.claims.glob("[0-9]*.json")), default=0)
        claim = json.dumps({"owner": owner, "at": datetime.now(UTC).isoformat()}).encode()
        while not publish(paths.claims / f"{epoch:06d}.json", claim):
            epoch += 1
    except BaseException:  # a full disk, say: the lock must not stay with a claim that failed
        os.close(fd)
        raise
    return epoch, fd


def _lock_soon(fd: int) -> bool:
    """Take the lock, with a little patience: a reader in `has_writer` holds it for an instant."""
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(_LOCK_PAUSE_S * (attempt + 1 < _LOCK_ATTEMPTS))
    return False


def has_writer(paths: StreamPaths) -> bool:
    """Whether a live process holds the stream for writing.

    An object store has no locks: there a stream counts as being written until its end has come.
    """
    if not is_local(paths.claims):
        return True
    try:
        fd = os.open(paths.claims / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def last_claim(paths: StreamPaths) -> str | None:
    """Who claimed the stream last."""
    claims = sorted(paths.claims.glob("[0-9]*.json"))
    return json.loads(claims[-1].read_bytes())["owner"] if claims else None


def latest_epoch(paths: StreamPaths) -> int:
    """The newest claim's epoch; a writer with an older one is stale."""
    return max((int(p.stem) for p in paths.claims.glob("[0-9]*.json")), default=0)


def find_runs(root: Path, left_out: Callable[[str], None] | None = None) -> Iterator[RunFolder]:
    """Every run below a data folder, by experiment and run number.

    A run that cannot be read, or lies in another run's folder, is named in the log, or told to
    ``left_out``.
    """
    name_it = left_out or (lambda why: log.error("left out: %s", why))
    found = [p.parent for p in root.glob("*/*/run.json") if re.fullmatch(r"\d+", p.parent.name)]
    for path in sorted(found, key=lambda p: (p.parent.name, int(p.name))):
        try:
            folder = RunFolder.open(path)
        except (RunNotFound, OSError) as error:
            name_it(str(error))
            continue
        name = run_key(folder.header.experiment, folder.header.run)
        if name == run_key(path.parent.name, int(path.name)):
            yield folder
        else:
            name_it(f"{path} holds the run {name}; move it to {root / name}, or away")


def parse_file(model: type[R], path: Path) -> R:
    """What a file says.

    Raises
    ------
    DamagedFile : it does not say what it should; FileNotFoundError passes.
    """
    return _parsed(model, path, path.read_bytes())


def _parsed(model: type[R], path: Path, content: bytes) -> R:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise DamagedFile(
            f"{path} is damaged, or of a version this one cannot read: {error.errors()[0]['msg']}; "
            "restore it from a copy"
        ) from error
