"""Streams in memory only: read like any other while they are there, and what was lost is said."""

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nearline
from flows.exports import export_stream
from flows.run_processing import ProcessRequest, run_processing
from nearline.show import read_sources
from storage.catalog import Catalog, default_url
from storage.errors import BadFrame, FrameMissing, FrameTooLate, IndexConflict, NotStored, ProtocolError
from storage.frame import FrameInfo, RawFrame, blob_digest
from storage.models import RunHeader, RunState, StreamHeader
from storage.online_account import IN_MEMORY_ONLY, MADE_ROOM
from storage.retention import delete_run
from storage.run_folder import RunFolder
from storage.states import FrameState, StreamLedger
from storage.stream_source import FolderSource
from storage.stream_store import Admission
from storage.upload import upload_run
from storage.verify import verify_run
from streaming import wire
from streaming.buffer import FrameBuffer
from streaming.online_store import OnlineStore
from streaming.producer import Producer
from streaming.retrieval import Stream, open_run
from streaming.service import SourceSettings
from tasks.recipe import crystallography

from .harness import SHAPE, ServiceProcess, arm, blob, connected, detector, pixels, producing, serving, wait_for

SMALL_BUFFER = 128 << 10


def online_header(**options) -> StreamHeader:
    fields = {"experiment": "lyso", "run": 1, "data_source": "eiger", "shape": SHAPE, "dtype": "uint16"} | options
    return StreamHeader(persistence="online", frames_per_chunk=4, **fields)


def online(address: str, **options):
    return producing(address, persistence="online", **options)


def opened(address: str) -> Stream:
    return open_run(f"{address}/lyso/1")["eiger"]


def send_all(out, n: int, start: int = 0) -> None:
    for index in range(start, start + n):
        out.send(pixels(index), frame_index=index)


def folder_of(root: Path) -> RunFolder:
    return RunFolder.open(root / "lyso" / "1")


def causes(ledger: StreamLedger) -> list[tuple[int, int, str, str | None]]:
    return [(r.start, r.stop, r.state, r.cause) for r in ledger.ranges]


# ---- while it is taken --------------------------------------------------------------------------------


def test_nothing_of_the_frames_is_written(tmp_path):
    with serving(tmp_path) as service, online(service.address) as out:
        send_all(out, 20)
        out.finish()
        assert [np.array_equal(f.data, pixels(i)) for i, f in enumerate(opened(service.address))] == [True] * 20
    names = {p.name for p in folder_of(tmp_path).path.iterdir()}
    assert names == {"run.json", "events", "eiger.stream.json", "eiger.claims"}


def test_old_frames_make_room_and_the_ledger_says_so_at_every_step(tmp_path):
    with serving(tmp_path, buffer_bytes=SMALL_BUFFER) as service, online(service.address) as out:
        stream = None
        for index in range(120):
            out.send(pixels(index), frame_index=index)
            stream = stream or opened(service.address)
            ledger = stream.ledger()
            assert ledger.problems == []
            assert ledger.stored == 0
            assert service.recorder.buffer.used_bytes <= SMALL_BUFFER
        wait_for(lambda: stream.status.watermark == 120)
        ledger = stream.ledger()
        assert (ledger.received, ledger.missing) == (120, 0)
        assert 0 < ledger.buffered < 120
        assert causes(ledger) == [(0, ledger.pruned, "pruned", MADE_ROOM)]
        with pytest.raises(FrameMissing, match=r"frame 0 .* was in memory only, and made room for newer frames"):
            _ = stream[0]
        assert [f.frame_index for f in stream] == list(range(ledger.pruned, 120))
        assert stream.latest().frame_index == 119
        out.finish()
        assert open_run(f"{service.address}/lyso/1").state is RunState.completed, "every frame was received"


