"""Malformed messages by the ten thousand, at both doors of a running service, with valid traffic beside them.

It may not crash, hang, grow or say that it failed; a detector's series, a producer and a group beside the
attack come through byte for byte, and every ledger balances. A finding says the seed, the number of the
message, and what had been sent just before, in hex.
"""

import contextlib
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import zmq

from nearline.children import free_port
from storage.errors import NearlineError
from storage.models import StreamHeader
from storage.run_folder import find_runs
from storage.stream_source import FolderSource
from streaming import wire
from streaming.client import Connection
from streaming.producer import Producer
from tests.streaming import bad_messages as corpus
from tests.streaming.harness import SHAPE, detector, wait_for

from .fuzzing import VICTIM, Fuzzer, Message
from .processes import ServiceUnderFire
from .test_kills import World, stored_indices

BUFFER_BYTES = 32 << 20
# Budget, message buffers of the sockets, and what Python keeps of memory that was in use.
MOST_GROWN_BYTES = BUFFER_BYTES + (250 << 20)
# A request beside the attack, on two cores that it shares with the attacker.
SLOWEST_REPLY_S = 3.0
# Nothing that a client sends may lead here.
UNEXPECTED = ("Traceback", "the service failed", "internal error")
REMEMBERED = 60


class Attack:
    """One attacker at both doors, and what it saw."""

    def __init__(self, service: ServiceUnderFire, detector_at: str, seed: int) -> None:
        self.service, self.seed = service, seed
        self.fuzzer = Fuzzer(seed)
        self._context = zmq.Context()
        self._push = self._context.socket(zmq.PUSH)
        self._push.set(zmq.LINGER, 0)
        self._push.set(zmq.SNDTIMEO, 20_000)
        self._push.bind(detector_at)
        self._dealer = self._connect()
        self._last: deque[tuple[int, Message]] = deque(maxlen=REMEMBERED)
        self.n_answers = 0

    def _connect(self) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDTIMEO, 20_000)
        socket.connect(self.service.address)
        socket.send(wire.encode(wire.Hello(id=1, protocol=wire.PROTOCOL)))
        return socket

    def run(self, n: int) -> None:
        """Send them all; a new client every 150, a new stream to be shot at every 1000."""
        said = 0
        for number, message in enumerate(self.fuzzer.messages(n)):
            if number % 1000 == 0:
                self._open_victim()
            if number % 150 == 0:
                self._take_answers(wait_ms=200)
                self._dealer.close()
                self._dealer = self._connect()
            self._last.append((number, message))
            self._send(message)
            if number % 20 == 0:
                self._take_answers()
                said = self._look(said)
        self._take_answers()
        self._look(said)

    def _send(self, message: Message) -> None:
        socket = self._push if message.door == "detector" else self._dealer
        try:
            socket.send_multipart(message.parts)
        except zmq.Again:
            raise AssertionError(f"the service takes no {message.door} messages any more: {self.context()}") from None

    def _take_answers(self, wait_ms: int = 5) -> None:
        while self._dealer.poll(wait_ms):
            reply = wire.decode_reply(self._dealer.recv_multipart()[0])
            self.n_answers += 1
            assert not any(word in getattr(reply, "message", "") for word in UNEXPECTED), f"{reply} {self.context()}"

    def _look(self, said: int) -> int:
        """Whether the service is well, as far as it can be seen from outside; how much its log says now."""
        assert self.service.process is not None
        assert self.service.process.is_alive(), f"the service is gone: {self.context()}"
        log = self.service.log.read_text()
        is_well = not any(word in log[said:] for word in UNEXPECTED)
        assert is_well, f"{log[said:][:3000]}\n{self.context()}"
        return len(log)

    def _open_victim(self) -> None:
        """A stream that is really open: messages that name it get further."""
        with Producer(self.service.address, VICTIM, "eiger") as producer:
            out = producer.run()
            fields: dict[str, Any] = {"run": out.run, "data_source": "eiger", "shape": corpus.SHAPE, "dtype": "uint16"}
            # Planned, so that an index far off is refused and not thousands of chunks of nothing.
            out.start(StreamHeader(experiment=VICTIM, planned=300, **fields))
            out.send(corpus.PIXELS)
            self.fuzzer.run = out.run

    def context(self) -> str:
        """What to say with a finding; all of what was sent before it is in a file."""
        sent = [f"{number} {message}" for number, message in self._last]
        path = self.service.log.with_name("finding.txt")
        path.write_text("\n".join(sent))
        shortened = "\n".join(line[:400] for line in sent[-25:])
        return f"seed {self.seed}; more of it in {path}; the last messages sent:\n{shortened}"

    def close(self) -> None:
        self._dealer.close()
        self._push.close()
        self._context.term()


