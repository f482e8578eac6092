"""The compiled kernels give what the bitshuffle wheel gives, and of damaged bytes nothing worse than BadFrame."""

import ctypes
import mmap
import os
import platform
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import bitshuffle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import kernels as kernels_module
from storage.codec import HEAD_BYTES, check_blob, decode, decode_into, encode
from storage.compiled_kernels import COMPILED, agree
from storage.errors import BadFrame
from storage.kernels import PLAIN, Kernels, kernels, use_compiled_kernels

ROOT = Path(__file__).parents[2]
HEAD = struct.Struct(">QI")
PAGE = mmap.PAGESIZE


@pytest.fixture(params=[PLAIN, COMPILED], ids=lambda k: k.name)
def in_use(request, monkeypatch) -> Kernels:
    monkeypatch.setattr(kernels_module, "_in_use", request.param)
    return request.param


def in_blocks(array: np.ndarray, per_block: int) -> bytes:
    """As `encode`, with blocks of so many elements."""
    head = HEAD.pack(array.nbytes, per_block * array.itemsize)
    return head + bitshuffle.compress_lz4(array.reshape(-1), per_block).tobytes()


def fenced(n_bytes: int) -> np.ndarray:
    """Bytes with a page right behind them (and one not far before) that nobody may touch."""
    n_pages = -(-n_bytes // PAGE)
    area = mmap.mmap(-1, (n_pages + 2) * PAGE)
    whole = np.frombuffer(area, np.uint8)
    for page in (0, n_pages + 1):
        address = ctypes.c_void_p(whole.ctypes.data + page * PAGE)
        assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(PAGE), 0) == 0
    stop = (n_pages + 1) * PAGE
    return whole[stop - n_bytes : stop]


def fenced_copy(blob: bytes) -> np.ndarray:
    view = fenced(len(blob))
    view[:] = np.frombuffer(blob, np.uint8)
    return view


