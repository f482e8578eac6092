"""Every frame of a stream that can be read, wherever it lies: in a journal, a shard or an amendment.

`StreamStore`, which writes a stream, and `FolderSource`, which looks at its folder from outside,
learn of journals, commits and amendments in different ways and read by the same rules, written
here once. So are the rules by which records become states:

- a frame is *stored* when all its parts are there;
- with some of them it is pending, or *incomplete* once it has been declared missing or rejected;
- with some of them after its chunk was sealed it is incomplete, with all of them *late*.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np

from storage.amendments import Amendments
from storage.errors import CorruptFrame, FrameMissing, FrameNotYetAvailable
from storage.frame import FrameInfo, RawFrame
from storage.frame_table import read_frame_table
from storage.journal import Account, Journal
from storage.models import StreamHeader
from storage.run_folder import ChunkCommit, StreamPaths
from storage.shard import ShardReader
from storage.states import READABLE, FrameState, IndexStates

__all__ = ["SealedChunks", "StoredFrames", "missing_frame"]


class SealedChunks:
    """Frames of sealed chunks by slot: shard readers and frame tables, the latest few kept open."""

    def __init__(self, paths: StreamPaths, header: StreamHeader, keep: int = 4) -> None:
        self._paths, self._header, self._keep = paths, header, keep
        self._slots = header.frames_per_chunk * header.parts
        self._shards: OrderedDict[int, ShardReader] = OrderedDict()
        self._tables: OrderedDict[int, dict[int, FrameInfo]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, slot: int) -> RawFrame:
        """One frame or part of a sealed chunk; KeyError where the chunk has a hole.

        Raises
        ------
        CorruptFrame : shard or frame table are damaged or gone.
        """
        chunk = slot // self._slots
        info = self.infos(chunk)[slot]
        return RawFrame(info, b"" if self._header.kind == "table" else self._shard(chunk).read(slot))

    def infos(self, chunk: int) -> dict[int, FrameInfo]:
        """The frame table of a sealed chunk by slot."""
        with self._lock:
            table = self._tables.get(chunk)
        if table is None:
            parts = self._header.parts
            rows = read_frame_table(self._paths.frame_table(chunk))
            table = {info.frame_index * parts + info.part: info for info in rows}
            self.remember(chunk, table)
        return table

    def forget(self, chunk: int) -> None:
        """Let go of a chunk's shard, for there is another one: the old one takes room as long as it is open."""
        with self._lock:
            self._shards.pop(chunk, None)

    def remember(self, chunk: int, infos: dict[int, FrameInfo]) -> None:
        """Keep a table that is in memory anyway."""
        with self._lock:
            self._tables[chunk] = infos
            while len(self._tables) > self._keep:
                self._tables.popitem(last=False)

    def _shard(self, chunk: int) -> ShardReader:
        with self._lock:
            reader = self._shards.get(chunk)
            if reader is None:
                reader = self._shards[chunk] = self._open_shard(chunk)
            self._shards.move_to_end(chunk)
            # Readers in use elsewhere close themselves when the last thread lets go.
            while len(self._shards) > self._keep:
                self._shards.popitem(last=False)
            return reader

    def _open_shard(self, chunk: int) -> ShardReader:
        path = self._paths.stored_shard(chunk, len(self._header.array_shape))
        return ShardReader(path, chunk * self._slots, self._slots)


