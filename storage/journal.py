"""The journal that becomes the shard.

A Zarr v3 shard with its index at the end is blobs, then index, and readers accept gaps
between the blobs. So a chunk's journal is written as the shard's body from the first
byte: each record is a header and metadata (a gap, to Zarr) followed by the frame's
bytes and their crc32c (an inner chunk, to Zarr). Sealing appends the index and the file *is*
the shard: data is written once.

Record: magic(8) · kind(u8) · index(i64) · meta length(u32) · blob length(u64) · blob crc32c(u32) ·
crc32c of all before and of the metadata(u32) · metadata (MessagePack) · blob · blob crc32c(u32,
little-endian, Zarr's). Kind 0 is a frame, its metadata a `FrameInfo`; kind 1 an `Account` of frames
that are not there; other kinds are skipped. Shard index: a row of (offset, length) u64
little-endian for each part of each frame, absent = 2⁶⁴−1 twice, then the crc32c of the rows
(Zarr v3 spec, sharding codec v1.0).
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import msgspec
import numpy as np

from storage.codec import Buffer
from storage.errors import BadFrame, CorruptFrame, StorageFull
from storage.frame import FrameInfo, RawFrame, blob_crc32c
from storage.metadata import pack_meta

__all__ = [
    "CRC_BYTES", "MAGIC", "Account", "Batch", "Journal", "Location", "read_located", "scan_journal", "shard_bytes",
]  # fmt: skip

MAGIC = b"NLJOURN3"
# Records of version 2 have their metadata as an object; they are read, not written.
_MAGIC_2 = b"NLJOURN2"
_FRAME, _ACCOUNT = 0, 1
_HEAD = struct.Struct("<8sBqIQI")
_CRC = struct.Struct("<I")
CRC_BYTES = _CRC.size
_ABSENT = np.uint64(2**64 - 1)
# A record claiming more than this was not written by us; bounds memory on a damaged file.
_LARGEST_META_BYTES = 64 << 20
# Bytes up to here are cheaper copied into one piece than handed to the kernel one by one.
_JOINED_BYTES = 32 << 10
# Pieces that one `pwritev` takes (IOV_MAX of Linux), and bytes: more at a time fills the page cache by larger folios,
# which have to be found first. Linux 6.18: 0.55 ms for a frame of 1.2 MB up to here, 1.0 in calls of 10 MB, 2.7 of 240.
_MOST_PIECES, _MOST_BYTES = 1024, 2 << 20


class Account(msgspec.Struct, array_like=True, frozen=True):
    """Frames that were pending and are given up: their ranges (start, stop), rising, with state and cause."""

    ranges: list[tuple[int, int]]
    state: str
    cause: str


class Location(msgspec.Struct, frozen=True, gc=False):
    """Where a frame's bytes are in a journal or shard: offset and length without the crc."""

    offset: int
    length: int


_encode = msgspec.msgpack.Encoder().encode
_decode_info = msgspec.msgpack.Decoder(FrameInfo).decode
_META_AT = FrameInfo.__struct_fields__.index("meta_json")
_decode_account = msgspec.msgpack.Decoder(Account).decode


@dataclass(slots=True)
class Batch:
    """Frames written behind a journal's end; `Journal.keep` makes them part of it."""

    end: int
    infos: dict[int, FrameInfo]
    locations: dict[int, Location]


