"""Where a reader gets a stream from: the interface, and its implementation on a run folder.

`streaming.service_source` implements the same interface over the wire; one conformance suite
runs against both.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from storage.errors import CorruptFrame, FrameMissing, GroupNeedsService
from storage.files import is_local
from storage.frame import FrameInfo, RawFrame
from storage.journal import Account, Journal
from storage.masks import read_plane
from storage.models import Record, RunState, StreamHeader
from storage.online_account import OnlineAccount, read_account
from storage.run_folder import ChunkCommit, Event, RunFolder, has_writer
from storage.states import FrameState, StreamLedger, build_ledger
from storage.stored_frames import StoredFrames, missing_frame

__all__ = ["FolderSource", "LeasedFrame", "StreamSource", "StreamStatus"]

# How often a folder is looked at again while its writer is alive; there is no one to ask.
_LOOK_AGAIN_S = 0.2
_LOOK_AGAIN_FAR_S = 1.0
# A stream that has ended changes only by a veto: to be looked for so often.
_LOOK_FOR_VETO_S = 1.0
# Two changes of a folder within a tick of the kernel's clock have the same time.
_CLOCK_NS = 1_000_000_000

T = TypeVar("T")


class StreamStatus(Record):
    """How far a stream has come: indices below ``watermark`` are stored or known to be missing."""

    announced: int
    watermark: int
    n_sealed: int
    is_terminal: bool


@dataclass(slots=True, eq=False)
class LeasedFrame:
    """A frame given to one member of a group; a delivery above 1 is a redelivery.

    ``more_parts`` are the further parts of a frame in parts. ``is_late``: the group had passed it before it came.
    Whoever works on it sets ``retry_after_s`` to have it delivered again instead of acknowledged, or, where that does
    not go by itself, ``is_done``; until ``ends_at``, monotonic s.
    """

    frame: RawFrame
    lease: int
    delivery: int
    more_parts: list[RawFrame] = field(default_factory=list)
    is_late: bool = False
    is_done: bool = False
    is_seen: bool = False
    retry_after_s: float | None = None
    ends_at: float = math.inf


class StreamSource(Protocol):
    """What every place that serves a stream can do.

    Ranges are half-open. Reading beyond the watermark of a live stream gives what is there;
    nothing ever returns a frame that was not received.
    """

    header: StreamHeader

    def status(self) -> StreamStatus:
        """The present state, without waiting."""
        ...

    def wait(self, above: int, timeout: float | None) -> StreamStatus:
        """Wait until the watermark exceeds ``above`` or the stream has ended; the state then, or at the time-out."""
        ...

    def read(self, start: int, stop: int) -> list[RawFrame]:
        """Frames in index order, at least the first one available in the range; [] if there is none.

        Of frames in parts, all parts that are there, one after the other.
        May stop early to bound memory: go on behind the last frame returned.

        Raises
        ------
        CorruptFrame : the first stored frame of the range is damaged.
        """
        ...

    def read_one(self, frame_index: int) -> RawFrame:
        """One frame, or the error that says why not (FrameMissing, FrameNotYetAvailable, CorruptFrame).

        Of a frame in parts, the first part that is there.
        """
        ...

    def read_parts(self, frame_index: int) -> list[RawFrame]:
        """All parts of one frame that are there, rising; errors as of `read_one`."""
        ...

    def infos(self, start: int, stop: int) -> Iterator[FrameInfo]:
        """Rows of the frames in a range by index and part, without their payload; beyond the end there are none.

        Raises
        ------
        CorruptFrame : a chunk's frame table is gone or damaged.
        """
        ...

    def latest(self, after: int, timeout: float | None, group: str | None = None) -> RawFrame | None:
        """The newest frame with an index above ``after``; None at the time-out or if the stream ended before.

        With a group, each only once for all its members.
        """
        ...

    def wait_chunk(self, chunk: int, timeout: float | None) -> ChunkCommit | None:
        """The commit of chunk k once it is sealed; None if the stream ended without it, or at the time-out."""
        ...

    def plane(self, name: str) -> np.ndarray | None:
        """A (slow, fast) plane such as ``pixel_mask``; None where the source sent none."""
        ...

    def ledger(self) -> StreamLedger:
        """Every frame accounted for."""
        ...

    def follow_group(
        self,
        group: str,
        timeout: float | None,
        lease_s: float = 60.0,
        *,
        stop: threading.Event | None = None,
        max_deliveries: int | None = None,
        acknowledges: bool = True,
    ) -> Iterator[LeasedFrame]:
        """Frames leased to this member of a group, each acknowledged when the next is asked for.

        Or, if it is not to acknowledge, when ``is_done`` of it is set.

        Ends within 0.2 s when another thread sets ``stop``.
        """
        ...

    def groups(self) -> dict[str, dict[str, Any]]:
        """The consumer groups by name: cursor, lag, who has what, dead letters."""
        ...

    def seek_group(self, group: str, frame_index: int) -> dict[str, Any]:
        """Put a group's cursor on a frame; the group then."""
        ...

    def settle_dead_letters(
        self, group: str, action: Literal["retry", "drop"], indices: list[int] | None = None
    ) -> list[int]:
        """Deliver dead letters again, or give them up; all, or these. The frames concerned."""
        ...


