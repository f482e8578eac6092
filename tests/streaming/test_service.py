"""The whole service: what it promises when readers sleep, disks fill up and processes die."""

import errno
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

import storage.stream_store
from storage.codec import encode
from storage.errors import CorruptFrame, NearlineError, ServiceUnavailable, SourceBusy
from storage.models import RunState
from storage.run_folder import RunFolder
from streaming.client import Client
from streaming.producer import Producer
from streaming.retrieval import open_run
from streaming.service import Service
from streaming.wire import ListRuns
from tests.real_data import DATA

from .harness import (
    ServiceProcess,
    arm,
    blob,
    connected,
    detector,
    pixels,
    producing,
    record_run,
    serving,
    settings,
    status_of,
    wait_for,
)
from .test_dectris_sender import lz4_blob

CAPTURE = DATA / "eiger2-16m-stream-v2"


def stored(stream) -> dict[int, bytes]:
    return {f.frame_index: bytes(f.blob) for f in stream}


def expected(indices) -> dict[int, bytes]:
    return {i: blob(i) for i in indices}


# ---- slow readers ------------------------------------------------------------------------------------


def settled_rss(service):
    """Memory once the service has loaded what it loads while it starts."""
    seen = [0]

    def is_settled():
        time.sleep(1.0)
        seen.append(service.rss_bytes())
        return seen[-1] - seen[-2] < 1 << 20

    wait_for(is_settled, 60)
    return seen[-1]


def test_sleeping_consumer_misses_nothing_and_memory_stays_bounded(tmp_path):
    """It wakes up when its frames have long left memory: they come from disk by the same call."""
    budget, n = 4 << 20, 400
    noise = np.random.default_rng(0).integers(0, 60000, (16, 256, 256), np.uint16)
    blobs = [encode(frame) for frame in noise]
    with ServiceProcess(tmp_path, buffer_bytes=budget) as service, producing(service.address, run=2) as out:
        # A first run has everything imported that sealing takes; pyarrow takes pandas, where it is installed.
        record_run(service.address, range(2))
        out.send(noise[0])
        following = open_run(f"{service.address}/lyso/2")["eiger"].follow()
        assert next(following).frame_index == 0
        before = settled_rss(service)
        for index in range(1, n):
            out.send(blobs[index % 16])
            if index % 40 == 0:
                assert status_of(service.address)["buffer"]["used_bytes"] <= budget
        out.finish()
        grown = service.rss_bytes() - before
        frames = list(following)
    assert [f.frame_index for f in frames] == list(range(1, n))
    assert all(bytes(f.blob) == blobs[f.frame_index % 16] for f in frames)
    assert sum(len(b) for b in blobs) * n // 16 > 10 * budget, "much more went through than may stay"
    assert grown < 10 * budget


def test_table_rows_count_in_the_budget(tmp_path):
    with serving(tmp_path, buffer_bytes=1 << 20) as service, producing(service.address, data_source="scan") as out:
        for start in range(0, 4000, 500):
            out.send_many([(i, None, {"x": i}) for i in range(start, start + 500)])
        assert service.recorder.buffer.used_bytes <= 1 << 20
        assert [f.meta["x"] for f in open_run(f"{service.address}/lyso/1")["scan"]] == list(range(4000))


# ---- kill -9 ------------------------------------------------------------------------------------------


def test_kill_9_with_a_detector_that_goes_on(tmp_path):
    """What a client saw as stored is still there; the run goes on; what was lost is named."""
    n, seen = 200, {}
    with detector(high_water_mark=2) as eiger:
        blobs = expected(range(n))

        def acquire():
            arm(eiger, n, series_unique_id="01KILLED0000000000000000AB")
            for index in range(n):
                eiger.send_image(index, blobs[index], user_data={"i": index})
                time.sleep(0.005)
            eiger.send_end()

        acquisition = threading.Thread(target=acquire)
        with ServiceProcess(tmp_path, eiger.endpoint) as first:
            acquisition.start()
            wait_for(lambda: (tmp_path / "lyso" / "1" / "eiger.stream.json").exists())
            for frame in open_run(f"{first.address}/lyso/1")["eiger"].follow():
                seen[frame.frame_index] = bytes(frame.blob)
                if len(seen) == 60:
                    break
            first.kill()
        time.sleep(0.1)
        with ServiceProcess(tmp_path, eiger.endpoint) as second:
            run = open_run(f"{second.address}/lyso/1")
            frames = list(run["eiger"].follow())
            acquisition.join()
            ledger, state = run["eiger"].ledger(), run.state
            assert [r["run"] for r in status_of(second.address)["streams"]] == [1], "the same run"
    found = {f.frame_index: bytes(f.blob) for f in frames}
    assert {i: found.get(i) for i in seen} == seen
    assert all(b == blobs[i] for i, b in found.items())
    assert all(f.meta == {"i": f.frame_index} for f in frames)
    assert ledger.is_balanced
    assert ledger.stored == len(found)
    assert ledger.announced == n
    assert ledger.missing == n - len(found)
    assert {r.cause for r in ledger.ranges} <= {"lost while the service was down"}
    assert state is (RunState.completed if len(found) == n else RunState.incomplete)


