"""Sender to consumer through the service, three processes over TCP loopback, beside limits and peers.

The service receives, checks, journals and serves; a consumer group of one drains at once. In turn
with it, round after round, the same frames go through: a bare loop of three threads that
receives, writes and serves; bare PUSH and PULL in one hop and, through a relay, in two; a plain
file; and the peers, Redis Streams and NATS JetStream.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.frames import FrameSet, Options, WorkFolder, Workload
from benchmarks.measure import Figure, Rounds, Target, absent, figure, interleave, percentile, rates
from benchmarks.peers import Peer, started_peers
from benchmarks.rig import Rig
from benchmarks.store import write_plainly

__all__ = ["measure"]

_RATE = 100.0
_STD_DAQ_GB_PER_CORE_S = 1.0
# A long series holds so many more frames than the fastest short one would need for it.
_MARGIN = 1.2
# A long series takes at most this share of the disk that is free.
_OF_FREE_DISK = 0.6
_OF_BARE, _OF_RAW = Target("of limit", 0.8), Target("of limit", 0.6)
_AHEAD, _AIM = Target("of limit", 1.0), Target("at least", 500.0)
_P50, _P99 = Target("at most", 3.0), Target("at most", 10.0)
_NONE_LOST = Target("at most", 0.0)
_WAYS = {
    "detector": "detector: ingest + store + drain",
    "stored": "producer, stored, plain: ingest + store + drain",
}
_PRODUCERS = ("stored",)
_DURABLE: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Size:
    """One kind of frames: how many make a series, and how it is called in the table."""

    workload: Workload
    n: int
    title: str


def measure(options: Options) -> list[Figure]:
    size = _Size(Workload(options.size), options.choose(40, 400), "")
    large = _Size(Workload("16M", "uint32", 8), options.choose(40, 100), "16M uint32: ")
    return [one for each in ([size, large] if options.full else [size]) for one in _of_size(options, each)]


def _of_size(options: Options, size: _Size) -> list[Figure]:
    with (
        WorkFolder(options, "wire") as folder,
        Rig(folder, size.workload) as rig,
        started_peers(rig, folder) as peers,
    ):
        t, cpu_ms = _rounds(options, rig, peers, size.n)
        figures = _throughput(rig, size, t, cpu_ms, peers)
        if options.full:
            figures += _long(rig, size, max(rates(size.n, t["detector"])), options.choose(3, 60))
        if not size.title:
            figures += _latency(options, rig, options.choose(40, 300))
        return figures


def _rounds(options: Options, rig: Rig, peers: list[Peer], n: int) -> tuple[Rounds, list[float]]:
    """s a series by contender, and the service's CPU time a frame, ms."""
    cpu_ms: list[float] = []

    def through_service() -> float:
        before = rig.service_cpu_s()
        seconds = rig.series(n).seconds
        cpu_ms.append(1e3 * (rig.service_cpu_s() - before) / n)
        return seconds

    ways: dict[str, Callable[[], float]] = {
        "detector": through_service,
        "bare": lambda: rig.bare(n).seconds,
        "stored": lambda: rig.produced(n).seconds,
        "one hop": lambda: rig.raw(n, 1).seconds,
        "two hops": lambda: rig.raw(n, 2).seconds,
        "file": lambda: write_plainly(rig.root, rig.frames, n, sync=False),
        "memcpy": lambda: _copy(rig.frames, n),
    }
    ways |= {peer.name: _series_of(peer, n) for peer in peers if peer.at_once}
    repeats = options.choose(2, 7)
    t = interleave(ways, repeats)
    return t, cpu_ms[-repeats:]  # without the warm-up


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


def _throughput(rig: Rig, size: _Size, t: Rounds, cpu_ms: list[float], peers: list[Peer]) -> list[Figure]:
    n, title = size.n, size.title
    per_second = {name: rates(n, seconds) for name, seconds in t.items()}
    lower = [min(pair) for pair in zip(per_second["one hop"], per_second["file"], strict=True)]
    one_after_other = rates(n, [a + b for a, b in zip(t["two hops"], t["file"], strict=True)])
    bare = ("bare loop: receive, write, serve", per_second["bare"])
    raw = ("lower of raw ZMQ and plain file write", lower)

    def row(way: str, limit: tuple[str, Sequence[float]] | None, target: Target | None = None) -> Figure:
        name = f"{title}{_WAYS[way]}"
        return figure(name, "frames/s", per_second[way], limit, higher_is_better=True, target=target)

    figures = [row("detector", bare, _OF_BARE), row("detector", raw, _OF_RAW)]
    if not title:
        figures.append(row("detector", None, _AIM))
    for limit, values in (
        ("raw ZMQ, one hop, nothing stored", per_second["one hop"]),
        ("raw ZMQ relay, two hops, nothing stored", per_second["two hops"]),
        ("plain file write alone", per_second["file"]),
        ("relay, then file write", one_after_other),
        ("memcpy of the blobs", per_second["memcpy"]),
    ):
        figures.append(row("detector", (limit, values)))
    for way in _PRODUCERS:
        figures += [row(way, bare, _OF_BARE), row(way, raw, _OF_RAW)]
        for peer in peers:
            if peer.is_durable == (way in _DURABLE):
                limit = (peer.name, per_second[peer.name]) if peer.at_once else absent(peer.name, peer.why_not)
                figures.append(row(way, limit, _AHEAD))
    gigabytes = rig.frames.total_bytes(n) / n / 1e9
    published = ("published: std-daq, 1 GB/s a core", [_STD_DAQ_GB_PER_CORE_S])
    return [
        *figures,
        figure(
            f"{title}{_WAYS['detector']}", "GB/s compressed", [gigabytes * v for v in per_second["detector"]],
            higher_is_better=True,
        ),
        figure(f"{title}CPU of the service a frame", "ms", cpu_ms, higher_is_better=False),
        figure(
            f"{title}service, compressed bytes a core second", "GB/s", [gigabytes / (ms / 1e3) for ms in cpu_ms],
            published, higher_is_better=True,
        ),
        figure(f"{title}frames lost", "frames", [0.0] * len(cpu_ms), higher_is_better=False, target=_NONE_LOST),
    ]  # fmt: skip


def _long(rig: Rig, size: _Size, fastest: float, seconds: float) -> list[Figure]:
    """A minute without a pause, where the disk must write back what it was given; then the bare loop the same."""
    room = _OF_FREE_DISK * shutil.disk_usage(rig.root).free
    n = min(round(_MARGIN * seconds * fastest), int(room * size.n / rig.frames.total_bytes(size.n)))
    ours, bare = rig.series(n).seconds, rig.bare(n).seconds
    limit = (f"bare loop, {bare:.0f} s", rates(n, [bare]))
    name = f"{size.title}{ours:.0f} s: {_WAYS['detector']}"
    return [
        figure(name, "frames/s", rates(n, [ours]), limit, higher_is_better=True, target=_OF_BARE),
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
    for _ in range(options.choose(1, 3)):
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
