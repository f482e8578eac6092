"""The memory between detector and disk: bounded in bytes, shared by all streams.

A frame counts from the moment it is received (`reserve`) until it is evicted. Only frames that
are journaled, or of a stream that is in memory only, can be evicted, oldest first, and only when
room is needed. A full buffer makes `reserve` wait: producers are pushed back, and of a detector
that cannot wait we stop reading.
"""

import threading
from collections import deque
from collections.abc import Hashable
from typing import Protocol

from storage.frame import RawFrame

__all__ = ["FrameBuffer", "FrameOwner"]


class FrameOwner(Protocol):
    """Whoever must know what becomes of frames that are nowhere else; told under the buffer's lock."""

    def kept(self, frames: list[RawFrame]) -> None: ...
    def evicted(self, frame: RawFrame) -> None: ...


class FrameBuffer:
    """Frames by stream, index and part under one byte budget; safe from any thread."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._frames: dict[Hashable, dict[tuple[int, int], RawFrame]] = {}
        self._evictable: deque[tuple[Hashable, tuple[int, int]]] = deque()
        self._owners: dict[Hashable, FrameOwner] = {}
        self._used = 0
        self._room = threading.Condition()

    @property
    def used_bytes(self) -> int:
        return self._used

    def reserve(self, n_bytes: int, timeout: float) -> bool:
        """Take room for a frame about to be queued, evicting stored ones; False at the time-out.

        A single frame larger than the whole budget is let in when nothing else is held, so that
        it cannot block for ever.
        """
        with self._room:
            return self._room.wait_for(lambda: self._make_room(n_bytes), timeout)

    def release(self, n_bytes: int) -> None:
        """Give back the room of a frame that is not kept (a duplicate, a rejected one)."""
        with self._room:
            self._used -= n_bytes
            self._room.notify_all()

    def keep_stored(self, stream: Hashable, frames: list[RawFrame]) -> None:
        """Hold journaled frames, for whose ``cost_bytes`` room was reserved, until that room is needed."""
        with self._room:
            self._keep(stream, frames)

    def keep_only_copy(self, stream: Hashable, frames: list[RawFrame], owner: FrameOwner) -> None:
        """Hold frames that are not written anywhere, until their room is needed; their owner is told of both."""
        with self._room:
            self._owners[stream] = owner
            self._keep(stream, frames)
            owner.kept(frames)

    def get(self, stream: Hashable, frame_index: int, n_parts: int = 1) -> list[RawFrame] | None:
        """The parts of a frame, if all of it is still in memory."""
        held = self._frames.get(stream, {})
        if n_parts == 1:
            frame = held.get((frame_index, 0))
            return None if frame is None else [frame]
        parts = [held.get((frame_index, part)) for part in range(n_parts)]
        return None if None in parts else parts  # type: ignore[return-value]

    def get_parts(self, stream: Hashable, frame_index: int, n_parts: int) -> list[RawFrame]:
        """Those parts of a frame that are in memory, at a moment when none is being evicted."""
        with self._room:
            held = self._frames.get(stream, {})
            return [held[frame_index, part] for part in range(n_parts) if (frame_index, part) in held]

    def _keep(self, stream: Hashable, frames: list[RawFrame]) -> None:
        held = self._frames.setdefault(stream, {})
        for frame in frames:
            slot = (frame.info.frame_index, frame.info.part)
            held[slot] = frame
            self._evictable.append((stream, slot))
        self._room.notify_all()

    def _make_room(self, n_bytes: int) -> bool:
        while self._used and self._used + n_bytes > self.budget_bytes and self._evictable:
            stream, slot = self._evictable.popleft()
            frames = self._frames[stream]
            frame = frames.pop(slot)
            self._used -= frame.cost_bytes
            owner = self._owners.get(stream)
            if owner is not None:
                owner.evicted(frame)
            if not frames:
                del self._frames[stream]
                self._owners.pop(stream, None)
        if self._used and self._used + n_bytes > self.budget_bytes:
            return False
        self._used += n_bytes
        return True