def test_a_slow_group_skips_what_is_gone_and_costs_no_memory(tmp_path):
    with serving(tmp_path, buffer_bytes=SMALL_BUFFER) as service, online(service.address) as out:
        send_all(out, 3)
        slow, fast = (opened(service.address).follow(group=name) for name in ("slow", "fast"))
        seen = {"slow": [next(slow).frame_index], "fast": []}
        follower = threading.Thread(target=lambda: seen["fast"].extend(f.frame_index for f in fast))
        follower.start()
        for index in range(3, 200):
            out.send(pixels(index), frame_index=index)
            wait_for(lambda at=index: seen["fast"] and seen["fast"][-1] >= at - 5)
            assert service.recorder.buffer.used_bytes <= SMALL_BUFFER
        out.finish()
        follower.join(20)
        seen["slow"] += [frame.frame_index for frame in slow]
        groups = opened(service.address).groups
        ledger = opened(service.address).ledger()
    assert seen["fast"] == list(range(200)), "who keeps up misses nothing"
    assert groups["fast"]["n_skipped"] == 0
    assert seen["slow"] == sorted(set(seen["slow"]))
    assert len(seen["slow"]) < 200
    assert groups["slow"]["n_skipped"] + len(seen["slow"]) == 200
    assert groups["slow"]["skipped"][-1][1] <= ledger.pruned
    assert ledger.problems == []


def test_what_a_group_gives_back_after_it_has_made_room_is_skipped(tmp_path):
    with serving(tmp_path, buffer_bytes=SMALL_BUFFER) as service, online(service.address) as out:
        send_all(out, 1)
        member = opened(service.address).follow(group="mine", timeout=1)
        next(member).retry_later()
        send_all(out, 100, start=1)
        out.finish()
        rest = [frame.frame_index for frame in member]
        assert 0 not in rest
        assert opened(service.address).groups["mine"]["skipped"][0][0] == 0


def test_many_readers_while_frames_make_room(tmp_path):
    """Followers see rising indices and whole frames, groups come to an end, and nobody hears an error."""
    results: dict[int, list[int]] = {}
    failed: list[BaseException] = []

    def read(number: int, address: str) -> None:
        try:
            found = results[number] = []
            for frame in opened(address).follow(group="shared" if number % 2 else None):
                assert np.array_equal(frame.data, pixels(frame.frame_index))
                found.append(frame.frame_index)
                time.sleep(random.Random(number + len(found)).uniform(0, 0.004))
        except BaseException as error:
            failed.append(error)

    with serving(tmp_path, buffer_bytes=SMALL_BUFFER) as service, online(service.address) as out:
        send_all(out, 1)
        readers = [threading.Thread(target=read, args=(n, service.address)) for n in range(4)]
        for reader in readers:
            reader.start()
        for index in range(1, 400):
            out.send(pixels(index), frame_index=index)
        out.finish()
        for reader in readers:
            reader.join(30)
        shared = opened(service.address).groups["shared"]
    assert failed == []
    assert not any(reader.is_alive() for reader in readers)
    for found in results.values():
        assert found == sorted(set(found))
    assert len(results[1]) + len(results[3]) + shared["n_skipped"] == 400


@pytest.mark.parametrize("ack", ["stored", "durable"])
def test_no_more_than_buffered_is_promised(tmp_path, ack):
    with serving(tmp_path) as service:
        with pytest.raises(ProtocolError, match=f"ever {ack}; use ack='buffered'"):
            Producer(service.address, "lyso", "cam", ack=ack, persistence="online")
        with Producer(service.address, "lyso", "cam", ack=ack) as producer, pytest.raises(ProtocolError, match=ack):
            producer.run(1).start(online_header(data_source="cam"))
        with producing(service.address, 2, persistence="online") as out, connected(service.address) as connection:
            out.send(pixels(0))
            ref = wire.StreamRef("lyso", 2, "eiger")
            request = wire.PutFrames(id=0, stream=ref, infos=[FrameInfo(frame_index=1)], ack=ack)
            with pytest.raises(ProtocolError, match=f"no frame of it is ever {ack}"):
                connection.ask(request, [b""])
            out.finish()