class StoredFrames:
    """The frames of one stream and the states of its indices; changed by one thread, read by any.

    A chunk's journal stays in ``journals`` until its commit is in ``commits``.
    """

    def __init__(self, paths: StreamPaths, header: StreamHeader) -> None:
        self.states = IndexStates()
        self.journals: dict[int, Journal] = {}
        self.commits: dict[int, ChunkCommit] = {}
        self.chunks = SealedChunks(paths, header)
        self.amendments = Amendments(paths.amendments, header.parts)
        self._paths, self._header, self._parts = paths, header, header.parts
        # How many parts of a frame are in its journal, while some are awaited.
        self._n_parts: dict[int, int] = {}

    def change_header(self, header: StreamHeader) -> None:
        """Take a header whose codec has been corrected before the first frame."""
        self._header, self.chunks = header, SealedChunks(self._paths, header)

    # ---- reading --------------------------------------------------------------------------------

    def read_parts(self, frame_index: int, *, is_terminal: bool) -> list[RawFrame]:
        """All that is there of one frame, rising by part.

        Raises
        ------
        FrameMissing, FrameNotYetAvailable, CorruptFrame
        """
        self._check_readable(frame_index, is_terminal=is_terminal)
        return [self._read(slot) for slot in self._there(frame_index)]

    def read_part(self, frame_index: int, part: int, *, is_terminal: bool) -> RawFrame:
        """One part that is there, whatever has become of the others; errors as of `read_parts`."""
        self._check_readable(frame_index, is_terminal=is_terminal)
        return self._read(frame_index * self._parts + part)

    def read(self, frame_index: int, *, is_terminal: bool) -> RawFrame:
        """A frame, of which the first part that is there; errors as of `read_parts`."""
        self._check_readable(frame_index, is_terminal=is_terminal)
        return self._read(self._there(frame_index)[0])

    def info(self, frame_index: int, part: int = 0) -> FrameInfo | None:
        """The row of a frame or part; None if it is not there."""
        slot, chunk = frame_index * self._parts + part, frame_index // self._header.frames_per_chunk
        # The table of a sealed chunk is read only if there is something to be found in it.
        is_there = chunk in self.journals or self.states[frame_index] in READABLE
        return (self._rows(chunk).get(slot) if is_there else None) or self.amendments.info(slot)

    def infos(self, start: int, stop: int) -> Iterator[FrameInfo]:
        """Rows of the frames of a range by index and part, without reading payloads; those of vetoed frames as well."""
        size, parts = self._header.frames_per_chunk, self._parts
        known = self.states.with_rows(start, stop)
        edges = np.flatnonzero(np.diff(known // size)) + 1
        for indices in np.split(known, edges):
            rows = self._rows(int(indices[0]) // size) if indices.size else {}
            for index in indices.tolist():
                for slot in range(index * parts, (index + 1) * parts):
                    info = rows.get(slot) or self.amendments.info(slot)
                    if info is not None:
                        yield info

    def _rows(self, chunk: int) -> dict[int, FrameInfo]:
        """What a chunk holds by slot, without amendments."""
        journal = self.journals.get(chunk)
        if journal is not None:
            return journal.infos
        return self.chunks.infos(chunk) if chunk in self.commits else {}

    def _check_readable(self, frame_index: int, *, is_terminal: bool) -> None:
        """To be asked before looking for the place: a stored frame is in a journal until its chunk is sealed."""
        if self.states[frame_index] not in READABLE:
            raise missing_frame(self._header, self.states, frame_index, is_terminal=is_terminal)

    def _there(self, frame_index: int) -> list[int]:
        """The slots of a frame that can be read, of which there must be some."""
        slots = self._slots(frame_index)
        if not slots:
            raise CorruptFrame(
                f"the parts of frame {frame_index} of {self._header.data_source} are gone from its chunk in "
                f"{self._paths.zarr} and from {self._paths.amendments}; restore them from a copy or leave the frame out"
            )
        return slots

    def _read(self, slot: int) -> RawFrame:
        if slot in self.amendments:
            return self.amendments.read(slot)
        journal = self.journals.get(slot // self._parts // self._header.frames_per_chunk)
        return journal.read(slot) if journal is not None else self.chunks.read(slot)

    def _slots(self, frame_index: int) -> list[int]:
        """The slots of a frame's parts that are there."""
        if self._parts == 1:
            return [frame_index]
        rows = self._rows(frame_index // self._header.frames_per_chunk)
        first = frame_index * self._parts
        return [slot for slot in range(first, first + self._parts) if slot in rows or slot in self.amendments]

    # ---- what becomes known -----------------------------------------------------------------------

    def add_rows(self, infos: Iterable[FrameInfo]) -> None:
        """These frames or parts are in a journal now."""
        if self._parts == 1:
            self._set_stored([info.frame_index for info in infos])
        else:
            for info in infos:
                self._add_part(info.frame_index)

    def give_up(self, start: int, stop: int, state: FrameState, cause: str) -> list[Account]:
        """The pending frames of a range get a state; those of which some parts are there become incomplete."""
        pending = self.states.indices(FrameState.pending, max(start, self.states.watermark), stop)
        is_partial = np.isin(pending, list(self._n_parts)) if self._n_parts else np.zeros(pending.size, bool)
        accounts = [
            Account(_ranges(indices), to.name, cause)
            for indices, to in ((pending[~is_partial], state), (pending[is_partial], FrameState.incomplete))
            if indices.size
        ]
        for account in accounts:
            self.account(account)
        return accounts

    def account(self, account: Account) -> None:
        """These frames have been given up."""
        for start, stop in account.ranges:
            self.states.account(start, stop, FrameState[account.state], account.cause)

    def settle(self, accounts: Iterable[Account]) -> None:
        """After a power loss: of what was given up as incomplete, that which lost the parts it had is missing."""
        for account in accounts:
            for start, stop in account.ranges if account.state == FrameState.incomplete.name else []:
                for index in range(start, stop):
                    if self.states[index] is FrameState.incomplete and not self._slots(index):
                        self.states.set(index, index + 1, FrameState.missing, account.cause)

    def add_late(self, info: FrameInfo) -> None:
        """This frame or part of a sealed chunk is in an amendment now."""
        index = info.frame_index
        if self.states[index] is FrameState.late:
            return
        if len(self._slots(index)) == self._parts:
            self.states.set(index, index + 1, FrameState.late)
        elif self.states[index] is not FrameState.incomplete:
            self.states.set(index, index + 1, FrameState.incomplete, self.states.cause(index))

    def adopt(self, commit: ChunkCommit) -> None:
        """This chunk is sealed."""
        self.commits[commit.chunk] = commit
        for part in commit.ranges:
            self.states.set(part.start, part.stop, FrameState[part.state], part.cause)
        self._veto(commit)
        self.journals.pop(commit.chunk, None)

    def revise(self, commit: ChunkCommit) -> None:
        """A veto has replaced the commit of a sealed chunk, and with it the shard."""
        self._veto(commit)
        self.commits[commit.chunk] = commit
        self.chunks.forget(commit.chunk)

    def _veto(self, commit: ChunkCommit) -> None:
        for veto in commit.vetoes:
            for start, stop in zip(veto.starts, veto.stops, strict=True):
                self.states.set(start, stop, FrameState.vetoed, veto.cause)

    def _set_stored(self, indices: list[int]) -> None:
        """Set runs of neighbours at once: one call for each frame costs more than storing it."""
        start = stop = indices[0] if indices else 0
        for index in indices:
            if index != stop:
                self.states.set(start, stop, FrameState.stored)
                start = index
            stop = index + 1
        if stop > start:
            self.states.set(start, stop, FrameState.stored)

    def _add_part(self, index: int) -> None:
        n_parts = self._n_parts.get(index, 0) + 1
        if n_parts == self._parts:
            self._n_parts.pop(index)
            self.states.set(index, index + 1, FrameState.stored)
            return
        self._n_parts[index] = n_parts
        if self.states[index] is FrameState.pending:
            self.states.announce(index + 1)
        else:
            self.states.set(index, index + 1, FrameState.incomplete, self.states.cause(index))


def _ranges(indices: np.ndarray) -> list[tuple[int, int]]:
    """Rising indices as runs of neighbours (start, stop)."""
    edges = np.flatnonzero(np.diff(indices) != 1)
    starts, stops = indices[np.r_[0, edges + 1]], indices[np.r_[edges, len(indices) - 1]] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def missing_frame(
    header: StreamHeader, states: IndexStates, index: int, *, is_terminal: bool
) -> FrameMissing | FrameNotYetAvailable:
    """The error that says why a frame cannot be had."""
    name = f"frame {index} of {header.experiment}/{header.run}/{header.data_source}"
    if index < 0:
        return FrameMissing(f"{name} does not exist: counted from the end, there are {states.announced} frames so far")
    state = states[index]
    if state in (FrameState.missing, FrameState.rejected):
        return FrameMissing(f"{name} is {state.name} ({states.cause(index)}); the ledger lists all such frames")
    if state is FrameState.pruned:
        return FrameMissing(f"{name} was {states.cause(index)}")
    if state is FrameState.left_out:
        return FrameMissing(f"{name} is {states.cause(index)}, and was left out; see {header.parent}")
    if state is FrameState.vetoed:
        return FrameMissing(f"{name} was vetoed {states.cause(index)}")
    if is_terminal:
        return FrameMissing(f"{name} does not exist: the run has ended with {states.announced} frames")
    return FrameNotYetAvailable(
        f"{name} has not arrived yet ({states.announced} frames so far); follow() waits for frames"
    )
