"""The processes of a wire benchmark: service, sender, relay and bare loop, with this process as the consumer.

Everything goes over TCP loopback. Every series must be complete at the consumer and in the
ledger, or there are no figures.
"""

import json
import logging
import math
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from benchmarks.bare import BareLoop
from benchmarks.frames import EXPERIMENT, SOURCE, FramesLost, Workload
from benchmarks.sender import SENT_NS
from nearline.children import Children, free_port
from storage.errors import RunNotFound, StreamNotFound
from streaming.client import is_reachable
from streaming.retrieval import Stream, open_run
from streaming.security import service_folder
from streaming.security.curve import announced_key

__all__ = ["BUFFER_BYTES", "GROUP", "PATIENCE_S", "QUICK_BUFFER_BYTES", "Drained", "Rig"]

log = logging.getLogger("benchmarks")

PATIENCE_S = 60.0
# The service's memory for frames: what `nearline serve` takes by default, and less that is full soon.
BUFFER_BYTES, QUICK_BUFFER_BYTES = 512 << 20, 64 << 20
# So much of it passes before anything is measured.
_TO_FILL = 1.1
GROUP = "bench"
# The detector of the service, and the one whose messages the bare loop takes.
_OF_SERVICE, _OF_BARE = 0, 1
_ROOT = "NEARLINE_ROOT"
# Start and end of a series are messages too.
_NOT_IMAGES = 2


@dataclass(frozen=True)
class Drained:
    """One series at the consumer: from the first send to the last receipt, and each frame's time on the way."""

    seconds: float
    latencies_ms: list[float] = field(default_factory=list)


