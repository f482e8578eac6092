"""One frame as it travels: its compressed bytes and the row that describes it.

Slots and MessagePack rather than validated models: this is the hot path.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import blake3
import msgspec
import numpy as np
import xxhash

from storage.codec import Buffer
from storage.kernels import kernels
from storage.metadata import NO_META, unpack_meta

__all__ = [
    "FrameInfo", "RawFrame", "blob_crc32c", "blob_digest", "chunk_digest", "content_digest", "file_digest",
    "has_digest",
]  # fmt: skip


# What the frame table's columns can hold; a number beyond it would stop a chunk from being sealed.
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
# What a frame without metadata has in digests and tables.
_EMPTY = b"{}"
# Digests of earlier versions are as long.
_BLAKE3_BYTES = 32
_NO_BYTES_DIGEST = xxhash.xxh3_128_digest(b"")


class FrameInfo(msgspec.Struct, array_like=True, kw_only=True):
    """The row of one frame in the frame table.

    Detector times are ticks of a clock with ``tick_rate`` Hz; ``utc_ns`` is the best estimate of
    the exposure's start in ns since 1970, ``utc_source`` says where it comes from and
    ``utc_uncertainty_ns`` how far it may be off. ``received_ns`` is the receiver's clock.
    ``producer`` and ``sequence`` name one sending, so that a retry is known as one. ``part`` is
    the detector module, counted from 0, of a frame that comes in parts; ``late`` says that the
    frame came after its chunk was sealed without it. ``meta_json`` is written by `storage.metadata.pack_meta`.
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
    meta_json: bytes = NO_META
    part: int = 0
    late: bool = False

    @property
    def meta(self) -> dict[str, Any]:
        """The metadata, made anew each time."""
        return unpack_meta(self.meta_json)


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


def blob_crc32c(blob: Buffer) -> int:
    """crc32c (Castagnoli) of the bytes, as Zarr's codec of that name computes it."""
    if not len(blob):
        return 0
    return kernels().crc32c(np.frombuffer(blob, np.uint8))


def blob_digest(blob: Buffer) -> bytes:
    """XXH3 of the bytes, 128 bits: as fast as they can be read. Two frames do not share it, but a forger could try."""
    return xxhash.xxh3_128_digest(blob) if len(blob) else _NO_BYTES_DIGEST


def has_digest(blob: Buffer, digest: bytes) -> bool:
    """Whether a digest was made of these bytes; one of 32 bytes, from an earlier version, is blake3."""
    return digest == (blake3.blake3(memoryview(blob)).digest() if len(digest) == _BLAKE3_BYTES else blob_digest(blob))


def file_digest(content: bytes) -> str:
    """blake3 of a small file, hex."""
    return blake3.blake3(content).hexdigest()


def chunk_digest(infos: Mapping[int, FrameInfo]) -> str:
    """blake3 over the frames of a chunk, given by slot, in index order; hex. See `content_digest`."""
    digest = blake3.blake3()
    for slot in sorted(infos):
        digest.update(content_digest(infos[slot]))
    return digest.hexdigest()


def content_digest(info: FrameInfo) -> bytes:
    """blake3 over what the frame is, not how it came: digest of its bytes, index, detector times, metadata.

    Leaves out the receiver's clock and the producer, so a chunk's digest does not depend on the
    order or the way in which its frames arrived.
    """
    facts = [
        info.frame_index, info.part, info.size_bytes, info.start_tick, info.stop_tick, info.tick_rate,
        info.series_unique_id, info.series_frame, info.trigger_index,
    ]  # fmt: skip
    meta = _earlier_text(info) if len(info.digest) == _BLAKE3_BYTES else info.meta_json or _EMPTY
    return blake3.blake3(info.digest + _json(facts) + meta).digest()


def _earlier_text(info: FrameInfo) -> bytes:
    """The metadata as they went into digests when frames had blake3 digests; their tables keep another order."""
    text = _sorted_json(info.meta)
    return json.dumps(info.meta, sort_keys=True, default=str).encode() if b"null" in text else text


_json = msgspec.json.Encoder().encode
_sorted_json = msgspec.json.Encoder(order="deterministic").encode
