"""Consumer groups held against a plain model, and against promises that need no model.

Members take, acknowledge, give back, die; frames come, go missing, come late, are pruned; time passes; the
service restarts in good order or is killed, and the run moves from the writer to its folder.
`PlainGroup` says frame by frame, with a dictionary and no heaps, what should happen. Beside it stands
`Promises`, which only looks at what is handed out and what is refused.
"""

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.errors import StaleLease
from storage.states import FrameState, IndexStates
from streaming.group import Lease
from streaming.groups import GroupLog
from streaming.intervals import IntervalSet

KEY = ("lyso", 1, "eiger", "mine")
MEMBERS = ["ada", "ben", "cleo"]


# ---- the plain model ----------------------------------------------------------------------------------


@dataclass
class Fate:
    """What is known of one index below the cursor."""

    what: str  # skipped, left_out, leased, waiting, dead, done
    number: int = 0
    until: float = 0.0
    delivery: int = 0
    excused: int = 0
    is_late: bool = False


@dataclass
class PlainGroup:
    """A group as one would write it without a thought of speed."""

    cursor: int = 0
    max_deliveries: int = 10
    fates: dict[int, Fate] = field(default_factory=dict)
    newest_take: set[int] = field(default_factory=set)
    # (number, index) of its new frames, of which nothing is known to have left.
    newest_new: list[tuple[int, int]] = field(default_factory=list)
    # Whether the last take gave a frame for the first time that the cursor had passed before.
    is_more: bool = False
    n_again: int = 0

    def of(self, what: str) -> list[int]:
        return sorted(i for i, fate in self.fates.items() if fate.what == what)

    def pass_time(self, now: float) -> None:
        for index in self.of("leased"):
            fate = self.fates[index]
            if fate.until <= now:
                self.come_back(index, replace(fate, until=0.0))
        for index in self.of("waiting"):
            if self.fates[index].until <= now:
                self.fates[index].until = 0.0

    def come_back(self, index: int, fate: Fate) -> None:
        has_failed = fate.delivery - fate.excused >= self.max_deliveries
        self.fates[index] = replace(fate, what="dead" if has_failed else "waiting")

    def notice_late(self, states: IndexStates) -> None:
        for index in self.of("skipped"):
            if states.is_readable(index):
                self.fates[index] = Fate("waiting", is_late=True)
                self.newest_new = []

    def take(self, states: IndexStates, now: float, n: int) -> list[tuple[int, int, bool]]:
        """(index, delivery, is late) of each frame that must be leased, in order."""
        self.pass_time(now)
        self.notice_late(states)
        due = [i for i in self.of("waiting") if not self.fates[i].until and i < states.watermark]
        due.sort(key=lambda i: (self.fates[i].is_late and self.fates[i].delivery == 0, i))
        taken = []
        for index in due:
            if len(taken) == n:
                break
            if states.is_readable(index):
                taken.append(index)
            else:
                self.fates[index] = Fate("skipped")
        self.is_more = any(self.fates[i].delivery == 0 for i in taken)
        self.n_again = len(taken)
        while len(taken) < n and self.cursor < states.watermark:
            self.fates[self.cursor] = Fate("waiting" if states.is_readable(self.cursor) else "skipped")
            if states.is_readable(self.cursor):
                taken.append(self.cursor)
            self.cursor += 1
        return [(i, self.fates[i].delivery + 1, self.fates[i].is_late) for i in taken]

    def lease(self, leases: list[Lease]) -> None:
        for lease in leases:
            fate = self.fates[lease.frame_index]
            self.fates[lease.frame_index] = replace(
                fate, what="leased", number=lease.number, until=lease.deadline, delivery=fate.delivery + 1
            )
        if leases:
            self.newest_take = {lease.number for lease in leases}
            self.newest_new = [(lease.number, lease.frame_index) for lease in leases[self.n_again :]]

    def acknowledge(self, index: int, number: int) -> bool:
        fate = self.fates.get(index)
        is_valid = fate is not None and fate.what in ("leased", "waiting", "dead") and fate.number == number != 0
        if is_valid:
            self.fates[index] = Fate("done")
        return is_valid

    def give_back(self, index: int, number: int, until: float, counts: bool) -> None:
        fate = self.fates.get(index)
        if fate is not None and fate.what == "leased" and fate.number == number:
            excused = fate.excused + (not counts)
            self.come_back(index, replace(fate, number=0, until=until, excused=excused))

    def untake(self, lease: Lease) -> None:
        if self.newest_new[-1:] == [(lease.number, lease.frame_index)]:
            self.newest_new.pop()
            for index in range(lease.frame_index, self.cursor):
                del self.fates[index]
            self.cursor = lease.frame_index
            return
        fate = self.fates[lease.frame_index]
        is_newest = lease.number in self.newest_take
        self.fates[lease.frame_index] = replace(
            fate,
            what="waiting",
            number=0,
            until=0.0,
            delivery=fate.delivery - is_newest,
            excused=fate.excused + (not is_newest),
        )

    def seek(self, index: int) -> None:
        for below in range(min(self.cursor, index)):
            if self.fates[below].what in ("leased", "waiting"):
                self.fates[below] = Fate("left_out")
        for passed in range(self.cursor, index):
            self.fates[passed] = Fate("left_out")
        self.fates = {i: fate for i, fate in self.fates.items() if i < index}
        self.cursor = index

    def restarted(self, handed_out: int) -> "PlainGroup":
        """What a service finds that starts again; ``handed_out`` is the cursor as it was noted last."""
        new = copy.deepcopy(self)
        for index in new.of("leased"):
            fate = new.fates[index]
            new.fates[index] = replace(fate, what="waiting", until=0.0, excused=fate.excused + 1)
        for index in range(new.cursor, handed_out):
            new.fates[index] = Fate("waiting", delivery=1, excused=1)
        new.cursor = max(new.cursor, handed_out)
        new.newest_take, new.newest_new = set(), []
        return new


