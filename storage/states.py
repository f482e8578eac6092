"""The state of every frame index of a stream, and the ledger that must balance.

Each index below ``announced`` is in exactly one state. Pending means that nobody knows yet:
allowed while a run is live, an imbalance once it has ended.
"""

from enum import IntEnum

import numpy as np
from pydantic import Field

from storage.models import Model

__all__ = ["FrameState", "IndexStates", "StateRange", "StreamLedger"]


class FrameState(IntEnum):
    """What is known of one frame index."""

    pending = 0
    stored = 1
    missing = 2
    rejected = 3


class StateRange(Model):
    """Frames ``start <= frame_index < stop`` in one state, with the cause where there is one."""

    state: str
    start: int
    stop: int
    cause: str | None = None


class IndexStates:
    """One byte per frame index, grown as needed; written by one thread, readable from any."""

    def __init__(self) -> None:
        self._codes = np.zeros(1024, np.uint8)
        self._causes: dict[int, str] = {}
        self.announced = 0
        self._watermark = 0

    def __getitem__(self, index: int) -> FrameState:
        return FrameState(int(self._codes[index])) if 0 <= index < self.announced else FrameState.pending

    def set(self, start: int, stop: int, state: FrameState, cause: str | None = None) -> None:
        """Put ``start <= index < stop`` into a state; the stream is announced at least to ``stop``."""
        self.announce(stop)
        self._codes[start:stop] = state
        for index in range(start, stop):
            if cause:
                self._causes[index] = cause
            else:
                self._causes.pop(index, None)

    def announce(self, stop: int) -> None:
        """Make indices below ``stop`` known to exist."""
        if stop > len(self._codes):
            grown = np.zeros(max(stop, 2 * len(self._codes)), np.uint8)
            grown[: len(self._codes)] = self._codes
            self._codes = grown
        self.announced = max(self.announced, stop)

    @property
    def watermark(self) -> int:
        """The first index still pending: all before it are final enough to be handed out."""
        codes, at = self._codes, self._watermark
        while at < self.announced and codes[at]:
            nothing = np.flatnonzero(codes[at : self.announced] == 0)[:1]
            at = at + int(nothing[0]) if nothing.size else self.announced
        self._watermark = at
        return at

    def count(self, state: FrameState, start: int = 0, stop: int | None = None) -> int:
        """How many announced indices are in a state."""
        stop = self.announced if stop is None else min(stop, self.announced)
        return int(np.count_nonzero(self._codes[start:stop] == state))

    def indices(self, state: FrameState, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The announced indices in a state, rising, int64."""
        stop = self.announced if stop is None else min(stop, self.announced)
        return np.flatnonzero(self._codes[start:stop] == state) + start

    def cause(self, index: int) -> str:
        """Why an index is missing or was rejected; ``unknown`` when nobody could tell."""
        return self._causes.get(index, "unknown")

    def ranges(self, start: int = 0, stop: int | None = None) -> list[StateRange]:
        """Runs of equal state and cause over the announced indices, in order, without gaps."""
        stop = self.announced if stop is None else min(stop, self.announced)
        found: list[StateRange] = []
        codes = self._codes[start:stop]
        edges = np.flatnonzero(np.diff(codes)) + 1
        for begin, end in zip([0, *edges], [*edges, len(codes)], strict=True):
            if end > begin:
                found += self._split_by_cause(FrameState(int(codes[begin])), start + int(begin), start + int(end))
        return found

    def _split_by_cause(self, state: FrameState, start: int, stop: int) -> list[StateRange]:
        if state in (FrameState.stored, FrameState.pending):
            return [StateRange(state=state.name, start=start, stop=stop)]
        found, begin = [], start
        for index in range(start + 1, stop + 1):
            if index == stop or self.cause(index) != self.cause(begin):
                found.append(StateRange(state=state.name, start=begin, stop=index, cause=self.cause(begin)))
                begin = index
        return found


class StreamLedger(Model):
    """Every frame of a stream accounted for, DESIGN promise 3.

    ``announced`` = received + missing + rejected (+ pending while live) and
    ``received`` = buffered + stored + vetoed + pruned; duplicates and late frames are counted
    beside, since their indices are accounted for already.
    """

    data_source: str
    planned: int = Field(0, description="frames the source meant to send; 0 when unknown")
    announced: int = Field(0, description="highest index known to exist, plus one")
    received: int = 0
    missing: int = 0
    rejected: int = 0
    pending: int = 0
    duplicate: int = 0
    late: int = 0
    buffered: int = Field(0, description="received, in memory only")
    stored: int = Field(0, description="received, in the journal or a shard")
    vetoed: int = 0
    pruned: int = 0
    ranges: list[StateRange] = Field(default_factory=list, description="missing and rejected frames with their cause")
    is_terminal: bool = False

    @property
    def problems(self) -> list[str]:
        """What does not add up, in words; empty when the ledger balances."""
        found = []
        if self.announced != self.received + self.missing + self.rejected + self.pending:
            found.append(
                f"{self.data_source}: {self.announced} frames announced, but {self.received} received + {self.missing} "
                f"missing + {self.rejected} rejected + {self.pending} pending"
            )
        if self.received != self.buffered + self.stored + self.vetoed + self.pruned:
            found.append(
                f"{self.data_source}: {self.received} frames received, but {self.buffered} buffered + {self.stored} "
                f"stored + {self.vetoed} vetoed + {self.pruned} pruned"
            )
        if self.is_terminal and self.pending:
            found.append(f"{self.data_source}: the run has ended with {self.pending} frames in no state")
        if self.is_terminal and self.buffered:
            found.append(f"{self.data_source}: the run has ended with {self.buffered} frames in memory only")
        return found

    @property
    def is_balanced(self) -> bool:
        return not self.problems
