"""Consumer groups: every frame to one member at a time, none lost, whatever dies."""

import contextlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from storage.errors import BadName, GroupNeedsService, ProtocolError, StaleLease
from storage.models import StreamHeader
from storage.states import FrameState, IndexStates
from streaming import wire
from streaming.groups import Group
from streaming.retrieval import open_run

from .harness import ServiceProcess, connected, pixels, producing, record_run, serving, wait_for

REF = wire.StreamRef("lyso", 1, "eiger")


# ---- one group, by example (test_groups_model.py has all the rest) ----------------------------------


def group_on(n: int) -> tuple[Group, IndexStates]:
    """A new group on a stream of ``n`` stored frames."""
    states = IndexStates()
    states.set(0, n, FrameState.stored)
    return Group(), states


def indices(leases) -> list[int]:
    return [lease.frame_index for lease in leases]


def test_damaged_frame_does_not_hold_up_a_group():
    group, states = group_on(3)
    group.set_aside(group.take(states, "m", 9, 1)[0], "its checksum is wrong")
    assert indices(group.take(states, "m", 9, 3)) == [1, 2]
    assert group.dead_letters[0].why == "its checksum is wrong"


def test_frame_that_always_fails_becomes_a_dead_letter_that_says_why():
    group, states = group_on(1)
    group.max_deliveries = 2
    for _ in range(2):
        (lease,) = group.take(states, "ada", 9, 1)
        group.give_back(0, lease.number)
    assert group.take(states, "ada", 9, 1) == []
    assert group.dead_letters[0].why == "delivered 2 times, at last given back by ada"
    assert group.is_drained(states)
    group.retry_dead([0])
    assert [(lease.frame_index, lease.delivery) for lease in group.take(states, "ada", 9, 1)] == [(0, 3)]


def test_member_that_stops_does_not_bring_frames_nearer_to_the_dead_letters():
    group, states = group_on(1)
    group.max_deliveries = 1
    for delivery in (1, 2, 3):
        (lease,) = group.take(states, "ada", 9, 1)
        assert lease.delivery == delivery
        group.give_back(0, lease.number, counts=False)
    assert not group.dead_letters


def test_late_acknowledgement_counts_until_someone_else_has_the_frame():
    now = [0.0]
    group, states = group_on(2)
    group.clock = lambda: now[0]
    first, second = group.take(states, "slow", 1, 2)
    now[0] = 2.0
    group.acknowledge(0, first.number)
    assert indices(group.take(states, "quick", 1, 2)) == [1]
    with pytest.raises(StaleLease, match="lease on frame 1 has run out"):
        group.acknowledge(1, second.number)


def test_frame_that_came_late_is_delivered_after_all():
    group, states = group_on(4)
    states.set(1, 2, FrameState.missing, "dropped")
    assert indices(group.take(states, "m", 9, 9)) == [0, 2, 3]
    assert list(group.skipped) == [(1, 2)]
    states.set(1, 2, FrameState.late)
    assert [(lease.frame_index, lease.is_late) for lease in group.take(states, "m", 9, 9)] == [(1, True)]
    assert not group.skipped


def test_what_comes_again_goes_before_what_comes_late():
    group, states = group_on(4)
    states.set(0, 1, FrameState.missing, "dropped")
    first, *_ = group.take(states, "m", 9, 3)
    states.set(0, 1, FrameState.late)
    group.give_back(1, first.number)
    assert indices(group.take(states, "m", 9, 9)) == [1, 0]


@pytest.mark.parametrize("order", [reversed, iter], ids=["from the end", "from the start"])
@pytest.mark.parametrize("comes_late", [False, True])
def test_frames_that_do_not_fit_are_as_if_never_taken(order, comes_late):
    """Also with gaps between them, out of which a frame comes before they are taken again."""
    group, states = group_on(9)
    for gap in (2, 4, 6):
        states.set(gap, gap + 1, FrameState.missing, "dropped")
    leases = group.take(states, "m", 9, 5)
    assert indices(leases) == [0, 1, 3, 5, 7]
    if comes_late:
        states.set(4, 5, FrameState.late)
        assert not group.is_drained(states)  # looks for what came late
    for lease in order(leases[1:]):
        group.untake(lease)
    again = group.take(states, "m", 9, 9)
    assert sorted(indices(again)) == sorted([1, 3, 5, 7, 8, *([4] if comes_late else [])])
    assert {lease.delivery for lease in again} == {1}
    assert list(group.skipped) == ([(2, 3), (6, 7)] if comes_late else [(2, 3), (4, 5), (6, 7)])


