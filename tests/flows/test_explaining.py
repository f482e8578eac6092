"""Frames that are not there, came late or came in parts are answered for; nothing here has been processed."""

import pytest
from typer.testing import CliRunner

from flows.explaining import explain
from nearline.cli import app
from storage.errors import BadQuery
from storage.frame import has_digest
from storage.states import FrameState
from storage.stream_store import StreamStore
from streaming.retrieval import Run, open_run
from tests.storage.stores import new_store, put, put_late


@pytest.fixture(scope="module")
def gappy(tmp_path_factory) -> Run:
    """Frames 0 to 7 in two sealed chunks: 1 missing, 2 rejected, 6 late."""
    store = new_store(tmp_path_factory.mktemp("gappy"))
    put(store, 0, 3, 4, 5, 7)
    store.account(1, 2, FrameState.missing, "not received within 2 s of frame 3")
    store.account(2, 3, FrameState.rejected, "its shape is (8, 8) [slow, fast], not (64, 80)")
    store.account(6, 7, FrameState.missing, "not received within 2 s of frame 7")
    store.seal_complete()
    put_late(store, 6)
    return ended(store)


@pytest.fixture(scope="module")
def partial(tmp_path_factory) -> Run:
    """Frames of three parts in one sealed chunk of 4: 0 whole, 1 without part 1, 2 and 3 missing."""
    store = new_store(tmp_path_factory.mktemp("partial"), shape=(6, 8), parts=3)
    for index, part in ((0, 2), (0, 0), (0, 1), (1, 0), (1, 2)):
        put(store, index, part=part)
    store.account(0, 4, FrameState.missing, "module 1 was silent")
    return ended(store)


def ended(store: StreamStore) -> Run:
    store.finish(store.states.announced, "not received")
    store.close()
    return open_run(store.folder.path)


@pytest.mark.parametrize(
    ("frame", "state", "words"),
    [
        pytest.param(1, "missing", "not received within 2 s of frame 3", id="missing"),
        pytest.param(2, "rejected", "its shape is (8, 8)", id="rejected"),
    ],
)
def test_what_is_not_there_has_a_cause_and_a_time_but_no_bytes(gappy, frame, state, words):
    found = explain(gappy, frame)
    assert (found.state, found.bytes, found.received) == (state, [], {})
    assert f"frame {frame} is {state}: {words}" in found.why
    assert "known since its chunk was sealed at" in found.why
    assert (found.chunk["chunk"], found.chunk["start"], found.chunk["stop"]) == (0, 0, 4)


def test_a_cause_is_shown_as_it_was_written(gappy):
    done = CliRunner().invoke(app, ["explain", str(gappy.folder), "--frame", "2"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "its shape is (8, 8) [slow, fast], not (64, 80)" in done.output


def test_a_late_frame_is_found_in_its_segment(gappy):
    found = explain(gappy, 6)
    (place,) = found.bytes
    assert (found.state, place.is_verified, found.received["is_late"]) == ("late", True, True)
    assert place.digest == gappy["eiger"][6].info.digest.hex()
    assert (gappy.folder / place.file).exists()
    assert found.chunk["n_frames"] == 3, "its chunk was sealed without it"


def test_each_part_of_a_frame_has_its_bytes(partial):
    found = explain(partial, 0)
    assert (found.state, found.why) == ("stored", "")
    assert [(place.part, place.is_verified) for place in found.bytes] == [(0, True), (1, True), (2, True)]
    assert len({place.digest for place in found.bytes}) == 3
    for place in found.bytes:
        content = (partial.folder / place.file).read_bytes()[place.offset : place.offset + place.length]
        assert has_digest(content, bytes.fromhex(place.digest))


def test_of_an_incomplete_frame_the_absent_part_has_a_cause(partial):
    found = explain(partial, 1)
    assert found.state == "incomplete"
    assert "module 1 was silent" in found.why
    assert [place.part for place in found.bytes] == [0, 2]


def test_a_damaged_part_is_named_and_the_others_are_sound(partial):
    place = explain(partial, 0).bytes[1]
    path = partial.folder / place.file
    sound = path.read_bytes()
    spoilt = bytearray(sound)
    spoilt[place.offset + place.length // 2] ^= 1
    path.write_bytes(spoilt)
    try:
        found = explain(open_run(partial.folder), 0)
    finally:
        path.write_bytes(sound)
    assert [p.is_verified for p in found.bytes] == [True, False, True]
    assert f"part 1 of frame 0 in {place.file} is damaged" in found.bytes[1].problem


def test_without_a_processing_there_are_no_peaks(gappy):
    with pytest.raises(BadQuery, match="has not been processed"):
        explain(gappy, 0, peak=0)
