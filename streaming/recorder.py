"""Runs being taken: series become runs, frames go through the buffer into their stream's store.

Connectors and producers call `submit`, which waits while the buffer is full. The writer
journals what was submitted, the publisher seals and ends, and a sync thread makes stored frames
durable at most 100 ms later. What they have in common is here: which runs and streams there
are, and who is told when something changes.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from storage.catalog import CatalogWriter
from storage.codec import check_blob
from storage.errors import BadFrame, BadName, NearlineError, RunNotFound, StreamOwned
from storage.frame import FrameInfo, RawFrame, blob_crc32c, blob_digest
from storage.metadata import require_meta
from storage.models import RunHeader, RunState, SeriesHeader, StreamHeader
from storage.names import check_name, check_run, run_key
from storage.run_folder import ChunkCommit, RunFolder, find_runs
from storage.states import FrameState, StreamLedger
from storage.stream_store import StreamStore
from storage.upload import Uploader
from streaming.buffer import FrameBuffer
from streaming.live_stream import AckLevel, Ended, LiveStream, Put, SeriesPart, Settled, StreamKey
from streaming.metrics import ServiceMetrics
from streaming.online_store import OnlineStore
from streaming.outbox import Outbox
from streaming.publisher import Publisher
from streaming.writer import DiskState, Writer

__all__ = ["Recorder"]

log = logging.getLogger("nearline.recorder")

_SYNC_INTERVAL_S = 0.1
# What a frame takes in memory beside its bytes and metadata: row, digests, dictionary entries.
_ROW_BYTES = 1024
# Between messages of unequal size a part of the heap stays unusable; measured with compressed 4M frames.
_UNUSABLE_PART = 16
_LONG_IDLE_S = 3600.0
_NOT_RECEIVED = "not received"
_LOST_WHILE_DOWN = "lost while the service was down"
# Finished streams that stay open for readers; older ones are read from their folder again.
_KEEP_FINISHED = 16
# A run that is started with a key used before is looked for among so many of the newest.
_LOOK_BACK_RUNS = 50


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
        catalog: CatalogWriter,
        *,
        budget_bytes: int,
        gap_timeout_s: float = 2.0,
        idle_timeout_s: float = 60.0,
        uploader: Uploader | None = None,
        outbox: Outbox | None = None,
        metrics: ServiceMetrics | None = None,
        on_change: Callable[[StreamKey], None] = lambda key: None,
    ) -> None:
        self.root, self.metrics = root, metrics or ServiceMetrics()
        self._catalog, self._uploader, self._outbox = catalog, uploader, outbox
        self.buffer, self.disk = FrameBuffer(budget_bytes), DiskState()
        self.n_rejected_messages = 0
        self._gap_timeout_s, self._idle_timeout_s = gap_timeout_s, idle_timeout_s
        self._on_change = on_change
        self._streams: dict[StreamKey, LiveStream] = {}
        self._open_runs: dict[str, RunFolder] = {}
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._sync_wanted = threading.Event()
        self.writer = Writer(self.buffer, self.disk, self.metrics, self)
        self._publisher = Publisher(self.disk, self.metrics, self)
        self._syncer = threading.Thread(target=self._sync_loop, name="sync", daemon=True)

    # ---- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Take over what a crash left behind, then begin to write."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in find_runs(self.root):
            if not folder.state.is_terminal:
                self._recover_run(folder)
        for thread in (self.writer, self._publisher, self._syncer):
            thread.start()

    def stop(self) -> None:
        """Write out what is queued, seal every chunk, end live runs as aborted, stop."""
        self.writer.do(self._abort_all)
        self.writer.stop()
        self._publisher.stop()
        self._stopping.set()
        self._sync_wanted.set()
        self._syncer.join()
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
        request_key: str | None = None,
        is_open: bool = False,
    ) -> RunFolder:
        """A new run; without a number, the next free one of the experiment.

        A ``request_key`` that has been used gives the run that was started with it. A run that ``is_open``
        takes all detector series of its experiment until `stop_run`.
        """
        check_name(experiment, "experiment")
        with self._lock:
            known = self._started_with(experiment, request_key)
            if known is not None:
                return known
            if is_open and experiment in self._open_runs:
                other = self._open_runs[experiment].header.run
                raise BadName(f"run {run_key(experiment, other)} is open; stop it before another is opened")
            number = self._next_run(experiment) if run is None else check_run(run)
            header = RunHeader(
                experiment=experiment,
                run=number,
                started_at=datetime.now(UTC),
                sample=sample,
                user_data=user_data or {},
                request_key=request_key,
            )
            try:
                folder = RunFolder.create(self.root, header)
            except FileExistsError as error:
                raise BadName(f"{error}; choose another run number, or leave it out to get the next one") from error
            if is_open:
                folder.add_event("run_opened", {})
                self._open_runs[experiment] = folder
            self._run_changed(folder)
        log.info("run %s started", run_key(experiment, number))
        return folder

    def open_run(self, experiment: str) -> RunFolder | None:
        """The run that takes all series of an experiment now."""
        return self._open_runs.get(experiment)

    def stop_run(self, folder: RunFolder, *, aborted: str | None = None, done: Ended) -> None:
        """End a run that was started open; ``done`` is told when the last of its streams has ended.

        Raises
        ------
        BadName : it is not open.
        """
        header = folder.header
        with self._lock:
            opened = self._open_runs.get(header.experiment)
            if opened is None or opened.header.run != header.run:
                raise BadName(f"run {run_key(header.experiment, header.run)} is not open; only such a run is stopped")
            folder.add_event("run_closed", {"aborted": aborted})
            del self._open_runs[header.experiment]
        streams = [s for s in self._primary(folder) if not s.is_ended]
        if not streams:
            self._end_empty(folder, aborted or "no stream was started")
            self._run_changed(folder)
            done(None)
        left = len(streams)

        def ended(error: NearlineError | None) -> None:
            nonlocal left
            left -= 1
            if left == 0 or error is not None:
                done(error)

        for stream in streams:
            self.finish_stream(stream, aborted=aborted, done=ended)

    def continue_stream(self, stream: LiveStream, series: SeriesHeader) -> None:
        """One more detector series in a stream of an open run; its frames follow those there are."""
        states = stream.store.states
        part = SeriesPart(series.series_unique_id, series.series_id, max(states.announced, stream.submitted))
        event = {
            "data_source": stream.header.data_source,
            "series_unique_id": part.series_unique_id,
            "series_id": part.series_id,
            "offset": part.offset,
        }
        stream.folder.add_event("series_started", event)
        stream.series.append(part)

    def end_series(self, stream: LiveStream, part: SeriesPart) -> None:
        """A series has ended: the stream with it, unless its run was opened by hand."""
        part.is_ended = True
        if not self._is_in_open_run(stream):
            self.finish_stream(stream)

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
            planes = {"pixel_mask": pixel_mask, "flatfield": flatfield}
            store: StreamStore | OnlineStore
            if header.is_online:
                store = OnlineStore.create(folder, header, self.buffer, **planes)
            else:
                store = StreamStore.create(folder, header, **planes)
            stream = LiveStream(store, folder, series=_first_series(header))
            self._streams[stream.key] = stream
            self._run_changed(folder)
        self._on_change(stream.key)
        return stream

    def take_up_stream(self, folder: RunFolder, header: StreamHeader) -> LiveStream | None:
        """Open an unfinished derived stream again, whose run had ended before this service was started."""
        name = header.data_source
        with self._lock:
            is_ours = header.parent is not None and name in folder.data_sources() and not folder.finished(name)
            if not is_ours or header.is_online or folder.stream_header(name) != header:
                return None
            stream = LiveStream(StreamStore.recover(folder, name), folder)
            self._streams[stream.key] = stream
            self._take_up(stream)
        self._on_change(stream.key)
        return stream

    def join(self, stream: LiveStream, producer: str) -> None:
        """One more producer for a stream, which does not end before this one has finished; kept across a restart."""
        if producer and producer not in stream.producers:
            stream.producers.add(producer)
            stream.folder.add_event("producer_joined", {"data_source": stream.header.data_source, "producer": producer})

    def find(self, key: StreamKey) -> LiveStream | None:
        """The stream if this service has it open."""
        return self._streams.get(key)

    def find_series(self, series_unique_id: str | None, series_id: int) -> list[LiveStream]:
        """Unfinished streams of a detector series; by the unique id where the detector sends one."""
        going_on = (s for s in list(self._streams.values()) if not (s.store.is_finished or s.is_derived))
        return [s for s in going_on if s.find_series(series_unique_id, series_id)]

    def state_of(self, folder: RunFolder) -> RunState:
        """A run's state; draining once its last frames are taken and not all of them sealed."""
        state = folder.state
        mine = self._primary(folder)
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
        ack: AckLevel = "stored",
        settled: Settled | None = None,
    ) -> bool:
        """Queue frames of one stream; False when the buffer stayed full for ``timeout`` s (try again).

        ``settled`` is told index and outcome of each frame once they have reached ``ack``: ``kept``,
        ``duplicate``, ``late``, ``conflict`` or ``failed`` (the disk refused it for good).

        Raises
        ------
        BadFrame : some bytes cannot be a frame of this stream; none of the frames is taken.
        """
        raw = self.weigh(stream, frames)
        if not self.buffer.reserve(sum(frame.cost_bytes for frame in raw), timeout):
            return False
        self.take(Put(stream, raw, ack, settled))
        return True

    def weigh(self, stream: LiveStream, frames: list[tuple[FrameInfo, Any]]) -> list[RawFrame]:
        """The frames with what each takes in memory; refuses rows that cannot be meant. Sets each row's size."""
        header, raw = stream.header, []
        for info, blob in frames:
            info.size_bytes = memoryview(blob).nbytes
            is_automatic = info.frame_index == -1 and info.producer and header.parts == 1
            if not is_automatic:
                stream.require_index(info.frame_index)
            if not 0 <= info.part < header.parts:
                raise BadFrame(f"part {info.part} of frame {info.frame_index}: {header.data_source} has {header.parts}")
            if header.kind == "table" and info.size_bytes:
                raise BadFrame(f"{header.data_source} is a table; its rows carry no payload")
            require_meta(info.meta_json)
            heap_bytes = info.size_bytes + info.size_bytes // _UNUSABLE_PART + _ROW_BYTES
            raw.append(RawFrame(info, blob, heap_bytes + len(info.meta_json)))
        return raw

    def take(self, put: Put) -> None:
        """Check, number and queue frames that were weighed, and for which room was reserved.

        Raises
        ------
        BadFrame : as `submit`; the room has been given back.
        """
        stream, header, now = put.stream, put.stream.header, time.time_ns()
        try:
            for frame in put.frames:
                info, blob = frame.info, frame.blob
                info.crc32c, info.digest, info.received_ns = blob_crc32c(blob), blob_digest(blob), now
                # Last: it hops from block to block, which takes four times as long on bytes that no cache holds.
                if header.kind == "frames":
                    check_blob(blob, header.codec, header.shape, header.dtype)
        except BadFrame:
            self.buffer.release(sum(frame.cost_bytes for frame in put.frames))
            raise
        self.metrics.frames_received.add(len(put.frames))
        self.metrics.bytes_received.add(sum(frame.nbytes for frame in put.frames))
        stream.number([frame.info for frame in put.frames])
        stream.last_activity = time.monotonic()
        self.writer.put(put)
        if put.ack == "buffered":
            put.tell(["kept"] * len(put.frames))

    def reject(self, stream: LiveStream, frame_index: int, cause: str) -> None:
        """Account for a frame that came but cannot be used."""

        def command() -> None:
            # Behind the end it is one of the messages that were left out, no frame of the run.
            if stream.is_open:
                stream.store.account(frame_index, frame_index + 1, FrameState.rejected, cause)
                self.written(stream)

        self.writer.do(command)

    def finish_stream(
        self,
        stream: LiveStream,
        announced: int = 0,
        *,
        aborted: str | None = None,
        producer: str = "",
        done: Ended | None = None,
    ) -> None:
        """End a stream after everything queued before; ``aborted`` says why when it was not a regular end.

        A stream with several producers ends when the last of them has finished. ``done`` is called
        from another thread once it has ended, or this producer's part in it; or with the error why
        it cannot.

        Raises
        ------
        BadFrame : ``announced`` is not a number of frames this stream can have.
        """
        if not 0 <= announced <= stream.index_limit:
            raise BadFrame(
                f"{stream.header.data_source} cannot end with {announced} frames: it has "
                f"{stream.store.states.announced} so far and {stream.header.planned or 'no number'} planned"
            )
        if stream.producers - {producer}:
            self._finish_part(stream, announced, producer, done)
            return
        stream.is_draining = True

        def command() -> None:
            if done:
                stream.on_end.append(done)
            self._finish(stream, announced, aborted)

        self.writer.do(command)

    def _finish_part(self, stream: LiveStream, announced: int, producer: str, done: Ended | None) -> None:
        """One producer of several has finished; the others go on."""
        stream.folder.add_event("producer_finished", {"data_source": stream.header.data_source, "producer": producer})
        stream.producers.discard(producer)
        stream.submitted = max(stream.submitted, announced)

        def command() -> None:
            stream.store.states.announce(announced)
            if done:
                done(None)

        self.writer.do(command)

    # ---- what the writer tells -----------------------------------------------------------------

    def written(self, stream: LiveStream) -> None:
        """Tell the readers; hand whole chunks to the publisher."""
        self._on_change(stream.key)
        n_whole = stream.store.states.announced // stream.header.frames_per_chunk
        if n_whole > stream.n_whole_chunks or stream.gap_since is not None:
            self._seal_complete(stream)
        _watch_gap(stream)

    def tick(self) -> None:
        """Declare overdue gaps missing; end streams that have gone quiet."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            if not stream.is_open:
                continue
            if stream.gap_since is not None and now - stream.gap_since > self._gap_timeout_s:
                _declare_missing(stream, stream.gap_stop)
                stream.gap_since = None
                _watch_gap(stream)
                self._seal_complete(stream)
                self._on_change(stream.key)
            if now - stream.last_activity > self._patience(stream):
                self._finish(stream, 0, f"no message for {self._patience(stream):g} s")

    def await_sync(self, stream: LiveStream, done: Callable[[], None]) -> None:
        """Have the sync thread call ``done`` when what has been stored so far is durable."""
        with stream.lock:
            stream.awaiting_sync.append(done)
        self._sync_wanted.set()

    def _seal_complete(self, stream: LiveStream) -> None:
        chunks = stream.store.take_complete(None)
        if stream.gap_since is None:
            stream.n_whole_chunks = stream.store.states.announced // stream.header.frames_per_chunk
        if chunks:
            stream.to_seal.extend(chunks)
            self._publisher.look_after(stream)

    def _patience(self, stream: LiveStream) -> float:
        """Analysis may pause for longer than a detector, and so may a run that somebody will stop by hand."""
        is_patient = stream.is_derived or self._is_in_open_run(stream)
        return _LONG_IDLE_S if is_patient else self._idle_timeout_s

    def _is_in_open_run(self, stream: LiveStream) -> bool:
        opened = self._open_runs.get(stream.header.experiment)
        return opened is not None and opened.header.run == stream.header.run

    def _finish(self, stream: LiveStream, announced: int, aborted: str | None) -> None:
        """In the writer thread: nothing more comes; the publisher does the rest."""
        if stream.is_ended:
            _tell_end(stream, None)
        elif stream.is_open:
            _declare_missing(stream, max(announced, stream.store.states.announced))
            stream.to_seal.extend(stream.store.begin_finish(announced, _NOT_RECEIVED, aborted))
            stream.is_finishing = True
            self._publisher.look_after(stream)

    def _abort_all(self) -> None:
        for stream in list(self._streams.values()):
            # Analysis goes on when a service is back; only what a detector sends is over.
            if not stream.is_derived:
                self._finish(stream, 0, "service stopped")

    # ---- what the publisher tells ----------------------------------------------------------------

    def sealed(self, stream: LiveStream, commit: ChunkCommit) -> None:
        log.debug("%s sealed chunk %d", stream.key, commit.chunk)
        self._catalog.record(stream.folder, {stream.header.data_source: stream.store.states.announced})
        if self._uploader is not None:
            self._uploader.chunk_sealed(stream.folder, stream.header.data_source, commit.chunk)
        if self._outbox is not None:
            self._outbox.chunk_sealed(stream, commit)
        self._on_change(stream.key)

    def ending(self, stream: LiveStream) -> None:
        """The run has ended if this was its last stream: both are seen at once."""
        if not stream.is_derived:
            self._finish_run_if_done(stream)

    def ended(self, stream: LiveStream) -> None:
        stream.store.close()
        self._run_changed(stream.folder)
        self._on_change(stream.key)
        _tell_end(stream, None)
        self._forget_old()

    def lost(self, stream: LiveStream, error: NearlineError) -> None:
        """Another service owns the stream now: leave its files alone."""
        stream.store.close()
        self._streams.pop(stream.key, None)
        self._on_change(stream.key)
        _tell_end(stream, error)

    def _finish_run_if_done(self, stream: LiveStream) -> None:
        folder, mine = stream.folder, self._primary(stream.folder)
        if folder.state.is_terminal or not all(s.store.is_finished for s in mine):
            return
        ledgers = [s.ledger() for s in mine]
        closed = [event.payload["aborted"] for event in folder.events("run_closed")]
        aborted = next((why for why in (*closed, *(s.store.aborted for s in mine)) if why), None)
        state = _final_state(ledgers, aborted)
        payload = {"state": state.value, "cause": aborted, "ledgers": [_summary(x) for x in ledgers]}
        folder.add_event("run_finished", payload)
        for problem in (p for ledger in ledgers for p in ledger.problems):
            log.error("ledger of %s does not balance: %s", folder.path, problem)
        log.info("run %s %s", run_key(folder.header.experiment, folder.header.run), state.value)

    def _primary(self, folder: RunFolder) -> list[LiveStream]:
        return [s for s in list(self._streams.values()) if s.folder.path == folder.path and not s.is_derived]

    def _forget_old(self) -> None:
        # The end of a run is judged on all its streams: none is forgotten before.
        ended = [s for s in list(self._streams.values()) if s.is_ended and s.folder.state.is_terminal]
        for stream in ended[:-_KEEP_FINISHED]:
            del self._streams[stream.key]

    def _run_changed(self, folder: RunFolder) -> None:
        """Have index, object store and outbox brought up to date; none is waited for."""
        self._catalog.record(folder)
        if self._uploader is not None:
            self._uploader.run_changed(folder)
        if self._outbox is not None:
            self._outbox.run_changed(folder)

    # ---- the sync thread -------------------------------------------------------------------------

    def _sync_loop(self) -> None:
        """Every 100 ms, and at once for a producer that waits for it; what comes during a sync waits for the next."""
        while not self._stopping.is_set():
            self._sync_wanted.wait(_SYNC_INTERVAL_S)
            self._sync_wanted.clear()
            for stream in list(self._streams.values()):
                self._sync(stream)

    def _sync(self, stream: LiveStream) -> None:
        with stream.lock:
            waiting, stream.awaiting_sync = stream.awaiting_sync, []
        try:
            with self.metrics.sync.timed():
                stream.store.sync()
        except OSError as error:
            self.disk.refuses(error)
            with stream.lock:
                stream.awaiting_sync[:0] = waiting
            return
        for done in waiting:
            done()

    # ---- recovery -----------------------------------------------------------------------------

    def _recover_run(self, folder: RunFolder) -> None:
        streams, names = [], folder.data_sources()
        for name in names:
            try:
                stream = LiveStream(self._recover_store(folder, name), folder, lost_until=None)
            except StreamOwned as error:
                log.error("%s", error)
                continue
            except Exception:
                # One damaged run, or one that another service writes, must not keep this one from starting.
                log.exception("could not take over %s in %s; it is left as it is", name, folder.path)
                continue
            stream.producers, stream.series = _open_producers(folder, name), _all_series(folder, stream.header)
            self._streams[stream.key] = stream
            streams.append(stream)
            self._take_up(stream)
            log.info("took over %s with %d frames stored", stream.key, stream.store.ledger().stored)
        primary = [s for s in streams if not s.is_derived]
        if primary and all(s.store.is_finished for s in primary) and len(streams) == len(names):
            self._finish_run_if_done(primary[0])
        if any(folder.events("run_opened")) and not any(folder.events("run_closed")):
            self._open_runs[folder.header.experiment] = folder
        elif not names:
            self._end_empty(folder, "no stream was started")
        self._run_changed(folder)

    def _recover_store(self, folder: RunFolder, data_source: str) -> StreamStore | OnlineStore:
        if folder.stream_header(data_source).is_online:
            return OnlineStore.recover(folder, data_source, self.buffer)
        return StreamStore.recover(folder, data_source)

    @staticmethod
    def _end_empty(folder: RunFolder, cause: str) -> None:
        folder.add_event("run_finished", {"state": RunState.aborted.value, "cause": cause})

    @staticmethod
    def _take_up(stream: LiveStream) -> None:
        """What the writer keeps about a stream, as if its frames had just come."""
        store = stream.store
        stream.is_ended = store.is_finished
        if not store.is_finished:
            stream.n_whole_chunks = store.states.announced // store.header.frames_per_chunk
            _watch_gap(stream)

    def _started_with(self, experiment: str, request_key: str | None) -> RunFolder | None:
        if request_key is None:
            return None
        for number in sorted(self._run_numbers(experiment), reverse=True)[:_LOOK_BACK_RUNS]:
            with suppress(RunNotFound):  # one that is damaged is not the one
                folder = RunFolder.open(self.root / experiment / str(number))
                if folder.header.request_key == request_key:
                    return folder
        return None

    def _next_run(self, experiment: str) -> int:
        return max(self._run_numbers(experiment), default=0) + 1

    def _run_numbers(self, experiment: str) -> list[int]:
        return [int(p.name) for p in (self.root / experiment).glob("[0-9]*") if p.name.isdecimal()]


def _tell_end(stream: LiveStream, error: NearlineError | None) -> None:
    for done in stream.on_end:
        done(error)
    stream.on_end.clear()


def _first_series(header: StreamHeader) -> list[SeriesPart]:
    series = header.series
    return [SeriesPart(series.series_unique_id, series.series_id, 0)] if series else []


def _all_series(folder: RunFolder, header: StreamHeader) -> list[SeriesPart]:
    """The series of a stream after a restart; the last one may still be coming."""
    later = [e.payload for e in folder.events("series_started") if e.payload["data_source"] == header.data_source]
    parts = _first_series(header)
    parts += [SeriesPart(p["series_unique_id"], p["series_id"], p["offset"]) for p in later]
    for part in parts[:-1]:
        part.is_ended = True
    return parts


def _open_producers(folder: RunFolder, data_source: str) -> set[str]:
    """Those who joined a stream and have not finished it."""
    found: set[str] = set()
    for event in folder.events():
        if event.payload.get("data_source") != data_source:
            continue
        if event.kind == "producer_joined":
            found.add(event.payload["producer"])
        elif event.kind == "producer_finished":
            found.discard(event.payload["producer"])
    return found


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
    if lost_until > 0:
        stream.store.account(0, lost_until, FrameState.missing, _LOST_WHILE_DOWN)
    stream.store.account(lost_until, stop, FrameState.missing, _NOT_RECEIVED)


def _final_state(ledgers: list[StreamLedger], aborted: str | None) -> RunState:
    """Completed only if every planned frame is there; aborted if the source never said the end."""
    if aborted:
        return RunState.aborted
    complete = all(x.n_taken == max(x.announced, x.planned) for x in ledgers)
    return RunState.completed if complete else RunState.incomplete


def _summary(ledger: StreamLedger) -> dict[str, Any]:
    return ledger.without_memory().model_dump(exclude={"ranges"})