def test_frames_untaken_after_others_took_newer_ones_come_marked():
    """The others must not get an older frame as a new one."""
    group, states = group_on(4)
    _, second = group.take(states, "ada", 9, 2)
    group.take(states, "ben", 9, 1)
    group.untake(second)
    assert [(lease.frame_index, lease.delivery) for lease in group.take(states, "ben", 9, 2)] == [(1, 2), (3, 1)]


def test_retried_dead_letter_has_all_its_deliveries_before_it():
    group, states = group_on(1)
    group.max_deliveries = 2
    for round_ in range(2):
        for _ in range(2):
            (lease,) = group.take(states, "ada", 9, 1)
            group.give_back(0, lease.number)
        assert list(group.dead_letters) == [0], f"in round {round_}"
        group.retry_dead([0])


def test_lower_limit_holds_for_frames_that_wait():
    group, states = group_on(1)
    (lease,) = group.take(states, "ada", 9, 1)
    group.give_back(0, lease.number)
    group.max_deliveries = 1
    assert group.dead_letters[0].why == "delivered 1 times, and the limit was set to 1"
    assert group.take(states, "ada", 9, 1) == []


def test_frame_that_was_pruned_while_it_waited_is_skipped():
    group, states = group_on(2)
    first, _ = group.take(states, "m", 9, 2)
    group.give_back(0, first.number)
    states.set(0, 1, FrameState.pruned)
    assert group.take(states, "m", 9, 2) == []
    assert list(group.skipped) == [(0, 1)]


def test_frame_that_came_late_and_was_pruned_holds_up_no_group_after_a_restart():
    group, states = group_on(3)
    states.set(1, 2, FrameState.missing, "dropped")
    states.set(1, 2, FrameState.late)
    states.set(1, 2, FrameState.pruned)
    for lease in group.take(states, "m", 9, 3):
        group.acknowledge(lease.frame_index, lease.number)
    again = Group.restored(group.packed(), [(kind, n, c) for kind, n, c in group.pieces() if c is not None])
    assert again.lag(states) == 0
    assert again.is_drained(states)
    assert list(again.skipped) == [(1, 2)]


@pytest.mark.parametrize(
    ("index", "dead", "left_out", "delivered"),
    [(0, [], [], [0, 1, 2, 3, 4, 5]), (2, [0], [1], [2, 3, 4, 5]), (5, [0, 2], [1, 3, 4], [5])],
    ids=["all anew", "back", "forward"],
)
def test_seek(index, dead, left_out, delivered):
    """Below it nothing comes any more, but dead letters stay; from it on each frame is new."""
    group, states = group_on(6)
    leases = group.take(states, "m", 9, 4)
    for lease in (leases[0], leases[2]):
        group.set_aside(lease, "its checksum is wrong")
    group.acknowledge(3, leases[3].number)
    group.seek(index)
    with pytest.raises(StaleLease, match="frame 1 is not leased to anyone"):
        group.acknowledge(1, leases[1].number)
    assert list(group.dead_letters) == dead
    assert [i for start, stop in group.left_out for i in range(start, stop)] == [i for i in left_out if i != 3]
    assert [(lease.frame_index, lease.delivery) for lease in group.take(states, "m", 9, 9)] == [
        (i, 1) for i in delivered
    ]


def test_stream_that_lost_its_last_frames():
    """Power failed: what was handed out and is gone holds nothing up; what was skipped is delivered if it comes now."""
    group, states = group_on(6)
    states.set(3, 4, FrameState.missing, "dropped")
    group.take(states, "m", 9, 5)
    group = Group.restored(group.packed(), group.pieces())
    shorter = IndexStates()
    shorter.set(0, 2, FrameState.stored)
    assert indices(group.take(shorter, "m", 9, 9)) == [0, 1]
    for index in (0, 1):
        group.acknowledge(index, group.leases[index].number)
    assert group.is_drained(shorter)
    shorter.set(2, 4, FrameState.stored)
    assert [(lease.frame_index, lease.is_late) for lease in group.take(shorter, "m", 9, 9)] == [(2, False), (3, True)]


def test_latest_gives_each_newest_frame_once_and_leaves_the_position_alone():
    group, states = group_on(3)
    assert [group.take_latest(states) for _ in range(2)] == [2, None]
    states.set(5, 6, FrameState.stored)  # beyond a gap that is still open
    assert [group.take_latest(states) for _ in range(2)] == [5, None]
    assert indices(group.take(states, "m", 9, 9)) == [0, 1, 2]