class Rig(AbstractContextManager["Rig"]):
    """Service, sender, relay and bare loop as processes; a series each time one is asked for.

    buffer_bytes : the service's memory for frames. sync_s : the bare loop syncs its file so often; 0 never.
    encrypts : the service speaks CURVE; until `close`, clients in this process find its key by NEARLINE_ROOT.
    """

    def __init__(
        self,
        folder: Path,
        workload: Workload,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        sync_s: float = 0.0,
        encrypts: bool = False,
    ) -> None:
        self.root, self.workload, self.frames = folder / "data", workload, workload.frames()
        self.root.mkdir(parents=True)
        self.buffer_bytes, self._encrypts, self._root_before = buffer_bytes, encrypts, os.environ.get(_ROOT)
        self.children, self._n_runs = Children(folder / "logs"), 0
        self._forgotten: list[Path] = []
        self.service, control, serving, relayed, *ends = (f"tcp://127.0.0.1:{free_port()}" for _ in range(8))
        detectors, pushes = ends[:2], ends[2:]
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._control: zmq.Socket[bytes] = context.socket(zmq.REQ)
        self._control.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
        self._control.bind(control)
        self._pulls = [_pull(endpoint) for endpoint in (pushes[0], relayed)]
        self._bare = BareLoop(serving)
        frames = folder / "frames.pickle"
        frames.write_bytes(pickle.dumps(self.frames))
        told = {
            "control": control, "service": self.service, "detectors": detectors, "pushes": pushes, "frames": str(frames)
        }  # fmt: skip
        serve = ["--root", str(self.root), "--bind", self.service, "--source", f"{SOURCE}={detectors[_OF_SERVICE]}"]
        bare = [detectors[_OF_BARE], serving, str(folder / "bare"), str(sync_s)]
        commands = {
            "service": ["nearline.cli", "serve", *serve, "--buffer", str(buffer_bytes / 2**30)],
            "sender": ["benchmarks.sender", json.dumps(told)],
            "relay": ["benchmarks.relay", pushes[1], relayed],
            "bare": ["benchmarks.bare", *bare],
        }
        commands["service"] += ["--encrypt"] if encrypts else []
        for name, command in commands.items():
            self.children.start(name, command, os.environ | {_ROOT: str(self.root)})

    def __enter__(self) -> "Rig":
        try:
            self._wait_until(lambda: is_reachable(self.service))
            if self._encrypts:
                self._wait_until(lambda: announced_key(service_folder(self.root), self.service) is not None)
                os.environ[_ROOT] = str(self.root)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._control.close(linger=0)
        self._bare.close()
        for pull in self._pulls:
            pull.close(linger=0)
        self.children.stop_all()
        if self._encrypts:
            os.environ.pop(_ROOT, None)
            if self._root_before is not None:
                os.environ[_ROOT] = self._root_before

    def warm_up(self) -> None:
        """Fill the service's memory, and send as much through the bare loop: what follows is their steady state."""
        self.bare(self.fill())

    def fill(self) -> int:
        """Send frames until the service must give up old ones for each new one: how many these were."""
        n_unique = len(self.frames.blobs)
        n = math.ceil(_TO_FILL * self.buffer_bytes / (self.frames.total_bytes(n_unique) / n_unique))
        self.series(n)
        log.info("the service's memory is full after %d frames", n)
        return n

    # ---- through the service --------------------------------------------------------------------

    def series(self, n: int, rate: float = 0.0) -> Drained:
        """One series of n frames from the detector through the service, drained by a group of one.

        Raises
        ------
        FramesLost : the consumer or the ledger misses one.
        """
        stream = self.start_series(n)
        self.tell_series(n, rate)
        return self._drained_and_gone(stream, n, rate)

    def produced(self, n: int, rate: float = 0.0, ack: str = "stored") -> Drained:
        """The same from a producer, who waits for acknowledgements."""
        stream = self.start("start_frames", n=n, ack=ack)
        self.tell("frames", n=n, rate=rate)
        return self._drained_and_gone(stream, n, rate)

    def start_series(self, n: int) -> Stream:
        """Arm the detector for n frames."""
        return self.start("start", detector=_OF_SERVICE, n=n)

    def tell_series(self, n: int, rate: float = 0.0) -> None:
        """Have it send them all."""
        self.tell("images", detector=_OF_SERVICE, n=n, rate=rate)

    def start(self, how: str, **arguments: Any) -> Stream:
        """A new run, begun by the sender: its stream, as soon as it is there."""
        self.make_room()
        self._n_runs += 1
        self.ask(how, run=self._n_runs, **arguments)
        return self._stream(f"{EXPERIMENT}/{self._n_runs}")

    def drained(self, stream: Stream, n: int, rate: float = 0.0) -> Drained:
        """Take the n frames that the sender was told to send, as a group of one."""
        seen, latencies, last_ns = [], [], 0
        for frame in stream.follow(group=GROUP, timeout=PATIENCE_S):
            last_ns = time.monotonic_ns()
            seen.append(frame.frame_index)
            if rate:
                latencies.append((last_ns - frame.meta[SENT_NS]) / 1e6)
        first_ns = self.answer()["first_ns"]
        self.require_whole(stream, n, seen)
        return Drained((last_ns - first_ns) / 1e9, latencies)

    def _drained_and_gone(self, stream: Stream, n: int, rate: float) -> Drained:
        drained = self.drained(stream, n, rate)
        self.forget(stream)
        return drained

    @staticmethod
    def require_whole(stream: Stream, n: int, seen: list[int]) -> None:
        """FramesLost unless every frame was seen in order, is stored, and the ledger balances."""
        ledger = stream.ledger()
        if seen != list(range(n)) or ledger.stored != n or not ledger.is_balanced:
            raise FramesLost(f"{n} frames were sent, {len(seen)} consumed; ledger: {ledger}; look for the reason first")

    def forget(self, stream: Stream) -> None:
        """Nobody needs this run any more; its files go when the next one begins.

        As with the bare loop, whose file is emptied then. A virtual machine gives memory that is free for two
        seconds back to its host, and has to fetch each page again: writing to it takes three times as long.
        """
        self._forgotten.append(self.root / EXPERIMENT / str(stream.header.run))

    def empty(self) -> None:
        """Remove what is left of every series before, the bare loop's as well: its memory is for the next one."""
        self.make_room()
        self._bare.begin()

    def make_room(self) -> None:
        """Remove the runs that were forgotten."""
        while self._forgotten:
            shutil.rmtree(self._forgotten.pop())

    # ---- through something else -----------------------------------------------------------------

    def raw(self, n: int, hops: int, rate: float = 0.0) -> Drained:
        """The same blobs with nothing but ZMQ in between."""
        self.tell("raw", n=n, rate=rate, hops=hops)
        pull, latencies, last_ns = self._pulls[hops - 1], [], 0
        for _ in range(n):
            sent, _blob = pull.recv_multipart(copy=False)
            last_ns = time.monotonic_ns()
            latencies.append((last_ns - struct.unpack("<q", sent.buffer)[0]) / 1e6)
        return Drained((last_ns - self.answer()["first_ns"]) / 1e9, latencies)

    def bare(self, n: int) -> Drained:
        """The detector's messages as they are through the bare loop, into its file."""
        self._n_runs += 1
        self._bare.begin()
        self.ask("start", detector=_OF_BARE, run=self._n_runs, n=n)
        self.tell("images", detector=_OF_BARE, n=n, rate=0.0)
        last_ns = self._bare.drain(n + _NOT_IMAGES)
        return Drained((last_ns - self.answer()["first_ns"]) / 1e9)

    def echo_s(self, n: int, message: bytes) -> float:
        """s for n requests and their replies over one bare socket."""
        self.ask("echo", n=n)
        started = time.perf_counter()
        for _ in range(n):
            self._control.send(message)
            self._control.recv()
        return time.perf_counter() - started

    # ---- the sender -----------------------------------------------------------------------------

    def tell(self, do: str, **arguments: Any) -> None:
        """Have the sender do something; `answer` waits until it is done."""
        self._control.send_json({"do": do, **arguments})

    def answer(self) -> dict[str, Any]:
        self.children.check("sender")
        answer: dict[str, Any] = self._control.recv_json()  # type: ignore[assignment]
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have it done and wait."""
        self.tell(do, **arguments)
        return self.answer()

    # ---- the service ----------------------------------------------------------------------------

    def service_cpu_s(self) -> float:
        """User and system time that the service has used."""
        fields = self._proc("stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def forget_peak_memory(self) -> None:
        """From here on `peak_memory_bytes` counts anew."""
        self._proc("clear_refs").write_text("5")

    def peak_memory_bytes(self) -> int:
        """Most resident memory of the service (VmHWM), as the kernel saw it: no sampling can miss it."""
        lines = dict(line.split(":", 1) for line in self._proc("status").read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])

    def _proc(self, name: str) -> Path:
        return Path("/proc") / str(self.children.process("service").pid) / name

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
        deadline = time.monotonic() + PATIENCE_S
        while not is_true():
            self.children.check("service")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the service did not get ready in {PATIENCE_S:g} s")
            time.sleep(0.02)


def _pull(endpoint: str) -> "zmq.Socket[bytes]":
    pull: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    pull.setsockopt(zmq.RCVHWM, 8)
    pull.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
    pull.connect(endpoint)
    return pull
