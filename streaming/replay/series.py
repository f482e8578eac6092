"""A series of recorded frames, whatever file they come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from storage.codec import encode
from storage.models import DetectorHeader

__all__ = ["Codec", "ReplayFrame", "ReplaySeries", "mark_masked"]

Codec = Literal["bslz4", "lz4"]


@dataclass(frozen=True, slots=True)
class ReplayFrame:
    """One recorded frame.

    data : the compressed bytes as recorded, or (slow, fast) pixels where they had to be decoded.
    user_data : where it came from; becomes the image message's user_data.
    """

    index: int
    data: bytes | np.ndarray
    user_data: dict[str, Any]

    @property
    def blob(self) -> bytes:
        """The frame as it is sent."""
        return encode(self.data) if isinstance(self.data, np.ndarray) else self.data


@dataclass
class ReplaySeries:
    """Recorded frames with what a start message needs; iterate it for the frames in order.

    shape : (slow, fast), px. dtype : "uint8", "uint16" or "uint32", its maximum marks masked pixels.
    pixel_mask : (slow, fast), uint32, NXmx bits; None where the files have none.
    n_images : frames of the series, those never written included; these are not yielded.
    codec : of the blobs. source : what the start message says of the origin.
    """

    header: DetectorHeader
    shape: tuple[int, int]
    dtype: str
    pixel_mask: np.ndarray | None
    n_images: int
    codec: Codec
    source: dict[str, Any]
    read: Callable[[int], ReplayFrame | None] = field(repr=False)
    """Frame by index; None when the file has a place for it but it was never written."""
    close: Callable[[], None] = field(default=lambda: None, repr=False)

    def __len__(self) -> int:
        return self.n_images

    def __iter__(self) -> Iterator[ReplayFrame]:
        return (frame for frame in map(self.read, range(self.n_images)) if frame is not None)

    def __enter__(self) -> "ReplaySeries":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mark_masked(counts: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Unsigned counts with every negative marker as the dtype's maximum."""
    if counts.dtype.kind == "u":
        return counts.astype(dtype, copy=False)
    marked = counts.astype(dtype)
    marked[counts < 0] = np.iinfo(dtype).max
    return marked
