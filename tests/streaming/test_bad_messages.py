"""Bad messages are refused with a word, cost bounded memory, and disturb nobody."""

import contextlib
import threading
import time

import numpy as np
import pytest
import zmq

from storage.errors import BadMessage, NearlineError, ProtocolError
from streaming import wire
from streaming.connectors.cbor_view import decode_view
from streaming.connectors.dectris_stream2 import EndMessage, ImageMessage, StartMessage, parse_message
from streaming.retrieval import open_run

from . import bad_messages as corpus
from .harness import ServiceProcess, pixels, producing, serving, status_of, wait_for

# ---- decoders alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("message", corpus.VALID_DETECTOR, ids=["start", "image", "image with appendix", "end"])
def test_valid_messages_are_understood(message):
    assert isinstance(parse_message(memoryview(message)), StartMessage | ImageMessage | EndMessage)


@pytest.mark.parametrize("fields", corpus.ODD_BUT_FINE.values(), ids=corpus.ODD_BUT_FINE.keys())
def test_odd_start_messages_are_understood(fields):
    message = parse_message(memoryview(corpus.dump(corpus.start(**fields))))
    assert isinstance(message, StartMessage)
    assert message.shape == corpus.SHAPE


@pytest.mark.parametrize("message", corpus.DETECTOR.values(), ids=corpus.DETECTOR.keys())
def test_detector_decoder_refuses_or_understands(message):
    words = ""
    try:
        parse_message(memoryview(bytearray(message)))  # writable, as the socket's are
    except NearlineError as error:
        words = str(error)
    assert len(words) < 500


def test_detector_decoder_on_mutations():
    outcomes = {"refused": 0, "understood": 0}
    for message in corpus.mutations(corpus.VALID_DETECTOR, 5000):
        try:
            parse_message(memoryview(bytearray(message)))
            outcomes["understood"] += 1
        except NearlineError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_cut_anywhere_is_refused():
    for message in corpus.VALID_DETECTOR:
        for cut in range(len(message)):
            with pytest.raises(BadMessage):
                decode_view(memoryview(message)[:cut])


@pytest.mark.parametrize("parts", corpus.NATIVE.values(), ids=corpus.NATIVE.keys())
def test_native_decoder_refuses_or_understands(parts):
    with contextlib.suppress(ProtocolError):
        assert isinstance(wire.decode_request(memoryview(parts[0])), wire.Request)


def test_native_decoders_on_mutations():
    for message in corpus.mutations(corpus.VALID_NATIVE, 5000):
        for decode in (wire.decode_request, wire.decode_reply):
            with contextlib.suppress(ProtocolError):
                decode(memoryview(message))


# ---- against a running service -------------------------------------------------------------------------