@st.composite
def frames(draw) -> tuple[np.ndarray, bytes]:
    """An array and its frame: all element sizes, block sizes, tails, and contents from zeros to noise."""
    item_bytes = draw(st.sampled_from([1, 2, 4, 8]))
    n = draw(st.one_of(st.integers(1, 700), st.integers(1, 40_000)))
    per_block = 8 * draw(st.one_of(st.integers(1, 20), st.integers(1, 1100)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    largest = 2 ** draw(st.integers(0, 8 * item_bytes)) - 1
    array = random.integers(0, largest, n, dtype=f"u{item_bytes}", endpoint=True)
    array[random.random(n) < draw(st.sampled_from([0, 0.5, 0.99]))] = 0
    return array, in_blocks(array, per_block)


@settings(deadline=None)
@given(frame=frames())
def test_compiled_gives_what_was_encoded_and_the_plain_ones_give(frame):
    array, blob = frame
    _, block_bytes = HEAD.unpack_from(blob)
    view, results = fenced_copy(blob), []
    for implementation in (PLAIN, COMPILED):
        out = fenced(array.nbytes).view(array.dtype)
        out[:] = ~array
        implementation.decode_bslz4(view, out, block_bytes)
        results.append(out)
    assert np.array_equal(results[0], array)
    assert np.array_equal(results[1], array)


@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
@pytest.mark.parametrize("extra", [0, 8, 56, 64, 71])
@pytest.mark.parametrize("block_bytes", [8192, 1 << 20], ids=["usual blocks", "large blocks"])
def test_large_frames(item_bytes, extra, block_bytes):
    array = np.random.default_rng(2).integers(0, 200, 3_000_000 + extra).astype(f"u{item_bytes}")
    out = np.empty_like(array)
    COMPILED.decode_bslz4(np.frombuffer(in_blocks(array, block_bytes // item_bytes), np.uint8), out, block_bytes)
    assert np.array_equal(out, array)


@settings(deadline=None, max_examples=300)
@given(frame=frames(), damage=st.data())
def test_damage_stays_within_the_buffers(frame, damage):
    """Neither a byte behind the input nor one around the output is touched, whatever the bytes say."""
    array, blob = frame
    damaged = bytearray(blob)
    for _ in range(damage.draw(st.integers(1, 3))):
        at = damage.draw(st.one_of(st.integers(HEAD_BYTES, HEAD_BYTES + 8), st.integers(0, len(blob) - 1)))
        damaged[at % len(blob)] = damage.draw(st.integers(0, 255))
    stop = damage.draw(st.one_of(st.just(len(blob)), st.integers(0, len(blob))))
    view, out = fenced_copy(bytes(damaged[:stop])), fenced(array.nbytes).view(array.dtype)
    block_bytes = damage.draw(st.sampled_from([HEAD.unpack_from(blob)[1], 0, 1, 8192, 2**31, 2**32 - 1]))
    try:
        COMPILED.decode_bslz4(view, out, block_bytes)
    except BadFrame:
        return
    assert stop == len(blob)


@settings(deadline=None)
@given(blob=st.binary(min_size=HEAD_BYTES, max_size=300), n_blocks=st.integers(0, 80))
def test_both_walks_end_at_the_same_byte(blob, n_blocks):
    view = fenced_copy(blob)
    ends = [kind.end_of_blocks(view, HEAD_BYTES, n_blocks) for kind in (PLAIN, COMPILED)]
    assert ends[0] == ends[1] or min(ends) > len(blob)


@settings(deadline=None)
@given(blob=st.binary(max_size=5000))
def test_both_checksums_are_the_same(blob):
    view = np.frombuffer(blob, np.uint8)
    assert COMPILED.crc32c(blob) == COMPILED.crc32c(view) == PLAIN.crc32c(blob)


ARRAY = np.arange(64 * 80, dtype="u2").reshape(64, 80) % 300
GOOD = encode(ARRAY)


@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param(GOOD, id="bytes"),
        pytest.param(bytearray(GOOD), id="bytearray"),
        pytest.param(memoryview(b"x" + GOOD)[1:], id="memoryview"),
        pytest.param(np.frombuffer(GOOD, np.uint8), id="array"),
        pytest.param(np.frombuffer(GOOD, np.uint8).copy(), id="writable array"),
    ],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_any_buffer_decodes(in_use, buffer, trusted):
    assert np.array_equal(decode_into(buffer, np.empty_like(ARRAY), trusted=trusted), ARRAY)


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64", "complex64", "complex128", ">u2", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7, 9), (1000,)], ids=str)
def test_any_dtype_and_shape_decodes(in_use, dtype, shape):
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 120).astype(dtype)
    blob = HEAD.pack(array.nbytes, 8192) + bitshuffle.compress_lz4(array.reshape(-1), 8192 // array.itemsize).tobytes()
    assert np.array_equal(decode(blob, shape, dtype), array)


def test_what_lz4_refuses_is_a_bad_frame(in_use):
    """The block lengths are right, so only decoding finds it."""
    first = HEAD_BYTES + 4
    blob = GOOD[:first] + b"\xff" * 100 + GOOD[first + 100 :]
    check_blob(blob, "bslz4", ARRAY.shape, "u2")
    with pytest.raises(BadFrame, match="damaged"):
        decode(blob, ARRAY.shape, "u2")


def test_threads_share_nothing():
    """Four threads decode different frames at once, over and over."""
    arrays = [np.random.default_rng(k).integers(0, 50 * (k + 1), 300_000).astype("u2") for k in range(4)]
    blobs = [np.frombuffer(encode(array), np.uint8) for array in arrays]
    wrong = []

    def decode_often(k: int) -> None:
        out = np.empty_like(arrays[k])
        for _ in range(50):
            out[:] = 0
            COMPILED.decode_bslz4(blobs[k], out, 8192)
            if not np.array_equal(out, arrays[k]):
                wrong.append(k)

    threads = [threading.Thread(target=decode_often, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_other_threads_run_while_a_frame_is_decoded():
    """With the GIL held, this thread would stand still for as long as the call lasts."""
    array = np.zeros(200_000_000, "u1")
    blob, out = np.frombuffer(encode(array), np.uint8), np.empty_like(array)
    span = []

    def decode_it() -> None:
        started = time.perf_counter()
        COMPILED.decode_bslz4(blob, out, 8192)
        span[:] = started, time.perf_counter()

    def longest_pause() -> float:
        """Of this thread, while the other decodes; over the time that takes."""
        thread, looks = threading.Thread(target=decode_it), []
        thread.start()
        while thread.is_alive():
            looks.append(time.perf_counter())
        started, stopped = span
        moments = [started, *(t for t in looks if started < t < stopped), stopped]
        return max(np.diff(moments)) / (stopped - started)

    # On a busy machine the pause may be the scheduler's, but not each time.
    assert any(longest_pause() < 0.5 for _ in range(30))


def in_a_process(script: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    env = os.environ | environment
    return subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT, env=env, timeout=200).strip()


PROCESSORS = {
    "first 64-bit": ("x86-64", "+sse2"),
    "AVX2": ("haswell", "+avx2,+avx,+sse4.2,+ssse3"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 processors")
@pytest.mark.parametrize(
    "processor",
    [
        pytest.param(PROCESSORS["first 64-bit"], id="first 64-bit"),
        pytest.param(PROCESSORS["AVX2"], id="AVX2", marks=pytest.mark.campaign),
    ],
)
def test_code_for_other_processors(processor, tmp_path):
    """What this machine does by its best instructions, others do by theirs."""
    name, features = processor
    flags = Path("/proc/cpuinfo").read_text()
    if not all(feature[1:].replace(".", "_") in flags for feature in features.split(",")):
        pytest.skip(f"this machine cannot run code for {name}")
    script = (
        "from storage.compiled_kernels import COMPILED, agree;"
        "from storage.kernels import PLAIN;"
        "print(agree(COMPILED, PLAIN))"
    )
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert in_a_process(script, **environment) == "True"


DECODE = """
import sys, numpy as np, storage.codec as codec, storage.kernels as kernels
kernels._WORTH_COMPILING_BYTES = {worth}
array = np.arange(5000, dtype="u2")
for _ in range(10):
    codec.decode(codec.encode(array), array.shape, array.dtype)
print(kernels.kernels().name, "numba" in sys.modules, "awscrt" in sys.modules)
"""


@pytest.mark.parametrize(
    ("worth", "answer"),
    [(90_000, "compiled True True"), (2 << 30, "plain False False")],
    ids=["much was read", "little was read"],
)
def test_who_reads_much_gets_compiled_kernels(worth, answer):
    assert in_a_process(DECODE.format(worth=worth)) == answer


@pytest.mark.parametrize(
    ("cause", "setting"),
    [
        ("told not to compile", {"NUMBA_DISABLE_JIT": "1"}),
        ("Unknown cache locator", {"NUMBA_CACHE_LOCATOR_CLASSES": "Nowhere"}),
    ],
    ids=["not compiled", "nothing kept"],
)
def test_plain_kernels_stay_where_numba_cannot_be_used(cause, setting):
    script = (
        "import logging, sys; logging.basicConfig(stream=sys.stdout);"
        "from storage.kernels import kernels, use_compiled_kernels;"
        "print(use_compiled_kernels(), use_compiled_kernels(), kernels().name)"
    )
    printed = in_a_process(script, **setting)
    assert printed.endswith("False False plain")
    assert printed.count(cause) == 1


def test_kernels_that_differ_are_not_used(monkeypatch):
    wrong = Kernels("wrong", COMPILED.end_of_blocks, COMPILED.decode_bslz4, lambda _: 0)
    monkeypatch.setattr("storage.compiled_kernels.COMPILED", wrong)
    monkeypatch.setattr(kernels_module, "_has_tried", False)
    monkeypatch.setattr(kernels_module, "_in_use", PLAIN)
    assert not agree(wrong, PLAIN)
    assert not use_compiled_kernels()
    assert kernels() is PLAIN
