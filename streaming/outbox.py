"""The outbox: facts about runs, on their way to whoever wants to hear of them.

The service must never wait for a Prefect server. It appends facts (a run has started, a chunk is sealed,
a run has finished, a ledger does not balance) to small files in the data folder; a process of its own
carries them on, with `OutboxReader`. A run's own folder holds the truth: the outbox is made from its
events, each fact's id from the event it tells of. So a fact that a crash or a full disk kept out of
the outbox is told when the service is back, and one that is told again is known by its id.
"""

import itertools
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from storage.errors import NearlineError
from storage.files import sync_folder
from storage.models import Record
from storage.names import run_key
from storage.run_folder import ChunkCommit, Event, RunFolder, find_runs
from storage.states import StreamLedger
from streaming.live_stream import LiveStream, StreamKey

__all__ = [
    "CHUNK_SEALED",
    "LEDGER_IMBALANCE",
    "RUN_FINISHED",
    "RUN_STARTED",
    "Fact",
    "Outbox",
    "OutboxReader",
    "outbox_folder",
]

log = logging.getLogger("nearline.outbox")

RUN_STARTED = "run.started"
RUN_FINISHED = "run.finished"
CHUNK_SEALED = "chunk.sealed"
LEDGER_IMBALANCE = "ledger.imbalance"

# A fact is about 400 bytes: some 40,000 of them, a week of a busy beamline that nobody listens to.
_MOST_BYTES = 16 << 20
_SEGMENT_BYTES = 1 << 20
_CHUNK_INTERVAL_S = 1.0
_RETRY_S = 1.0
_STOP_TIMEOUT_S = 5.0
_SUFFIX = ".jsonl"
# Ours: the same event of the same run has the same id wherever and whenever it is told.
_NAMESPACE = uuid.UUID("0b7c7f0e-6a54-4d0a-9a6d-3f6a2f0f4a11")


class Fact(Record):
    """Something that has happened to a run; told once, perhaps repeated, then with the same id."""

    number: int = Field(description="place in the outbox, from 1, rising without gaps")
    id: str = Field(description="UUID of what happened: equal facts have equal ids")
    at: datetime = Field(description="when it happened")
    kind: str = Field(description="run.started, chunk.sealed, run.finished or ledger.imbalance")
    experiment: str
    run: int
    payload: dict[str, Any] = Field(default_factory=dict)


class _SegmentHeader(Record):
    """First line of a segment."""

    first: int = Field(description="number of the segment's first fact")
    told_to: datetime = Field(description="facts of runs up to this time are told, in segments before this one")


def outbox_folder(root: Path) -> Path:
    """Where the outbox of a data folder is. No experiment can have this name."""
    return root / ".service" / "outbox"


