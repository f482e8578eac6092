"""Frames out of a sealed shard: read the index once, then one `pread` per frame.

`zarr.open(...)["data"][i]` reads the same bytes at about 2 ms per frame before decoding; this
reader exists because the hot path wants them at the speed of the page cache. On an object store
a frame is a range request, and frames that are read in order are fetched together.
"""

import bisect
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import google_crc32c
import numpy as np

from storage.errors import CorruptFrame
from storage.files import is_local, remote_errors
from storage.frame import blob_crc32c
from storage.journal import CRC_BYTES, Location, read_located

__all__ = ["ShardReader"]

# Between two frames of a shard lies the journal's record: its header and the frame's metadata.
_MOST_GAP_BYTES = 64 << 10
# A request brings so much at most: below it the round trip counts, above it parallel ones are faster.
_REQUEST_BYTES = 8 << 20
_AHEAD_BYTES = 32 << 20


class ShardReader:
    """Random access to the inner chunks (frames) of one shard of ``size`` frames."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        """Raises CorruptFrame where the shard is gone, or its index is damaged."""
        self.path, self.start, self.size = path, start, size
        # Behind a URL: frames fetched together with those before them. Who reads in order asks seldom.
        self._ahead: dict[int, bytes] | None = None if is_local(path) else {}
        self._last_read = -2
        try:
            self._file: _File = _LocalFile(path) if is_local(path) else _RemoteFile(path)
            self._rows = self._read_index()
        except FileNotFoundError as error:
            raise CorruptFrame(
                f"shard {path} (frames {start} to {start + size - 1}) is gone; restore it from a copy, "
                "`nearline verify` lists what else is"
            ) from error

    def __contains__(self, frame_index: int) -> bool:
        row = frame_index - self.start
        return 0 <= row < self.size and int(self._rows[row, 1]) != 2**64 - 1

    def location(self, frame_index: int) -> Location:
        """Where the frame's bytes are in the shard, without the crc behind them; KeyError where it has a hole."""
        return self._place(frame_index)

    def read(self, frame_index: int) -> bytes:
        """The frame's bytes without their crc; KeyError where the shard has a hole.

        Raises
        ------
        CorruptFrame : the stored crc32c disagrees with the bytes.
        """
        place = self._place(frame_index)
        return self._read_far(frame_index) if self._ahead is not None else self._file.read_frame(place, frame_index)

    def read_many(self, indices: Sequence[int]) -> list[bytes]:
        """Those frames' bytes, as `read` gives them, with as few requests as will do."""
        places = [self._place(index) for index in indices]
        return self._file.read_frames(places, indices)

    def close(self) -> None:
        self._file.close()

    def _read_far(self, frame_index: int) -> bytes:
        """A frame by a request of its own, or, once frames are read in order, with those behind it."""
        assert self._ahead is not None
        is_next, self._last_read = self._last_read == self._neighbour(frame_index, -1), frame_index
        blob = self._ahead.pop(frame_index, None)
        if blob is not None:
            return blob
        if is_next:
            indices = self._from(frame_index)
            try:
                # Whatever else was ahead, nobody came for it.
                self._ahead = dict(zip(indices, self.read_many(indices), strict=True))
                return self._ahead.pop(frame_index)
            except CorruptFrame:  # perhaps not this one, but one behind it
                self._ahead = {}
        return self._file.read_frame(self._place(frame_index), frame_index)

    def _neighbour(self, frame_index: int, step: int) -> int:
        """The next frame that is there in that direction; -1 where there is none."""
        row = frame_index + step
        while self.start <= row < self.start + self.size:
            if row in self:
                return row
            row += step
        return -1

    def _from(self, frame_index: int) -> list[int]:
        """This frame and those behind it, as many as may be held."""
        indices, n_bytes = [], 0
        while frame_index >= 0 and n_bytes < _AHEAD_BYTES:
            indices.append(frame_index)
            n_bytes += self._place(frame_index).length
            frame_index = self._neighbour(frame_index, 1)
        return indices

    def _place(self, frame_index: int) -> Location:
        """Where a frame and the crc behind it are."""
        if frame_index not in self:
            raise KeyError(frame_index)
        offset, length = (int(v) for v in self._rows[frame_index - self.start])
        return Location(offset, length - CRC_BYTES)

    def _read_index(self) -> np.ndarray:
        n_bytes = self.size * 16
        raw = self._file.read_tail(n_bytes + CRC_BYTES)
        crc = int.from_bytes(raw[n_bytes:], "little")
        if len(raw) != n_bytes + CRC_BYTES or google_crc32c.value(raw[:n_bytes]) != crc:
            raise CorruptFrame(
                f"the index of shard {self.path} (frames {self.start} to {self.start + self.size - 1}) "
                "fails its crc32c; the file was cut or damaged, restore it from a copy"
            )
        return np.frombuffer(raw, "<u8", count=2 * self.size).reshape(self.size, 2)


