"""Chunks of a run, submitted for analysis as they are sealed and handed on in order."""

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator

from flows.execution import Promise
from streaming.retrieval import Chunk, Stream
from tasks.chunk_job import ChunkJob

__all__ = ["ChunkFeeder"]


class ChunkFeeder:
    """Submits chunks as they are sealed, in a thread of its own, and hands them on in order with their promises.

    The queue is the back-pressure: when analysis is slower than the detector, chunks wait on disk, not in memory.
    """

    def __init__(self, stream: Stream, submit: Callable[[Chunk], tuple[ChunkJob, Promise]], n_ahead: int) -> None:
        self._stream, self._submit = stream, submit
        self._queue: queue.Queue[tuple[Chunk, ChunkJob, Promise] | BaseException | None] = queue.Queue(n_ahead)
        self._is_over = threading.Event()
        # Prefect knows by context which flow run a task belongs to.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: context.run(self._feed), name="feeder", daemon=True)

    def __enter__(self) -> "ChunkFeeder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A live run may not have another chunk for long: the thread sees at the next one that nobody wants it.
        self._is_over.set()

    def __iter__(self) -> Iterator[tuple[Chunk, ChunkJob, Promise]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _feed(self) -> None:
        try:
            for chunk in self._stream.chunks():
                if self._is_over.is_set() or not self._put((chunk, *self._submit(chunk))):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: "tuple[Chunk, ChunkJob, Promise] | BaseException | None") -> bool:
        while not self._is_over.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