class FolderSource:
    """A stream read from its run folder, with no service involved.

    Works on a run that is still being written (what is stored is visible), one that was
    interrupted, and a finished one.
    """

    # Frames per `read`, so that a caller never gets a whole run into memory.
    _READ_BYTES = 64 << 20

    def __init__(self, folder: RunFolder, data_source: str) -> None:
        self.folder = folder
        self.header = folder.stream_header(data_source)
        self._paths = folder.stream(data_source)
        self._frames = StoredFrames(self._paths, self.header)
        self.states = self._frames.states
        self._accounts: Journal | None = None
        # Frames that came late for a chunk whose commit is not there yet.
        self._waiting_late: list[FrameInfo] = []
        self._finished: dict | None = None
        self._is_terminal = False
        # The last account taken in of a stream that is not in the folder, but in a service's memory.
        self._online_account: OnlineAccount | None = None
        # When the folder of commits was last changed, ns, as far as that has been taken in; None if it may be behind.
        self._commits_changed: int | None = None
        self._veto_due = 0.0
        self._deletion = folder.deletion
        if self._deletion is not None:
            self._read_tombstone(self._deletion)
        self._refresh()

    def status(self) -> StreamStatus:
        self._refresh()
        return StreamStatus(
            announced=self.states.announced,
            watermark=self.states.announced if self._is_terminal else self.states.watermark,
            n_sealed=len(self._frames.commits),
            is_terminal=self._is_terminal,
        )

    def wait(self, above: int, timeout: float | None) -> StreamStatus:
        for status in self._looks(timeout):
            if status.watermark > above or status.is_terminal:
                break
        return status

    def read(self, start: int, stop: int) -> list[RawFrame]:
        frames: list[RawFrame] = []
        n_bytes = 0
        for index in self.states.readable(start, stop):
            try:
                found = self.read_parts(int(index))
            except FrameMissing:  # vetoed just now
                continue
            except CorruptFrame:
                if frames:  # those before it are good; the next call names the damaged one
                    break
                raise
            frames += found
            n_bytes += sum(frame.nbytes for frame in found)
            if n_bytes >= self._READ_BYTES:
                break
        return frames

    def read_one(self, frame_index: int) -> RawFrame:
        return self._read(frame_index, lambda: self._frames.read(frame_index, is_terminal=self._is_terminal))

    def read_parts(self, frame_index: int) -> list[RawFrame]:
        return self._read(frame_index, lambda: self._frames.read_parts(frame_index, is_terminal=self._is_terminal))

    def read_part(self, frame_index: int, part: int) -> RawFrame:
        """One part of a frame that is there, whatever has become of the others; errors as of `read_one`."""
        read = self._frames.read_part
        return self._read(frame_index, lambda: read(frame_index, part, is_terminal=self._is_terminal))

    def infos(self, start: int, stop: int) -> Iterator[FrameInfo]:
        return self._frames.infos(start, stop)

    def latest(self, after: int, timeout: float | None, group: str | None = None) -> RawFrame | None:
        if group is not None:
            raise self._no_groups(group)
        for status in self._looks(timeout):
            newest = self.states.readable(after + 1)[-1:]
            if newest.size:
                return self.read_one(int(newest[0]))
            if status.is_terminal:
                break
        return None

    def wait_chunk(self, chunk: int, timeout: float | None) -> ChunkCommit | None:
        if self._deletion is not None:
            raise FrameMissing(f"chunk {chunk} of {self.header.data_source} was {_in_words(self._deletion)}")
        for status in self._looks(timeout):
            if chunk in self._frames.commits or status.is_terminal:
                break
        return self._frames.commits.get(chunk)

    @property
    def commits(self) -> dict[int, ChunkCommit]:
        """The sealed chunks that were there at the last look."""
        return self._frames.commits

    def plane(self, name: str) -> np.ndarray | None:
        return read_plane(self._paths.zarr, name)

    def ledger(self) -> StreamLedger:
        if self._deletion is not None:
            return StreamLedger.model_validate(self._finished)
        self._refresh()
        duplicate = self._finished["duplicate"] if self._finished else 0
        return build_ledger(self.header, self.states, duplicate, is_terminal=self._finished is not None)

    def follow_group(
        self,
        group: str,
        timeout: float | None,
        lease_s: float = 60.0,
        *,
        stop: threading.Event | None = None,
        max_deliveries: int | None = None,
        acknowledges: bool = True,
    ) -> Iterator[LeasedFrame]:
        raise self._no_groups(group)

    def groups(self) -> dict[str, dict[str, Any]]:
        raise self._no_groups("")

    def seek_group(self, group: str, frame_index: int) -> dict[str, Any]:
        raise self._no_groups(group)

    def settle_dead_letters(
        self, group: str, action: Literal["retry", "drop"], indices: list[int] | None = None
    ) -> list[int]:
        raise self._no_groups(group)

    def _no_groups(self, group: str) -> GroupNeedsService:
        return GroupNeedsService(
            f"group {group!r} cannot share frames of the folder {self.folder.path}: groups need a running service; "
            "start one with `nearline serve`, or follow() without a group"
        )

    def _looks(self, timeout: float | None) -> Iterator[StreamStatus]:
        """The status now, and again and again until the time-out."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            yield self.status()
            if deadline is not None and time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_AGAIN_S if is_local(self.folder.path) else _LOOK_AGAIN_FAR_S)

    def _read_tombstone(self, deletion: Event) -> None:
        """A deleted stream has ended, and what of its frames was here is gone."""
        content = deletion.payload["ledger"].get(self.header.data_source, {"data_source": self.header.data_source})
        ledger = StreamLedger.model_validate(content)
        for part in ledger.ranges:
            self.states.set(part.start, part.stop, FrameState[part.state], part.cause)
        self.states.account(0, ledger.announced, FrameState.pruned, _in_words(deletion))
        self._finished, self._is_terminal = ledger.model_dump(), True

    def _read(self, frame_index: int, read: Callable[[], T]) -> T:
        """Read a frame, unless a veto that we had not heard of has taken it away."""
        if self._finished is not None:
            self._look_for_veto()
        if not self.states.is_readable(frame_index):
            self._refresh()
        try:
            return read()
        except (KeyError, CorruptFrame):
            # A veto says so in the commit before it takes frames away.
            self._take_in_vetoes([frame_index // self.header.frames_per_chunk])
            if self.states.is_readable(frame_index):
                raise
            raise missing_frame(self.header, self.states, frame_index, is_terminal=self._is_terminal) from None

    def _look_for_veto(self) -> None:
        """Take in what vetoes have done to an ended stream since the last look."""
        now = time.monotonic()
        if now < self._veto_due or self._deletion is not None or not is_local(self._paths.chunks):
            return
        self._veto_due = now + _LOOK_FOR_VETO_S
        changed = self._time_of_commits()
        if changed is None or changed != self._commits_changed:
            self._take_in_vetoes(list(self._frames.commits))
            self._commits_changed = changed

    def _take_in_vetoes(self, chunks: list[int]) -> None:
        known = self._frames.commits
        there = [chunk for chunk in chunks if chunk in known and self._paths.commit(chunk).exists()]
        for commit in self._paths.read_commits(there):
            if len(commit.vetoes) > len(known[commit.chunk].vetoes):
                self._frames.revise(commit)

    def _time_of_commits(self) -> int | None:
        """When a commit was last added or replaced, ns; None if so lately that another change could look the same."""
        try:
            changed = os.stat(self._paths.chunks).st_mtime_ns
        except FileNotFoundError:
            return None
        return changed if time.time_ns() - changed > _CLOCK_NS else None

    def _refresh(self) -> None:
        """Take in what has been published since the last look."""
        if self._finished is not None:
            self._look_for_veto()
            return
        if not self.states.announced:
            # Until the first frame the codec is the writer's guess.
            self.header = self.folder.stream_header(self.header.data_source)
            self._frames.change_header(self.header)
        # Asked before reading: a writer that stops in between leaves nothing behind unseen.
        is_written = has_writer(self._paths)
        finished = self.folder.finished(self.header.data_source)
        accounts: list[Account] = []
        if self.header.is_online:
            self._look_into_online_account(finished)
        elif is_local(self._paths.journal):
            accounts = self._look_into_journals(is_written=is_written)
        changed = self._time_of_commits() if finished and is_local(self._paths.chunks) else None
        new = [chunk for chunk in self._paths.commits() if chunk not in self._frames.commits]
        for commit in self._paths.read_commits(new):
            self._frames.adopt(commit)
        self._frames.settle(accounts)
        self._look_into_amendments(is_written=is_written and not finished)
        if finished:
            self.states.announce(finished["announced"])
        # Last: if anything above fails, the next look takes it up again.
        self._finished, self._is_terminal = finished, finished is not None or not is_written
        self._commits_changed = changed

    def _look_into_online_account(self, finished: dict | None) -> None:
        """No frames are here, but word of them; what is in memory can be read from its service only."""
        account = OnlineAccount.model_validate(finished) if finished else read_account(self._paths)
        if account is None or account == self._online_account:
            return
        self._online_account = account
        for part in account.ranges:
            self.states.set(part.start, part.stop, FrameState[part.state], part.cause)

    def _look_into_journals(self, *, is_written: bool) -> list[Account]:
        accounts = self._look_into_accounts()
        for chunk, path in self._paths.journals():
            if chunk not in self._frames.commits:
                self._look_into_journal(chunk, path, is_written=is_written)
        return accounts

    def _look_into_accounts(self) -> list[Account]:
        try:
            there = os.stat(self._paths.accounts)
        except FileNotFoundError:  # there are none, or the commits say it all by now
            self._accounts = None
            return []
        # Another file under that name holds the same accounts, without those of sealed chunks.
        if self._accounts is None or os.fstat(self._accounts.fd).st_ino != there.st_ino:
            self._accounts = Journal.view(self._paths.accounts, 0, 0)
            new = self._accounts.accounts
        else:
            n_known = len(self._accounts.accounts)
            self._accounts.look_again()
            new = self._accounts.accounts[n_known:]
        for account in new:
            self._frames.account(account)
        return new

    def _look_into_journal(self, chunk: int, path: Path, *, is_written: bool) -> None:
        journal = self._frames.journals.get(chunk)
        if journal is None:
            size = self.header.frames_per_chunk
            try:
                # What a living writer has written is whole; after a crash only the checksums tell.
                journal = Journal.view(path, chunk * size, size, self.header.parts, checks_blobs=not is_written)
            except FileNotFoundError:  # sealed meanwhile; its commit comes next
                return
            self._frames.journals[chunk] = journal
            new = list(journal.infos.values())
        else:
            n_known = len(journal.infos)
            journal.look_again()
            new = list(journal.infos.values())[n_known:]
        self._frames.add_rows(new)

    def _look_into_amendments(self, *, is_written: bool) -> None:
        """Take in late frames; one whose chunk is just being sealed waits for the commit."""
        waiting = self._waiting_late + self._frames.amendments.look()
        self._waiting_late = []
        for info in waiting:
            if is_written and info.frame_index // self.header.frames_per_chunk not in self._frames.commits:
                self._waiting_late.append(info)
            else:
                self._frames.add_late(info)


def _in_words(deletion: Event) -> str:
    """Who deleted a run, when and why; goes on from "was"."""
    facts = deletion.payload
    copies = f"; copies are in {', '.join(facts['copies'])}" if facts["copies"] else ""
    return f"deleted by {facts['by']} on {deletion.at:%Y-%m-%d}: {facts['why'] or 'no reason given'}{copies}"


def state_of(folder: RunFolder) -> RunState:
    """A run's state as its folder tells it: a run that nobody writes any more and that never ended is aborted."""
    state, names = folder.state, folder.data_sources()
    # A run without a stream has just begun: its first stream is on its way.
    if state is RunState.live and names and not any(has_writer(folder.stream(name)) for name in names):
        return RunState.aborted
    return state
