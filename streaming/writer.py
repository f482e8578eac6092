"""The writer: one thread that takes everything which changes a stream, in the order it was queued.

So a stream's end comes after its last frame. What is queued together is written together: a
thousand small rows cost one system call. Sealing and ending, which wait for the disk, are the
publisher's.
"""

import errno
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Protocol

from storage.errors import FrameTooLate, IndexConflict
from storage.frame import RawFrame
from storage.states import FrameState
from storage.stream_store import Admission
from streaming.buffer import FrameBuffer
from streaming.live_stream import LiveStream, Put, StreamKey
from streaming.metrics import ServiceMetrics
from streaming.online_store import OnlineStore

__all__ = ["DiskState", "Writer"]

log = logging.getLogger("nearline.writer")

_TICK_S = 0.25
_RETRY_FULL_DISK_S = 0.5
_MOST_AT_ONCE = 256
# With a second of frames in one go, the first of them would wait for the last to be written.
_MOST_BYTES_AT_ONCE = 16 << 20
# The disk refuses for now; what was queued waits. Anything else concerns one file and is not waited for.
_WAIT_AND_RETRY = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE}
_KEPT = "kept"


class DiskState:
    """Whether the disk takes what is written; complains once, not with every attempt."""

    def __init__(self) -> None:
        self.is_full = False

    def refuses(self, error: OSError) -> None:
        if not self.is_full:
            log.error("the disk refuses to write, trying again until it does: %s", error)
        self.is_full = True

    def accepts(self) -> None:
        self.is_full = False

    @staticmethod
    def is_passing(error: OSError) -> bool:
        """Whether waiting may help."""
        return error.errno in _WAIT_AND_RETRY


class Hooks(Protocol):
    """What the writer tells the recorder; called from the writer thread."""

    def written(self, stream: LiveStream) -> None:
        """There is something new in the stream's journal."""
        ...

    def tick(self) -> None:
        """A moment has passed."""
        ...

    def await_sync(self, stream: LiveStream, done: Callable[[], None]) -> None:
        """Call ``done`` when what has been stored so far is durable."""
        ...


