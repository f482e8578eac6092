"""Groups on disk: whatever is killed, filled up or damaged, frames come again and none is lost."""

import logging
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from storage.errors import NewerFile, StateUnreadable
from storage.states import FrameState, IndexStates
from streaming.groups import Group, GroupLog

KEY = ("lyso", 1, "eiger", "mine")
OTHER = ("lyso", 1, "eiger", "yours")


def stored(n: int) -> IndexStates:
    states = IndexStates()
    states.set(0, n, FrameState.stored)
    return states


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "groups.sqlite"


@pytest.fixture
def open_log(path):
    """Logs on one file, closed when the test is over."""
    logs = []

    def open_one() -> GroupLog:
        logs.append(GroupLog(path))
        return logs[-1]

    yield open_one
    for one in logs:
        one.close()


def deliveries(group: Group, states: IndexStates) -> list[tuple[int, int]]:
    return [(lease.frame_index, lease.delivery) for lease in group.take(states, "m", 60, 1000)]


def test_groups_of_runs_that_are_no_more_are_forgotten(open_log):
    """Or a run that is taken anew under its number would begin where the old one had ended."""
    log, other_run = open_log(), ("lyso", 2, "eiger", "mine")
    for key in (KEY, OTHER, other_run):
        group = log.load(key)
        group.drop_dead([])
        group.take(stored(10), "m", 60, 4)
        group.seek(3)
        log.save({key: group})
    log.forget_runs(lambda experiment, run: (experiment, run) == ("lyso", 1))
    assert log.names(KEY[:3]) == []
    assert open_log().load(KEY).cursor == 0
    assert open_log().load(other_run).cursor == 3


# ---- what is kept --------------------------------------------------------------------------------------


def test_a_delay_goes_on_over_a_restart_although_nothing_else_happens(open_log):
    log, begun = open_log(), time.monotonic()
    group = log.load(KEY)
    (lease,) = group.take(stored(1), "ada", 60, 1)
    group.give_back(0, lease.number, delay_s=50)
    log.save({KEY: group})
    group.clock = lambda: begun + 45
    log.save({KEY: group}, is_last=True)
    assert 3 < open_log().load(KEY).waiting[0].deadline - time.monotonic() < 6


def test_everything_is_kept(open_log):
    """A group with something of each kind, before and after."""
    states, log = stored(10), open_log()
    states.set(3, 4, FrameState.missing)
    group = log.load(KEY)
    group.seek(1)
    group.max_deliveries = 3
    leases = {lease.frame_index: lease for lease in group.take(states, "ada", 60, 6)}
    assert group.take_latest(states) == 9
    group.acknowledge(1, leases[1].number)
    group.set_aside(leases[2], "its checksum is wrong")
    group.give_back(4, leases[4].number, delay_s=50)
    group.give_back(5, leases[5].number)
    log.save({KEY: group})
    again = open_log().load(KEY)
    assert again.max_deliveries == 3
    assert again.dead_letters == group.dead_letters
    assert again.describe(states) | {"unacknowledged": 0} == group.describe(states) | {"unacknowledged": 0}
    assert [(one.frame_index, one.is_leased, one.member, one.delivery) for one in again.unacknowledged()] == [
        (index, False, "ada", 1) for index in (4, 5, 6, 7)
    ]
    assert 49 < again.next_event() - time.monotonic() <= 50, "what was left of the delay"
    assert again.take_latest(states) is None
    again.acknowledge(6, leases[6].number)  # by a member that has outlived the service
    assert deliveries(again, states) == [(5, 2), (7, 2), (8, 1), (9, 1)]


def test_restarts_bring_no_frame_nearer_to_the_dead_letters(open_log):
    states, log = stored(1), open_log()
    group = log.load(KEY)
    group.max_deliveries = 1
    for delivery in range(1, 5):
        assert deliveries(group, states) == [(0, delivery)]
        log.save({KEY: group})
        group = log.load(KEY)
    assert not group.dead_letters


