"""A stream served by a running service: `storage.stream_source.StreamSource` over the wire."""

import logging
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from storage.errors import NearlineError, StaleLease
from storage.frame import FrameInfo, RawFrame
from storage.models import StreamHeader
from storage.run_folder import ChunkCommit
from storage.states import StreamLedger
from storage.stream_source import LeasedFrame, StreamStatus
from streaming import wire
from streaming.client import Client, Connection

__all__ = ["ServiceSource"]

log = logging.getLogger("nearline.client")

# Longest single wait; a longer one is a repeated request, so that a vanished service is noticed.
_WAIT_SLICE_S = 10.0
# Frames leased at a time at most, when they are done quickly.
_MOST_LEASED = 16
_GIVE_BACK_S = 2.0


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
        request = wire.Read(id=0, stream=self._ref, start=frame_index, stop=frame_index + 1, exact=True)
        return self._frames(*self._client.connection.ask_frames(request))[0]

    def read_parts(self, frame_index: int) -> list[RawFrame]:
        request = wire.Read(id=0, stream=self._ref, start=frame_index, stop=frame_index + 1, exact=True)
        return self._frames(*self._client.connection.ask_frames(request))

    def infos(self, start: int, stop: int) -> Iterator[FrameInfo]:
        while frames := self.read(start, stop):
            yield from (frame.info for frame in frames)
            start = frames[-1].info.frame_index + 1

    def latest(self, after: int, timeout: float | None) -> RawFrame | None:
        for slice_s in _slices(timeout):
            request = wire.Latest(id=0, stream=self._ref, after=after, timeout_s=slice_s)
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

    def follow_group(self, group: str, timeout: float | None, lease_s: float = 60.0) -> Iterator[LeasedFrame]:
        connection = self._client.new_connection()
        try:
            yield from self._follow_group(connection, group, timeout, lease_s)
        finally:
            connection.close()

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

    def _follow_group(
        self, connection: Connection, group: str, timeout: float | None, lease_s: float
    ) -> Iterator[LeasedFrame]:
        member = f"{socket.gethostname()[:40]}-{uuid.uuid4().hex[:8]}"
        n_frames = 1
        while True:
            reply, blobs = self._next(connection, group, member, timeout, n_frames, lease_s)
            received = time.monotonic()
            leased = [
                LeasedFrame(frame, lease, delivery)
                for frame, lease, delivery in zip(
                    self._frames(reply, blobs), reply.leases, reply.deliveries, strict=True
                )
            ]
            if not leased:
                return
            held = {frame.frame.info.frame_index: frame.lease for frame in leased}
            try:
                for frame in leased:
                    yield frame
                    # Only now has the loop come back: the frame is done.
                    index = frame.frame.info.frame_index
                    self._acknowledge(connection, group, {index: held[index]})
                    del held[index]
            finally:
                # The loop was left: others get at once what this member holds.
                if held:
                    self._give_back(connection, group, held)
            # All frames of an answer are leased from the same moment: take no more than are done well within it.
            is_quick = time.monotonic() - received < lease_s / 20
            n_frames = min(2 * n_frames, _MOST_LEASED) if is_quick else max(n_frames // 2, 1)

    def _next(
        self, connection: Connection, group: str, member: str, timeout: float | None, n_frames: int, lease_s: float
    ) -> tuple[Any, list[Any]]:
        for slice_s in _slices(timeout):
            request = wire.NextFrames(
                id=0,
                stream=self._ref,
                group=group,
                member=member,
                max_frames=n_frames,
                lease_s=lease_s,
                timeout_s=slice_s,
            )
            reply, blobs = connection.ask_frames(request)
            if reply.infos or reply.is_end:
                break
        return reply, blobs

    def _acknowledge(self, connection: Connection, group: str, leases: dict[int, int]) -> None:
        request = wire.Acknowledge(id=0, stream=self._ref, group=group, leases=list(leases.items()))
        try:
            connection.ask(request)
        except StaleLease as error:
            log.warning("%s", error)  # somebody else gets the frame now: nothing is lost

    def _give_back(self, connection: Connection, group: str, leases: dict[int, int]) -> None:
        request = wire.Acknowledge(id=0, stream=self._ref, group=group, leases=list(leases.items()), give_back=True)
        try:
            connection.ask(request, timeout=_GIVE_BACK_S)
        except NearlineError as error:
            log.warning("could not give back leased frames, their leases will run out: %s", error)


def _slices(timeout: float | None) -> Iterator[float]:
    """Waiting times of successive requests that together last ``timeout`` s (None: for ever)."""
    if timeout is None:
        while True:
            yield _WAIT_SLICE_S
    deadline = time.monotonic() + timeout
    yield min(timeout, _WAIT_SLICE_S)
    while (left := deadline - time.monotonic()) > 0:
        yield min(left, _WAIT_SLICE_S)
