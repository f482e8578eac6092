"""The process dies, or the disk refuses, at every single system call of a stream's life.

The calls are counted in an undisturbed life; then the same life is lived once for each of them,
and that one fails.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from storage.errors import IndexConflict
from storage.frame import FrameInfo
from storage.run_folder import RunFolder
from storage.states import FrameState
from storage.stream_source import FolderSource
from storage.stream_store import Admission, StreamStore

from .stores import frame_of, new_store, put_late

CALLS = ("pwritev", "fsync", "fdatasync", "link", "replace", "unlink", "mkdir", "open")
FRAMES, LATE = (0, 1, 2, 4), 3
SMALL = {"shape": (2, 3), "codec": "raw", "frames_per_chunk": 4, "parts": 2}
PARTS = 2


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Life:
    """A stream's life, step by step, and what was promised on the way."""

    store: StreamStore
    stored: set[tuple[int, int]] = field(default_factory=set)
    late: set[tuple[int, int]] = field(default_factory=set)

    def steps(self) -> Iterator[Callable[[], object]]:
        """Each may be done again after an OSError."""
        for index in FRAMES:
            yield lambda index=index: self.append(index)
        yield lambda: self.store.account(3, 4, FrameState.missing, "not received")
        yield lambda: self.store.account(5, 6, FrameState.rejected, "bad shape")
        yield self.store.sync
        yield self.seal
        for part in range(PARTS):
            yield lambda part=part: self.append_late(part)
        yield self.store.sync
        yield lambda: self.store.begin_finish(7, "end")
        yield self.seal
        yield self.store.end_finish

    def live(self) -> None:
        for step in self.steps():
            step()

    def append(self, index: int) -> None:
        slots = [(index, part) for part in range(PARTS)]
        self.store.append_many([sending(self.store, *slot) for slot in slots])
        self.stored.update(slots)

    def append_late(self, part: int) -> None:
        put_late(self.store, LATE, part=part)
        self.late.add((LATE, part))

    def seal(self) -> None:
        self.store.take_complete()
        for chunk in sorted(self.store._sealing):
            self.store.seal(chunk)


def sending(store: StreamStore, index: int, part: int) -> tuple[FrameInfo, bytes]:
    return frame_of(store, index, part, producer="p", sequence=PARTS * index + part)


class Faults:
    """Stands in for system calls; the n-th of them fails in a given way."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, fail_at: int = -1, how: str = "") -> None:
        self.names: list[str] = []
        self._root, self._fail_at, self._how, self._is_dead = str(root), fail_at, how, False
        for name in CALLS:
            patch.setattr(os, name, self._standing_in_for(name, getattr(os, name)))

    def _standing_in_for(self, name: str, real: Callable) -> Callable:
        def call(*args, **options):
            if name in ("open", "mkdir", "link", "unlink", "replace") and not os.fspath(args[0]).startswith(self._root):
                return real(*args, **options)
            if self._is_dead:
                raise Killed
            self.names.append(name)
            if len(self.names) - 1 != self._fail_at:
                return real(*args, **options)
            return self._fail(name, real, args, options)

        return call

    def _fail(self, name: str, real: Callable, args: tuple, options: dict) -> None:
        if name == "pwritev" and self._how in ("killed in the middle", "refused in the middle"):
            content = b"".join(map(bytes, args[1]))
            os.pwrite(args[0], content[: len(content) // 2], args[2])
        if self._how.startswith("refused"):
            raise OSError(errno.ENOSPC, "No space left on device")
        if self._how == "killed after":
            with contextlib.suppress(OSError):
                real(*args, **options)
        self._is_dead = True
        raise Killed


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> list[str]:
    """The system calls of an undisturbed life."""
    root = tmp_path_factory.mktemp("data")
    life = Life(new_store(root, **SMALL))
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, root)
        life.live()
    return faults.names


def check(store: StreamStore, life: Life) -> None:
    """Whatever was promised is there, unchanged, and accounted for; by the store and from outside."""
    for source in (store, FolderSource(RunFolder.open(store.folder.path), "eiger")):
        rows = {(info.frame_index, info.part) for info in source.infos(0, 20)}
        whole = {(i, p) for i, p in life.stored if (i, 1 - p) in life.stored}
        assert whole <= rows
        assert life.late <= rows or (source.states[LATE] is FrameState.missing and not store.is_finished)
        for index in {index for index, _ in rows}:
            for frame in source.read_parts(index):
                assert bytes(frame.blob) == frame_of(store, index, frame.info.part)[1]
        assert source.ledger().problems == []
    for index, part in life.stored:
        assert store.admit(sending(store, index, part)[0]) is Admission.retry
        assert store.answered("p", PARTS * index + part) == index
        with pytest.raises(IndexConflict):
            store.admit(FrameInfo(frame_index=index, part=part, producer="q", sequence=0, size_bytes=1))


# The first of so many calls in turn; all of them in a campaign.
EVERY = pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.campaign)])


def chosen(calls: list[str], how: str, every: int) -> list[tuple[int, str]]:
    """(number, name) of the calls to disturb; only writing has a middle."""
    return [(n, name) for n, name in enumerate(calls) if not how.endswith("middle") or name == "pwritev"][::every]


@EVERY
@pytest.mark.parametrize("how", ["killed after", "killed in the middle"])
def test_killed_at_every_call(tmp_path, calls, how, every):
    for n, name in chosen(calls, how, every):
        root = tmp_path / str(n)
        life = Life(new_store(root, **SMALL))
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, root, n, how)
            with pytest.raises(Killed):
                life.live()
        life.store.close()
        store = StreamStore.recover(RunFolder.open(life.store.folder.path), "eiger")
        check(store, life)
        causes = {r.start: r.cause for r in store.ledger().ranges if r.state in ("missing", "rejected")}
        assert causes.get(5, "bad shape") in ("bad shape", "end"), f"call {n}: {name}"
        if not store.is_finished:
            store.finish(7, "end")
        check(store, life)
        store.close()
        # Events belong to the run: what another stream is just writing there must not be taken for litter.
        litter = [p for p in store.folder.path.rglob(".*") if p.is_file() and p.parent.name != "events"]
        assert not litter, f"call {n}: {name}"
        assert not store.paths.accounts.exists()


@EVERY
@pytest.mark.parametrize("how", ["refused", "refused in the middle"])
def test_refused_at_every_call(tmp_path, calls, how, every):
    """The step is done again, and in the end everything is as if nothing had happened."""
    undisturbed = Life(new_store(tmp_path / "undisturbed", **SMALL))
    undisturbed.live()
    digests = {chunk: commit.digest for chunk, commit in undisturbed.store.sealed.items()}
    for n, name in chosen(calls, how, every):
        root = tmp_path / str(n)
        life = Life(new_store(root, **SMALL))
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, root, n, how)
            for step in life.steps():
                try:
                    step()
                except OSError:
                    step()
        assert life.store.is_finished, f"call {n}: {name}"
        check(life.store, life)
        assert {chunk: commit.digest for chunk, commit in life.store.sealed.items()} == digests
        assert life.store.ledger() == undisturbed.store.ledger(), f"call {n}: {name}"
        life.store.close()
