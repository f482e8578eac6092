"""The other side of the wire benchmark, in a process of its own: a detector, or a bare PUSH socket.

It does what it is told over a control socket, one JSON command at a time, and answers when done
with the monotonic time (ns, the same clock for all processes of a host) of its first frame.
"""

import struct
import sys
import time
from typing import Any

import zmq

from benchmarks.frames import EXPERIMENT, FrameSet
from streaming.simulator import DectrisStreamSender
from streaming.simulator.dectris import PreparedImage, finish, nearline_user_data, send_images

__all__ = ["HIGH_WATER_MARK", "N_UNIQUE", "SENT_NS"]

N_UNIQUE = 32
HIGH_WATER_MARK = 32
SENT_NS = "sent_ns"
_NS = struct.Struct("<q")


class _Sender:
    def __init__(self, size: str, detector: str, *pushes: str) -> None:
        self._frames = FrameSet.make(size, N_UNIQUE)
        self._detector = DectrisStreamSender(detector, high_water_mark=HIGH_WATER_MARK, receiver_timeout=60)
        self._pushes = [_bound_push(endpoint) for endpoint in pushes]
        self._prepared: list[PreparedImage] = []

    def start(self, run: int, n: int) -> dict[str, Any]:
        """Arm; without masks, whose 36 MB would be measured otherwise."""
        frames = self._frames
        self._detector.send_start(
            frames.simulator.header,
            frames.shape,
            frames.dtype,
            n,
            series_id=run,
            header_detail="basic",
            user_data=nearline_user_data(EXPERIMENT, run, None),
        )
        self._prepared = self._prepared or [self._detector.prepare_image(blob) for blob in frames.blobs]
        return {}

    def images(self, n: int, rate: float) -> dict[str, Any]:
        """The series to its end; at a given rate each image tells when it was sent."""
        prepared, first_ns = self._prepared, time.monotonic_ns()
        if rate:
            self._send_at(rate, n)
        else:
            send_images(self._detector, ((i, prepared[i % N_UNIQUE], None) for i in range(n)), total=n)
        self._detector.send_end()
        finish(self._detector)
        return {"first_ns": first_ns}

    def raw(self, n: int, rate: float, hops: int) -> dict[str, Any]:
        """The same blobs as they are, each behind its time of sending; to the consumer (1 hop) or the relay (2)."""
        push, first_ns = self._pushes[hops - 1], time.monotonic_ns()
        for index in range(n):
            if rate:
                time.sleep(max(first_ns / 1e9 + index / rate - time.monotonic(), 0))
            push.send(_NS.pack(time.monotonic_ns()), zmq.SNDMORE)
            push.send(self._frames.blob(index), copy=False)
        return {"first_ns": first_ns}

    def _send_at(self, rate: float, n: int) -> None:
        """On a schedule; the stamp is taken before the message is put together, which belongs to sending."""
        started = time.monotonic()
        for index in range(n):
            time.sleep(max(started + index / rate - time.monotonic(), 0))
            self._detector.send_image(index, self._frames.blob(index), {SENT_NS: time.monotonic_ns()})


def _bound_push(endpoint: str) -> "zmq.Socket[bytes]":
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    push.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    push.bind(endpoint)
    return push


def main(size: str, control: str, detector: str, *pushes: str) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
    socket.connect(control)
    sender = _Sender(size, detector, *pushes)
    while True:
        command: dict[str, Any] = socket.recv_json()  # type: ignore[assignment]
        socket.send_json(getattr(sender, command.pop("do"))(**command))


if __name__ == "__main__":
    main(*sys.argv[1:])