class Writer(threading.Thread):
    """Admits and journals frames, and carries out commands between them."""

    def __init__(self, buffer: FrameBuffer, disk: DiskState, metrics: ServiceMetrics, hooks: Hooks) -> None:
        super().__init__(name="writer", daemon=True)
        self._buffer, self._disk, self._metrics, self._hooks = buffer, disk, metrics, hooks
        self._queue: queue.SimpleQueue[Put | Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()

    def put(self, put: Put) -> None:
        """Queue frames."""
        self._queue.put(put)

    def do(self, command: Callable[[], None]) -> None:
        """Queue something to be done behind everything queued before."""
        self._queue.put(command)

    def stop(self) -> None:
        """Write what is queued, then end."""
        self._stopping.set()
        self._queue.put(None)
        self.join()

    def run(self) -> None:
        last_tick = time.monotonic()
        while True:
            items = self._take()
            for work in _together(item for item in items if item is not None):
                self._carry_out(work)
            if None in items:
                return
            if time.monotonic() - last_tick > _TICK_S:
                last_tick = time.monotonic()
                self._carry_out(self._hooks.tick)

    def _take(self) -> list[Put | Callable[[], None] | None]:
        """What is queued now, at least one thing and few enough bytes; or nothing after a while."""
        items: list[Put | Callable[[], None] | None] = []
        n_bytes = 0
        try:
            items.append(self._queue.get(timeout=_TICK_S))
            while len(items) < _MOST_AT_ONCE and n_bytes < _MOST_BYTES_AT_ONCE:
                item = self._queue.get_nowait()
                items.append(item)
                n_bytes += item.nbytes if isinstance(item, Put) else 0
        except queue.Empty:
            pass
        return items

    def _carry_out(self, work: list[Put] | Callable[[], None]) -> None:
        try:
            if isinstance(work, list):
                self._write(work[0].stream, work)
            else:
                work()
        except Exception:
            log.exception("the writer could not carry out a command; it goes on with the next")

    def _write(self, stream: LiveStream, puts: list[Put]) -> None:
        """Journal frames of one stream; their room in the buffer is kept or given back."""
        frames = [frame for put in puts for frame in put.frames]
        outcomes = iter(self._store(stream, frames))
        stream.last_activity = time.monotonic()
        if stream.lost_until is None and frames:
            stream.lost_until = frames[0].info.frame_index
        stream.settle([frame.info for frame in frames])
        for put in puts:
            self._answer(put, [next(outcomes) for _ in put.frames])
        self._hooks.written(stream)

    def _answer(self, put: Put, outcomes: list[str]) -> None:
        if put.ack == "stored":
            put.tell(outcomes)
        elif put.ack == "durable":
            self._hooks.await_sync(put.stream, lambda: put.tell(outcomes))

    def _store(self, stream: LiveStream, frames: list[RawFrame]) -> list[str]:
        """What became of each frame. New ones are written together; one index twice is not new the second time."""
        outcomes: dict[int, str] = {}
        new: dict[tuple[int, int], int] = {}
        for at, frame in enumerate(frames):
            slot = (frame.info.frame_index, frame.info.part)
            if slot in new:
                self._append(stream, frames, new, outcomes)
            outcomes[at] = self._admit(stream, frame)
            if outcomes[at] == Admission.new:
                new[slot] = at
            else:
                self._buffer.release(frame.cost_bytes)
        self._append(stream, frames, new, outcomes)
        return [outcomes[at] for at in range(len(frames))]

    def _admit(self, stream: LiveStream, frame: RawFrame) -> str:
        """``new``, or what became of a frame that is not written to the journal."""
        info, store = frame.info, stream.store
        try:
            admission = store.admit(info)
            if admission is Admission.late:
                store.append_late(info, frame.blob)
        except IndexConflict as error:
            log.error("%s", error)
            return "conflict"
        except FrameTooLate as error:
            log.warning("%s", error)
            return "ended"
        except Exception:
            log.exception("frame %d of %s could not be stored", info.frame_index, stream.key)
            return "failed"
        return _KEPT if admission is Admission.retry else admission.value

    def _append(
        self, stream: LiveStream, frames: list[RawFrame], new: dict[tuple[int, int], int], outcomes: dict[int, str]
    ) -> None:
        """Journal the admitted frames, all at once; one by one if something is wrong with one of them."""
        group = [frames[at] for at in new.values()]
        try:
            self._journal(stream, group)
            outcomes.update(dict.fromkeys(new.values(), _KEPT))
        except Exception as error:
            if len(group) > 1 and not self._stopping.is_set():
                for slot, at in new.items():
                    self._append(stream, frames, {slot: at}, outcomes)
            else:
                for at in new.values():
                    outcomes[at] = self._fail(stream, frames[at], error)
        new.clear()

    def _journal(self, stream: LiveStream, frames: list[RawFrame]) -> None:
        """Write until the disk takes it; of an online stream, memory is all there is."""
        if not frames:
            return
        if isinstance(stream.store, OnlineStore):
            self._buffer.keep_only_copy(stream.key, frames, stream.store)
            return
        while True:
            try:
                began = time.perf_counter()
                stream.store.append_many([(frame.info, frame.blob) for frame in frames])
                self._metrics.write.observe(time.perf_counter() - began)
                break
            except OSError as error:
                if not self._disk.is_passing(error):
                    raise
                self._disk.refuses(error)
                if self._stopping.wait(_RETRY_FULL_DISK_S):
                    raise
        self._disk.accepts()
        self._buffer.keep_stored(stream.key, frames)
        self._metrics.frames_stored.add(len(frames))
        self._metrics.bytes_stored.add(sum(frame.nbytes for frame in frames))
        self._metrics.store.observe((time.time_ns() - frames[0].info.received_ns) / 1e9)

    def _fail(self, stream: LiveStream, frame: RawFrame, error: Exception) -> str:
        """Whatever goes wrong with one frame, its room comes back and its sender hears of it."""
        index = frame.info.frame_index
        log.error("frame %d of %s could not be stored", index, stream.key, exc_info=error)
        self._buffer.release(frame.cost_bytes)
        if not self._stopping.is_set() and not stream.store.is_finished:
            stream.store.account(index, index + 1, FrameState.rejected, f"could not be stored: {error}")
        return "failed"


def _together(items: Iterator[Put | Callable[[], None]]) -> Iterator[list[Put] | Callable[[], None]]:
    """Neighbouring puts of one stream as one piece of work; commands on their own."""

    def stream_of(item: Put | Callable[[], None]) -> StreamKey | None:
        return item.stream.key if isinstance(item, Put) else None

    for key, group in groupby(items, stream_of):
        if key is None:
            yield from group  # type: ignore[misc]
        else:
            yield list(group)  # type: ignore[arg-type]