# ---- promises ---------------------------------------------------------------------------------------------


@dataclass
class Promises:
    """What must hold whatever the group does inside; knows only what went over the counter."""

    # Valid leases: index → (number, deadline). Those that have run out count until the frame is given to another.
    open: dict[int, tuple[int, float]] = field(default_factory=dict)
    # Every index that ever left, and is not acknowledged on disk: only these may come again.
    may_come_again: set[int] = field(default_factory=set)
    acknowledged: set[int] = field(default_factory=set)
    acknowledged_since_save: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)
    # What each member was given for the first time, in order.
    new_ones: dict[str, list[int]] = field(default_factory=lambda: {member: [] for member in (*MEMBERS, "last")})

    def take(self, lease: Lease, member: str, now: float, states: IndexStates) -> None:
        index = lease.frame_index
        assert lease.member == member
        assert index < states.watermark, "nothing at or above the watermark is ever handed out"
        assert states.is_readable(index), "nothing is handed out that cannot be read"
        assert index not in self.open or self.open[index][1] <= now, "a frame is leased to one member at a time"
        if lease.delivery > 1:
            assert index in self.may_come_again, "nothing comes again without a reason"
        else:
            assert index not in self.may_come_again, "what comes again says so"
            if not lease.is_late:
                self.new_ones[member].append(index)
                assert self.new_ones[member] == sorted(self.new_ones[member]), "new frames come in rising order"
        self.open[index] = (lease.number, lease.deadline)
        self.may_come_again.add(index)

    def untake(self, lease: Lease, *, is_newest: bool) -> None:
        del self.open[lease.frame_index]
        if lease.delivery == 1 and is_newest:
            self.may_come_again.discard(lease.frame_index)
            if not lease.is_late:
                self.new_ones[lease.member].remove(lease.frame_index)

    def acknowledge(self, index: int, number: int) -> None:
        assert self.open.pop(index)[0] == number, "only the last lease is good for an acknowledgement"
        self.acknowledged.add(index)
        self.acknowledged_since_save.add(index)

    def save(self) -> None:
        self.may_come_again -= self.acknowledged_since_save
        self.acknowledged_since_save.clear()
        self.saved = set(self.may_come_again)

    def crash(self, passed_since_save: Iterable[int]) -> None:
        """What was passed since then was handed out, or skipped; what of the latter comes now, comes marked as well."""
        self.may_come_again |= self.saved | set(passed_since_save)
        self.acknowledged_since_save.clear()

    def seek(self, index: int) -> None:
        """A new beginning: from there on each frame is new to everyone."""
        self.acknowledged = {i for i in self.acknowledged if i < index}
        self.may_come_again = {i for i in self.may_come_again if i < index}
        self.open.clear()
        for new_ones in self.new_ones.values():
            new_ones.clear()
        self.acknowledged_since_save = set()


def numbers_in(runs: IntervalSet) -> list[int]:
    return [i for start, stop in runs for i in range(start, stop)]


# ---- the machine --------------------------------------------------------------------------------------------


