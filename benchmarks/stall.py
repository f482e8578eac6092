"""One consumer group stalls while gigabytes pass: what the service's memory and the other group make of it."""

import time
from dataclasses import dataclass, field

from benchmarks.frames import FramesLost, Options, WorkFolder, Workload
from benchmarks.measure import Figure, Target, figure, interleave, rates
from benchmarks.rig import BUFFER_BYTES, PATIENCE_S, QUICK_BUFFER_BYTES, Rig
from streaming.retrieval import Stream

__all__ = ["measure", "measure_long"]

# What the service may take in memory beside its buffer.
_BESIDE_BYTES = 400_000_000
_QUICK_BYTES, _BYTES, _MOST_BYTES = 100_000_000, 2_000_000_000, 10_000_000_000
_UNAFFECTED = Target("of limit", 0.9)
_NONE_LOST = Target("at most", 0.0)


@dataclass
class _Seen:
    """Of each round: the service's most resident memory, MB, and how long the stalled group took afterwards, s."""

    peak_mb: list[float] = field(default_factory=list)
    peak_alone_mb: list[float] = field(default_factory=list)
    catching_up_s: list[float] = field(default_factory=list)


def measure(options: Options) -> list[Figure]:
    """2 GB past the stalled group, in several rounds."""
    return _measure(options, options.choose(_QUICK_BYTES, _BYTES), options.choose(1, 3))


def measure_long(options: Options) -> list[Figure]:
    """10 GB, once."""
    return _measure(options, options.choose(_QUICK_BYTES, _MOST_BYTES), 1)


def _measure(options: Options, n_bytes: int, repeats: int) -> list[Figure]:
    workload, seen = Workload(options.size, n_unique=options.choose(8, 32)), _Seen()
    buffer_bytes = options.choose(QUICK_BUFFER_BYTES, BUFFER_BYTES)
    with WorkFolder(options, "stall") as folder, Rig(folder, workload, buffer_bytes=buffer_bytes) as rig:
        rig.fill()
        n = n_bytes * len(rig.frames.blobs) // rig.frames.total_bytes(len(rig.frames.blobs))
        ways = {"alone": lambda: _alone(rig, n, seen), "beside": lambda: _beside_a_stalled_one(rig, n, seen)}
        t = interleave(ways, repeats, warm_up=False)
        gigabytes = rig.frames.total_bytes(n) / 1e9
    what = f"a group stalled for {gigabytes:.1f} GB: "
    nobody, behind = "nobody stalled", rates(n, seen.catching_up_s)
    return [
        figure(
            f"{what}peak memory, buffer {buffer_bytes >> 20} MiB", "MB", seen.peak_mb, (nobody, seen.peak_alone_mb),
            higher_is_better=False, target=Target("at most", (buffer_bytes + _BESIDE_BYTES) / 1e6),
        ),
        figure(
            f"{what}the other group", "frames/s", rates(n, t["beside"]), (nobody, rates(n, t["alone"])),
            higher_is_better=True, target=_UNAFFECTED,
        ),
        figure(f"{what}it catches up afterwards", "frames/s", behind, higher_is_better=True),
        figure(f"{what}frames lost", "frames", [0.0], higher_is_better=False, target=_NONE_LOST),
    ]  # fmt: skip


def _alone(rig: Rig, n: int, seen: _Seen) -> float:
    rig.forget_peak_memory()
    seconds = rig.series(n).seconds
    seen.peak_alone_mb.append(rig.peak_memory_bytes() / 1e6)
    return seconds


def _beside_a_stalled_one(rig: Rig, n: int, seen: _Seen) -> float:
    """s of the other group; the stalled one takes a frame as soon as there is one, and no more until all is over."""
    rig.forget_peak_memory()
    stream = rig.start_series(n)
    rig.tell_series(n)
    stalled = stream.follow(group="stalled", timeout=PATIENCE_S)
    indices = [next(stalled).frame_index]
    drained = rig.drained(stream, n)
    started = time.perf_counter()
    indices += [frame.frame_index for frame in stalled]
    seen.catching_up_s.append(time.perf_counter() - started)
    seen.peak_mb.append(rig.peak_memory_bytes() / 1e6)
    _require_all(stream, n, indices)
    rig.forget(stream)
    return drained.seconds


def _require_all(stream: Stream, n: int, indices: list[int]) -> None:
    """Every frame at least once: what it held while it stalled may have come again."""
    if set(indices) != set(range(n)):
        raise FramesLost(f"the stalled group got {len(set(indices))} of {n} frames; ledger: {stream.ledger()}")
