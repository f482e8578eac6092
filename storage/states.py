"""The state of every frame index of a stream, and the ledger that must balance.

Each index below ``announced`` is in exactly one state. Pending means that nobody knows yet:
allowed while a run is live, an imbalance once it has ended.
"""

import itertools
from enum import IntEnum

import numpy as np
from pydantic import Field

from storage.models import Record, StreamHeader

__all__ = ["READABLE", "FrameState", "IndexStates", "StateRange", "StreamLedger", "build_ledger"]


class FrameState(IntEnum):
    """What is known of one frame index."""

    pending = 0
    stored = 1
    missing = 2
    rejected = 3
    # Came after its chunk was sealed without it; kept in an amendment segment.
    late = 4
    # Some of its parts came, the others never did.
    incomplete = 5
    # Was in memory only, of a stream that is not written to disk, and had to make room.
    pruned = 6
    # In memory only, of a stream that is not written to disk.
    buffered = 7
    # Was stored, and was removed on purpose by a veto; its row stays.
    vetoed = 8
    # Of a stream that holds a selection of its parent's frames: was not selected.
    left_out = 9


# A frame that can be read, whole or in part.
READABLE = (FrameState.stored, FrameState.late, FrameState.incomplete, FrameState.buffered)
# What is not there, in whole or in part, has a reason.
_HAVE_CAUSE = (
    FrameState.missing, FrameState.rejected, FrameState.incomplete, FrameState.pruned, FrameState.vetoed,
    FrameState.left_out,
)  # fmt: skip
# What a ledger lists. Not the vetoed, nor those left out: they lie between hits, in as many ranges; the commits have
# them.
_LISTED = (
    FrameState.missing, FrameState.rejected, FrameState.incomplete, FrameState.late, FrameState.pruned,
)  # fmt: skip
_STATES = tuple(FrameState)
_READABLE_CODES = frozenset(map(int, READABLE))
_IS_READABLE = np.array([state in READABLE for state in FrameState])
_HAS_ROW = np.array([state in (*READABLE, FrameState.vetoed) for state in FrameState])


class StateRange(Record):
    """Frames ``start <= frame_index < stop`` in one state, with the cause where there is one."""

    state: str
    start: int
    stop: int
    cause: str | None = None


