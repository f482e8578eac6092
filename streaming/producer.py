"""Sending frames into a service from a program: arrays or ready blobs, acknowledged.

`RunProducer.send` waits for the acknowledgement of each frame. `RunProducer.put` does not: it
compresses in worker threads, keeps a bounded window under way and gives a future; a frame whose
answer was lost, to a restart of the service say, is sent again under its (producer, sequence),
which the service has in its journal, so it cannot be stored twice.
"""

import math
import os
import socket
import threading
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import zmq

from storage.codec import encode
from storage.errors import BadFrame, BufferFull, IndexConflict, NearlineError, ProtocolError, StorageFull, StreamNotOpen
from storage.frame import FrameInfo
from storage.metadata import pack_meta
from storage.models import DetectorHeader, StreamHeader
from streaming import wire
from streaming.client import Connection
from streaming.payload import glue_payload

__all__ = ["Producer", "RunProducer"]

_SCALARS = (np.generic, int, float)
_AUTOMATIC = -1
_PAUSE_S = 0.05
_POLL_S = 0.2
# One message carries so many frames, and bytes beyond the first, at most.
_MOST_ROWS = 512
_MOST_MESSAGE_BYTES = 4 << 20
_WINDOW_BYTES = 64 << 20
_WINDOW_FRAMES = 8192
# What a row counts in the window beside its bytes.
_ROW_BYTES = 512
_MOST_UNDER_WAY = 32
_CHUNK_BYTES = 256 << 20
_REFUSALS: dict[str, tuple[type[NearlineError], str]] = {
    "conflict": (IndexConflict, "exists already with other content; the first one is kept"),
    "ended": (StreamNotOpen, "came behind the end of its stream and is not kept"),
    "failed": (StorageFull, "could not be written; the service's log says why"),
}


class Producer:
    """A named source of frames in an experiment.

    Parameters
    ----------
    ack : what an acknowledgement means: the service has the frame in memory (``buffered``), in its
        journal (``stored``), where `kill -9` of everything cannot take it, or on the disk
        (``durable``), where a power loss cannot.
    name : how this producer is known in the frame table; must be its own among those that fill one
        stream. Made up if left out.
    persistence : ``online`` keeps frames in the service's memory only, until newer ones need the
        room; they can be acknowledged as ``buffered`` at most, which is then the default.
    """

    def __init__(
        self,
        address: str,
        experiment: str,
        data_source: str,
        *,
        ack: wire.AckLevel | None = None,
        persistence: Literal["stored", "online"] = "stored",
        name: str | None = None,
        token: str | None = None,
    ) -> None:
        self._address, self._token = address, token
        self._connection = Connection(address, token=token)
        self.experiment, self.data_source = experiment, data_source
        self.ack: wire.AckLevel = ack or ("buffered" if persistence == "online" else "stored")
        self.persistence = persistence
        self._is_ack_chosen = ack is not None
        if persistence == "online":
            self.require_buffered()
        life = uuid.uuid4().hex[:8]
        self.name = name or f"{socket.gethostname()[:40]}-{life}"
        # Sendings are counted anew by each process, so each counts under a name of its own.
        self.sender = f"{name}.{life}" if name else self.name

    def run(
        self,
        run: int | None = None,
        *,
        sample: str | None = None,
        planned: int = 0,
        join: bool = False,
        user_data: dict[str, Any] | None = None,
    ) -> "RunProducer":
        """Start a run (without a number, the next one); a context manager that ends the stream.

        With ``join`` the run exists already: another producer, or a control system, has started it.
        """
        if join:
            number = self._connection.ask_json(wire.OpenRun(id=0, experiment=self.experiment, run=run))["header"]["run"]
        else:
            request = wire.StartRun(
                id=0,
                experiment=self.experiment,
                run=run,
                sample=sample,
                user_data=user_data or {},
                request_key=uuid.uuid4().hex,
            )
            number = self._connection.ask_json(request)["run"]
        return RunProducer(self, number, planned)

    def derived(self, run: int, header: StreamHeader) -> "RunProducer":
        """A derived stream in a run that exists, with its header given whole."""
        producer = RunProducer(self, run, header.planned)
        producer.start(header)
        return producer

    def require_buffered(self) -> None:
        """Acknowledge as ``buffered``; ProtocolError if another level was asked for."""
        if self._is_ack_chosen and self.ack != "buffered":
            raise ProtocolError(
                f"{self.data_source} is to be in memory only, so no frame of it is ever {self.ack}; use "
                "ack='buffered', or persistence='stored'"
            )
        self.ack = "buffered"

    def connect(self) -> Connection:
        """A connection of its own."""
        return Connection(self._address, token=self._token)

    @property
    def connection(self) -> Connection:
        """The one that whoever calls from outside uses."""
        return self._connection

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class _Sending:
    """One frame on its way: its row, its bytes or the promise of them, and who waits for its index."""

    info: FrameInfo
    blob: Any
    future: "Future[int]"

    @property
    def is_ready(self) -> bool:
        return not isinstance(self.blob, Future) or self.blob.done()

    @property
    def weight(self) -> int:
        return self.info.size_bytes + _ROW_BYTES


