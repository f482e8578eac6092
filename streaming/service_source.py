"""A stream served by a running service: `storage.stream_source.StreamSource` over the wire."""

import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from storage.errors import Interrupted, NearlineError, StaleLease
from storage.frame import FrameInfo, RawFrame
from storage.models import StreamHeader
from storage.run_folder import ChunkCommit
from storage.states import StreamLedger
from storage.stream_source import LeasedFrame, StreamStatus
from streaming import wire
from streaming.client import Client, Connection
from streaming.payload import split_payload

__all__ = ["ServiceSource"]

log = logging.getLogger("nearline.client")

# Longest single wait; a longer one is a repeated request, so that a vanished service is noticed.
_WAIT_SLICE_S = 10.0
# Who acknowledges by hand is listened to so often.
_BY_HAND_S = 0.1
# Frames leased at a time at most, when they are done quickly.
_MOST_LEASED = 512
# What one answer carries at most: few enough to be passed on from the processor's cache, and many enough
# to keep a wire busy. Where more is waiting, so many answers are on their way at a time.
_MOST_BYTES, _MOST_AHEAD = 8 << 20, 3
# A batch done within this time is small: the next may be twice as many.
_QUICK_S = 0.25
_ACKNOWLEDGE_S = 0.05
_GIVE_BACK_S = 2.0
# What an answer may take beyond the time that was asked for.
_ANSWER_S = 30.0


class ServiceSource:
    """A live or finished stream, through the service that has it."""

    def __init__(self, client: Client, header: StreamHeader) -> None:
        self.header = header
        self._client = client
        self._ref = wire.StreamRef(header.experiment, header.run, header.data_source)
        self._is_header_final = False

    def status(self) -> StreamStatus:
        return self.wait(-1, 0.0)

    def wait(self, above: int, timeout: float | None) -> StreamStatus:
        for slice_s in _slices(timeout):
            request = wire.Wait(id=0, stream=self._ref, above=above, timeout_s=slice_s)
            status = StreamStatus.model_validate(self._client.connection.ask_json(request))
            if status.watermark > above or status.is_terminal:
                break
        return status

    def read(self, start: int, stop: int) -> list[RawFrame]:
        while start < stop:
            reply, blobs = self._client.connection.ask_frames(wire.Read(id=0, stream=self._ref, start=start, stop=stop))
            if reply.infos or reply.next <= start or reply.next >= stop:
                return self._frames(reply, blobs)
            start = reply.next
        return []

    def read_one(self, frame_index: int) -> RawFrame:
        return self.read_parts(frame_index)[0]

    def read_parts(self, frame_index: int) -> list[RawFrame]:
        request = wire.Read(id=0, stream=self._ref, start=frame_index, stop=frame_index + 1, exact=True)
        return self._frames(*self._client.connection.ask_frames(request))

    def infos(self, start: int, stop: int) -> Iterator[FrameInfo]:
        while start < stop:
            request = wire.Read(id=0, stream=self._ref, start=start, stop=stop, rows_only=True)
            reply, _ = self._client.connection.ask(request)
            yield from reply.infos
            if reply.next <= start:
                return
            start = reply.next

    def latest(self, after: int, timeout: float | None, group: str | None = None) -> RawFrame | None:
        for slice_s in _slices(timeout):
            request = wire.Latest(id=0, stream=self._ref, after=after, group=group, timeout_s=slice_s)
            reply, blobs = self._client.connection.ask_frames(request)
            if reply.infos:
                return self._frames(reply, blobs)[0]
            if reply.is_end:
                break
        return None

    def wait_chunk(self, chunk: int, timeout: float | None) -> ChunkCommit | None:
        for slice_s in _slices(timeout):
            request = wire.WaitChunk(id=0, stream=self._ref, chunk=chunk, timeout_s=slice_s)
            reply, _ = self._client.connection.ask(request)
            if reply.commit is not None:
                return ChunkCommit.model_validate_json(reply.commit)
            if reply.is_terminal:
                break
        return None

    def plane(self, name: str) -> np.ndarray | None:
        reply, parts = self._client.connection.ask(wire.GetPlane(id=0, stream=self._ref, name=name))
        if reply.dtype is None:
            return None
        return np.frombuffer(parts[0].buffer, np.dtype(reply.dtype)).reshape(reply.shape)

    def ledger(self) -> StreamLedger:
        content = self._client.connection.ask_json(wire.GetLedger(id=0, stream=self._ref))
        return StreamLedger.model_validate(content)

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
        connection = self._client.new_connection(stop)
        member = _Member(connection, self._ref, group, lease_s, max_deliveries, acknowledges)
        try:
            while leased := member.next(timeout):
                yield from member.work_through(self._with_header(leased))
        except Interrupted:
            return
        finally:
            member.leave()

    def groups(self) -> dict[str, dict[str, Any]]:
        """The consumer groups of the stream: where each is, who has what, dead letters."""
        content: dict[str, dict[str, Any]] = self._client.connection.ask_json(wire.GetGroups(id=0, stream=self._ref))
        return content

    def seek_group(self, group: str, frame_index: int) -> dict[str, Any]:
        """Put a group's cursor on a frame; the group then."""
        request = wire.SeekGroup(id=0, stream=self._ref, group=group, frame_index=frame_index)
        content: dict[str, Any] = self._client.connection.ask_json(request)
        return content

    def settle_dead_letters(
        self, group: str, action: Literal["retry", "drop"], indices: list[int] | None = None
    ) -> list[int]:
        """Deliver dead letters again, or give them up; all, or these. The frames concerned."""
        request = wire.DeadLetters(id=0, stream=self._ref, group=group, action=action, indices=indices)
        return list(self._client.connection.ask_json(request)["indices"])

    def _with_header(self, leased: list[LeasedFrame]) -> list[LeasedFrame]:
        if leased and not self._is_header_final:
            self._take_final_header()
        return leased

    def _frames(self, reply: wire.Frames, blobs: list[Any]) -> list[RawFrame]:
        if reply.infos and not self._is_header_final:
            self._take_final_header()
        return [RawFrame(info, blob) for info, blob in zip(reply.infos, blobs, strict=True)]

    def _take_final_header(self) -> None:
        """Until the first frame the codec is the service's guess: no start message tells it."""
        run = self._client.connection.ask_json(
            wire.OpenRun(id=0, experiment=self.header.experiment, run=self.header.run)
        )
        self.header = StreamHeader.model_validate(run["streams"][self.header.data_source])
        self._is_header_final = True


