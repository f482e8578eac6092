"""Sending frames into a service from a program: arrays or ready blobs, acknowledged."""

import math
import time
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from storage.codec import encode
from storage.errors import BadFrame, BufferFull, FrameTooLate, IndexConflict, NearlineError, StorageFull
from storage.frame import FrameInfo
from storage.models import DetectorHeader, StreamHeader
from streaming import wire
from streaming.client import Connection
from streaming.payload import glue_payload

__all__ = ["Producer", "RunProducer"]

_FULL_PAUSE_S = 0.05
_SCALARS = (np.generic, int, float)
_REFUSALS: dict[str, tuple[type[NearlineError], str]] = {
    "conflict": (IndexConflict, "exists already with other content; the first one is kept"),
    "late": (FrameTooLate, "came too late: its chunk was sealed without it, and the ledger counts it as late"),
    "failed": (StorageFull, "could not be written; the service's log says why"),
}


class Producer:
    """A named source of frames in an experiment.

    Parameters
    ----------
    ack : when `RunProducer.send` returns: the service has the frame in memory (``buffered``), or in
        its journal (``stored``), where `kill -9` cannot take it.
    """

    def __init__(
        self,
        address: str,
        experiment: str,
        data_source: str,
        *,
        ack: Literal["buffered", "stored"] = "stored",
    ) -> None:
        self._connection = Connection(address)
        self.experiment, self.data_source, self.ack = experiment, data_source, ack

    def run(self, run: int | None = None, *, sample: str | None = None, planned: int = 0) -> "RunProducer":
        """Start a run (without a number, the next one); a context manager that ends the stream."""
        request = wire.StartRun(id=0, experiment=self.experiment, run=run, sample=sample)
        number = self._connection.ask_json(request)["run"]
        return RunProducer(self, self._connection, number, planned)

    def derived(self, run: int, header: StreamHeader) -> "RunProducer":
        """A derived stream in a run that exists, with its header given whole."""
        producer = RunProducer(self, self._connection, run, header.planned)
        producer.start(header)
        return producer

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RunProducer:
    """Frames of one run; indices count up from 0 unless given."""

    def __init__(self, producer: Producer, connection: Connection, run: int, planned: int) -> None:
        self.run = run
        self._producer, self._connection, self._planned = producer, connection, planned
        self._header: StreamHeader | None = None
        self._next = 0

    def start(self, header: StreamHeader, pixel_mask: np.ndarray | None = None) -> None:
        """Begin the stream with a header of one's own; `send` does it from the first array otherwise."""
        mask = [] if pixel_mask is None else [np.ascontiguousarray(pixel_mask, "<u4").tobytes()]
        self._connection.ask(wire.StartStream(id=0, header=header.model_dump_json().encode()), mask)
        self._header = header

    def send(
        self,
        frame: np.ndarray | bytes | memoryview | None = None,
        *,
        meta: dict[str, Any] | None = None,
        frame_index: int | None = None,
    ) -> int:
        """Send one frame and wait for its acknowledgement; its index.

        Parameters
        ----------
        frame : an array (compressed here), bytes that are compressed already, or None for a row of a table.

        Raises
        ------
        BadFrame, ServiceUnavailable
        IndexConflict : that index exists with other content.
        FrameTooLate : its chunk was sealed without it.
        StorageFull : the service could not write it.
        """
        return self.send_many([(frame_index, frame, meta or {})])[0]

    def send_many(self, frames: list[tuple[int | None, Any, dict[str, Any]]]) -> list[int]:
        """Send (frame_index or None, frame, meta) in one message; their indices."""
        frames = [(index, np.asarray(f) if isinstance(f, _SCALARS) else f, meta) for index, f, meta in frames]
        if self._header is None:
            self._start_from(frames[0][1])
        infos, blobs, following = [], [], self._next
        for frame_index, frame, meta in frames:
            index = following if frame_index is None else frame_index
            following = max(following, index + 1)
            blob = self._blob_of(frame)
            infos.append(
                FrameInfo(
                    frame_index=index,
                    size_bytes=memoryview(blob).nbytes,
                    producer=self._producer.data_source,
                    meta=meta,
                )
            )
            blobs.append(blob)
        reply = self._put(infos, blobs)
        # Only now: a frame that was refused leaves no gap behind.
        self._next = following
        for info, outcome in zip(infos, reply.outcomes, strict=True):
            if outcome in _REFUSALS:
                kind, why = _REFUSALS[outcome]
                raise kind(f"frame {info.frame_index} of {self._producer.data_source} {why}")
        return [info.frame_index for info in infos]

    def _put(self, infos: list[FrameInfo], blobs: list[Any]) -> wire.PutReply:
        """Ask until the service has room; a producer can wait."""
        while True:
            request = wire.PutFrames(id=0, stream=self._ref, infos=infos, ack=self._producer.ack)
            try:
                # However long the disk is full: the service is there, and looked for meanwhile.
                reply, _ = self._connection.ask(request, glue_payload(blobs), timeout=math.inf)
            except BufferFull:
                time.sleep(_FULL_PAUSE_S)
                continue
            return reply

    def finish(self, announced: int = 0, *, aborted: str | None = None) -> None:
        """End the stream.

        Parameters
        ----------
        announced : number of frames, when the last ones were never sent.
        aborted : why, when this is not a regular end; the run is then *aborted*.
        """
        if self._header is None:
            self._start_from(None)  # nothing was sent: a run with an empty table, not one that never ends
        stop = max(announced, self._next)
        request = wire.FinishStream(id=0, stream=self._ref, announced=stop, aborted=aborted)
        self._connection.ask(request, timeout=math.inf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self.finish(aborted=f"the producer ended with {kind.__name__}" if kind else None)

    @property
    def _ref(self) -> wire.StreamRef:
        return wire.StreamRef(self._producer.experiment, self.run, self._producer.data_source)

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
                detector=DetectorHeader() if frame is not None and frame.ndim == 2 else None,
            )
        )

    def _blob_of(self, frame: Any) -> Any:
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
        return encode(frame, self._header.codec)


def _codec_for(frame: Any) -> Literal["bslz4", "raw"]:
    return "bslz4" if isinstance(frame, np.ndarray) and frame.ndim else "raw"
