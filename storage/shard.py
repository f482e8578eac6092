"""Frames out of a sealed shard: read the index once, then one `pread` per frame.

`zarr.open(...)["data"][i]` reads the same bytes at about 2 ms per frame before decoding; this
reader exists because the hot path wants them at the speed of the page cache.
"""

import os
from pathlib import Path

import google_crc32c
import numpy as np

from storage.errors import CorruptFrame
from storage.journal import CRC_BYTES, Location, read_located

__all__ = ["ShardReader"]


class ShardReader:
    """Random access to the inner chunks (frames) of one shard of ``size`` frames."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self.path, self.start, self.size = path, start, size
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY)
        self._rows = self._read_index()

    def __contains__(self, frame_index: int) -> bool:
        row = frame_index - self.start
        return 0 <= row < self.size and int(self._rows[row, 1]) != 2**64 - 1

    def read(self, frame_index: int) -> bytes:
        """The frame's bytes without their crc; KeyError where the shard has a hole.

        Raises
        ------
        CorruptFrame : the stored crc32c disagrees with the bytes.
        """
        if frame_index not in self:
            raise KeyError(frame_index)
        offset, length = (int(v) for v in self._rows[frame_index - self.start])
        tail = os.pread(self._fd, CRC_BYTES, offset + length - CRC_BYTES)
        location = Location(offset, length - CRC_BYTES)
        return read_located(self._fd, location, int.from_bytes(tail, "little"), frame_index, self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def _read_index(self) -> np.ndarray:
        n_bytes = self.size * 16
        at = os.fstat(self._fd).st_size - n_bytes - CRC_BYTES
        raw = os.pread(self._fd, n_bytes + CRC_BYTES, at) if at >= 0 else b""
        crc = int.from_bytes(raw[n_bytes:], "little")
        if len(raw) != n_bytes + CRC_BYTES or google_crc32c.value(raw[:n_bytes]) != crc:
            raise CorruptFrame(
                f"the index of shard {self.path} (frames {self.start} to {self.start + self.size - 1}) "
                "fails its crc32c; the file was cut or damaged, restore it from a copy"
            )
        return np.frombuffer(raw, "<u8", count=2 * self.size).reshape(self.size, 2)