class Outbox:
    """The writing side, in a thread of its own: telling it something takes microseconds and never fails.

    Nothing is queued but the names of runs with something new, and each stream's newest chunk; so a disk
    that refuses the outbox costs no memory, and what is in the run folders is told when it is back.

    Parameters
    ----------
    root : data folder.
    service : gives the address at which clients reach the service; asked once for every fact.
    most_bytes, segment_bytes : the oldest segment is removed when there is more; told or not.
    """

    def __init__(
        self,
        root: Path,
        service: Callable[[], str | None] = lambda: None,
        *,
        most_bytes: int = _MOST_BYTES,
        segment_bytes: int = _SEGMENT_BYTES,
        chunk_interval_s: float = _CHUNK_INTERVAL_S,
    ) -> None:
        self._root, self._service = root.absolute(), service
        self._segments = _Segments(outbox_folder(self._root), most_bytes, segment_bytes)
        self._interval_s = chunk_interval_s
        self._changed = threading.Condition()
        self._runs: dict[Path, RunFolder] = {}
        self._chunks: dict[StreamKey, tuple[RunFolder, ChunkCommit]] = {}
        self._told_at: dict[StreamKey, float] = {}
        self._is_stopping = False
        self._error: str | None = None
        self._is_open = False
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)

    def start(self) -> None:
        """Tell what has not been told of the runs that are there, then what comes."""
        self._thread.start()

    def run_changed(self, folder: RunFolder) -> None:
        """A run may have an event that has not been told."""
        with self._changed:
            self._runs[folder.path] = folder
            self._changed.notify()

    def chunk_sealed(self, stream: LiveStream, commit: ChunkCommit) -> None:
        """A chunk is sealed; of several within a second only the newest is told. Derived streams are not told of."""
        if stream.is_derived:
            return
        with self._changed:
            is_first = stream.key not in self._chunks
            self._chunks[stream.key] = (stream.folder, commit)
            if is_first:
                self._changed.notify()

    def stop(self, timeout: float = _STOP_TIMEOUT_S) -> None:
        """Tell what is waiting and stop; what the disk does not take in ``timeout`` s is told next time."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def status(self) -> dict[str, Any]:
        """``told`` facts in all, and the ``error`` of the last attempt to write, None if it succeeded."""
        return {"told": self._segments.last, "error": self._error}

    # ---- the outbox thread ---------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            try:
                if not self._is_open:
                    self._segments.open()
                    for folder in find_runs(self._root, lambda why: None):
                        self._tell_run(folder)
                    self._is_open = True
                if self._tell_waiting():
                    return
                self._error = None
            except Exception as error:
                # Whatever it is, frames go on, and the run folders keep what is to be told.
                if str(error) != self._error:
                    log.error("the outbox does not take facts at the moment, frames go on: %s", error)
                self._error = str(error)
                if self._is_stopping:
                    return
                time.sleep(_RETRY_S)

    def _tell_waiting(self) -> bool:
        """Wait for something to tell, and tell it; True when all is told and nothing more will come."""
        with self._changed:
            while not self._has_due():
                self._changed.wait(self._interval_s / 4 if self._chunks else None)
            runs, due = list(self._runs.items()), [key for key in self._chunks if self._is_due(key)]
            is_last = self._is_stopping
        for key in due:
            self._tell_chunk(key)
        for path, folder in runs:
            with self._changed:
                self._runs.pop(path, None)  # first: what happens while we look is looked at again
            try:
                self._tell_run(folder)
            except OSError:
                with self._changed:
                    self._runs.setdefault(path, folder)
                raise
        return is_last and not self._runs and not self._chunks

    def _has_due(self) -> bool:
        return self._is_stopping or bool(self._runs) or any(map(self._is_due, self._chunks))

    def _is_due(self, key: StreamKey) -> bool:
        last = self._told_at.get(key)
        return self._is_stopping or last is None or time.monotonic() - last >= self._interval_s

    def _tell_chunk(self, key: StreamKey) -> None:
        with self._changed:
            folder, commit = self._chunks[key]
        _, _, data_source = key
        facts = {"data_source": data_source, **commit.model_dump(mode="json", exclude={"ranges", "epoch"})}
        identity = f"{data_source}/{commit.chunk}/{commit.digest}"
        self._add(folder, CHUNK_SEALED, commit.sealed_at, identity, facts)
        self._told_at[key] = time.monotonic()
        with self._changed:
            if self._chunks[key][1] is commit:
                del self._chunks[key]

    def _tell_run(self, folder: RunFolder) -> None:
        """Tell those events of a run that have not been told, its last chunks before its end."""
        try:
            events = [e for kind in ("run_started", "run_finished") for e in folder.events(kind)]
        except NearlineError as error:  # damaged from outside; others wait
            log.warning("no facts of %s are told: %s", folder.path, error)
            return
        for event in events:
            if event.kind == "run_finished":
                for key in [k for k, (waiting, _) in list(self._chunks.items()) if waiting.path == folder.path]:
                    self._tell_chunk(key)
                for key in [k for k in self._told_at if k[:2] == (folder.header.experiment, folder.header.run)]:
                    del self._told_at[key]
            self._tell_event(folder, event)

    def _tell_event(self, folder: RunFolder, event: Event) -> None:
        identity = f"{event.number}/{event.at.isoformat()}"
        if event.kind == "run_started":
            self._add(folder, RUN_STARTED, event.at, identity, {})
            return
        self._add(folder, RUN_FINISHED, event.at, identity, event.payload)
        ledgers = [StreamLedger.model_validate(x) for x in event.payload.get("ledgers", [])]
        problems = [problem for ledger in ledgers for problem in ledger.problems]
        if problems:
            self._add(folder, LEDGER_IMBALANCE, event.at, identity, {"problems": problems})

    def _add(self, folder: RunFolder, kind: str, at: datetime, identity: str, payload: dict[str, Any]) -> None:
        header = folder.header
        name = run_key(header.experiment, header.run)
        number = str(uuid.uuid5(_NAMESPACE, f"{name}/{kind}/{identity}"))
        if self._segments.is_told(number, at):
            return
        about = {"name": name, "sample": header.sample, "root": str(self._root), "service": self._service()}
        content = about | payload
        self._segments.append(
            Fact(
                number=self._segments.last + 1,
                id=number,
                at=at,
                kind=kind,
                experiment=header.experiment,
                run=header.run,
                payload=content,
            )
        )


class _Segments:
    """Facts in files of lines; only the last one grows. One process writes them: the service holds the data folder."""

    def __init__(self, folder: Path, most_bytes: int, segment_bytes: int) -> None:
        self._folder, self._most_bytes, self._segment_bytes = folder, most_bytes, segment_bytes
        self._ids: dict[str, set[str]] = {}  # by segment
        self._told_to = datetime.now(UTC)
        self._path: Path | None = None
        self._end = 0
        self._latest = self._told_to
        self.last = 0

    def open(self) -> None:
        """Take up what is there; a line that a crash cut short is removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ids, self.last, self._path = {}, 0, None
        paths = _segment_paths(self._folder)
        for path in paths:
            header, facts, end = _read_segment(path)
            if header is None:
                path.unlink()  # begun when the power failed
                continue
            if not self._ids:
                self._told_to = header.told_to
            self._ids[path.name] = {fact.id for fact in facts}
            self._path, self._end = path, end
            self.last = facts[-1].number if facts else header.first - 1
            self._latest = max([header.told_to, *(fact.at for fact in facts)])
        if self._path is not None:
            os.truncate(self._path, self._end)
        else:
            # Runs of before there was an outbox are nobody's news.
            self._latest = self._told_to
            self._begin()

    def is_told(self, fact_id: str, at: datetime) -> bool:
        """Whether it is in a segment, or so old that it was in one that has been removed."""
        return at <= self._told_to or any(fact_id in ids for ids in self._ids.values())

    def append(self, fact: Fact) -> None:
        """Add a fact, durably; OSError if the disk refuses it, and then nothing has changed."""
        if self._end >= self._segment_bytes:
            self._begin()
        assert self._path is not None
        self._write(self._path, fact.model_dump_json().encode() + b"\n")
        self.last, self._latest = fact.number, max(self._latest, fact.at)
        self._ids[self._path.name].add(fact.id)

    def _write(self, path: Path, line: bytes) -> None:
        with open(path, "r+b", buffering=0) as file:
            file.seek(self._end)
            try:
                if file.write(line) != len(line):
                    raise OSError(f"no room for a fact in {path}")
                os.fdatasync(file.fileno())
            except OSError:
                file.truncate(self._end)
                raise
        self._end += len(line)

    def _begin(self) -> None:
        """A new segment; the oldest ones make room for it."""
        path = self._folder / f"{self.last + 1:012d}{_SUFFIX}"
        header = _SegmentHeader(first=self.last + 1, told_to=self._latest)
        content = header.model_dump_json().encode() + b"\n"
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fdatasync(file.fileno())
        sync_folder(self._folder)
        self._path, self._end = path, len(content)
        self._ids[path.name] = set()
        self._make_room()

    def _make_room(self) -> None:
        paths = _segment_paths(self._folder)
        sizes = {path: path.stat().st_size for path in paths}
        for path, following in itertools.pairwise(paths):
            if sum(sizes.values()) + self._segment_bytes <= self._most_bytes:
                return
            header, _, _ = _read_segment(following)
            path.unlink()
            self._ids.pop(path.name, None)
            del sizes[path]
            self._told_to = header.told_to if header else self._told_to


