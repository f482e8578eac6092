"""A stream that is in memory only: what `StreamStore` is for one on disk, without the disk.

The frames are in the `FrameBuffer` and nowhere else, and go from there, oldest first, when newer ones
need the room. Here is what must not go with them: the state of every index, so that readers and
groups pass what is gone and the ledger says so. An account of it is written about once a
second and at the end, without frames.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np

from storage.answers import Answers
from storage.codec import Buffer
from storage.errors import BadFrame, FrameTooLate, IndexConflict, NotStored, StreamOwned
from storage.files import replace
from storage.frame import FrameInfo, RawFrame, content_digest
from storage.masks import write_plane
from storage.models import StreamHeader
from storage.online_account import MADE_ROOM, OnlineAccount, account_of, read_account, write_account
from storage.run_folder import ChunkCommit, RunFolder, claim_stream, latest_epoch
from storage.states import READABLE, FrameState, IndexStates, StreamLedger, build_ledger
from storage.stored_frames import missing_frame
from storage.stream_store import Admission
from streaming.buffer import FrameBuffer

__all__ = ["OnlineStore"]

log = logging.getLogger("nearline.online")

_ACCOUNT_S = 1.0
# An account of millions of frames in many ranges takes a while: at most so much of the time goes into it.
_ACCOUNT_SHARE = 0.02
_UNKNOWN = "not known: the service was killed"


class _SharedStates(IndexStates):
    """Index states changed by the writer and by whoever needs a frame's room."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self.n_changes = 0

    def set(self, start: int, stop: int, state: FrameState, cause: str | None = None) -> None:
        with self.lock:
            self.n_changes += 1
            super().set(start, stop, state, cause)

    def account(self, start: int, stop: int, state: FrameState, cause: str | None) -> None:
        with self.lock:
            self.n_changes += 1
            super().account(start, stop, state, cause)

    def announce(self, stop: int) -> None:
        with self.lock:
            self.n_changes += 1
            super().announce(stop)


