"""The kernels compiled by Numba: bslz4 in one pass through the processor's nearest cache, block by block.

A bslz4 block holds the bits of its elements (some thousand) in planes: bit 0 of the first byte of
each, eight elements to a byte, then bit 1, and so on through the bits of all their bytes. The
bitshuffle wheel puts them back in two passes and with the oldest vector instructions. Here a
block is decompressed into a scratch buffer of its size, and read from there 64 elements at a time:

    8 bytes from each of the 8 planes of a byte ─► interleaved: 8 squares of 8 × 8 bits
    ─► transposed: that byte of 64 elements ─► interleaved with their other bytes: 64 elements

in vectors of LLVM's own types, which become the widest instructions of the processor that Numba
compiles for. Only GFNI, which transposes a square in one instruction, is asked for by name.

LZ4 is the wheel's own, told how much it may read and write. Nothing is shared between threads,
and the GIL is free meanwhile.
"""

from typing import Any

import bitshuffle
import numba
import numpy as np
from awscrt.checksums import crc32c
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from storage.errors import BadFrame
from storage.kernels import HEAD_BYTES, PLAIN, Kernels, lz4_address, quicker

__all__ = ["COMPILED", "agree"]

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # set when it is imported
    raise ImportError("Numba is told not to compile (NUMBA_DISABLE_JIT)")

# A call leaves out the context, which Numba's annotations do not know.
_intrinsic: Any = intrinsic

_ITEM_BYTES = (1, 2, 4, 8)
_GROUP = 64  # elements at a time: eight bytes of a plane
# Room for the planes of one group and for the group itself, of the largest elements.
_SPARE_BYTES = 2 * _GROUP * _ITEM_BYTES[-1]
_LZ4_ADDRESS = lz4_address()


def agree(one: Kernels, other: Kernels) -> bool:
    """Whether both give the same for a frame of each element size, with every kind of block there is."""
    return all(_answers(one, item_bytes) == _answers(other, item_bytes) for item_bytes in _ITEM_BYTES)


