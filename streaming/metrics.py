"""What a service counts while it works: cheap enough for the frame path, and free of any library.

`ServiceMetrics` has a counter or histogram for each thing that an operator asks about; whoever
does the work calls ``add`` or ``observe``, from any thread. Both take well under a microsecond.
"""

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["BOUNDS_S", "Counter", "Histogram", "ServiceMetrics", "resident_bytes"]

# Upper edges of the buckets, s: from a small append to the page cache to a disk that has stopped.
BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Counter:
    """A number that only grows while the service lives."""

    __slots__ = ("_lock", "value")

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, n: int = 1) -> None:
        with self._lock:
            self.value += n


class Histogram:
    """How long something takes: the number of times in each bucket, with sum and longest."""

    __slots__ = ("_counts", "_lock", "_longest_s", "_sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = self._longest_s = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        """Count one duration; a negative one, of a clock that was set back, counts as none."""
        if seconds < 0:
            seconds = 0.0
        at = bisect_left(BOUNDS_S, seconds)
        with self._lock:
            self._counts[at] += 1
            self._sum_s += seconds
            if seconds > self._longest_s:
                self._longest_s = seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Observe how long a block takes, also one that fails; about 2 µs, for what is not done per frame."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.observe(time.perf_counter() - began)

    def as_dict(self) -> dict[str, Any]:
        """Counts per bucket (not cumulative; the last is for what is longer than every bound), sum and longest."""
        with self._lock:
            return {"counts": list(self._counts), "sum_s": self._sum_s, "longest_s": self._longest_s}


class ServiceMetrics:
    """All that a service counts. ``as_dict`` goes into its status under ``metrics``."""

    def __init__(self) -> None:
        self.frames_received, self.bytes_received = Counter(), Counter()
        self.frames_stored, self.bytes_stored = Counter(), Counter()
        self.frames_delivered, self.bytes_delivered = Counter(), Counter()
        self.requests, self.requests_denied = Counter(), Counter()
        # One append to the journal; from the arrival of a frame until it is stored; one group sync;
        # one chunk from complete to published; one shard from sealed to its object store.
        self.write, self.store, self.sync, self.seal, self.upload = (Histogram() for _ in range(5))

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values: ``counters`` by name, ``histograms`` by name, and the histograms' ``bounds_s``."""
        members = vars(self)
        return {
            "counters": {name: m.value for name, m in members.items() if isinstance(m, Counter)},
            "histograms": {name: m.as_dict() for name, m in members.items() if isinstance(m, Histogram)},
            "bounds_s": BOUNDS_S,
        }


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not tell (only Linux does so cheaply)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0