@pytest.fixture
def eiger():
    """A detector that says whatever it is told to."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDTIMEO, 20_000)
        socket.bind("tcp://127.0.0.1:*")
        yield socket


def endpoint_of(socket: zmq.Socket) -> str:
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def wait_for_messages(service, n: int) -> None:
    wait_for(lambda: service.status()["sources"][0]["messages"] >= n, 60)


def test_image_before_any_start(tmp_path, eiger):
    with serving(tmp_path, endpoint_of(eiger)) as service:
        eiger.send(corpus.dump(corpus.image()))
        eiger.send(corpus.dump(corpus.end()))
        wait_for_messages(service, 2)
        assert service.status()["rejected_messages"] == 2
        assert service.recorder.streams() == []


def test_bad_detector_messages_between_good_frames(tmp_path, eiger):
    """The frames around them are recorded, those that contradict their series are rejected by name."""
    sent = 0
    # No gap is given up before the messages that explain it have been read, however busy the machine is.
    with serving(tmp_path, endpoint_of(eiger), gap_timeout_s=30) as service:
        eiger.send(corpus.dump(corpus.start()))
        for n, message in enumerate(corpus.DETECTOR.values()):
            eiger.send(message)
            if n < 49 and n != 3:
                eiger.send(corpus.dump(corpus.image(n)))
                sent += 1
        eiger.send_multipart([b"two", b"parts"])
        eiger.send(corpus.dump(corpus.end()))
        wait_for_messages(service, 1 + len(corpus.DETECTOR) + sent + 2)
        run = open_run(f"{service.address}/lyso/1")
        frames = list(run["eiger"].follow())
        ledger = run["eiger"].ledger()
        assert service.status()["rejected_messages"] == len(corpus.DETECTOR) + 1
    assert [f.frame_index for f in frames] == [i for i in range(49) if i != 3]
    assert all(bytes(f.blob) == corpus.PIXELS for f in frames)
    assert ledger.is_balanced
    assert [(r.start, r.state) for r in ledger.ranges] == [(3, "rejected")]
    assert "is (8, 32) uint16 bslz4, but its series began as (16, 16)" in ledger.ranges[0].cause
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [".service", "lyso"]
    assert [p.name for p in (tmp_path / "lyso").iterdir()] == ["1"], "no empty runs are left behind"


@pytest.mark.parametrize("fields", corpus.ODD_BUT_FINE.values(), ids=corpus.ODD_BUT_FINE.keys())
def test_odd_start_messages_lose_no_frames(tmp_path, eiger, fields):
    with serving(tmp_path, endpoint_of(eiger)) as service:
        eiger.send(corpus.dump(corpus.start(**fields)))
        for index in range(3):
            eiger.send(corpus.dump(corpus.image(index, user_data=fields.get("user_data"))))
        eiger.send(corpus.dump(corpus.end()))
        wait_for_messages(service, 5)
        assert len(list(open_run(f"{service.address}/lyso/1")["eiger"].follow())) == 3
        assert service.status()["rejected_messages"] == 0
    assert len(list(open_run(tmp_path / "lyso" / "1")["eiger"])) == 3


def test_mutated_detector_messages(tmp_path, eiger):
    with ServiceProcess(tmp_path, endpoint_of(eiger), idle_timeout_s=5, gap_timeout_s=0.2) as service:
        eiger.send(corpus.dump(corpus.start()))
        before = service.rss_bytes()
        messages = list(corpus.mutations(corpus.VALID_DETECTOR[1:3] * 4 + corpus.VALID_DETECTOR, 2000, seed=2))
        for message in messages:
            eiger.send(message)
        good = {"series_unique_id": "01GOOD", "series_id": 77}
        eiger.send(corpus.dump(corpus.start(**good, user_data={"nearline": {"experiment": "good", "run": 1}})))
        for index in range(20):
            eiger.send(corpus.dump(corpus.image(index, **good)))
        eiger.send(corpus.dump(corpus.end(**good)))
        wait_for(lambda: (tmp_path / "good" / "1" / "eiger.stream.json").exists(), 60)
        assert len(list(open_run(f"{service.address}/good/1")["eiger"].follow())) == 20
        assert service.rss_bytes() - before < 300 << 20
        assert status_of(service.address)["rejected_messages"] > 500
        assert service.stop() == 0
    for path in tmp_path.glob("*/*/run.json"):
        ledgers = open_run(path.parent).ledger().values()
        assert [p for ledger in ledgers for p in ledger.problems] == []


class Attacker:
    """A bare DEALER: says anything, and reads only when asked to."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.connect(address)
        self.send([wire.encode(wire.Hello(id=0, protocol=wire.PROTOCOL))])
        assert self.socket.poll(5000), "the service did not welcome an attacker"
        self.socket.recv_multipart()

    def __enter__(self) -> "Attacker":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, parts: list[bytes]) -> None:
        self.socket.send_multipart(parts)

    def answers(self) -> list:
        found = []
        while self.socket.poll(0):
            found.append(wire.decode_reply(self.socket.recv_multipart()[0]))
        return found


class Beside:
    """Valid traffic beside an attack: a producer and a reader that must not notice."""

    def __init__(self, address: str) -> None:
        self.address, self.slowest, self.n = address, 0.0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        with producing(self.address) as out:
            while not self._stop.is_set():
                started = time.monotonic()
                out.send(pixels(self.n), frame_index=self.n)
                self.slowest = max(self.slowest, time.monotonic() - started)
                self.n += 1
                time.sleep(0.005)
            out.finish()

    def __enter__(self) -> "Beside":
        self._thread.start()
        wait_for(lambda: self.n > 3)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        stream = open_run(f"{self.address}/lyso/1")["eiger"]
        frames = list(stream.follow())
        assert [f.frame_index for f in frames] == list(range(self.n))
        assert all(np.array_equal(f.data, pixels(f.frame_index)) for f in frames)
        assert stream.ledger().is_balanced


