"""The journal that becomes the shard.

A Zarr v3 shard with its index at the end is blobs, then index, and readers accept gaps
between the blobs. So a chunk's journal is written as the shard's body from the first
byte: each record is a header and metadata (a gap, to Zarr) followed by the frame's
bytes and their crc32c (an inner chunk, to Zarr). Sealing appends the index and the file *is*
the shard: data is written once.

Record: magic(8) · index(i64) · meta length(u32) · blob length(u64) · blob crc32c(u32) · crc32c of
all before and of the metadata(u32) · metadata (MessagePack `FrameInfo`) · blob · blob crc32c(u32,
little-endian, Zarr's). Shard index: N rows of (offset, length) u64 little-endian, absent =
2⁶⁴−1 twice, then the crc32c of the rows (Zarr v3 spec, sharding codec v1.0).
"""

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import msgspec
import numpy as np

from storage.codec import Buffer
from storage.errors import BadFrame, CorruptFrame, StorageFull
from storage.frame import FrameInfo, RawFrame, blob_crc32c

__all__ = ["CRC_BYTES", "Journal", "Location", "read_located", "scan_journal"]

_MAGIC = b"NLFRAME1"
_HEAD = struct.Struct("<8sqIQI")
_CRC = struct.Struct("<I")
CRC_BYTES = _CRC.size
_ABSENT = np.uint64(2**64 - 1)
# A record claiming more than this was not written by us; bounds memory on a damaged file.
_LARGEST_META_BYTES = 64 << 20
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FrameInfo).decode


@dataclass(frozen=True, slots=True)
class Location:
    """Where a frame's bytes are in a journal or shard: offset and length without the crc."""

    offset: int
    length: int


@dataclass(slots=True)
class Journal:
    """An open chunk: appended to by one writer, read by any thread through `read`.

    Frames are those with ``start <= frame_index < start + size``.
    """

    path: Path
    start: int
    size: int
    infos: dict[int, FrameInfo] = field(default_factory=dict)
    locations: dict[int, Location] = field(default_factory=dict)
    end: int = 0
    synced_to: int = 0
    fd: int = -1

    @classmethod
    def create(cls, path: Path, start: int, size: int) -> "Journal":
        """Begin a new journal file; its folder must exist. An empty one, left by a failed beginning, is used."""
        fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        if os.fstat(fd).st_size:
            os.close(fd)
            raise FileExistsError(f"{path} holds frames already; recover it")
        return cls(path, start, size, fd=fd)

    @classmethod
    def recover(cls, path: Path, start: int, size: int) -> "Journal":
        """Open an existing journal after a crash: keep its whole records, cut off the torn rest."""
        journal = cls(path, start, size, fd=os.open(path, os.O_RDWR))
        journal._load()
        os.ftruncate(journal.fd, journal.end)
        return journal

    @classmethod
    def view(cls, path: Path, start: int, size: int) -> "Journal":
        """Open a journal for reading only, as far as it is whole now; its writer may be alive."""
        journal = cls(path, start, size, fd=os.open(path, os.O_RDONLY))
        journal._load()
        return journal

    def append(self, info: FrameInfo, blob: Buffer) -> None:
        """Write one frame; when this returns, `kill -9` cannot lose it.

        Raises
        ------
        StorageFull : the disk refused; the journal is as it was before.
        """
        meta = _encode(info)
        if len(meta) > _LARGEST_META_BYTES:
            raise BadFrame(f"the row of frame {info.frame_index} takes {len(meta)} bytes; recovery would not read it")
        head = _HEAD.pack(_MAGIC, info.frame_index, len(meta), info.size_bytes, info.crc32c)
        crc = _CRC.pack(google_crc32c.extend(google_crc32c.value(head), meta))
        before = len(head) + len(crc) + len(meta)
        self._write([head, crc, meta, blob, _CRC.pack(info.crc32c)], before + info.size_bytes + CRC_BYTES)
        self.locations[info.frame_index] = Location(self.end + before, info.size_bytes)
        self.infos[info.frame_index] = info
        self.end += before + info.size_bytes + CRC_BYTES

    def read(self, frame_index: int) -> RawFrame:
        """One frame back from the file; KeyError if this journal does not hold it."""
        info = self.infos[frame_index]
        return RawFrame(info, read_located(self.fd, self.locations[frame_index], info.crc32c, frame_index, self.path))

    def sync(self) -> None:
        """Make everything appended so far survive a power loss."""
        end = self.end
        if end > self.synced_to:
            os.fdatasync(self.fd)
            self.synced_to = end

    def write_index(self) -> None:
        """Append the shard index; from here on the file is a complete Zarr shard."""
        rows = np.full((self.size, 2), _ABSENT, "<u8")
        for index, location in self.locations.items():
            rows[index - self.start] = (location.offset, location.length + CRC_BYTES)
        raw = rows.tobytes()
        self._write([raw, _CRC.pack(google_crc32c.value(raw))], len(raw) + CRC_BYTES)
        os.fsync(self.fd)

    def close(self) -> None:
        """Close the file; only where no other thread can be reading. Otherwise the last user closes it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()

    def look_again(self) -> None:
        """Take in what a living writer has appended since (for a `view`)."""
        self._load()

    def _load(self) -> None:
        for info, location in scan_journal(self.fd, self.end):
            self.end = location.offset + location.length + CRC_BYTES
            if self.start <= info.frame_index < self.start + self.size:
                self.locations[info.frame_index] = location
                self.infos[info.frame_index] = info

    def _write(self, parts: list[Buffer], n_bytes: int) -> None:
        """All parts at the journal's end, or StorageFull with the file cut back to where it was."""
        written = 0
        try:
            while written < n_bytes:
                written += os.pwritev(self.fd, _remaining(parts, written), self.end + written)
        except OSError as error:
            os.ftruncate(self.fd, self.end)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFull(
                    error.errno,
                    f"no space left for {self.path.name} in {self.path.parent}; free some disk space, "
                    "the writer goes on by itself",
                ) from error
            raise


