"""Small messages: rows of 1 kB metadata without payload, many under way and one at a time."""

import time
from collections.abc import Callable

from benchmarks.frames import SMALL_BLOBS, Options, WorkFolder, Workload
from benchmarks.measure import Figure, Rounds, Target, absent, figure, in_rounds, rates
from benchmarks.peers import Peer, started_peers
from benchmarks.rig import BUFFER_BYTES, GROUP, PATIENCE_S, QUICK_BUFFER_BYTES, Rig
from storage.models import StreamHeader
from streaming import wire
from streaming.client import Connection

__all__ = ["measure"]

_IN, _OUT, _SINGLE = Target("at least", 30_000.0), Target("at least", 20_000.0), Target("at least", 5_000.0)
_SINGLES = {
    "asked": "cheapest request (where a stream stands), one at a time",
    "read": "1 kB row read, one at a time",
    "single": "1 kB row sent and stored, one at a time",
}
# No further round begins after so long.
_WITHIN_S = 45.0


def measure(options: Options) -> list[Figure]:
    n, n_single = options.choose(2_000, 50_000), options.choose(200, 3_000)
    # The service's memory is filled with small frames: rows alone would take minutes to fill it.
    workload, buffer_bytes = Workload("512", n_unique=1), options.choose(QUICK_BUFFER_BYTES, BUFFER_BYTES)
    with (
        WorkFolder(options, "small") as folder,
        Rig(folder, workload, buffer_bytes=buffer_bytes) as rig,
        started_peers(rig, folder) as peers,
    ):
        stored = [peer for peer in peers if not peer.is_durable]
        rig.fill()
        t = _rounds(rig, stored, n, n_single, options.choose(2, 7))
    sent, taken = rates(n, t["in"]), rates(n, t["out"])
    echo = ("ZMQ request and reply of 1 kB", rates(n_single, t["echo"]))
    figures = [
        figure("1 kB rows in, stored", "rows/s", sent, higher_is_better=True, target=_IN),
        figure("1 kB rows out to a group of one", "rows/s", taken, higher_is_better=True, target=_OUT),
    ]
    for key, name in _SINGLES.items():
        values = rates(n_single, t[key])
        figures.append(figure(name, "requests/s", values, echo, higher_is_better=True, target=_SINGLE))
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

    _round(rig, peers, n, n_single, note)
    t.clear()
    for _ in in_rounds(repeats, _WITHIN_S):
        _round(rig, peers, n, n_single, note)
    return t


def _round(rig: Rig, peers: list[Peer], n: int, n_single: int, note: Callable[[str, float], None]) -> None:
    _in_and_out(rig, n, note)
    _one_at_a_time(rig, n_single, note)
    note("echo", rig.echo_s(n_single, SMALL_BLOBS[0]))
    for peer in peers:
        if peer.in_turn:
            for way, seconds in zip(("in", "out"), peer.in_turn(n), strict=True):
                note(f"{peer.name} {way}", seconds)


def _in_and_out(rig: Rig, n: int, note: Callable[[str, float], None]) -> None:
    """All rows stored, and only then taken by the group, so that neither waits for the other."""
    stream = rig.start("start_rows", n=n, ack="stored")
    sent = rig.ask("rows", n=n, one_by_one=False)
    note("in", (sent["last_ns"] - sent["first_ns"]) / 1e9)
    started = time.perf_counter()
    seen = [frame.frame_index for frame in stream.follow(group=GROUP, timeout=PATIENCE_S)]
    note("out", time.perf_counter() - started)
    rig.require_whole(stream, n, seen)
    rig.forget(stream)


def _one_at_a_time(rig: Rig, n: int, note: Callable[[str, float], None]) -> None:
    stream = rig.start("start_rows", n=n, ack="stored")
    sent = rig.ask("rows", n=n, one_by_one=True)
    note("single", (sent["last_ns"] - sent["first_ns"]) / 1e9)
    started = time.perf_counter()
    seen = [stream[index].frame_index for index in range(n)]
    note("read", time.perf_counter() - started)
    rig.require_whole(stream, n, seen)
    note("asked", _ask(rig.service, stream.header, n))
    rig.forget(stream)


def _ask(service: str, header: StreamHeader, n: int) -> float:
    """s for n requests that are answered from memory with no more than a few numbers."""
    ref = wire.StreamRef(header.experiment, header.run, header.data_source)
    connection = Connection(service)
    started = time.perf_counter()
    for _ in range(n):
        connection.ask(wire.Wait(id=0, stream=ref))
    seconds = time.perf_counter() - started
    connection.close()
    return seconds
