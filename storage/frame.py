"""One frame as it travels: its compressed bytes and the row that describes it.

Slots and MessagePack rather than validated models: this is the hot path.
"""

import json
from typing import Any

import blake3
import google_crc32c
import msgspec
import numpy as np

from storage.codec import Buffer

__all__ = ["FrameInfo", "RawFrame", "blob_crc32c", "blob_digest", "content_digest"]


class FrameInfo(msgspec.Struct, array_like=True, kw_only=True):
    """The row of one frame in the frame table.

    Detector times are ticks of a clock with ``tick_rate`` Hz; ``utc_ns`` is the best estimate of
    the exposure's start in ns since 1970, ``utc_source`` says where it comes from and
    ``utc_uncertainty_ns`` how far it may be off. ``received_ns`` is the receiver's clock.
    """

    frame_index: int
    size_bytes: int = 0
    crc32c: int = 0
    digest: bytes = b""
    received_ns: int = 0
    start_tick: int | None = None
    stop_tick: int | None = None
    tick_rate: int | None = None
    utc_ns: int | None = None
    utc_source: str = "receiver"
    utc_uncertainty_ns: int | None = None
    series_id: int | None = None
    series_unique_id: str | None = None
    series_frame: int | None = None
    trigger_index: int | None = None
    producer: str = ""
    sequence: int | None = None
    meta: dict[str, Any] = {}


class RawFrame(msgspec.Struct):
    """A frame's row and its bytes exactly as the detector compressed them."""

    info: FrameInfo
    blob: Any  # bytes-like

    @property
    def nbytes(self) -> int:
        return self.info.size_bytes


def blob_crc32c(blob: Buffer) -> int:
    """crc32c (Castagnoli) of the bytes, as Zarr's codec of that name computes it."""
    view = np.frombuffer(blob, np.uint8)
    return google_crc32c.value(view) if view.size else 0


def blob_digest(blob: Buffer) -> bytes:
    """blake3 of the bytes, 32 bytes long."""
    return blake3.blake3(memoryview(blob)).digest()


def content_digest(info: FrameInfo) -> bytes:
    """blake3 over what the frame is, not how it came: digest of its bytes, index, detector times, metadata.

    Leaves out the receiver's clock and the producer, so a chunk's digest does not depend on the
    order or the way in which its frames arrived.
    """
    facts = [
        info.frame_index, info.size_bytes, info.start_tick, info.stop_tick, info.tick_rate,
        info.series_unique_id, info.series_frame, info.trigger_index,
        json.dumps(info.meta, sort_keys=True, default=str),
    ]  # fmt: skip
    return blake3.blake3(info.digest + json.dumps(facts).encode()).digest()
