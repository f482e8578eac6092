"""A stream, or a slice of it, as a read-only Zarr array: nothing is read until asked.

The array is virtual: each of its chunks is one frame, and its bytes are fetched through the
stream, wherever that comes from. So it works the same on a live run, through a service and
offline; `dask.array.from_zarr(view)` parallelises it. Frames that were never received read as
the fill value, the dtype's maximum.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

import storage.zarr_codec  # noqa: F401  (registers the codecs that the metadata names)
from storage.models import StreamHeader
from storage.zarr_layout import array_metadata, frame_codecs, inner_shape

__all__ = ["open_view"]

BlobReader = Callable[[int, int], bytes | None]


def open_view(header: StreamHeader, start: int, stop: int, read_blob: BlobReader) -> zarr.Array:
    """Frames ``start <= frame_index < stop`` as an array of shape (stop - start, …).

    Parameters
    ----------
    read_blob : gives stored bytes by frame_index and part; None where there is no such frame or part.
    """
    return zarr.open_array(store=_FrameStore(header, start, stop, read_blob), mode="r", zarr_format=3)


class _FrameStore(Store):
    """Keys ``zarr.json`` and ``c/<frame>/0/0`` (or ``c/<frame>/<part>/0/0``): a frame's own compressed bytes."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True
    supports_partial_writes = False

    def __init__(self, header: StreamHeader, start: int, stop: int, read_blob: BlobReader) -> None:
        super().__init__(read_only=True)
        self._header, self._start, self._stop, self._read_blob = header, start, stop, read_blob
        self._metadata = json.dumps(_unsharded(header, stop - start)).encode()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        content = self._metadata if key == "zarr.json" else await asyncio.to_thread(self._frame, key)
        return None if content is None else prototype.buffer.from_bytes(_cut(content, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key == "zarr.json" or self._place(key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        raise PermissionError("frames are written by the service; this view is read-only")

    async def delete(self, key: str) -> None:
        raise PermissionError("frames are immutable; this view is read-only")

    async def list(self) -> AsyncIterator[str]:
        yield "zarr.json"
        tail, several = "/0" * len(self._header.shape), self._header.parts > 1
        for frame in range(self._stop - self._start):
            for part in range(self._header.parts):
                yield f"c/{frame}{f'/{part}' if several else ''}{tail}"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        seen = set()
        async for key in self.list_prefix(prefix):
            name = key[len(prefix) :].lstrip("/").split("/", 1)[0]
            if name not in seen:
                seen.add(name)
                yield name

    def _place(self, key: str) -> tuple[int, int] | None:
        """Frame index and part that a key stands for."""
        names, n_leading = key.split("/"), 1 + (self._header.parts > 1)
        if len(names) != 1 + n_leading + len(self._header.shape) or names[0] != "c":
            return None
        if not all(name.isdecimal() for name in names[1 : 1 + n_leading]):
            return None
        return self._start + int(names[1]), int(names[2]) if n_leading > 1 else 0

    def _frame(self, key: str) -> bytes | None:
        place = self._place(key)
        return None if place is None or place[0] >= self._stop else self._read_blob(*place)


def _unsharded(header: StreamHeader, n_frames: int) -> dict[str, Any]:
    """Metadata for chunks of one frame; the checksum was verified by the reader and is left out."""
    metadata: dict[str, Any] = array_metadata(header, n_frames)
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = inner_shape(header)
    metadata["codecs"] = frame_codecs(header)[:-1]
    return metadata


def _cut(content: bytes, byte_range: ByteRequest | None) -> bytes:
    if isinstance(byte_range, RangeByteRequest):
        return content[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return content[byte_range.offset :]
    if isinstance(byte_range, SuffixByteRequest):
        return content[-byte_range.suffix :]
    return content
