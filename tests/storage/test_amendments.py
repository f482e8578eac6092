"""Frames that come after their chunk was sealed are kept beside it, and read like all others."""

import json
import os
import threading

import blake3
import pyarrow.parquet as pq
import pytest

from storage.errors import CorruptFrame, FrameTooLate, IndexConflict
from storage.frame import content_digest
from storage.run_folder import RunFolder
from storage.states import FrameState
from storage.stream_source import FolderSource
from storage.stream_store import Admission, StreamStore

from .stores import frame_of, new_store, put, put_late, reopened, row


def late_store(root, **options) -> StreamStore:
    """Frames 0 to 7 in two sealed chunks, without 1, 2 and 6."""
    store = new_store(root, **options)
    put(store, 0, 3, 4, 5, 7)
    for index in (1, 2, 6):
        store.account(index, index + 1, FrameState.missing, "not received")
    store.seal_complete()
    return store


def frames(source, indices) -> dict[int, tuple[bytes, bool]]:
    return {i: (bytes(source.read_parts(i)[0].blob), source.read_parts(i)[0].info.late) for i in indices}


def test_late_frames_are_read_as_others(tmp_path):
    store = late_store(tmp_path)
    put_late(store, 6, 1)
    wanted = {i: (frame_of(store, i)[1], i in (1, 6)) for i in (0, 1, 3, 4, 5, 6, 7)}
    assert frames(store, wanted) == wanted
    source = FolderSource(store.folder, "eiger")
    assert frames(source, wanted) == wanted
    assert [f.info.frame_index for f in source.read(0, 9)] == sorted(wanted)
    assert [(i.frame_index, i.late) for i in source.infos(0, 9)] == [(i, late) for i, (_, late) in wanted.items()]
    assert list(store.infos(0, 9)) == list(source.infos(0, 9))
    assert store.states.late_order == source.states.late_order == [6, 1]


@pytest.mark.parametrize("when", ["live", "recovered", "finished", "finished and recovered"])
def test_ledger_counts_late_frames_once(tmp_path, when):
    store = late_store(tmp_path)
    put_late(store, 6, 1)
    store = reopened(store) if when == "recovered" else store
    if "finished" in when:
        store.finish(0, "end")
    store = reopened(store) if "and" in when else store
    for ledger in (store.ledger(), FolderSource(store.folder, "eiger").ledger()):
        assert ledger.is_balanced
        assert (ledger.announced, ledger.received, ledger.stored, ledger.late, ledger.missing) == (8, 5, 5, 2, 1)
        assert [(r.state, r.start, r.stop) for r in ledger.ranges] == [
            ("late", 1, 2), ("missing", 2, 3), ("late", 6, 7),
        ]  # fmt: skip


@pytest.mark.parametrize("is_restarted", [False, True])
def test_late_twice(tmp_path, is_restarted):
    store = late_store(tmp_path)
    put_late(store, 1)
    store = reopened(store) if is_restarted else store
    assert store.admit(frame_of(store, 1)[0]) is Admission.duplicate
    with pytest.raises(IndexConflict, match="frame 1 of eiger arrived twice"):
        store.admit(row(1, b"other"))
    assert store.admit(frame_of(store, 2)[0]) is Admission.late


def test_segment_is_sealed_with_a_digest(tmp_path):
    store = late_store(tmp_path)
    put_late(store, 6)
    store = reopened(store)
    put_late(store, 2, 1)
    store.finish(0, "end")
    folder = store.paths.amendments
    assert sorted(p.name for p in folder.iterdir()) == [
        f"0000{epoch}.{kind}" for epoch in (1, 2) for kind in ("json", "parquet", "segment")
    ]
    for epoch, indices in ((1, [6]), (2, [1, 2])):
        commit = json.loads((folder / f"0000{epoch}.json").read_bytes())
        digest = blake3.blake3(b"".join(content_digest(frame_of(store, i)[0]) for i in indices)).hexdigest()
        assert (commit["n_frames"], commit["digest"]) == (len(indices), digest)
        table = pq.read_table(folder / f"0000{epoch}.parquet")
        assert (table["frame_index"].to_pylist(), set(table["late"].to_pylist())) == (indices, {True})


