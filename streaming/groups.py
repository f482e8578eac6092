"""Consumer groups on disk: SQLite, written in batches.

What a group hands out for the first time is noted before it leaves (one small write a batch: 10 µs), the
rest every 50 ms. So after a crash, whatever may have been in somebody's hands comes again as a
redelivery. A lost acknowledgement means redelivery, never loss.
"""

import contextlib
import functools
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from storage.errors import NewerFile, StateUnreadable
from streaming.group import MAX_DELIVERIES, DeadLetter, Group, Lease, Outstanding, PackedGroup

__all__ = ["DeadLetter", "Group", "GroupKey", "GroupLog", "Lease", "Outstanding"]

log = logging.getLogger("nearline.groups")

GroupKey = tuple[str, int, str, str]

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE consumer_group (id INTEGER PRIMARY KEY, experiment TEXT, run INTEGER, data_source TEXT, name TEXT,
                             state BLOB, UNIQUE (experiment, run, data_source, name));
CREATE TABLE handed_out (id INTEGER PRIMARY KEY, cursor INTEGER);
CREATE TABLE piece (id INTEGER, kind TEXT, number INTEGER, content BLOB, PRIMARY KEY (id, kind, number)) WITHOUT ROWID;
"""
# Another process may be writing its groups; longer than that, and they stay in memory for the moment.
_LOCKED_S = 1.0


class GroupLog:
    """Group states on disk; a damaged file is moved aside, and all groups begin again.

    That delivers what was done once more, but nobody waits for an operator, and nothing is lost.

    Raises
    ------
    NewerFile : the file was written by a later version of this program.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._ids: dict[GroupKey, int] = {}
        self._has_failed = False
        try:
            self._db = _open(path)
        except sqlite3.OperationalError:
            raise  # locked, full, or not ours: nothing is wrong with what it says
        except sqlite3.DatabaseError as error:
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
        """The group as it was last saved; a new one if it never was, or if that cannot be understood.

        Raises
        ------
        StateUnreadable : the file cannot be read at the moment.
        """
        try:
            group = self._load(key)
        except sqlite3.Error as error:
            raise StateUnreadable(
                f"group {key[3]} cannot be read from {self._path}: {error}; if it stays so, stop the service and "
                "move the file away, all groups then begin again"
            ) from error
        except msgspec.MsgspecError as error:
            log.error("group %s in %s is damaged (%s); it begins again", key[3], self._path, error)
            group = Group(clock=self._clock)
        group.persist = functools.partial(self._persist, key, group)
        return group

    def _load(self, key: GroupKey) -> Group:
        row = self._db.execute(
            "SELECT id, state, cursor FROM consumer_group LEFT JOIN handed_out USING (id) "
            "WHERE experiment = ? AND run = ? AND data_source = ? AND name = ?",
            key,
        ).fetchone()
        if row is None:
            return Group(clock=self._clock)
        group_id, state, handed_out = row
        self._ids[key] = group_id
        pieces = self._db.execute("SELECT kind, number, content FROM piece WHERE id = ? ORDER BY number", (group_id,))
        packed = msgspec.msgpack.decode(state, type=PackedGroup)
        return Group.restored(packed, pieces, handed_out=handed_out or 0, clock=self._clock)

    def names(self, stream: tuple[str, int, str]) -> list[str]:
        """The groups of a stream that were ever saved, by name."""
        rows = self._db.execute(
            "SELECT name FROM consumer_group WHERE experiment = ? AND run = ? AND data_source = ? ORDER BY name", stream
        )
        return [name for (name,) in rows]

    def forget_runs(self, is_gone: Callable[[str, int], bool]) -> None:
        """Forget the groups of runs that are no more: a new run of that number begins with new ones."""
        runs = self._db.execute("SELECT DISTINCT experiment, run FROM consumer_group").fetchall()
        gone = [run for run in runs if is_gone(*run)]
        if not gone:
            return
        ids = "SELECT id FROM consumer_group WHERE experiment = ? AND run = ?"
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for table in ("handed_out", "piece", "consumer_group"):
                self._db.executemany(f"DELETE FROM {table} WHERE id IN ({ids})", gone)

    def save(self, groups: Mapping[GroupKey, Group], *, is_last: bool = False) -> None:
        """Write the groups that have changed, in one transaction.

        is_last : before the service ends: also what is left of delays, which is not written while they run.
        """
        dirty = [(k, group) for k, group in groups.items() if group.is_dirty or (is_last and group.is_delayed)]
        if not dirty:
            return
        with self._db:  # commits, or rolls back
            self._db.execute("BEGIN IMMEDIATE")
            ids = {key: self._write(key, group) for key, group in dirty}
        self._ids |= ids
        for _, group in dirty:
            group.saved()

    def close(self) -> None:
        self._db.close()

    def _write(self, key: GroupKey, group: Group) -> int:
        """Write one group within a transaction; its id."""
        state = msgspec.msgpack.encode(group.packed())
        (group_id,) = self._db.execute(
            "INSERT INTO consumer_group (experiment, run, data_source, name, state) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET state = excluded.state RETURNING id",
            (*key, state),
        ).fetchone()
        self._db.execute("INSERT OR REPLACE INTO handed_out VALUES (?, ?)", (group_id, group.cursor))
        for kind, number, content in group.pieces():
            if content is None:
                self._db.execute("DELETE FROM piece WHERE id = ? AND kind = ? AND number = ?", (group_id, kind, number))
            else:
                self._db.execute("INSERT OR REPLACE INTO piece VALUES (?, ?, ?, ?)", (group_id, kind, number, content))
        return int(group_id)

    def _persist(self, key: GroupKey, group: Group, is_whole: bool) -> None:
        """Before new frames leave; a disk that refuses must not keep readers from reading."""
        try:
            if is_whole or key not in self._ids:
                group.is_dirty = True
                self.save({key: group})
            else:
                self._db.execute("INSERT OR REPLACE INTO handed_out VALUES (?, ?)", (self._ids[key], group.cursor))
        except sqlite3.Error as error:
            if not self._has_failed:
                log.error("cannot note what group %s hands out: %s; after a crash it may come unmarked", key[3], error)
            self._has_failed = True
            return
        self._has_failed = False


