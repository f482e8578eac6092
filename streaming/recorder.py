"""Runs being taken: series become runs, frames go through the buffer into their stream's store.

One writer thread takes everything that changes a stream in the order it was queued, so a
stream's end comes after its last frame. Connectors and producers call `submit`, which waits
while the buffer is full. A sync thread makes stored frames durable at most 100 ms later.
"""

import errno
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
from sqlalchemy.exc import SQLAlchemyError

from storage.catalog import Catalog
from storage.codec import check_blob
from storage.errors import BadFrame, BadName, FrameTooLate, IndexConflict, NearlineError, StreamOwned
from storage.frame import FrameInfo, RawFrame, blob_crc32c, blob_digest, meta_bytes
from storage.models import RunHeader, RunState, StreamHeader
from storage.names import check_name, check_run, run_key
from storage.run_folder import ChunkCommit, RunFolder, find_runs
from storage.states import FrameState, StreamLedger
from storage.stream_store import Admission, StreamStore
from streaming.buffer import FrameBuffer

__all__ = ["LiveStream", "Outcomes", "Recorder", "StreamKey"]

log = logging.getLogger("nearline.recorder")

StreamKey = tuple[str, int, str]
Outcomes = Callable[[list[str]], None]
Ended = Callable[[NearlineError | None], None]
_SYNC_INTERVAL_S = 0.1
_RETRY_FULL_DISK_S = 0.5
_TICK_S = 0.25
# How many frames a source may leave out at once: each is accounted for, so a nonsensical index
# would cost memory and, for every chunk in between, a file (2 ms). A source that said how many
# frames come may have been unheard for longer than one that did not.
_LONGEST_JUMP = 100_000
_LONGEST_PLANNED_JUMP = 1_000_000
_LONGEST_JUMP_CHUNKS = 5_000
# Chunks sealed at one go; the rest waits for the next tick, so that other streams are written meanwhile.
_SEAL_AT_ONCE = 8
# What a frame takes in memory beside its bytes and metadata: row, digests, dictionary entries.
_ROW_BYTES = 1024
# The disk refuses for now; what was queued waits. Anything else concerns one file and is not waited for.
_WAIT_AND_RETRY = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE}
_DERIVED_IDLE_S = 3600.0
_NOT_RECEIVED = "not received"
_LOST_WHILE_DOWN = "lost while the service was down"
# Finished streams that stay open for readers; older ones are read from their folder again.
_KEEP_FINISHED = 16