def scan_journal(fd: int, at: int = 0) -> Iterator[tuple[FrameInfo, Location]]:
    """Each whole record of a journal (or shard) from offset ``at``, up to the first torn or foreign header."""
    size, fixed = os.fstat(fd).st_size, _HEAD.size + _CRC.size
    while at + fixed <= size:
        head = os.pread(fd, fixed, at)
        magic, _, meta_length, blob_length, blob_crc = _HEAD.unpack_from(head)
        end = at + fixed + meta_length + blob_length + CRC_BYTES
        if magic != _MAGIC or meta_length > _LARGEST_META_BYTES or end > size:
            return
        meta = os.pread(fd, meta_length, at + fixed)
        (crc,) = _CRC.unpack_from(head, _HEAD.size)
        if google_crc32c.extend(google_crc32c.value(head[: _HEAD.size]), meta) != crc:
            return
        location = Location(at + fixed + meta_length, blob_length)
        at = end
        # A record's header can reach the disk before its blob: only the blob's crc tells. Such a
        # frame is lost, those behind it are not.
        if blob_crc32c(os.pread(fd, blob_length, location.offset)) == blob_crc:
            yield _decode(meta), location


def read_located(fd: int, location: Location, crc: int, frame_index: int, path: Path) -> bytes:
    """The bytes at a location, checked against their crc32c.

    Raises
    ------
    CorruptFrame : the checksum disagrees; the message names frame and file.
    """
    blob = os.pread(fd, location.length, location.offset)
    if len(blob) != location.length or blob_crc32c(blob) != crc:
        raise CorruptFrame(
            f"frame {frame_index} in {path} fails its crc32c; the file was damaged on disk, restore it from a copy "
            "or leave the frame out"
        )
    return blob


def _remaining(parts: list[Buffer], written: int) -> list[Buffer]:
    """The parts without their first ``written`` bytes (after a short write)."""
    if not written:
        return parts
    rest: list[Buffer] = []
    for part in parts:
        view = memoryview(part).cast("B")
        if written >= view.nbytes:
            written -= view.nbytes
        else:
            rest.append(view[written:])
            written = 0
    return rest