def _open(path: Path) -> sqlite3.Connection:
    # isolation_level None: transactions begin and end where it is written.
    db = sqlite3.connect(path, timeout=_LOCKED_S, check_same_thread=False, isolation_level=None)
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
    with db:
        db.execute("BEGIN IMMEDIATE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise NewerFile(
                f"{path} has schema {version} of the consumer groups, this program knows {_SCHEMA_VERSION}; "
                "install the version that wrote it, or move the file away and let all groups begin again"
            )
        if version < _SCHEMA_VERSION:
            _migrate_from_0(db)
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


def _migrate_from_0(db: sqlite3.Connection) -> None:
    """From a floor and the indices acknowledged above it (or from nothing)."""
    old: list[tuple[str, int, str, str, int, int, bytes]] = []
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'consumer_group'").fetchone():
        old = db.execute(
            "SELECT experiment, run, data_source, name, floor, cursor, acknowledged FROM consumer_group"
        ).fetchall()
        db.execute("DROP TABLE consumer_group")
    for statement in _SCHEMA.split(";")[:-1]:
        db.execute(statement)
    for *key, floor, cursor, packed in old:
        acknowledged = set(msgspec.msgpack.decode(packed, type=list[int]))
        handed_out = [Lease(0, i, "", 0.0, 1) for i in range(floor, cursor) if i not in acknowledged]
        state = PackedGroup(cursor, -1, MAX_DELIVERIES, handed_out, [])
        db.execute(
            "INSERT INTO consumer_group (experiment, run, data_source, name, state) VALUES (?, ?, ?, ?, ?)",
            (*key, msgspec.msgpack.encode(state)),
        )


def _move_aside(path: Path) -> Path:
    """Keep a damaged database under another name; its log first, which means nothing without it."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    for end in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
    return aside