class OutboxReader:
    """The reading side, for another process: facts in order, from any number on."""

    def __init__(self, root: Path) -> None:
        self._folder = outbox_folder(root)
        self._looked_at: tuple[Path, int] | None = None

    def has_news(self) -> bool:
        """Whether something has been appended since this was asked last; cheap enough to ask often."""
        paths = _segment_paths(self._folder)
        now = (paths[-1], paths[-1].stat().st_size) if paths else None
        is_new = now != self._looked_at
        self._looked_at = now
        return is_new

    def facts(self, after: int = 0) -> Iterator[Fact]:
        """Facts with a number above ``after`` that are whole on disk; a line still being written is left for later."""
        paths = _segment_paths(self._folder)
        for path, following in zip(paths, [*paths, None][1:], strict=True):
            if following is not None and int(following.stem) <= after + 1:
                continue
            try:
                _, facts, _ = _read_segment(path)
            except FileNotFoundError:  # it had to make room
                continue
            yield from (fact for fact in facts if fact.number > after)


def _segment_paths(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"*{_SUFFIX}") if p.stem.isdecimal())


def _read_segment(path: Path) -> tuple[_SegmentHeader | None, list[Fact], int]:
    """Header, facts and the place behind the last whole line; reading ends at a line that is none."""
    header, facts, end = None, [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            if header is None:
                header = _SegmentHeader.model_validate(json.loads(line))
            else:
                facts.append(Fact.model_validate(json.loads(line)))
        except (ValidationError, ValueError):
            break
        end += len(line)
    return header, facts, end