class RunProducer:
    """Frames of one run; indices count up from 0 unless given."""

    def __init__(self, producer: Producer, run: int, planned: int) -> None:
        self.run = run
        self._producer, self._planned = producer, planned
        self._header: StreamHeader | None = None
        self._sequence = 0
        self._stop_index = 0
        self._courier: _Courier | None = None
        self._is_finished = False

    def start(self, header: StreamHeader, pixel_mask: np.ndarray | None = None) -> None:
        """Begin the stream with a header of one's own; `send` does it from the first array otherwise.

        Another producer may have begun it, with the same header; the stream then ends when both have
        finished.

        pixel_mask : (slow, fast) uint32, nonzero where a pixel must not be used; of frames in parts with the parts one
            below the other, or of one part, if it holds for all.
        """
        if self._producer.persistence == "online":
            header = header.model_copy(update={"persistence": "online"})
        if header.is_online:
            self._producer.require_buffered()
        mask = [] if pixel_mask is None else [np.ascontiguousarray(pixel_mask, "<u4").tobytes()]
        request = wire.StartStream(id=0, header=header.model_dump_json().encode(), producer=self._producer.name)
        self._producer.connection.ask(request, mask)
        self._header = header

    def send(
        self,
        frame: np.ndarray | bytes | memoryview | None = None,
        *,
        meta: dict[str, Any] | None = None,
        frame_index: int | None = None,
        part: int = 0,
    ) -> int:
        """Send one frame and wait for its acknowledgement; its index.

        Parameters
        ----------
        frame : an array (compressed here), bytes that are compressed already, or None for a row of a table.
        frame_index : the next free one if left out; several producers of one stream then share the count.
        part : which module of a detector in parts this is; such frames need a ``frame_index``.

        Raises
        ------
        BadFrame, ServiceUnavailable
        IndexConflict : that index exists with other content.
        StorageFull : the service could not write it.
        """
        if self._courier is not None:
            return self.put(frame, meta=meta, frame_index=frame_index, part=part).result()
        return self._deliver([self._sending(frame, meta or {}, frame_index, part)])[0]

    def send_many(self, frames: Sequence[tuple[Any, ...]]) -> list[int]:
        """Send (frame_index or None, frame, meta), or those and a part, in one message and wait; their indices."""
        return self._deliver([self._sending(frame, meta, index, *part) for index, frame, meta, *part in frames])

    def put(
        self,
        frame: np.ndarray | bytes | memoryview | None = None,
        *,
        meta: dict[str, Any] | None = None,
        frame_index: int | None = None,
        part: int = 0,
    ) -> "Future[int]":
        """Send one frame without waiting; a future of its index, done when it is acknowledged.

        Waits only while 64 MiB or 8192 frames are under way already. Arrays are compressed in
        worker threads: do not change one before its future is done. In asyncio code,
        ``await asyncio.wrap_future(out.put(frame))``.
        """
        if self._courier is None:
            if self._header is None:
                self._start_from(_as_array(frame))
            self._courier = _Courier(self._producer, self._ref)
        sending = self._sending(frame, meta or {}, frame_index, part, self._courier.workers)
        self._courier.take(sending)
        return sending.future

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything put is acknowledged; TimeoutError if that takes longer.

        Raises
        ------
        The error of the first frame that was refused since the last flush.
        """
        if self._courier is not None:
            self._courier.flush(timeout)

    def update(self, **metadata: Any) -> None:
        """Add facts to the run's metadata, such as a temperature that was not known at its start."""
        self._producer.connection.ask(
            wire.AddEvent(id=0, experiment=self._producer.experiment, run=self.run, kind="metadata", payload=metadata)
        )

    def finish(self, announced: int = 0, *, aborted: str | None = None, next_run: int | None = None) -> None:
        """End this producer's part; the stream ends with its last producer.

        Parameters
        ----------
        announced : number of frames, when the last ones were never sent.
        aborted : why, when this is not a regular end; the run is then *aborted*.
        next_run : where the experiment goes on; readers find it as `Run.next_run`.
        """
        if self._is_finished:
            return
        if announced < 0:
            raise BadFrame(f"a run cannot end with {announced} frames")
        if self._header is None:
            self._start_from(None)  # nothing was sent: a run with an empty table, not one that never ends
        try:
            self.flush()
        finally:
            self._close_courier()
        request = wire.FinishStream(
            id=0,
            stream=self._ref,
            announced=max(announced, self._stop_index),
            aborted=aborted,
            producer=self._producer.name,
            next_run=next_run,
        )
        self._producer.connection.ask(request, timeout=math.inf)
        self._is_finished = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self.finish(aborted=f"the producer ended with {kind.__name__}" if kind else None)

    @property
    def _ref(self) -> wire.StreamRef:
        return wire.StreamRef(self._producer.experiment, self.run, self._producer.data_source)

    def _sending(
        self,
        frame: Any,
        meta: dict[str, Any],
        frame_index: int | None,
        part: int = 0,
        workers: ThreadPoolExecutor | None = None,
    ) -> _Sending:
        frame = _as_array(frame)
        if frame_index is not None and frame_index < 0:
            raise BadFrame(f"frame_index {frame_index} is below 0; leave it out to get the next one")
        if self._header is None:
            self._start_from(frame)
        blob = self._blob_of(frame, workers)
        size = frame.nbytes if isinstance(blob, Future) else memoryview(blob).nbytes
        info = FrameInfo(
            frame_index=_AUTOMATIC if frame_index is None else frame_index,
            size_bytes=size,
            producer=self._producer.sender,
            sequence=self._sequence,
            meta_json=pack_meta(meta),
            part=part,
        )
        self._sequence += 1
        self._stop_index = max(self._stop_index, info.frame_index + 1)
        return _Sending(info, blob, Future())

    def _deliver(self, sendings: list[_Sending]) -> list[int]:
        """One message, and its answer."""
        infos = [sending.info for sending in sendings]
        payload = glue_payload([sending.blob for sending in sendings])
        while True:
            request = wire.PutFrames(id=0, stream=self._ref, infos=infos, ack=self._producer.ack)
            try:
                # However long the disk is full: the service is there, and looked for meanwhile.
                reply, _ = self._producer.connection.ask(request, payload, timeout=math.inf)
            except BufferFull:
                threading.Event().wait(_PAUSE_S)
                continue
            break
        for index, outcome in zip(reply.indices, reply.outcomes, strict=True):
            error = _refusal(self._producer.data_source, index, outcome)
            if error:
                raise error
        return list(reply.indices)

    def _start_from(self, frame: Any) -> None:
        if frame is not None and not isinstance(frame, np.ndarray):
            raise BadFrame("the first frame is not an array, so its shape and dtype are unknown; call start() first")
        self.start(
            StreamHeader(
                experiment=self._producer.experiment,
                run=self.run,
                data_source=self._producer.data_source,
                kind="table" if frame is None else "frames",
                shape=() if frame is None else frame.shape,
                dtype="" if frame is None else frame.dtype.name,
                codec=_codec_for(frame),
                planned=self._planned,
                frames_per_chunk=_frames_per_chunk(frame),
                detector=DetectorHeader() if frame is not None and frame.ndim == 2 else None,
            )
        )

    def _blob_of(self, frame: Any, workers: ThreadPoolExecutor | None) -> Any:
        if frame is None:
            return b""
        assert self._header is not None
        if not isinstance(frame, np.ndarray):
            return frame
        if frame.shape != self._header.shape or frame.dtype.name != self._header.dtype:
            raise BadFrame(
                f"frame is {frame.dtype.name} {frame.shape}, but the stream began as {self._header.dtype} "
                f"{self._header.shape}; start another data source for frames of another kind"
            )
        if workers is None:
            return encode(frame, self._header.codec)
        return workers.submit(encode, frame, self._header.codec)

    def _close_courier(self) -> None:
        if self._courier is not None:
            self._courier.close()
            self._courier = None