@dataclass(slots=True)
class Journal:
    """An open chunk: appended to by one writer, read by any thread through `read`.

    Frames are those with ``start <= frame_index < start + size``. Rows and locations are kept by
    *slot*, ``frame_index * parts + part``: the frame_index itself where frames come in one part.
    """

    path: Path
    start: int
    size: int
    parts: int = 1
    infos: dict[int, FrameInfo] = field(default_factory=dict)
    locations: dict[int, Location] = field(default_factory=dict)
    accounts: list[Account] = field(default_factory=list)
    end: int = 0
    synced_to: int = 0
    fd: int = -1

    @classmethod
    def create(cls, path: Path, start: int, size: int, parts: int = 1) -> "Journal":
        """Begin a new journal file; its folder must exist. An empty one, left by a failed beginning, is used."""
        fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        if os.fstat(fd).st_size:
            os.close(fd)
            raise FileExistsError(f"{path} holds frames already; recover it")
        return cls(path, start, size, parts, fd=fd)

    @classmethod
    def recover(cls, path: Path, start: int, size: int, parts: int = 1) -> "Journal":
        """Open an existing journal after a crash: keep its whole records, cut off the torn rest."""
        journal = cls(path, start, size, parts, fd=os.open(path, os.O_RDWR))
        journal._load(checks_blobs=True)
        journal.cut()
        journal._mend()
        return journal

    @classmethod
    def view(cls, path: Path, start: int, size: int, parts: int = 1, *, checks_blobs: bool = True) -> "Journal":
        """Open a journal for reading only, as far as it is whole now; its writer may be alive.

        What a living writer has written is whole: a reader that knows of one need not read all the blobs.
        """
        return cls.of_file(path, os.open(path, os.O_RDONLY), start, size, parts, checks_blobs=checks_blobs)

    @classmethod
    def of_file(
        cls, path: Path, fd: int, start: int, size: int, parts: int = 1, *, checks_blobs: bool = True
    ) -> "Journal":
        """A journal for reading only in a file that is open already; ``fd`` is the journal's from here on."""
        journal = cls(path, start, size, parts, fd=fd)
        journal._load(checks_blobs=checks_blobs)
        return journal

    def append(self, info: FrameInfo, blob: Buffer) -> None:
        """Write one frame; when this returns, `kill -9` cannot lose it.

        Raises
        ------
        StorageFull : the disk refused; the journal is as it was before.
        """
        self.keep(self.write([(info, blob)]))

    def write(self, frames: Sequence[tuple[FrameInfo, Buffer]]) -> Batch:
        """Put frames behind the end, in one write where the kernel takes them; `keep` or `cut` must follow.

        Raises
        ------
        StorageFull : the disk refused; the journal is as it was before.
        """
        batch = Batch(self.end, {}, {})
        pieces: list[Buffer] = []
        small: list[Buffer] = []
        parts, at = self.parts, self.end
        for info, blob in frames:
            meta, size, crc = _encode(info), info.size_bytes, info.crc32c
            if len(meta) > _LARGEST_META_BYTES:
                raise BadFrame(
                    f"the row of frame {info.frame_index} takes {len(meta)} bytes; recovery would not read it"
                )
            head = _HEAD.pack(MAGIC, _FRAME, info.frame_index, len(meta), size, crc)
            small += (head, _CRC.pack(google_crc32c.extend(google_crc32c.value(head), meta)), meta)
            if size > _JOINED_BYTES:
                pieces += (b"".join(small), blob)
                small = []
            elif size:
                small.append(blob)
            small.append(_CRC.pack(crc))
            at += _FIXED_BYTES + len(meta)
            slot = info.frame_index * parts + info.part
            batch.infos[slot], batch.locations[slot] = info, Location(at, size)
            at += size + CRC_BYTES
        pieces.append(b"".join(small))
        self._write(pieces)
        batch.end = at
        return batch

    def keep(self, batch: Batch) -> None:
        """Make what was written last part of the journal."""
        # Locations first: a reader that finds the row finds the bytes.
        self.locations.update(batch.locations)
        self.infos.update(batch.infos)
        self.end = batch.end

    def cut(self) -> None:
        """Take back what is behind the end: a torn record, or frames that were written and not kept."""
        os.ftruncate(self.fd, self.end)

    def append_account(self, account: Account) -> None:
        """Write down why frames are not there.

        Raises
        ------
        StorageFull : the disk refused; the journal is as it was before.
        """
        meta = _encode(account)
        head = _HEAD.pack(MAGIC, _ACCOUNT, 0, len(meta), 0, 0)
        record = head + _CRC.pack(google_crc32c.extend(google_crc32c.value(head), meta)) + meta + _CRC.pack(0)
        self._write([record])
        self.accounts.append(account)
        self.end += len(record)

    def read(self, slot: int) -> RawFrame:
        """One frame, or part of one, back from the file; KeyError if this journal does not hold it."""
        info = self.infos[slot]
        return RawFrame(info, read_located(self.fd, self.locations[slot], info.crc32c, info.frame_index, self.path))

    def sync(self) -> None:
        """Make everything appended so far survive a power loss."""
        end = self.end
        if end > self.synced_to:
            os.fdatasync(self.fd)
            self.synced_to = end

    def write_index(self) -> None:
        """Put the shard index behind the end and sync: now the file is a complete Zarr shard, and still a journal."""
        rows = np.full((self.size * self.parts, 2), _ABSENT, "<u8")
        if self.locations:
            slots = np.fromiter(self.locations, np.int64, len(self.locations)) - self.start * self.parts
            rows[slots, 0] = [location.offset for location in self.locations.values()]
            rows[slots, 1] = [location.length + CRC_BYTES for location in self.locations.values()]
        raw = rows.tobytes()
        self._write([raw, _CRC.pack(google_crc32c.value(raw))])
        # Enough: the size is written with the data, and nothing else of the inode is needed.
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Close the file; only where no other thread can be reading. Otherwise the last user closes it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()

    def look_again(self) -> None:
        """Take in what a living writer has appended since (for a `view`)."""
        self._load(checks_blobs=False)

    def _load(self, *, checks_blobs: bool) -> None:
        for record, location in scan_journal(self.fd, self.end, checks_blobs=checks_blobs):
            self.end = location.offset + location.length + CRC_BYTES
            if isinstance(record, Account):
                self.accounts.append(record)
            elif self.start <= record.frame_index < self.start + self.size and 0 <= record.part < self.parts:
                slot = record.frame_index * self.parts + record.part
                self.locations[slot] = location
                self.infos[slot] = record

    def _mend(self) -> None:
        """Write the crc behind each blob again where the disk lost it, by which readers of the shard will check."""
        for slot, location in self.locations.items():
            crc, at = _CRC.pack(self.infos[slot].crc32c), location.offset + location.length
            if location.length and os.pread(self.fd, CRC_BYTES, at) != crc:
                os.pwrite(self.fd, crc, at)

    def _write(self, pieces: list[Buffer]) -> None:
        """All pieces at the journal's end, or StorageFull with the file cut back to where it was."""
        at = self.end
        try:
            for call in _calls(pieces):
                at += _write_all(self.fd, call, at)
        except OSError as error:
            self.cut()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFull(
                    error.errno,
                    f"no space left for {self.path.name} in {self.path.parent}; free some disk space, "
                    "the writer goes on by itself",
                ) from error
            raise


