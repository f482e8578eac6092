"""Consumer groups: who has which frame, and what is done.

A group hands out each frame of a stream once, in index order, to whichever member asks. A frame
is leased for a while; without an acknowledgement it is leased again, to anyone, with a
higher delivery count, until it has failed too often and is put aside as a dead letter.

Only what is *not* done is kept. ``cursor`` is the first index nobody has looked at; each index below it is
skipped (nothing to read when the group passed it), left out (sought past, or a dropped dead
letter), leased, waiting to be leased again, a dead letter, or else acknowledged. So an acknowledgement
takes a lease out of a table, and memory follows what is outstanding, not what has passed.

State is kept in SQLite; after a restart what was handed out and not acknowledged is delivered again.
A lost acknowledgement means redelivery, never loss.
"""

import contextlib
import heapq
import itertools
import logging
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from storage.errors import NearlineError, ProtocolError, StaleLease
from storage.states import IndexStates
from streaming.intervals import IntervalSet

__all__ = ["MAX_DELIVERIES", "DeadLetter", "Group", "GroupKey", "GroupLog", "Lease", "Outstanding"]

log = logging.getLogger("nearline.groups")

GroupKey = tuple[str, int, str, str]

# How often a frame is handed out before it is put aside, unless the group says otherwise.
MAX_DELIVERIES = 10
# Indices looked at in one go for readable frames; more at a time the longer none is found.
_LEAST_LOOK, _MOST_LOOK = 256, 1 << 20
# Lease numbers of one process that may be missing from the last save: far more than 50 ms can bring.
_NUMBERS_A_SAVE = 1 << 32
_MOST_INDEX = 2**62
_MOST_DESCRIBED = 1000
_SCHEMA_VERSION = 1


