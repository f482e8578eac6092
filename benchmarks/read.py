"""Reading frames of a finished run, from the page cache to pixels."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from benchmarks.frames import SOURCE, FrameSet, Options, WorkFolder, stored_run
from benchmarks.measure import Figure, Target, clock, figure, interleave, rates
from storage.codec import BLOCK_BYTES, decode, decode_into
from storage.kernels import PLAIN, use_compiled_kernels
from storage.run_folder import RunFolder
from storage.stream_source import FolderSource
from streaming.retrieval import open_run

__all__ = ["measure"]

_N_THREADS = 2
_OF_BARE, _OF_ZARR = Target("of limit", 0.8), Target("of limit", 3.0)


def measure(options: Options) -> list[Figure]:
    use_compiled_kernels()
    frames, n = FrameSet.make(options.size, 32), options.choose(20, 100)
    with WorkFolder(options, "read") as root:
        folder = stored_run(root, frames, 1, n, 50)
        source, stream = FolderSource(folder, SOURCE), open_run(folder.path)[SOURCE]
        array: Any = zarr.open_array(folder.stream(SOURCE).array, mode="r")
        places = _places(folder, n)
        descriptors = {path: os.open(path, os.O_RDONLY) for path, _, _ in places}
        reused = threading.local()

        def out() -> np.ndarray:
            """This thread's own buffer, used over and over."""
            if not hasattr(reused, "pixels"):
                reused.pixels = np.empty(frames.shape, frames.dtype)
            return reused.pixels

        def bare(index: int) -> None:
            path, offset, length = places[index]
            decode_into(os.pread(descriptors[path], length, offset), out(), trusted=True)

        def wheel(index: int) -> None:
            path, offset, length = places[index]
            view = np.frombuffer(os.pread(descriptors[path], length, offset), np.uint8)
            PLAIN.decode_bslz4(view, out(), BLOCK_BYTES)

        def own_new(index: int) -> None:
            decode(source.read_one(index).blob, frames.shape, frames.dtype)

        def own_into(index: int) -> None:
            decode_into(source.read_one(index).blob, out())

        def trusted(index: int) -> None:
            decode_into(source.read_one(index).blob, out(), trusted=True)

        def one_of_each(index: int) -> None:
            np.testing.assert_array_equal(array[index], frames.pixels(index))
            own_into(index)
            np.testing.assert_array_equal(out(), frames.pixels(index))

        one_of_each(n - 1)
        per_round = options.choose(5, 10)
        readers: dict[str, Callable[[int], object]] = {
            "bare": bare,
            "wheel": wheel,
            "new": own_new,
            "into": own_into,
            "trusted": trusted,
            "stream": lambda index: stream[index].data,
            "zarr": lambda index: array[index],
        }
        rounds = {name: clock(_next_frame(read, n), per_round) for name, read in readers.items()}
        with ThreadPoolExecutor(_N_THREADS) as pool:
            rounds |= {
                f"{name} in threads": _in_threads(pool, _next_frame(readers[name], n), per_round)
                for name in ("bare", "wheel", "trusted", "zarr")
            }
            t = interleave(rounds, options.choose(3, 15))
        for fd in descriptors.values():
            os.close(fd)
    frames_per_second = {name: rates(1, seconds) for name, seconds in t.items()}
    words = {
        "trusted": "read_one, decode into a reused buffer, crc32c only",
        "into": "read_one, decode into a reused buffer, crc32c and block walk",
        "new": "read_one, decode into a new array",
        "stream": 'nearline.open(…)["eiger"][i].data',
        "trusted in threads": f"the first of these, {_N_THREADS} threads",
    }
    # What a reader of the public API gets, and what ours is made of.
    targets = {("bare", "stream"): _OF_BARE, ("zarr", "trusted"): _OF_ZARR}
    figures = []
    peers = {
        "bare": "pread + decode, no checks",
        "wheel": "pread + bitshuffle's decoder",
        "zarr": 'zarr.open(…)["data"][i]',
    }
    for peer, name in peers.items():
        for key, text in words.items():
            beside, where = (f"{peer} in threads", f", {_N_THREADS} threads") if "threads" in key else (peer, "")
            limit, target = (name + where, frames_per_second[beside]), targets.get((peer, key))
            ours = frames_per_second[key]
            figures.append(figure(text, "frames/s", ours, limit, higher_is_better=True, target=target))
    return figures


def _in_threads(pool: ThreadPoolExecutor, read_next: Callable[[], object], n: int) -> Callable[[], float]:
    """A round in which each thread reads n frames: s per frame of all of them."""

    def some() -> None:
        for _ in range(n):
            read_next()

    def once() -> float:
        started = time.perf_counter()
        for future in [pool.submit(some) for _ in range(_N_THREADS)]:
            future.result()
        return (time.perf_counter() - started) / (n * _N_THREADS)

    return once


def _next_frame(read: Callable[[int], object], n: int) -> Callable[[], object]:
    """A call that reads the next frame each time, around and around the run."""
    numbers = count()
    return lambda: read(next(numbers) % n)


def _places(folder: RunFolder, n: int) -> list[tuple[Path, int, int]]:
    """Shard, offset and length without the crc32c of each frame, from the shards' own index."""
    paths, header = folder.stream(SOURCE), folder.stream_header(SOURCE)
    size, found = header.frames_per_chunk, []
    for chunk in range(-(-n // size)):
        path = paths.shard(chunk, len(header.shape))
        rows = np.frombuffer(path.read_bytes()[-(16 * size + 4) : -4], "<u8").reshape(size, 2)
        found += [(path, int(at), int(length) - 4) for at, length in rows[: min(size, n - chunk * size)]]
    return found
