"""One stream being written: frames into chunk journals, journals into shards.

`append` puts a frame into its chunk's journal (state *stored*); a chunk is sealed once, when
each of its indices is stored, declared missing or rejected. Publication order: shard →
frame table → commit; everything before the commit is rolled forward by `recover` after a
crash at any point.

One thread writes: admit, append, account, `take_complete`, `begin_finish`. Another one may publish
what has been taken: `seal`, `end_finish`. `read` may be called from any: a chunk's journal stays
until its shard is there.
"""

import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import blake3
import numpy as np

from storage.codec import Buffer
from storage.errors import BadFrame, FrameMissing, FrameNotYetAvailable, IndexConflict, StreamOwned
from storage.files import make_folder, publish, publish_file, replace, sync_folder
from storage.frame import FrameInfo, RawFrame, content_digest
from storage.frame_table import frame_table, read_frame_table, table_bytes
from storage.journal import Batch, Journal
from storage.masks import write_plane
from storage.models import StreamHeader
from storage.run_folder import ChunkCommit, RunFolder, StreamPaths, claim_stream, latest_epoch
from storage.shard import ShardReader
from storage.states import FrameState, IndexStates, StateRange, StreamLedger
from storage.zarr_layout import write_array_metadata, write_group

__all__ = ["Admission", "SealedChunks", "StreamStore", "build_ledger", "missing_frame"]


class Admission(StrEnum):
    """What becomes of a frame that has just arrived."""

    new = "new"
    duplicate = "duplicate"
    late = "late"


