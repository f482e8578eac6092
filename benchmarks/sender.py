"""The other side of the wire benchmarks, in a process of its own: a detector, a producer, or a peer's client.

It does what it is told over a control socket, one JSON command at a time, and answers when done
with the monotonic time (ns, the same clock for all processes of a host) of its first frame.
"""

import json
import pickle
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zmq

from benchmarks import jetstream, redis_streams
from benchmarks.frames import EXPERIMENT, METADATA, SMALL_BLOBS, SOURCE, FrameSet
from storage.models import StreamHeader
from streaming.producer import Producer, RunProducer
from streaming.simulator import DectrisStreamSender
from streaming.simulator.dectris import PreparedImage, finish, nearline_user_data, send_images

__all__ = ["HIGH_WATER_MARK", "SENT_NS"]

HIGH_WATER_MARK = 32
SENT_NS = "sent_ns"
_NS = struct.Struct("<q")


class _Detector:
    """A DECTRIS detector, its images encoded once."""

    def __init__(self, endpoint: str) -> None:
        self._sender = DectrisStreamSender(endpoint, high_water_mark=HIGH_WATER_MARK, receiver_timeout=60)
        self._prepared: list[PreparedImage] = []

    def start(self, frames: FrameSet, run: int, n: int) -> None:
        """Arm; without masks, whose 36 MB would be measured otherwise."""
        self._sender.send_start(
            frames.simulator.header,
            frames.shape,
            frames.dtype,
            n,
            series_id=run,
            header_detail="basic",
            user_data=nearline_user_data(EXPERIMENT, run, None),
        )
        self._prepared = self._prepared or [self._sender.prepare_image(blob) for blob in frames.blobs]

    def images(self, n: int) -> None:
        prepared = self._prepared
        send_images(self._sender, ((i, prepared[i % len(prepared)], None) for i in range(n)), total=n)
        self._end()

    def images_at(self, rate: float, frames: FrameSet, n: int) -> None:
        """On a schedule; the stamp is taken before the message is put together, which belongs to sending."""
        for index in _on_schedule(rate, n):
            self._sender.send_image(index, frames.blob(index), {SENT_NS: time.monotonic_ns()})
        self._end()

    def _end(self) -> None:
        self._sender.send_end()
        finish(self._sender)


class _Sender:
    """What can be told to do; each method answers with what the consumer must know."""

    def __init__(self, frames: FrameSet, service: str, detectors: Sequence[str], pushes: Sequence[str]) -> None:
        self._frames, self._service = frames, service
        self._detectors = [_Detector(endpoint) for endpoint in detectors]
        self._pushes = [_bound_push(endpoint) for endpoint in pushes]
        self._run: RunProducer | None = None

    def start(self, detector: int, run: int, n: int) -> dict[str, Any]:
        self._detectors[detector].start(self._frames, run, n)
        return {}

    def images(self, detector: int, n: int, rate: float) -> dict[str, Any]:
        """The series to its end; at a given rate each image tells when it was sent."""
        first_ns = time.monotonic_ns()
        if rate:
            self._detectors[detector].images_at(rate, self._frames, n)
        else:
            self._detectors[detector].images(n)
        return {"first_ns": first_ns}

    def raw(self, n: int, rate: float, hops: int) -> dict[str, Any]:
        """The same blobs as they are, each behind its time of sending; to the consumer (1 hop) or the relay (2)."""
        push, frames, first_ns = self._pushes[hops - 1], self._frames, time.monotonic_ns()
        for index in _on_schedule(rate, n):
            push.send(_NS.pack(time.monotonic_ns()), zmq.SNDMORE)
            push.send(frames.blob(index), copy=False)
        return {"first_ns": first_ns}

    def start_frames(self, run: int, n: int, ack: str) -> dict[str, Any]:
        """A run of frames from a producer."""
        self._run = self._producer(ack).run(run, planned=n)
        self._run.start(self._frames.header(run, n, 100))
        return {}

    def start_rows(self, run: int, n: int, ack: str) -> dict[str, Any]:
        """A run of rows without payload, in chunks as a producer makes them that is told nothing."""
        self._run = self._producer(ack).run(run, planned=n)
        header = StreamHeader(
            experiment=EXPERIMENT, run=run, data_source=SOURCE, kind="table", planned=n, frames_per_chunk=10_000
        )
        self._run.start(header)
        return {}

    def frames(self, n: int, rate: float) -> dict[str, Any]:
        """The producer's frames to its run's end, many under way; all acknowledged, and at a rate with their times."""
        run, frames, first_ns = self._open_run(), self._frames, time.monotonic_ns()
        for index in _on_schedule(rate, n):
            run.put(frames.blob(index), meta={SENT_NS: time.monotonic_ns()} if rate else None)
        run.flush()
        run.finish()
        return {"first_ns": first_ns}

    def rows(self, n: int, one_by_one: bool) -> dict[str, Any]:
        """Rows of 1 kB, many under way or each waiting for its own answer: when the last was acknowledged."""
        run, first_ns = self._open_run(), time.monotonic_ns()
        for _ in range(n):
            if one_by_one:
                run.send(None, meta=METADATA)
            else:
                run.put(None, meta=METADATA)
        run.flush()
        last_ns = time.monotonic_ns()
        run.finish()
        return {"first_ns": first_ns, "last_ns": last_ns}

    def redis(self, port: int, n: int, small: bool) -> dict[str, Any]:
        return redis_streams.send(port, self._blobs(small), n)

    def nats(self, port: int, n: int, small: bool) -> dict[str, Any]:
        return jetstream.send(port, self._blobs(small), n)

    def _blobs(self, small: bool) -> Sequence[bytes]:
        return SMALL_BLOBS if small else self._frames.blobs

    def _producer(self, ack: str) -> Producer:
        return Producer(self._service, EXPERIMENT, SOURCE, ack=ack)  # type: ignore[arg-type]

    def _open_run(self) -> RunProducer:
        assert self._run is not None, "start comes first"
        return self._run


def _on_schedule(rate: float, n: int) -> Iterator[int]:
    """0 to n - 1, each when it is due; without a rate at once."""
    started = time.monotonic()
    for index in range(n):
        if rate:
            time.sleep(max(started + index / rate - time.monotonic(), 0))
        yield index


def _bound_push(endpoint: str) -> "zmq.Socket[bytes]":
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    push.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    push.bind(endpoint)
    return push


def main(control: str, service: str, detectors: Sequence[str], pushes: Sequence[str], frames: str) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
    socket.connect(control)
    # Simulated by whoever started this: it takes seconds, and both need the same.
    sender = _Sender(pickle.loads(Path(frames).read_bytes()), service, detectors, pushes)
    while True:
        command: dict[str, Any] = socket.recv_json()  # type: ignore[assignment]
        what = command.pop("do")
        if what == "echo":
            _echo(socket, **command)
        else:
            socket.send_json(getattr(sender, what)(**command))


def _echo(socket: "zmq.Socket[bytes]", n: int) -> None:
    """Send the next n messages back as they are: the limit of anything that asks and waits for an answer."""
    socket.send_json({})
    for _ in range(n):
        socket.send(socket.recv())


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