class _Courier(threading.Thread):
    """Takes frames to the service in the order they were put, several messages under way at a time."""

    def __init__(self, producer: Producer, ref: wire.StreamRef) -> None:
        super().__init__(name=f"producer-{producer.data_source}", daemon=True)
        self.workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="compress")
        self._ref, self._ack = ref, producer.ack
        self._connection = producer.connect()
        self._waiting: deque[_Sending] = deque()
        self._under_way: dict[int, list[_Sending]] = {}
        self._weight = self._n_frames = 0
        self._room = threading.Condition()
        self._first_error: NearlineError | None = None
        self._is_closing = False
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._bell, self._rope = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._bell.bind(f"inproc://courier-{id(self)}")
        self._rope.connect(f"inproc://courier-{id(self)}")
        self._has_rung = False
        self.start()

    # ---- called by whoever sends -------------------------------------------------------------------

    def take(self, sending: _Sending) -> None:
        """Queue a frame; waits while the window is full."""
        with self._room:
            self._room.wait_for(lambda: self._has_room(sending.weight) or not self.is_alive())
            if not self.is_alive():
                raise self._first_error or NearlineError("the producer has been closed")
            self._weight += sending.weight
            self._n_frames += 1
            self._waiting.append(sending)
            self._ring()
        if isinstance(sending.blob, Future):
            sending.blob.add_done_callback(lambda _: self._ring_locked())

    def flush(self, timeout: float | None) -> None:
        with self._room:
            if not self._room.wait_for(lambda: self._n_frames == 0 or not self.is_alive(), timeout):
                raise TimeoutError(f"{self._n_frames} frames are not acknowledged yet")
            error, self._first_error = self._first_error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """End when nothing is under way any more."""
        with self._room:
            self._is_closing = True
            self._ring()
        self.join()
        self.workers.shutdown()
        self._rope.close(linger=0)

    def _has_room(self, weight: int) -> bool:
        is_light = self._weight + weight <= _WINDOW_BYTES or not self._weight
        return is_light and self._n_frames < _WINDOW_FRAMES

    def _ring_locked(self) -> None:
        with self._room:
            self._ring()

    def _ring(self) -> None:
        """Wake the courier; with the lock held, since a socket is for one thread at a time."""
        if not self._has_rung and not self._rope.closed:
            self._has_rung = True
            self._rope.send(b"", zmq.NOBLOCK)

    # ---- the thread --------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._work()
        except NearlineError as error:
            self._give_up(error)
        finally:
            self._connection.close()
            self._bell.close(linger=0)
            with self._room:
                self._room.notify_all()

    def _work(self) -> None:
        poller = zmq.Poller()
        poller.register(self._connection.socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        while True:
            poller.poll(int(1000 * _POLL_S))
            self._hear_bell()
            self._connection.pump(0.0)
            self._settle_answered()
            while len(self._under_way) < _MOST_UNDER_WAY and (batch := self._next_batch()):
                self._transmit(batch)
            with self._room:
                if self._is_closing and not self._n_frames:
                    return

    def _hear_bell(self) -> None:
        with self._room:
            if self._has_rung:
                self._bell.recv()
                self._has_rung = False

    def _next_batch(self) -> list[_Sending]:
        """Frames from the front of the queue that are ready: few large ones, or many small ones."""
        batch: list[_Sending] = []
        n_bytes = 0
        with self._room:
            while self._waiting and self._waiting[0].is_ready and len(batch) < _MOST_ROWS:
                sending = self._waiting[0]
                if batch and n_bytes + sending.info.size_bytes > _MOST_MESSAGE_BYTES:
                    break
                n_bytes += sending.info.size_bytes
                batch.append(self._waiting.popleft())
        return batch

    def _transmit(self, batch: list[_Sending]) -> None:
        blobs = []
        for sending in batch:
            if isinstance(sending.blob, Future):
                self._exchange_weight(sending, sending.blob.result())  # an array that was checked does compress
            blobs.append(sending.blob)
        request = wire.PutFrames(id=0, stream=self._ref, infos=[s.info for s in batch], ack=self._ack)
        self._under_way[self._connection.send(request, glue_payload(blobs))] = batch

    def _exchange_weight(self, sending: _Sending, blob: bytes) -> None:
        """What was counted as an array counts as its compressed bytes from here on."""
        with self._room:
            self._weight += len(blob) - sending.info.size_bytes
            sending.info.size_bytes, sending.blob = len(blob), blob
            self._room.notify_all()

    def _settle_answered(self) -> None:
        for number in [n for n in self._under_way if self._connection.has_answer(n)]:
            batch = self._under_way.pop(number)
            try:
                reply, _ = self._connection.take(number)
            except BufferFull:
                threading.Event().wait(_PAUSE_S)
                # Fewer at once: together they may be more than the service's whole memory.
                half = -(-len(batch) // 2)
                for part in (batch[:half], batch[half:]):
                    if part:
                        self._transmit(part)
                continue
            except NearlineError as error:
                self._settle(batch, [error] * len(batch))
                continue
            name = self._ref.data_source
            results: list[int | NearlineError] = [
                _refusal(name, index, outcome) or index
                for index, outcome in zip(reply.indices, reply.outcomes, strict=True)
            ]
            self._settle(batch, results)

    def _settle(self, batch: list[_Sending], results: Sequence[int | NearlineError]) -> None:
        """Tell those who wait, then make room."""
        for sending, result in zip(batch, results, strict=True):
            if isinstance(result, NearlineError):
                self._first_error = self._first_error or result
                sending.future.set_exception(result)
            else:
                sending.future.set_result(result)
        with self._room:
            self._weight -= sum(sending.weight for sending in batch)
            self._n_frames -= len(batch)
            self._room.notify_all()

    def _give_up(self, error: NearlineError) -> None:
        """The service is gone for good: everybody who waits hears of it."""
        with self._room:
            left = [s for batch in self._under_way.values() for s in batch] + list(self._waiting)
            self._waiting.clear()
        self._settle(left, [error] * len(left))


def _refusal(data_source: str, index: int, outcome: str) -> NearlineError | None:
    if outcome not in _REFUSALS:
        return None
    kind, why = _REFUSALS[outcome]
    return kind(f"frame {index} of {data_source} {why}")


def _as_array(frame: Any) -> Any:
    return np.asarray(frame) if isinstance(frame, _SCALARS) else frame


def _frames_per_chunk(frame: Any) -> int:
    """N of a stream whose rate nobody knows: about 256 MiB of arrays, 10 to 1000; rows by the ten thousand."""
    if frame is None:
        return 10_000
    return int(min(max(_CHUNK_BYTES // max(frame.nbytes, 1), 10), 1000))


def _codec_for(frame: Any) -> Literal["bslz4", "raw"]:
    return "bslz4" if isinstance(frame, np.ndarray) and frame.ndim else "raw"
