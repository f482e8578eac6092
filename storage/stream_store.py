"""One stream being written: frames into chunk journals, journals into shards.

`append` puts a frame into its chunk's journal (state *stored*); a chunk is sealed once, when
each of its indices is stored, declared missing or rejected. Publication order: shard →
frame table → commit; everything before the commit is rolled forward by `recover` after a
crash at any point.

One thread writes: admit, append, account, `take_complete`, `begin_finish`. Another one may publish
what has been taken: `seal`, `end_finish`. `read` may be called from any: a chunk's journal stays
until its shard is there.
"""

import itertools
import logging
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import numpy as np

from storage.account_log import AccountLog
from storage.answers import Answers
from storage.codec import Buffer
from storage.errors import BadFrame, CorruptFrame, FrameTooLate, IndexConflict, StreamOwned
from storage.files import make_folder, publish, publish_file, replace, sync_folder
from storage.frame import FrameInfo, RawFrame, chunk_digest, content_digest, file_digest
from storage.frame_table import frame_table, read_sendings, table_bytes
from storage.journal import Batch, Journal
from storage.masks import write_plane
from storage.models import StreamHeader
from storage.run_folder import ChunkCommit, RunFolder, claim_stream, latest_epoch
from storage.states import FrameState, StateRange, StreamLedger, build_ledger
from storage.stored_frames import StoredFrames, missing_frame
from storage.zarr_layout import write_array_metadata, write_group

__all__ = ["Admission", "StreamStore", "missing_frame"]

log = logging.getLogger("nearline.storage")


class Admission(StrEnum):
    """What becomes of a frame that has just arrived."""

    new = "new"
    # The same content under the same index, from somebody else.
    duplicate = "duplicate"
    # The same sending of the same producer: it has not heard the first answer.
    retry = "retry"
    # Its chunk is sealed, or being sealed, without it.
    late = "late"


