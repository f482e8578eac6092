"""A chunk as a step sees it: its frames, decoded one by one, with header, geometry and mask."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from storage.codec import decode_into
from storage.errors import ShapeMismatch
from storage.frame import RawFrame
from storage.geometry import Geometry
from storage.models import DetectorHeader, StreamHeader
from tasks.bin_frames import Binner, binned_header

__all__ = ["ChunkFrames", "trustworthy", "usable_mask"]

T = TypeVar("T")
# NXmx: analysis skips a pixel when any of these bits is set; bit 31 (virtual pixel) is no reason.
_BAD_BITS = 0xFFFF
_of_thread = threading.local()


@dataclass(frozen=True)
class ChunkFrames:
    """Frames of one chunk for a step, ours or a user's.

    frames : what was received, in index order; missing frames are simply not there. Of a detector in parts the first
        part of each frame that came, and the others in ``more_parts``.
    header : of the stream.
    detector_mask : (slow, fast) uint8 of frames as the detector took them, nonzero = do not use.
    digest : of the chunk, over its bytes and metadata.
    more_parts : of a detector in parts, for each frame the parts that came beside the first. Steps see a frame's parts
        one below the other in one array, pixels of a part that never came at the dtype's maximum.
    binning : pixels summed per side before a step sees a frame; 1 for none.
    columns : per-frame columns of the steps before, each (n,).
    """

    frames: list[RawFrame]
    header: StreamHeader
    detector_mask: np.ndarray
    digest: str
    binning: int = 1
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    more_parts: Sequence[Sequence[RawFrame]] = ()
    n_threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    @property
    def frame_index(self) -> np.ndarray:
        """(n,) int64, rising."""
        return np.array([f.info.frame_index for f in self.frames], np.int64)

    @property
    def meta(self) -> list[dict[str, Any]]:
        """Metadata of each frame."""
        return [f.info.meta for f in self.frames]

    @cached_property
    def mask(self) -> np.ndarray:
        """(slow, fast), nonzero where a pixel of the frames as steps see them must not be used."""
        return self.detector_mask if self.binning == 1 else self._binner.mask

    @property
    def detector(self) -> DetectorHeader:
        """The detector as the steps see it, pixel sizes and beam centre adapted to the binning."""
        detector = self.header.detector or DetectorHeader()
        return binned_header(detector, self.binning) if self.binning > 1 else detector

    @property
    def geometry(self) -> Geometry:
        """Where the pixels are; BadFrame if the detector never told distance or wavelength."""
        return Geometry.from_header(self.detector, (self.mask.shape[0], self.mask.shape[1]))

    @property
    def detector_geometry(self) -> Geometry:
        """Where the detector's own pixels are; positions in result tables are in these."""
        shape = self.detector_mask.shape
        return Geometry.from_header(self.header.detector or DetectorHeader(), (shape[0], shape[1]))

    @property
    def saturation_value(self) -> int | None:
        """Largest trustworthy count of an unbinned pixel."""
        return trustworthy(self.detector.saturation_value, self.header)

    def unbinned(self, position: int) -> np.ndarray:
        """The frame at a position in the chunk as the detector took it, (slow, fast)."""
        return self._decoded(position, np.empty(self.header.image_shape, self.header.dtype))

    def data(self, position: int) -> np.ndarray:
        """The frame at a position in the chunk as steps see it; unusable pixels hold the dtype's maximum."""
        return self.unbinned(position) if self.binning == 1 else self.borrowed(position).copy()

    def borrowed(self, position: int) -> np.ndarray:
        """As `data`, to read only, in memory that this thread's next call fills anew.

        Fresh pages for each large frame cost more than decoding into old ones; and steps that look at one frame in turn
        have it decoded once.
        """
        frame = self.borrowed_unbinned(position)
        return frame if self.binning == 1 else self._binner(frame)[0]

    def borrowed_unbinned(self, position: int) -> np.ndarray:
        """As `unbinned`, on the terms of `borrowed`."""
        raw, header = self.frames[position], self.header
        if getattr(_of_thread, "decoded", None) is not raw:
            _of_thread.decoded = None  # in case it does not decode
            self._decoded(position, _memory_of_thread(header.image_shape, header.dtype))
            _of_thread.decoded = raw
        return _memory_of_thread(header.image_shape, header.dtype)

    def _decoded(self, position: int, frame: np.ndarray) -> np.ndarray:
        """Fill a frame, (slow, fast), with the parts that came."""
        header, parts = self.header, [self.frames[position]]
        if header.parts == 1:
            decode_into(parts[0].blob, frame, header.codec)
            return frame
        parts += self.more_parts[position]
        if len(parts) < header.parts:
            frame.fill(header.fill_value)
        by_part = frame.reshape(header.array_shape)
        for raw in parts:
            decode_into(raw.blob, by_part[raw.info.part, ...], header.codec)
        return frame

    @cached_property
    def _binner(self) -> Binner:
        return Binner(self.detector_mask, self.binning, self.saturation_value)

    def map(self, function: Callable[[int], T]) -> list[T]:
        """``function(position)`` for each frame, spread over threads; results in index order."""
        if self.n_threads <= 1 or len(self) <= 1:
            return [function(position) for position in range(len(self))]
        with ThreadPoolExecutor(self.n_threads) as pool:
            return list(pool.map(function, range(len(self))))


def _memory_of_thread(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    memory = getattr(_of_thread, "memory", None)
    if memory is None or memory.shape != tuple(shape) or memory.dtype != np.dtype(dtype):
        memory = _of_thread.memory = np.empty(shape, dtype)
    return memory


def trustworthy(saturation_value: int | None, header: StreamHeader) -> int | None:
    """The largest trustworthy count; of frames in parts below what a part that never came is filled with."""
    is_counted = header.dtype and np.dtype(header.dtype).kind in "ui"
    if saturation_value is None and header.parts > 1 and is_counted:
        return int(header.fill_value) - 1
    return saturation_value


def usable_mask(pixel_mask: np.ndarray | None, shape: tuple[int, ...], user_mask: np.ndarray | None) -> np.ndarray:
    """The effective mask, (slow, fast) uint8, nonzero = do not use: the detector's bad pixels and the user's."""
    mask = np.zeros(shape, np.uint8)
    if pixel_mask is not None:
        mask |= (pixel_mask & _BAD_BITS) != 0
    if user_mask is not None:
        if user_mask.shape != tuple(shape):
            raise ShapeMismatch(
                f"the recipe's mask has shape {user_mask.shape}, the frames {tuple(shape)}; make one for this detector"
            )
        mask |= user_mask != 0
    mask.flags.writeable = False  # shared by all steps, and part of their identity
    return mask