def test_the_front_door_has_it(tmp_path):
    with serving(tmp_path) as service:
        producer = nearline.producer("lyso", "eiger", service=service.address, persistence="online")
        assert producer.ack == "buffered"
        with producer, producer.run(1) as out:
            out.send(pixels(0))
        assert opened(service.address).header.is_online


def test_a_second_producer_must_want_the_same(tmp_path):
    with serving(tmp_path) as service, online(service.address) as out:
        out.send(pixels(0))
        with Producer(service.address, "lyso", "eiger") as other, pytest.raises(ProtocolError, match="same header"):
            other.run(1, join=True).send(pixels(1))
        out.finish()


def test_stored_and_online_streams_share_one_run(tmp_path):
    with serving(tmp_path) as service:
        with online(service.address) as fast, Producer(service.address, "lyso", "cam") as producer:
            send_all(fast, 5)
            slow = producer.run(1, join=True)
            send_all(slow, 5)
            fast.finish()
            slow.finish()
        run = open_run(f"{service.address}/lyso/1")
        assert run.state is RunState.completed
        assert {n: (x.buffered, x.stored) for n, x in run.ledger().items()} == {"eiger": (5, 0), "cam": (0, 5)}
    (event,) = folder_of(tmp_path).events("run_finished")
    counts = {x["data_source"]: (x["buffered"], x["pruned"], x["stored"]) for x in event.payload["ledgers"]}
    assert counts == {"eiger": (0, 5, 0), "cam": (0, 0, 5)}


def test_gaps_and_frames_after_them(tmp_path):
    with serving(tmp_path, gap_timeout_s=0.1) as service, online(service.address) as out:
        out.send(pixels(0), frame_index=0)
        out.send(pixels(2), frame_index=2)
        stream = opened(service.address)
        member = stream.follow(group="mine")
        assert [next(member).frame_index for _ in range(2)] == [0, 2]
        out.send(pixels(1), frame_index=1)  # after it was given up: a group still gets it
        assert next(member).frame_index == 1
        out.finish(5)
        assert list(member) == []
        ledger = stream.ledger()
        assert ledger.problems == []
        assert (ledger.buffered, causes(ledger)) == (3, [(3, 5, "missing", "not received")])
        assert open_run(f"{service.address}/lyso/1").state is RunState.incomplete


def test_detector_source(tmp_path):
    with detector() as sender:
        source = SourceSettings(name="eiger", endpoint=sender.endpoint, persistence="online")
        with serving(tmp_path, sources=(source,)) as service:
            arm(sender, 6)
            for index in range(6):
                sender.send_image(index, blob(index))
            sender.send_end()
            wait_for(lambda: (tmp_path / "lyso" / "1" / "eiger.stream.json").exists())
            stream = opened(service.address)
            assert [np.array_equal(f.data, pixels(i)) for i, f in enumerate(stream.follow())] == [True] * 6
            assert (stream.ledger().buffered, stream.ledger().stored) == (6, 0)
            assert stream.pixel_mask is None or stream.pixel_mask.shape == SHAPE


@pytest.mark.parametrize(
    ("online_names", "found"),
    [([], ["stored", "stored"]), (["b"], ["stored", "online"]), (["b", "a"], ["online", "online"])],
    ids=["none", "one", "both"],
)
def test_sources_of_the_command(online_names, found):
    sources = read_sources(["a=tcp://127.0.0.1:1", "b=tcp://127.0.0.1:2"], online_names)
    assert [source.persistence for source in sources] == found


def test_an_online_source_must_be_one_there_is():
    with pytest.raises(Exception, match="--online eigre: the sources are eiger"):
        read_sources(["eiger=tcp://127.0.0.1:1"], ["eigre"])


# ---- after the end, a stop, a kill --------------------------------------------------------------------