def test_acknowledgement_is_saved(open_log):
    states, log = stored(2), open_log()
    group = log.load(KEY)
    first, _ = group.take(states, "m", 60, 2)
    log.save({KEY: group})
    group.acknowledge(0, first.number)
    log.save({KEY: group})
    assert deliveries(log.load(KEY), states) == [(1, 2)]


def test_groups_are_listed_by_stream(open_log):
    log = open_log()
    keys = [KEY, OTHER, ("lyso", 2, "eiger", "elsewhere"), ("lyso", 1, "cam", "elsewhere")]
    groups = {key: log.load(key) for key in keys}
    assert log.names(KEY[:3]) == []
    for group in groups.values():
        group.seek(1)
    assert log.names(KEY[:3]) == ["mine", "yours"]


def test_only_pieces_that_changed_are_written(open_log, path):
    """A group on a sparse stream of millions of frames is not written anew every 50 ms."""
    states, log = IndexStates(), open_log()
    for start in range(0, 400_000, 2):
        states.set(start, start + 1, FrameState.stored)
    states.account(0, 400_000, FrameState.missing, "not a hit")
    group = log.load(KEY)
    rows = sqlite3.connect(path)
    while taken := group.take(states, "m", 60, 5000):
        for lease in taken:
            group.acknowledge(lease.frame_index, lease.number)
        before = dict(rows.execute("SELECT number, content FROM piece WHERE kind = 'skipped'"))
        log.save({KEY: group})
        after = dict(rows.execute("SELECT number, content FROM piece WHERE kind = 'skipped'"))
        assert len([number for number in after if after[number] != before.get(number)]) <= 2
    rows.close()
    assert len(after) > 5
    log.save({KEY: group})
    assert open_log().load(KEY).skipped.bounds == group.skipped.bounds


# ---- kill -9 -------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from storage.states import FrameState, IndexStates
from streaming.groups import GroupLog
states = IndexStates()
states.set(0, 100_000, FrameState.stored)
states.set(50, 60, FrameState.missing)
log = GroupLog(Path(sys.argv[1]))
key = ("lyso", 1, "eiger", "mine")
group = log.load(key)
say = lambda word, indices: print(word, *indices, flush=True)
while taken := group.take(states, "m", 60, 7):
    say("taken", [lease.frame_index for lease in taken])
    done = taken[::2]
    for lease in done:
        group.acknowledge(lease.frame_index, lease.number)
    say("acknowledged", [lease.frame_index for lease in done])
    if taken[0].frame_index % 3:
        log.save({key: group})
        say("saved", [lease.frame_index for lease in done])
