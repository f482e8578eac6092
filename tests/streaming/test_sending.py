"""Sending without waiting: futures, a bounded window, retries that cannot duplicate, several producers, parts."""

import asyncio
import threading
import time

import numpy as np
import pytest

from storage.errors import BadFrame, BadName, IndexConflict, StreamNotOpen
from storage.frame import FrameInfo
from storage.models import RunState, StreamHeader
from streaming import wire
from streaming.control import start_run, stop_run
from streaming.producer import Producer
from streaming.retrieval import open_run

from .harness import ServiceProcess, arm, blob, connected, detector, pixels, producing, serving, settings, wait_for


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data"), gap_timeout_s=0.2) as service:
        yield service


@pytest.fixture
def producer(service, request):
    """An experiment for each test."""
    with Producer(service.address, f"e{abs(hash(request.node.name))}", "cam") as producer:
        yield producer


def opened(service, producer, run=1):
    return open_run(f"{service.address}/{producer.experiment}/{run}")


@pytest.mark.parametrize("ack", ["buffered", "stored", "durable"])
def test_put_gives_futures_of_indices(service, request, ack):
    with Producer(service.address, f"e{abs(hash(request.node.name))}", "cam", ack=ack) as producer:
        with producer.run() as out:
            futures = [out.put(pixels(i), meta={"i": i}) for i in range(40)]
            assert [f.result(20) for f in futures] == list(range(40))
        frames = list(opened(service, producer)["cam"])
    assert [f.meta["i"] for f in frames] == list(range(40))
    assert all(np.array_equal(f.data, pixels(f.frame_index)) for f in frames)


def test_put_in_asyncio(service, producer):
    async def send(out):
        return await asyncio.gather(*(asyncio.wrap_future(out.put(pixels(i))) for i in range(10)))

    with producer.run() as out:
        assert asyncio.run(send(out)) == list(range(10))


def test_rows_by_the_thousand(service, producer):
    with producer.run() as out:
        for i in range(5000):
            out.put(meta={"i": i})
        out.flush(30)
    stream = opened(service, producer)["cam"]
    assert [f.meta["i"] for f in stream] == list(range(5000))
    assert stream.ledger().stored == 5000


def test_refused_frame_fails_its_future_and_the_flush(service, producer):
    with producer.run() as out:
        out.put(pixels(0), frame_index=0)
        bad = out.put(pixels(1), frame_index=0)
        with pytest.raises(IndexConflict, match="frame 0 of cam exists already"):
            out.flush(10)
        assert isinstance(bad.exception(), IndexConflict)
        assert out.send(pixels(2)) == 1
    assert opened(service, producer).state is RunState.completed


def test_late_frame_is_kept_and_flagged(service, producer):
    out = producer.run()
    header = StreamHeader(
        experiment=producer.experiment, run=1, data_source="cam", shape=(64, 80), dtype="uint16", frames_per_chunk=2
    )
    out.start(header)
    out.send(pixels(1), frame_index=1)
    stream = opened(service, producer)["cam"]
    wait_for(lambda: stream.status.n_sealed == 1)
    seen = [(f.frame_index, f.info.late) for f in stream.follow(group="g", timeout=0.1)]
    assert out.send(pixels(0), frame_index=0) == 0
    seen += [(f.frame_index, f.info.late) for f in stream.follow(group="g", timeout=0.5)]
    out.finish()
    assert seen == [(1, False), (0, True)]
    assert np.array_equal(stream[0].data, pixels(0))
    ledger = stream.ledger()
    assert (ledger.late, ledger.stored, ledger.missing) == (1, 1, 0)
    assert ledger.is_balanced


def test_a_frame_that_its_group_had_passed_is_flagged_before_its_chunk_is_sealed_too(tmp_path):
    with serving(tmp_path, gap_timeout_s=0.3) as service, producing(service.address) as out:
        out.send(pixels(1), frame_index=1)
        stream = open_run(f"{service.address}/lyso/1")["eiger"]
        follow = stream.follow(group="g", timeout=10)
        first = next(follow)
        assert out.send(pixels(0), frame_index=0) == 0
        second = next(follow)
        follow.close()
        assert [(f.frame_index, f.is_late, f.delivery) for f in (first, second)] == [(1, False, 1), (0, True, 1)]
        assert stream.status.n_sealed == 0
        assert not stream[0].is_late, "to others it is a frame like any other"


def test_window_is_bounded(tmp_path, monkeypatch):
    """A producer that is faster than the service waits; nothing piles up without end."""
    monkeypatch.setattr("streaming.producer._WINDOW_FRAMES", 10)
    with serving(tmp_path) as service, producing(service.address) as out:
        out.send(pixels(0))
        stuck, release = threading.Event(), threading.Event()
        service.recorder.writer.do(lambda: (stuck.set(), release.wait(20)))
        assert stuck.wait(5)
        put = []
        thread = threading.Thread(target=lambda: [put.append(out.put(pixels(i))) for i in range(1, 31)])
        thread.start()
        time.sleep(0.5)
        assert len(put) == 10, "as many as the window holds"
        release.set()
        thread.join(20)
        assert sorted(f.result(20) for f in put) == list(range(1, 31))


