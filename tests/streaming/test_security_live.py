"""Tokens and encryption on a running service: held against every request, also of connections that are open."""

import contextlib
import time

import numpy as np
import pytest
import zmq

from storage.annotations import make_batch
from storage.errors import AccessDenied, CredentialsUnusable, ServiceUnavailable
from storage.frame import FrameInfo
from storage.models import StreamHeader
from streaming import client, wire
from streaming.client import Connection
from streaming.handlers import HANDLERS
from streaming.producer import Producer
from streaming.retrieval import open_run
from streaming.security import TokenBook, server_keys, service_folder
from streaming.security.tokens import CLOCK_SKEW_S

from .harness import pixels, serving, wait_for

LYSO, OTHER = (wire.StreamRef(experiment, 1, "eiger") for experiment in ("lyso", "other"))
HEADER = StreamHeader(experiment="lyso", run=1, data_source="cam", shape=(2,), dtype="uint8").model_dump_json().encode()
# A request of each kind, with what it is about left open.
REQUESTS = {
    "OpenRun": lambda ref: wire.OpenRun(id=0, experiment=ref.experiment, run=1),
    "GetEvents": lambda ref: wire.GetEvents(id=0, experiment=ref.experiment, run=1),
    "GetAnnotations": lambda ref: wire.GetAnnotations(id=0, experiment=ref.experiment, run=1),
    "Wait": lambda ref: wire.Wait(id=0, stream=ref),
    "Read": lambda ref: wire.Read(id=0, stream=ref, start=0, stop=1),
    "Latest": lambda ref: wire.Latest(id=0, stream=ref),
    "WaitChunk": lambda ref: wire.WaitChunk(id=0, stream=ref, chunk=0),
    "GetPlane": lambda ref: wire.GetPlane(id=0, stream=ref, name="pixel_mask"),
    "GetLedger": lambda ref: wire.GetLedger(id=0, stream=ref),
    "NextFrames": lambda ref: wire.NextFrames(id=0, stream=ref, group="g", member="m"),
    "Acknowledge": lambda ref: wire.Acknowledge(id=0, stream=ref, group="g", leases=[]),
    "GetGroups": lambda ref: wire.GetGroups(id=0, stream=ref),
    "SeekGroup": lambda ref: wire.SeekGroup(id=0, stream=ref, group="g", frame_index=0),
    "DeadLetters": lambda ref: wire.DeadLetters(id=0, stream=ref, group="g", action="drop"),
    "StartRun": lambda ref: wire.StartRun(id=0, experiment=ref.experiment),
    "StopRun": lambda ref: wire.StopRun(id=0, experiment=ref.experiment, run=1),
    "AddEvent": lambda ref: wire.AddEvent(id=0, experiment=ref.experiment, run=1, kind="comment", payload={}),
    "Annotate": lambda ref: wire.Annotate(id=0, experiment=ref.experiment, run=1),
    "StartStream": lambda ref: wire.StartStream(id=0, header=HEADER.replace(b"lyso", ref.experiment.encode())),
    "PutFrames": lambda ref: wire.PutFrames(id=0, stream=ref, infos=[FrameInfo(frame_index=3, size_bytes=0)]),
    "FinishStream": lambda ref: wire.FinishStream(id=0, stream=ref),
}
FILTERED = {"ListRuns", "GetStatus"}


class Guarded:
    """A service that wants tokens, with a run in each of two experiments, and who makes the tokens."""

    def __init__(self, root, service):
        self.root, self.service, self.address = root, service, service.address
        self.book = TokenBook(service_folder(root))
        for experiment in ("lyso", "other"):
            token = self.token("write", experiment)
            with Producer(self.address, experiment, "eiger", token=token) as producer, producer.run(1) as out:
                out.send(pixels(0))
            with self.connected(token) as connection:
                connection.ask(REQUESTS["NextFrames"](wire.StreamRef(experiment, 1, "eiger")))
                wait_for(lambda: [row["state"] for row in connection.ask_json(wire.ListRuns(id=0))] == ["completed"])

    def token(self, scope, *experiments, life_s=600):
        return self.book.issue("jane", list(experiments), scope, life_s)[0]

    def revoke(self, token):
        # As `nearline token revoke` does: in a process, and a book, of its own.
        TokenBook(service_folder(self.root)).revoke(self.book.check(token).id)

    @contextlib.contextmanager
    def connected(self, token):
        connection = Connection(self.address, token=token)
        try:
            yield connection
        finally:
            connection.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with serving(root, wants_tokens=True) as service:
        yield Guarded(root, service)


def test_every_request_is_tried_here():
    assert {kind.__name__ for kind in HANDLERS} == set(REQUESTS) | FILTERED


@pytest.mark.parametrize("name", REQUESTS)
def test_another_experiment_is_out_of_reach(guarded, name):
    refused = pytest.raises(AccessDenied, match="access to experiment 'other' is needed")
    with guarded.connected(guarded.token("admin", "lyso")) as connection, refused:
        connection.ask(REQUESTS[name](OTHER))


@pytest.mark.parametrize("name", [kind.__name__ for kind, handler in HANDLERS.items() if handler.scope == "write"])
def test_who_may_read_may_not_write(guarded, name):
    with guarded.connected(guarded.token("read", "lyso")) as connection:
        with pytest.raises(AccessDenied, match=r"write access to .* is needed.* gives read access to lyso"):
            connection.ask(REQUESTS[name](LYSO))
        assert len(connection.ask_frames(wire.Read(id=0, stream=LYSO, start=0, stop=9))[0].infos) == 1


