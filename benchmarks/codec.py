"""Decoding, checking and encoding one frame, in memory and in one thread."""

import struct

import bitshuffle
import numpy as np

from benchmarks.frames import FrameSet, Options
from benchmarks.measure import Figure, clock, figure, interleave, rates
from storage.codec import HEAD_BYTES, check_blob, decode, decode_into, encode
from storage.frame import blob_crc32c, blob_digest

__all__ = ["measure"]


def measure(options: Options) -> list[Figure]:
    frames = FrameSet.make(options.size, 8)
    blob, shape, dtype = frames.blobs[frames.first(is_hit=True)], frames.shape, np.dtype(frames.dtype)
    pixels = decode(blob, shape, dtype)
    out, copy = np.empty_like(pixels), np.empty_like(pixels)
    body = np.frombuffer(blob, np.uint8)[HEAD_BYTES:]
    per_block = struct.unpack_from(">QI", blob)[1] // dtype.itemsize
    n = options.choose(3, 10)
    t = interleave(
        {
            "memcpy": clock(lambda: np.copyto(copy, pixels), n),
            "trusted": clock(lambda: decode_into(blob, out, trusted=True), n),
            "into": clock(lambda: decode_into(blob, out), n),
            "new": clock(lambda: decode(blob, shape, dtype), n),
            "bitshuffle": clock(lambda: bitshuffle.decompress_lz4(body, shape, dtype, per_block), n),
            "check": clock(lambda: check_blob(blob, "bslz4", shape, dtype), n),
            "crc32c": clock(lambda: blob_crc32c(blob), n),
            "blake3": clock(lambda: blob_digest(blob), n),
            "memcpy blob": clock(lambda: bytearray(blob), n),
            "encode": clock(lambda: encode(pixels), n),
            "bitshuffle encode": clock(lambda: bitshuffle.compress_lz4(pixels, per_block), n),
        },
        options.choose(3, 25),
    )
    gigabytes = pixels.nbytes / 1e9

    def speed(name: str, ours: str, peer: str, peer_name: str) -> Figure:
        limit = (peer_name, rates(gigabytes, t[peer]))
        return figure(name, "GB/s decoded", rates(gigabytes, t[ours]), limit, higher_is_better=True)

    figures = [
        speed("decode into a reused buffer, checksum verified before", "trusted", "memcpy", "memcpy"),
        speed("decode into a reused buffer", "into", "memcpy", "memcpy"),
        speed("decode into a reused buffer", "into", "bitshuffle", "bitshuffle.decompress_lz4"),
        speed("decode into a new array", "new", "bitshuffle", "bitshuffle.decompress_lz4"),
        speed("encode", "encode", "bitshuffle encode", "bitshuffle.compress_lz4"),
    ]
    for name, key in (("check_blob", "check"), ("crc32c of the blob", "crc32c"), ("blake3 of the blob", "blake3")):
        milliseconds = [1e3 * s for s in t[key]]
        limit = ("memcpy of the blob", [1e3 * s for s in t["memcpy blob"]])
        figures.append(figure(name, "ms", milliseconds, limit, higher_is_better=False))
    sizes = [pixels.nbytes / len(b) for b in frames.blobs]
    return [*figures, figure("compression ratio of the frames", "×", sizes, higher_is_better=True)]