def _answers(kernels: Kernels, item_bytes: int) -> tuple[bytes, int, int]:
    """What the kernels say of a frame with whole blocks, a last one of 48 elements, and 3 elements behind it."""
    n, per_block = 7 * 136 + 51, 136
    pixels = (np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(f"u{item_bytes}")
    blocks = bitshuffle.compress_lz4(pixels, per_block)
    frame = np.concatenate([np.zeros(HEAD_BYTES, np.uint8), blocks])
    out = np.zeros_like(pixels)
    kernels.decode_bslz4(frame, out, per_block * item_bytes)
    return out.tobytes(), kernels.end_of_blocks(frame, HEAD_BYTES, 8), kernels.crc32c(frame)


def _decode_bslz4(view: np.ndarray, out: np.ndarray, block_bytes: int) -> None:
    """Believes no length: each is compared with the bytes that are there."""
    if out.itemsize not in _ITEM_BYTES:
        PLAIN.decode_bslz4(view, out, block_bytes)
        return
    target = out.reshape(-1).view(np.uint8)
    scratch = np.empty(min(block_bytes, target.size) + _SPARE_BYTES, np.uint8)
    end = _decode_blocks(view, target, scratch, block_bytes, out.itemsize, _LZ4_ADDRESS)
    if end < 0:
        raise BadFrame(f"bslz4 frame is damaged in the block at byte {-end} of {view.size}")
    if end != view.size:
        raise BadFrame(f"bslz4 frame has {view.size} bytes, but its blocks end at {end}; it was damaged on its way")


@_intrinsic
def _lz4_decompress(context: Any, function: Any, source: Any, target: Any, n_source: Any, n_target: Any) -> Any:
    """`LZ4_decompress_safe` by its address: n_source bytes into n_target at most; the number written, or below 0."""
    signature = types.int32(types.uintp, types.uintp, types.uintp, types.int32, types.int32)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function, source, target, n_source, n_target = args
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(number, [pointer, pointer, number, number]).as_pointer()
        buffers = [builder.inttoptr(address, pointer) for address in (source, target)]
        return builder.call(builder.inttoptr(function, kind), [*buffers, n_source, n_target])

    return signature, generate


@_intrinsic(prefer_literal=True)
def _unshuffle_group(context: Any, planes: Any, plane_bytes: Any, target: Any, item_bytes: Any) -> Any:
    """64 elements out of the planes at an address, each ``plane_bytes`` long, into those at another address."""
    if not isinstance(item_bytes, types.IntegerLiteral):
        return None
    signature = types.void(types.uintp, types.intp, types.uintp, item_bytes)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        planes, plane_bytes, target, _ = args
        row = ir.VectorType(ir.IntType(8), 8)

        def load(plane: int) -> Any:
            offset = builder.mul(plane_bytes, plane_bytes.type(plane))
            return builder.load(builder.inttoptr(builder.add(planes, offset), row.as_pointer()), align=1)

        bytes_of_all = [
            _transpose_squares(context, builder, [load(8 * byte + bit) for bit in range(8)])
            for byte in range(item_bytes.literal_value)
        ]
        elements = _interleave(builder, bytes_of_all)
        builder.store(elements, builder.inttoptr(target, elements.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature, generate


def _interleave(builder: Any, vectors: list[Any]) -> Any:
    """One vector: the first byte of each, then the second of each, and so on; a power of two of them."""
    if len(vectors) == 1:
        return vectors[0]
    half = len(vectors) // 2
    low, high = _interleave(builder, vectors[:half]), _interleave(builder, vectors[half:])
    n = low.type.count // half
    units = ir.VectorType(ir.IntType(8 * half), n)
    order = ir.VectorType(ir.IntType(32), 2 * n)([k + side for k in range(n) for side in (0, n)])
    mixed = builder.shuffle_vector(builder.bitcast(low, units), builder.bitcast(high, units), order)
    return builder.bitcast(mixed, ir.VectorType(ir.IntType(8), 2 * low.type.count))


def _transpose_squares(context: Any, builder: Any, rows: list[Any]) -> Any:
    """Bit k of byte j becomes bit j of byte k, in each square of 8 bytes, one from each of the 8 rows."""
    squares = ir.VectorType(ir.IntType(8), 64)
    if _has_gfni(context):
        # The instruction multiplies each byte with the square as a matrix whose last row comes first:
        # by the eight unit vectors, that reads out its columns.
        units = squares([1 << k for _ in range(8) for k in range(8)])
        name = "llvm.x86.vgf2p8affineqb.512"
        kind = ir.FunctionType(squares, [squares, squares, ir.IntType(8)])
        multiply = builder.module.globals.get(name) or builder.module.declare_intrinsic(name, (), kind)
        return builder.call(multiply, [units, _interleave(builder, rows[::-1]), ir.IntType(8)(0)])
    # By exchanging ever larger squares within the square (Warren, Hacker's Delight, 7-3).
    bits = builder.bitcast(_interleave(builder, rows), ir.VectorType(ir.IntType(64), 8))
    for distance, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        far, which = bits.type([distance] * 8), bits.type([mask] * 8)
        differs = builder.and_(builder.xor(bits, builder.lshr(bits, far)), which)
        bits = builder.xor(builder.xor(bits, differs), builder.shl(differs, far))
    return builder.bitcast(bits, squares)


def _has_gfni(context: Any) -> bool:
    """Whether Numba compiles for a processor with it; what is kept on disk is kept by the same words."""
    _triple, _processor, features = context.codegen().magic_tuple()
    return {"+gfni", "+avx512f"} <= set(features.split(","))


@numba.njit
def _block_length(view: np.ndarray, at: int) -> int:
    """Of the block whose length is at this offset, without the length; -1 if it is not all there."""
    room = view.size - at - 4
    if room < 0:
        return -1
    length = (np.int64(view[at]) << 24) | (np.int64(view[at + 1]) << 16) | (np.int64(view[at + 2]) << 8) | view[at + 3]
    return length if length <= room else -1


@numba.njit
def _unshuffle_at(planes: int, plane_bytes: int, target: int, item_bytes: int) -> None:
    """`_unshuffle_group`, which must know the size of an element when it is compiled."""
    if item_bytes == 1:
        _unshuffle_group(planes, plane_bytes, target, 1)
    elif item_bytes == 2:
        _unshuffle_group(planes, plane_bytes, target, 2)
    elif item_bytes == 4:
        _unshuffle_group(planes, plane_bytes, target, 4)
    else:
        _unshuffle_group(planes, plane_bytes, target, 8)


@numba.njit
def _unshuffle(scratch: np.ndarray, n: int, target: np.ndarray, offset: int, item_bytes: int) -> None:
    """A block of n elements, a multiple of 8, from the start of the scratch buffer to an offset of the target."""
    plane_bytes = n // 8
    for at in range(0, n, _GROUP):
        # A last group that is not full begins earlier, and does some elements once more.
        first = min(at, n - _GROUP)
        planes = scratch.ctypes.data + first // 8
        _unshuffle_at(planes, plane_bytes, target.ctypes.data + offset + first * item_bytes, item_bytes)


@numba.njit
def _unshuffle_few(scratch: np.ndarray, n: int, target: np.ndarray, offset: int, item_bytes: int) -> None:
    """A block of less than 64 elements, by way of the spare room behind the scratch buffer."""
    plane_bytes, spare = n // 8, scratch[scratch.size - _SPARE_BYTES :]
    group = spare[_SPARE_BYTES // 2 :]
    for plane in range(8 * item_bytes):
        for k in range(plane_bytes):
            spare[8 * plane + k] = scratch[plane * plane_bytes + k]
    _unshuffle_at(spare.ctypes.data, 8, group.ctypes.data, item_bytes)
    target[offset : offset + n * item_bytes] = group[: n * item_bytes]


_BYTES, _READ_ONLY = types.Array(types.uint8, 1, "C"), types.Array(types.uint8, 1, "C", readonly=True)


@numba.njit(types.int64(_READ_ONLY, types.int64, types.int64), nogil=True, cache=True)
def _end_of_blocks(view: np.ndarray, at: int, n_blocks: int) -> int:
    for _ in range(n_blocks):
        length = _block_length(view, at)
        if length < 0:
            return view.size + 1
        at += 4 + length
    return at


@numba.njit(types.int64(_READ_ONLY, _BYTES, _BYTES, types.int64, types.int64, types.uintp), nogil=True, cache=True)
def _decode_blocks(
    view: np.ndarray, target: np.ndarray, scratch: np.ndarray, block_bytes: int, item_bytes: int, lz4: int
) -> int:
    """Offset behind the last byte used; that of the damaged block, negative, if there is one."""
    at, done = HEAD_BYTES, 0
    step = 8 * item_bytes
    if block_bytes <= 0 or block_bytes % step:
        return -at
    whole = target.size // step * step
    while done < whole:
        n_bytes = min(block_bytes, whole - done)
        length = _block_length(view, at)
        if length < 0 or length > 0x7FFFFFFF:  # LZ4 counts in int32
            return -at
        if _lz4_decompress(lz4, view.ctypes.data + at + 4, scratch.ctypes.data, length, n_bytes) != n_bytes:
            return -at
        n = n_bytes // item_bytes
        if n >= _GROUP:
            _unshuffle(scratch, n, target, done, item_bytes)
        else:
            _unshuffle_few(scratch, n, target, done, item_bytes)
        at += 4 + length
        done += n_bytes
    left = target.size - done
    if view.size - at < left:
        return -at
    target[done:] = view[at : at + left]
    return at + left


COMPILED = Kernels("compiled", _end_of_blocks, _decode_bslz4, quicker(crc32c, PLAIN.crc32c))
