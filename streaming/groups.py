"""Consumer groups: who has which frame, and what is done.

A group hands out each frame of a stream once, in index order, to whichever member asks. A frame
is leased for a while; without an acknowledgement it is leased again, to anyone, with a
higher delivery count. Acknowledgements carry the lease, so one that comes too late is refused.
State is kept in SQLite: everything below ``floor`` is acknowledged, and some above it; after
a restart what was handed out and not acknowledged is delivered again. A lost acknowledgement
means redelivery, never loss.
"""

import heapq
import itertools
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from storage.errors import StaleLease
from storage.states import FrameState, IndexStates

__all__ = ["Group", "GroupKey", "GroupLog", "Lease"]

GroupKey = tuple[str, int, str, str]


@dataclass(frozen=True, slots=True)
class Lease:
    """One frame in one member's hands until ``deadline`` (monotonic s)."""

    number: int
    frame_index: int
    member: str
    deadline: float
    delivery: int


@dataclass(slots=True)
class Group:
    """One group on one stream; used by the server thread alone."""

    floor: int = 0
    cursor: int = 0
    acknowledged: set[int] = field(default_factory=set)
    leases: dict[int, Lease] = field(default_factory=dict)
    deliveries: dict[int, int] = field(default_factory=dict)
    again: list[int] = field(default_factory=list)
    is_dirty: bool = False
    clock: Callable[[], float] = time.monotonic
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(time.time_ns()))

    def next_index(self, states: IndexStates) -> int | None:
        """The frame to lease next: an expired one first, else the next stored one below the watermark."""
        self._expire()
        while self.again:
            if self.again[0] not in self.acknowledged and self.again[0] >= self.floor:
                return self.again[0]
            heapq.heappop(self.again)
        self._skip_unstored(states)
        return self.cursor if self.cursor < states.watermark else None

    def lease(self, frame_index: int, member: str, lease_s: float) -> Lease:
        """Give the frame that `next_index` named to a member."""
        if self.again and self.again[0] == frame_index:
            heapq.heappop(self.again)
        else:
            self.cursor = frame_index + 1
        delivery = self.deliveries.get(frame_index, 0) + 1
        self.deliveries[frame_index] = delivery
        lease = Lease(next(self._numbers), frame_index, member, self.clock() + lease_s, delivery)
        self.leases[frame_index] = lease
        self.is_dirty = True
        return lease

    def acknowledge(self, frame_index: int, number: int) -> None:
        """Done with a frame.

        Raises
        ------
        StaleLease : the lease has run out and the frame is, or will be, somebody else's.
        """
        lease = self.leases.get(frame_index)
        if lease is None or lease.number != number:
            raise StaleLease(
                f"the lease on frame {frame_index} has run out and the frame was given back; "
                "ask for a longer lease if one frame takes that long"
            )
        del self.leases[frame_index]
        self.deliveries.pop(frame_index, None)
        self.acknowledged.add(frame_index)
        self._raise_floor()
        self.is_dirty = True

    def set_aside(self, frame_index: int) -> None:
        """Leave a frame out that nobody can be given (its bytes are damaged); it counts as done."""
        if self.again and self.again[0] == frame_index:
            heapq.heappop(self.again)
        else:
            self.cursor = frame_index + 1
        self.deliveries.pop(frame_index, None)
        self.acknowledged.add(frame_index)
        self._raise_floor()
        self.is_dirty = True

    def give_back(self, frame_index: int, number: int) -> None:
        """Negative acknowledgement: the frame may be delivered again at once."""
        lease = self.leases.get(frame_index)
        if lease is not None and lease.number == number:
            del self.leases[frame_index]
            heapq.heappush(self.again, frame_index)

    def is_drained(self, states: IndexStates) -> bool:
        """Nothing to hand out and nothing outstanding, as far as the stream goes now."""
        return self.next_index(states) is None and not self.leases

    def next_deadline(self) -> float | None:
        """When the first lease runs out, monotonic s."""
        return min((lease.deadline for lease in self.leases.values()), default=None)

    def _expire(self) -> None:
        now = self.clock()
        for index in [i for i, lease in self.leases.items() if lease.deadline <= now]:
            del self.leases[index]
            heapq.heappush(self.again, index)

    def _skip_unstored(self, states: IndexStates) -> None:
        """Move the cursor over frames that are missing, rejected, or acknowledged before a restart."""
        watermark = states.watermark
        before = self.cursor
        while self.cursor < watermark and (
            self.cursor in self.acknowledged or states[self.cursor] is not FrameState.stored
        ):
            self.acknowledged.add(self.cursor)
            self.cursor += 1
        if self.cursor > before:
            self._raise_floor()
            self.is_dirty = True

    def _raise_floor(self) -> None:
        while self.floor in self.acknowledged:
            self.acknowledged.discard(self.floor)
            self.floor += 1


class GroupLog:
    """Group states on disk, written in batches."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS consumer_group (experiment TEXT, run INTEGER, data_source TEXT, name TEXT, "
            "floor INTEGER, cursor INTEGER, acknowledged BLOB, PRIMARY KEY (experiment, run, data_source, name))"
        )

    def load(self, key: GroupKey) -> Group:
        """The group as it was last saved; a new one if it never was."""
        row = self._db.execute(
            "SELECT floor, cursor, acknowledged FROM consumer_group "
            "WHERE experiment = ? AND run = ? AND data_source = ? AND name = ?",
            key,
        ).fetchone()
        if row is None:
            return Group()
        floor, cursor, packed = row
        acknowledged = set(msgspec.msgpack.decode(packed, type=list[int]))
        handed_out = [i for i in range(floor, cursor) if i not in acknowledged]
        # Someone had these and may still be at work on them: what comes now is a redelivery.
        return Group(floor, cursor, acknowledged, deliveries=dict.fromkeys(handed_out, 1), again=handed_out)

    def save(self, groups: dict[GroupKey, Group]) -> None:
        """Write the groups that have changed, in one transaction."""
        dirty = [(key, group) for key, group in groups.items() if group.is_dirty]
        if not dirty:
            return
        rows = [
            (*key, group.floor, group.cursor, msgspec.msgpack.encode(sorted(group.acknowledged)))
            for key, group in dirty
        ]
        self._db.execute("BEGIN")
        self._db.executemany("INSERT OR REPLACE INTO consumer_group VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._db.execute("COMMIT")
        for _, group in dirty:
            group.is_dirty = False

    def close(self) -> None:
        self._db.close()
