"""Detector to consumer through the service, three processes over TCP loopback.

The service receives, checks, journals and serves; the consumer group drains in this process.
Beside it: the same blobs over bare PUSH and PULL in one hop, through a relay in two (as many as
the service makes), and into a plain file. Every series must be complete at the consumer and in
the ledger, or there are no figures.
"""

import os
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from benchmarks.frames import EXPERIMENT, SOURCE, FrameSet, Options, WorkFolder
from benchmarks.measure import Figure, figure, interleave, percentile, rates
from benchmarks.sender import N_UNIQUE, SENT_NS
from benchmarks.store import write_plainly
from nearline.children import Children, free_port
from storage.errors import NearlineError, RunNotFound, StreamNotFound
from streaming.client import is_reachable
from streaming.retrieval import Stream, open_run

__all__ = ["FramesLost", "Rig", "measure"]

_PATIENCE_S = 60.0
_RATE = 100.0
_STD_DAQ_GB_PER_CORE_S = 1.0


class FramesLost(NearlineError):
    """A series did not come through whole: the figures would mean nothing."""


@dataclass(frozen=True)
class _Drained:
    """One series at the consumer: from the first send to the last receipt, and each frame's time on the way."""

    seconds: float
    latencies_ms: list[float]


class Rig(AbstractContextManager["Rig"]):
    """Service, sender and relay as processes, and this process as the consumer."""

    def __init__(self, folder: Path, size: str) -> None:
        self.root, self.frames = folder / "data", FrameSet.make(size, N_UNIQUE)
        self._children, self._n_runs = Children(folder / "logs"), 0
        self.service, detector, control, *pushes = (f"tcp://127.0.0.1:{free_port()}" for _ in range(5))
        relayed = f"tcp://127.0.0.1:{free_port()}"
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._control: zmq.Socket[bytes] = context.socket(zmq.REQ)
        self._control.setsockopt(zmq.RCVTIMEO, int(1000 * _PATIENCE_S))
        self._control.bind(control)
        self._pulls: list[zmq.Socket[bytes]] = [context.socket(zmq.PULL) for _ in pushes]
        for pull, endpoint in zip(self._pulls, (pushes[0], relayed), strict=True):
            pull.setsockopt(zmq.RCVHWM, 8)
            pull.setsockopt(zmq.RCVTIMEO, int(1000 * _PATIENCE_S))
            pull.connect(endpoint)
        serve = ["--root", str(self.root), "--bind", self.service, "--source", f"{SOURCE}={detector}"]
        commands = {
            "service": ["nearline.cli", "serve", *serve],
            "sender": ["benchmarks.sender", size, control, detector, *pushes],
            "relay": ["benchmarks.relay", pushes[1], relayed],
        }
        for name, command in commands.items():
            self._children.start(name, command, os.environ)

    def __enter__(self) -> "Rig":
        self._wait_until(lambda: is_reachable(self.service))
        return self

    def __exit__(self, *_: object) -> None:
        for socket in (self._control, *self._pulls):
            socket.close(linger=0)
        self._children.stop_all()

    @property
    def service_pid(self) -> int:
        return self._children.process("service").pid

    def series(self, n: int, rate: float = 0.0) -> _Drained:
        """One series of n frames through the service, drained by a group of one.

        Raises
        ------
        FramesLost : the consumer or the ledger misses one.
        """
        self._n_runs += 1
        self._tell("start", run=self._n_runs, n=n)
        self._answer()
        stream = self._stream(f"{EXPERIMENT}/{self._n_runs}")
        self._tell("images", n=n, rate=rate)
        seen, latencies, last_ns = [], [], 0
        for frame in stream.follow(group="bench", timeout=_PATIENCE_S):
            last_ns = time.monotonic_ns()
            seen.append(frame.frame_index)
            if rate:
                latencies.append((last_ns - frame.meta[SENT_NS]) / 1e6)
        first_ns = self._answer()["first_ns"]
        ledger = stream.ledger()
        if seen != list(range(n)) or ledger.stored != n or not ledger.is_balanced:
            raise FramesLost(f"{n} frames were sent, {len(seen)} consumed; ledger: {ledger}; look for the reason first")
        shutil.rmtree(self.root / EXPERIMENT / str(self._n_runs))
        return _Drained((last_ns - first_ns) / 1e9, latencies)

    def raw(self, n: int, hops: int, rate: float = 0.0) -> _Drained:
        """The same blobs with nothing but ZMQ in between."""
        self._tell("raw", n=n, rate=rate, hops=hops)
        pull, latencies, last_ns = self._pulls[hops - 1], [], 0
        for _ in range(n):
            sent, _blob = pull.recv_multipart(copy=False)
            last_ns = time.monotonic_ns()
            latencies.append((last_ns - struct.unpack("<q", sent.buffer)[0]) / 1e6)
        return _Drained((last_ns - self._answer()["first_ns"]) / 1e9, latencies)

    def service_cpu_s(self) -> float:
        """User and system time that the service has used."""
        fields = Path(f"/proc/{self.service_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _tell(self, do: str, **arguments: Any) -> None:
        self._control.send_json({"do": do, **arguments})

    def _answer(self) -> dict[str, Any]:
        self._children.check("sender")
        answer: dict[str, Any] = self._control.recv_json()  # type: ignore[assignment]
        return answer

    def _stream(self, name: str) -> Stream:
        """The stream as soon as its start message has made a run of it."""
        found: list[Stream] = []

        def is_there() -> bool:
            with suppress(RunNotFound, StreamNotFound):
                found[:] = [open_run(name, service=self.service)[SOURCE]]
            return bool(found)

        self._wait_until(is_there)
        return found[0]

    def _wait_until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not is_true():
            self._children.check("service")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the service did not get ready in {_PATIENCE_S:g} s")
            time.sleep(0.02)


def measure(options: Options) -> list[Figure]:
    n = options.choose(40, 400)
    with WorkFolder(options, "wire") as folder, Rig(folder, options.size) as rig:
        return [*_throughput(options, rig, n), *_latency(options, rig, options.choose(40, 300))]


def _throughput(options: Options, rig: Rig, n: int) -> list[Figure]:
    cpu_ms: list[float] = []

    def through_service() -> float:
        before = rig.service_cpu_s()
        seconds = rig.series(n).seconds
        cpu_ms.append(1e3 * (rig.service_cpu_s() - before) / n)
        return seconds

    repeats = options.choose(2, 7)
    t = interleave(
        {
            "service": through_service,
            "one hop": lambda: rig.raw(n, 1).seconds,
            "two hops": lambda: rig.raw(n, 2).seconds,
            "file": lambda: write_plainly(rig.root, rig.frames, n, sync=False),
        },
        repeats,
    )
    cpu_ms = cpu_ms[-repeats:]  # without the warm-up
    ours, name = rates(n, t["service"]), "ingest + store + drain"
    limits = {
        "raw ZMQ, one hop, nothing stored": t["one hop"],
        "raw ZMQ relay, two hops, nothing stored": t["two hops"],
        "plain file write alone": t["file"],
        "relay, then file write": [a + b for a, b in zip(t["two hops"], t["file"], strict=True)],
    }
    gigabytes = rig.frames.total_bytes(n) / n / 1e9
    per_core = [gigabytes / (ms / 1e3) for ms in cpu_ms]
    published = ("published: std-daq, 1 GB/s a core", [_STD_DAQ_GB_PER_CORE_S])
    figures = [
        figure(name, "frames/s", ours, (limit, rates(n, seconds)), higher_is_better=True)
        for limit, seconds in limits.items()
    ]
    return [
        *figures,
        figure(name, "GB/s compressed", [gigabytes * v for v in ours], higher_is_better=True),
        figure("CPU of the service a frame", "ms", cpu_ms, higher_is_better=False),
        figure("service, compressed bytes a core second", "GB/s", per_core, published, higher_is_better=True),
        figure("frames lost", "frames", [0.0] * repeats, higher_is_better=False),
    ]


def _latency(options: Options, rig: Rig, n: int) -> list[Figure]:
    """Send to receipt at a steady rate; the frames of all rounds together."""
    ways = {
        "service": lambda: rig.series(n, _RATE),
        "one hop": lambda: rig.raw(n, 1, _RATE),
        "two hops": lambda: rig.raw(n, 2, _RATE),
    }
    latencies: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.choose(1, 3)):
        for name, way in ways.items():
            latencies[name] += way().latencies_ms
    figures = []
    for percent in (50, 99):
        at = {name: percentile(values, percent) for name, values in latencies.items()}
        for hops, limit in (("one hop", "raw ZMQ, one hop"), ("two hops", "raw ZMQ relay, two hops")):
            figures.append(
                figure(
                    f"send to receipt at {_RATE:g} frames/s, p{percent}",
                    "ms",
                    [at["service"]],
                    (limit, [at[hops]]),
                    higher_is_better=False,
                )
            )
    return figures
