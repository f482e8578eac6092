"""The publisher: seals chunks and ends streams, in a thread of its own.

Sealing waits for the disk (10 ms and more for a chunk); here no frame and no reader waits with
it. Whatever the disk refuses is tried again: the journals hold everything stored.
"""

import logging
import queue
import threading
import time
from typing import Protocol

from storage.errors import NearlineError, StreamOwned
from storage.run_folder import ChunkCommit
from streaming.live_stream import LiveStream
from streaming.metrics import ServiceMetrics
from streaming.writer import DiskState

__all__ = ["Publisher"]

log = logging.getLogger("nearline.publisher")

_RETRY_S = 0.5
# Chunks of one stream sealed at one go; a detector that jumps leaves thousands of empty ones.
_SEAL_AT_ONCE = 8


class Hooks(Protocol):
    """What the publisher tells the recorder; called from the publisher thread."""

    def sealed(self, stream: LiveStream, commit: ChunkCommit) -> None: ...

    def ending(self, stream: LiveStream) -> None:
        """All chunks are sealed and the stream's end is recorded; not told to anyone yet."""
        ...

    def ended(self, stream: LiveStream) -> None: ...

    def lost(self, stream: LiveStream, error: NearlineError) -> None:
        """Another service owns the stream now."""
        ...


class Publisher(threading.Thread):
    """Looks after streams with chunks to seal, or an end to record, one after the other."""

    def __init__(self, disk: DiskState, metrics: ServiceMetrics, hooks: Hooks) -> None:
        super().__init__(name="publisher", daemon=True)
        self._disk, self._metrics, self._hooks = disk, metrics, hooks
        self._queue: queue.SimpleQueue[LiveStream | None] = queue.SimpleQueue()
        self._again: list[tuple[float, LiveStream]] = []
        self._is_stopping = False

    def look_after(self, stream: LiveStream) -> None:
        """There is something to seal, or to end."""
        self._queue.put(stream)

    def stop(self) -> None:
        """Do what is queued, as far as the disk allows, then end."""
        self._is_stopping = True
        self._queue.put(None)
        self.join()

    def run(self) -> None:
        while True:
            try:
                stream = self._queue.get(timeout=_RETRY_S)
            except queue.Empty:
                self._retry()
                continue
            if stream is not None:
                self._look_after(stream)
                self._retry()
            elif self._queue.empty():
                self._retry(everything=True)
                return
            else:
                self._queue.put(None)  # what is still to seal comes first

    def _retry(self, *, everything: bool = False) -> None:
        now = time.monotonic()
        due = [stream for at, stream in self._again if everything or at <= now]
        self._again = [(at, stream) for at, stream in self._again if not (everything or at <= now)]
        for stream in due:
            self._look_after(stream)

    def _look_after(self, stream: LiveStream) -> None:
        try:
            self._publish(stream)
        except StreamOwned as error:
            log.error("%s", error)
            stream.to_seal.clear()
            self._hooks.lost(stream, error)
        except OSError as error:
            self._disk.refuses(error)
            self._postpone(stream)
        except Exception:
            log.exception("%s could not be sealed; its journals hold its frames, trying again", stream.key)
            self._postpone(stream)

    def _postpone(self, stream: LiveStream) -> None:
        if self._is_stopping:
            log.error("%s was not sealed to its end; the next service on this data folder does it", stream.key)
        else:
            self._again.append((time.monotonic() + _RETRY_S, stream))

    def _publish(self, stream: LiveStream) -> None:
        for _ in range(_SEAL_AT_ONCE):
            if not stream.to_seal:
                break
            with self._metrics.seal.timed():
                commit = stream.store.seal(stream.to_seal[0])
            stream.to_seal.popleft()
            self._disk.accepts()
            self._hooks.sealed(stream, commit)
        if stream.to_seal:
            self._queue.put(stream)  # behind those that wait meanwhile
        elif stream.is_finishing and not stream.is_ended:
            if not stream.store.is_finished:
                stream.store.end_finish()
            self._hooks.ending(stream)
            stream.is_ended = True
            self._hooks.ended(stream)
