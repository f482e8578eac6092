"""What a power loss leaves of a folder, and disks that are full or slow.

`disk_shim.c`, preloaded into a process, logs each change below one folder and each sync. A `Disk`
is that log read up to any point; `Disk.lose_power` chooses, by seed, what of the unsynced rest had
reached the disk, and `Disk.write` builds the folder as it would be found. As hard as POSIX allows:
bytes are kept, lost, zero or torn by sectors in any order, names are kept or lost each by itself.
One recorded run gives as many images as there are points in its log.
"""

import contextlib
import copy
import functools
import json
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Disk", "FaultyDisk", "Loss", "mark"]

_RECORD = struct.Struct("<IB3xHHIQQQ")
_CONTROL = struct.Struct("<qIIQQqI")
_SECTOR = 512


@functools.cache
def built_shim() -> Path:
    """The compiled shim; the test is skipped where it cannot be made."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler (gcc or cc) on this machine to build the fault layer of the disk with")
    target = Path(tempfile.mkdtemp(prefix="nearline-shim-")) / "disk_shim.so"
    source = Path(__file__).with_name("disk_shim.c")
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(target), str(source)]
    subprocess.run([*command, "-lpthread"], check=True)
    return target


class FaultyDisk:
    """A folder on a disk that can be cut off, filled up and slowed down."""

    def __init__(self, root: Path, log: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.log = root.resolve(), log.absolute()
        self._before = Disk.scan(self.root)
        self._control_path = self.log.with_suffix(".control")
        self._control_path.write_bytes(_CONTROL.pack(-1, 0, 0, 0, 0, 0, 0).ljust(mmap.PAGESIZE, b"\0"))
        self.log.touch()
        with open(self._control_path, "r+b") as file:
            self._control = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    @property
    def environment(self) -> dict[str, str]:
        """For the processes that write to this disk."""
        return os.environ | {
            "LD_PRELOAD": str(built_shim()),
            "NEARLINE_DISK_ROOT": str(self.root),
            "NEARLINE_DISK_LOG": str(self.log),
            "NEARLINE_DISK_CONTROL": str(self._control_path),
        }

    def set_room(self, n_bytes: int | None) -> None:
        """What still fits; None: everything."""
        struct.pack_into("<q", self._control, 0, -1 if n_bytes is None else n_bytes)

    def ignore_syncs(self) -> None:
        """From now on a sync does nothing, and says that it did."""
        struct.pack_into("<I", self._control, 8, 1)

    def set_sync_s(self, seconds: float) -> None:
        """How long each sync takes."""
        struct.pack_into("<I", self._control, 12, int(seconds * 1e6))

    def set_write_s(self, seconds: float) -> None:
        """How long each write takes."""
        struct.pack_into("<I", self._control, 40, int(seconds * 1e6))

    def kill_after(self, n_changes: int) -> None:
        """Whoever makes so many more changes of the disk is dead; 0: nobody."""
        struct.pack_into("<q", self._control, 32, n_changes)

    @property
    def n_syncs(self) -> int:
        return struct.unpack_from("<Q", self._control, 16)[0]

    @property
    def n_refused(self) -> int:
        """How often something did not fit."""
        return struct.unpack_from("<Q", self._control, 24)[0]

    def disk(self, *, is_journaled: bool = False) -> "Disk":
        """As it was before the log began; `Disk.replay` goes on from there."""
        return Disk(*copy.deepcopy(self._before), log=self.log, is_journaled=is_journaled)


def mark(log: Path, **facts: Any) -> None:
    """Note in the log what somebody has been promised by now."""
    data = json.dumps(facts).encode()
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, _RECORD.pack(_RECORD.size + len(data), ord("M"), 0, 0, 0, 0, 0, 0) + data)
    finally:
        os.close(fd)


@dataclass(slots=True, eq=False)
class Node:
    """A file or folder: what is on the disk, and what is only in the page cache (with its place in the log)."""

    is_folder: bool
    content: bytearray = field(default_factory=bytearray)
    names: dict[str, "Node"] = field(default_factory=dict)
    unsynced: list[tuple[int, int | None, bytes, int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Naming:
    """An unsynced change of names: ``name`` in ``folder`` becomes ``node`` (None: goes); a rename takes it away."""

    at: int
    folder: Node
    name: str
    node: Node | None
    source: Node | None = None
    source_name: str = ""

    def apply(self, names: dict[Node, dict[str, Node]]) -> None:
        if self.node is None:
            names[self.folder].pop(self.name, None)
            return
        if self.source is not None:
            if names[self.folder].get(self.name) is self.node:
                return  # two names of one file: a rename leaves both
            if names[self.source].get(self.source_name) is self.node:
                del names[self.source][self.source_name]
        names[self.folder][self.name] = self.node


@dataclass(frozen=True, slots=True)
class Loss:
    """How hard a power loss hits: the chance that something unsynced reached the disk all the same."""

    names: float
    bytes: float
    # Names reach the disk in the order in which they were made, as a file system with a journal does it.
    in_order: bool = False

    @classmethod
    def draw(cls, rng: random.Random) -> "Loss":
        """Everything unsynced is gone, or nothing, or anything in between."""
        chances = [0.0, 0.0, 0.1, 0.5, 0.9, 1.0]
        return cls(rng.choice(chances), rng.choice(chances), rng.random() < 0.4)


class Disk:
    """The state of a folder, synced and unsynced, at one point of the log.

    Parameters
    ----------
    is_journaled : a sync of anything makes every earlier change of names durable, as on ext4 and XFS, whose
        metadata go through one log. POSIX promises it only for the folder that is synced.
    """

    def __init__(self, root: Node, by_number: dict[int, Node], log: Path, *, is_journaled: bool) -> None:
        self._root, self._by_number, self._log, self._is_journaled = root, by_number, log, is_journaled
        self._namings: list[Naming] = []
        self._at = 0
        self.marks: list[dict[str, Any]] = []

    @staticmethod
    def scan(path: Path) -> tuple[Node, dict[int, Node]]:
        """A folder that is all on the disk."""
        by_number: dict[int, Node] = {}

        def look(path: Path) -> Node:
            number = path.stat().st_ino
            if number not in by_number:
                node = by_number[number] = Node(path.is_dir())
                if node.is_folder:
                    node.names = {child.name: look(child) for child in path.iterdir()}
                else:
                    node.content = bytearray(path.read_bytes())
            return by_number[number]

        return look(path), by_number

    def replay(self, stop: int | None = None) -> "Disk":
        """Go on to where the log was ``stop`` bytes long."""
        for at, op, head, name, other, data in _records(self._log, self._at, stop):
            self._take(at, op, head, name, other, data)
            self._at = at + _RECORD.size + len(name) + len(other) + len(data)
        return self

    def _take(self, at: int, op: str, head: tuple[int, int, int], name: str, other: str, data: bytes) -> None:
        a, b, c = head
        nodes = self._by_number
        match op:
            case "M":
                self.marks.append(json.loads(data))
            case "W":
                self._node(a).unsynced.append((at, b, data, 0))
            case "T":
                self._node(a).unsynced.append((at, None, b"", b))
            case "C" | "D":
                nodes[b] = Node(op == "D")
                self._namings.append(Naming(at, self._node(a), name, nodes[b]))
            case "L":
                self._namings.append(Naming(at, self._node(a), name, self._node(b)))
            case "U":
                self._namings.append(Naming(at, self._node(a), name, None))
            case "R":
                self._namings.append(Naming(at, self._node(c), other, self._node(b), self._node(a), name))
            case "S":
                self._sync(self._node(a), b)
            case _:
                raise AssertionError(f"the log has an unknown record {op!r} at {at}")

    def _node(self, number: int) -> Node:
        return self._by_number[number]

    def _sync(self, node: Node, covered: int) -> None:
        """All before ``covered`` that concerns this file or folder is on the disk from now on."""
        for at, offset, data, length in node.unsynced:
            if at < covered:
                _apply(node.content, offset, data, length)
        node.unsynced = [change for change in node.unsynced if change[0] >= covered]
        if node.is_folder or self._is_journaled:
            done = [n for n in self._namings if n.at < covered and (self._is_journaled or node in (n.folder, n.source))]
            names = _Names()
            for naming in done:
                naming.apply(names)
            names.keep()
            is_done = set(map(id, done))
            self._namings = [n for n in self._namings if id(n) not in is_done]

    def lose_power(self, rng: random.Random, loss: Loss) -> "Image":
        """What is found afterwards."""
        names = _Names()
        for naming in _surviving(self._namings, rng, loss):
            naming.apply(names)
        return Image(self._root, names, rng, loss)

    def as_it_is(self) -> "Image":
        """All of it, as `kill -9` leaves it."""
        return self.lose_power(random.Random(0), Loss(names=1.0, bytes=1.0))


class _Names(dict[Node, dict[str, Node]]):
    """The names in each folder, to be changed without changing what is on the disk."""

    def __missing__(self, folder: Node) -> dict[str, Node]:
        self[folder] = dict(folder.names)
        return self[folder]

    def keep(self) -> None:
        for folder, names in self.items():
            folder.names = names


@dataclass
class Image:
    """A folder as a power loss left it."""

    root: Node
    names: _Names
    rng: random.Random
    loss: Loss

    def write(self, path: Path) -> Path:
        """Make it a real folder; two names of one file stay two names of one file."""
        made: dict[Node, Path] = {}
        self._write(self.root, path, made)
        return path

    def _write(self, node: Node, path: Path, made: dict[Node, Path]) -> None:
        if node in made:
            os.link(made[node], path)
            return
        made[node] = path
        if not node.is_folder:
            path.write_bytes(_content(node, self.rng, self.loss))
            return
        path.mkdir()
        for name, child in self.names[node].items():
            if not name.endswith("-shm"):  # shared memory in a file's clothes: SQLite makes it anew
                self._write(child, path / name, made)


def _surviving(namings: list[Naming], rng: random.Random, loss: Loss) -> list[Naming]:
    if loss.in_order:
        return namings[: round(len(namings) * (loss.names if loss.names in (0.0, 1.0) else rng.random()))]
    return [n for n in namings if rng.random() < loss.names]


def _content(node: Node, rng: random.Random, loss: Loss) -> bytes:
    content = bytearray(node.content)
    for _, offset, data, length in node.unsynced:
        if rng.random() < loss.bytes:
            _apply(content, offset, data, length)
        elif offset is not None and loss.bytes:
            _tear(content, offset, data, rng)
    return bytes(content)


def _tear(content: bytearray, offset: int, data: bytes, rng: random.Random) -> None:
    """Bytes of a write that was under way: none, the first ones, some sectors, or room without bytes."""
    match rng.randrange(4):
        case 0:
            pass
        case 1:
            _apply(content, offset, data[: rng.randrange(len(data) + 1)], 0)
        case 2:
            at = 0
            while at < len(data):
                stop = at + _SECTOR - (offset + at) % _SECTOR
                if rng.random() < 0.5:
                    _apply(content, offset + at, data[at:stop], 0)
                at = stop
        case 3:
            _apply(content, offset, bytes(len(data)), 0)


def _apply(content: bytearray, offset: int | None, data: bytes, length: int) -> None:
    """One write, or (offset None) a new length."""
    if offset is None:
        del content[length:]
        content.extend(bytes(length - len(content)))
        return
    if not data:
        return
    content.extend(bytes(max(offset - len(content), 0)))
    content[offset : offset + len(data)] = data


def _records(log: Path, at: int, stop: int | None) -> Iterator[tuple[int, str, tuple[int, int, int], str, str, bytes]]:
    """Whole records from ``at`` on; the last one may be torn by a kill."""
    with open(log, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = size if stop is None else min(stop, size)
        file.seek(at)
        while at + _RECORD.size <= end:
            total, op, n_name, n_other, _, a, b, c = _RECORD.unpack(file.read(_RECORD.size))
            if at + total > end:
                return
            name, other = file.read(n_name).decode(), file.read(n_other).decode()
            data = file.read(total - _RECORD.size - n_name - n_other)
            yield at, chr(op), (a, b, c), name, other, data
            at += total


def positions(log: Path) -> list[int]:
    """Every point of a log at which the power may go."""
    return [*(at for at, *_ in _records(log, 0, None) if at), log.stat().st_size]


def tree(path: Path) -> dict[str, bytes | None]:
    """Each file of a folder with its bytes, each folder with None."""
    found: dict[str, bytes | None] = {}
    for child in path.rglob("*"):
        if not child.name.endswith("-shm"):
            with contextlib.suppress(FileNotFoundError):
                found[str(child.relative_to(path))] = None if child.is_dir() else child.read_bytes()
    return found