def test_kill_9_loses_no_frame_acknowledged_as_stored(tmp_path):
    acknowledged = []
    with ServiceProcess(tmp_path) as service:
        threading.Timer(0.5, service.process.kill).start()
        with Producer(service.address, "lyso", "eiger", ack="stored") as producer:
            producer._connection.ask = _impatient(producer._connection.ask)
            out = producer.run(1)
            with pytest.raises(ServiceUnavailable):  # noqa: PT012
                for index in itertools.count():
                    acknowledged.append(out.send(pixels(index % 50)))
    assert len(acknowledged) > 5
    with serving(tmp_path) as service:
        found = stored(open_run(f"{service.address}/lyso/1")["eiger"])
    assert all(found[i] == blob(i % 50) for i in acknowledged)


def _impatient(ask):
    return lambda *args, **kwargs: ask(*args, **({"timeout": 1.0} | kwargs))


@pytest.mark.parametrize("has_reader", [False, True])
def test_sigterm_seals_and_says_goodbye(tmp_path, has_reader):
    with ServiceProcess(tmp_path) as service:
        with producing(service.address) as out:
            for index in range(7):
                out.send(pixels(index))
        frames = []
        reader = threading.Thread(
            target=lambda: frames.extend(open_run(f"{service.address}/lyso/1")["eiger"].follow()), daemon=True
        )
        if has_reader:
            reader.start()
            wait_for(lambda: len(frames) == 7)
        assert service.stop() == 0
        if has_reader:
            reader.join(5)
            assert not reader.is_alive(), "a waiting reader hears of the end"
    run = open_run(tmp_path / "lyso" / "1")
    assert stored(run["eiger"]) == expected(range(7))
    assert run.state is RunState.aborted
    assert run["eiger"].ledger().is_balanced
    assert not list(run.folder.glob("*.journal/*"))


# ---- addresses and owners --------------------------------------------------------------------------------


def test_busy_port_is_said_in_words(tmp_path):
    words = "cannot listen on .*: Address already in use.*; another service may be running there"
    with serving(tmp_path / "a") as service, pytest.raises(SourceBusy, match=words):
        Service(settings(tmp_path / "b", bind=service.address))


@pytest.mark.parametrize("bind", ["tcp://*:5600", "tcp://0.0.0.0:5600", "tcp://192.168.1.2:5600", "tcp://[::]:5600"])
def test_only_loopback(tmp_path, bind):
    with pytest.raises(SourceBusy, match="refusing to listen"):
        Service(settings(tmp_path, bind=bind))


def test_nobody_there():
    with pytest.raises(ServiceUnavailable, match=r"nothing listens at tcp://127\.0\.0\.1:1;"):
        Client("tcp://127.0.0.1:1")


def test_stream_taken_over_by_another_service_is_given_up(tmp_path):
    """A newer claim without our lock (another host): this service stops writing and says so."""
    with serving(tmp_path) as service, producing(service.address) as out:
        out.send(pixels(0))
        paths = RunFolder.open(tmp_path / "lyso" / "1").stream("eiger")
        (paths.claims / "000002.json").write_text('{"owner": "another", "at": ""}')
        with pytest.raises(NearlineError, match="a newer service has claimed this stream"):
            out.finish()
        assert service.recorder.streams() == []
        record_run(service.address, range(3), run=2)


