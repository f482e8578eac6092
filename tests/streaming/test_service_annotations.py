"""Annotations over the wire: what the service keeps, refuses and gives back in pieces."""

import json

import pytest

from storage.annotations import make_batch
from storage.errors import BadAnnotation, BadName, ProtocolError, RunNotFound, StreamNotFound
from streaming import wire
from streaming.client import Client
from streaming.handlers import annotations
from streaming.service_annotations import ServiceAnnotations

from .harness import connected, record_run, serving


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data")) as service:
        for run in range(1, 5):
            record_run(service.address, range(3), run)
        yield service.address


def batch(number: int, **options: object) -> bytes:
    return make_batch({"delay": number}, frames=number, by="alice", **options).encode()


def test_what_was_kept_comes_back(address):
    store = ServiceAnnotations(Client(address), "lyso", 1)
    batches = [batch(n) for n in range(3)]
    assert [store.append(one) for one in batches] == [1, 2, 3]
    assert store.read_all() == list(zip([1, 2, 3], batches, strict=True))
    assert store.read_all(2) == [(3, batches[2])]
    assert store.read_all(3) == []


def test_a_repeated_request_is_answered_again(address):
    store = ServiceAnnotations(Client(address), "lyso", 2)
    assert [store.append(batch(0)), store.append(batch(0))] == [1, 2]  # said twice: two times
    same = batch(1)
    assert [store.append(same) for _ in range(3)] == [3, 3, 3]
    assert len(store.read_all()) == 3


@pytest.mark.parametrize(("limit", "value"), [("_MOST_BATCHES", 2), ("MOST_BYTES_AN_ANSWER", 1)])
def test_many_come_in_pieces(address, monkeypatch, limit, value):
    store = ServiceAnnotations(Client(address), "lyso", 3)
    for n in range(5):
        store.append(batch(n, data_source="eiger"))
    whole = store.read_all()
    monkeypatch.setattr(annotations, limit, value)
    with connected(address) as connection:
        reply, parts = connection.ask(wire.GetAnnotations(id=0, experiment="lyso", run=3))
    assert (len(reply.numbers), len(parts), reply.is_end) == (value, value, False)
    assert store.read_all() == whole


HOSTILE = {
    "nothing": ([], ProtocolError),
    "two": ([batch(1), batch(2)], ProtocolError),
    "no batch": ([b"{}"], BadAnnotation),
    "path": ([batch(1).replace(b'"data_source":null', b'"data_source":"../x"')], BadName),
    "no such source": ([batch(1, data_source="jungfrau")], StreamNotFound),
    "other kind": ([batch(1).replace(b'"values":[1]', b'"values":["one"]')], BadAnnotation),
    "other spelling": ([batch(1).replace(b"delay", b"Delay")], BadAnnotation),
}


@pytest.mark.parametrize(("parts", "error"), HOSTILE.values(), ids=HOSTILE)
def test_what_cannot_be_kept_is_refused(address, parts, error):
    with connected(address) as connection:
        connection.ask(wire.Annotate(id=0, experiment="lyso", run=4), [batch(0)])
        before = connection.ask(wire.GetAnnotations(id=0, experiment="lyso", run=4))[0].numbers
        with pytest.raises(error):
            connection.ask(wire.Annotate(id=0, experiment="lyso", run=4), parts)
        assert connection.ask(wire.GetAnnotations(id=0, experiment="lyso", run=4))[0].numbers == before


@pytest.mark.parametrize("request_type", [wire.Annotate, wire.GetAnnotations])
def test_a_run_that_is_not_there(address, request_type):
    with connected(address) as connection, pytest.raises(RunNotFound, match="no run lyso/99"):
        connection.ask(request_type(id=0, experiment="lyso", run=99), [batch(1)])


def test_the_kept_batch_is_the_one_sent(address):
    """Also what a newer client puts into it."""
    content = json.loads(batch(7)) | {"weather": "rain"}
    store = ServiceAnnotations(Client(address), "lyso", 1)
    number = store.append(json.dumps(content).encode())
    ((kept, found),) = store.read_all(number - 1)
    assert (kept, json.loads(found)["statements"]) == (number, content["statements"])