class SharingMachine(RuleBasedStateMachine):
    """Members share a stream; nothing breaks but members."""

    def __init__(self):
        super().__init__()
        self.now = 100.0
        self.states = IndexStates()
        self.plain = self.saved = PlainGroup()
        self.promises = Promises()
        self.handed_out = 0
        self.numbers: list[tuple[int, int]] = []  # every lease ever given
        self.takes: list[list[Lease]] = []
        self._folder = tempfile.TemporaryDirectory()
        self.log = self.open_log()
        self.group = self.log.load(KEY)

    def open_log(self) -> GroupLog:
        return GroupLog(Path(self._folder.name) / "groups.sqlite", clock=lambda: self.now)

    @initialize(limit=st.sampled_from([1, 2, 3, 10]))
    def choose_limit(self, limit):
        self.group.max_deliveries = limit
        self.plain.max_deliveries = limit
        self.group.is_dirty = True  # on disk from the start; the first frames of a group save all of it
        self.save()

    # ---- the stream

    @rule(
        states=st.lists(
            st.sampled_from(
                [
                    FrameState.stored,
                    FrameState.stored,
                    FrameState.missing,
                    FrameState.pending,
                    FrameState.rejected,
                    FrameState.incomplete,
                ]
            ),
            min_size=1,
            max_size=8,
        )
    )
    def frames_come(self, states):
        for index, state in enumerate(states, self.states.announced):
            self.states.announce(index + 1)
            if state is not FrameState.pending:
                self.states.set(index, index + 1, state, "dropped")

    @rule(state=st.sampled_from([FrameState.missing, FrameState.incomplete]))
    def gap_closes(self, state):
        self.states.account(0, self.states.announced, state, "gap")

    def missing(self) -> list[int]:
        return [i for i in range(self.states.announced) if self.states[i] in (FrameState.missing, FrameState.rejected)]

    @precondition(lambda self: self.missing())
    @rule(data=st.data(), state=st.sampled_from([FrameState.late, FrameState.stored]))
    def frame_comes_late(self, data, state):
        """After its chunk was sealed, or before that but after a gap time-out."""
        self.frame_comes_late_at(data.draw(st.sampled_from(self.missing())), state)

    def frame_comes_late_at(self, index, state):
        self.states.set(index, index + 1, state)

    # ---- members

    @rule(member=st.sampled_from(MEMBERS), n=st.integers(1, 5), lease_s=st.sampled_from([1.0, 5.0]))
    def member_takes(self, member, n, lease_s):
        expected = self.plain.take(self.states, self.now, n)
        leases = self.group.take(self.states, member, lease_s, n)
        assert [(lease.frame_index, lease.delivery, lease.is_late) for lease in leases] == expected
        assert all(lease.deadline == self.now + lease_s for lease in leases)
        self.plain.lease(leases)
        for lease in leases:
            self.promises.take(lease, member, self.now, self.states)
        self.numbers += [(lease.frame_index, lease.number) for lease in leases]
        assert len({number for _, number in self.numbers}) == len(self.numbers), "a number is given once"
        if leases:
            self.takes.append(leases)
        self.note_taken(leases)

    @precondition(lambda self: self.numbers)
    @rule(data=st.data())
    def member_acknowledges(self, data):
        """Any lease ever given: a member may be slow, dead and back, or wrong."""
        index, number = data.draw(st.sampled_from(self.numbers[-12:]))
        if self.plain.acknowledge(index, number):
            self.group.acknowledge(index, number)
            self.promises.acknowledge(index, number)
        else:
            with pytest.raises(StaleLease, match=f"frame {index} "):
                self.group.acknowledge(index, number)

    def stale(self) -> list[tuple[int, int]]:
        """Leases of frames that are, or will be, somebody else's."""
        fates = self.plain.fates
        return [(i, number) for i, number in self.numbers if i in fates and fates[i].number not in (number, 0)]

    @precondition(lambda self: self.stale())
    @rule(data=st.data())
    def stale_member_speaks_up(self, data):
        index, number = data.draw(st.sampled_from(self.stale()))
        with pytest.raises(StaleLease, match=f"lease on frame {index} has run out"):
            self.group.acknowledge(index, number)
        self.group.give_back(index, number)

    @precondition(lambda self: self.plain.of("leased"))
    @rule(data=st.data())
    def member_acknowledges_in_time(self, data):
        index = data.draw(st.sampled_from(self.plain.of("leased")))
        number = self.plain.fates[index].number
        assert self.plain.acknowledge(index, number)
        self.group.acknowledge(index, number)
        self.promises.acknowledge(index, number)

    @precondition(lambda self: self.plain.of("leased"))
    @rule(data=st.data(), delay_s=st.sampled_from([0.0, 0.5, 3.0]), counts=st.booleans())
    def member_gives_back(self, data, delay_s, counts):
        index = data.draw(st.sampled_from(self.plain.of("leased")))
        number, _ = self.promises.open.pop(index)
        self.plain.give_back(index, number, self.now + delay_s if delay_s else 0.0, counts)
        self.group.give_back(index, number, delay_s, counts=counts)

    @precondition(lambda self: self.takes)
    @rule(data=st.data(), backwards=st.booleans())
    def last_frames_do_not_fit(self, data, backwards):
        """They never left; some time may have passed, and others may have taken since."""
        taken = data.draw(st.sampled_from(self.takes[:-4:-1]))
        gone = [at for at, lease in enumerate(taken, 1) if self.group.leases.get(lease.frame_index) is not lease]
        rest = taken[data.draw(st.integers(max(gone, default=0), len(taken))) :]
        for lease in reversed(rest) if backwards else rest:
            self.group.untake(lease)
            self.promises.untake(lease, is_newest=lease.number in self.plain.newest_take)
            self.plain.untake(lease)

    @rule(seconds=st.sampled_from([0.4, 1.0, 4.0, 20.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def member_asks_for_the_end(self):
        self.plain.notice_late(self.states)
        below = range(self.states.watermark)
        outstanding = self.plain.of("leased") + [i for i in self.plain.of("waiting") if i in below]
        to_come = [i for i in below if i >= self.plain.cursor and self.states.is_readable(i)]
        assert self.group.is_drained(self.states) is not bool(outstanding + to_come)
        assert self.group.lag(self.states) == len(outstanding + to_come)

    # ---- somebody who looks after groups

    @precondition(lambda self: self.plain.of("dead"))
    @rule(data=st.data(), is_retried=st.booleans())
    def dead_letters_are_seen_to(self, data, is_retried):
        chosen = data.draw(st.lists(st.sampled_from(self.plain.of("dead")), unique=True))
        done = self.group.retry_dead([*chosen, 10**9]) if is_retried else self.group.drop_dead([*chosen, 10**9])
        assert done == chosen
        for index in chosen:
            fate = self.plain.fates[index]
            waiting = replace(fate, what="waiting", number=0, until=0.0, excused=fate.delivery)
            self.plain.fates[index] = waiting if is_retried else Fate("left_out")
            self.promises.open.pop(index, None)

    @rule(limit=st.sampled_from([1, 2, 3, 10]))
    def limit_changes(self, limit):
        self.group.max_deliveries = limit
        if limit == self.plain.max_deliveries:
            return
        self.plain.max_deliveries = limit
        for index in self.plain.of("waiting"):
            self.plain.come_back(index, self.plain.fates[index])

    # ---- the service

    def note_taken(self, leases):
        """New frames are noted before they leave; what could not be read any more is new if it ever comes."""
        self.promises.may_come_again -= set(self.plain.of("skipped"))
        if self.plain.is_more:
            self.note_saved()
        elif any(lease.delivery == 1 for lease in leases):
            self.handed_out = self.plain.cursor

    def note_saved(self):
        """The whole state is on disk."""
        assert not self.group.is_dirty
        self.saved = copy.deepcopy(self.plain)
        self.saved_at = self.now
        self.handed_out = self.plain.cursor
        self.promises.save()

    def save(self):
        self.log.save({KEY: self.group}, is_last=True)
        self.note_saved()

    # ---- always

    @invariant()
    def tables_agree(self):
        group, plain = self.group, self.plain
        assert group.cursor == plain.cursor
        assert sorted(group.leases) == plain.of("leased")
        assert sorted(group.dead_letters) == plain.of("dead")
        assert sorted(i for i in group.waiting if group.waiting[i].delivery) == [
            i for i in plain.of("waiting") if plain.fates[i].delivery
        ]
        assert numbers_in(group.left_out) == plain.of("left_out")
        assert numbers_in(group.skipped) == plain.of("skipped")
        assert [(one.frame_index, one.is_leased, one.delivery) for one in group.unacknowledged()] == [
            (i, fate.what == "leased", fate.delivery)
            for i, fate in sorted(plain.fates.items())
            if fate.what in ("leased", "waiting") and fate.delivery
        ]
        assert group.last_acknowledged == max((i for i in plain.of("done")), default=None) or plain.cursor == 0

    @invariant()
    def next_event_is_the_first_to_come(self):
        ahead = [fate.until for fate in self.plain.fates.values() if fate.what in ("leased", "waiting") and fate.until]
        assert self.group.next_event() == (pytest.approx(min(ahead)) if ahead else None)

    def teardown(self):
        """A last member takes all that is left: every readable frame is done, left out, or a dead letter."""
        self.now += 1000
        self.states.account(0, self.states.announced, FrameState.missing, "the run has ended")
        assert self.group.lag(self.states) >= 0
        while expected := self.plain.take(self.states, self.now, 7):
            leases = self.group.take(self.states, "last", 10.0, 7)
            assert [(lease.frame_index, lease.delivery, lease.is_late) for lease in leases] == expected
            for lease in leases:
                self.promises.take(lease, "last", self.now, self.states)
                self.group.acknowledge(lease.frame_index, lease.number)
                self.promises.acknowledge(lease.frame_index, lease.number)
                self.plain.fates[lease.frame_index] = Fate("done")
        assert not self.group.take(self.states, "last", 10.0, 7)
        assert self.group.is_drained(self.states), "dead letters do not hold up the end"
        assert self.group.next_event() is None
        assert self.group.lag(self.states) == 0
        accounted = self.promises.acknowledged | set(self.group.dead_letters) | set(numbers_in(self.group.left_out))
        lost = set(self.states.readable().tolist()) - accounted
        assert not {i for i in lost if i < self.group.cursor}, "no readable frame is lost"
        assert self.group.cursor >= self.states.watermark
        self.log.close()
        self._folder.cleanup()


class TroubledMachine(SharingMachine):
    """The same, with a service that stops or is killed, power that fails, damage, and people who change their minds."""

    @precondition(lambda self: self.states.readable().size)
    @rule(data=st.data())
    def frame_is_pruned(self, data):
        index = data.draw(st.sampled_from(self.states.readable().tolist()))
        self.states.set(index, index + 1, FrameState.pruned)

    @rule(data=st.data())
    def stream_is_read_from_elsewhere(self, data):
        """Its states are built anew, where nobody remembers which frames came late."""
        if self.missing():
            self.frame_comes_late_at(data.draw(st.sampled_from(self.missing())), FrameState.late)
        states = IndexStates()
        for part in self.states.ranges():
            if part.state != "pending":
                states.set(part.start, part.stop, FrameState[part.state], part.cause)
        states.announce(self.states.announced)
        states.late_order.clear()
        self.states = states

    @rule(member=st.sampled_from(MEMBERS))
    def damaged_frame(self, member):
        expected = self.plain.take(self.states, self.now, 1)
        leases = self.group.take(self.states, member, 9.0, 1)
        assert [lease.frame_index for lease in leases] == [index for index, _, _ in expected]
        self.plain.lease(leases)
        self.note_taken(leases)
        for lease in leases:
            self.group.set_aside(lease, "its checksum is wrong")
            self.plain.fates[lease.frame_index].what = "dead"
            self.promises.open.pop(lease.frame_index, None)
            self.promises.may_come_again.add(lease.frame_index)
            assert self.group.dead_letters[lease.frame_index].why == "its checksum is wrong"

    @rule(data=st.data())
    def group_is_sent_elsewhere(self, data):
        index = data.draw(st.integers(0, self.states.announced + 3))
        self.group.seek(index)
        self.plain.seek(index)
        self.promises.seek(index)
        self.note_saved()

    @rule()
    def state_is_saved(self):
        self.save()

    @rule(is_killed=st.booleans())
    def service_restarts(self, is_killed):
        if not is_killed:
            self.save()
        self.log.close()
        self.log = self.open_log()
        self.group = self.log.load(KEY)
        self.promises.crash(range(self.saved.cursor, self.handed_out))
        self.plain = self.saved.restarted(self.handed_out)
        for index in self.plain.of("waiting"):
            fate = self.plain.fates[index]
            if fate.until > self.saved_at:  # what was left of a delay when it was saved is still to come
                self.plain.fates[index] = replace(fate, until=self.now + fate.until - self.saved_at)
            else:
                self.plain.fates[index] = replace(fate, until=0.0)
        self.promises.open = {
            i: (f.number, 0.0) for i, f in self.plain.fates.items() if f.number and f.what in ("waiting", "dead")
        }

    @rule(n=st.integers(1, 6))
    def power_fails(self, n):
        """The last frames are gone, as if they had never come; some may come again."""
        states, kept = IndexStates(), max(self.states.announced - n, 0)
        for part in self.states.ranges(0, kept):
            if part.state != "pending":
                states.set(part.start, part.stop, FrameState[part.state], part.cause)
        states.announce(kept)
        self.states = states
        self.service_restarts(is_killed=True)


def machine_test(machine: type[SharingMachine]) -> type:
    case = machine.TestCase
    case.settings = settings(
        max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    return case


TestSharing = machine_test(SharingMachine)
TestTroubled = machine_test(TroubledMachine)