@pytest.mark.parametrize(
    "damage",
    [
        "run.json",
        *(pytest.param(path, marks=pytest.mark.campaign) for path in ("eiger.stream.json", "eiger.chunks/00000.json")),
    ],
)
def test_damaged_run_does_not_keep_the_service_from_starting(tmp_path, damage):
    with ServiceProcess(tmp_path) as service:
        with producing(service.address) as out:
            out.send_many([(i, pixels(i), {}) for i in range(1000)])
        wait_for(lambda: (tmp_path / "lyso" / "1" / "eiger.chunks" / "00000.json").exists())
        service.kill()
    (tmp_path / "lyso" / "1" / damage).write_text("{ damaged")
    with serving(tmp_path) as service:
        record_run(service.address, range(3), run=2)
        assert len(open_run(f"{service.address}/lyso/2")["eiger"]) == 3


# ---- full disk ---------------------------------------------------------------------------------------------


def test_full_disk_pushes_back_and_goes_on(tmp_path, monkeypatch):
    real, is_full = os.pwritev, threading.Event()

    def pwritev(*args):
        if is_full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with serving(tmp_path, buffer_bytes=200_000) as service:
        with producing(service.address) as out:
            acknowledged = [out.send(pixels(i)) for i in range(5)]
            is_full.set()
            sending = threading.Thread(target=lambda: acknowledged.extend(out.send(pixels(i)) for i in range(5, 60)))
            sending.start()
            wait_for(lambda: status_of(service.address)["disk"]["is_full"])
            time.sleep(0.3)
            assert len(acknowledged) == 5, "nothing is acknowledged that is not stored"
            assert service.recorder.buffer.used_bytes <= 200_000
            assert stored(open_run(f"{service.address}/lyso/1")["eiger"]) == expected(range(5)), "readers go on"
            is_full.clear()
            sending.join(20)
            out.finish()
        assert not status_of(service.address)["disk"]["is_full"]
        assert stored(open_run(f"{service.address}/lyso/1")["eiger"]) == expected(range(60))


@pytest.mark.parametrize("what", ["publish", "replace", "add_event"])
def test_full_disk_at_the_end_of_a_run(tmp_path, monkeypatch, what):
    """The seal or the last word does not fit: tried again until it does."""
    target = storage.stream_store if what != "add_event" else RunFolder
    real, is_full = getattr(target, what), threading.Event()

    def maybe(*args):
        if is_full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(target, what, maybe)
    with serving(tmp_path) as service, producing(service.address) as out:
        out.send_many([(i, pixels(i), {}) for i in range(105)])
        is_full.set()
        ending = threading.Thread(target=out.finish)
        ending.start()
        wait_for(lambda: status_of(service.address)["disk"]["is_full"])
        run = open_run(f"{service.address}/lyso/1")
        assert run["eiger"].is_live
        is_full.clear()
        ending.join(10)
        assert len(list(run["eiger"].follow())) == 105
        assert run.state is RunState.completed


