"""A consumer group: who has which frame, and what is done.

A group hands out each frame of a stream once, in index order, to whichever member asks. A frame
is leased for a while; without an acknowledgement it is leased again, to anyone, with a
higher delivery count, until it has failed too often and is put aside as a dead letter.

Only what is *not* done is kept. ``cursor`` is the first index nobody has looked at; each index below it is
skipped (nothing to read when the group passed it), left out (sought past, or a dropped dead
letter), leased, waiting to be leased again, a dead letter, or else acknowledged. So an acknowledgement
takes a lease out of a table, and memory follows what is outstanding, not what has passed.
"""

import functools
import heapq
import itertools
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from storage.errors import ProtocolError, StaleLease
from storage.states import IndexStates
from streaming.intervals import IntervalSet

__all__ = ["MAX_DELIVERIES", "DeadLetter", "Group", "Lease", "Outstanding", "PackedGroup"]

# How often a frame is handed out before it is put aside, unless the group says otherwise.
MAX_DELIVERIES = 10
# Indices looked at in one go for readable frames; more at a time the longer none is found.
_LEAST_LOOK, _MOST_LOOK = 256, 1 << 20
_MOST_INDEX = 2**62
_MOST_DESCRIBED = 1000


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


class PackedGroup(msgspec.Struct, array_like=True):
    """What outlives the process of a group and changes with every frame; `Group.pieces` has the rest."""

    cursor: int
    latest: int
    max_deliveries: int
    leases: list[Lease]
    # With what is left of their delay, s.
    waiting: list[tuple[Lease, float]]


# Part of a group's state that is written only when it has changed: what it is, which one, content (None: no more).
Piece = tuple[str, int, bytes | None]


