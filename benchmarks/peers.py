"""The peers that carry the same messages: each a contender, or the reason why it cannot be one here."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import jetstream, redis_streams
from benchmarks.frames import SMALL_BLOBS
from benchmarks.jetstream import JetStream
from benchmarks.program import find_program
from benchmarks.redis_streams import RedisStreams
from benchmarks.report import program_version
from benchmarks.rig import Rig

__all__ = ["Peer", "started_peers"]

_NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Peer:
    """One peer with one setting of its disk.

    at_once : s of n frames, the consumer draining meanwhile. in_turn : s of sending n rows of 1 kB, and
    s of then draining them. why_not : why there is neither. is_durable : synced before it is acknowledged.
    """

    name: str
    is_durable: bool
    at_once: Callable[[int], float] | None = None
    in_turn: Callable[[int], tuple[float, float]] | None = None
    why_not: str = ""


@contextmanager
def started_peers(rig: Rig, folder: Path) -> Iterator[list[Peer]]:
    """All peers; their servers run as long as the context, and end with the rig at the latest."""
    servers: list[RedisStreams | JetStream] = []
    try:
        yield [*_redis(rig, folder, servers), *_jetstream(rig, folder, servers)]
    finally:
        for server in servers:
            server.close()


def _redis(rig: Rig, folder: Path, servers: list[Any]) -> list[Peer]:
    names = {sync: f"Redis Streams, appendfsync {sync}" for sync in ("everysec", "always")}
    if find_program(redis_streams.PROGRAM) is None:
        return [_absent(name, sync == "always", _NOT_INSTALLED) for sync, name in names.items()]
    server = RedisStreams(rig.children, folder / "redis")
    servers.append(server)
    return [
        _peer(name, sync == "always", rig, "redis", server, partial(server.begin, sync)) for sync, name in names.items()
    ]


def _jetstream(rig: Rig, folder: Path, servers: list[Any]) -> list[Peer]:
    name, durable = "NATS JetStream, file storage", "NATS JetStream, sync_interval: always"
    version = program_version(jetstream.PROGRAM)
    if find_program(jetstream.PROGRAM) is None:
        return [_absent(name, False, version), _absent(durable, True, version)]
    server = JetStream("nats", rig.children, folder / "nats", "")
    servers.append(server)
    peers = [_peer(name, False, rig, "nats", server, server.begin)]
    if not jetstream.knows(jetstream.ALWAYS, folder):
        return [*peers, _absent(durable, True, f"not in {jetstream.PROGRAM} {version}")]
    always = JetStream("nats-always", rig.children, folder / "nats-always", jetstream.ALWAYS)
    servers.append(always)
    return [*peers, _peer(durable, True, rig, "nats", always, always.begin)]


def _absent(name: str, is_durable: bool, why_not: str) -> Peer:
    return Peer(name, is_durable, why_not=why_not)


def _peer(
    name: str, is_durable: bool, rig: Rig, do: str, server: RedisStreams | JetStream, begin: Callable[[], None]
) -> Peer:
    def at_once(n: int) -> float:
        begin()
        rig.tell(do, port=server.port, n=n, small=False)
        last_ns = server.drain(n, rig.frames.blobs)
        return (last_ns - rig.answer()["first_ns"]) / 1e9

    def in_turn(n: int) -> tuple[float, float]:
        begin()
        sent = rig.ask(do, port=server.port, n=n, small=True)
        started_ns = time.monotonic_ns()
        last_ns = server.drain(n, SMALL_BLOBS)
        return (sent["last_ns"] - sent["first_ns"]) / 1e9, (last_ns - started_ns) / 1e9

    return Peer(name, is_durable, at_once, in_turn)
