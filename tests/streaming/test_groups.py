"""Consumer groups: every frame to one member at a time, none lost, whatever dies."""

import itertools
import subprocess
import sys
import time

import pytest

from storage.errors import BadName, StaleLease
from storage.states import FrameState, IndexStates
from streaming import wire
from streaming.groups import Group, GroupLog
from streaming.retrieval import open_run

from .harness import ServiceProcess, connected, pixels, producing, record_run, serving

KEY = ("lyso", 1, "eiger", "mine")
REF = wire.StreamRef("lyso", 1, "eiger")


def group_on(n: int) -> tuple[Group, IndexStates]:
    """A new group on a stream of ``n`` stored frames."""
    states = IndexStates()
    states.set(0, n, FrameState.stored)
    return Group(), states


def test_crash_before_a_save_redelivers(tmp_path):
    """Acknowledgements of the last 50 ms may be lost: those frames come again."""
    _, states = group_on(4)
    log = GroupLog(tmp_path / "g")
    group = log.load(KEY)
    first, second = group.take(states, "m", 9, 2)
    group.acknowledge(0, first.number)
    log.save({KEY: group})
    group.acknowledge(1, second.number)
    assert [(one.frame_index, one.delivery) for one in log.load(KEY).take(states, "m", 9, 2)] == [(1, 2), (2, 1)]
    log.close()


def test_damaged_frame_does_not_hold_up_a_group():
    group, states = group_on(3)
    group.set_aside(group.take(states, "m", 9, 1)[0], "its checksum is wrong")
    assert [one.frame_index for one in group.take(states, "m", 9, 3)] == [1, 2]
    assert group.dead_letters[0].why == "its checksum is wrong"


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
        for index in range(50, 150):
            out.send(pixels(index))
            time.sleep(0.01)
        out.finish()
        shares = [said_by(m) for m in members]
    assert sorted(itertools.chain(*shares)) == [(i, 1) for i in range(150)]
    assert all(share == sorted(share) for share in shares), "rising order within a member"
    assert all(shares), "both had work"


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