class StreamStore:
    """The writer of one stream in a run folder."""

    def __init__(self, folder: RunFolder, header: StreamHeader) -> None:
        self.folder, self.header = folder, header
        self.paths = folder.stream(header.data_source)
        self.duplicate = 0
        self.is_finished = False
        self.aborted: str | None = None
        self._frames = StoredFrames(self.paths, header)
        self.states, self.sealed = self._frames.states, self._frames.commits
        self._journals, self._amendments = self._frames.journals, self._frames.amendments
        self._accounts = AccountLog(self.paths.accounts)
        self._answers = Answers()
        # Chunks that have been taken to be sealed, with the final states of their indices.
        self._sealing: dict[int, list[StateRange]] = {}
        # Chunks below this one have been taken.
        self._first_open = 0
        # Frames below this one are in sealed chunks or in a gap between them: the Zarr array's length.
        self._length = 0
        self._is_ending = False
        # Also after a crash: what it left may have a name that never reached the disk.
        self._has_new_names = True
        # The writer appends late frames while the publisher ends the stream.
        self._late_lock = threading.Lock()
        self._takes_late = True
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
                write_plane(store.paths.zarr, name, plane, header)
        return store

    @classmethod
    def recover(cls, folder: RunFolder, data_source: str) -> "StreamStore":
        """Take over a stream after a crash: keep what was stored, roll half-done seals forward."""
        store = cls(folder, folder.stream_header(data_source))
        store._make_folders()
        store._sync_names()
        store._load()
        finished = folder.finished(data_source)
        if finished:
            store.states.announce(finished["announced"])
            store.duplicate = finished["duplicate"]
            for chunk in store.begin_finish(0, "unknown", finished.get("aborted")):
                store.seal(chunk)
            store.is_finished, store._takes_late = True, False
        else:
            store.seal_complete()
        store._publish_length(is_synced=True)
        return store

    def admit(self, info: FrameInfo) -> Admission:
        """Decide on a frame by its row alone, before it takes memory.

        Raises
        ------
        IndexConflict : that index is stored already with other content, or this sending under another index.
        BadFrame : the stream's frames have no such part.
        """
        if not 0 <= info.part < self.header.parts:
            raise BadFrame(
                f"frame {info.frame_index} of {self.header.data_source} cannot have a part {info.part}: its frames "
                f"come in {self.header.parts} parts, counted from 0"
            )
        answered = None if info.sequence is None else self.answered(info.producer, info.sequence)
        if answered is not None and answered != info.frame_index:
            raise IndexConflict(
                f"sending {info.sequence} of producer {info.producer} to {self.header.data_source} was stored as "
                f"frame {answered} and now comes as frame {info.frame_index}; the first one is kept, check how the "
                "source counts"
            )
        is_beyond = info.frame_index >= self.states.announced
        found = None if is_beyond else self._frames.info(info.frame_index, info.part)
        if found is not None:
            self._check_same(found, info)
            self.duplicate += answered is None
            return Admission.duplicate if answered is None else Admission.retry
        is_late = self._is_ending or self._is_taken(info.frame_index // self.header.frames_per_chunk)
        return Admission.late if is_late else Admission.new

    def answered(self, producer: str, sequence: int) -> int | None:
        """The index under which this sending was stored, by this service or one before it; None if it was not."""
        return self._answers.find(producer, sequence)

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
        infos = [info for info, _ in frames]
        self._frames.add_rows(infos)
        self._remember(infos)

    def append_late(self, info: FrameInfo, blob: Buffer) -> None:
        """Keep a frame that was admitted as late, in the amendments; afterwards it is *late* and can be read.

        Raises
        ------
        StorageFull : the disk refused; nothing has changed.
        FrameTooLate : the stream has ended, too.
        """
        with self._late_lock:
            if not self._takes_late or info.frame_index >= self.states.announced:
                raise FrameTooLate(
                    f"frame {info.frame_index} of {self.header.data_source} came after the stream had ended with "
                    f"{self.states.announced} frames; it is not kept, finish the stream after its last frame"
                )
            info.late = True
            self._amendments.append(self.epoch, info, blob)
            self._frames.add_late(info)
        self._remember([info])

    def account(self, start: int, stop: int, state: FrameState, cause: str) -> None:
        """Declare the pending indices of a range missing or rejected, with the cause, and keep that through a crash.

        Of frames in parts, those of which some are there become incomplete; of a selection, those that would be
        missing are left out.
        """
        if self.header.leaves_out and state is FrameState.missing:
            state, cause = FrameState.left_out, self.header.leaves_out
        self.states.announce(stop)
        for account in self._frames.give_up(start, stop, state, cause):
            self._accounts.add(account)
        if self._accounts.is_long:
            first_unsealed = next(chunk for chunk in itertools.count() if chunk not in self.sealed)
            self._accounts.shorten(first_unsealed * self.header.frames_per_chunk)

    def change_codec(self, codec: str) -> None:
        """Correct the header before the first frame: a start message does not say how frames are compressed."""
        if self.states.announced:
            raise BadFrame(f"{self.header.data_source} has frames already; its codec stays {self.header.codec}")
        self.header = StreamHeader.model_validate(self.header.model_dump() | {"codec": codec})
        self._frames.change_header(self.header)
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
        self._check_epoch()
        journal = self._journals.get(chunk)
        infos = journal.infos if journal else {}
        if journal and self.header.kind == "frames":
            self._publish_shard(chunk, journal)
        table = table_bytes(frame_table(infos.values()))
        replace(self.paths.frame_table(chunk), table)
        commit = self._commit_of(chunk, infos, table)
        if not publish(self.paths.commit(chunk), commit.model_dump_json(indent=1).encode()):
            commit = self._published_before(commit)
        # In this order: whoever finds a chunk no longer in one place finds it in the next.
        self._frames.chunks.remember(chunk, infos)
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
        """Seal the amendments and record the end, once every chunk is sealed; in the thread that seals.

        From here on no late frame is taken. After an OSError, call it again.
        """
        if self.is_finished:
            return
        self._check_epoch()
        with self._late_lock:
            self._takes_late = False
        self._amendments.seal(self.epoch)
        self._publish_length(is_synced=True)
        self._accounts.remove()
        if self.folder.finished(self.header.data_source) is None:
            self.folder.add_event("stream_finished", self._end())
        # Last: on a full disk the end is tried again from the top.
        self.is_finished = True

    def _end(self) -> dict[str, Any]:
        return {
            "data_source": self.header.data_source,
            "announced": self.states.announced,
            "duplicate": self.duplicate,
            "late": self.states.count(FrameState.late),
            "aborted": self.aborted,
        }

    def finish(self, announced: int, cause: str, aborted: str | None = None) -> list[ChunkCommit]:
        """End the stream in this thread: `begin_finish`, seal what is left, `end_finish`."""
        done = [self.seal(chunk) for chunk in self.begin_finish(announced, cause, aborted)]
        self.end_finish()
        return done

    def read(self, frame_index: int) -> RawFrame:
        """A frame from its journal, shard or amendment; of one in parts, the first part that is there.

        Raises
        ------
        FrameMissing, FrameNotYetAvailable, CorruptFrame
        """
        return self._frames.read(frame_index, is_terminal=self.is_finished)

    def read_parts(self, frame_index: int) -> list[RawFrame]:
        """All parts of a frame that are there, rising. Errors as of `read`."""
        return self._frames.read_parts(frame_index, is_terminal=self.is_finished)

    def info(self, frame_index: int, part: int = 0) -> FrameInfo:
        """The row of a frame or part; KeyError if it is not stored."""
        found = self._frames.info(frame_index, part)
        if found is None:
            raise KeyError(frame_index)
        return found

    def infos(self, start: int, stop: int) -> Iterator[FrameInfo]:
        """Rows of the readable frames of a range by index and part, without reading payloads."""
        return self._frames.infos(start, stop)

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
        self._accounts.sync()
        self._amendments.sync()

    def ledger(self) -> StreamLedger:
        """The account of this stream now."""
        return build_ledger(self.header, self.states, self.duplicate, is_terminal=self.is_finished)

    def close(self) -> None:
        """Give the stream up; open journals stay as they are and can be recovered."""
        # Not closed by hand: a reader may be in the middle of one, the last to let go closes it.
        self._journals.clear()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _make_folders(self) -> None:
        paths = self.paths
        for folder in (paths.frames, paths.chunks, paths.journal):
            make_folder(folder)
        for folder in (paths.frames, paths.chunks, paths.journal, paths.amendments, paths.zarr, paths.array):
            for aside in folder.glob(".*"):  # what a crash left of a file being written
                aside.unlink()
        if self.header.kind == "frames" and not (self.paths.array / "zarr.json").exists():
            self._write_zarr_metadata()

    def _sync_names(self) -> None:
        """Make durable what a writer before us had named but, killed in between, not synced: we build on it."""
        run, paths = self.folder.path, self.paths
        folders = [run.parent.parent, run.parent, run, run / "events", paths.frames, paths.chunks, paths.journal]
        if self.header.kind == "frames":
            shards = [paths.shard(chunk, len(self.header.array_shape)) for chunk, _ in paths.journals()]
            shard_folders = {above for shard in shards for above in shard.parents if paths.array in above.parents}
            folders += [paths.zarr, paths.array, *sorted(shard_folders)]
        for folder in folders:
            if folder.is_dir():
                sync_folder(folder)

    def _write_zarr_metadata(self) -> None:
        write_group(self.paths.zarr, {"nearline": self.header.model_dump(mode="json")})
        write_array_metadata(self.paths.array, self.header, 0)

    def _load(self) -> None:
        """Take up what earlier services left."""
        size = self.header.frames_per_chunk
        for chunk in self.paths.commits():
            commit = self.paths.read_commit(chunk)
            self._frames.adopt(commit)
            self._length = max(self._length, commit.stop)
            self._load_answers(chunk)
        accounts = list(self._accounts.recover())
        for account in accounts:
            self._frames.account(account)
        for chunk, path in self.paths.journals():
            if chunk in self.sealed:
                path.unlink()
                continue
            journal = Journal.recover(path, chunk * size, size, self.header.parts)
            if not journal.infos:
                path.unlink()  # its frames were lost before they were durable; it may lie beyond the end by now
                continue
            self._journals[chunk] = journal
            self._frames.add_rows(journal.infos.values())
            self._remember(journal.infos.values())
        self._frames.settle(accounts)
        # Before late frames are known: they are none of the chunk's.
        self.take_complete()
        for info in self._amendments.recover():
            self._frames.add_late(info)
            self._remember([info])

    def _load_answers(self, chunk: int) -> None:
        try:
            for producer, sequences, indices in read_sendings(self.paths.frame_table(chunk)):
                self._answers.add_many(producer, sequences, indices)
        except CorruptFrame as error:  # the run goes on; only a retry of these very frames is not known as one
            log.error("%s", error)

    def _remember(self, infos: Iterable[FrameInfo]) -> None:
        """Note who sent these frames, so that a retry gets the same answer."""
        for info in infos:
            if info.producer and info.sequence is not None:
                self._answers.add(info.producer, info.sequence, info.frame_index)

    def _check_same(self, found: FrameInfo, info: FrameInfo) -> None:
        if content_digest(found) != content_digest(info):
            raise IndexConflict(
                f"frame {info.frame_index} of {self.header.data_source} arrived twice with different content; "
                "the first one is kept, check the source's numbering"
            )

    def _by_chunk(self, frames: Sequence[tuple[FrameInfo, Buffer]]) -> dict[int, list[tuple[FrameInfo, Buffer]]]:
        size, parts = self.header.frames_per_chunk, self.header.parts
        batches: dict[int, list[tuple[FrameInfo, Buffer]]] = {}
        slots: set[int] = set()
        for frame in frames:
            info = frame[0]
            slots.add(info.frame_index * parts + info.part)
            chunk = info.frame_index // size
            if chunk in batches:
                batches[chunk].append(frame)
            else:
                batches[chunk] = [frame]
        if len(slots) < len(frames):
            raise IndexConflict(
                f"the same frame index of {self.header.data_source} comes twice among {len(frames)} frames to be "
                "stored at once; check the source's numbering"
            )
        return batches

    def _open_journal(self, chunk: int) -> Journal:
        journal = self._journals.get(chunk)
        if journal is None:
            size = self.header.frames_per_chunk
            journal = Journal.create(self.paths.open_journal(chunk), chunk * size, size, self.header.parts)
            # The name becomes durable with the next `sync`, as the frames do.
            self._journals[chunk], self._has_new_names = journal, True
        return journal

    def _check_epoch(self) -> None:
        if latest_epoch(self.paths) != self.epoch:
            raise StreamOwned(f"{self.paths.zarr}: a newer service has claimed this stream; this one stops writing it")

    def _is_taken(self, chunk: int) -> bool:
        """Whether a chunk is sealed or being sealed; asked in the order in which the publisher moves it on."""
        return chunk in self._sealing or chunk in self.sealed

    def _take(self, chunk: int) -> None:
        size = self.header.frames_per_chunk
        ranges = self.states.ranges(chunk * size, min((chunk + 1) * size, self.states.announced))
        # After a crash in the middle of a seal some are known that came late for it; to the chunk they are missing.
        self._sealing[chunk] = [
            r.model_copy(update={"state": FrameState.missing.name, "cause": "late"}) if r.state == "late" else r
            for r in ranges
        ]

    def _publish_shard(self, chunk: int, journal: Journal) -> None:
        shard = self.paths.shard(chunk, len(self.header.array_shape))
        make_folder(shard.parent)
        journal.write_index()
        if not publish_file(journal.path, shard):
            raise StreamOwned(f"{shard} was published by another service; this one stops writing it")

    def _commit_of(self, chunk: int, infos: dict[int, FrameInfo], table: bytes) -> ChunkCommit:
        ranges = self._sealing[chunk]
        return ChunkCommit(
            chunk=chunk,
            start=ranges[0].start,
            stop=ranges[-1].stop,
            ranges=ranges,
            n_frames=len(infos) if self.header.parts == 1 else len({info.frame_index for info in infos.values()}),
            size_bytes=sum(info.size_bytes for info in infos.values()),
            digest=chunk_digest(infos),
            table_digest=file_digest(table),
            epoch=self.epoch,
            sealed_at=datetime.now(UTC),
        )

    def _published_before(self, commit: ChunkCommit) -> ChunkCommit:
        """The commit as it is there: of an attempt of ours, after which the disk refused something."""
        path = self.paths.commit(commit.chunk)
        there = self.paths.read_commit(commit.chunk)
        if (there.epoch, there.digest, there.ranges) != (self.epoch, commit.digest, commit.ranges):
            raise StreamOwned(f"{path} was published by another service; this one stops writing it")
        sync_folder(path.parent)
        return there

    def _publish_length(self, *, is_synced: bool) -> None:
        """Bring the Zarr array's length up to date; while the stream is open, recovery would write it again."""
        if self.header.kind == "frames":
            write_array_metadata(self.paths.array, self.header, self._length, is_synced=is_synced)
