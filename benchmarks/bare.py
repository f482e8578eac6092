"""The bare limit of the service: three threads that receive, write and serve, and nothing else.

No catalog, groups, checksums or ledger, no look into a message: what comes from the sender is
appended to one plain file and goes to one consumer who asks for it. As fast as such a process
can be made with the same libraries: messages are never copied, the high-water marks are the
service's, a consumer asks ahead. `BareLoop` is its consumer's side.
"""

import os
import queue
import sys
import threading
import time
from collections import deque
from pathlib import Path

import zmq

from benchmarks.frames import FramesLost

__all__ = ["BareLoop"]

_RECEIVE_QUEUE = 8
_SEND_QUEUE = 64
# Messages received and not yet handed on; what a service holds in its buffer.
_MOST_HELD = 256
# Messages a consumer asks for ahead, and how many it takes before it asks for as many again.
_AHEAD, _ASK_AGAIN = 32, 8
_PATIENCE_MS = 60_000
_BEGIN, _END = b"begin", b"end"


class _Loop:
    """The process: one thread receives, one writes, one serves."""

    def __init__(self, incoming: str, serving: str, path: Path, sync_s: float) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._pull, self._router = context.socket(zmq.PULL), context.socket(zmq.ROUTER)
        self._pull.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        self._router.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        self._pull.connect(incoming)
        self._router.bind(serving)
        self._path, self._sync_s, self._size = path, sync_s, 0
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
        self._room = threading.Semaphore(_MOST_HELD)
        self._received: queue.SimpleQueue[zmq.Frame] = queue.SimpleQueue()
        self._written: deque[zmq.Frame] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)

    def run(self) -> None:
        threads = [self._receive, self._write] + ([self._sync] if self._sync_s else [])
        for target in threads:
            threading.Thread(target=target, daemon=True).start()
        self._serve()

    def _receive(self) -> None:
        while True:
            message = self._pull.recv(copy=False)
            self._room.acquire()
            self._received.put(message)
            del message  # or its memory is held until the next one comes

    def _write(self) -> None:
        while True:
            message = self._received.get()
            self._size += os.pwrite(self._fd, message.buffer, self._size)
            self._written.append(message)
            del message
            os.eventfd_write(self._wake, 1)

    def _sync(self) -> None:
        while True:
            time.sleep(self._sync_s)
            os.fdatasync(self._fd)

    def _serve(self) -> None:
        poller, identity, credit = zmq.Poller(), b"", 0
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._router in ready:
                identity, asked = self._router.recv_multipart()
                if asked in (_BEGIN, _END):
                    credit = 0
                    self._router.send_multipart([identity, str(self._turn(asked)).encode()])
                else:
                    credit += int(asked)
            while credit and self._written:
                self._router.send(identity, zmq.SNDMORE)
                self._router.send(self._written.popleft(), copy=False)
                self._room.release()
                credit -= 1

    def _turn(self, what: bytes) -> int:
        """A series begins in an empty file; at its end the consumer hears how long the file is."""
        if what == _BEGIN:
            os.ftruncate(self._fd, 0)
            self._size = 0
        return os.fstat(self._fd).st_size


class BareLoop:
    """The consumer of a bare loop: all messages of a series, asked for ahead."""

    def __init__(self, serving: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, _PATIENCE_MS)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(serving)

    def begin(self) -> None:
        """Before the first message is sent: the file is emptied."""
        self._socket.send(_BEGIN)
        self._socket.recv()

    def drain(self, n: int) -> int:
        """Take n messages: monotonic ns of the last one's coming.

        Raises
        ------
        FramesLost : the file does not hold what came.
        """
        self._socket.send(str(_AHEAD).encode())
        n_bytes = 0
        for number in range(1, n + 1):
            n_bytes += len(self._socket.recv(copy=False))
            if number % _ASK_AGAIN == 0:
                self._socket.send(str(_ASK_AGAIN).encode())
        last_ns = time.monotonic_ns()
        self._socket.send(_END)
        size = int(self._socket.recv())
        if size != n_bytes:
            raise FramesLost(f"{n_bytes} bytes came through the bare loop, but its file has {size}")
        return last_ns

    def close(self) -> None:
        self._socket.close()


if __name__ == "__main__":
    _Loop(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])).run()