def test_the_end_leaves_frames_readable_and_the_folder_honest(tmp_path):
    with serving(tmp_path) as service, online(service.address) as out:
        send_all(out, 4)
        out.send(pixels(5), frame_index=5)
        out.finish()
        stream = opened(service.address)
        assert [f.frame_index for f in stream] == [0, 1, 2, 3, 5]
        ledger = stream.ledger()
        assert (ledger.buffered, ledger.is_terminal, ledger.problems) == (5, True, [])
        in_folder = nearline.open(folder_of(tmp_path).path)["eiger"]
        assert list(in_folder) == []
    with serving(tmp_path) as service:
        again = opened(service.address)
        for source in (in_folder, again):
            ledger = source.ledger()
            assert ledger.problems == []
            assert (ledger.announced, ledger.received, ledger.pruned, ledger.missing) == (6, 5, 5, 1)
            assert [c for _, _, _, c in causes(ledger)] == [IN_MEMORY_ONLY, "not received", IN_MEMORY_ONLY]
        with pytest.raises(FrameMissing, match="frame 2 of lyso/1/eiger was in memory only"):
            _ = again[2]
        assert list(again.follow(group="new")) == []


def test_a_stop_ends_the_run_and_keeps_the_account(tmp_path):
    with serving(tmp_path) as service, online(service.address) as out:
        send_all(out, 7)
    run = nearline.open(folder_of(tmp_path).path)
    assert run.state is RunState.aborted
    assert (run["eiger"].ledger().pruned, run["eiger"].ledger().problems) == (7, [])


def test_a_kill_leaves_what_was_known_about_a_second_before(tmp_path):
    account = tmp_path / "lyso" / "1" / "eiger.online.json"
    with ServiceProcess(tmp_path) as process, online(process.address) as out:
        send_all(out, 9)
        out.send(pixels(10), frame_index=10)
        wait_for(lambda: account.exists() and FolderSource(folder_of(tmp_path), "eiger").ledger().announced == 11)
        live = FolderSource(folder_of(tmp_path), "eiger")
        assert not live.status().is_terminal
        process.kill()
    killed = nearline.open(folder_of(tmp_path).path)
    assert killed.state is RunState.aborted
    assert killed["eiger"].ledger().received == 10
    with serving(tmp_path) as service:
        run = open_run(f"{service.address}/lyso/1")
        assert run.state is RunState.aborted
        ledger = run["eiger"].ledger()
        assert ledger.problems == []
        assert (ledger.announced, ledger.received, ledger.pruned, ledger.missing) == (11, 10, 10, 1)
        assert list(run["eiger"].follow(group="mine")) == []
        refused = pytest.raises(ProtocolError, match="run lyso/1 has ended; start a new run")
        with Producer(service.address, "lyso", "eiger", persistence="online") as producer, refused:
            producer.run(1, join=True).send(pixels(11))
    (event,) = folder_of(tmp_path).events("run_finished")
    assert "the service was killed, what came after" in event.payload["cause"]
    assert not account.exists()


def test_a_kill_before_the_first_account(tmp_path):
    folder = RunFolder.create(tmp_path, RunHeader(experiment="lyso", run=1, started_at="2026-01-01T00:00:00Z"))
    OnlineStore.create(folder, online_header(), FrameBuffer(1 << 20)).close()
    with serving(tmp_path):
        pass
    assert nearline.open(folder.path).state is RunState.aborted
    assert nearline.open(folder.path)["eiger"].ledger().announced == 0


