"""Frames decode to what was encoded; anything else is a BadFrame, never a crash."""

import contextlib
import struct

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.codec import HEAD_BYTES, check_blob, decode, decode_into, encode
from storage.errors import BadFrame


def hdf5_lz4(array: np.ndarray, block_bytes: int = 0) -> bytes:
    """HDF5's own LZ4 filter on the array's bytes."""
    with h5py.File.in_memory() as file:
        raw = array.reshape(-1).view("u1")
        dataset = file.create_dataset("x", data=raw, chunks=raw.shape, **hdf5plugin.LZ4(nbytes=block_bytes))
        return dataset.id.read_direct_chunk((0,))[1]


SIZES = [(1,), (7,), (8,), (9,), (64, 80), (33, 41), (4095,), (4096,), (4097,), (3, 5, 7), (512, 512)]
DTYPES = ["uint8", "uint16", "uint32", "int16", "uint64", "float16", "float32", "float64"]


def sample(shape, dtype, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["bslz4", "raw"])
def test_round_trip(shape, dtype, codec):
    array = sample(shape, dtype)
    assert np.array_equal(decode(encode(array, codec), shape, dtype, codec), array)


@pytest.mark.parametrize("codec", ["bslz4", "raw"])
def test_round_trip_of_one_number(codec):
    assert decode(encode(np.float64(2.5), codec), (), "float64", codec) == 2.5


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("noise", [False, True], ids=["shrinks", "stored raw"])
@pytest.mark.parametrize("block_bytes", [0, 1024], ids=["one block", "blocks"])
def test_hdf5_lz4_framing(shape, noise, block_bytes):
    high = 65536 if noise else 2
    array = np.random.default_rng(1).integers(0, high, shape).astype("uint16")
    assert np.array_equal(decode(hdf5_lz4(array, block_bytes), shape, "uint16", "lz4"), array)


def test_bslz4_is_what_hdf5_reads():
    array = sample((64, 80), "uint32")
    with h5py.File.in_memory() as file:
        data = file.create_dataset("x", array.shape, "u4", chunks=array.shape, **hdf5plugin.Bitshuffle(cname="lz4"))
        data.id.write_direct_chunk((0, 0), encode(array))
        assert np.array_equal(data[()], array)


def test_big_endian_arrays_are_stored_little_endian():
    array = sample((8, 8), "uint16")
    assert encode(array.astype(">u2")) == encode(array)


GOOD = encode(sample((64, 80), "uint16"))
HEAD = struct.Struct(">QI")
BAD = {
    "empty": b"",
    "head only": GOOD[:HEAD_BYTES],
    "half a head": GOOD[:7],
    "cut in a block": GOOD[:-10],
    "one byte short": GOOD[:-1],
    "one byte more": GOOD + b"\0",
    "wrong size": HEAD.pack(10242, 8192) + GOOD[12:],
    "size of 2^64-1": HEAD.pack(2**64 - 1, 8192) + GOOD[12:],
    "no block size": HEAD.pack(10240, 0) + GOOD[12:],
    "odd block size": HEAD.pack(10240, 8191) + GOOD[12:],
    "block of 4 GiB": HEAD.pack(10240, 2**32 - 1) + GOOD[12:],
    "block length 2^32-1": GOOD[:12] + b"\xff\xff\xff\xff" + GOOD[16:],
    "block length 0": GOOD[:12] + b"\0\0\0\0" + GOOD[16:],
    "garbage": bytes(range(256)) * 8,
}


@pytest.mark.parametrize("codec", ["bslz4", "lz4", "raw"])
@pytest.mark.parametrize("blob", BAD.values(), ids=BAD.keys())
def test_malformed_is_refused(blob, codec):
    with pytest.raises(BadFrame):
        decode(blob, (64, 80), "uint16", codec)


@pytest.mark.parametrize(
    "shape",
    [(2**40, 2**40), (2**32, 2**32), (65536, 65536), (-1, 80), (2**62,)],
    ids=str,
)
@pytest.mark.parametrize("codec", ["bslz4", "lz4", "raw"])
def test_giant_shapes_are_refused_before_any_allocation(shape, codec):
    with pytest.raises(BadFrame):
        decode(HEAD.pack(0, 8192), shape, "uint16", codec)


def test_decompression_bomb_is_refused():
    """Each block declared to grow far beyond what LZ4 can."""
    n = 16 << 20
    blob = HEAD.pack(64 * n, n) + b"\0\0\0\1\0" * 64
    with pytest.raises(BadFrame, match="cannot shrink that far"):
        decode(blob, (64 * n,), "uint8", "bslz4")


def test_unknown_codec_is_refused():
    with pytest.raises(BadFrame, match="unknown codec 'zstd'"):
        decode(GOOD, (64, 80), "uint16", "zstd")


@pytest.mark.parametrize("cut", range(0, len(GOOD), 37))
def test_every_truncation_is_refused(cut):
    with pytest.raises(BadFrame):
        check_blob(GOOD[:cut], "bslz4", (64, 80), "uint16")


@given(at=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), codec=st.sampled_from(["bslz4", "lz4"]))
def test_damaged_bytes_never_crash(at, value, codec):
    """A changed pixel byte may decode to wrong pixels (the store's crc32c is for that), but never worse."""
    blob = GOOD[:at] + bytes([value]) + GOOD[at + 1 :]
    try:
        decoded = decode(blob, (64, 80), "uint16", codec)
    except BadFrame:
        return
    assert decoded.shape == (64, 80)


@given(blob=st.binary(max_size=200), codec=st.sampled_from(["bslz4", "lz4", "raw"]))
def test_random_bytes_never_crash(blob, codec):
    with contextlib.suppress(BadFrame):
        decode(blob, (4, 4), "uint16", codec)


def test_decode_into_needs_a_writable_contiguous_array():
    with pytest.raises(BadFrame, match="C-contiguous"):
        decode_into(GOOD, np.empty((80, 64), "uint16").T)
