"""A stream written, interrupted at every point, and taken over: every stored frame is kept."""

import errno
import itertools
import os
import queue
import subprocess
import sys
import threading

import pytest

import storage.stream_store
from storage.codec import encode
from storage.errors import CorruptFrame, FrameMissing, FrameNotYetAvailable, IndexConflict, StorageFull, StreamOwned
from storage.frame import FrameInfo
from storage.models import RunState
from storage.run_folder import RunFolder, has_writer
from storage.states import FrameState
from storage.stream_source import FolderSource, state_of
from storage.stream_store import Admission, StreamStore

from .stores import frame_of, new_folder, new_header, new_store, pixels, put, reopened, row


def stored(store: StreamStore) -> dict[int, bytes]:
    return {int(i): bytes(store.read(int(i)).blob) for i in store.states.indices(FrameState.stored)}


def raising(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def expected(*indices: int) -> dict[int, bytes]:
    return {i: encode(pixels(i)) for i in indices}


def test_frames_come_back_from_journal_and_shard(tmp_path):
    store = new_store(tmp_path)
    put(store, *range(6))
    assert [c.chunk for c in store.seal_complete()] == [0]
    assert stored(store) == expected(*range(6))
    assert store.read(5).info.meta == store.read(5).info.meta == {"delay": 0.5}


def test_chunk_is_sealed_once_complete_and_once_only(tmp_path):
    store = new_store(tmp_path)
    put(store, 3, 0, 2)
    assert store.seal_complete() == []
    put(store, 1)
    assert [c.n_frames for c in store.seal_complete()] == [4]
    assert store.seal_complete() == []
    assert not store.paths.open_journal(0).exists()


def test_sealing_in_portions(tmp_path):
    store = new_store(tmp_path)
    put(store, *range(12))
    assert [c.chunk for c in store.seal_complete(2)] == [0, 1]
    assert [c.chunk for c in store.seal_complete(2)] == [2]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 0, 2, 1], [3, 4], [7], []], ids=str)
def test_many_at_once_are_stored_as_one_by_one(tmp_path, order):
    store, single = new_store(tmp_path / "many"), new_store(tmp_path / "single")
    store.append_many([frame_of(store, index) for index in order])
    put(single, *order)
    assert stored(store) == expected(*sorted(order))
    assert store.states.ranges() == single.states.ranges()
    assert stored(reopened(store)) == expected(*sorted(order))


def test_many_large_frames_in_one_write(tmp_path):
    store = new_store(tmp_path, frames_per_chunk=1000, shape=(), dtype="", kind="table", codec="raw")
    frames = [(row(i, bytes([i % 256]) * 40_000), bytes([i % 256]) * 40_000) for i in range(600)]
    store.append_many(frames)
    assert all(store._journals[0].read(i).blob == blob for i, (_, blob) in enumerate(frames))


def test_refused_batch_stores_nothing(tmp_path, monkeypatch):
    """The second of two journals cannot be written: the first one is as it was before."""
    store = new_store(tmp_path)
    put(store, 0)
    size, real, calls = store.paths.open_journal(0).stat().st_size, os.pwritev, []

    def full(fd, pieces, at):
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, pieces, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(StorageFull, match=r"no space left for 00001\.journal"):
            store.append_many([frame_of(store, index) for index in (1, 2, 5, 6)])
    assert [store.paths.open_journal(chunk).stat().st_size for chunk in (0, 1)] == [size, 0]
    assert stored(store) == expected(0)
    store.append_many([frame_of(store, index) for index in (1, 2, 5, 6)])
    assert stored(store) == stored(reopened(store)) == expected(0, 1, 2, 5, 6)


def test_batch_with_an_index_twice_stores_nothing(tmp_path):
    store = new_store(tmp_path)
    with pytest.raises(IndexConflict, match="the same frame index of eiger comes twice among 3 frames"):
        store.append_many([frame_of(store, index) for index in (1, 2, 1)])
    assert stored(store) == {}


# ---- sealing beside writing ---------------------------------------------------------------------------


