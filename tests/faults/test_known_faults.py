"""What the campaigns have found and was mended, as small as it gets."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import zmq

from nearline.children import free_port
from storage.frame import FrameInfo
from storage.models import StreamHeader
from storage.run_folder import RunFolder
from storage.stream_source import FolderSource
from storage.stream_store import StreamStore
from streaming import wire
from streaming.client import Connection
from streaming.producer import Producer
from tests.streaming.harness import SHAPE, ServiceProcess, blob, connected, pixels, producing, serving

OF_RUN_1: Any = {"experiment": "lyso", "run": 1, "shape": SHAPE}


def test_a_frame_rejected_after_the_end_leaves_the_ledger_balanced(tmp_path):
    """An image that cannot be used, right behind the detector's end message, while the last chunk is being sealed."""
    ended = threading.Event()
    with serving(tmp_path) as service:
        recorder, header = service.recorder, StreamHeader(data_source="eiger", dtype="uint16", **OF_RUN_1)
        stream = recorder.start_stream(recorder.start_run("lyso", 1), header)
        recorder.submit(stream, [(FrameInfo(frame_index=0), blob(0))])
        recorder.finish_stream(stream, done=lambda error: ended.set())
        recorder.reject(stream, 1, "of another shape")
        assert ended.wait(10)
    assert FolderSource(RunFolder.open(tmp_path / "lyso" / "1"), "eiger").ledger().problems == []


def test_a_stream_with_many_chunks_to_seal_holds_up_no_other(tmp_path, monkeypatch):
    """A detector that jumps by 100 000 frames leaves ten thousand empty chunks; another run ends meanwhile."""
    real = StreamStore.seal

    def slow_seal(self, chunk):
        time.sleep(0.02 * (self.header.run == 1))
        return real(self, chunk)

    monkeypatch.setattr(StreamStore, "seal", slow_seal)
    header = StreamHeader(data_source="eiger", dtype="uint16", frames_per_chunk=10, **OF_RUN_1)
    with serving(tmp_path) as service, Producer(service.address, "lyso", "eiger") as producer:
        out = producer.run(1)
        out.start(header)
        out.send(blob(0), frame_index=0)
        out.send(blob(1), frame_index=1_000)
        time.sleep(0.6)  # the gap has been given up
        with producing(service.address, run=2, data_source="other") as other:
            other.send(pixels(0))
            began = time.monotonic()
            other.finish()
            took_s = time.monotonic() - began
        out.finish()
    assert took_s < 1.0


def test_the_end_of_a_stream_may_be_repeated(tmp_path):
    """A service killed between recording the end and saying so; the client asks the next one again."""
    bind = f"tcp://127.0.0.1:{free_port()}"
    with ServiceProcess(tmp_path, bind=bind) as service, Producer(bind, "lyso", "eiger", name="p") as producer:
        out = producer.run(1)
        out.send(pixels(0))
        out.finish()
        service.kill()
    with ServiceProcess(tmp_path, bind=bind), connected(bind) as connection:
        stream = wire.StreamRef("lyso", 1, "eiger")
        connection.ask(wire.FinishStream(id=0, stream=stream, announced=1, producer="p"))


def test_a_producer_that_is_started_again_goes_on(tmp_path):
    """Automatic indices, the same name, another process: new frames are new sendings."""
    with serving(tmp_path) as service:
        header = StreamHeader(data_source="cam", dtype="uint16", **OF_RUN_1)
        for life in range(2):
            with Producer(service.address, "lyso", "cam", name="cam-a") as producer:
                out = producer.run(1, join=life > 0)
                out.start(header)
                assert [out.send(blob(10 * life + n)) for n in range(3)] == [3 * life + n for n in range(3)]


def test_a_frame_behind_the_end_is_no_failure_of_the_service(tmp_path, caplog):
    """A detector, or a producer that was killed, whose last frames come behind the end of its stream."""
    ended = threading.Event()
    with serving(tmp_path) as service:
        recorder, header = service.recorder, StreamHeader(data_source="eiger", dtype="uint16", **OF_RUN_1)
        stream = recorder.start_stream(recorder.start_run("lyso", 1), header)
        recorder.submit(stream, [(FrameInfo(frame_index=0), blob(0))])
        recorder.finish_stream(stream, done=lambda error: ended.set())
        assert ended.wait(10)
        recorder.submit(stream, [(FrameInfo(frame_index=1), blob(1))])
    assert [record.exc_info for record in caplog.records if record.exc_info] == []


def test_a_client_that_connects_while_the_service_restarts(tmp_path):
    """The service dies when it has taken the greeting and not answered yet; the next one is there at once."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as dying, ThreadPoolExecutor(1) as other:
        address = f"tcp://127.0.0.1:{dying.bind_to_random_port('tcp://127.0.0.1')}"
        connecting = other.submit(Connection, address)
        assert dying.poll(5000)
        dying.recv_multipart()
        dying.close(linger=0)
        with serving(tmp_path, bind=address):
            connecting.result().close()