@dataclass(slots=True, eq=False)
class Group:
    """One group on one stream: a state machine without threads, used by the server thread alone.

    An acknowledgement is accepted if it carries the number of the frame's last lease and nothing
    has happened to the frame since, other than that the lease ran out: work that took a little long is not
    done twice if nobody has begun it again.

    ``persist`` is called before anything leaves that must be known after a crash: new frames (so that they come
    again as redeliveries), and a new position. With False, it is enough to note the cursor.
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
    persist: Callable[[bool], None] | None = None
    _max_deliveries: int = MAX_DELIVERIES
    # Counts from anywhere: no number of before a crash, or of another service, must ever come again.
    _number: int = field(default_factory=functools.partial(secrets.randbits, 62))
    # Leases with a higher number are of the last take; from the first to the last of these they are of new frames.
    _number_before_take: int = 0
    _new_numbers: tuple[int, int] = (0, -1)
    # Of the heaps, entries may be out of date: the tables above say what is true.
    _deadlines: list[tuple[float, int, int]] = field(default_factory=list)
    _delayed: list[tuple[float, int]] = field(default_factory=list)
    # (0, index) of frames that come again, (1, index) of late ones never given.
    _ready: list[tuple[int, int]] = field(default_factory=list)
    _n_late_seen: int = 0
    _states_seen: "weakref.ref[IndexStates] | None" = None
    # Something was skipped that is not below the stream's watermark, or nobody has looked.
    _is_ahead: bool = True
    _changed_letters: set[int] = field(default_factory=set)

    # ---- handing out ------------------------------------------------------------------------------

    def take(self, states: IndexStates, member: str, lease_s: float, n: int) -> list[Lease]:
        """Lease up to ``n`` frames to a member, all below the watermark.

        First come frames whose lease ran out or that were given back, lowest index first; then frames that
        came late, after the group had skipped them; then the next readable ones, in index order.
        """
        now = self.clock()
        self._come_due(now)
        self._find_late(states)
        number, watermark, deadline = self._number, states.watermark, now + lease_s
        again = self._take_waiting(states, watermark, member, deadline, n)
        new = self._take_new(states, watermark, member, deadline, n - len(again))
        if len(self._deadlines) > 2 * len(self.leases) + 1024:
            self._deadlines = [(lease.deadline, lease.number, index) for index, lease in self.leases.items()]
            heapq.heapify(self._deadlines)
        if again or new:
            self._number_before_take = number
            self._new_numbers = (number + len(again) + 1, self._number)
        is_more = any(lease.delivery == 1 for lease in again)
        if self.persist and (new or is_more):
            self.persist(is_more)
        return again + new

    def take_latest(self, states: IndexStates) -> int | None:
        """The newest readable frame, if the group has not been given it this way; not leased, each one once."""
        newest = states.readable(self.latest + 1)[-1:]
        if not newest.size:
            return None
        self.latest = int(newest[0])
        self.is_dirty = True
        return self.latest

    def _take_waiting(self, states: IndexStates, watermark: int, member: str, deadline: float, n: int) -> list[Lease]:
        taken: list[Lease] = []
        ready, beyond = self._ready, []
        while ready and len(taken) < n:
            entry = heapq.heappop(ready)
            index = entry[1]
            if index >= watermark:  # power failed, and the stream lost its last frames
                beyond.append(entry)
                continue
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
        for entry in beyond:
            heapq.heappush(ready, entry)
        return taken

    def _take_new(self, states: IndexStates, watermark: int, member: str, deadline: float, n: int) -> list[Lease]:
        taken: list[Lease] = []
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
        return taken

    def _hold(self, lease: Lease) -> None:
        self.leases[lease.frame_index] = lease
        heapq.heappush(self._deadlines, (lease.deadline, lease.number, lease.frame_index))

    def _skip_between(self, found: np.ndarray, stop: int) -> None:
        """Note what lies between the readable frames from the cursor on."""
        if len(found) == stop - self.cursor:
            return
        edges = np.concatenate([[self.cursor - 1], found, [stop]])
        gaps = np.flatnonzero(np.diff(edges) > 1)
        self.skipped.append(edges[gaps] + 1, edges[gaps + 1])

    def _find_late(self, states: IndexStates) -> None:
        """Let frames that were skipped, and can be read now, wait to be given.

        Another ``states`` of the same stream (a restart, or the run has ended and is read from its folder)
        need not list them in the same order, or at all: then all that was skipped is looked at. And again while
        the stream is behind the group, since it lost its last frames when power failed.
        """
        if self._states_seen is None or self._states_seen() is not states:
            self._states_seen, self._n_late_seen, self._is_ahead = weakref.ref(states), 0, True
        if self._is_ahead:
            watermark = states.watermark
            self._look_back(states)
            self._is_ahead = self.skipped.stop > watermark
        n_late = len(states.late_order)
        if n_late > self._n_late_seen:
            for index in states.late_order[self._n_late_seen : n_late]:
                # It may be gone again: a stream in memory lets go of its oldest frames.
                if index in self.skipped and states.is_readable(index):
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
        self._new_numbers = (0, -1)

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
        last = self.waiting.get(frame_index) or self.dead_letters.get(frame_index)
        if last is None or not number or last.number != number:
            return False
        if self.waiting.pop(frame_index, None) is None:
            self._exhume(frame_index)
        return True

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
        back = Lease(0, frame_index, lease.member, due, lease.delivery, lease.is_late, excused)
        self._come_back(back, "given back")

    def untake(self, lease: Lease) -> None:
        """Undo the taking of a frame that never left the service; with it, all that follow in its take.

        Called before anyone has taken more, it is as if the frame had not been taken. Afterwards members may
        have newer frames, and the order in which each of them sees new ones must go on rising: then
        the frame comes again as a redelivery, that does not count towards the dead letters.
        """
        if self.leases.get(lease.frame_index) is not lease:
            return
        del self.leases[lease.frame_index]
        first, last = self._new_numbers
        if lease.number == last >= first:
            # Nothing beyond it is in anybody's hands (frames that do not fit are untaken from the end): step back.
            self.skipped.discard(lease.frame_index, self.cursor)
            self.cursor, self._new_numbers, self.is_dirty = lease.frame_index, (first, last - 1), True
            return
        is_last = lease.number > self._number_before_take
        delivery, excused = (lease.delivery - 1, lease.excused) if is_last else (lease.delivery, lease.excused + 1)
        self._let_wait(Lease(0, lease.frame_index, "", 0.0, delivery, lease.is_late, excused))

    def set_aside(self, lease: Lease, why: str) -> None:
        """Make a frame that nobody can be given (its bytes are damaged) a dead letter at once."""
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
                self._come_back(lease, "not acknowledged in time")
        while delayed and delayed[0][0] <= now:
            _, index = heapq.heappop(delayed)
            heapq.heappush(self._ready, (0, index))

    def _come_back(self, lease: Lease, how: str) -> None:
        if self._has_failed(lease):
            self._bury(lease, f"delivered {lease.delivery} times, at last {how} by {lease.member}")
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
        found = [letter for index in indices if (letter := self._exhume(index))]
        for letter in found:
            excused = letter.delivery
            self._let_wait(Lease(0, letter.frame_index, letter.member, 0.0, letter.delivery, letter.is_late, excused))
        return [letter.frame_index for letter in found]

    def drop_dead(self, indices: Iterable[int]) -> list[int]:
        """Leave dead letters out for good; those that were there."""
        found = [index for index in indices if self._exhume(index)]
        for index in found:
            self.left_out.add(index, index + 1)
        return found

    def _bury(self, lease: Lease, why: str) -> None:
        self.dead_letters[lease.frame_index] = DeadLetter(
            lease.frame_index, lease.delivery, lease.member, why, time.time_ns(), lease.is_late, lease.number
        )
        self._changed_letters.add(lease.frame_index)
        self.is_dirty = True

    def _exhume(self, frame_index: int) -> DeadLetter | None:
        letter = self.dead_letters.pop(frame_index, None)
        if letter is not None:
            self._changed_letters.add(frame_index)
            self.is_dirty = True
        return letter

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
        for dead in [i for i in self.dead_letters if i >= index]:
            self._exhume(dead)
        self.leases, self.waiting = {}, {}
        self._deadlines, self._delayed, self._ready = [], [], []
        self.cursor = index
        self.is_dirty = True
        if self.persist:
            self.persist(True)

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
        watermark = states.watermark
        return (
            not self.leases
            and not any(index < watermark for index in self.waiting)
            and not states.readable(self.cursor, watermark).size
        )

    def lag(self, states: IndexStates) -> int:
        """How many frames could be read and are not acknowledged yet."""
        watermark = states.watermark
        n_waiting = sum(index < watermark for index in self.waiting)
        return len(self.leases) + n_waiting + int(states.readable(self.cursor, watermark).size)

    @property
    def is_busy(self) -> bool:
        """Whether a lease or a delay is running, or something is not saved: such a group must stay in memory."""
        now = self.clock()
        held = itertools.chain(self.leases.values(), self.waiting.values())
        return self.is_dirty or any(lease.deadline > now for lease in held)

    @property
    def is_delayed(self) -> bool:
        """Whether a frame may be waiting for its delay to pass: what is left of that changes by itself."""
        return bool(self._delayed)

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

    # ---- what outlives the process -----------------------------------------------------------------

    def packed(self) -> PackedGroup:
        now = self.clock()
        waiting = [(lease, max(lease.deadline - now, 0.0)) for lease in self.waiting.values()]
        leases = list(self.leases.values())
        return PackedGroup(self.cursor, self.latest, self.max_deliveries, leases, waiting)

    def pieces(self) -> Iterator[Piece]:
        """What has changed since `saved`."""
        for kind, runs in (("skipped", self.skipped), ("left_out", self.left_out)):
            for block in runs.changed:
                bounds = runs.block(block)
                yield kind, block, msgspec.msgpack.encode(bounds) if bounds else None
        for index in self._changed_letters:
            letter = self.dead_letters.get(index)
            yield "dead_letter", index, msgspec.msgpack.encode(letter) if letter else None

    def saved(self) -> None:
        """All of it is on disk."""
        self.is_dirty = False
        self._changed_letters.clear()
        self.skipped.changed.clear()
        self.left_out.changed.clear()

    @classmethod
    def restored(
        cls,
        packed: PackedGroup,
        pieces: Iterable[tuple[str, int, bytes]] = (),
        *,
        handed_out: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Group":
        """The group as it was saved; what is outstanding waits, to be delivered again at once.

        Parameters
        ----------
        pieces : in rising order of their numbers.
        handed_out : where the cursor was noted last; what lies between may have been handed out.

        Raises
        ------
        msgspec.MsgspecError : a piece does not hold what it should.
        """
        bounds: dict[str, list[int]] = {"skipped": [], "left_out": []}
        letters = {}
        for kind, number, content in pieces:
            if kind == "dead_letter":
                letters[number] = msgspec.msgpack.decode(content, type=DeadLetter)
            else:
                bounds[kind] += msgspec.msgpack.decode(content, type=list[int])
        group = cls(
            max(packed.cursor, handed_out),
            IntervalSet(bounds["skipped"]),
            IntervalSet(bounds["left_out"]),
            dead_letters=letters,
            latest=packed.latest,
            clock=clock,
            _max_deliveries=packed.max_deliveries,
        )
        group._let_all_wait(packed)
        return group

    def _let_all_wait(self, packed: PackedGroup) -> None:
        """A member may be at work on what it had, and is believed until someone else has it.

        That the service starts again is not the frame's fault.
        """
        for lease in packed.leases:
            self._let_wait(_waiting_from(lease, 0.0, lease.excused + 1))
        for last, delay in packed.waiting:
            self._let_wait(_waiting_from(last, self.clock() + delay if delay else 0.0, last.excused))
        for index in range(packed.cursor, self.cursor):
            self._let_wait(Lease(0, index, "", 0.0, 1, excused=1))
        self.is_dirty = self.cursor > packed.cursor


def _waiting_from(last: Lease, due: float, excused: int) -> Lease:
    return Lease(last.number, last.frame_index, last.member, due, last.delivery, last.is_late, excused)