# ---- retries ----------------------------------------------------------------------------------------


def put(connection, infos, blobs, ack="stored"):
    request = wire.PutFrames(id=0, stream=wire.StreamRef("lyso", 1, "eiger"), infos=infos, ack=ack)
    reply, _ = connection.ask(request, blobs)
    return list(zip(reply.indices, reply.outcomes, strict=True))


def row(sequence, index=-1, producer="p", content=None):
    return FrameInfo(frame_index=index, size_bytes=len(blob(content or sequence)), producer=producer, sequence=sequence)


def test_repeated_sending_gets_the_first_answer(tmp_path):
    with serving(tmp_path) as service, producing(service.address) as out, connected(service.address) as connection:
        out.send(pixels(99))
        first = put(connection, [row(0), row(1)], [blob(0), blob(1)])
        again = put(connection, [row(1), row(0), row(2)], [blob(1), blob(0), blob(2)])
        other = put(connection, [row(0, producer="q")], [blob(0)])
        assert first == [(1, "kept"), (2, "kept")]
        assert again == [(2, "kept"), (1, "kept"), (3, "kept")]
        assert other == [(4, "kept")], "another producer's count is its own"
        assert put(connection, [row(0, index=7)], [blob(0)]) == [(7, "conflict")], "one sending, two places"


@pytest.mark.parametrize("ack", ["stored", "durable"])
def test_repeated_sending_after_a_kill_gets_the_first_answer(tmp_path, ack):
    with ServiceProcess(tmp_path) as service, producing(service.address) as out:
        out.send(pixels(99))
        with connected(service.address) as connection:
            first = put(connection, [row(5), row(6)], [blob(5), blob(6)], ack)
        service.kill()
        with ServiceProcess(tmp_path, bind=service.address) as restarted, connected(restarted.address) as connection:
            assert put(connection, [row(5), row(6), row(7)], [blob(5), blob(6), blob(7)]) == [*first, (3, "kept")]
            ledger = open_run(f"{restarted.address}/lyso/1")["eiger"].ledger()
            assert (ledger.stored, ledger.duplicate) == (4, 0)


def test_producer_does_not_notice_a_restart(tmp_path):
    with ServiceProcess(tmp_path) as service, producing(service.address) as out:
        futures = []
        for i in range(200):
            futures.append(out.put(pixels(i)))
            if i == 100:
                service.kill()
                restarted = ServiceProcess(tmp_path, bind=service.address)
        with restarted:
            indices = [f.result(30) for f in futures]
            out.finish()
            stream = open_run(f"{restarted.address}/lyso/1")["eiger"]
            frames = list(stream.follow(timeout=10))
            assert sorted(indices) == list(range(200)) == [f.frame_index for f in frames]
            assert all(np.array_equal(frames[index].data, pixels(i)) for i, index in enumerate(indices))
            assert stream.ledger().is_balanced


# ---- several producers -----------------------------------------------------------------------------


def test_two_producers_fill_one_stream(service, producer):
    """Automatic indices of two producers interleave without a gap; the stream ends with the second."""
    first = producer.run()
    first.send(pixels(0))
    with Producer(service.address, producer.experiment, "cam") as other:
        second = other.run(1, join=True)
        futures = [out.put(pixels(i)) for i in range(1, 21) for out in (first, second)]
        indices = sorted(f.result(20) for f in futures)
        first.finish()
        stream = opened(service, producer)["cam"]
        assert stream.is_live, "the other producer goes on"
        assert second.send(pixels(50)) == 41
        second.finish()
    assert indices == list(range(1, 41))
    assert len(list(stream.follow(timeout=10))) == 42
    assert opened(service, producer).state is RunState.completed


def test_joining_producer_outlives_a_restart(tmp_path):
    with ServiceProcess(tmp_path) as service, producing(service.address) as first:
        first.send(pixels(0))
        with Producer(service.address, "lyso", "eiger") as other:
            second = other.run(1, join=True)
            second.send(pixels(1))
            service.kill()
            with ServiceProcess(tmp_path, bind=service.address) as restarted:
                first.finish()
                stream = open_run(f"{restarted.address}/lyso/1")["eiger"]
                assert stream.is_live
                second.send(pixels(2))
                second.finish()
                assert [f.frame_index for f in stream.follow(timeout=10)] == [0, 1, 2]


def test_second_producer_with_other_frames(service, producer):
    producer.run().send(pixels(0))
    with Producer(service.address, producer.experiment, "cam") as other, pytest.raises(ValueError, match="same header"):
        other.run(1, join=True).send(np.zeros((3, 3), "uint8"))


# ---- parts ---------------------------------------------------------------------------------------------