class SealedChunks:
    """Frames of sealed chunks: shard readers and frame tables, the latest few kept open."""

    def __init__(self, paths: StreamPaths, header: StreamHeader, keep: int = 4) -> None:
        self._paths, self._header, self._keep = paths, header, keep
        self._shards: OrderedDict[int, ShardReader] = OrderedDict()
        self._tables: OrderedDict[int, dict[int, FrameInfo]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, frame_index: int) -> RawFrame:
        """One frame of a sealed chunk; KeyError where the chunk has a hole."""
        info = self.infos(frame_index // self._header.frames_per_chunk)[frame_index]
        if self._header.kind == "table":
            return RawFrame(info, b"")
        return RawFrame(info, self._shard(frame_index // self._header.frames_per_chunk).read(frame_index))

    def infos(self, chunk: int) -> dict[int, FrameInfo]:
        """The frame table of a sealed chunk by index."""
        with self._lock:
            table = self._tables.get(chunk)
        if table is None:
            table = {info.frame_index: info for info in read_frame_table(self._paths.frame_table(chunk))}
            self.remember(chunk, table)
        return table

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
                size = self._header.frames_per_chunk
                reader = ShardReader(self._paths.stored_shard(chunk, len(self._header.shape)), chunk * size, size)
                self._shards[chunk] = reader
            self._shards.move_to_end(chunk)
            # Readers in use elsewhere close themselves when the last thread lets go.
            while len(self._shards) > self._keep:
                self._shards.popitem(last=False)
            return reader


class StreamStore:
    """The writer of one stream in a run folder."""

    def __init__(self, folder: RunFolder, header: StreamHeader) -> None:
        self.folder, self.header = folder, header
        self.paths = folder.stream(header.data_source)
        self.states = IndexStates()
        self.duplicate = self.late = 0
        self.is_finished = False
        self.aborted: str | None = None
        self.sealed: dict[int, ChunkCommit] = {}
        self._first_open = 0
        # Frames below this one are in sealed chunks or in a gap between them: the Zarr array's length.
        self._length = 0
        self._is_ending = False
        # Chunks that have been taken to be sealed, with the final states of their indices.
        self._sealing: dict[int, list[StateRange]] = {}
        self._journals: dict[int, Journal] = {}
        self._has_new_names = False
        self._chunks = SealedChunks(self.paths, header)
        self.epoch, self._lock_fd = claim_stream(self.paths, f"pid {os.getpid()} on {socket.gethostname()}")

    @classmethod
    def create(
        cls,
        folder: RunFolder,
        header: StreamHeader,
        *,
        pixel_mask: np.ndarray | None = None,
        flatfield: np.ndarray | None = None,
    ) -> "StreamStore":
        """Begin a stream: its header, Zarr group and masks, ready for the first frame."""
        # Claimed before the header can be seen: a stream without a writer reads as ended.
        store = cls(folder, header)
        try:
            folder.add_stream(header)
        except BaseException:
            store.close()
            raise
        store._make_folders()
        for name, plane in (("pixel_mask", pixel_mask), ("flatfield", flatfield)):
            if plane is not None:
                write_plane(store.paths.zarr, name, plane, header.shape)
        return store

    @classmethod
    def recover(cls, folder: RunFolder, data_source: str) -> "StreamStore":
        """Take over a stream after a crash: keep what was stored, roll half-done seals forward."""
        store = cls(folder, folder.stream_header(data_source))
        store._make_folders()
        for chunk in store.paths.commits():
            store._adopt_commit(store.paths.read_commit(chunk))
        for chunk, path in store.paths.journals():
            if chunk in store.sealed:
                path.unlink()
            else:
                store._adopt_journal(chunk, path)
        finished = folder.finished(data_source)
        if finished:
            store.states.announce(finished["announced"])
            store.duplicate, store.late = finished["duplicate"], finished["late"]
            for chunk in store.begin_finish(0, "unknown", finished.get("aborted")):
                store.seal(chunk)
            store.is_finished = True
        else:
            store.seal_complete()
        store._publish_length(is_synced=True)
        return store

    def admit(self, info: FrameInfo) -> Admission:
        """Decide on a frame by its index alone, before it takes memory.

        Raises
        ------
        IndexConflict : that index is stored already with other content.
        """
        index = info.frame_index
        if self.states[index] is FrameState.stored:
            if content_digest(self.info(index)) != content_digest(info):
                raise IndexConflict(
                    f"frame {index} of {self.header.data_source} arrived twice with different content; "
                    "the first one is kept, check the source's numbering"
                )
            self.duplicate += 1
            return Admission.duplicate
        if self._is_ending or self._is_taken(index // self.header.frames_per_chunk):
            self.late += 1
            return Admission.late
        return Admission.new

    def append(self, info: FrameInfo, blob: Buffer) -> None:
        """Journal one admitted frame; afterwards it is *stored*. Errors as of `append_many`."""
        self.append_many([(info, blob)])

    def append_many(self, frames: Sequence[tuple[FrameInfo, Buffer]]) -> None:
        """Journal admitted frames with one write for each chunk they belong to; afterwards all are *stored*.

        Raises
        ------
        StorageFull : the disk refused; none of them is stored, the journals are as they were before.
        IndexConflict : two of them have the same index; none is stored, append them one by one.
        """
        batches = self._by_chunk(frames)
        written: list[tuple[Journal, Batch]] = []
        try:
            for chunk, batch in batches.items():
                journal = self._open_journal(chunk)
                written.append((journal, journal.write(batch)))
        except BaseException:
            for journal, _ in written:
                journal.cut()
            raise
        for journal, kept in written:
            journal.keep(kept)
        self._set_stored([info.frame_index for info, _ in frames])

    def account(self, start: int, stop: int, state: FrameState, cause: str) -> None:
        """Declare the pending indices of a range missing or rejected, with the cause."""
        self.states.account(start, stop, state, cause)

    def change_codec(self, codec: str) -> None:
        """Correct the header before the first frame: a start message does not say how frames are compressed."""
        if self.states.announced:
            raise BadFrame(f"{self.header.data_source} has frames already; its codec stays {self.header.codec}")
        self.header = StreamHeader.model_validate(self.header.model_dump() | {"codec": codec})
        self._chunks = SealedChunks(self.paths, self.header)
        replace(self.paths.header, self.header.model_dump_json(indent=2).encode())
        self._write_zarr_metadata()

    def take_complete(self, at_most: int | None = None) -> list[int]:
        """The whole chunks in which no index is pending any more, at most so many of them, each once: to be sealed.

        From here on nothing changes in them; a frame that comes for one is late.
        """
        size = self.header.frames_per_chunk
        while self._is_taken(self._first_open):
            self._first_open += 1
        taken: list[int] = []
        for chunk in range(self._first_open, self.states.announced // size):
            if at_most is not None and len(taken) >= at_most:
                break
            if self._is_taken(chunk) or self.states.count(FrameState.pending, chunk * size, (chunk + 1) * size):
                continue
            self._take(chunk)
            taken.append(chunk)
        return taken

    def seal(self, chunk: int) -> ChunkCommit:
        """Publish a chunk that was taken: shard, frame table, commit; its frames can be read all the while.

        Called from one thread, which need not be the one that writes. Up to the commit, which is
        created once, everything may be done again: after an OSError, call it again.

        Raises
        ------
        StreamOwned : a newer service has claimed the stream.
        """
        if chunk in self.sealed:
            return self.sealed[chunk]
        if latest_epoch(self.paths) != self.epoch:
            raise StreamOwned(f"{self.paths.zarr}: a newer service has claimed this stream; this one stops writing it")
        journal = self._journals.get(chunk)
        infos = journal.infos if journal else {}
        if journal and self.header.kind == "frames":
            self._publish_shard(chunk, journal)
        replace(self.paths.frame_table(chunk), table_bytes(frame_table(infos.values())))
        commit = self._commit_of(chunk, infos)
        if not publish(self.paths.commit(chunk), commit.model_dump_json(indent=1).encode()):
            raise StreamOwned(f"{self.paths.commit(chunk)} was published by another service; this one stops writing it")
        # In this order: whoever finds a chunk no longer in one place finds it in the next.
        self._chunks.remember(chunk, infos)
        self.sealed[chunk] = commit
        self._sealing.pop(chunk, None)
        self._length = max(self._length, commit.stop)
        if journal:
            # Not closed here: a reader may be in the middle of it, and the file lives on as the shard.
            self._journals.pop(chunk, None)
            journal.path.unlink()
        self._publish_length(is_synced=False)
        return commit

    def seal_complete(self, at_most: int | None = None) -> list[ChunkCommit]:
        """Seal the chunks that are complete, in this thread, and any that could not be sealed before."""
        waiting = sorted(self._sealing)
        return [self.seal(chunk) for chunk in [*waiting, *self.take_complete(at_most)]]

    def begin_finish(self, announced: int, cause: str, aborted: str | None = None) -> list[int]:
        """End the stream: what is still pending is missing with this cause; the chunks that are not sealed yet.

        ``aborted`` says why, when the source did not end the stream itself. Called again, it
        changes nothing.
        """
        if not self._is_ending:
            self.aborted = aborted
            self.account(0, max(announced, self.states.announced), FrameState.missing, cause)
            self._is_ending = True
        unsealed = [c for c in range(-(-self.states.announced // self.header.frames_per_chunk)) if c not in self.sealed]
        for chunk in unsealed:
            if chunk not in self._sealing:
                self._take(chunk)
        return unsealed

    def end_finish(self) -> None:
        """Record the end, once every chunk is sealed; in the thread that seals. After an OSError, call it again."""
        if self.is_finished:
            return
        self._publish_length(is_synced=True)
        self.folder.add_event(
            "stream_finished",
            {
                "data_source": self.header.data_source,
                "announced": self.states.announced,
                "duplicate": self.duplicate,
                "late": self.late,
                "aborted": self.aborted,
            },
        )
        # Last: on a full disk the end is tried again from the top.
        self.is_finished = True

    def finish(self, announced: int, cause: str, aborted: str | None = None) -> list[ChunkCommit]:
        """End the stream in this thread: `begin_finish`, seal what is left, `end_finish`."""
        done = [self.seal(chunk) for chunk in self.begin_finish(announced, cause, aborted)]
        self.end_finish()
        return done

    def read(self, frame_index: int) -> RawFrame:
        """A stored frame, from its journal or shard.

        Raises
        ------
        FrameMissing, FrameNotYetAvailable, CorruptFrame
        """
        # The state before the place: a stored frame is in a journal until its chunk is sealed.
        if self.states[frame_index] is not FrameState.stored:
            raise missing_frame(self.header, self.states, frame_index, is_terminal=self.is_finished)
        journal = self._journals.get(frame_index // self.header.frames_per_chunk)
        return journal.read(frame_index) if journal is not None else self._chunks.read(frame_index)

    def info(self, frame_index: int) -> FrameInfo:
        """The row of a stored frame; KeyError if it is not stored."""
        if self.states[frame_index] is not FrameState.stored:
            raise KeyError(frame_index)
        chunk = frame_index // self.header.frames_per_chunk
        journal = self._journals.get(chunk)
        return journal.infos[frame_index] if journal is not None else self._chunks.infos(chunk)[frame_index]

    def sync(self) -> None:
        """Make all stored frames durable; from any thread."""
        if self._has_new_names:
            self._has_new_names = False
            try:
                sync_folder(self.paths.journal)
            except OSError:
                self._has_new_names = True
                raise
        for journal in list(self._journals.values()):
            journal.sync()

    def ledger(self) -> StreamLedger:
        """The account of this stream now."""
        return build_ledger(self.header, self.states, self.duplicate, self.late, is_terminal=self.is_finished)

    def close(self) -> None:
        """Give the stream up; open journals stay as they are and can be recovered."""
        # Not closed by hand: a reader may be in the middle of one, the last to let go closes it.
        self._journals = {}
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _make_folders(self) -> None:
        for folder in (self.paths.frames, self.paths.chunks, self.paths.journal):
            make_folder(folder)
            for aside in folder.glob(".*"):  # what a crash left of a file being written
                aside.unlink()
        if self.header.kind == "frames" and not (self.paths.array / "zarr.json").exists():
            self._write_zarr_metadata()

    def _write_zarr_metadata(self) -> None:
        write_group(self.paths.zarr, {"nearline": self.header.model_dump(mode="json")})
        write_array_metadata(self.paths.array, self.header, 0)

    def _adopt_commit(self, commit: ChunkCommit) -> None:
        self.sealed[commit.chunk] = commit
        self._length = max(self._length, commit.stop)
        for part in commit.ranges:
            self.states.set(part.start, part.stop, FrameState[part.state], part.cause)

    def _adopt_journal(self, chunk: int, path: Path) -> None:
        size = self.header.frames_per_chunk
        journal = Journal.recover(path, chunk * size, size)
        self._journals[chunk] = journal
        for index in journal.infos:
            self.states.set(index, index + 1, FrameState.stored)

    def _by_chunk(self, frames: Sequence[tuple[FrameInfo, Buffer]]) -> dict[int, list[tuple[FrameInfo, Buffer]]]:
        size = self.header.frames_per_chunk
        batches: dict[int, list[tuple[FrameInfo, Buffer]]] = {}
        seen: set[int] = set()
        for frame in frames:
            index = frame[0].frame_index
            seen.add(index)
            chunk = index // size
            if chunk in batches:
                batches[chunk].append(frame)
            else:
                batches[chunk] = [frame]
        if len(seen) < len(frames):
            raise IndexConflict(
                f"the same frame index of {self.header.data_source} comes twice among {len(frames)} frames to be "
                "stored at once; check the source's numbering"
            )
        return batches

    def _open_journal(self, chunk: int) -> Journal:
        journal = self._journals.get(chunk)
        if journal is None:
            size = self.header.frames_per_chunk
            journal = Journal.create(self.paths.open_journal(chunk), chunk * size, size)
            # The name becomes durable with the next `sync`, as the frames do.
            self._journals[chunk], self._has_new_names = journal, True
        return journal

    def _set_stored(self, indices: list[int]) -> None:
        """Set runs of neighbours at once: a frame each costs more than the frame."""
        start = stop = indices[0] if indices else 0
        for index in indices:
            if index != stop:
                self.states.set(start, stop, FrameState.stored)
                start = index
            stop = index + 1
        if stop > start:
            self.states.set(start, stop, FrameState.stored)

    def _is_taken(self, chunk: int) -> bool:
        """Whether a chunk is sealed or being sealed; asked in the order in which the publisher moves it on."""
        return chunk in self._sealing or chunk in self.sealed

    def _take(self, chunk: int) -> None:
        size = self.header.frames_per_chunk
        self._sealing[chunk] = self.states.ranges(chunk * size, min((chunk + 1) * size, self.states.announced))

    def _publish_shard(self, chunk: int, journal: Journal) -> None:
        shard = self.paths.shard(chunk, len(self.header.shape))
        make_folder(shard.parent)
        journal.write_index()
        if not publish_file(journal.path, shard):
            raise StreamOwned(f"{shard} was published by another service; this one stops writing it")

    def _commit_of(self, chunk: int, infos: dict[int, FrameInfo]) -> ChunkCommit:
        ranges = self._sealing[chunk]
        digest = blake3.blake3()
        for index in sorted(infos):
            digest.update(content_digest(infos[index]))
        return ChunkCommit(
            chunk=chunk,
            start=ranges[0].start,
            stop=ranges[-1].stop,
            ranges=ranges,
            n_frames=len(infos),
            size_bytes=sum(info.size_bytes for info in infos.values()),
            digest=digest.hexdigest(),
            epoch=self.epoch,
            sealed_at=datetime.now(UTC),
        )

    def _publish_length(self, *, is_synced: bool) -> None:
        """Bring the Zarr array's length up to date; while the stream is open, recovery would write it again."""
        if self.header.kind == "frames":
            write_array_metadata(self.paths.array, self.header, self._length, is_synced=is_synced)


def build_ledger(
    header: StreamHeader,
    states: IndexStates,
    duplicate: int,
    late: int,
    *,
    is_terminal: bool,
) -> StreamLedger:
    """The ledger that the states of all indices add up to."""
    counts = states.counts()
    stored = counts[FrameState.stored]
    return StreamLedger(
        data_source=header.data_source,
        planned=header.planned,
        announced=sum(counts.values()),
        received=stored,
        missing=counts[FrameState.missing],
        rejected=counts[FrameState.rejected],
        pending=counts[FrameState.pending],
        duplicate=duplicate,
        late=late,
        stored=stored,
        ranges=[r for r in states.ranges() if r.state in ("missing", "rejected")],
        is_terminal=is_terminal,
    )


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
    if is_terminal:
        return FrameMissing(f"{name} does not exist: the run has ended with {states.announced} frames")
    return FrameNotYetAvailable(
        f"{name} has not arrived yet ({states.announced} frames so far); follow() waits for frames"
    )
