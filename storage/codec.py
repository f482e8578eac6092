"""Frames as the detector compressed them: check, decode into a buffer, encode.

The detector's bytes are what the buffer holds, the shard stores and the NeXus file
contains, so this module decodes but never recompresses. Three codecs:

``bslz4``
    bitshuffle + LZ4 as HDF5 filter 32008 keeps it in a chunk: u64 big-endian uncompressed
    bytes, u32 big-endian block size in bytes, then per block a u32 big-endian length and
    LZ4 data; the last ``n mod 8`` elements follow as they are.
``lz4``
    HDF5 filter 32004: the same twelve-byte head, blocks of u32 length and LZ4 data, a block
    that did not shrink stored as it is.
``raw``
    the array's little-endian bytes.

bslz4 carries no checksum, and damaged bytes may decode to wrong pixels without an error;
the store adds a crc32c to every frame for that reason.
"""

import ctypes
import math
import struct
from typing import Any

import numpy as np

from storage.errors import BadFrame
from storage.kernels import HEAD_BYTES, kernels, library

__all__ = ["CODECS", "HEAD_BYTES", "MOST_FRAME_BYTES", "Buffer", "check_blob", "decode", "decode_into", "encode"]

Buffer = bytes | bytearray | memoryview
CODECS = ("bslz4", "lz4", "raw")
BLOCK_BYTES = 8192
# HDF5's own limit for an LZ4 block; a larger declared block is a bad header, not a frame.
_LARGEST_BLOCK_BYTES = 1 << 24
# One decoded frame; LZ4 itself counts in 32-bit integers.
MOST_FRAME_BYTES = 1 << 31
# A byte of LZ4 stands for at most 255 (LZ4 block format, match lengths): whatever claims more is no frame.
_LZ4_BEST_RATIO = 255
_HEAD = struct.Struct(">QI")
_LENGTH = struct.Struct(">I")

_size, _pointer = ctypes.c_size_t, ctypes.c_void_p
_compress = library.bshuf_compress_lz4
_compress.restype = ctypes.c_int64
_compress.argtypes = [_pointer, _pointer, _size, _size, _size]
_compress_bound = library.bshuf_compress_lz4_bound
_compress_bound.restype = _size
_compress_bound.argtypes = [_size, _size, _size]
_lz4_decompress_safe = library.LZ4_decompress_safe
_lz4_decompress_safe.restype = ctypes.c_int
_lz4_decompress_safe.argtypes = [_pointer, _pointer, ctypes.c_int, ctypes.c_int]