def test_modules_sent_by_different_producers(service, producer):
    """A frame is handed out when all its parts are there; one that stays incomplete is, as such."""
    header = StreamHeader(
        experiment=producer.experiment, run=1, data_source="cam", shape=(64, 80), dtype="uint16", parts=2
    )
    left = producer.run()
    left.start(header)
    with Producer(service.address, producer.experiment, "cam") as other:
        right = other.run(1, join=True)
        right.start(header)
        for i in range(4):
            left.send(pixels(i), frame_index=i, part=0)
        stream = opened(service, producer)["cam"]
        right.send(pixels(100), frame_index=0, part=1)
        assert wait_for(lambda: stream.status.watermark) == 1, "the others are not whole yet"
        for i in (1, 3):
            right.send(pixels(100 + i), frame_index=i, part=1)
        left.finish()
        right.finish()
    frames = list(stream.follow(timeout=10))
    assert [f.frame_index for f in frames] == [0, 1, 2, 3]
    for i in (0, 1, 3):
        assert np.array_equal(frames[i].data, np.stack([pixels(i), pixels(100 + i)]))
    assert [f.is_complete for f in frames] == [True, True, False, True]
    ledger = stream.ledger()
    assert ledger.is_balanced
    assert opened(service, producer).state is RunState.incomplete
    in_group = [(f.frame_index, len(f.parts)) for f in stream.follow(group="g", timeout=5)]
    assert in_group == [(i, 2) for i in range(4)]


def test_part_that_cannot_be(service, producer):
    out = producer.run()
    out.send(pixels(0))
    with pytest.raises(BadFrame, match="part 1 of frame 1"):
        out.send(pixels(1), frame_index=1, part=1)


# ---- runs ----------------------------------------------------------------------------------------------


def test_metadata_that_comes_later_and_the_next_run(service, producer):
    with producer.run(user_data={"operator": "Ada"}) as out:
        out.send(pixels(0))
        out.update(temperature_k=100.0)
        out.finish(next_run=2)
    run = opened(service, producer)
    assert run.metadata == {"operator": "Ada", "temperature_k": 100.0}
    assert run.next_run == 2
    folder = open_run(run.folder)
    assert (folder.metadata, folder.next_run) == (run.metadata, 2)


def test_starting_a_run_twice_with_one_key(service, producer):
    ask = wire.StartRun(id=0, experiment=producer.experiment, request_key="k")
    first = producer.connection.ask_json(ask)
    assert producer.connection.ask_json(ask) == first
    assert producer.connection.ask_json(wire.StartRun(id=0, experiment=producer.experiment))["run"] == first["run"] + 1


def test_run_of_several_series(tmp_path):
    """Between start and stop all series of the detector are one run, one stream, one count."""
    with detector() as sender, serving(tmp_path, sender.endpoint) as service:
        run = start_run("lyso", service=service.address, sample="s1")
        for series in (1, 2, 3):
            arm(sender, 5, series_id=series)
            for i in range(5):
                sender.send_image(i, blob(10 * series + i))
            sender.send_end()
        stream = wait_for(lambda: _stream_with(service, run, 15))
        assert stream.is_live, "until it is stopped"
        stop_run("lyso", run, service=service.address)
        opened = open_run(f"{service.address}/lyso/{run}")
        assert opened.state is RunState.completed
        frames = list(opened["eiger"])
        assert [bytes(f.blob) for f in frames] == [blob(10 * s + i) for s in (1, 2, 3) for i in range(5)]
        assert [f.info.series_frame for f in frames] == [0, 1, 2, 3, 4] * 3
        arm(sender, 1, series_id=4)
        sender.send_image(0, blob(0))
        sender.send_end()
        assert wait_for(lambda: _stream_with(service, run + 1, 1)), "the next series is a run of its own again"


def test_open_run_outlives_a_kill(tmp_path):
    with detector() as sender, ServiceProcess(tmp_path, sender.endpoint) as service:
        run = start_run("lyso", service=service.address)
        arm(sender, 3, series_id=1)
        for i in range(3):
            sender.send_image(i, blob(i))
        sender.send_end()
        wait_for(lambda: _stream_with(service, run, 3))
        service.kill()
        with ServiceProcess(tmp_path, sender.endpoint, bind=service.address) as restarted:
            arm(sender, 2, series_id=2)
            for i in range(2):
                sender.send_image(i, blob(10 + i))
            sender.send_end()
            wait_for(lambda: _stream_with(restarted, run, 5))
            stop_run("lyso", run, service=restarted.address)
            frames = list(open_run(f"{restarted.address}/lyso/{run}")["eiger"])
    assert [bytes(f.blob) for f in frames] == [blob(i) for i in (0, 1, 2, 10, 11)]


def test_stopping_what_is_not_open(service, producer):
    producer.run().send(pixels(0))
    with pytest.raises(BadName, match="is not open"):
        stop_run(producer.experiment, 1, service=service.address)


def test_sending_after_the_end(service, producer):
    with producer.run() as out:
        out.send(pixels(0))
    with pytest.raises(StreamNotOpen, match="start it first"):
        out.send(pixels(1))


def _stream_with(service, run, n):
    try:
        stream = open_run(f"{service.address}/lyso/{run}")["eiger"]
    except LookupError:
        return None
    return stream if stream.status.watermark >= n else None


def test_settings_refuse_an_open_door(tmp_path):
    with pytest.raises(OSError, match="refusing to listen"), serving(tmp_path, bind="tcp://0.0.0.0:5999"):
        pass
    assert settings(tmp_path).wants_tokens is False