@pytest.mark.parametrize("index", [-1, 2**62 + 1])
def test_no_such_position(index):
    with pytest.raises(ProtocolError, match="cannot go on from frame"):
        Group().seek(index)


def test_no_such_limit():
    with pytest.raises(ProtocolError, match="at most 0 times; allow at least 1"):
        Group().max_deliveries = 0


def test_description_is_plain_json():
    group, states = group_on(2000)
    states.set(0, 1, FrameState.missing)
    now = [5.0]
    group.clock = lambda: now[0]
    group.set_aside(group.take(states, "ada", 9, 1)[0], "its checksum is wrong")
    lease, *_ = group.take(states, "ada", 9, 1500)
    now[0] = 7.5
    found = json.loads(json.dumps(group.describe(states)))
    assert found["cursor"] == 1502
    assert found["lag"] == 1998
    assert found["last_acknowledged"] is None
    assert found["n_unacknowledged"] == 1500
    assert len(found["unacknowledged"]) == 1000
    assert found["unacknowledged"][0] == {
        "frame_index": 2, "is_leased": True, "member": "ada", "remaining_s": 6.5, "delivery": 1
    }  # fmt: skip
    assert (found["n_skipped"], found["skipped"]) == (1, [[0, 1]])
    assert [letter["why"] for letter in found["dead_letters"]] == ["its checksum is wrong"]
    group.acknowledge(2, lease.number)
    assert group.last_acknowledged == 2


def test_busy_while_something_is_under_way_or_unsaved():
    now = [0.0]
    group, states = group_on(2)
    group.clock = lambda: now[0]
    assert not group.is_busy
    group.take(states, "gone", 9, 1)
    assert group.is_busy
    group.saved()
    assert group.is_busy
    now[0] = 9.0
    assert not group.is_busy, "a member that is gone for good keeps no group in memory"


def test_memory_follows_what_is_outstanding_not_what_has_passed():
    """A million frames with leases of an hour: neither leases nor the heap of their ends pile up."""
    group, states = group_on(1_000_000)
    most = 0
    held = []
    while leases := group.take(states, "m", 3600, 2000):
        for lease in held:
            group.acknowledge(lease.frame_index, lease.number)
        held = leases
        most = max(most, len(group.leases), len(group._deadlines), len(group._ready))
    assert most < 20_000


def test_members_and_a_writer_at_once():
    """The writer goes on while members take: gaps, frames that come after all, and the end."""
    group, states, n = Group(), IndexStates(), 20_000
    rng = random.Random(5)

    def write() -> None:
        for index in range(n):
            if rng.random() < 0.2:
                states.set(index, index + 1, FrameState.missing, "dropped")
                if rng.random() < 0.5:
                    states.set(index, index + 1, rng.choice([FrameState.late, FrameState.stored]))
            else:
                states.set(index, index + 1, FrameState.stored)

    writer = threading.Thread(target=write)
    writer.start()
    done: list[int] = []
    while writer.is_alive() or not group.is_drained(states):
        for lease in group.take(states, "m", 9, 50):
            group.acknowledge(lease.frame_index, lease.number)
            done.append(lease.frame_index)
    writer.join()
    assert sorted(done) == states.readable().tolist()


# ---- over the service -------------------------------------------------------------------------------

MEMBER = """
import sys, time
from streaming.retrieval import open_run
stream = open_run(sys.argv[1])["eiger"]
for frame in stream.follow(group="mine", lease_s=float(sys.argv[2])):
    print(frame.frame_index, frame.delivery, flush=True)
    time.sleep(float(sys.argv[3]))
"""