def test_frame_that_cannot_be_written_is_accounted_for(tmp_path, monkeypatch):
    real = storage.stream_store.Journal.write

    def write(self, frames):
        if any(info.frame_index == 3 for info, _ in frames):
            raise RuntimeError("bad block")
        return real(self, frames)

    monkeypatch.setattr(storage.stream_store.Journal, "write", write)
    with serving(tmp_path) as service, producing(service.address) as out:
        with pytest.raises(OSError, match="frame 3 of eiger could not be written"):
            out.send_many([(i, pixels(i), {}) for i in range(6)])
        used = service.recorder.buffer.used_bytes
        out.finish()
        ledger = open_run(f"{service.address}/lyso/1")["eiger"].ledger()
    assert ledger.is_balanced
    assert [(r.start, r.state, r.cause) for r in ledger.ranges] == [(3, "rejected", "could not be stored: bad block")]
    sizes = [len(blob(i)) for i in (0, 1, 2, 4, 5)]
    assert used == sum(size + size // 16 + 1024 for size in sizes), "its room came back"


def test_damaged_shard_is_named_through_the_service(tmp_path):
    with serving(tmp_path) as service:
        record_run(service.address, range(10))
    shard = tmp_path / "lyso" / "1" / "eiger.zarr" / "data" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[content.index(blob(4)) + 50] ^= 1
    shard.write_bytes(content)
    with serving(tmp_path) as service:
        stream = open_run(f"{service.address}/lyso/1")["eiger"]
        assert [f.frame_index for f in stream[0:4]] == [0, 1, 2, 3]
        with pytest.raises(CorruptFrame, match=r"frame 4 in .*c/0/0/0 fails its crc32c"):
            list(stream)
        assert [f.frame_index for f in stream[5:]] == [5, 6, 7, 8, 9]
        assert [f.frame_index for f in stream.follow(group="mine")] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


# ---- series and runs ------------------------------------------------------------------------------------------


def send_series(eiger, indices, n=None, end=True, make=blob, **options) -> None:
    arm(eiger, n if n is not None else len(indices), **options)
    for index in indices:
        eiger.send_image(index, make(index))
    if end:
        eiger.send_end()


def wait_finished(root: Path, run: int = 1) -> None:
    folder = root / "lyso" / str(run)
    wait_for(lambda: (folder / "run.json").exists() and RunFolder.open(folder).state.is_terminal)


def test_two_series_are_two_runs(tmp_path):
    with detector() as eiger, serving(tmp_path, eiger.endpoint) as service:
        send_series(eiger, range(12), series_id=1)
        send_series(eiger, range(5), n=8, series_id=2)
        wait_finished(tmp_path, 2)
        first, second = (open_run(f"{service.address}/lyso/{n}") for n in (1, 2))
        assert stored(first["eiger"]) == expected(range(12))
        assert stored(second["eiger"]) == expected(range(5))
        assert (first.state, second.state) == (RunState.completed, RunState.incomplete)
        assert second["eiger"].ledger().planned == 8
        with connected(service.address) as connection:
            listed = wait_for(lambda: connection.ask_json(ListRuns(id=0, experiment="lyso")))
        assert [row["run"] for row in listed] == [1, 2]


def test_start_without_end_aborts_the_series_before(tmp_path):
    with detector() as eiger, serving(tmp_path, eiger.endpoint) as service:
        send_series(eiger, range(5), end=False, series_id=1)
        send_series(eiger, range(3), series_id=2)
        wait_finished(tmp_path, 2)
        first = open_run(f"{service.address}/lyso/1")
        assert first.state is RunState.aborted
        assert stored(first["eiger"]) == expected(range(5))


def test_silence_ends_a_run_as_aborted(tmp_path):
    with detector() as eiger, serving(tmp_path, eiger.endpoint, idle_timeout_s=0.5) as service:
        send_series(eiger, range(3), n=9, end=False)
        wait_finished(tmp_path)
        run = open_run(f"{service.address}/lyso/1")
        assert run.state is RunState.aborted
        assert len(run["eiger"]) == 3
        assert "no message for 0.5 s" in next(RunFolder.open(run.folder).events("run_finished")).payload["cause"]


def test_lost_frames_are_missing(tmp_path):
    there = [i for i in range(30) if i not in (0, 7, 8)]
    with detector() as eiger, serving(tmp_path, eiger.endpoint) as service:
        send_series(eiger, there, n=30)
        wait_finished(tmp_path)
        ledger = open_run(f"{service.address}/lyso/1")["eiger"].ledger()
    assert [(r.start, r.stop) for r in ledger.ranges] == [(0, 1), (7, 9)]
    assert ledger.is_balanced


@pytest.mark.parametrize(
    ("codec", "make"),
    [("bslz4", blob), ("lz4", lambda i: lz4_blob(pixels(i))), ("raw", lambda i: pixels(i).tobytes())],
    ids=["bslz4", "lz4", "raw"],
)
def test_every_compression_of_the_detector(tmp_path, codec, make):
    """The start message does not say which; a reader may have opened the stream before the first frame."""
    with detector() as eiger, serving(tmp_path, eiger.endpoint) as service:
        arm(eiger, 6, codec=codec)
        wait_for(lambda: (tmp_path / "lyso" / "1" / "eiger.stream.json").exists())
        early = open_run(f"{service.address}/lyso/1")["eiger"]
        for index in range(6):
            eiger.send_image(index, make(index))
        eiger.send_end()
        frames = list(early.follow())
        assert [bytes(f.blob) for f in frames] == [make(i) for i in range(6)], "no recompression"
        assert all(np.array_equal(f.data, pixels(f.frame_index)) for f in frames)
        assert np.array_equal(open_run(tmp_path / "lyso" / "1")["eiger"].array[5], pixels(5))


def test_two_channels_are_two_data_sources(tmp_path):
    with detector() as eiger, serving(tmp_path, eiger.endpoint) as service:
        arm(eiger, 8, channels=("threshold_1", "threshold_2"))
        for index in range(8):
            eiger.send_image(index, {"threshold_1": blob(index), "threshold_2": blob(100 + index)})
        eiger.send_end()
        wait_finished(tmp_path)
        run = open_run(f"{service.address}/lyso/1")
        assert run.data_sources == ["eiger", "eiger.threshold_2"]
        assert stored(run["eiger"]) == expected(range(8))
        assert stored(run["eiger.threshold_2"]) == {i: blob(100 + i) for i in range(8)}
        assert run.state is RunState.completed
        assert run.detector.name == "eiger"


@pytest.mark.parametrize(
    ("wish", "where"),
    [
        ({"experiment": "lyso", "run": 17, "sample": "lysozyme"}, "17"),
        ({"experiment": "../etc", "run": None, "sample": 5}, "1"),
        ({"experiment": "lyso", "run": -3}, "1"),
        ({"experiment": "lyso", "run": "x"}, "1"),
        ("not a map", "1"),
    ],
    ids=["good", "bad name", "bad number", "no number", "no map"],
)
def test_header_appendix(tmp_path, wish, where):
    """Frames are never given up for a name that cannot be."""
    with detector() as eiger, serving(tmp_path, eiger.endpoint) as service:
        send_series(eiger, range(3), user_data={"nearline": wish})
        wait_finished(tmp_path, int(where))
        assert stored(open_run(f"{service.address}/lyso/{where}")["eiger"]) == expected(range(3))


def test_run_number_that_is_taken_gives_the_next_one(tmp_path):
    with detector() as eiger, serving(tmp_path, eiger.endpoint) as service:
        for series in (1, 2):
            send_series(eiger, range(3), user_data={"nearline": {"run": 17}}, series_id=series)
        wait_finished(tmp_path, 18)
        assert stored(open_run(f"{service.address}/lyso/18")["eiger"]) == expected(range(3))


def test_captured_messages_of_an_eiger2_16m(tmp_path):
    """A start message without image_dtype and with cut arrays, as older firmware sends it."""
    if not CAPTURE.exists():
        pytest.skip(f"no captured messages in {CAPTURE}; set NEARLINE_TEST_DATA to the folder that holds them")
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.set(zmq.LINGER, 0)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        with serving(tmp_path, f"tcp://127.0.0.1:{port}", gap_timeout_s=0.2) as service:
            for name in ("start", "image", "end"):
                socket.send((CAPTURE / f"{name}.cbor").read_bytes())
            wait_finished(tmp_path)
            stream = open_run(f"{service.address}/lyso/1")["eiger"]
            frame = stream[-1]
            assert service.recorder.n_rejected_messages == 0
    assert frame.data.shape == (4362, 4148)
    assert frame.data.dtype == np.uint16
    assert stream.header.detector.detector_distance == pytest.approx(0.2372, abs=1e-3)
    assert frame.info.tick_rate == 50_000_000
    assert frame.times.utc_source == "series_date"


def test_status_says_what_there_is(tmp_path):
    with detector() as eiger, serving(tmp_path, eiger.endpoint) as service:
        send_series(eiger, range(3))
        wait_finished(tmp_path)
        status = status_of(service.address)
    assert status["sources"][0]["messages"] == 5
    assert status["streams"][0]["stored"] == 3
    assert status["rejected_messages"] == 0
    assert status["buffer"]["used_bytes"] <= status["buffer"]["budget_bytes"]


def test_second_service_on_one_folder_is_refused(tmp_path):
    with serving(tmp_path), pytest.raises(OSError, match="another service runs on the data folder"), serving(tmp_path):
        pass
    with serving(tmp_path) as service:
        record_run(service.address, range(2))


def test_service_needs_nothing_but_its_folder(tmp_path):
    """The catalog may fail; frames are recorded all the same."""
    script = (
        "from streaming.service import Service; import sys; print(sorted(m for m in sys.modules if m == 'prefect'))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
    with serving(tmp_path) as service:
        service._catalog.record = lambda *a: (_ for _ in ()).throw(OSError("catalog is away"))
        record_run(service.address, range(4))
        assert len(open_run(f"{service.address}/lyso/1")["eiger"]) == 4
