"""Runs being taken: series become runs, frames go through the buffer into their stream's store.

One writer thread takes everything that changes a stream in the order it was queued, so a
stream's end comes after its last frame. Connectors and producers call `submit`, which waits
while the buffer is full. A sync thread makes stored frames durable at most 100 ms later.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from storage.catalog import Catalog
from storage.codec import check_blob
from storage.errors import BadFrame, BadName, IndexConflict, NearlineError, StorageFull
from storage.frame import FrameInfo, RawFrame, blob_crc32c, blob_digest
from storage.models import RunHeader, RunState, StreamHeader
from storage.names import check_name, run_key
from storage.run_folder import ChunkCommit, RunFolder, find_runs
from storage.states import FrameState, StreamLedger
from storage.stream_store import Admission, StreamStore
from streaming.buffer import FrameBuffer

__all__ = ["LiveStream", "Outcomes", "Recorder", "StreamKey"]

log = logging.getLogger("nearline.recorder")

StreamKey = tuple[str, int, str]
Outcomes = Callable[[list[str]], None]
_SYNC_INTERVAL_S = 0.1
_RETRY_FULL_DISK_S = 0.5
_TICK_S = 0.25
# A source that never said how many frames come may not leave out more than this at once: every
# frame left out is accounted for, so a nonsensical index would cost memory and files.
_LONGEST_JUMP = 100_000
_DERIVED_IDLE_S = 3600.0
# Finished streams that stay open for readers; older ones are read from their folder again.
_KEEP_FINISHED = 16


@dataclass(slots=True, eq=False)
class LiveStream:
    """A stream that this service writes, or has finished writing a short while ago."""

    store: StreamStore
    folder: RunFolder
    cause_of_gaps: str = "not received"
    last_activity: float = field(default_factory=time.monotonic)
    gap_since: float | None = None
    n_whole_chunks: int = 0
    unfinished: tuple[int, str | None] | None = None

    @property
    def header(self) -> StreamHeader:
        return self.store.header

    @property
    def key(self) -> StreamKey:
        return (self.header.experiment, self.header.run, self.header.data_source)

    def ledger(self) -> StreamLedger:
        return self.store.ledger()


class Recorder:
    """Owns every stream that is being written.

    Parameters
    ----------
    root : data folder.
    budget_bytes : memory for frames, queued ones included.
    gap_timeout_s : how long an index may be awaited after a later one has come.
    idle_timeout_s : a stream without a message for so long is ended as aborted.
    on_change : called with a stream's key when there is something new for its readers.
    """

    def __init__(
        self,
        root: Path,
        catalog: Catalog,
        *,
        budget_bytes: int,
        gap_timeout_s: float = 2.0,
        idle_timeout_s: float = 60.0,
        on_change: Callable[[StreamKey], None] = lambda key: None,
    ) -> None:
        self.root, self.catalog = root, catalog
        self.buffer = FrameBuffer(budget_bytes)
        self.n_rejected_messages = 0
        self._gap_timeout_s, self._idle_timeout_s = gap_timeout_s, idle_timeout_s
        self._on_change = on_change
        self._streams: dict[StreamKey, LiveStream] = {}
        self._lock = threading.RLock()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self.is_disk_full = False
        self._threads = [
            threading.Thread(target=self._write_loop, name="writer", daemon=True),
            threading.Thread(target=self._sync_loop, name="sync", daemon=True),
        ]

    # ---- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Take over what a crash left behind, then begin to write."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in find_runs(self.root):
            if not folder.state.is_terminal:
                self._recover_run(folder)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Write out what is queued, seal every chunk, end live runs as aborted, stop."""
        self._submit_command(self._abort_all)
        self._stopping.set()
        self._queue.put(None)
        for thread in self._threads:
            thread.join()
        for stream in self._streams.values():
            stream.store.close()

    # ---- runs and streams ---------------------------------------------------------------------

    def start_run(
        self,
        experiment: str,
        run: int | None = None,
        *,
        sample: str | None = None,
        user_data: dict[str, Any] | None = None,
    ) -> RunFolder:
        """A new run; without a number, the next free one of the experiment."""
        check_name(experiment, "experiment")
        with self._lock:
            number = self._next_run(experiment) if run is None else run
            header = RunHeader(
                experiment=experiment,
                run=number,
                started_at=datetime.now(UTC),
                sample=sample,
                user_data=user_data or {},
            )
            try:
                folder = RunFolder.create(self.root, header)
            except FileExistsError as error:
                raise BadName(f"{error}; choose another run number, or leave it out to get the next one") from error
            self.catalog.record(folder)
        log.info("run %s started", run_key(experiment, number))
        return folder

    def start_stream(
        self,
        folder: RunFolder,
        header: StreamHeader,
        *,
        pixel_mask: np.ndarray | None = None,
        flatfield: np.ndarray | None = None,
    ) -> LiveStream:
        """A new stream in a run, ready for frames."""
        with self._lock:
            store = StreamStore.create(folder, header, pixel_mask=pixel_mask, flatfield=flatfield)
            stream = LiveStream(store, folder)
            self._streams[stream.key] = stream
            self.catalog.record(folder)
        self._on_change(stream.key)
        return stream

    def find(self, key: StreamKey) -> LiveStream | None:
        """The stream if this service has it open."""
        return self._streams.get(key)

    def find_series(self, series_unique_id: str | None, series_id: int) -> list[LiveStream]:
        """Unfinished streams of a detector series; by the unique id where the detector sends one."""
        found = []
        for stream in list(self._streams.values()):
            series = stream.header.series
            if series is None or stream.store.is_finished or stream.header.parent is not None:
                continue
            same = series.series_unique_id == series_unique_id if series_unique_id else series.series_id == series_id
            if same:
                found.append(stream)
        return found

    def streams(self) -> list[LiveStream]:
        """All streams this service has open."""
        return list(self._streams.values())

    # ---- frames -------------------------------------------------------------------------------

    def submit(
        self,
        stream: LiveStream,
        frames: list[tuple[FrameInfo, Any]],
        *,
        timeout: float = 0.5,
        done: Outcomes | None = None,
    ) -> bool:
        """Queue frames of one stream; False when the buffer stayed full for ``timeout`` s (try again).

        ``done`` is called from the writer thread with what became of each frame: ``stored``,
        ``duplicate``, ``late`` or ``conflict``.

        Raises
        ------
        BadFrame : some bytes cannot be a frame of this stream; none of the frames is taken.
        """
        for info, blob in frames:
            self._check(stream, info, blob)
        if not self.buffer.reserve(sum(info.size_bytes for info, _ in frames), timeout):
            return False
        for info, blob in frames:
            info.crc32c, info.digest, info.received_ns = blob_crc32c(blob), blob_digest(blob), time.time_ns()
        raw = [RawFrame(info, blob) for info, blob in frames]
        stream.last_activity = time.monotonic()
        self._queue.put(lambda: self._write(stream, raw, done))
        return True

    def _check(self, stream: LiveStream, info: FrameInfo, blob: Any) -> None:
        """Refuse what cannot be a frame of this stream; sets the row's size."""
        header = stream.header
        info.size_bytes = memoryview(blob).nbytes
        limit = max(header.planned, stream.store.states.announced) + (0 if header.planned else _LONGEST_JUMP)
        if not 0 <= info.frame_index < limit:
            raise BadFrame(
                f"frame_index {info.frame_index} of {header.data_source} is outside 0 to {limit - 1}; "
                "check the source's numbering and its planned number of frames"
            )
        if header.kind == "frames":
            check_blob(blob, header.codec, header.shape, header.dtype)
        elif info.size_bytes:
            raise BadFrame(f"{header.data_source} is a table; its rows carry no payload")

    def reject(self, stream: LiveStream, frame_index: int, cause: str) -> None:
        """Account for a frame that came but cannot be used."""

        def command() -> None:
            stream.store.account(frame_index, frame_index + 1, FrameState.rejected, cause)
            self._advance(stream)

        self._submit_command(command)

    def finish_stream(
        self,
        stream: LiveStream,
        announced: int = 0,
        *,
        aborted: str | None = None,
        done: Callable[[], None] | None = None,
    ) -> None:
        """End a stream after everything queued before; ``aborted`` says why when it was not a regular end."""

        def command() -> None:
            self._finish(stream, announced, aborted)
            if done:
                done()

        self._submit_command(command)

    # ---- the writer thread --------------------------------------------------------------------

    def _submit_command(self, command: Callable[[], None]) -> None:
        self._queue.put(command)

    def _write_loop(self) -> None:
        last_tick = time.monotonic()
        while True:
            try:
                command = self._queue.get(timeout=_TICK_S)
            except queue.Empty:
                command = self._tick
            if command is None:
                return
            try:
                command()
                if time.monotonic() - last_tick > _TICK_S:
                    last_tick = time.monotonic()
                    self._tick()
            except Exception:
                log.exception("the writer could not carry out a command; it goes on with the next")

    def _write(self, stream: LiveStream, frames: list[RawFrame], done: Outcomes | None) -> None:
        """Admit and journal frames; their room in the buffer is kept or given back."""
        outcomes = []
        for frame in frames:
            outcome = "conflict"
            try:
                outcome = self._admit_and_append(stream, frame)
            except IndexConflict as error:
                log.error("%s", error)
            finally:
                if outcome != "stored":
                    self.buffer.release(frame.nbytes)
            outcomes.append(outcome)
        stream.last_activity = time.monotonic()
        if done:
            done(outcomes)
        self._advance(stream)

    def _admit_and_append(self, stream: LiveStream, frame: RawFrame) -> str:
        admission = stream.store.admit(frame.info)
        if admission is not Admission.new:
            return admission.value
        while True:
            try:
                stream.store.append(frame.info, frame.blob)
                break
            except StorageFull as error:
                if not self.is_disk_full:
                    log.error("%s", error)
                self.is_disk_full = True
                if self._stopping.wait(_RETRY_FULL_DISK_S):
                    raise
        self.is_disk_full = False
        self.buffer.keep_stored(stream.key, frame)
        return "stored"

    def _advance(self, stream: LiveStream) -> None:
        """Seal what is complete and tell the readers."""
        store = stream.store
        is_new_chunk = store.states.announced // store.header.frames_per_chunk > stream.n_whole_chunks
        if is_new_chunk or stream.gap_since is not None:
            stream.n_whole_chunks = store.states.announced // store.header.frames_per_chunk
            self._sealed(stream, store.seal_complete())
        has_gap = store.states.watermark < store.states.announced
        stream.gap_since = (stream.gap_since or time.monotonic()) if has_gap else None
        self._on_change(stream.key)

    def _sealed(self, stream: LiveStream, commits: list[ChunkCommit]) -> None:
        if commits:
            log.debug("%s sealed chunks %s", stream.key, [c.chunk for c in commits])
            self.catalog.record(stream.folder, {stream.header.data_source: stream.store.states.announced})

    def _tick(self) -> None:
        """Declare overdue gaps missing; end streams that have gone quiet."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            if stream.store.is_finished:
                continue
            if stream.gap_since is not None and now - stream.gap_since > self._gap_timeout_s:
                stream.store.account(0, stream.store.states.announced, FrameState.missing, stream.cause_of_gaps)
                self._sealed(stream, stream.store.seal_complete())
                stream.gap_since = None
                self._on_change(stream.key)
            if stream.unfinished is not None:
                self._finish(stream, *stream.unfinished)
            elif now - stream.last_activity > self._patience(stream):
                self._finish(stream, 0, f"no message for {self._patience(stream):g} s")

    def _patience(self, stream: LiveStream) -> float:
        """Analysis may pause for longer than a detector."""
        return self._idle_timeout_s if stream.header.parent is None else _DERIVED_IDLE_S

    def _finish(self, stream: LiveStream, announced: int, aborted: str | None) -> None:
        if stream.store.is_finished:
            return
        try:
            commits = stream.store.finish(announced, stream.cause_of_gaps)
        except OSError as error:
            # A full disk, mostly. The journals hold everything stored; try again until there is room.
            if stream.unfinished is None:
                log.error("%s could not be sealed, will try again: %s", stream.key, error)
            stream.unfinished = (announced, aborted)
            return
        stream.unfinished = None
        self._sealed(stream, commits)
        stream.store.close()
        if stream.header.parent is None:
            self._finish_run_if_done(stream, aborted)
        self.catalog.record(stream.folder)
        self._on_change(stream.key)
        self._forget_old()

    def _finish_run_if_done(self, stream: LiveStream, aborted: str | None) -> None:
        folder = stream.folder
        mine = [s for s in self._streams.values() if s.folder.path == folder.path and s.header.parent is None]
        if folder.state.is_terminal or not all(s.store.is_finished for s in mine):
            return
        ledgers = [s.ledger() for s in mine]
        state = _final_state(ledgers, aborted)
        payload = {"state": state.value, "cause": aborted, "ledgers": [_summary(x) for x in ledgers]}
        folder.add_event("run_finished", payload)
        for problem in (p for ledger in ledgers for p in ledger.problems):
            log.error("ledger of %s does not balance: %s", folder.path, problem)
        log.info("run %s %s", run_key(folder.header.experiment, folder.header.run), state.value)

    def _forget_old(self) -> None:
        finished = [s for s in self._streams.values() if s.store.is_finished]
        for stream in finished[:-_KEEP_FINISHED]:
            del self._streams[stream.key]

    def _abort_all(self) -> None:
        for stream in list(self._streams.values()):
            self._finish(stream, 0, "service stopped")

    def _sync_loop(self) -> None:
        while not self._stopping.wait(_SYNC_INTERVAL_S):
            for stream in list(self._streams.values()):
                try:
                    stream.store.sync()
                except OSError:
                    log.exception("could not sync %s", stream.key)

    # ---- recovery -----------------------------------------------------------------------------

    def _recover_run(self, folder: RunFolder) -> None:
        streams = []
        for name in folder.data_sources():
            try:
                stream = LiveStream(StreamStore.recover(folder, name), folder, "lost while the service was down")
            except NearlineError:
                log.exception("could not take over %s in %s", name, folder.path)
                continue
            self._streams[stream.key] = stream
            streams.append(stream)
            log.info("took over %s with %d frames stored", stream.key, stream.store.ledger().stored)
        primary = [s for s in streams if s.header.parent is None]
        if primary and all(s.store.is_finished for s in primary):
            self._finish_run_if_done(primary[0], None)
        elif not primary:
            folder.add_event("run_finished", {"state": RunState.aborted.value, "cause": "no stream was started"})
        self.catalog.record(folder)

    def _next_run(self, experiment: str) -> int:
        taken = [int(p.name) for p in (self.root / experiment).glob("[0-9]*") if p.name.isdecimal()]
        return max(taken, default=0) + 1


def _final_state(ledgers: list[StreamLedger], aborted: str | None) -> RunState:
    """Completed only if every planned frame is stored; aborted if the source never said the end."""
    if aborted:
        return RunState.aborted
    complete = all(x.stored == max(x.announced, x.planned) for x in ledgers)
    return RunState.completed if complete else RunState.incomplete


def _summary(ledger: StreamLedger) -> dict[str, Any]:
    return ledger.model_dump(exclude={"ranges"})