def test_every_bad_request_is_answered_in_words(tmp_path, caplog):
    with serving(tmp_path) as service:
        with Beside(service.address) as beside:
            for name, parts in corpus.NATIVE.items():
                with Attacker(service.address) as attacker:
                    attacker.send(parts)
                    has_answer = attacker.socket.poll(20 if "timeout_s" in name or "above" in name else 3000)
                    for reply in attacker.answers():
                        assert "the service failed" not in getattr(reply, "message", ""), name
                    assert has_answer or "=" in name, name
        beside.check()
        assert service._server.is_alive()
        assert beside.slowest < 2.0
    assert "failed" not in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [".service", "lyso"]


def test_mutated_requests(tmp_path):
    with ServiceProcess(tmp_path) as service:
        before = service.rss_bytes()
        with Beside(service.address) as beside, Attacker(service.address) as attacker:
            for n, message in enumerate(corpus.mutations(corpus.VALID_NATIVE, 4000, seed=3)):
                attacker.send([message] if n % 2 else [message, corpus.PIXELS])
                if n % 16 == 0:
                    attacker.socket.poll(50)
                    attacker.answers()
        beside.check()
        assert service.rss_bytes() - before < 300 << 20
        assert status_of(service.address)["rejected_messages"] > 500
        assert service.stop() == 0


FLOODS = {
    "statuses": [wire.encode(wire.GetStatus(id=1))],
    "reads": [wire.encode(wire.Read(id=1, stream=corpus.REF, start=0, stop=100))],
    "reads that lie about credit": [
        wire.encode(wire.Read(id=1, received_bytes=2**62, stream=corpus.REF, start=0, stop=100))
    ],
    "waits": [wire.encode(wire.Wait(id=1, stream=corpus.REF, above=2**40, timeout_s=1e9))],
    "planes": [wire.encode(wire.GetPlane(id=1, stream=corpus.REF, name="pixel_mask"))],
    "garbage": [b"\xff" * 100],
    "hellos": [wire.encode(wire.Hello(id=1, protocol=1))],
}


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(parts, id=name, marks=[pytest.mark.campaign] if name in ("planes", "waits", "hellos") else [])
        for name, parts in FLOODS.items()
    ],
)
def test_client_that_never_reads(tmp_path, parts):
    """Its answers are bounded, and others are served as before."""
    with ServiceProcess(tmp_path) as service:
        with Beside(service.address) as beside, Attacker(service.address) as attacker:
            wait_for(lambda: beside.n > 20)
            before = service.rss_bytes()
            for _ in range(5000):
                attacker.send(parts)
            wait_for(lambda: beside.n > 60, 30)
            assert service.rss_bytes() - before < 250 << 20
        beside.check()


def test_waiting_clients_cost_no_processor_time(tmp_path):
    """Parked requests, an expired lease nobody waits for: the server sleeps."""
    with serving(tmp_path) as service, producing(service.address) as out:
        out.send(pixels(0))
        with Attacker(service.address) as attacker:
            fields = {"stream": corpus.REF, "member": "m"}
            attacker.send([wire.encode(wire.NextFrames(id=1, group="a", lease_s=0.05, **fields))])
            attacker.socket.poll(2000)
            attacker.send([wire.encode(wire.NextFrames(id=1, group="b", **fields))])
            attacker.socket.poll(2000)
            attacker.send([wire.encode(wire.NextFrames(id=1, group="b", timeout_s=60, **fields))])
            attacker.send([wire.encode(wire.Wait(id=1, stream=corpus.REF, above=9, timeout_s=60))])
            time.sleep(0.3)
            calls = []
            real = service._server._retry_overdue
            service._server._retry_overdue = lambda: (calls.append(1), real())
            time.sleep(0.5)
    assert len(calls) < 20


def test_many_clients_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr("streaming.server._KEEP_CLIENTS", 20)
    monkeypatch.setattr("streaming.handlers.desk._KEEP_GROUPS", 5)
    with serving(tmp_path) as service, producing(service.address) as out:
        out.send(pixels(0))
        for n in range(60):
            with Attacker(service.address) as attacker:
                attacker.send([wire.encode(wire.Acknowledge(id=1, stream=corpus.REF, group=f"g{n}", leases=[]))])
                assert attacker.socket.poll(3000)
        time.sleep(0.2)
        out.send(pixels(1))
        assert len(service._server._clients) <= 20
        assert len(service._server.desk.groups) <= 5