class Lease(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One frame in one member's hands until ``deadline`` (monotonic s).

    ``delivery`` counts how often the frame has been handed out; ``excused`` is how many of those
    came back through no fault of frame or member, and do not count towards the dead letters.
    """

    number: int
    frame_index: int
    member: str
    deadline: float
    delivery: int
    is_late: bool = False
    excused: int = 0


class DeadLetter(msgspec.Struct, frozen=True, array_like=True):
    """A frame that is not handed out any more, until someone says so: it failed too often, or cannot be read."""

    frame_index: int
    delivery: int
    member: str
    why: str
    utc_ns: int
    is_late: bool = False
    number: int = 0


class Outstanding(msgspec.Struct, frozen=True):
    """A frame handed out and not acknowledged: leased until ``until``, or waiting to be leased again from then on.

    ``member`` has it, or had it last; ``until`` is monotonic s.
    """

    frame_index: int
    is_leased: bool
    member: str
    until: float
    delivery: int


@dataclass(slots=True, eq=False)
class Group:
    """One group on one stream: a state machine without threads, used by the server thread alone.

    An acknowledgement is accepted if it carries the number of the frame's last lease and nothing
    has happened to the frame since, other than that the lease ran out: work that took a little long is not
    done twice if nobody has begun it again.
    """

    cursor: int = 0
    skipped: IntervalSet = field(default_factory=IntervalSet)
    left_out: IntervalSet = field(default_factory=IntervalSet)
    leases: dict[int, Lease] = field(default_factory=dict)
    # Frames to be leased again, with their last lease: its deadline is when that may be.
    waiting: dict[int, Lease] = field(default_factory=dict)
    dead_letters: dict[int, DeadLetter] = field(default_factory=dict)
    latest: int = -1
    is_dirty: bool = False
    clock: Callable[[], float] = time.monotonic
    _max_deliveries: int = MAX_DELIVERIES
    _number: int = field(default_factory=time.time_ns)
    # Leases with a higher number are of the last take.
    _number_before_take: int = 0
    # Of the heaps, entries may be out of date: the tables above say what is true.
    _deadlines: list[tuple[float, int, int]] = field(default_factory=list)
    _delayed: list[tuple[float, int]] = field(default_factory=list)
    # (0, index) of frames that come again, (1, index) of late ones never given.
    _ready: list[tuple[int, int]] = field(default_factory=list)
    _n_late_seen: int = 0
    _states_seen: "weakref.ref[IndexStates] | None" = None

    # ---- handing out ------------------------------------------------------------------------------

    def take(self, states: IndexStates, member: str, lease_s: float, n: int) -> list[Lease]:
        """Lease up to ``n`` frames to a member, all below the watermark.

        First come frames whose lease ran out or that were given back, lowest index first; then frames that
        came late, after the group had skipped them; then the next readable ones, in index order.
        """
        now = self.clock()
        self._come_due(now)
        self._find_late(states)
        taken: list[Lease] = []
        number = self._number
        watermark = states.watermark
        deadline = now + lease_s
        self._take_waiting(states, watermark, member, deadline, n, taken)
        self._take_new(states, watermark, member, deadline, n, taken)
        if len(self._deadlines) > 2 * len(self.leases) + 1024:
            self._deadlines = [(lease.deadline, lease.number, index) for index, lease in self.leases.items()]
            heapq.heapify(self._deadlines)
        if taken:
            self._number_before_take = number
        return taken

    def take_latest(self, states: IndexStates) -> int | None:
        """The newest readable frame, if the group has not been given it this way; not leased, each one once."""
        newest = states.readable(self.latest + 1)[-1:]
        if not newest.size:
            return None
        self.latest = int(newest[0])
        self.is_dirty = True
        return self.latest

    def _take_waiting(
        self, states: IndexStates, watermark: int, member: str, deadline: float, n: int, taken: list[Lease]
    ) -> None:
        ready = self._ready
        while ready and len(taken) < n and ready[0][1] < watermark:
            index = heapq.heappop(ready)[1]
            last = self.waiting.pop(index, None)
            if last is None:
                continue  # acknowledged a little late
            self.is_dirty = True
            if not states.is_readable(index):
                self.skipped.add(index, index + 1)
                continue
            self._number += 1
            lease = Lease(self._number, index, member, deadline, last.delivery + 1, last.is_late, last.excused)
            self._hold(lease)
            taken.append(lease)

    def _take_new(
        self, states: IndexStates, watermark: int, member: str, deadline: float, n: int, taken: list[Lease]
    ) -> None:
        look = max(_LEAST_LOOK, 2 * n)
        while len(taken) < n and self.cursor < watermark:
            stop = min(self.cursor + look, watermark)
            room = n - len(taken)
            found = states.readable(self.cursor, stop)[:room]
            if len(found) == room:
                stop = int(found[-1]) + 1
            self._skip_between(found, stop)
            self.cursor = stop
            self.is_dirty = True
            for index in found.tolist():
                self._number += 1
                lease = Lease(self._number, index, member, deadline, 1)
                self._hold(lease)
                taken.append(lease)
            look = min(4 * look, _MOST_LOOK)

    def _hold(self, lease: Lease) -> None:
        self.leases[lease.frame_index] = lease
        heapq.heappush(self._deadlines, (lease.deadline, lease.number, lease.frame_index))

    def _skip_between(self, found: np.ndarray, stop: int) -> None:
        """Note what lies between the readable frames from the cursor on."""
        if len(found) == stop - self.cursor:
            return
        edges = np.concatenate([[self.cursor - 1], found, [stop]])
        for gap in np.flatnonzero(np.diff(edges) > 1).tolist():
            self.skipped.add(int(edges[gap]) + 1, int(edges[gap + 1]))

    def _find_late(self, states: IndexStates) -> None:
        """Let frames that were skipped, and can be read now, wait to be given.

        Another ``states`` of the same stream (a restart, or the run has ended and is read from its folder)
        need not list them in the same order, or at all: then all that was skipped is looked at.
        """
        if self._states_seen is None or self._states_seen() is not states:
            self._states_seen, self._n_late_seen = weakref.ref(states), 0
            self._look_back(states)
        n_late = len(states.late_order)
        if n_late > self._n_late_seen:
            for index in states.late_order[self._n_late_seen : n_late]:
                if index in self.skipped:
                    self._give_late(index)
            self._n_late_seen = n_late

    def _look_back(self, states: IndexStates) -> None:
        if not self.skipped:
            return
        for start in range(self.skipped.bounds[0], self.cursor, _MOST_LOOK):
            found = states.readable(start, min(start + _MOST_LOOK, self.cursor))
            for index in found[self.skipped.contains(found)].tolist():
                self._give_late(index)

    def _give_late(self, index: int) -> None:
        self.skipped.discard(index, index + 1)
        self._let_wait(Lease(0, index, "", 0.0, 0, True))

    # ---- coming back ------------------------------------------------------------------------------

    def acknowledge(self, frame_index: int, number: int) -> None:
        """Done with a frame.

        Raises
        ------
        StaleLease : the frame is somebody else's, was given back, or is done already.
        """
        lease = self.leases.get(frame_index)
        if lease is not None and lease.number == number:
            del self.leases[frame_index]
        elif not self._accept_belated(frame_index, number):
            raise StaleLease(self._why_stale(frame_index))
        self.is_dirty = True

    def _accept_belated(self, frame_index: int, number: int) -> bool:
        """Whether this was the last lease, ran out, and nobody else has had the frame since."""
        for belated in (self.waiting, self.dead_letters):
            last = belated.get(frame_index)
            if last is not None and number and last.number == number:
                del belated[frame_index]
                return True
        return False

    def _why_stale(self, frame_index: int) -> str:
        if frame_index in self.leases or frame_index in self.waiting or frame_index in self.dead_letters:
            return (
                f"the lease on frame {frame_index} has run out and the frame was given back; "
                "ask for a longer lease if one frame takes that long"
            )
        return (
            f"frame {frame_index} is not leased to anyone: it is acknowledged already, or the group was set to "
            "another position; go on with the next frame"
        )

    def give_back(self, frame_index: int, number: int, delay_s: float = 0.0, *, counts: bool = True) -> None:
        """Negative acknowledgement: the frame may be delivered again ``delay_s`` from now; a stale one does nothing.

        With ``counts`` false the frame was not looked at (its member stops): it comes again as a redelivery, but
        no nearer to the dead letters.
        """
        lease = self.leases.get(frame_index)
        if lease is None or lease.number != number:
            return
        del self.leases[frame_index]
        due = self.clock() + delay_s if delay_s > 0 else 0.0
        excused = lease.excused + (not counts)
        self._come_back(
            Lease(0, frame_index, lease.member, due, lease.delivery, lease.is_late, excused),
            f"given back by {lease.member}",
        )

    def untake(self, lease: Lease) -> None:
        """Undo the taking of a frame that never left the service.

        Called before anyone has taken more, it is as if the frame had not been taken. Afterwards members may
        have newer frames, and the order in which each of them sees new ones must go on rising: then
        the frame comes again as a redelivery, that does not count towards the dead letters.
        """
        if self.leases.get(lease.frame_index) is not lease:
            return
        del self.leases[lease.frame_index]
        is_last = lease.number > self._number_before_take
        delivery, excused = (lease.delivery - 1, lease.excused) if is_last else (lease.delivery, lease.excused + 1)
        self._let_wait(Lease(0, lease.frame_index, "", 0.0, delivery, lease.is_late, excused))

    def set_aside(self, lease: Lease | int, why: str = "its bytes are damaged") -> None:
        """Make a frame that nobody can be given (its bytes are damaged) a dead letter at once."""
        if isinstance(lease, int):
            lease = self.leases[lease]
        if self.leases.get(lease.frame_index) is lease:
            del self.leases[lease.frame_index]
            self._bury(lease, why)

    def _come_due(self, now: float) -> None:
        """Take back leases that have run out, and frames whose delay is over."""
        deadlines, delayed = self._deadlines, self._delayed
        while deadlines and deadlines[0][0] <= now:
            _, number, index = heapq.heappop(deadlines)
            lease = self.leases.get(index)
            if lease is not None and lease.number == number:
                del self.leases[index]
                self._come_back(lease, f"not acknowledged in time by {lease.member}")
        while delayed and delayed[0][0] <= now:
            _, index = heapq.heappop(delayed)
            heapq.heappush(self._ready, (0, index))

    def _come_back(self, lease: Lease, why: str) -> None:
        if self._has_failed(lease):
            self._bury(lease, f"delivered {lease.delivery} times, at last {why}")
        else:
            self._let_wait(lease)

    def _let_wait(self, lease: Lease) -> None:
        """From its deadline on the frame may be leased again."""
        self.waiting[lease.frame_index] = lease
        if lease.deadline > self.clock():
            heapq.heappush(self._delayed, (lease.deadline, lease.frame_index))
        else:
            heapq.heappush(self._ready, (int(lease.is_late and not lease.delivery), lease.frame_index))
        self.is_dirty = True

    # ---- dead letters -----------------------------------------------------------------------------

    @property
    def max_deliveries(self) -> int:
        """How often a frame is handed out before it becomes a dead letter; setting it judges those that wait as well.

        Raises
        ------
        ProtocolError : set to less than once.
        """
        return self._max_deliveries

    @max_deliveries.setter
    def max_deliveries(self, limit: int) -> None:
        if limit == self._max_deliveries:
            return
        if limit < 1:
            raise ProtocolError(f"a frame cannot be delivered at most {limit} times; allow at least 1")
        self._max_deliveries = limit
        self.is_dirty = True
        for lease in [waiting for waiting in self.waiting.values() if self._has_failed(waiting)]:
            del self.waiting[lease.frame_index]
            self._bury(lease, f"delivered {lease.delivery} times, and the limit was set to {limit}")

    def _has_failed(self, lease: Lease) -> bool:
        return lease.delivery - lease.excused >= self._max_deliveries

    def retry_dead(self, indices: Iterable[int]) -> list[int]:
        """Hand dead letters out again, with all their deliveries before them; those that were there."""
        found = [letter for index in indices if (letter := self.dead_letters.pop(index, None))]
        for letter in found:
            excused = letter.delivery
            self._let_wait(Lease(0, letter.frame_index, letter.member, 0.0, letter.delivery, letter.is_late, excused))
        return [letter.frame_index for letter in found]

    def drop_dead(self, indices: Iterable[int]) -> list[int]:
        """Leave dead letters out for good; those that were there."""
        found = [index for index in indices if self.dead_letters.pop(index, None)]
        for index in found:
            self.left_out.add(index, index + 1)
            self.is_dirty = True
        return found

    def _bury(self, lease: Lease, why: str) -> None:
        self.dead_letters[lease.frame_index] = DeadLetter(
            lease.frame_index, lease.delivery, lease.member, why, time.time_ns(), lease.is_late, lease.number
        )
        self.is_dirty = True

    # ---- position ---------------------------------------------------------------------------------

    def seek(self, index: int) -> None:
        """Go on from an index, as if none from there on had been handed out; 0 begins anew.

        What lies below and is outstanding or was never reached is left out. Leases that are out
        become stale. Frames that were skipped below the index are still given if they come late.

        Raises
        ------
        ProtocolError : no index at all.
        """
        if not 0 <= index <= _MOST_INDEX:
            raise ProtocolError(f"a group cannot go on from frame {index}; frames are counted from 0")
        for outstanding in (*self.leases, *self.waiting):
            self.left_out.add(outstanding, outstanding + 1)
        self.left_out.add(self.cursor, index)
        for past in (self.left_out, self.skipped):
            past.discard(index, _MOST_INDEX + 1)
        self.dead_letters = {i: letter for i, letter in self.dead_letters.items() if i < index}
        self.leases, self.waiting = {}, {}
        self._deadlines, self._delayed, self._ready = [], [], []
        self.cursor = index
        self.is_dirty = True

    def unacknowledged(self) -> list[Outstanding]:
        """What has been handed out and is not done: leased, or waiting to be leased again; by index."""
        found = [Outstanding(i, True, lease.member, lease.deadline, lease.delivery) for i, lease in self.leases.items()]
        found += [
            Outstanding(i, False, last.member, last.deadline, last.delivery)
            for i, last in self.waiting.items()
            if last.delivery
        ]
        return sorted(found, key=lambda one: one.frame_index)

    @property
    def last_acknowledged(self) -> int | None:
        """The highest index acknowledged; None before the first."""
        index = self.cursor - 1
        while index >= 0:
            start = self._start_of_run(index)
            if start is None:
                return index
            index = start - 1
        return None

    def _start_of_run(self, index: int) -> int | None:
        """Where the indices begin that reach up to this one and are not acknowledged; None if it is."""
        if index in self.leases or index in self.waiting or index in self.dead_letters:
            return index
        starts = [start for past in (self.skipped, self.left_out) if (start := past.start_of(index)) is not None]
        return min(starts, default=None)

    def is_drained(self, states: IndexStates) -> bool:
        """Nothing to hand out and nothing outstanding, as far as the stream goes now; dead letters do not count."""
        self._find_late(states)
        return not self.leases and not self.waiting and not states.readable(self.cursor, states.watermark).size

    def lag(self, states: IndexStates) -> int:
        """How many frames could be read and are not acknowledged yet."""
        return len(self.leases) + len(self.waiting) + int(states.readable(self.cursor, states.watermark).size)

    @property
    def is_busy(self) -> bool:
        """Whether a lease or a delay is running, or something is not saved: such a group must stay in memory."""
        now = self.clock()
        held = itertools.chain(self.leases.values(), self.waiting.values())
        return self.is_dirty or any(lease.deadline > now for lease in held)

    def describe(self, states: IndexStates) -> dict[str, Any]:
        """Where the group is, who has what, and what went wrong, as plain JSON; of long lists the beginning."""
        now = self.clock()
        outstanding, letters = self.unacknowledged(), sorted(self.dead_letters.items())
        return {
            "cursor": self.cursor,
            "lag": self.lag(states),
            "last_acknowledged": self.last_acknowledged,
            "max_deliveries": self.max_deliveries,
            "n_unacknowledged": len(outstanding),
            "unacknowledged": [
                {
                    "frame_index": one.frame_index,
                    "is_leased": one.is_leased,
                    "member": one.member,
                    "remaining_s": round(max(one.until - now, 0.0), 3),
                    "delivery": one.delivery,
                }
                for one in outstanding[:_MOST_DESCRIBED]
            ],
            "n_dead_letters": len(letters),
            "dead_letters": [msgspec.structs.asdict(letter) for _, letter in letters[:_MOST_DESCRIBED]],
            "n_skipped": len(self.skipped),
            "skipped": list(itertools.islice(self.skipped, _MOST_DESCRIBED)),
            "n_left_out": len(self.left_out),
            "left_out": list(itertools.islice(self.left_out, _MOST_DESCRIBED)),
        }

    def next_event(self) -> float | None:
        """When the next lease runs out or the next delay is over, monotonic s; None if nothing is under way."""
        deadlines, delayed = self._deadlines, self._delayed
        while deadlines and not self._is_current(deadlines[0]):
            heapq.heappop(deadlines)
        while delayed and delayed[0][1] not in self.waiting:
            heapq.heappop(delayed)
        return min((heap[0][0] for heap in (deadlines, delayed) if heap), default=None)

    def _is_current(self, entry: tuple[float, int, int]) -> bool:
        lease = self.leases.get(entry[2])
        return lease is not None and lease.number == entry[1]

    # ---- one by one, for a server that does not take many at once yet ------------------------------

    def next_index(self, states: IndexStates) -> int | None:
        held = [lease for lease in self.leases.values() if not lease.member]
        taken = held or self.take(states, "", 60.0, 1)
        return taken[0].frame_index if taken else None

    def lease(self, frame_index: int, member: str, lease_s: float) -> Lease:
        old = self.leases[frame_index]
        deadline = self.clock() + lease_s
        self._hold(Lease(old.number, frame_index, member, deadline, old.delivery, old.is_late, old.excused))
        return self.leases[frame_index]

    def next_deadline(self) -> float | None:
        return self.next_event()

    # ---- on disk ----------------------------------------------------------------------------------

    def pack(self) -> bytes:
        """All of the state that outlives the process; a delay as what is left of it."""
        now = self.clock()
        content = _Packed(
            self.cursor,
            self.latest,
            self.max_deliveries,
            self._number,
            self.skipped.bounds,
            self.left_out.bounds,
            list(self.leases.values()),
            [(lease, max(lease.deadline - now, 0.0)) for lease in self.waiting.values()],
            list(self.dead_letters.values()),
        )
        return msgspec.msgpack.encode(content)

    @classmethod
    def unpack(cls, packed: bytes, clock: Callable[[], float] = time.monotonic) -> "Group":
        """The group as it was packed; what was leased then waits, to be delivered again at once."""
        content = msgspec.msgpack.decode(packed, type=_Packed)
        group = cls(
            content.cursor,
            IntervalSet(content.skipped),
            IntervalSet(content.left_out),
            dead_letters={letter.frame_index: letter for letter in content.dead_letters},
            latest=content.latest,
            clock=clock,
            _max_deliveries=content.max_deliveries,
        )
        group._number = max(group._number, content.number + _NUMBERS_A_SAVE)
        for lease in content.leases:
            # Its member may be at work on it still, and is believed until someone else has it. That the
            # service starts again is not the frame's fault.
            group._let_wait(_waiting_from(lease, 0.0, lease.excused + 1))
        for last, delay in content.waiting:
            group._let_wait(_waiting_from(last, clock() + delay if delay else 0.0, last.excused))
        group.is_dirty = False
        return group


class _Packed(msgspec.Struct, array_like=True):
    """A group on disk."""

    cursor: int
    latest: int
    max_deliveries: int
    number: int
    skipped: list[int]
    left_out: list[int]
    leases: list[Lease]
    waiting: list[tuple[Lease, float]]
    dead_letters: list[DeadLetter]


def _waiting_from(last: Lease, due: float, excused: int) -> Lease:
    return Lease(last.number, last.frame_index, last.member, due, last.delivery, last.is_late, excused)


class GroupLog:
    """Group states on disk, written in batches.

    Raises
    ------
    NearlineError : the file was written by a later version of this program.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # locked, full, or not ours: nothing is wrong with what it says
            aside = _move_aside(path)
            log.error(
                "the consumer groups in %s cannot be read (%s); kept as %s. All groups begin again: frames that were "
                "acknowledged are delivered once more, none is lost",
                path,
                error,
                aside,
            )
            self._db = _open(path)

    def load(self, key: GroupKey) -> Group:
        """The group as it was last saved; a new one if it never was."""
        row = self._db.execute(
            "SELECT state FROM consumer_group WHERE experiment = ? AND run = ? AND data_source = ? AND name = ?", key
        ).fetchone()
        return Group(clock=self._clock) if row is None else Group.unpack(row[0], self._clock)

    def names(self, stream: tuple[str, int, str]) -> list[str]:
        """The groups of a stream that were ever saved, by name."""
        rows = self._db.execute(
            "SELECT name FROM consumer_group WHERE experiment = ? AND run = ? AND data_source = ? ORDER BY name", stream
        )
        return [name for (name,) in rows]

    def save(self, groups: Mapping[GroupKey, Group]) -> None:
        """Write the groups that have changed, in one transaction."""
        dirty = [(key, group) for key, group in groups.items() if group.is_dirty]
        if not dirty:
            return
        rows = [(*key, group.pack()) for key, group in dirty]
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO consumer_group VALUES (?, ?, ?, ?, ?)", rows)
        for _, group in dirty:
            group.is_dirty = False

    def close(self) -> None:
        self._db.close()


def _open(path: Path) -> sqlite3.Connection:
    # isolation_level None: transactions begin and end where it is written.
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        _bring_up_to_date(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _bring_up_to_date(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > _SCHEMA_VERSION:
        raise NearlineError(
            f"{path} has schema {version} of the consumer groups, this program knows {_SCHEMA_VERSION}; "
            "install the version that wrote it, or move the file away and let all groups begin again"
        )
    if version < _SCHEMA_VERSION:
        with db:
            db.execute("BEGIN IMMEDIATE")
            _migrate_from_0(db)
            db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")


def _migrate_from_0(db: sqlite3.Connection) -> None:
    """From a list of acknowledged indices to all that is not."""
    has_table = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'consumer_group'").fetchone()
    old = (
        db.execute(
            "SELECT experiment, run, data_source, name, floor, cursor, acknowledged FROM consumer_group"
        ).fetchall()
        if has_table
        else []
    )
    db.execute("DROP TABLE IF EXISTS consumer_group")
    db.execute(
        "CREATE TABLE consumer_group (experiment TEXT, run INTEGER, data_source TEXT, name TEXT, state BLOB, "
        "PRIMARY KEY (experiment, run, data_source, name))"
    )
    for *key, floor, cursor, packed in old:
        acknowledged = set(msgspec.msgpack.decode(packed, type=list[int]))
        group = Group(cursor)
        for index in range(floor, cursor):
            if index not in acknowledged:
                group._let_wait(Lease(0, index, "", 0.0, 1))
        db.execute("INSERT INTO consumer_group VALUES (?, ?, ?, ?, ?)", (*key, group.pack()))


def _move_aside(path: Path) -> Path:
    """Keep a damaged database, with its log, under another name."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    for end in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
    return aside
