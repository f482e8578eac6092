"""A link that breaks, or swallows what it is given, under a client whose service lives on."""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from storage.errors import ServiceUnavailable
from streaming import client, wire
from streaming.client import Connection
from streaming.producer import Producer
from streaming.retrieval import open_run
from streaming.service import Service

from .harness import pixels, record_run, serving, wait_for

STREAM = wire.StreamRef("lyso", 1, "eiger")


class Link:
    """Carries bytes between clients and a service; loses them, or breaks, when told."""

    def __init__(self, to: str) -> None:
        host, _, port = to.removeprefix("tcp://").rpartition(":")
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._wires: list[_Wire] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def lose(self, *, questions: bool = False, answers: bool = False) -> None:
        """From now on; of the connections there are, not of new ones."""
        with self._lock:
            for one in self._wires:
                one.loses_questions, one.loses_answers = questions, answers

    def sever(self) -> None:
        """Reset all connections."""
        with self._lock:
            wires, self._wires = self._wires, []
        for one in wires:
            one.sever()

    @property
    def n_connections(self) -> int:
        """That there have been since the last `sever`."""
        return len(self._wires)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # which wakes who accepts; closing does not
        self._accepting.join()
        self._listener.close()
        self.sever()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                with self._lock:
                    self._wires.append(_Wire(near, socket.create_connection(self._to)))


class _Wire:
    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._near, self._far = near, far
        self.loses_questions = self.loses_answers = False
        threading.Thread(target=self._carry, args=(near, far, "loses_questions"), daemon=True).start()
        threading.Thread(target=self._carry, args=(far, near, "loses_answers"), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, loses: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not getattr(self, loses):
                    target.sendall(data)
        self.sever()

    def sever(self) -> None:
        for end in (self._near, self._far):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)  # whoever reads it is woken
            end.close()


@pytest.fixture
def service(tmp_path) -> Iterator[Service]:
    with serving(tmp_path) as service:
        yield service


@pytest.fixture
def link(service) -> Iterator[Link]:
    link = Link(service.address)
    yield link
    link.close()


@pytest.fixture
def connection(link) -> Iterator[Connection]:
    connection = Connection(link.address)
    yield connection
    connection.close()


def pumped(connection: Connection, number: int):
    """Whether a request is answered, having listened for it."""
    connection.pump(0.05)
    return connection.has_answer(number)


@pytest.mark.parametrize("lost", ["questions", "answers"])
def test_what_was_lost_with_the_link_is_asked_again(connection, link, lost):
    link.lose(**{lost: True})
    number = connection.send(wire.ListRuns(id=0))
    assert not any(pumped(connection, number) for _ in range(10))
    link.sever()
    wait_for(lambda: pumped(connection, number), timeout=8)
    assert json.loads(connection.take(number)[0].body) == []


def test_a_link_that_says_nothing_any_more_is_given_up(service, link, monkeypatch):
    monkeypatch.setattr(client, "_HEARTBEAT_MS", 200)
    monkeypatch.setattr(client, "_HEARTBEAT_TIMEOUT_MS", 1000)
    connection = Connection(link.address)
    try:
        link.lose(questions=True, answers=True)
        number = connection.send(wire.ListRuns(id=0))
        wait_for(lambda: pumped(connection, number), timeout=8)
        assert link.n_connections == 2
    finally:
        connection.close()


def test_a_service_that_comes_and_goes_is_waited_for(connection, monkeypatch):
    """Gone is who is away at every look for long, not who is away now and has long said nothing."""
    looks = iter([False] * 4 + [True] + [False] * 4)
    monkeypatch.setattr(client, "is_reachable", lambda address, timeout_s: next(looks))
    times = [client._PATIENCE_S / 4 * n for n in range(9)]
    assert [connection._is_absent(now) for now in times] == [True] * 4 + [False] + [True] * 4
    monkeypatch.setattr(client, "is_reachable", lambda address, timeout_s: False)
    with pytest.raises(ServiceUnavailable, match="no answer from a Nearline service"):
        connection._is_absent(times[-1] + client._PATIENCE_S)


def test_what_waits_at_the_service_waits_there_once(connection, link, service):
    """The service forgets the question that came over the old link, and keeps the one over the new."""
    with Producer(service.address, "lyso", "eiger") as producer, producer.run() as out:
        out.send(pixels(0), frame_index=0)
        number = connection.send(wire.Wait(id=0, stream=STREAM, above=1, timeout_s=60))
        for n_links in range(3):
            wait_for(lambda: not pumped(connection, number) and len(service._server._parked) == 1, timeout=8)
            if n_links < 2:
                link.sever()
                other = connection.send(wire.ListRuns(id=0))
                wait_for(lambda other=other: pumped(connection, other), timeout=8)
        out.send(pixels(1), frame_index=1)
        wait_for(lambda: pumped(connection, number), timeout=8)


def test_lost_answers_cost_no_credit(connection, link, service):
    """Each is lost with all its frames: without new credit a client would come to its end after some."""
    record_run(service.address, range(20))
    for _ in range(3):
        link.lose(answers=True)
        number = connection.send(wire.Read(id=0, stream=STREAM, start=0, stop=20))
        assert not any(pumped(connection, number) for _ in range(4))
        link.sever()
        wait_for(lambda number=number: pumped(connection, number), timeout=8)
        assert len(connection.take(number)[0].infos) == 20
    (*_, last) = service._server._clients.values()
    assert 0 < last.sent_bytes < 1 << 20


def test_a_producer_stores_each_frame_once_over_a_link_that_breaks(link, service):
    with Producer(link.address, "lyso", "eiger") as producer, producer.run() as out:
        for index in range(60):
            out.put(pixels(index), frame_index=index)
            if index % 15 == 7:
                link.lose(answers=index % 2 == 0, questions=index % 2 == 1)
                link.sever()
    stream = open_run(f"{service.address}/lyso/1")["eiger"]
    assert [frame.frame_index for frame in stream] == list(range(60))
    assert open_run(f"{service.address}/lyso/1").ledger()["eiger"].is_balanced


def test_a_member_gets_all_frames_over_a_link_that_breaks(link, service):
    record_run(service.address, range(40))
    found = []
    for frame in open_run(f"{link.address}/lyso/1")["eiger"].follow("mine", lease_s=2.0):
        found.append(frame.frame_index)
        if frame.frame_index in (5, 20):
            link.lose(answers=True)
            link.sever()
    assert set(found) == set(range(40))
