"""A worker: one thread that does jobs in order, away from the server thread.

The service has two. The *librarian* fetches from disk what is not in memory any more: a reader that
has fallen behind waits for it, those that read from memory never do. The *intake* checks and
hashes large frames of producers.
"""

import logging
import queue
import threading
from collections.abc import Callable

__all__ = ["Worker"]

log = logging.getLogger("nearline.worker")


class Worker(threading.Thread):
    """Does what it is told, one job after the other; a job reports by itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def do(self, job: Callable[[], None]) -> None:
        """Queue a job."""
        self._queue.put(job)

    def stop(self) -> None:
        """Finish what is queued, then end."""
        self._queue.put(None)
        self.join()

    def run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job of the %s failed", self.name)