class _File(Protocol):
    """What a shard is read through."""

    def read_tail(self, n_bytes: int) -> bytes:
        """The last bytes; fewer where the file is shorter."""
        ...

    def read_frame(self, place: Location, frame_index: int) -> bytes: ...

    def read_frames(self, places: Sequence[Location], indices: Sequence[int]) -> list[bytes]: ...

    def close(self) -> None: ...


class _LocalFile:
    """A file of this machine's kernel, kept open: its bytes stay readable when its name goes."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1
        self._fd = os.open(path, os.O_RDONLY)

    def read_tail(self, n_bytes: int) -> bytes:
        at = os.fstat(self._fd).st_size - n_bytes
        return os.pread(self._fd, n_bytes, at) if at >= 0 else b""

    def read_frame(self, place: Location, frame_index: int) -> bytes:
        crc = os.pread(self._fd, CRC_BYTES, place.offset + place.length)
        return read_located(self._fd, place, int.from_bytes(crc, "little"), frame_index, self._path)

    def read_frames(self, places: Sequence[Location], indices: Sequence[int]) -> list[bytes]:
        return [self.read_frame(place, index) for place, index in zip(places, indices, strict=True)]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


class _RemoteFile:
    """An object that is read by ranges."""

    def __init__(self, path: Path) -> None:
        self._path, remote = path, cast(Any, path)
        self._fs, self._key = remote.fs, remote.path

    def read_tail(self, n_bytes: int) -> bytes:
        with remote_errors(self._path):
            return cast(bytes, self._fs.cat_file(self._key, start=-n_bytes))

    def read_frame(self, place: Location, frame_index: int) -> bytes:
        return self.read_frames([place], [frame_index])[0]

    def read_frames(self, places: Sequence[Location], indices: Sequence[int]) -> list[bytes]:
        starts = [place.offset for place in places]
        ends = [place.offset + place.length + CRC_BYTES for place in places]
        blocks = self._blocks(starts, ends)
        firsts = [first for first, _ in blocks]
        found = []
        for start, end, index in zip(starts, ends, indices, strict=True):
            first, block = blocks[bisect.bisect_right(firsts, start) - 1]
            found.append(self._checked(block[start - first : end - first], end - start, index))
        return found

    def close(self) -> None:
        """Nothing is held open."""

    def _blocks(self, starts: list[int], ends: list[int]) -> list[tuple[int, bytes]]:
        """Spans of the object that cover those ranges: offset and bytes, rising."""
        # fsspec takes a tenth of a second to import: only those who read from afar pay.
        from fsspec.utils import merge_offset_ranges

        keys, firsts, lasts = merge_offset_ranges(
            [self._key] * len(starts), starts, ends, max_gap=_MOST_GAP_BYTES, max_block=_REQUEST_BYTES
        )
        with remote_errors(self._path):
            answers = self._fs.cat_ranges(keys, firsts, lasts, on_error="return")
            return [(first, _answer(answer)) for first, answer in zip(firsts, answers, strict=True)]

    def _checked(self, raw: bytes, n_bytes: int, frame_index: int) -> bytes:
        blob, crc = raw[:-CRC_BYTES], int.from_bytes(raw[-CRC_BYTES:], "little")
        if len(raw) != n_bytes or blob_crc32c(blob) != crc:
            raise CorruptFrame(
                f"frame {frame_index} in {self._path} fails its crc32c; the object was cut or damaged, "
                "upload it again or leave the frame out"
            )
        return blob


def _answer(answer: bytes | Exception) -> bytes:
    """What a range request brought; nothing where the object ends before it."""
    if isinstance(answer, OSError) and answer.errno == errno.EINVAL:
        return b""
    if isinstance(answer, Exception):
        raise answer
    return answer