def member(address: str, lease_s: float = 60.0, pause: float = 0.002) -> subprocess.Popen:
    command = [sys.executable, "-c", MEMBER, f"{address}/lyso/1", str(lease_s), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said_by(process: subprocess.Popen) -> list[tuple[int, int]]:
    out, _ = process.communicate(timeout=60)
    return [tuple(map(int, line.split())) for line in out.splitlines()]


def test_two_processes_share_all_frames_exactly_once(tmp_path):
    with serving(tmp_path) as service, producing(service.address) as out:
        out.send_many([(i, pixels(i), {}) for i in range(50)])
        members = [member(service.address) for _ in range(2)]
        for index in range(50, 350):
            out.send(pixels(index))
            time.sleep(0.01)
        out.finish()
        shares = [said_by(m) for m in members]
    assert sorted(itertools.chain(*shares)) == [(i, 1) for i in range(350)]
    assert all(share == sorted(share) for share in shares), "rising order within a member"
    assert all(shares), "both had work"


LARGE = (1024, 1024)


def follow_large(address: str, shares: list[list[tuple[int, int]]]) -> None:
    """Take frames of 2 MiB as fast as they come, so that several answers are on their way."""
    frames = open_run("lyso/1", service=address)["eiger"].follow(group="swift", timeout=30)
    shares.append([(frame.frame_index, frame.delivery) for frame in frames])


@pytest.mark.parametrize("buffer_bytes", [512 << 20, 24 << 20], ids=["from memory", "most from disk"])
@pytest.mark.parametrize("n_members", [1, 3])
def test_frames_come_in_order_and_once_however_many_answers_are_on_their_way(tmp_path, buffer_bytes, n_members):
    """Of two requests that wait, the later may find frames first; what a fetch cannot carry goes to those behind it."""
    frame, shares = np.zeros(LARGE, np.uint16), list[list[tuple[int, int]]]()
    with serving(tmp_path, buffer_bytes=buffer_bytes) as service, producing(service.address) as out:
        header = StreamHeader(
            experiment="lyso", run=1, data_source="eiger", shape=LARGE, dtype="uint16", codec="raw", frames_per_chunk=20
        )
        out.start(header)
        members = [threading.Thread(target=follow_large, args=(service.address, shares)) for _ in range(n_members)]
        for number in range(120):
            out.send(frame)
            if number == 60:  # half of it is there before anybody asks
                for one in members:
                    one.start()
        out.finish()
        for one in members:
            one.join(60)
    assert sorted(itertools.chain(*shares)) == [(i, 1) for i in range(120)]
    assert all(share == sorted(share) for share in shares)


def test_asking_without_waiting_gets_all_there_is(tmp_path):
    """Also what must be fetched from disk first: an empty answer must not overtake it."""
    frame = np.zeros((2048, 2048), np.uint16)
    with serving(tmp_path, buffer_bytes=24 << 20) as service, producing(service.address) as out:
        header = StreamHeader(
            experiment="lyso", run=1, data_source="eiger", shape=frame.shape, dtype="uint16", codec="raw"
        )
        out.start(header)
        for _ in range(30):
            out.send(frame)
        out.finish()
        stream = open_run("lyso/1", service=service.address)["eiger"]
        assert [f.frame_index for f in stream.follow(group="hasty", timeout=0)] == list(range(30))


def test_killed_member_s_frames_go_to_another(tmp_path):
    with serving(tmp_path) as service:
        record_run(service.address, range(30))
        victim = member(service.address, lease_s=1.0, pause=0.02)
        taken = [int(victim.stdout.readline().split()[0]) for _ in range(5)]
        victim.kill()
        taken += [int(line.split()[0]) for line in victim.stdout]
        victim.wait()
        victim.stdout.close()
        rest = said_by(member(service.address))
    done = set(taken[:-1])  # the last one was in its hands
    assert {i for i, _ in rest} >= set(range(30)) - done
    assert {i for i, _ in rest} | done == set(range(30))
    redelivered = {i: delivery for i, delivery in rest if i <= max(taken)}
    assert redelivered
    assert all(delivery > 1 for delivery in redelivered.values())


def test_member_that_leaves_its_loop_gives_back_at_once(tmp_path):
    with serving(tmp_path) as service:
        record_run(service.address, range(10))
        stream = open_run(f"{service.address}/lyso/1")["eiger"]
        for frame in stream.follow(group="mine"):
            if frame.frame_index == 4:
                break
        started = time.monotonic()
        rest = [(f.frame_index, f.delivery) for f in stream.follow(group="mine")]
        assert time.monotonic() - started < 5, "without waiting for the leases of 60 s to run out"
    assert [i for i, _ in rest] == [4, 5, 6, 7, 8, 9]
    assert rest[0][1] == 2


def test_member_gone_while_it_waits_holds_nothing(tmp_path):
    """Frames that come are not leased to a connection that was cut: they go to who is there."""
    with serving(tmp_path) as service, producing(service.address) as out:
        out.send(pixels(0))
        gone = member(service.address)
        gone.stdout.readline()
        time.sleep(0.3)  # it is waiting for frame 1 now
        gone.kill()
        gone.wait()
        gone.stdout.close()
        time.sleep(0.2)
        out.send(pixels(1))
        stream = open_run(f"{service.address}/lyso/1")["eiger"]
        assert next(stream.follow(group="mine", timeout=5)).frame_index == 1


def test_acknowledged_by_hand_is_what_is_named_and_nothing_else(tmp_path):
    with serving(tmp_path) as service:
        record_run(service.address, range(8))
        stream = open_run(f"{service.address}/lyso/1")["eiger"]
        with contextlib.closing(stream.follow(group="mine", acknowledges=False)) as member:
            taken = list(itertools.islice(member, 6))
            for frame in (taken[0], taken[3], taken[5]):  # the last of them is still in hand
                thread = threading.Thread(target=frame.acknowledge)
                thread.start()
                thread.join()
        again = {frame.frame_index: frame.delivery for frame in stream.follow(group="mine")}
        assert list(again) == [1, 2, 4, 6, 7]
        assert [again[index] for index in (1, 2, 4)] == [2, 2, 2]
        with pytest.raises(GroupNeedsService, match="acknowledged"):
            stream[0].acknowledge()


def test_the_end_waits_for_what_is_acknowledged_by_hand(tmp_path):
    """Also for what is given back behind the loop; what never gets its word comes again when its lease has run out."""
    with serving(tmp_path) as service:
        record_run(service.address, range(4))
        stream = open_run(f"{service.address}/lyso/1")["eiger"]
        seen, results = [], []
        for frame in stream.follow(group="mine", acknowledges=False, lease_s=2.0, timeout=30):
            seen.append((frame.frame_index, frame.delivery))
            if frame.delivery > 1:
                frame.acknowledge()
            elif frame.frame_index == 1:
                threading.Timer(0.3, frame.retry_later).start()
            elif frame.frame_index != 2:  # which is forgotten
                results.append(frame)
                threading.Timer(0.5, frame.acknowledge).start()
        assert sorted(seen) == [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
        assert stream.groups["mine"]["lag"] == 0


def test_group_survives_a_restart_of_the_service(tmp_path):
    with serving(tmp_path) as service:
        record_run(service.address, range(20))
    with ServiceProcess(tmp_path) as service:
        stream = open_run(f"{service.address}/lyso/1")["eiger"]
        first = [f.frame_index for f in itertools.islice(stream.follow(group="mine"), 8)]
        time.sleep(0.3)  # group states are saved every 50 ms
        service.kill()
    with serving(tmp_path) as service:
        rest = [f.frame_index for f in open_run(f"{service.address}/lyso/1")["eiger"].follow(group="mine")]
    assert first == list(range(8))
    assert rest == list(range(7, 20)), "the eighth was in its hands"


def test_the_lag_of_a_group_that_nobody_asks_for_is_told_after_a_restart(tmp_path):
    with ServiceProcess(tmp_path) as service:
        with producing(service.address) as out:
            for index in range(20):
                out.send(pixels(index))
            with contextlib.closing(open_run(f"{service.address}/lyso/1")["eiger"].follow(group="stalled")) as frames:
                assert [f.frame_index for f in itertools.islice(frames, 5)] == list(range(5))
        time.sleep(0.3)  # group states are saved every 50 ms
        service.kill()
    with serving(tmp_path) as service:
        wait_for(lambda: service.status()["groups"])
        (row,) = service.status()["groups"]
        assert (row["group"], row["data_source"]) == ("stalled", "eiger")
        assert row["lag"] in (15, 16), "the fifth was in hand"


def test_run_taken_anew_under_its_number_begins_with_new_groups(tmp_path):
    """Somebody cleaned up by hand; the old group had seen everything there was."""
    for _ in range(2):
        with serving(tmp_path) as service:
            record_run(service.address, range(10))
            frames = open_run("lyso/1", service=service.address)["eiger"].follow(group="mine")
            assert [frame.frame_index for frame in frames] == list(range(10))
        shutil.rmtree(tmp_path / "lyso" / "1")


def test_leases_over_the_wire(tmp_path):
    """Stale acknowledgements are refused; nothing a member says can take another's frame."""
    with serving(tmp_path) as service, connected(service.address) as connection:
        record_run(service.address, range(3))

        def ask(**options):
            fields = {"group": "mine", "member": "m", "lease_s": 0.1, "max_frames": 1, "timeout_s": 3} | options
            return connection.ask_frames(wire.NextFrames(id=0, stream=REF, **fields))[0]

        first = ask()
        again = ask(max_frames=3)
        assert [i.frame_index for i in again.infos] == [1, 2]
        third = ask()
        assert third.infos[0].frame_index == 0
        assert third.deliveries == [2]
        with pytest.raises(StaleLease, match="lease on frame 0 has run out"):
            connection.ask(wire.Acknowledge(id=0, stream=REF, group="mine", leases=[(0, first.leases[0])]))
        connection.ask(wire.Acknowledge(id=0, stream=REF, group="mine", leases=[(0, third.leases[0])]))
        with pytest.raises(BadName):
            ask(group="../x")