@dataclass(slots=True, eq=False)
class LiveStream:
    """A stream that this service writes, or has finished writing a short while ago."""

    store: StreamStore
    folder: RunFolder
    last_activity: float = field(default_factory=time.monotonic)
    # Some index below ``gap_stop`` has been awaited since then.
    gap_since: float | None = None
    gap_stop: int = 0
    # Frames below this one that never came were lost while no service ran; None: not known yet.
    lost_until: int | None = 0
    n_whole_chunks: int = 0
    unfinished: tuple[int, str | None] | None = None
    # Told when the stream has ended, or why it never will.
    on_end: list[Ended] = field(default_factory=list)
    # Frames up to here have been taken, though some may still be queued.
    submitted: int = 0
    is_draining: bool = False
    # The stream has ended and so, with its last stream, has the run: readers see both at once.
    is_ended: bool = False

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
            number = self._next_run(experiment) if run is None else check_run(run)
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
            self._record_in_catalog(folder)
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
            self._record_in_catalog(folder)
        self._on_change(stream.key)
        return stream

    def take_up_stream(self, folder: RunFolder, header: StreamHeader) -> bool:
        """Open an unfinished derived stream again, whose run had ended before this service was started."""
        name = header.data_source
        with self._lock:
            is_ours = header.parent is not None and name in folder.data_sources() and not folder.finished(name)
            if not is_ours or folder.stream_header(name) != header:
                return False
            stream = LiveStream(StreamStore.recover(folder, name), folder)
            self._streams[stream.key] = stream
            self._take_up(stream)
        self._on_change(stream.key)
        return True

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

    def state_of(self, folder: RunFolder) -> RunState:
        """A run's state; draining once its last frames are taken and not all of them sealed."""
        state = folder.state
        mine = [s for s in list(self._streams.values()) if s.folder.path == folder.path and s.header.parent is None]
        is_draining = not state.is_terminal and mine and all(s.is_draining for s in mine)
        return RunState.draining if is_draining else state

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
        ``duplicate``, ``late``, ``conflict`` or ``failed`` (the disk refused it for good).

        Raises
        ------
        BadFrame : some bytes cannot be a frame of this stream; none of the frames is taken.
        """
        raw = [RawFrame(info, blob, self._check(stream, info, blob)) for info, blob in frames]
        if not self.buffer.reserve(sum(frame.cost_bytes for frame in raw), timeout):
            return False
        for info, blob in frames:
            info.crc32c, info.digest, info.received_ns = blob_crc32c(blob), blob_digest(blob), time.time_ns()
        stream.last_activity = time.monotonic()
        stream.submitted = max([stream.submitted, *(info.frame_index + 1 for info, _ in frames)])
        self._queue.put(lambda: self._write(stream, raw, done))
        return True

    def _check(self, stream: LiveStream, info: FrameInfo, blob: Any) -> int:
        """Refuse what cannot be a frame of this stream; sets the row's size and gives what it takes in memory."""
        header = stream.header
        info.size_bytes = memoryview(blob).nbytes
        limit = self.index_limit(stream)
        if not 0 <= info.frame_index < limit:
            raise BadFrame(
                f"frame_index {info.frame_index} of {header.data_source} is outside 0 to {limit - 1}; "
                "check the source's numbering and its planned number of frames"
            )
        if header.kind == "frames":
            check_blob(blob, header.codec, header.shape, header.dtype)
        elif info.size_bytes:
            raise BadFrame(f"{header.data_source} is a table; its rows carry no payload")
        return info.size_bytes + _ROW_BYTES + meta_bytes(info.meta)

    @staticmethod
    def index_limit(stream: LiveStream) -> int:
        """Frame indices below this are believed."""
        header, announced = stream.header, max(stream.store.states.announced, stream.submitted)
        jump = _LONGEST_PLANNED_JUMP if header.planned else _LONGEST_JUMP
        limit = announced + min(jump, _LONGEST_JUMP_CHUNKS * header.frames_per_chunk)
        return max(min(limit, header.planned), announced) if header.planned else limit

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
        done: Ended | None = None,
    ) -> None:
        """End a stream after everything queued before; ``aborted`` says why when it was not a regular end.

        ``done`` is called from the writer thread once it has ended, or with the error why it cannot.

        Raises
        ------
        BadFrame : ``announced`` is not a number of frames this stream can have.
        """
        if not 0 <= announced <= self.index_limit(stream):
            raise BadFrame(
                f"{stream.header.data_source} cannot end with {announced} frames: it has "
                f"{stream.store.states.announced} so far and {stream.header.planned or 'no number'} planned"
            )

        stream.is_draining = True

        def command() -> None:
            if done:
                stream.on_end.append(done)
            self._finish(stream, announced, aborted)

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
            outcome = self._outcome(stream, frame)
            if outcome != "stored":
                self.buffer.release(frame.cost_bytes)
            outcomes.append(outcome)
        stream.last_activity = time.monotonic()
        if stream.lost_until is None and frames:
            stream.lost_until = frames[0].info.frame_index
        if done:
            done(outcomes)
        self._advance(stream)

    def _outcome(self, stream: LiveStream, frame: RawFrame) -> str:
        """What became of a frame; whatever goes wrong with one, its room comes back and its sender hears of it."""
        try:
            return self._admit_and_append(stream, frame)
        except IndexConflict as error:
            log.error("%s", error)
            return "conflict"
        except Exception as error:
            index = frame.info.frame_index
            log.exception("frame %d of %s could not be stored", index, stream.key)
            if not self._stopping.is_set() and not stream.store.is_finished:
                stream.store.account(index, index + 1, FrameState.rejected, f"could not be stored: {error}")
            return "failed"

    def _admit_and_append(self, stream: LiveStream, frame: RawFrame) -> str:
        admission = stream.store.admit(frame.info)
        if admission in (Admission.duplicate, Admission.retry):
            return Admission.duplicate.value
        store_it = stream.store.append if admission is Admission.new else stream.store.append_late
        while True:
            try:
                store_it(frame.info, frame.blob)
                break
            except FrameTooLate:
                return Admission.late.value
            except OSError as error:
                if error.errno not in _WAIT_AND_RETRY:
                    raise
                self._disk_refuses(error)
                if self._stopping.wait(_RETRY_FULL_DISK_S):
                    raise
        self.is_disk_full = False
        self.buffer.keep_stored(stream.key, frame)
        return "stored"

    def _disk_refuses(self, error: OSError) -> None:
        if not self.is_disk_full:
            log.error("the disk refuses to write, trying again until it does: %s", error)
        self.is_disk_full = True

    def _advance(self, stream: LiveStream) -> None:
        """Tell the readers, then seal what is complete: no reader waits for a disk to sync."""
        store = stream.store
        self._on_change(stream.key)
        is_new_chunk = store.states.announced // store.header.frames_per_chunk > stream.n_whole_chunks
        if (is_new_chunk or stream.gap_since is not None) and self._seal_complete(stream):
            self._on_change(stream.key)
        _watch_gap(stream)

    def _seal_complete(self, stream: LiveStream) -> bool:
        """Seal some of the chunks that are complete; what is left over comes with the next frame or tick."""
        store = stream.store
        try:
            commits = store.seal_complete(_SEAL_AT_ONCE)
        except StreamOwned as error:
            self._give_up(stream, error)
            return False
        except OSError as error:
            # The journal holds everything stored; the seal is tried again.
            self._disk_refuses(error)
            return False
        if len(commits) < _SEAL_AT_ONCE:
            stream.n_whole_chunks = store.states.announced // store.header.frames_per_chunk
        self._sealed(stream, commits)
        return bool(commits)

    def _give_up(self, stream: LiveStream, error: StreamOwned) -> None:
        """Another service owns the stream now: leave its files alone."""
        log.error("%s", error)
        stream.store.close()
        self._streams.pop(stream.key, None)
        self._on_change(stream.key)
        self._tell_end(stream, error)

    def _sealed(self, stream: LiveStream, commits: list[ChunkCommit]) -> None:
        if commits:
            self.is_disk_full = False
            log.debug("%s sealed chunks %s", stream.key, [c.chunk for c in commits])
            self._record_in_catalog(stream.folder, {stream.header.data_source: stream.store.states.announced})

    def _record_in_catalog(self, folder: RunFolder, announced: dict[str, int] | None = None) -> None:
        """Bring the index up to date; it can be rebuilt at any time, so its failure stops nothing."""
        try:
            self.catalog.record(folder, announced)
        except (SQLAlchemyError, OSError, ValueError) as error:
            log.error("the catalog is behind (`nearline catalog rebuild` restores it): %s", error)

    def _tick(self) -> None:
        """Declare overdue gaps missing; end streams that have gone quiet."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            if stream.is_ended:
                continue
            if stream.unfinished is not None:
                self._finish(stream, *stream.unfinished)
                continue
            if stream.gap_since is not None and now - stream.gap_since > self._gap_timeout_s:
                _declare_missing(stream, stream.gap_stop)
                stream.gap_since, stream.n_whole_chunks = None, 0
                _watch_gap(stream)
                self._on_change(stream.key)
            if stream.store.states.announced // stream.header.frames_per_chunk > stream.n_whole_chunks:
                self._seal_complete(stream)
                self._on_change(stream.key)
            if now - stream.last_activity > self._patience(stream):
                self._finish(stream, 0, f"no message for {self._patience(stream):g} s")

    def _patience(self, stream: LiveStream) -> float:
        """Analysis may pause for longer than a detector."""
        return self._idle_timeout_s if stream.header.parent is None else _DERIVED_IDLE_S

    def _finish(self, stream: LiveStream, announced: int, aborted: str | None) -> None:
        if stream.is_ended:
            self._tell_end(stream, None)
            return
        try:
            commits = []
            if not stream.store.is_finished:
                _declare_missing(stream, max(announced, stream.store.states.announced))
                commits = stream.store.finish(announced, _NOT_RECEIVED, aborted)
            if stream.header.parent is None:
                self._finish_run_if_done(stream)
        except StreamOwned as error:
            self._give_up(stream, error)
            return
        except OSError as error:
            # A full disk, mostly. The journals hold everything stored; try again until there is room.
            self._disk_refuses(error)
            stream.unfinished = (announced, aborted)
            return
        stream.unfinished, stream.is_ended, self.is_disk_full = None, True, False
        self._sealed(stream, commits)
        stream.store.close()
        self._record_in_catalog(stream.folder)
        self._on_change(stream.key)
        self._tell_end(stream, None)
        self._forget_old()

    @staticmethod
    def _tell_end(stream: LiveStream, error: NearlineError | None) -> None:
        for done in stream.on_end:
            done(error)
        stream.on_end.clear()

    def _finish_run_if_done(self, stream: LiveStream) -> None:
        folder = stream.folder
        mine = [s for s in self._streams.values() if s.folder.path == folder.path and s.header.parent is None]
        if folder.state.is_terminal or not all(s.store.is_finished for s in mine):
            return
        ledgers = [s.ledger() for s in mine]
        aborted = next((s.store.aborted for s in mine if s.store.aborted), None)
        state = _final_state(ledgers, aborted)
        payload = {"state": state.value, "cause": aborted, "ledgers": [_summary(x) for x in ledgers]}
        folder.add_event("run_finished", payload)
        for problem in (p for ledger in ledgers for p in ledger.problems):
            log.error("ledger of %s does not balance: %s", folder.path, problem)
        log.info("run %s %s", run_key(folder.header.experiment, folder.header.run), state.value)

    def _forget_old(self) -> None:
        # The end of a run is judged on all its streams: none is forgotten before.
        ended = [s for s in self._streams.values() if s.is_ended and s.folder.state.is_terminal]
        for stream in ended[:-_KEEP_FINISHED]:
            del self._streams[stream.key]

    def _abort_all(self) -> None:
        for stream in list(self._streams.values()):
            # Analysis goes on when a service is back; only what a detector sends is over.
            if stream.header.parent is None or stream.is_ended:
                self._finish(stream, 0, "service stopped")
            else:
                stream.store.sync()

    def _sync_loop(self) -> None:
        while not self._stopping.wait(_SYNC_INTERVAL_S):
            for stream in list(self._streams.values()):
                try:
                    stream.store.sync()
                except OSError as error:
                    self._disk_refuses(error)

    # ---- recovery -----------------------------------------------------------------------------

    def _recover_run(self, folder: RunFolder) -> None:
        streams, names = [], folder.data_sources()
        for name in names:
            try:
                stream = LiveStream(StreamStore.recover(folder, name), folder, lost_until=None)
            except StreamOwned as error:
                log.error("%s", error)
                continue
            except Exception:
                # One damaged run, or one that another service writes, must not keep this one from starting.
                log.exception("could not take over %s in %s; it is left as it is", name, folder.path)
                continue
            self._streams[stream.key] = stream
            streams.append(stream)
            self._take_up(stream)
            log.info("took over %s with %d frames stored", stream.key, stream.store.ledger().stored)
        primary = [s for s in streams if s.header.parent is None]
        if primary and all(s.store.is_finished for s in primary) and len(streams) == len(names):
            self._finish_run_if_done(primary[0])
        elif not names:
            folder.add_event("run_finished", {"state": RunState.aborted.value, "cause": "no stream was started"})
        self._record_in_catalog(folder)

    @staticmethod
    def _take_up(stream: LiveStream) -> None:
        """What the writer keeps about a stream, as if its frames had just come."""
        store = stream.store
        stream.is_ended = store.is_finished
        if not store.is_finished:
            stream.n_whole_chunks = store.states.announced // store.header.frames_per_chunk
            _watch_gap(stream)

    def _next_run(self, experiment: str) -> int:
        taken = [int(p.name) for p in (self.root / experiment).glob("[0-9]*") if p.name.isdecimal()]
        return max(taken, default=0) + 1


def _watch_gap(stream: LiveStream) -> None:
    """Remember since when an index has been awaited; those that come behind it get their own time."""
    states = stream.store.states
    if states.watermark >= states.announced:
        stream.gap_since = None
    elif stream.gap_since is None or states.watermark >= stream.gap_stop:
        stream.gap_since, stream.gap_stop = time.monotonic(), states.announced


def _declare_missing(stream: LiveStream, stop: int) -> None:
    """What has not come below ``stop`` will not come; with the cause, as far as it is known."""
    lost_until = stop if stream.lost_until is None else min(stream.lost_until, stop)
    stream.store.account(0, lost_until, FrameState.missing, _LOST_WHILE_DOWN)
    stream.store.account(lost_until, stop, FrameState.missing, _NOT_RECEIVED)


def _final_state(ledgers: list[StreamLedger], aborted: str | None) -> RunState:
    """Completed only if every planned frame is stored; aborted if the source never said the end."""
    if aborted:
        return RunState.aborted
    complete = all(x.stored == max(x.announced, x.planned) for x in ledgers)
    return RunState.completed if complete else RunState.incomplete


def _summary(ledger: StreamLedger) -> dict[str, Any]:
    return ledger.model_dump(exclude={"ranges"})
