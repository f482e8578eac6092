"""Writing a run: the journal that becomes the shard, beside a plain sequential file of the same blobs."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.frames import EXPERIMENT, FrameSet, Options, WorkFolder, open_store, raw_frames
from benchmarks.measure import Figure, Rounds, figure, interleave, rates
from storage.frame import FrameInfo, blob_crc32c, blob_digest

__all__ = ["measure", "write_plainly"]

_FRAMES_PER_CHUNK = 100


def measure(options: Options) -> list[Figure]:
    frames, n = FrameSet.make(options.size, 32), options.choose(60, 400)
    with WorkFolder(options, "store") as folder:
        t = interleave(
            {
                "plain": lambda: write_plainly(folder, frames, n, sync=False),
                "append": lambda: _append(folder, frames, n, digests=False),
                "whole": lambda: _append(folder, frames, n, digests=True),
                "plain durable": lambda: write_plainly(folder, frames, n, sync=True),
                "durable": lambda: _append(folder, frames, n, digests=True, sync=True),
                "sealed": lambda: _append(folder, frames, n, digests=True, seal=True),
            },
            options.choose(2, 9),
        )
    megabytes = frames.total_bytes(n) / n / 1e6
    figures = [
        _beside("journal append alone, page cache", t, "append", "plain", n, "plain file write"),
        _beside("append with crc32c and XXH3, page cache", t, "whole", "plain", n, "plain file write"),
        _beside("append with crc32c and XXH3, durable", t, "durable", "plain durable", n, "plain file + fdatasync"),
        _beside("the same with sealing of every chunk", t, "sealed", "plain durable", n, "plain file + fdatasync"),
    ]
    in_bytes = [_in_gigabytes(one, megabytes) for one in figures[1:3]]
    return [*figures, *in_bytes]


def write_plainly(folder: Path, frames: FrameSet, n: int, *, sync: bool) -> float:
    """s to write n blobs one after the other into one file."""
    path = folder / "plain"
    started = time.perf_counter()
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for index in range(n):
        os.write(fd, frames.blob(index))
    if sync:
        os.fdatasync(fd)
    os.close(fd)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _append(folder: Path, frames: FrameSet, n: int, *, digests: bool, sync: bool = False, seal: bool = False) -> float:
    """s to admit and append n frames as the recorder does, in one thread."""
    shutil.rmtree(folder / EXPERIMENT, ignore_errors=True)
    store = open_store(folder, frames, 1, n, _FRAMES_PER_CHUNK)
    ready = [] if digests else raw_frames(frames, 0, n)
    started = time.perf_counter()
    for index in range(n):
        if digests:
            blob = frames.blob(index)
            info = FrameInfo(
                frame_index=index, size_bytes=len(blob), crc32c=blob_crc32c(blob), digest=blob_digest(blob)
            )
        else:
            info, blob = ready[index].info, ready[index].blob
        store.admit(info)
        store.append(info, blob)
        if seal and (index + 1) % _FRAMES_PER_CHUNK == 0:
            store.seal_complete()
    if sync:
        store.sync()
    if seal:
        store.finish(n, "not received")
    seconds = time.perf_counter() - started
    store.close()
    shutil.rmtree(folder / EXPERIMENT)
    return seconds


def _beside(name: str, t: Rounds, ours: str, limit: str, n: int, limit_name: str) -> Figure:
    return figure(name, "frames/s", rates(n, t[ours]), (limit_name, rates(n, t[limit])), higher_is_better=True)


def _in_gigabytes(one: Figure, megabytes: float) -> Figure:
    """The same figure in bytes as they lie on disk."""
    factor = megabytes / 1e3
    assert one.limit_value is not None
    return replace(
        one, value=one.value * factor, unit="GB/s", limit_value=one.limit_value * factor,
        low=one.low * factor, high=one.high * factor,
    )  # fmt: skip
