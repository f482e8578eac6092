"""The loops that go over every byte of every frame, and compiled ones to take their place.

Three of them cost what reading costs: following the lengths of a frame's blocks, decoding bslz4,
and crc32c. The *plain* ones need no import worth mentioning: Python, the bitshuffle wheel,
google-crc32c. The *compiled* ones (`storage.compiled_kernels`: Numba, awscrt) do the same two to
ten times as fast, but take about a second to load, and some seconds the first time on a machine.

So a program starts with the plain ones. One that knows that it will read much asks for the
compiled ones with `use_compiled_kernels`; any other gets them once it has decoded 2 GiB, of which
the plain ones have then taken about as long as loading takes. Whoever cannot have a reader pause
for that second calls it first.
"""

import ctypes
import logging
import os
import struct
import threading
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The bitshuffle wheel is built with OpenMP and would take every core from within each thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import bitshuffle.ext as _bitshuffle_ext
import google_crc32c
import numpy as np

from storage.errors import BadFrame

__all__ = ["HEAD_BYTES", "PLAIN", "Kernels", "kernels", "lz4_address", "quicker", "use_compiled_kernels"]

log = logging.getLogger("nearline.kernels")

# In front of a bslz4 or lz4 frame's blocks: u64 uncompressed bytes, u32 block size.
HEAD_BYTES = 12
_LENGTH = struct.Struct(">I")
_WORTH_COMPILING_BYTES = 2 << 30
_SAMPLE_BYTES = 1 << 20

# The C entry points behind `bitshuffle.compress_lz4`: called directly they decode into the
# caller's buffer and let the GIL go, which the Python wrapper does not.
library = ctypes.CDLL(_bitshuffle_ext.__file__)
_size, _pointer = ctypes.c_size_t, ctypes.c_void_p
_decompress = library.bshuf_decompress_lz4
_decompress.restype = ctypes.c_int64
_decompress.argtypes = [_pointer, _pointer, _size, _size, _size]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of each loop.

    end_of_blocks : (bytes as uint8, offset, n) to the offset behind n blocks from there on; to one
        beyond the last byte where they do not fit.
    decode_bslz4 : (frame as uint8, output, block size in bytes) fills the output. The output is
        C-contiguous and of the frame's size; the head was checked, and unless the implementation
        says otherwise the block lengths too. BadFrame if it does not decode.
    crc32c : of bytes or an array of uint8.
    """

    name: str
    end_of_blocks: Callable[[np.ndarray, int, int], int]
    decode_bslz4: Callable[[np.ndarray, np.ndarray, int], None]
    crc32c: Callable[[Any], int]


def kernels() -> Kernels:
    """The implementation in use; it may be another one at the next call."""
    return _in_use


def use_compiled_kernels() -> bool:
    """Load the compiled kernels and use them from here on, in all threads; say whether they are in use.

    Takes about a second once per process, and longer the first time on a machine; after that it
    costs nothing to call again. Where Numba is not to be had, or cannot keep what it compiled,
    the plain ones stay, and the log says why.
    """
    global _in_use, _has_tried
    with _loading:
        if not _has_tried:
            _has_tried = True
            _in_use = _compiled() or PLAIN
    return _in_use is not PLAIN


def _compiled() -> Kernels | None:
    try:
        # Half a second, and Numba with it: only for those who asked, or who read much.
        from storage.compiled_kernels import COMPILED, agree
    except (ImportError, OSError, RuntimeError) as error:
        log.warning("frames are decoded by the bitshuffle wheel, since compiled kernels cannot be had: %s", error)
        return None
    if not agree(COMPILED, PLAIN):
        log.error("frames are decoded by the bitshuffle wheel: the kernels Numba compiled give something else")
        return None
    log.info("decoding with compiled kernels")
    return COMPILED


def lz4_address() -> int:
    """Where the bitshuffle wheel's `LZ4_decompress_safe` is in memory."""
    return ctypes.cast(library.LZ4_decompress_safe, ctypes.c_void_p).value or 0


def quicker(one: Callable[[Any], int], other: Callable[[Any], int]) -> Callable[[Any], int]:
    """Which of two checksums is the quicker one on this processor: each is written for some, and slow on others.

    The best of a few calls on 1 MiB, some 2 ms in all.
    """
    sample = np.zeros(_SAMPLE_BYTES, np.uint8)
    return min(one, other, key=lambda checksum: min(timeit.repeat(lambda: checksum(sample), number=1, repeat=5)))


def _end_of_blocks(view: np.ndarray, at: int, n_blocks: int) -> int:
    raw, unpack = view.data, _LENGTH.unpack_from
    try:
        for _ in range(n_blocks):
            at += 4 + unpack(raw, at)[0]
    except struct.error:
        return view.nbytes + 1
    return at


def _decode_bslz4(view: np.ndarray, out: np.ndarray, block_bytes: int) -> None:
    """By the wheel, which trusts the block lengths."""
    used = _decompress(
        view.ctypes.data + HEAD_BYTES, out.ctypes.data, out.size, out.itemsize, block_bytes // out.itemsize
    )
    if used != view.nbytes - HEAD_BYTES:
        raise BadFrame(f"bslz4 frame is damaged (bitshuffle returned {used} for {view.nbytes - HEAD_BYTES} bytes)")
    _count(out.nbytes)


def _count(n_bytes: int) -> None:
    """Note what the plain kernels decoded, and have them replaced when that was much."""
    global _n_decoded
    _n_decoded += n_bytes
    # Of several threads one does it; the others go on meanwhile.
    if _n_decoded >= _WORTH_COMPILING_BYTES and _automatic.acquire(blocking=False):
        use_compiled_kernels()


PLAIN = Kernels("plain", _end_of_blocks, _decode_bslz4, google_crc32c.value)

_in_use, _has_tried, _n_decoded = PLAIN, False, 0
_loading, _automatic = threading.Lock(), threading.Lock()