def test_who_may_read_reads_all_of_it(guarded, monkeypatch):
    monkeypatch.setenv("NEARLINE_TOKEN", guarded.token("read", "lyso"))
    run = open_run(f"{guarded.address}/lyso/1")
    assert [frame.frame_index for frame in run["eiger"].follow("mine")] == [0]
    assert (run.ledger()["eiger"].is_balanced, len(run.annotations)) == (True, 0)
    with pytest.raises(AccessDenied, match="write access to experiment 'lyso'"):
        run.add_annotations(make_batch({"laser": True}, frames=0))
    with pytest.raises(AccessDenied, match="read access to experiment 'other'"):
        open_run(f"{guarded.address}/other/1")


@pytest.mark.parametrize(
    ("experiments", "seen"),
    [(["lyso"], {"lyso"}), (["*"], {"lyso", "other"}), (["nothing"], set())],
    ids=["one", "all", "none"],
)
def test_lists_show_what_the_token_reaches(guarded, experiments, seen):
    with guarded.connected(guarded.token("read", *experiments)) as connection:
        status = connection.ask_json(wire.GetStatus(id=0))
        for rows in (connection.ask_json(wire.ListRuns(id=0)), status["streams"], status["groups"]):
            assert {row["experiment"] for row in rows} == seen


def test_nobody_lists_another_experiment(guarded):
    refused = pytest.raises(AccessDenied, match="read access to experiment 'other'")
    with guarded.connected(guarded.token("read", "lyso")) as connection, refused:
        connection.ask(wire.ListRuns(id=0, experiment="other"))


@pytest.mark.parametrize("token", ["", "nonsense", "e30.e30.e30", None])
def test_nobody_comes_in_without_a_token(guarded, token, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("NEARLINE_TOKEN", raising=False)
    with pytest.raises(AccessDenied, match="nearline token create"):
        Connection(guarded.address, token=token)


def test_a_revoked_token_ends_in_mid_connection(guarded):
    token = guarded.token("read", "lyso")
    with guarded.connected(token) as connection, guarded.connected(guarded.token("read", "lyso")) as untouched:
        connection.ask(REQUESTS["Read"](LYSO))
        guarded.revoke(token)
        assert "been revoked" in wait_for(lambda: refusal(connection), timeout=5)
        untouched.ask(REQUESTS["Read"](LYSO))


def test_a_token_expires_in_mid_connection(guarded, monkeypatch):
    with guarded.connected(guarded.token("read", "lyso", life_s=60)) as connection:
        connection.ask(REQUESTS["Read"](LYSO))
        monkeypatch.setattr(guarded.service._authority, "clock", lambda: time.time() + 61 + CLOCK_SKEW_S)
        assert "has expired" in refusal(connection)


def test_a_producer_whose_token_is_revoked_stores_nothing_more(guarded):
    token = guarded.token("write", "lyso")
    with Producer(guarded.address, "lyso", "cam", token=token) as producer:
        out = producer.run()
        out.send(pixels(0))
        guarded.revoke(token)
        with pytest.raises(AccessDenied, match="been revoked"):
            wait_for(lambda: out.send(pixels(1)) > 1000, timeout=5)
        with pytest.raises(AccessDenied, match="been revoked"):
            out.finish()


def refusal(connection):
    """What the service says against a read; None while it allows it."""
    try:
        connection.ask(REQUESTS["Read"](LYSO))
    except AccessDenied as error:
        return str(error)
    return None


# ---- encryption ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encrypting(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with serving(root, encrypts=True) as service:
        yield service, server_keys(service_folder(root)).public.decode()


KEYS = {"none": None, "another service's": zmq.curve_keypair()[0].decode()}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_who_has_not_the_key_hears_nothing(encrypting, key, monkeypatch):
    service, public = encrypting
    monkeypatch.setattr(client, "_CONNECT_S", 0.5)
    with pytest.raises(ServiceUnavailable, match=r"NEARLINE_SERVER_KEY, printed by `nearline token key`"):
        Connection(service.address, server_key=key)
    Connection(service.address, server_key=public).close()


def test_a_plain_service_does_not_answer_who_wants_encryption(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_CONNECT_S", 0.5)
    with serving(tmp_path) as service, pytest.raises(ServiceUnavailable, match="no answer from a Nearline service"):
        Connection(service.address, server_key=KEYS["another service's"])


def test_a_key_that_is_none_is_named(encrypting):
    with pytest.raises(CredentialsUnusable, match="not the public key of a service"):
        Connection(encrypting[0].address, server_key="secret")


def test_what_is_stored_and_read_is_the_same_encrypted(encrypting, monkeypatch):
    service, public = encrypting
    monkeypatch.setenv("NEARLINE_SERVER_KEY", public)
    with Producer(service.address, "lyso", "eiger") as producer, producer.run() as out:
        for future in [out.put(pixels(index)) for index in range(20)]:
            future.result(10)
    frames = list(open_run(f"{service.address}/lyso/1")["eiger"].follow("mine"))
    assert [np.array_equal(frame.data, pixels(frame.frame_index)) for frame in frames] == [True] * 20
