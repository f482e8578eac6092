"""Decoding, checking and encoding one frame, in memory."""

import struct
from collections.abc import Callable
from typing import Literal

import bitshuffle
import numpy as np

from benchmarks.frames import FrameSet, Options
from benchmarks.measure import Figure, clock, figure, interleave, rates
from storage.codec import HEAD_BYTES, check_blob, decode, decode_into, encode
from storage.frame import blob_digest
from storage.kernels import PLAIN, kernels, use_compiled_kernels

__all__ = ["measure"]


def measure(options: Options) -> list[Figure]:
    use_compiled_kernels()
    figures = [f for dtype in ("uint16", "uint32") for f in _decoding(options, dtype)]
    return [*figures, *_beside_decoding(options)]


def _decoding(options: Options, dtype: Literal["uint16", "uint32"]) -> list[Figure]:
    frames = FrameSet.make(options.size, 8, dtype)
    blob = frames.blob(frames.first(is_hit=True))
    pixels = decode(blob, frames.shape, dtype)
    out, copy = np.empty_like(pixels), np.empty_like(pixels)
    view, block_bytes = np.frombuffer(blob, np.uint8), struct.unpack_from(">QI", blob)[1]
    per_block = block_bytes // pixels.itemsize
    n = options.choose(3, 10)
    t = interleave(
        {
            "memcpy": clock(lambda: np.copyto(copy, pixels), n),
            "trusted": clock(lambda: decode_into(blob, out, trusted=True), n),
            "into": clock(lambda: decode_into(blob, out), n),
            "new": clock(lambda: decode(blob, frames.shape, dtype), n),
            "wheel into": clock(lambda: PLAIN.decode_bslz4(view, out, block_bytes), n),
            "wheel": clock(
                lambda: bitshuffle.decompress_lz4(view[HEAD_BYTES:], frames.shape, pixels.dtype, per_block), n
            ),
        },
        options.choose(3, 25),
    )
    speed = {name: rates(pixels.nbytes / 1e9, seconds) for name, seconds in t.items()}
    names = {
        "trusted": "decode into a reused buffer, checksum verified before",
        "into": "decode into a reused buffer",
        "new": "decode into a new array",
    }
    into, new = ("the wheel's C function", "wheel into"), ("bitshuffle.decompress_lz4", "wheel")
    beside = [("trusted", ("memcpy", "memcpy")), ("trusted", into), ("into", into), ("new", new)]
    return [
        figure(f"{dtype}: {names[ours]}", "GB/s decoded", speed[ours], (name, speed[peer]), higher_is_better=True)
        for ours, (name, peer) in beside
    ]


def _beside_decoding(options: Options) -> list[Figure]:
    """What else is done to every frame, in ms, beside the plain kernels or a copy of the blob."""
    frames = FrameSet.make(options.size, 8)
    blob, shape, dtype = frames.blob(frames.first(is_hit=True)), frames.shape, frames.dtype
    pixels, view = decode(blob, shape, dtype), np.frombuffer(blob, np.uint8)
    n_blocks = -(-pixels.nbytes // struct.unpack_from(">QI", blob)[1])
    n = options.choose(3, 10)

    def timed(function: Callable[..., object], *arguments: object) -> Callable[[], float]:
        return clock(lambda: function(*arguments), n)

    t = interleave(
        {
            "check_blob": timed(check_blob, blob, "bslz4", shape, dtype),
            "plain walk": timed(PLAIN.end_of_blocks, view, HEAD_BYTES, n_blocks),
            "crc32c": timed(kernels().crc32c, view),
            "plain crc32c": timed(PLAIN.crc32c, view),
            "XXH3": timed(blob_digest, blob),
            "memcpy": timed(bytearray, blob),
            "encode": timed(encode, pixels),
            "bitshuffle encode": timed(bitshuffle.compress_lz4, pixels),
        },
        options.choose(3, 25),
    )
    ms = {name: [1e3 * s for s in seconds] for name, seconds in t.items()}
    beside = [
        ("check_blob", "walk over the blocks in Python", "plain walk"),
        ("crc32c", "google_crc32c", "plain crc32c"),
        ("crc32c", "memcpy of the blob", "memcpy"),
        ("XXH3", "memcpy of the blob", "memcpy"),
        ("encode", "bitshuffle.compress_lz4", "bitshuffle encode"),
    ]
    figures = [
        figure(f"{ours} of a frame", "ms", ms[ours], (name, ms[peer]), higher_is_better=False)
        for ours, name, peer in beside
    ]
    sizes = [pixels.nbytes / len(b) for b in frames.blobs]
    return [*figures, figure("compression ratio of the frames", "×", sizes, higher_is_better=True)]
