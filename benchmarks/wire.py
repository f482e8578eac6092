"""Sender to consumer through the service, three processes over TCP loopback, beside limits and peers.

The service receives, checks, journals and serves; a consumer group of one drains at once. In turn
with it, round after round, the same frames go through: a service that encrypts; bare loops of
three threads that receive, write and serve, one of them syncing its file; bare PUSH and PULL in one
hop and, through a relay, in two; a plain file; and the peers, Redis Streams and NATS JetStream.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.frames import FrameSet, Options, WorkFolder, Workload
from benchmarks.measure import Figure, Rounds, Target, absent, figure, in_rounds, interleave, percentile, rates
from benchmarks.peers import Peer, started_peers
from benchmarks.rig import BUFFER_BYTES, QUICK_BUFFER_BYTES, Drained, Rig
from benchmarks.store import write_plainly

__all__ = ["measure", "measure_large", "measure_large_long", "measure_long"]

log = logging.getLogger("benchmarks")

_RATE = 100.0
_STD_DAQ_GB_PER_CORE_S = 1.0
# A long series holds so many more frames than the fastest short one would need for it.
_MARGIN = 1.2
# A long series takes at most this share of the disk that is free; two are there at a time.
_OF_FREE_DISK = 0.4
_OF_BARE, _OF_RAW = Target("of limit", 0.8), Target("of limit", 0.6)
_AHEAD, _AIM = Target("of limit", 1.0), Target("at least", 500.0)
_P50, _P99 = Target("at most", 3.0), Target("at most", 10.0)
_NONE_LOST = Target("at most", 0.0)
_WAYS = {
    "detector": "detector: ingest + store + drain",
    "stored": "producer, stored, plain: ingest + store + drain",
    "durable": "producer, durable, plain: ingest + store + drain",
    "stored, CURVE": "producer, stored, CURVE: ingest + store + drain",
    "durable, CURVE": "producer, durable, CURVE: ingest + store + drain",
}
# What stands beside each way, as durable as it is; nothing there encrypts.
_BARE = {
    "detector": "bare",
    "stored": "bare",
    "durable": "bare, synced",
    "stored, CURVE": "bare",
    "durable, CURVE": "bare, synced",
}
# How often a service syncs what is to be durable, and so the loop beside it.
_SYNC_S = 0.1
_BARE_NAMES = {
    "bare": "bare loop: receive, write, serve",
    "bare, synced": f"bare loop, synced every {1000 * _SYNC_S:g} ms",
}
# No further round begins after so long.
_WITHIN_S = 150.0


@dataclass(frozen=True)
class _Size:
    """One kind of frames: how many make a series, and how it is called in the table."""

    workload: Workload
    n: int
    title: str


@dataclass(frozen=True)
class _Rigs:
    """Two of each, started once: one service encrypts, and the bare loop beside it syncs."""

    plain: Rig
    curve: Rig


def measure(options: Options) -> list[Figure]:
    """Throughput and latency of detector frames of the size asked for."""
    size = _usual(options)
    with WorkFolder(options, "wire") as folder, _started(options, folder, size) as rigs:
        figures = _of_size(options, rigs, folder, size)
        return [*figures, *_latency(options, rigs.plain, options.choose(40, 300))]


def measure_large(options: Options) -> list[Figure]:
    """Throughput of frames of 16 million pixels of 32 bits."""
    size = _large(options)
    with WorkFolder(options, "wire-16M") as folder, _started(options, folder, size) as rigs:
        return _of_size(options, rigs, folder, size)


def measure_long(options: Options) -> list[Figure]:
    """A minute without a pause."""
    return _without_a_pause(options, _usual(options))


def measure_large_long(options: Options) -> list[Figure]:
    """A minute without a pause, of large frames."""
    return _without_a_pause(options, _large(options))


def _usual(options: Options) -> _Size:
    return _Size(Workload(options.size, n_unique=options.choose(8, 32)), options.choose(40, 400), "")


def _large(options: Options) -> _Size:
    return _Size(Workload("16M", "uint32", options.choose(2, 8)), options.choose(10, 100), "16M uint32: ")


@contextmanager
def _started(options: Options, folder: Path, size: _Size) -> Iterator[_Rigs]:
    buffer_bytes = options.choose(QUICK_BUFFER_BYTES, BUFFER_BYTES)
    with (
        Rig(folder / "plain", size.workload, buffer_bytes=buffer_bytes) as plain,
        Rig(folder / "curve", size.workload, buffer_bytes=buffer_bytes, sync_s=_SYNC_S, encrypts=True) as curve,
    ):
        plain.warm_up()
        curve.warm_up()
        yield _Rigs(plain, curve)


def _of_size(options: Options, rigs: _Rigs, folder: Path, size: _Size) -> list[Figure]:
    with started_peers(rigs.plain, folder) as peers:
        t, cpu_ms = _rounds(options, rigs, peers, size.n)
    return _throughput(rigs.plain.frames, size, t, cpu_ms, peers)


def _rounds(options: Options, rigs: _Rigs, peers: list[Peer], n: int) -> tuple[Rounds, Rounds]:
    """s a series by contender, and CPU time of the service a frame, ms, by way through it."""
    plain, curve, cpu_ms = rigs.plain, rigs.curve, dict[str, list[float]]()

    def through(way: str, rig: Rig, series: Callable[[], Drained]) -> Callable[[], float]:
        def once() -> float:
            before = rig.service_cpu_s()
            seconds = series().seconds
            cpu_ms.setdefault(way, []).append(1e3 * (rig.service_cpu_s() - before) / n)
            return seconds

        return once

    ways: dict[str, Callable[[], float]] = {
        "detector": through("detector", plain, lambda: plain.series(n)),
        "bare": lambda: plain.bare(n).seconds,
        "stored": through("stored", plain, lambda: plain.produced(n)),
        "durable": through("durable", plain, lambda: plain.produced(n, ack="durable")),
        "bare, synced": lambda: curve.bare(n).seconds,
        "stored, CURVE": through("stored, CURVE", curve, lambda: curve.produced(n)),
        "durable, CURVE": through("durable, CURVE", curve, lambda: curve.produced(n, ack="durable")),
        "one hop": lambda: plain.raw(n, 1).seconds,
        "two hops": lambda: plain.raw(n, 2).seconds,
        "file": lambda: write_plainly(plain.root, plain.frames, n, sync=False),
        "memcpy": lambda: _copy(plain.frames, n),
    }
    ways |= {peer.name: _series_of(peer, n) for peer in peers if peer.at_once}
    t = interleave(ways, options.choose(1, 7), within_s=_WITHIN_S)
    return t, {way: values[1:] for way, values in cpu_ms.items()}  # without the warm-up


def _series_of(peer: Peer, n: int) -> Callable[[], float]:
    assert peer.at_once is not None
    series = peer.at_once
    return lambda: series(n)


def _copy(frames: FrameSet, n: int) -> float:
    """s to copy n blobs in memory, one after the other to the same place."""
    place = np.empty(max(len(blob) for blob in frames.blobs), np.uint8)
    started = time.perf_counter()
    for index in range(n):
        blob = np.frombuffer(frames.blob(index), np.uint8)
        np.copyto(place[: blob.size], blob)
    return time.perf_counter() - started


def _throughput(frames: FrameSet, size: _Size, t: Rounds, cpu_ms: Rounds, peers: list[Peer]) -> list[Figure]:
    title = size.title
    per_second = {name: rates(size.n, seconds) for name, seconds in t.items()}
    raw = (
        "lower of raw ZMQ and plain file write",
        [min(pair) for pair in zip(per_second["one hop"], per_second["file"], strict=True)],
    )

    def row(way: str, limit: tuple[str, Sequence[float]] | None, target: Target | None = None) -> Figure:
        name = f"{title}{_WAYS[way]}"
        return figure(name, "frames/s", per_second[way], limit, higher_is_better=True, target=target)

    figures = []
    for way, bare in _BARE.items():
        is_plain, is_durable = "CURVE" not in way, "durable" in way
        beside = (_BARE_NAMES[bare], per_second[bare])
        figures.append(row(way, beside, _OF_BARE if is_plain else None))
        if not is_plain:
            figures.append(row(way, ("the same, plain", per_second["durable" if is_durable else "stored"])))
        elif not is_durable:
            figures.append(row(way, raw, _OF_RAW))
        if is_plain and way != "detector":
            figures += [
                row(way, _beside_peer(peer, per_second), _AHEAD) for peer in peers if peer.is_durable == is_durable
            ]
    if not title:
        figures.insert(0, row("detector", None, _AIM))
    figures += [row("detector", limit) for limit in _simple_limits(size.n, t, per_second)]
    return [*figures, *_cost(frames, size, per_second["detector"], cpu_ms)]


def _beside_peer(peer: Peer, per_second: Rounds) -> tuple[str, Sequence[float]]:
    return (peer.name, per_second[peer.name]) if peer.at_once else absent(peer.name, peer.why_not)


def _simple_limits(n: int, t: Rounds, per_second: Rounds) -> list[tuple[str, Sequence[float]]]:
    """Each thing that must be done, done alone."""
    one_after_other = rates(n, [a + b for a, b in zip(t["two hops"], t["file"], strict=True)])
    return [
        ("raw ZMQ, one hop, nothing stored", per_second["one hop"]),
        ("raw ZMQ relay, two hops, nothing stored", per_second["two hops"]),
        ("plain file write alone", per_second["file"]),
        ("relay, then file write", one_after_other),
        ("memcpy of the blobs", per_second["memcpy"]),
    ]


def _cost(frames: FrameSet, size: _Size, per_second: list[float], cpu_ms: Rounds) -> list[Figure]:
    """What the service uses, and that nothing was lost: a series that is not whole would have ended it all."""
    title, gigabytes = size.title, frames.total_bytes(size.n) / size.n / 1e9
    a_core_second = [gigabytes / (ms / 1e3) for ms in cpu_ms["detector"]]
    published = ("published: std-daq, 1 GB/s a core", [_STD_DAQ_GB_PER_CORE_S])
    return [
        figure(
            f"{title}{_WAYS['detector']}", "GB/s compressed", [gigabytes * v for v in per_second], higher_is_better=True
        ),
        *(
            figure(f"{title}CPU of the service a frame, {way}", "ms", values, higher_is_better=False)
            for way, values in cpu_ms.items()
        ),
        figure(
            f"{title}service, compressed bytes a core second", "GB/s", a_core_second, published, higher_is_better=True
        ),
        figure(f"{title}frames lost", "frames", [0.0] * len(per_second), higher_is_better=False, target=_NONE_LOST),
    ]


def _without_a_pause(options: Options, size: _Size) -> list[Figure]:
    """A minute, in which the disk must write back what it was given; then the bare loop the same.

    Before both, the bare loop once for nothing, and what one leaves in the page cache is freed as the next begins: who
    comes to memory that nobody has used for a while pays for it, on a virtual machine with 3 ms for 1.2 MB.
    """
    seconds, buffer_bytes = options.choose(2, 60), options.choose(QUICK_BUFFER_BYTES, BUFFER_BYTES)
    with (
        WorkFolder(options, "minute") as folder,
        Rig(folder / "plain", size.workload, buffer_bytes=buffer_bytes) as rig,
        Rig(folder / "synced", size.workload, sync_s=_SYNC_S) as synced,
    ):
        rig.warm_up()
        fastest = max(size.n / rig.series(size.n).seconds for _ in in_rounds(3))
        room = _OF_FREE_DISK * shutil.disk_usage(rig.root).free
        n = min(round(_MARGIN * seconds * fastest), int(room * size.n / rig.frames.total_bytes(size.n)))
        log.info("%d frames through the bare loop, through the service, and through the bare loop again", n)
        rig.bare(n)
        rig.empty()
        ours = rig.series(n).seconds
        rig.empty()
        bare = rig.bare(n).seconds
        rig.empty()
        bare_synced = synced.bare(n).seconds
    limit = (f"bare loop, {bare:.0f} s", rates(n, [bare]))
    as_durable = (f"{_BARE_NAMES['bare, synced']} as the service's, {bare_synced:.0f} s", rates(n, [bare_synced]))
    name = f"{size.title}{ours:.0f} s: {_WAYS['detector']}"
    return [
        figure(name, "frames/s", rates(n, [ours]), limit, higher_is_better=True, target=_OF_BARE),
        figure(name, "frames/s", rates(n, [ours]), as_durable, higher_is_better=True, target=_OF_BARE),
        figure(f"{size.title}without a pause", "s", [ours], higher_is_better=True, target=Target("at least", seconds)),
        figure(f"{size.title}{ours:.0f} s: frames lost", "frames", [0.0], higher_is_better=False, target=_NONE_LOST),
    ]


def _latency(options: Options, rig: Rig, n: int) -> list[Figure]:
    """Send to receipt at a steady rate; the frames of all rounds together."""
    ways = {
        "detector": lambda: rig.series(n, _RATE),
        "producer": lambda: rig.produced(n, _RATE),
        "one hop": lambda: rig.raw(n, 1, _RATE),
        "two hops": lambda: rig.raw(n, 2, _RATE),
    }
    latencies: dict[str, list[float]] = {name: [] for name in ways}
    for _ in in_rounds(options.choose(1, 3)):
        for name, way in ways.items():
            latencies[name] += way().latencies_ms
    figures = []
    for percent, target in ((50, _P50), (99, _P99)):
        at = {name: percentile(values, percent) for name, values in latencies.items()}
        for ours, hops, limit in (
            ("detector", "one hop", "raw ZMQ, one hop"),
            ("detector", "two hops", "raw ZMQ relay, two hops"),
            ("producer", "two hops", "raw ZMQ relay, two hops"),
        ):
            name = f"{ours}: send to receipt at {_RATE:g} frames/s, p{percent}"
            figures.append(figure(name, "ms", [at[ours]], (limit, [at[hops]]), higher_is_better=False, target=target))
    return figures