class OnlineStore:
    """The keeper of one stream in memory; the recorder, the writer and the server use it as a `StreamStore`."""

    def __init__(self, folder: RunFolder, header: StreamHeader, buffer: FrameBuffer) -> None:
        self.folder, self.header = folder, header
        self.paths = folder.stream(header.data_source)
        self.key = (header.experiment, header.run, header.data_source)
        self.states = _SharedStates()
        # No chunk is ever sealed.
        self.sealed: dict[int, ChunkCommit] = {}
        self.duplicate = 0
        self.is_finished = False
        self.aborted: str | None = None
        self._buffer = buffer
        self._answers = Answers()
        self._seen = _Fingerprints()
        # How many parts of a frame have come, while some are awaited.
        self._n_parts: dict[int, int] = {}
        self._is_ending = False
        self._n_changes_written = 0
        self._account_due = time.monotonic() + _ACCOUNT_S
        self._file_lock = threading.Lock()
        self.epoch, self._lock_fd = claim_stream(self.paths, f"pid {os.getpid()} on {socket.gethostname()}")

    @classmethod
    def create(
        cls,
        folder: RunFolder,
        header: StreamHeader,
        buffer: FrameBuffer,
        *,
        pixel_mask: np.ndarray | None = None,
        flatfield: np.ndarray | None = None,
    ) -> "OnlineStore":
        """Begin a stream: its header and masks are in the folder, ready for the first frame."""
        # Claimed before the header can be seen: a stream without a writer reads as ended.
        store = cls(folder, header, buffer)
        try:
            folder.add_stream(header)
            for name, plane in (("pixel_mask", pixel_mask), ("flatfield", flatfield)):
                if plane is not None:
                    write_plane(store.paths.zarr, name, plane, header)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def recover(cls, folder: RunFolder, data_source: str, buffer: FrameBuffer) -> "OnlineStore":
        """What is known of a stream after a crash, and its end: the memory it was in is gone.

        It cannot go on: which sendings had come is gone too, so a repeated one would count twice.
        """
        store = cls(folder, folder.stream_header(data_source), buffer)
        finished = folder.finished(data_source)
        account = OnlineAccount.model_validate(finished) if finished else read_account(store.paths)
        if account is not None:
            store.duplicate = account.duplicate
            for part in account.ranges:
                store.states.set(part.start, part.stop, FrameState[part.state], part.cause)
        if finished:
            store.aborted, store._is_ending, store.is_finished = finished.get("aborted"), True, True
        else:
            known = f"what came after {account.at:%H:%M:%S} UTC" if account else "what came"
            store.begin_finish(0, _UNKNOWN, f"the service was killed, {known} in memory only is not known")
            store.end_finish()
        return store

    # ---- frames in ----------------------------------------------------------------------------------

    def admit(self, info: FrameInfo) -> Admission:
        """Decide on a frame by its row; also on one whose predecessor under that index has made room long since.

        Raises
        ------
        IndexConflict, BadFrame : as of `StreamStore.admit`.
        """
        if not 0 <= info.part < self.header.parts:
            raise BadFrame(
                f"frame {info.frame_index} of {self.header.data_source} cannot have a part {info.part}: its frames "
                f"come in {self.header.parts} parts, counted from 0"
            )
        answered = None if info.sequence is None else self.answered(info.producer, info.sequence)
        if answered is not None and answered != info.frame_index:
            raise IndexConflict(
                f"sending {info.sequence} of producer {info.producer} to {self.header.data_source} was taken as "
                f"frame {answered} and now comes as frame {info.frame_index}; check how the source counts"
            )
        slot = self._slot(info)
        if slot in self._seen:
            if not self._seen.matches(slot, info):
                raise IndexConflict(
                    f"frame {info.frame_index} of {self.header.data_source} arrived twice with different content; "
                    "the first one counts, check the source's numbering"
                )
            self.duplicate += answered is None
            return Admission.duplicate if answered is None else Admission.retry
        return Admission.late if self._is_ending else Admission.new

    def answered(self, producer: str, sequence: int) -> int | None:
        """The index under which this sending was taken; None if it was not."""
        return self._answers.find(producer, sequence)

    def kept(self, frames: list[RawFrame]) -> None:
        """These admitted frames are in the buffer now; told by it, so that none is evicted meanwhile."""
        with self.states.lock:
            for frame in frames:
                info = frame.info
                self._seen.add(self._slot(info), info)
                if info.producer and info.sequence is not None:
                    self._answers.add(info.producer, info.sequence, info.frame_index)
                self._take(info.frame_index)

    def evicted(self, frame: RawFrame) -> None:
        """This frame, or a part of it, has made room; told by the buffer, from any thread."""
        index = frame.info.frame_index
        with self.states.lock:
            self._n_parts.pop(index, None)
            if self.states[index] in (*READABLE, FrameState.pending):
                self.states.set(index, index + 1, FrameState.pruned, MADE_ROOM)

    def append_late(self, info: FrameInfo, _blob: Buffer) -> None:
        """Nothing is taken once the stream ends.

        Raises
        ------
        FrameTooLate
        """
        raise FrameTooLate(
            f"frame {info.frame_index} of {self.header.data_source} came after the stream had ended with "
            f"{self.states.announced} frames; it is not kept, finish the stream after its last frame"
        )

    def account(self, start: int, stop: int, state: FrameState, cause: str) -> None:
        """Declare the pending indices of a range missing or rejected; those of which some parts came, incomplete."""
        with self.states.lock:
            self.states.announce(stop)
            partial = [i for i in self._n_parts if start <= i < stop and self.states[i] is FrameState.pending]
            for index in partial:
                self.states.set(index, index + 1, FrameState.incomplete, cause)
            self.states.account(start, stop, state, cause)

    def change_codec(self, codec: str) -> None:
        """Correct the header before the first frame: a start message does not say how frames are compressed."""
        if self.states.announced:
            raise BadFrame(f"{self.header.data_source} has frames already; its codec stays {self.header.codec}")
        self.header = StreamHeader.model_validate(self.header.model_dump() | {"codec": codec})
        replace(self.paths.header, self.header.model_dump_json(indent=2).encode())

    def _take(self, index: int) -> None:
        """One more frame or part is in memory."""
        n_parts = self._n_parts.get(index, 0) + 1
        if self.states[index] is FrameState.pruned:
            return  # another part of it has made room already
        if n_parts == self.header.parts:
            self._n_parts.pop(index, None)
            self.states.set(index, index + 1, FrameState.buffered)
            return
        self._n_parts[index] = n_parts
        if self.states[index] is FrameState.pending:
            self.states.announce(index + 1)
        else:
            self.states.set(index, index + 1, FrameState.incomplete, self.states.cause(index))

    def _slot(self, info: FrameInfo) -> int:
        return info.frame_index * self.header.parts + info.part

    # ---- frames out ---------------------------------------------------------------------------------

    def read_parts(self, frame_index: int) -> list[RawFrame]:
        """All parts of a frame that are in memory, rising.

        Raises
        ------
        FrameMissing, FrameNotYetAvailable
        """
        if self.states[frame_index] in READABLE:
            found = self._buffer.get_parts(self.key, frame_index, self.header.parts)
            if found:
                return found
        raise missing_frame(self.header, self.states, frame_index, is_terminal=self.is_finished)

    def infos(self, start: int, stop: int) -> Iterator[FrameInfo]:
        """Rows of the frames of a range that are in memory, by index and part."""
        for index in self.states.readable(start, stop).tolist():
            for frame in self._buffer.get_parts(self.key, index, self.header.parts):
                yield frame.info

    def ledger(self) -> StreamLedger:
        """The account of this stream now."""
        with self.states.lock:
            return build_ledger(self.header, self.states, self.duplicate, is_terminal=self.is_finished)

    # ---- the folder -----------------------------------------------------------------------------------

    def sync(self) -> None:
        """Write the account if it is time to and something has changed; from any thread.

        A disk that refuses costs the account, not the stream.
        """
        now = time.monotonic()
        if now < self._account_due or self.states.n_changes == self._n_changes_written:
            return
        with self._file_lock:
            if self.is_finished:
                return
            with self.states.lock:
                n_changes, account = self.states.n_changes, account_of(self.states, self.duplicate)
            try:
                write_account(self.paths, account)
                self._n_changes_written = n_changes
            except OSError as error:
                log.error("the account of %s is not written, trying again: %s", self.paths.online_account, error)
            done = time.monotonic()
            self._account_due = done + max(_ACCOUNT_S, (done - now) / _ACCOUNT_SHARE)

    def take_complete(self, _at_most: int | None = None) -> list[int]:
        """No chunk is ever whole on disk."""
        return []

    def seal(self, chunk: int) -> ChunkCommit:
        """NotStored: there is nothing to seal."""
        raise NotStored(f"{self.header.data_source} is in memory only; it has no chunk {chunk}")

    def begin_finish(self, announced: int, cause: str, aborted: str | None = None) -> list[int]:
        """End the stream: what is still pending is missing with this cause; there are no chunks to seal."""
        if not self._is_ending:
            self.aborted = aborted
            self.account(0, max(announced, self.states.announced), FrameState.missing, cause)
            self._is_ending = True
        return []

    def end_finish(self) -> None:
        """Record the end with the account of all frames. After an OSError, call it again.

        Frames still in memory can be read until their room is needed; for the folder they are gone.
        """
        if self.is_finished:
            return
        if latest_epoch(self.paths) != self.epoch:
            raise StreamOwned(f"{self.paths.claims}: a newer service has claimed this stream; this one leaves it alone")
        with self._file_lock:
            with self.states.lock:
                account = account_of(self.states, self.duplicate)
            facts = account.model_dump(mode="json", exclude={"at"})
            event = {"data_source": self.header.data_source, "late": 0, "aborted": self.aborted}
            self.folder.add_event("stream_finished", event | facts)
            self.paths.online_account.unlink(missing_ok=True)
            self.is_finished = True

    def close(self) -> None:
        """Give the stream up; what is in memory can still be read."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


class _Fingerprints:
    """Eight bytes of each frame's digest by slot: enough to tell a repetition, also of a frame that is gone."""

    def __init__(self) -> None:
        self._known = np.zeros(1024, np.uint64)

    def add(self, slot: int, info: FrameInfo) -> None:
        if slot >= len(self._known):
            longer = np.zeros(max(slot + 1, 2 * len(self._known)), np.uint64)
            longer[: len(self._known)] = self._known
            self._known = longer
        self._known[slot] = _fingerprint(info)

    def matches(self, slot: int, info: FrameInfo) -> bool:
        return int(self._known[slot]) == _fingerprint(info)

    def __contains__(self, slot: int) -> bool:
        return slot < len(self._known) and bool(self._known[slot])


def _fingerprint(info: FrameInfo) -> int:
    # Never 0, which means that nothing has come.
    return int.from_bytes(content_digest(info)[:8], "little") | 1