def check_blob(blob: Buffer, codec: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse a blob that cannot be a frame of this shape and dtype, without decoding it.

    The declared size and every block length are compared with what is really there, so that
    decoding afterwards can neither read nor write outside its buffers.

    Raises
    ------
    BadFrame : unknown codec, wrong declared size, or block lengths that do not add up.
    """
    dtype = np.dtype(dtype)
    expected = math.prod(shape) * dtype.itemsize
    view = _bytes_view(blob)
    if min(shape, default=0) < 0 or expected > MOST_FRAME_BYTES:
        raise BadFrame(f"shape {shape} of {dtype} cannot be a frame; at most {MOST_FRAME_BYTES} bytes decoded")
    if codec == "raw":
        if view.nbytes != expected:
            raise BadFrame(
                f"raw frame has {view.nbytes} bytes, but shape {shape} of {dtype} needs {expected}; "
                "check the shape and dtype the source announces"
            )
        return
    if codec not in CODECS:
        raise BadFrame(f"unknown codec {codec!r}; this version reads {', '.join(CODECS)}")
    if view.nbytes < HEAD_BYTES:
        raise BadFrame(f"{codec} frame of {view.nbytes} bytes is shorter than its own {HEAD_BYTES}-byte head")
    declared, block_bytes = _HEAD.unpack_from(view.data)
    if declared != expected:
        raise BadFrame(
            f"{codec} frame declares {declared} uncompressed bytes, but shape {shape} of {dtype} "
            f"needs {expected}; check the shape and dtype the source announces"
        )
    if declared > _LZ4_BEST_RATIO * view.nbytes:
        raise BadFrame(f"{codec} frame of {view.nbytes} bytes declares {declared}; LZ4 cannot shrink that far")
    if codec == "bslz4":
        _check_bslz4_blocks(view, dtype.itemsize, declared, block_bytes)
    else:
        _check_lz4_blocks(view, declared, block_bytes)


def decode_into(blob: Buffer, out: np.ndarray, codec: str = "bslz4", *, trusted: bool = False) -> np.ndarray:
    """Decompress one frame into ``out`` and return it.

    Parameters
    ----------
    blob : the frame as delivered.
    out : C-contiguous, writable; its dtype and size are the frame's.
    trusted : skip the walk over the block lengths; only for bytes whose checksum was just verified.

    Raises
    ------
    BadFrame : the blob does not decode to exactly ``out.nbytes`` bytes.
    """
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise BadFrame("decode_into needs a C-contiguous, writable output array")
    if not trusted:
        check_blob(blob, codec, out.shape, out.dtype)
    view = _bytes_view(blob)
    if codec == "raw":
        out.reshape(-1).view(np.uint8)[:] = view
        return out
    if out.size == 0:
        return out
    _, block_bytes = _HEAD.unpack_from(view.data)
    if codec == "bslz4":
        kernels().decode_bslz4(view, out, block_bytes)
    else:
        _decode_lz4(view, out, block_bytes)
    return out


def decode(blob: Buffer, shape: tuple[int, ...], dtype: Any, codec: str = "bslz4") -> np.ndarray:
    """Decompress one frame into a new array of the given shape and dtype."""
    check_blob(blob, codec, shape, dtype)
    return decode_into(blob, np.empty(shape, np.dtype(dtype)), codec, trusted=True)


def encode(array: np.ndarray, codec: str = "bslz4") -> bytes:
    """Compress an array as a detector would (``bslz4``) or give its bytes (``raw``).

    For simulators, raw producers and tests; stored frames are never encoded again.
    """
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    if codec == "raw":
        return array.tobytes()
    if codec != "bslz4":
        raise BadFrame(f"cannot encode {codec!r}; use 'bslz4' or 'raw'")
    block = BLOCK_BYTES // array.itemsize
    bound = _compress_bound(array.size, array.itemsize, block)
    out = np.empty(HEAD_BYTES + bound, np.uint8)
    out[:HEAD_BYTES] = np.frombuffer(_HEAD.pack(array.nbytes, BLOCK_BYTES), np.uint8)
    n = 0
    if array.size:
        n = _compress(array.ctypes.data, out.ctypes.data + HEAD_BYTES, array.size, array.itemsize, block)
    if n < 0:
        raise BadFrame(f"bitshuffle refused to compress {array.dtype} of shape {array.shape} (error {n})")
    return out[: HEAD_BYTES + n].tobytes()


def _bytes_view(blob: Buffer) -> np.ndarray:
    """The blob's bytes as a uint8 array, without a copy."""
    return np.frombuffer(blob, np.uint8)


def _check_bslz4_blocks(view: np.ndarray, item_bytes: int, declared: int, block_bytes: int) -> None:
    if not 0 < block_bytes <= _LARGEST_BLOCK_BYTES or block_bytes % (8 * item_bytes):
        raise BadFrame(
            f"bslz4 frame declares a block size of {block_bytes} bytes, not a multiple of 8 elements of {item_bytes}"
        )
    elements = declared // item_bytes
    per_block = block_bytes // item_bytes
    n_blocks = elements // per_block + (1 if elements % per_block >= 8 else 0)
    end = _walk_blocks(view, n_blocks, "bslz4")
    leftover = (elements % 8) * item_bytes
    if end + leftover != view.nbytes:
        raise BadFrame(
            f"bslz4 frame has {view.nbytes} bytes, but its {n_blocks} blocks end at {end + leftover}; "
            "the message was cut or damaged on its way"
        )


def _check_lz4_blocks(view: np.ndarray, declared: int, block_bytes: int) -> None:
    if not 0 < block_bytes <= max(declared, _LARGEST_BLOCK_BYTES):
        raise BadFrame(f"lz4 frame declares a block size of {block_bytes} bytes for {declared} bytes of pixels")
    n_blocks = -(-declared // block_bytes)
    end = _walk_blocks(view, n_blocks, "lz4")
    if end != view.nbytes:
        raise BadFrame(f"lz4 frame has {view.nbytes} bytes, but its {n_blocks} blocks end at {end}")


def _walk_blocks(view: np.ndarray, n_blocks: int, codec: str) -> int:
    """Offset just behind the last block, following each block's own length."""
    size = view.nbytes
    if n_blocks * _LENGTH.size > size:
        raise BadFrame(f"{codec} frame of {size} bytes is too short for its {n_blocks} blocks")
    at = kernels().end_of_blocks(view, HEAD_BYTES, n_blocks)
    if at > size:
        raise BadFrame(f"{codec} frame of {size} bytes ends inside a block; the message was cut on its way")
    return at


def _decode_lz4(view: np.ndarray, out: np.ndarray, block_bytes: int) -> None:
    raw, at, written = view.data, HEAD_BYTES, 0
    target = out.reshape(-1).view(np.uint8)
    while written < out.nbytes:
        (length,) = _LENGTH.unpack_from(raw, at)
        at += 4
        want = min(block_bytes, out.nbytes - written)
        if length == want:
            target[written : written + want] = view[at : at + want]
        elif _lz4_decompress_safe(view.ctypes.data + at, target.ctypes.data + written, length, want) != want:
            raise BadFrame(f"lz4 frame is damaged in the block at byte {at}")
        at += length
        written += want