def test_torn_end_of_a_segment_is_cut(tmp_path):
    store = late_store(tmp_path)
    put_late(store, 6, 1)
    segment = store.paths.amendments / "00001.segment"
    os.truncate(segment, segment.stat().st_size - 1)
    store = reopened(store)
    assert store.states.indices(FrameState.late).tolist() == [6]
    assert store.admit(frame_of(store, 1)[0]) is Admission.late, "it was not acknowledged, so it comes again"


def test_late_frame_for_a_chunk_that_is_being_sealed(tmp_path):
    """A crash comes before the commit: the frame stays late, and the commit says missing."""
    store = new_store(tmp_path)
    put(store, 0, 1, 3)
    store.account(2, 3, FrameState.missing, "not received")
    assert store.take_complete() == [0]
    put_late(store, 2)
    live = FolderSource(store.folder, "eiger")
    assert live.ledger().missing == 1, "to a reader outside the chunk is not sealed yet"
    store = reopened(store)
    assert [(r.state, r.start) for r in store.sealed[0].ranges] == [("stored", 0), ("missing", 2), ("stored", 3)]
    for source in (store, live, FolderSource(store.folder, "eiger")):
        assert source.ledger().late == 1
        assert list(source.states.late_order) == [2]
        assert source.read_parts(2)[0].info.late


def test_reader_sees_late_frames_of_a_writer_that_died(tmp_path):
    store = new_store(tmp_path)
    put(store, 0, 1, 3)
    store.account(2, 3, FrameState.missing, "not received")
    store.take_complete()
    put_late(store, 2)
    store.close()
    assert [i.frame_index for i in FolderSource(store.folder, "eiger").infos(0, 4)] == [0, 1, 2, 3]


def test_reader_follows(tmp_path):
    store = late_store(tmp_path)
    source = FolderSource(store.folder, "eiger")
    for index in (1, 6, 2):
        put_late(store, index)
        assert source.read_one(index).info.late


def test_nothing_is_taken_after_the_end(tmp_path):
    store = late_store(tmp_path)
    for chunk in store.begin_finish(8, "end"):
        store.seal(chunk)
    put_late(store, 1)
    with pytest.raises(FrameTooLate, match="frame 8 of eiger came after the stream had ended with 8 frames"):
        put_late(store, 8)
    store.end_finish()
    with pytest.raises(FrameTooLate):
        put_late(store, 2)
    again = reopened(store)
    with pytest.raises(FrameTooLate):
        put_late(again, 2)
    assert again.ledger() == store.ledger() == FolderSource(RunFolder.open(store.folder.path), "eiger").ledger()


def test_late_frames_while_another_thread_ends_the_stream(tmp_path):
    """Each late frame is either kept for good or refused; never taken and lost."""
    store = new_store(tmp_path, shape=(4, 4), frames_per_chunk=500)
    put(store, 0)
    chunks = store.begin_finish(500, "end")

    def end():
        for chunk in chunks:
            store.seal(chunk)
        store.end_finish()

    ending = threading.Thread(target=end)
    ending.start()
    kept = []
    for index in range(1, 500):
        try:
            put_late(store, index)
        except FrameTooLate:
            break
        kept.append(index)
    ending.join()
    source = FolderSource(store.folder, "eiger")
    assert source.states.indices(FrameState.late).tolist() == kept
    assert source.ledger().is_balanced


def test_damage_in_a_segment_is_named(tmp_path):
    store = late_store(tmp_path)
    put_late(store, 1)
    path = store.paths.amendments / "00001.segment"
    with open(path, "r+b") as file:
        file.seek(store._amendments._segments[1].locations[1].offset)
        file.write(b"\xff\xff")
    with pytest.raises(CorruptFrame, match=r"frame 1 in .*00001\.segment fails its crc32c"):
        FolderSource(store.folder, "eiger").read_one(1)


def test_late_rows_of_a_table(tmp_path):
    store = late_store(tmp_path, kind="table", shape=(), dtype="", codec="raw")
    put_late(store, 2)
    store.finish(0, "end")
    assert FolderSource(store.folder, "eiger").read_one(2).info.meta == {"delay": 0.2}