def test_a_disk_that_refuses_costs_the_account_only(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("streaming.online_store.write_account", refuse)
    with serving(tmp_path) as service, online(service.address) as out:
        send_all(out, 3)
        wait_for(lambda: "eiger.online.json is not written" in caplog.text)
        send_all(out, 3, start=3)
        # Acknowledged as buffered is in memory, and readable once the writer has come to it.
        wait_for(lambda: opened(service.address).status.watermark == 6)
        assert not service.recorder.disk.is_full
        assert len(list(opened(service.address))) == 6
        out.finish()


# ---- what needs frames on disk --------------------------------------------------------------------------


@pytest.fixture
def ended(tmp_path):
    """The folder of a run whose one stream was in memory only."""
    with serving(tmp_path) as service, online(service.address) as out:
        send_all(out, 6)
        out.finish(7)
    return folder_of(tmp_path)


def test_chunks_processing_and_export_are_refused(ended, tmp_path):
    run = nearline.open(ended.path)
    with pytest.raises(NotStored, match="lyso/1/eiger is in memory only and cannot be cut into chunks"):
        list(run["eiger"].chunks())
    with pytest.raises(NotStored, match="cannot be exported"):
        export_stream(run, run["eiger"], tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()
    recipe = crystallography(None).model_dump(mode="json")
    with pytest.raises(NotStored, match="cannot be processed"):
        run_processing(ProcessRequest(run=str(ended.path), recipe=recipe, data_source="eiger"))
    assert not (ended.path / "processed").exists()


def test_verify_lists_the_frames_as_holes(ended):
    report = verify_run(ended.path)
    assert report.findings == []
    holes = [(h.frames.start, h.frames.stop, h.frames.state, h.frames.cause) for h in report.holes]
    assert holes == [(0, 6, "pruned", IN_MEMORY_ONLY), (6, 7, "missing", "not received")]


def test_an_upload_takes_the_account_along(ended, tmp_path):
    upload_run(ended, tmp_path / "copy", remove_local=True)
    ledger = nearline.open(tmp_path / "copy" / "lyso" / "1")["eiger"].ledger()
    assert (ledger.pruned, ledger.missing, ledger.problems) == (6, 1, [])


def test_a_deletion_keeps_the_causes(ended):
    before = FolderSource(ended, "eiger").ledger()
    delete_run(ended, "me", "no longer needed")
    after = nearline.open(ended.path)["eiger"].ledger()
    assert (after.pruned, after.missing, after.problems) == (6, 1, [])
    assert causes(after) == causes(before)


def test_the_catalog_counts_it(ended, tmp_path):
    catalog = Catalog(default_url(tmp_path))
    catalog.rebuild(tmp_path)
    assert [row.announced for row in catalog.streams("lyso", 1)] == [7]
    catalog.close()


# ---- the store by itself --------------------------------------------------------------------------------


def frame_of(index: int, part: int = 0, content: bytes | None = None, **fields) -> RawFrame:
    content = bytes([index % 251]) * 100 if content is None else content
    info = FrameInfo(frame_index=index, part=part, size_bytes=len(content), digest=blob_digest(content), **fields)
    return RawFrame(info, content, len(content))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A new data folder each time: hypothesis tries many."""
    base, count = tmp_path_factory.mktemp("stores"), iter(range(10**6))
    return lambda: base / str(next(count))


def new_store(root: Path, budget: int, **options) -> tuple[OnlineStore, FrameBuffer]:
    folder = RunFolder.create(root, RunHeader(experiment="lyso", run=1, started_at="2026-01-01T00:00:00Z"))
    buffer = FrameBuffer(budget)
    return OnlineStore.create(folder, online_header(**options), buffer), buffer


def put(store: OnlineStore, buffer: FrameBuffer, frame: RawFrame) -> Admission:
    """As recorder and writer do it."""
    assert buffer.reserve(frame.cost_bytes, 0.0)
    admission = store.admit(frame.info)
    if admission is Admission.new:
        buffer.keep_only_copy(store.key, [frame], store)
    else:
        buffer.release(frame.cost_bytes)
    return admission


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 30), st.integers(0, 1)),
        st.tuples(st.sampled_from(["missing", "rejected"]), st.integers(0, 30), st.integers(1, 5)),
        st.tuples(st.just("other"), st.integers(1, 400), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=25, deadline=None)
@given(done=steps, parts=st.integers(1, 2))
def test_ledger_and_reads_agree_at_every_step(roots, done, parts):
    """What is readable is in memory, what is not has a cause; beside a stored stream that takes room as well."""
    store, buffer = new_store(roots(), 1000, parts=parts)
    came: set[tuple[int, int]] = set()
    for at, (what, a, b) in enumerate(done):
        if what == "put":
            part = b % parts
            expected = Admission.duplicate if (a, part) in came else Admission.new
            assert put(store, buffer, frame_of(a, part)) is expected
            came.add((a, part))
        elif what == "other":
            assert buffer.reserve(a, 0.0)
            buffer.keep_stored("stored", [frame_of(at, content=bytes(a))])
        else:
            store.account(a, a + b, FrameState[what], "because")
        check(store, buffer, came, parts)
    store.begin_finish(0, "not received")
    store.end_finish()
    check(store, buffer, came, parts)
    in_folder = FolderSource(store.folder, "eiger").ledger()
    store.close()
    live = store.ledger()
    assert (live.is_balanced, in_folder.is_balanced) == (True, True)
    assert in_folder.received == in_folder.pruned == live.received
    assert (in_folder.missing, in_folder.rejected) == (live.missing, live.rejected)


def check(store: OnlineStore, buffer: FrameBuffer, came: set[tuple[int, int]], parts: int) -> None:
    ledger = store.ledger()
    assert ledger.problems == []
    assert buffer.used_bytes <= buffer.budget_bytes
    whole = {index for index, _ in came if all((index, part) in came for part in range(parts))}
    assert ledger.buffered <= len(whole)
    for index in range(store.states.announced):
        if store.states.is_readable(index):
            found = store.read_parts(index)
            assert {(f.info.frame_index, f.info.part) for f in found} <= came
            assert len(found) == parts or store.states[index] is FrameState.incomplete
        else:
            with pytest.raises(LookupError):
                store.read_parts(index)
    rows = [(info.frame_index, info.part) for info in store.infos(0, 100)]
    assert rows == sorted(rows)
    assert ledger.buffered + ledger.incomplete == len({index for index, _ in rows})


def test_a_repetition_is_known_when_the_frame_is_gone(roots):
    store, buffer = new_store(roots(), 250)
    for index in range(5):
        assert put(store, buffer, frame_of(index, producer="p", sequence=index)) is Admission.new
    assert store.states[0] is FrameState.pruned
    assert put(store, buffer, frame_of(0, producer="p", sequence=0)) is Admission.retry
    assert put(store, buffer, frame_of(0)) is Admission.duplicate
    assert store.answered("p", 0) == 0
    for bad in (frame_of(0, content=b"other"), frame_of(9, producer="p", sequence=0)):
        with pytest.raises(IndexConflict):
            store.admit(bad.info)
    assert store.ledger().duplicate == 1
    store.close()


def test_what_the_store_refuses(roots):
    store, buffer = new_store(roots(), 1000)
    with pytest.raises(BadFrame, match="part 1"):
        store.admit(frame_of(0, part=1).info)
    with pytest.raises(NotStored, match="no chunk 3"):
        store.seal(3)
    assert put(store, buffer, frame_of(0)) is Admission.new
    with pytest.raises(BadFrame, match="has frames already"):
        store.change_codec("lz4")
    store.begin_finish(0, "not received")
    assert store.admit(frame_of(1).info) is Admission.late
    with pytest.raises(FrameTooLate, match="after the stream had ended with 1 frames"):
        store.append_late(frame_of(1).info, b"")
    store.close()


def test_states_changed_by_many_threads_add_up(roots):
    """The writer takes frames while others make room: no change is lost when the arrays grow."""
    store, buffer = new_store(roots(), 2000)
    stopping = threading.Event()

    def press() -> None:
        while not stopping.is_set():
            if buffer.reserve(300, 0.0):
                buffer.release(300)

    pressing = [threading.Thread(target=press) for _ in range(2)]
    for thread in pressing:
        thread.start()
    try:
        for index in range(6000):
            while not buffer.reserve(100, 1.0):
                pass
            buffer.keep_only_copy(store.key, [frame_of(index)], store)
    finally:
        stopping.set()
        for thread in pressing:
            thread.join()
    ledger = store.ledger()
    assert (ledger.received, ledger.pending, ledger.problems) == (6000, 0, [])
    assert ledger.buffered == len(list(store.infos(0, 6000)))
    store.close()