"""


def test_kill_9_at_any_moment(path, open_log):
    """What was acknowledged and saved is done; all else that was handed out comes again, marked."""
    said: dict[str, set[int]] = {"taken": set(), "acknowledged": set(), "saved": set()}
    for n_lines in (1, 2, 40, 3, 90):
        command = [sys.executable, "-c", WORKER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            lines = [worker.stdout.readline() for _ in range(n_lines)]
            worker.kill()
            lines += worker.stdout.readlines()
        for word, *indices in (line.split() for line in lines if line.endswith("\n")):
            said[word].update(map(int, indices))
    taken = said["taken"]
    states = stored(max(taken) + 100)
    states.set(50, 60, FrameState.missing)
    found = dict(deliveries(open_log().load(KEY), states))
    assert len(said["saved"]) > 50
    assert not said["saved"] & found.keys()
    assert found.keys() | said["acknowledged"] >= taken
    assert all(found[index] > 1 for index in taken & found.keys())
    unseen = {index for index, delivery in found.items() if delivery == 1}
    assert unseen
    assert min(unseen) > max(taken)


# ---- a disk that refuses --------------------------------------------------------------------------------


def test_full_disk_keeps_nobody_from_reading(open_log, caplog):
    log, states = open_log(), stored(10)
    group = log.load(KEY)
    log._db.execute("PRAGMA query_only = 1")
    for _ in range(3):
        assert len(group.take(states, "m", 60, 2)) == 2
    with pytest.raises(sqlite3.Error):
        log.save({KEY: group})
    assert group.is_dirty, "to be tried again"
    assert [r.getMessage() for r in caplog.records if "cannot note what group mine hands out" in r.getMessage()] != []
    assert len(caplog.records) == 1, "said once"
    log._db.execute("PRAGMA query_only = 0")
    log.save({KEY: group})
    assert deliveries(open_log().load(KEY), states)[:7] == [*((i, 2) for i in range(6)), (6, 1)]


def test_unreadable_state_is_an_error_of_ours(open_log):
    log = open_log()
    log._db.execute("DROP TABLE consumer_group")
    with pytest.raises(StateUnreadable, match=r"group mine cannot be read from .*groups\.sqlite: no such table"):
        log.load(KEY)


# ---- damage and versions ----------------------------------------------------------------------------------


def fill(path: Path) -> None:
    """Two groups that have done three frames of ten, closed in good order."""
    log = GroupLog(path)
    groups = {key: log.load(key) for key in (KEY, OTHER)}
    for group in groups.values():
        for lease in group.take(stored(10), "m", 60, 3):
            group.acknowledge(lease.frame_index, lease.number)
    log.save(groups)
    log.close()


def overwrite(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


DAMAGE = {
    "not a database": lambda path: path.write_text("this is not a database, whatever its name says"),
    "header": lambda path: overwrite(path, 0, bytes(100)),
    "first page": lambda path: overwrite(path, 100, b"\xff" * 2000),
    "another page": lambda path: overwrite(path, 4096, b"\xff" * 4096),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:6000]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_moved_aside_and_groups_begin_again(path, open_log, caplog, damage):
    fill(path)
    damage(path)
    content = path.read_bytes()
    group = open_log().load(KEY)
    assert deliveries(group, stored(10)) == [(i, 1) for i in range(10)], "all once more, none lost"
    (aside,) = path.parent.glob("groups.sqlite.damaged-*[0-9]")
    assert aside.read_bytes() == content, "kept for whoever wants to look"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(aside) in record.getMessage()
    assert not list(path.parent.glob("*.damaged-*.damaged-*"))
    assert deliveries(open_log().load(KEY), stored(10)) == [(i, 2) for i in range(10)], "and it works again"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE consumer_group SET state = x'c1' WHERE name = 'mine'",
        "UPDATE consumer_group SET state = x'9105' WHERE name = 'mine'",
        "INSERT INTO piece SELECT id, 'dead_letter', 3, x'ff' FROM consumer_group WHERE name = 'mine'",
        "INSERT INTO piece SELECT id, 'skipped', 0, x'a141' FROM consumer_group WHERE name = 'mine'",
    ],
)
def test_damaged_group_begins_again_alone(path, open_log, caplog, statement):
    fill(path)
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()
    log = open_log()
    assert deliveries(log.load(KEY), stored(10)) == [(i, 1) for i in range(10)]
    assert "group mine in" in caplog.text
    assert deliveries(log.load(OTHER), stored(10)) == [(i, 1) for i in range(3, 10)]


def test_newer_file_is_refused(path, open_log):
    fill(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    content = path.read_bytes()
    with pytest.raises(NewerFile, match="has schema 7 of the consumer groups, this program knows 1; install"):
        open_log()
    assert path.read_bytes() == content


def test_file_of_the_first_schema_is_migrated(path, open_log):
    with sqlite3.connect(path) as db:
        db.execute(
            "CREATE TABLE consumer_group (experiment TEXT, run INTEGER, data_source TEXT, name TEXT, "
            "floor INTEGER, cursor INTEGER, acknowledged BLOB, PRIMARY KEY (experiment, run, data_source, name))"
        )
        db.execute("INSERT INTO consumer_group VALUES (?, ?, ?, ?, 2, 6, ?)", (*KEY, msgspec.msgpack.encode([3, 4])))
    db.close()
    log = open_log()
    assert log.names(KEY[:3]) == ["mine"]
    assert deliveries(log.load(KEY), stored(8)) == [(2, 2), (5, 2), (6, 1), (7, 1)]
    assert deliveries(open_log().load(KEY), stored(8)) == [(2, 2), (5, 2), (6, 2), (7, 2)]
