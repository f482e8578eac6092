"""How streams and runs begin and end, also when somebody fails or is restarted in between."""

import threading
import time
from pathlib import Path

import pytest

from nearline.children import free_port
from storage.models import RunState, StreamHeader
from storage.run_folder import RunFolder
from storage.stream_source import FolderSource
from streaming.producer import Producer
from streaming.retrieval import open_run
from tests.streaming.harness import SHAPE, pixels, serving


def header(data_source: str, run: int = 1, **options) -> StreamHeader:
    fields = {"experiment": "lyso", "run": run, "shape": SHAPE, "dtype": "uint16", "frames_per_chunk": 4}
    return StreamHeader(data_source=data_source, **fields, **options)


def wait_until(condition, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_stream_that_has_just_begun_is_live(tmp_path, monkeypatch):
    """Between its header and its first frame a stream must not read as ended: followers would leave."""
    publish = RunFolder.add_stream
    seen = []

    def look_when_published(folder: RunFolder, new: StreamHeader) -> None:
        publish(folder, new)
        seen.append(FolderSource(folder, new.data_source).status().is_terminal)

    monkeypatch.setattr(RunFolder, "add_stream", look_when_published)
    with serving(tmp_path) as service, Producer(service.address, "lyso", "eiger") as producer:
        producer.run().start(header("eiger"))
    assert seen == [False]


def test_a_producer_that_fails_aborts_its_run(tmp_path):
    with serving(tmp_path) as service, Producer(service.address, "lyso", "cam") as producer:
        with pytest.raises(ZeroDivisionError):
            _send_and_fail(producer)
        run = open_run(f"{service.address}/lyso/1")
        assert run.state is RunState.aborted
        assert len(list(run["cam"])) == 1
    (event,) = RunFolder.open(tmp_path / "lyso" / "1").events("run_finished")
    assert "ZeroDivisionError" in event.payload["cause"]


def _send_and_fail(producer: Producer) -> None:
    with producer.run() as out:
        out.send(pixels(0))
        raise ZeroDivisionError


def test_a_run_in_which_nothing_was_sent_ends(tmp_path):
    with serving(tmp_path) as service, Producer(service.address, "lyso", "cam") as producer:
        with producer.run():
            pass
        run = open_run(f"{service.address}/lyso/1")
        assert run.state is RunState.completed
        assert list(run["cam"].follow()) == []


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_one_aborted_stream_aborts_the_run_whichever_ends_last(tmp_path, order):
    with serving(tmp_path) as service:
        streams = {}
        for name in ("one", "two"):
            producer = Producer(service.address, "lyso", name)
            streams[name] = (producer, producer.derived(1, header(name)) if streams else producer.run())
        streams["one"][1].start(header("one"))
        for name in order:
            streams[name][1].finish(aborted="beam lost" if name == "one" else None)
        assert open_run(f"{service.address}/lyso/1").state is RunState.aborted
        for producer, _ in streams.values():
            producer.close()


def test_each_gap_is_awaited_for_itself(tmp_path):
    """A frame a moment late is waited for, though an older one has been given up."""
    with serving(tmp_path, gap_timeout_s=0.8) as service, Producer(service.address, "lyso", "eiger") as producer:
        out = producer.run()
        out.start(header("eiger"))
        stream = open_run(f"{service.address}/lyso/1")["eiger"]
        out.send(pixels(1), frame_index=1)  # 0 never comes
        time.sleep(0.5)
        out.send(pixels(3), frame_index=3)  # 2 comes a little later than 3
        wait_until(lambda: stream.status.watermark >= 2)
        out.send(pixels(2), frame_index=2)
        out.finish()
        ledger = stream.ledger()
        assert (ledger.stored, ledger.missing, ledger.late) == (3, 1, 0)
        assert [(r.start, r.cause) for r in ledger.ranges] == [(0, "not received")]


def test_a_follower_outlives_a_restart_of_the_service(tmp_path):
    """The same loop goes on when the service comes back at the same address within some seconds."""
    bind = f"tcp://127.0.0.1:{free_port()}"
    seen: list[int] = []

    def follow() -> None:
        seen.extend(frame.frame_index for frame in open_run(f"{bind}/lyso/1")["eiger"].follow())

    with serving(tmp_path, bind=bind) as service, Producer(service.address, "lyso", "eiger") as producer:
        out = producer.run()
        out.start(header("eiger"))
        for index in range(6):
            out.send(pixels(index), frame_index=index)
        follower = threading.Thread(target=follow)
        follower.start()
        wait_until(lambda: len(seen) == 6)
        _crash(service)
    time.sleep(1.5)
    with serving(tmp_path, bind=bind) as service, Producer(service.address, "lyso", "eiger") as producer:
        out = producer.derived(1, header("eiger"))
        for index in range(6, 10):
            out.send(pixels(index), frame_index=index)
        out.finish()
        follower.join(20)
    assert not follower.is_alive()
    assert seen == list(range(10))


def _crash(service) -> None:
    """Let the service forget its runs without ending them, as `kill -9` would."""
    service.recorder._abort_all = lambda: None  # type: ignore[method-assign]


def test_paths_with_typing_errors_are_called_paths(tmp_path):
    from storage.errors import RunNotFound

    with pytest.raises(RunNotFound, match=r"no run\.json"):
        open_run(str(Path("data") / "lyso" / "1"))


def test_results_of_an_ended_run_go_on_after_a_restart(tmp_path):
    """The run ended before the service died: only the derived stream is unfinished, and is taken up again."""
    from streaming.derived import Row, open_derived

    bind = f"tcp://127.0.0.1:{free_port()}"
    results = StreamHeader(
        experiment="lyso", run=1, data_source="eiger.results@p1", kind="table", codec="raw", frames_per_chunk=4,
        parent="eiger", processing="p1",
    )  # fmt: skip
    with serving(tmp_path, bind=bind) as service:
        with Producer(service.address, "lyso", "eiger") as producer, producer.run() as out:
            for index in range(6):
                out.send(pixels(index))
        derived = open_derived(open_run(f"{bind}/lyso/1"), results)
        derived.send([Row(0, None, {"n_peaks": 3}), Row(1, None, {"n_peaks": 4})])
        _crash(service)
    with serving(tmp_path, bind=bind):
        derived.send([Row(1, None, {"n_peaks": 4}), Row(2, None, {"n_peaks": 5})])
        derived.finish(6)
        stream = open_run(f"{bind}/lyso/1")["eiger.results@p1"]
        assert [(row.frame_index, row.meta["n_peaks"]) for row in stream] == [(0, 3), (1, 4), (2, 5)]
        assert stream.ledger().is_balanced


def test_an_interrupted_run_says_what_is_not_in_a_chunk(tmp_path, caplog):
    with serving(tmp_path) as service:
        with Producer(service.address, "lyso", "eiger") as producer:
            out = producer.run()
            out.start(header("eiger"))
            for index in range(6):
                out.send(pixels(index))
        _crash(service)
    stream = open_run(tmp_path / "lyso" / "1")["eiger"]
    assert [(chunk.start, chunk.stop) for chunk in stream.chunks()] == [(0, 4)]
    assert "frames from 4 on" in caplog.text
    assert len(list(stream)) == 6