_FIXED_BYTES = _HEAD.size + _CRC.size


def scan_journal(fd: int, at: int = 0, *, checks_blobs: bool = True) -> Iterator[tuple[FrameInfo | Account, Location]]:
    """Each whole record of a journal (or shard) from offset ``at``, up to the first torn or foreign header."""
    size = os.fstat(fd).st_size
    while at + _FIXED_BYTES <= size:
        head = os.pread(fd, _FIXED_BYTES, at)
        if len(head) < _FIXED_BYTES:  # cut by its writer meanwhile
            return
        magic, kind, _, meta_length, blob_length, blob_crc = _HEAD.unpack_from(head)
        end = at + _FIXED_BYTES + meta_length + blob_length + CRC_BYTES
        if magic not in (MAGIC, _MAGIC_2) or meta_length > _LARGEST_META_BYTES or end > size:
            return
        meta = os.pread(fd, meta_length, at + _FIXED_BYTES)
        (crc,) = _CRC.unpack_from(head, _HEAD.size)
        if google_crc32c.extend(google_crc32c.value(head[: _HEAD.size]), meta) != crc:
            return
        location = Location(at + _FIXED_BYTES + meta_length, blob_length)
        at = end
        if kind == _ACCOUNT:
            yield _decode_account(meta), location
        # A record's header can reach the disk before its blob: only the blob's crc tells. Such a
        # frame is lost, those behind it are not.
        elif kind == _FRAME and (
            not checks_blobs or blob_crc32c(os.pread(fd, blob_length, location.offset)) == blob_crc
        ):
            yield _decode_info(meta) if magic == MAGIC else _decode_info_2(meta), location


def shard_bytes(infos: Iterable[FrameInfo], n_slots: int) -> int:
    """How large a shard of ``n_slots`` slots with these frames is."""
    records = (_FIXED_BYTES + len(_encode(info)) + info.size_bytes + CRC_BYTES for info in infos)
    return sum(records) + 16 * n_slots + CRC_BYTES


def _decode_info_2(row: bytes) -> FrameInfo:
    values = msgspec.msgpack.decode(row)
    if len(values) > _META_AT:
        values[_META_AT] = pack_meta(values[_META_AT])
    return msgspec.convert(values, FrameInfo)


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


def _calls(pieces: list[Buffer]) -> Iterator[list[Buffer]]:
    """The pieces as one `pwritev` after the other should take them."""
    call: list[Buffer] = []
    n_bytes = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, view.nbytes, _MOST_BYTES):
            part = view[start : start + _MOST_BYTES]
            if call and (n_bytes + part.nbytes > _MOST_BYTES or len(call) == _MOST_PIECES):
                yield call
                call, n_bytes = [], 0
            call.append(part)
            n_bytes += part.nbytes
    if call:
        yield call


def _write_all(fd: int, pieces: list[Buffer], at: int) -> int:
    """Write all of the pieces, also if the kernel takes only some at a time; how many bytes."""
    n_bytes = sum(len(piece) for piece in pieces)
    written = 0
    while written < n_bytes:
        written += os.pwritev(fd, _remaining(pieces, written), at + written)
    return n_bytes


def _remaining(pieces: list[Buffer], written: int) -> list[Buffer]:
    """The pieces without their first ``written`` bytes (after a short write)."""
    if not written:
        return pieces
    rest: list[Buffer] = []
    for piece in pieces:
        view = memoryview(piece).cast("B")
        if written >= view.nbytes:
            written -= view.nbytes
        else:
            rest.append(view[written:])
            written = 0
    return rest
