"""What the service is measured against carries every message, or the figures beside it mean nothing."""

import os
import threading

import pytest
import zmq

from benchmarks import jetstream, redis_streams
from benchmarks.bare import BareLoop
from benchmarks.frames import FramesLost
from benchmarks.jetstream import JetStream
from benchmarks.program import find_program
from benchmarks.redis_streams import RedisStreams
from nearline.children import Children, free_port

# One larger than NATS takes unless told otherwise.
BLOBS = [bytes([number]) * size for number, size in enumerate((1, 1000, 300_000, 1_300_000))]
N = 50

needs_redis = pytest.mark.skipif(find_program(redis_streams.PROGRAM) is None, reason="redis-server is not installed")
needs_nats = pytest.mark.skipif(find_program(jetstream.PROGRAM) is None, reason="nats-server is not installed")


@pytest.fixture
def children(tmp_path):
    found = Children(tmp_path / "logs")
    yield found
    found.stop_all()


def through(server, send, blobs):
    """Send and drain at once, as the benchmark does; the sender's answer, and when the last message came."""
    answers = []
    sender = threading.Thread(target=lambda: answers.append(send(server.port, blobs, N)))
    sender.start()
    last_ns = server.drain(N, blobs)
    sender.join()
    return answers[0], last_ns


@pytest.mark.parametrize("sync_s", [0.0, 0.01], ids=["unsynced", "synced"])
def test_the_bare_loop_carries_and_writes_everything(children, tmp_path, sync_s):
    incoming, serving = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    children.start("bare", ["benchmarks.bare", incoming, serving, str(tmp_path / "bare"), str(sync_s)], os.environ)
    push = zmq.Context.instance().socket(zmq.PUSH)
    push.bind(incoming)
    loop = BareLoop(serving)
    for _ in range(2):  # the second series begins in an empty file
        loop.begin()
        for number in range(N):
            push.send(BLOBS[number % len(BLOBS)])
        loop.drain(N)
        assert (tmp_path / "bare").read_bytes() == b"".join(BLOBS[number % len(BLOBS)] for number in range(N))
    loop.close()
    push.close()


@needs_redis
@pytest.mark.parametrize("sync", ["everysec", "always"])
def test_redis_carries_everything(children, tmp_path, sync):
    server = RedisStreams(children, tmp_path / "redis")
    for _ in range(2):
        server.begin(sync)
        answer, last_ns = through(server, redis_streams.send, BLOBS)
        assert answer["first_ns"] < min(answer["last_ns"], last_ns)
    server.close()


@needs_redis
def test_other_messages_than_those_sent_are_noticed(children, tmp_path):
    server = RedisStreams(children, tmp_path / "redis")
    server.begin("everysec")
    redis_streams.send(server.port, [b"other"], N)
    with pytest.raises(FramesLost):
        server.drain(N, BLOBS)
    server.close()


@needs_nats
def test_jetstream_carries_everything(children, tmp_path):
    server = JetStream("nats", children, tmp_path / "nats", "")
    for _ in range(2):
        server.begin()
        answer, last_ns = through(server, jetstream.send, BLOBS)
        assert answer["first_ns"] < min(answer["last_ns"], last_ns)
    server.close()


@needs_nats
@pytest.mark.parametrize(("sync", "is_known"), [("", True), ("no_such_setting: 1", False)], ids=["default", "unknown"])
def test_a_setting_that_the_server_does_not_have_is_found_out(tmp_path, sync, is_known):
    assert jetstream.knows(sync, tmp_path) is is_known
