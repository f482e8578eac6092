"""Small messages: rows of 1 kB metadata without payload, in batches and one at a time."""

import time
from collections.abc import Callable

from benchmarks.frames import SMALL_BLOBS, Options, WorkFolder, Workload
from benchmarks.measure import Figure, Rounds, Target, absent, figure, rates
from benchmarks.peers import Peer, started_peers
from benchmarks.rig import GROUP, PATIENCE_S, Rig

__all__ = ["measure"]

# Rows in one request of the producer.
_AT_ONCE = 1000
_IN, _OUT, _SINGLE = Target("at least", 30_000.0), Target("at least", 20_000.0), Target("at least", 5_000.0)


def measure(options: Options) -> list[Figure]:
    n, n_single = options.choose(2_000, 50_000), options.choose(200, 10_000)
    # No pixels are sent: the smallest detector will do.
    workload = Workload("512", n_unique=1)
    with WorkFolder(options, "small") as folder, Rig(folder, workload) as rig, started_peers(rig, folder) as peers:
        stored = [peer for peer in peers if not peer.is_durable]
        t = _rounds(rig, stored, n, n_single, options.choose(2, 7))
    sent, taken, single = (rates(count, t[name]) for name, count in (("in", n), ("out", n), ("single", n_single)))
    figures = [
        figure(f"1 kB rows in, {_AT_ONCE} a request", "rows/s", sent, higher_is_better=True, target=_IN),
        figure("1 kB rows out to a group of one", "rows/s", taken, higher_is_better=True, target=_OUT),
        figure(
            "1 kB row sent and acknowledged, one at a time", "requests/s", single,
            ("ZMQ request and reply of 1 kB", rates(n_single, t["echo"])), higher_is_better=True, target=_SINGLE,
        ),
        figure(
            "1 kB row read, one at a time", "requests/s", rates(n_single, t["read"]),
            ("ZMQ request and reply of 1 kB", rates(n_single, t["echo"])), higher_is_better=True, target=_SINGLE,
        ),
    ]  # fmt: skip
    for way, ours in (("in", sent), ("out", taken)):
        for peer in stored:
            limit = (peer.name, rates(n, t[f"{peer.name} {way}"])) if peer.in_turn else absent(peer.name, peer.why_not)
            figures.append(figure(f"1 kB rows {way}", "rows/s", ours, limit, higher_is_better=True))
    return figures


def _rounds(rig: Rig, peers: list[Peer], n: int, n_single: int, repeats: int) -> Rounds:
    """s by what was done; everything once before, to warm up."""
    t: Rounds = {}

    def note(name: str, seconds: float) -> None:
        t.setdefault(name, []).append(seconds)

    for number in range(repeats + 1):
        if number == 1:
            t.clear()
        _in_and_out(rig, n, note)
        _one_at_a_time(rig, n_single, note)
        note("echo", rig.echo_s(n_single, SMALL_BLOBS[0]))
        for peer in peers:
            if peer.in_turn:
                for way, seconds in zip(("in", "out"), peer.in_turn(n), strict=True):
                    note(f"{peer.name} {way}", seconds)
    return t


def _in_and_out(rig: Rig, n: int, note: Callable[[str, float], None]) -> None:
    """All rows stored, and only then taken by the group, so that neither waits for the other."""
    stream = rig.start("start_rows", n=n, ack="stored")
    sent = rig.ask("rows", n=n, at_once=_AT_ONCE)
    note("in", (sent["last_ns"] - sent["first_ns"]) / 1e9)
    started = time.perf_counter()
    seen = [frame.frame_index for frame in stream.follow(group=GROUP, timeout=PATIENCE_S)]
    note("out", time.perf_counter() - started)
    rig.require_whole(stream, n, seen)
    rig.forget(stream)


def _one_at_a_time(rig: Rig, n: int, note: Callable[[str, float], None]) -> None:
    stream = rig.start("start_rows", n=n, ack="stored")
    sent = rig.ask("rows", n=n, at_once=1)
    note("single", (sent["last_ns"] - sent["first_ns"]) / 1e9)
    started = time.perf_counter()
    seen = [stream[index].frame_index for index in range(n)]
    note("read", time.perf_counter() - started)
    rig.require_whole(stream, n, seen)
    rig.forget(stream)
