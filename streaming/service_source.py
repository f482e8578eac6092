"""A stream served by a running service: `storage.stream_source.StreamSource` over the wire."""

import logging
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from storage.errors import StaleLease
from storage.frame import RawFrame
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


class ServiceSource:
    """A live or finished stream, through the service that has it."""

    def __init__(self, client: Client, header: StreamHeader) -> None:
        self.header = header
        self._client = client
        self._ref = wire.StreamRef(header.experiment, header.run, header.data_source)

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
                return _frames(reply, blobs)
            start = reply.next
        return []

    def read_one(self, frame_index: int) -> RawFrame:
        request = wire.Read(id=0, stream=self._ref, start=frame_index, stop=frame_index + 1, exact=True)
        return _frames(*self._client.connection.ask_frames(request))[0]

    def latest(self, after: int, timeout: float | None) -> RawFrame | None:
        for slice_s in _slices(timeout):
            request = wire.Latest(id=0, stream=self._ref, after=after, timeout_s=slice_s)
            reply, blobs = self._client.connection.ask_frames(request)
            if reply.infos:
                return _frames(reply, blobs)[0]
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

    def follow_group(self, group: str, timeout: float | None) -> Iterator[LeasedFrame]:
        connection = self._client.new_connection()
        try:
            yield from self._follow_group(connection, group, timeout)
        finally:
            connection.close()

    def _follow_group(self, connection: Connection, group: str, timeout: float | None) -> Iterator[LeasedFrame]:
        member = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        while True:
            reply, blobs = self._next(connection, group, member, timeout)
            leased = [
                LeasedFrame(frame, lease, delivery)
                for frame, lease, delivery in zip(_frames(reply, blobs), reply.leases, reply.deliveries, strict=True)
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
                    self._acknowledge(connection, group, held, give_back=True)

    def _next(self, connection: Connection, group: str, member: str, timeout: float | None) -> tuple[Any, list[Any]]:
        for slice_s in _slices(timeout):
            request = wire.NextFrames(id=0, stream=self._ref, group=group, member=member, timeout_s=slice_s)
            reply, blobs = connection.ask_frames(request)
            if reply.infos or reply.is_end:
                break
        return reply, blobs

    def _acknowledge(
        self, connection: Connection, group: str, leases: dict[int, int], *, give_back: bool = False
    ) -> None:
        pairs = list(leases.items())
        request = wire.Acknowledge(id=0, stream=self._ref, group=group, leases=pairs, give_back=give_back)
        try:
            connection.ask(request)
        except StaleLease as error:
            log.warning("%s", error)  # somebody else gets the frame now: nothing is lost


def _frames(reply: wire.Frames, blobs: list[Any]) -> list[RawFrame]:
    return [RawFrame(info, blob) for info, blob in zip(reply.infos, blobs, strict=True)]


def _slices(timeout: float | None) -> Iterator[float]:
    """Waiting times of successive requests that together last ``timeout`` s (None: for ever)."""
    if timeout is None:
        while True:
            yield _WAIT_SLICE_S
    deadline = time.monotonic() + timeout
    yield min(timeout, _WAIT_SLICE_S)
    while (left := deadline - time.monotonic()) > 0:
        yield min(left, _WAIT_SLICE_S)