class _Member:
    """One member of a group: asks for the next frames while it works on those it has.

    Acknowledgements are sent without waiting for an answer, together, at most 50 ms late. Those that somebody gives
    by hand, from any thread, go with the next request, which then waits for a tenth of a second at most.
    """

    def __init__(
        self,
        connection: Connection,
        ref: wire.StreamRef,
        group: str,
        lease_s: float,
        max_deliveries: int | None,
        acknowledges: bool,
    ) -> None:
        self._connection, self._ref, self._group, self._lease_s = connection, ref, group, lease_s
        self._max_deliveries, self._acknowledges = max_deliveries, acknowledges
        self._name = f"{socket.gethostname()[:40]}-{uuid.uuid4().hex[:8]}"
        self._n_frames = 1
        self._is_quick, self._n_ahead = False, 1
        self._slice_s = _WAIT_SLICE_S
        self._ahead: list[int] = []
        self._done: list[tuple[int, int]] = []
        self._acknowledged_at = time.monotonic()
        self._unanswered: list[int] = []
        # Frames given to this member by number of their lease; several rows are parts of one frame.
        self._held: dict[int, LeasedFrame] = {}

    def next(self, timeout: float | None) -> list[LeasedFrame]:
        """The next frames; none at the end of the stream, or at the time-out."""
        self._slice_s = next(self._slices(timeout))
        for slice_s in self._slices(timeout):
            if not self._ahead:
                self._ahead.append(self._ask(slice_s))
            # In the order of the answers, which is that of the frames: of two requests, the later may find them first.
            number = self._connection.wait_any(self._ahead, _WAIT_SLICE_S + _ANSWER_S)
            self._ahead.remove(number)
            reply, parts = self._connection.take(number)
            if reply.infos:
                n_bytes = sum(info.size_bytes for info in reply.infos)
                is_full = n_bytes > _MOST_BYTES // 2 or len(reply.infos) >= _MOST_LEASED
                # All of them within half of the window: a service does not hear who asks on beyond it.
                fitting = wire.WINDOW_BYTES // 2 // max(n_bytes, 1)
                self._n_ahead = max(1, min(_MOST_AHEAD, fitting)) if is_full else 1
                return self._lease(reply, split_payload(reply.infos, parts))
            if reply.is_end:
                break
        return []

    def work_through(self, leased: list[LeasedFrame]) -> Iterator[LeasedFrame]:
        """Give the frames out; each is done when the loop comes back for the next."""
        received = time.monotonic()
        if self._is_quick:
            # The next ones travel while these are worked on.
            while len(self._ahead) < self._n_ahead:
                self._ahead.append(self._ask(self._slice_s))
        for frame in leased:
            frame.is_seen = True
            yield frame
            self._settle(frame)
            if self._connection.stop is not None and self._connection.stop.is_set():
                return
        self._acknowledge()
        # All frames of an answer are leased from the same moment: take no more than are done well within it.
        seconds = time.monotonic() - received
        self._is_quick = seconds < min(self._lease_s / 20, _QUICK_S)
        self._n_frames = min(2 * self._n_frames, _MOST_LEASED) if self._is_quick else max(self._n_frames // 2, 1)

    def leave(self) -> None:
        """Others get at once what this member holds, also what is on its way to it."""
        try:
            self._connection.stop = None
            self._acknowledge(leaves=True)
            for number in self._ahead:
                reply, parts = self._connection.wait(number, _GIVE_BACK_S)
                self._lease(reply, split_payload(reply.infos, parts))
            self._give_back(list(self._held.values()), 0.0)
            for number in self._unanswered:
                self._connection.wait(number, _GIVE_BACK_S)
        except StaleLease as error:
            log.warning("%s", error)
        except NearlineError as error:
            log.warning("could not give back leased frames, their leases will run out: %s", error)
        finally:
            self._connection.close()

    def _lease(self, reply: wire.Frames, blobs: list[Any]) -> list[LeasedFrame]:
        leased: dict[int, LeasedFrame] = {}
        late = set(reply.late)
        for info, blob, lease, delivery in zip(reply.infos, blobs, reply.leases, reply.deliveries, strict=True):
            raw = RawFrame(info, blob)
            if lease in leased:
                leased[lease].more_parts.append(raw)
            else:
                leased[lease] = LeasedFrame(raw, lease, delivery, is_late=lease in late)
        self._held.update(leased)
        return list(leased.values())

    def _ask(self, timeout_s: float) -> int:
        done = self._take_done()
        return self._connection.send(
            wire.NextFrames(
                id=0,
                stream=self._ref,
                group=self._group,
                member=self._name,
                max_frames=self._n_frames,
                max_bytes=_MOST_BYTES,
                lease_s=self._lease_s,
                timeout_s=timeout_s,
                done=done,
                max_deliveries=self._max_deliveries,
            )
        )

    def _settle(self, frame: LeasedFrame) -> None:
        if not self._acknowledges:
            frame.ends_at = time.monotonic() + self._lease_s
        elif frame.retry_after_s is not None:
            self._give_back([frame], frame.retry_after_s)
            return
        else:
            self._done.append((frame.frame.info.frame_index, frame.lease))
        if time.monotonic() - self._acknowledged_at > _ACKNOWLEDGE_S:
            self._acknowledge()

    def _acknowledge(self, *, leaves: bool = False) -> None:
        self._acknowledged_at = time.monotonic()
        self._read_answers()
        done = self._take_done()
        if not done and not leaves:
            return
        request = wire.Acknowledge(id=0, stream=self._ref, group=self._group, leases=done, leaves=leaves)
        self._unanswered.append(self._connection.send(request))

    def _take_done(self) -> list[tuple[int, int]]:
        """Index and lease of what is done since, which is held no longer."""
        if not self._acknowledges:
            self._settle_by_hand()
        done, self._done = self._done, []
        for _, lease in done:
            self._held.pop(lease, None)
        return done

    def _settle_by_hand(self) -> None:
        """Frames that were given out and have got their word since; one that never gets any is not held for ever."""
        now = time.monotonic()
        for lease, frame in [(lease, frame) for lease, frame in self._held.items() if frame.is_seen]:
            if frame.is_done:
                self._done.append((frame.frame.info.frame_index, lease))
            elif frame.retry_after_s is not None:
                self._give_back([frame], frame.retry_after_s)
            elif now > frame.ends_at:
                del self._held[lease]

    def _give_back(self, frames: list[LeasedFrame], delay_s: float) -> None:
        """The frame in hand has been looked at; those behind it have not."""
        for is_seen in (True, False):
            leases = [(f.frame.info.frame_index, f.lease) for f in frames if f.is_seen == is_seen]
            if leases:
                request = wire.Acknowledge(
                    id=0,
                    stream=self._ref,
                    group=self._group,
                    leases=leases,
                    give_back=True,
                    delay_s=delay_s,
                    unseen=not is_seen,
                )
                self._unanswered.append(self._connection.send(request))
        for frame in frames:
            self._held.pop(frame.lease, None)

    def _read_answers(self) -> None:
        """Refused acknowledgements are worth a word: somebody else gets the frame now, nothing is lost."""
        self._connection.pump(0.0)
        for number in [n for n in self._unanswered if self._connection.has_answer(n)]:
            self._unanswered.remove(number)
            try:
                self._connection.take(number)
            except StaleLease as error:
                log.warning("%s", error)

    def _slices(self, timeout: float | None) -> Iterator[float]:
        """Waiting times of successive requests that together last ``timeout`` s (None: for ever)."""
        return _slices(timeout, _WAIT_SLICE_S if self._acknowledges else _BY_HAND_S)


def _slices(timeout: float | None, longest: float = _WAIT_SLICE_S) -> Iterator[float]:
    """Waiting times of successive requests that together last ``timeout`` s (None: for ever)."""
    if timeout is None:
        while True:
            yield longest
    deadline = time.monotonic() + timeout
    yield min(timeout, longest)
    while (left := deadline - time.monotonic()) > 0:
        yield min(left, longest)