def test_chunk_is_taken_once_and_is_final_from_then_on(tmp_path):
    store = new_store(tmp_path)
    put(store, 0, 1, 2, 4)
    store.account(3, 4, FrameState.missing, "not received")
    assert store.take_complete() == [0]
    assert store.take_complete() == []
    assert store.admit(row(3, b"")) is Admission.late, "the chunk is being sealed without it"
    assert store.admit(frame_of(store, 2)[0]) is Admission.duplicate
    assert stored(store) == expected(0, 1, 2, 4)
    assert store.seal(0) == store.seal(0) == store.sealed[0]


def test_seal_may_be_repeated_by_the_convenience(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    put(store, *range(8))
    with monkeypatch.context() as patch:
        patch.setattr(storage.stream_store, "publish", raising(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            store.seal_complete()
    assert stored(store) == expected(*range(8))
    assert [c.chunk for c in store.seal_complete()] == [0, 1]


def test_end_may_be_repeated(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    put(store, *range(6))
    assert store.begin_finish(7, "end") == store.begin_finish(99, "other") == [0, 1]
    assert store.admit(row(6, b"")) is Admission.late
    for chunk in (0, 1):
        store.seal(chunk)
    with monkeypatch.context() as patch:
        patch.setattr(store.folder, "add_event", raising(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            store.end_finish()
    assert not store.is_finished
    for _ in range(2):
        store.end_finish()
    assert store.is_finished
    assert len(list(store.folder.events("stream_finished"))) == 1
    assert [(r.start, r.cause) for r in store.ledger().ranges] == [(6, "end")]


def test_frames_stay_readable_while_a_second_thread_seals(tmp_path):
    """One thread appends, one seals, one reads whatever is stored: no read fails, nothing is lost."""
    n, taken, failed = 600, queue.SimpleQueue(), []
    store = new_store(tmp_path, shape=(4, 4))

    def guarded(work):
        def run():
            try:
                work()
            except BaseException as error:
                failed.append(error)
                raise

        return threading.Thread(target=run)

    def publish():
        while (chunk := taken.get()) is not None:
            store.seal(chunk)

    def read():
        while store.states.announced < n:
            last = store.states.announced - 1
            for index in range(max(last - 12, 0), last + 1):
                assert store.read(index).info.frame_index == index
            assert store.ledger().is_balanced

    threads = [guarded(publish), guarded(read), guarded(read)]
    for index in range(3):
        put(store, index)
    for thread in threads:
        thread.start()
    for index in range(3, n):
        put(store, index)
        for chunk in store.take_complete():
            taken.put(chunk)
    taken.put(None)
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(store.sealed) == list(range(n // 4))
    assert {i: store.read(i).blob for i in range(n)} == {i: frame_of(store, i)[1] for i in range(n)}


def test_gaps_are_missing_with_their_cause(tmp_path):
    store = new_store(tmp_path)
    put(store, 0, 5)
    store.account(1, 4, FrameState.missing, "detector dropped it")
    store.seal_complete()
    store.finish(9, "never came")
    with pytest.raises(FrameMissing, match=r"frame 2 .* is missing \(detector dropped it\)"):
        store.read(2)
    ledger = store.ledger()
    assert ledger.is_balanced
    assert [(r.start, r.stop, r.cause) for r in ledger.ranges] == [
        (1, 4, "detector dropped it"), (4, 5, "never came"), (6, 9, "never came"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (1, FrameNotYetAvailable, "has not arrived yet"),
        (99, FrameNotYetAvailable, "3 frames so far"),
        (-1, FrameMissing, "counted from the end"),
    ],
)
def test_errors_of_a_live_stream(tmp_path, index, error, words):
    store = new_store(tmp_path)
    put(store, 0, 2)
    with pytest.raises(error, match=words):
        store.read(index)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["in journal", "in shard"])
def test_duplicate_and_conflict(tmp_path, is_sealed):
    store = new_store(tmp_path)
    put(store, 0, 1, 2, 3)
    if is_sealed:
        store.seal_complete()
    meta = {"delay": 0.2}
    assert store.admit(row(2, encode(pixels(2)), meta=meta)) is Admission.duplicate
    for pixels_of, other in ((99, meta), (2, {"delay": 0.3})):
        with pytest.raises(IndexConflict, match="frame 2 of eiger arrived twice with different content"):
            store.admit(row(2, encode(pixels(pixels_of)), meta=other))
    assert store.duplicate == 1


def test_late_frame_is_counted(tmp_path):
    store = new_store(tmp_path)
    put(store, 0, 1, 2)
    store.account(3, 4, FrameState.missing, "not received")
    assert store.admit(row(3, b"")) is Admission.new, "the chunk is open: it may still come"
    store.seal_complete()
    assert store.admit(row(3, b"")) is Admission.late
    assert store.ledger().late == 0, "it is not kept yet"


def test_frame_declared_missing_that_comes_before_the_seal_is_stored(tmp_path):
    store = new_store(tmp_path)
    store.account(0, 3, FrameState.missing, "not received")
    put(store, 1)
    assert stored(store) == expected(1)


def test_chunk_digest_does_not_depend_on_arrival(tmp_path):
    digests = set()
    for n, order in enumerate([(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)]):
        store = new_store(tmp_path / str(n))
        for index in order:
            blob = encode(pixels(index))
            store.append(row(index, blob, received_ns=hash(order) % 1000, producer=str(n), meta={"b": 1, "a": 2}), blob)
        digests.add(store.seal_complete()[0].digest)
    assert len(digests) == 1


@pytest.mark.parametrize("change", ["blob", "meta", "tick", "index"])
def test_chunk_digest_depends_on_content(tmp_path, change):
    def digest(name: str, **changes) -> str:
        store = new_store(tmp_path / name)
        blob = encode(pixels(changes.get("pixels", 0)))
        info = row(changes.get("index", 0), blob, meta=changes.get("meta", {}), start_tick=changes.get("tick", 5))
        store.append(info, blob)
        return store.finish(0, "end")[0].digest

    other = {"blob": {"pixels": 1}, "meta": {"meta": {"a": 1}}, "tick": {"tick": 6}, "index": {"index": 1}}
    assert digest("one") != digest("two", **other[change])


# ---- crashes ------------------------------------------------------------------------------------


def test_journal_cut_at_every_point(tmp_path):
    store = new_store(tmp_path, shape=(8, 8))
    ends = [0]
    for index in range(3):
        put(store, index)
        ends.append(store._journals[0].end)
    path = store.paths.open_journal(0)
    content = path.read_bytes()
    store.close()
    for cut in sorted({*range(0, len(content), 29), *ends, *(end - 1 for end in ends[1:])}):
        path.write_bytes(content[:cut])
        store = StreamStore.recover(store.folder, "eiger")
        n_whole = sum(end <= cut for end in ends) - 1
        assert store.states.indices(FrameState.stored).tolist() == list(range(n_whole)), f"cut at {cut}"
        store.close()


class Killed(BaseException):
    """The process ends here."""


STEPS = ["write_index", "publish_file", "sync_folder", "replace", "publish", "unlink"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("end", ["seal", "finish"])
def test_killed_at_every_step_of_a_seal(tmp_path, monkeypatch, step, after, end):
    """Shard, frame table, commit: whatever was the last thing done, recovery keeps all frames and rolls forward."""
    store = new_store(tmp_path)
    put(store, 0, 1, 2, 3, 4)

    def dying(real):
        def die(*args, **kwargs):
            if after:
                real(*args, **kwargs)
            raise Killed

        return die

    with monkeypatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        if step == "write_index":
            patch.setattr(storage.stream_store.Journal, step, dying(storage.stream_store.Journal.write_index))
        elif step == "unlink":
            patch.setattr(type(tmp_path), step, dying(type(tmp_path).unlink))
        elif step == "sync_folder":
            patch.setattr("storage.files.sync_folder", dying(storage.files.sync_folder))
        else:
            patch.setattr(storage.stream_store, step, dying(getattr(storage.stream_store, step)))
        store.seal_complete() if end == "seal" else store.finish(0, "end")
    store = reopened(store)
    assert stored(store) == expected(*range(5))
    assert store.paths.commits() == [0], "the whole chunk was rolled forward"
    store.finish(0, "end")
    assert store.ledger().is_balanced
    assert FolderSource(store.folder, "eiger").ledger().stored == 5
    assert not list(store.paths.journal.iterdir())


@pytest.mark.parametrize("n_events", [0, 1, 2])
def test_killed_after_the_end_was_recorded(tmp_path, n_events):
    store = new_store(tmp_path)
    put(store, *range(n_events))
    store.finish(3, "end")
    again = reopened(store)
    assert again.is_finished
    assert again.ledger() == store.ledger()


def test_killed_with_kill_9(tmp_path):
    """A process appends and says so; what it said is there."""
    script = """
import sys; from pathlib import Path
from tests.storage.stores import new_store, put
store = new_store(Path(sys.argv[1]))
for i in range(10000):
    put(store, i); store.seal_complete(); print(i, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    said = [int(line) for line in itertools.islice(process.stdout, 50)]
    process.kill()
    said += [int(line) for line in process.stdout]
    process.wait()
    process.stdout.close()
    store = StreamStore.recover(RunFolder.open(tmp_path / "lyso" / "1"), "eiger")
    found = stored(store)
    assert found.keys() >= set(said)
    assert all(found[i] == encode(pixels(i)) for i in said)


def test_recovery_clears_what_was_being_written(tmp_path):
    store = new_store(tmp_path)
    litter = store.paths.chunks / ".00000.json.99.abcd"
    litter.write_text("{")
    reopened(store)
    assert not litter.exists()


# ---- ownership ------------------------------------------------------------------------------------


def test_second_writer_is_refused(tmp_path):
    store = new_store(tmp_path)
    with pytest.raises(StreamOwned, match=rf"is being written by pid {os.getpid()} on"):
        StreamStore.recover(store.folder, "eiger")
    assert has_writer(store.paths)
    store.close()
    assert not has_writer(store.paths)


def test_readers_that_look_for_a_writer_do_not_keep_one_out(tmp_path):
    """A reader's look takes the lock for an instant; a service must not lose a stream to that."""
    store = new_store(tmp_path)
    store.close()
    script = """
import sys; from storage.run_folder import RunFolder, has_writer
paths = RunFolder.open(sys.argv[1]).stream("eiger"); print("on", flush=True)
while True: has_writer(paths)
"""
    reader = subprocess.Popen([sys.executable, "-c", script, store.folder.path], stdout=subprocess.PIPE)
    try:
        reader.stdout.readline()
        for _ in range(100):
            store = reopened(store)
    finally:
        reader.kill()
        reader.wait()
        reader.stdout.close()


def test_stale_epoch_cannot_publish(tmp_path):
    """The lock was lost (another host, a network file system): the newer claim wins."""
    old = new_store(tmp_path)
    put(old, *range(4))
    (old.paths.claims / "lock").unlink()
    new = StreamStore.recover(old.folder, "eiger")
    assert new.epoch == old.epoch + 1
    with pytest.raises(StreamOwned, match="a newer service has claimed this stream"):
        old.finish(0, "end")
    assert new.paths.read_commit(0).epoch == new.epoch


# ---- full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["write_index", "replace", "publish", "write_array_metadata"])
def test_seal_on_a_full_disk_can_be_tried_again(tmp_path, monkeypatch, what):
    store = new_store(tmp_path)
    put(store, *range(4))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if what == "write_index":
            patch.setattr(storage.stream_store.Journal, what, full)
        else:
            patch.setattr(storage.stream_store, what, full)
        with pytest.raises(OSError, match="No space"):
            store.finish(0, "end")
        assert not store.is_finished
    store.finish(0, "end")
    assert stored(store) == expected(*range(4))
    assert store.folder.finished("eiger")["announced"] == 4


def test_full_disk_leaves_no_litter(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    put(store, *range(4))
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        store.seal_complete()
    assert [p for p in store.folder.path.rglob(".*") if p.is_file()] == []


# ---- the rest ---------------------------------------------------------------------------------------


def test_damaged_byte_in_a_shard_is_found(tmp_path):
    store = new_store(tmp_path)
    put(store, *range(4))
    location = store._journals[0].locations[2]
    store.finish(0, "end")
    shard = store.paths.shard(0, 2)
    with open(shard, "r+b") as file:
        file.seek(location.offset + 20)
        byte = file.read(1)
        file.seek(location.offset + 20)
        file.write(bytes([byte[0] ^ 1]))
    source = FolderSource(store.folder, "eiger")
    with pytest.raises(CorruptFrame, match=r"frame 2 in .*eiger\.zarr/data/c/0/0/0 fails its crc32c"):
        source.read_one(2)
    assert [f.info.frame_index for f in source.read(0, 4)] == [0, 1], "a range stops before the damage"
    with pytest.raises(CorruptFrame):
        source.read(2, 4)
    assert [f.info.frame_index for f in source.read(3, 4)] == [3]


def test_codec_can_be_corrected_until_the_first_frame(tmp_path):
    store = new_store(tmp_path)
    early = FolderSource(store.folder, "eiger")
    store.change_codec("raw")
    put(store, 0)
    assert store.header.codec == early.folder.stream_header("eiger").codec == "raw"
    assert early.status().announced == 1
    assert early.header.codec == "raw"
    with pytest.raises(ValueError, match="its codec stays raw"):
        store.change_codec("lz4")


def test_table_stream_keeps_rows_without_pixels(tmp_path):
    store = new_store(tmp_path, kind="table", shape=(), dtype="", codec="raw")
    for index in range(6):
        store.append(row(index, b"", meta={"n_peaks": index}), b"")
    store.finish(0, "end")
    source = FolderSource(store.folder, "eiger")
    assert [f.info.meta["n_peaks"] for f in source.read(0, 6)] == list(range(6))


@pytest.mark.parametrize("has_pixels", [True, False], ids=["frames", "table"])
def test_stream_without_frames(tmp_path, has_pixels):
    store = new_store(tmp_path) if has_pixels else new_store(tmp_path, kind="table", shape=(), dtype="")
    store.finish(0, "end")
    assert FolderSource(store.folder, "eiger").ledger().is_balanced


def test_source_follows_a_store_from_outside(tmp_path):
    store = new_store(tmp_path)
    source = FolderSource(store.folder, "eiger")
    for index in range(9):
        put(store, index)
        store.seal_complete()
        assert source.status().watermark == index + 1
        assert source.read_one(index).blob == encode(pixels(index))
    assert state_of(store.folder) is RunState.live
    store.close()
    assert source.status().is_terminal
    assert state_of(store.folder) is RunState.aborted, "nobody writes it and it never ended"
    store = StreamStore.recover(store.folder, "eiger")
    assert not source.status().is_terminal, "a service took it over"
    put(store, 9)
    assert source.read_one(9).info.frame_index == 9


def test_infos_over_chunks_and_journals(tmp_path):
    store = new_store(tmp_path)
    put(store, *range(7))
    store.seal_complete()
    source = FolderSource(store.folder, "eiger")
    assert [info.frame_index for info in source.infos(2, 6)] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (2**20, 2**20)},
        {"shape": (-1, 4)},
        {"shape": (0, 4)},
        {"shape": (2, 2, 2, 2)},
        {"dtype": "object"},
        {"dtype": "(1000,)u4"},
        {"dtype": "complex64"},
        {"dtype": "bool"},
        {"dtype": ""},
        {"dtype": ">u2"},
        {"frames_per_chunk": 0},
        {"frames_per_chunk": 10**9},
        {"planned": -1},
        {"planned": 2**70},
    ],
    ids=str,
)
def test_header_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r"."):
        new_header(**options)


def test_run_number_is_taken_once(tmp_path):
    new_folder(tmp_path)
    with pytest.raises(FileExistsError, match="run lyso/1 exists already"):
        new_folder(tmp_path)


def test_frame_info_is_bounded_on_the_wire():
    import msgspec

    raw = msgspec.msgpack.encode(FrameInfo(frame_index=0, start_tick=2**64 - 1))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(raw, type=FrameInfo)