class Canary(threading.Thread):
    """Somebody who asks all the time, and how long the slowest answer took."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._address, self._stop_asking = address, threading.Event()
        self.slowest_s, self.n_asked = 0.0, 0
        self.error: NearlineError | None = None

    def run(self) -> None:
        connection = Connection(self._address)
        try:
            while not self._stop_asking.wait(0.02):
                asked = time.monotonic()
                connection.ask(wire.GetStatus(id=0), timeout=20.0)
                self.slowest_s = max(self.slowest_s, time.monotonic() - asked)
                self.n_asked += 1
        except NearlineError as error:
            self.error = error
        finally:
            connection.close()

    def end(self) -> None:
        self._stop_asking.set()
        self.join(30)


class Beside(World):
    """Valid traffic: a detector's series, a producer, and groups that read both; nobody is killed."""

    def __init__(self, root: Path, eiger: object, service: ServiceUnderFire) -> None:
        super().__init__(root, eiger, seed=0)
        self.service = service
        self.headers = {
            "cam": StreamHeader(
                experiment="lyso", run=11, data_source="cam", shape=SHAPE, dtype="uint16", frames_per_chunk=50
            )
        }


def fuzz(root: Path, seed: int, n: int) -> None:
    """One service under attack, from its start to its regular end."""
    attacked = f"tcp://127.0.0.1:{free_port()}"
    with (
        detector() as eiger,
        ServiceUnderFire(
            root / "data", {"eiger": eiger.endpoint, "shot": attacked}, buffer_bytes=BUFFER_BYTES
        ) as service,
        Beside(root, eiger, service) as beside,
        contextlib.closing(Attack(service, attacked, seed)) as attack,
    ):
        beside.begin()
        wait_for(lambda: beside.n_exposed > 20)
        before, canary = service.rss_bytes(), Canary(service.address)
        canary.start()
        attack.run(n)
        canary.end()
        assert canary.error is None, f"{canary.error} {attack.context()}"
        assert canary.slowest_s < SLOWEST_REPLY_S, f"an answer took {canary.slowest_s:.1f} s; seed {seed}"
        grown = service.rss_bytes() - before
        assert grown < MOST_GROWN_BYTES, f"{grown >> 20} MiB more after {n} messages of seed {seed}"
        print(f"seed {seed}: {n} messages, {attack.n_answers} answers, {grown >> 20} MiB more, "
              f"slowest of {canary.n_asked} answers {canary.slowest_s * 1000:.0f} ms")  # fmt: skip
        beside.end()
        beside.check()
        check_ledgers(service.root)


def check_ledgers(root: Path) -> None:
    """Of all that the attack began, too."""
    for folder in find_runs(root):
        for name in folder.data_sources():
            source = FolderSource(folder, name)
            assert source.ledger().problems == [], f"{folder.path} {name}"
            for index in stored_indices(source):
                source.read_one(index)


def test_a_few_thousand_malformed_messages(tmp_path):
    fuzz(tmp_path, seed=1, n=3000)


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 110))
def test_a_hundred_thousand_malformed_messages(tmp_path, seed):
    """Of ten seeds together: one in seven is left whole, or comes again, so that what is between them gets far."""
    fuzz(tmp_path, seed, n=12_500)
