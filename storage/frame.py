"""One frame as it travels: its compressed bytes and the row that describes it.

Slots and MessagePack rather than validated models: this is the hot path.
"""

import json
from typing import Annotated, Any

import blake3
import msgspec
import numpy as np

from storage.codec import Buffer
from storage.errors import BadFrame
from storage.kernels import kernels

__all__ = ["FrameInfo", "RawFrame", "blob_crc32c", "blob_digest", "content_digest", "meta_bytes", "meta_json"]


# What the frame table's columns can hold; a number beyond it would stop a chunk from being sealed.
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_LARGEST_META_BYTES = 4 << 20
_DEEPEST_META = 32
_FLAT = frozenset((str, int, float, bool, type(None)))
_NO_BYTES_DIGEST = blake3.blake3(b"").digest()


class FrameInfo(msgspec.Struct, array_like=True, kw_only=True):
    """The row of one frame in the frame table.

    Detector times are ticks of a clock with ``tick_rate`` Hz; ``utc_ns`` is the best estimate of
    the exposure's start in ns since 1970, ``utc_source`` says where it comes from and
    ``utc_uncertainty_ns`` how far it may be off. ``received_ns`` is the receiver's clock.
    ``producer`` and ``sequence`` name one sending, so that a retry is known as one. ``part`` is
    the detector module, counted from 0, of a frame that comes in parts; ``late`` says that the
    frame came after its chunk was sealed without it.
    """

    frame_index: int
    size_bytes: int = 0
    crc32c: int = 0
    digest: bytes = b""
    received_ns: _Int64 = 0
    start_tick: _Int64 | None = None
    stop_tick: _Int64 | None = None
    tick_rate: _Int64 | None = None
    utc_ns: _Int64 | None = None
    utc_source: str = "receiver"
    utc_uncertainty_ns: _Int64 | None = None
    series_id: _Int64 | None = None
    series_unique_id: str | None = None
    series_frame: _Int64 | None = None
    trigger_index: _Int64 | None = None
    producer: str = ""
    sequence: _Int64 | None = None
    meta: dict[str, Any] = {}
    part: int = 0
    late: bool = False


class RawFrame(msgspec.Struct):
    """A frame's row and its bytes exactly as the detector compressed them.

    ``cost_bytes`` is what it takes in memory, row and metadata included; 0 where nobody counts.
    """

    info: FrameInfo
    blob: Any  # bytes-like
    cost_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.info.size_bytes


def meta_bytes(meta: dict[str, Any]) -> int:
    """Size of a frame's metadata as JSON, which is how it is kept for good.

    Raises
    ------
    BadFrame : not JSON (bytes, dates, circles), nested too deep, or larger than 4 MiB.
    """
    if not meta:
        return 0
    try:
        if not _FLAT.issuperset(map(type, meta.values())):
            _require_json(meta, 0)
        size = len(_plain_json(meta))
    except (TypeError, ValueError) as error:
        raise BadFrame(f"a frame's metadata must be plain JSON: {error}") from None
    if size > _LARGEST_META_BYTES:
        raise BadFrame(f"a frame's metadata of {size} bytes is larger than {_LARGEST_META_BYTES}; send it as a frame")
    return size


def _require_json(item: Any, depth: int) -> None:
    """Containers of containers of plain values, with text for keys; looks at leaves by type alone, for speed."""
    if depth > _DEEPEST_META:
        raise BadFrame(f"a frame's metadata is nested deeper than {_DEEPEST_META} levels; make it flatter")
    if isinstance(item, dict):
        if not all(isinstance(key, str) for key in item):
            raise TypeError("a key is not text")
        item = item.values()
    for value in item:
        if type(value) in _FLAT:
            continue
        if not isinstance(value, dict | list | tuple):
            raise TypeError(f"a value of type {type(value).__name__}")
        _require_json(value, depth + 1)


def blob_crc32c(blob: Buffer) -> int:
    """crc32c (Castagnoli) of the bytes, as Zarr's codec of that name computes it."""
    if not len(blob):
        return 0
    return kernels().crc32c(np.frombuffer(blob, np.uint8))


def blob_digest(blob: Buffer) -> bytes:
    """blake3 of the bytes, 32 bytes long."""
    return blake3.blake3(memoryview(blob)).digest() if len(blob) else _NO_BYTES_DIGEST


def content_digest(info: FrameInfo) -> bytes:
    """blake3 over what the frame is, not how it came: digest of its bytes, index, detector times, metadata.

    Leaves out the receiver's clock and the producer, so a chunk's digest does not depend on the
    order or the way in which its frames arrived.
    """
    facts = [
        info.frame_index, info.part, info.size_bytes, info.start_tick, info.stop_tick, info.tick_rate,
        info.series_unique_id, info.series_frame, info.trigger_index,
    ]  # fmt: skip
    return blake3.blake3(info.digest + _sorted_json(facts) + meta_json(info.meta, is_sorted=True)).digest()


def meta_json(meta: dict[str, Any], *, is_sorted: bool = False) -> bytes:
    """A frame's metadata as JSON text, in the order of its keys or in one that does not depend on it."""
    text = _sorted_json(meta) if is_sorted else _plain_json(meta)
    # The fast encoder writes NaN and infinity as null; Python's writes what Python reads back.
    return text if b"null" not in text else json.dumps(meta, sort_keys=is_sorted, default=str).encode()


_plain_json = msgspec.json.Encoder().encode
_sorted_json = msgspec.json.Encoder(order="deterministic").encode