class IndexStates:
    """A state and a cause per frame index, grown as needed; written by one thread, readable from any.

    Readers take ``announced`` before the arrays: those are replaced by longer ones first.
    """

    def __init__(self) -> None:
        self._codes = np.zeros(1024, np.uint8)
        # Which of the known causes each index has: a million missing frames share one string.
        self._cause_of = np.zeros(1024, np.uint32)
        self._causes: list[str] = ["unknown"]
        self._cause_numbers: dict[str, int] = {}
        self.announced = 0
        # Frames that could be read only after they had been given up, in the order they came: a group
        # that has passed them still gets them.
        self.late_order: list[int] = []
        self._watermark = 0

    def __getitem__(self, index: int) -> FrameState:
        return _STATES[self._codes[index]] if 0 <= index < self.announced else FrameState.pending

    def set(self, start: int, stop: int, state: FrameState, cause: str | None = None) -> None:
        """Put ``start <= index < stop`` into a state; the stream is announced at least to ``stop``."""
        passed = self._given_up(start, stop, state)
        self.announce(stop)
        self._cause_of[start:stop] = self._number_of(state, cause)
        self._codes[start:stop] = state
        self.late_order.extend(passed)

    def _given_up(self, start: int, stop: int, state: FrameState) -> list[int]:
        """Of indices that become readable, those that readers may have passed: the watermark was beyond them.

        Not only frames that miss the seal: one that was declared missing after a gap time-out may come before it.
        """
        if state is FrameState.late:
            return list(range(start, stop))
        if start >= self.announced or state not in READABLE:  # a new frame: the usual case
            return []
        before = self._codes[start:stop]
        return (np.flatnonzero((before != FrameState.pending) & ~_IS_READABLE[before]) + start).tolist()

    def is_readable(self, index: int) -> bool:
        """Whether a frame is there to be read, whole or in part."""
        return 0 <= index < self.announced and self._codes.item(index) in _READABLE_CODES

    def readable(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The announced indices whose frames can be read, rising, int64."""
        start, stop = self._announced_range(start, stop)
        return np.flatnonzero(_IS_READABLE[self._codes[start:stop]]) + start

    def with_rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The announced indices of which there is a row, rising, int64: readable or vetoed."""
        start, stop = self._announced_range(start, stop)
        return np.flatnonzero(_HAS_ROW[self._codes[start:stop]]) + start

    def account(self, start: int, stop: int, state: FrameState, cause: str | None) -> None:
        """Put those indices of a range that are still pending into a state."""
        self.announce(stop)
        pending = self._codes[start:stop] == FrameState.pending
        self._cause_of[start:stop][pending] = self._number_of(state, cause)
        self._codes[start:stop][pending] = state

    def announce(self, stop: int) -> None:
        """Make indices below ``stop`` known to exist."""
        if stop > len(self._codes):
            size = max(stop, 2 * len(self._codes))
            self._cause_of = np.concatenate([self._cause_of, np.zeros(size - len(self._cause_of), np.uint32)])
            self._codes = np.concatenate([self._codes, np.zeros(size - len(self._codes), np.uint8)])
        self.announced = max(self.announced, stop)

    @property
    def watermark(self) -> int:
        """The first index still pending: all before it are final enough to be handed out."""
        announced = self.announced
        codes, at = self._codes, self._watermark
        if at < announced and codes[at]:
            open_ones = codes[at:announced] == FrameState.pending
            first = int(open_ones.argmax())
            at = at + first if open_ones[first] else announced
            self._watermark = at
        return at

    def count(self, state: FrameState, start: int = 0, stop: int | None = None) -> int:
        """How many announced indices are in a state."""
        start, stop = self._announced_range(start, stop)
        return int(np.count_nonzero(self._codes[start:stop] == state))

    def counts(self) -> dict[FrameState, int]:
        """How many announced indices are in each state, at one moment: they add up while others write."""
        numbers = np.bincount(self._codes[: self.announced], minlength=len(FrameState))
        return dict(zip(FrameState, numbers.tolist(), strict=True))

    def indices(self, state: FrameState, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The announced indices in a state, rising, int64."""
        start, stop = self._announced_range(start, stop)
        return np.flatnonzero(self._codes[start:stop] == state) + start

    def cause(self, index: int) -> str:
        """Why an index is missing or was rejected; ``unknown`` when nobody could tell."""
        return self._causes[int(self._cause_of[index])] if 0 <= index < self.announced else self._causes[0]

    def ranges(self, start: int = 0, stop: int | None = None) -> list[StateRange]:
        """Runs of equal state and cause over the announced indices, in order, without gaps."""
        start, stop = self._announced_range(start, stop)
        codes, cause_of = self._codes[start:stop], self._cause_of[start:stop]
        edges = np.flatnonzero((codes[1:] != codes[:-1]) | (cause_of[1:] != cause_of[:-1])) + 1
        limits = [0, *edges.tolist(), len(codes)] if len(codes) else []
        return [self._range(start + begin, start + end) for begin, end in itertools.pairwise(limits)]

    def _range(self, start: int, stop: int) -> StateRange:
        state = self[start]
        cause = self.cause(start) if state in _HAVE_CAUSE else None
        return StateRange(state=state.name, start=start, stop=stop, cause=cause)

    def _announced_range(self, start: int, stop: int | None) -> tuple[int, int]:
        """The part of a range that is announced; whatever a caller asks for, 0 <= start <= stop."""
        stop = self.announced if stop is None else min(max(stop, 0), self.announced)
        return min(max(start, 0), stop), stop

    def _number_of(self, state: FrameState, cause: str | None) -> int:
        if not cause or cause == self._causes[0] or state not in _HAVE_CAUSE:
            return 0
        if cause not in self._cause_numbers:
            self._causes.append(cause)
            self._cause_numbers[cause] = len(self._causes) - 1
        return self._cause_numbers[cause]


class StreamLedger(Record):
    """Every frame of a stream accounted for, DESIGN promise 3.

    ``announced`` = received + missing + rejected + late + left_out (+ pending while live) and
    ``received`` = buffered + stored + incomplete + vetoed + pruned; duplicates are counted beside,
    since their indices are accounted for already.
    """

    data_source: str
    planned: int = Field(0, description="frames the source meant to send; 0 when unknown")
    announced: int = Field(0, description="highest index known to exist, plus one")
    received: int = Field(0, description="came in time, whole or in part, and usable")
    missing: int = Field(0, description="never came")
    rejected: int = Field(0, description="came, but cannot be used")
    late: int = Field(0, description="came after their chunk was sealed; kept in an amendment segment")
    pending: int = Field(0, description="not known yet; none once the stream has ended")
    left_out: int = Field(0, description="of a selection, such as a stream of hits: not selected")
    duplicate: int = Field(0, description="sent again with the same content by somebody else; not in the sums")
    buffered: int = Field(0, description="received, in memory only")
    stored: int = Field(0, description="received, all of it in the journal or a shard")
    incomplete: int = Field(0, description="received, but some parts never came")
    vetoed: int = Field(0, description="received, and removed on purpose by a veto")
    pruned: int = Field(0, description="received, but not written to disk, and no longer in memory")
    ranges: list[StateRange] = Field(
        default_factory=list,
        description="missing, rejected, incomplete, late and pruned frames, with the cause if there is one",
    )
    is_terminal: bool = False
    is_online: bool = Field(False, description="a stream in memory only: frames may stay there beyond its end")

    @property
    def problems(self) -> list[str]:
        """What does not add up, in words; empty when the ledger balances."""
        found = []
        known = self.received + self.missing + self.rejected + self.late + self.left_out
        if self.announced != known + self.pending:
            found.append(
                f"{self.data_source}: {self.announced} frames announced, but {self.received} received + {self.missing} "
                f"missing + {self.rejected} rejected + {self.late} late + {self.left_out} left out + "
                f"{self.pending} pending"
            )
        if self.received != self.buffered + self.stored + self.incomplete + self.vetoed + self.pruned:
            found.append(
                f"{self.data_source}: {self.received} frames received, but {self.buffered} buffered + {self.stored} "
                f"stored + {self.incomplete} incomplete + {self.vetoed} vetoed + {self.pruned} pruned"
            )
        if self.is_terminal and self.pending:
            found.append(f"{self.data_source}: the run has ended with {self.pending} frames in no state")
        if self.is_terminal and self.buffered and not self.is_online:
            found.append(f"{self.data_source}: the run has ended with {self.buffered} frames in memory only")
        return found

    @property
    def is_balanced(self) -> bool:
        return not self.problems

    @property
    def n_taken(self) -> int:
        """Frames that came whole and were kept as the stream promises: on disk, or in memory for a while."""
        return self.received - self.incomplete - self.vetoed if self.is_online else self.stored + self.late

    def without_memory(self) -> "StreamLedger":
        """What is left of it when the service's memory is gone."""
        if not self.is_online:
            return self
        pruned = self.pruned + self.buffered + self.incomplete
        return self.model_copy(update={"buffered": 0, "incomplete": 0, "pruned": pruned})


def build_ledger(header: StreamHeader, states: IndexStates, duplicate: int, *, is_terminal: bool) -> StreamLedger:
    """The ledger that the states of all indices add up to."""
    counts = states.counts()
    came_in = (
        FrameState.buffered, FrameState.stored, FrameState.incomplete, FrameState.vetoed, FrameState.pruned,
    )  # fmt: skip
    came = {state: counts[state] for state in came_in}
    return StreamLedger(
        data_source=header.data_source,
        planned=header.planned,
        announced=sum(counts.values()),
        received=sum(came.values()),
        missing=counts[FrameState.missing],
        rejected=counts[FrameState.rejected],
        late=counts[FrameState.late],
        pending=counts[FrameState.pending],
        left_out=counts[FrameState.left_out],
        duplicate=duplicate,
        **{state.name: n for state, n in came.items()},
        ranges=[r for r in states.ranges() if FrameState[r.state] in _LISTED],
        is_terminal=is_terminal,
        is_online=header.is_online,
    )
