"""Frames of several modules are whole when all parts are there, readable when some are; and frames of any axes."""

import blake3
import numpy as np
import pytest
import zarr

import storage.zarr_codec  # noqa: F401  (registers the codecs)
from storage.codec import decode, encode
from storage.errors import BadFrame, FrameMissing, FrameNotYetAvailable, IndexConflict
from storage.frame import content_digest
from storage.states import FrameState
from storage.stream_source import FolderSource
from storage.stream_store import Admission, StreamStore

from .stores import frame_of, new_header, new_store, pixels, put, put_late, reopened, row

PARTS = 3
SMALL = {"shape": (8, 16), "parts": PARTS}


def found(source, index: int) -> list[int]:
    """The parts of a frame that can be read, each with the right bytes."""
    frames = source.read_parts(index)
    for frame in frames:
        assert frame.info.frame_index == index
        pixels_of_part = decode(frame.blob, source.header.shape, "uint16")
        assert np.array_equal(pixels_of_part, pixels(index + 1000 * frame.info.part, shape=source.header.shape))
    return [frame.info.part for frame in frames]


def partial_store(root) -> StreamStore:
    """Frame 0 whole, 1 without part 1, 2 missing, 3 with part 2 only, 4 whole, 5 with part 0: chunks of 4."""
    store = new_store(root, **SMALL)
    for index, parts in {0: (2, 0, 1), 1: (0, 2), 3: (2,), 4: (0, 1, 2), 5: (0,)}.items():
        for part in parts:
            put(store, index, part=part)
    return store


def test_frame_is_stored_when_all_parts_are(tmp_path):
    store = new_store(tmp_path, **SMALL)
    for n, part in enumerate((1, 0, 2)):
        assert store.states[0] is FrameState.pending
        with pytest.raises(FrameNotYetAvailable):
            store.read(0)
        assert store.admit(frame_of(store, 0, part)[0]) is Admission.new
        put(store, 0, part=part)
        assert store.states.announced == 1, n
    assert store.states[0] is FrameState.stored
    assert found(store, 0) == [0, 1, 2]
    assert store.read(0).info.part == 0


def test_many_parts_in_one_write(tmp_path):
    store = new_store(tmp_path, **SMALL)
    store.append_many([frame_of(store, index, part) for part in (2, 0, 1) for index in (5, 1, 0)])
    assert store.states.indices(FrameState.stored).tolist() == [0, 1, 5]


STEPS = ["open", "declared", "declared and recovered", "sealed", "sealed and recovered"]


@pytest.mark.parametrize("step", STEPS)
def test_incomplete_frames(tmp_path, step):
    store = partial_store(tmp_path)
    if step != "open":
        store.account(0, 4, FrameState.missing, "not received")
    if "sealed" in step:
        assert [c.n_frames for c in store.seal_complete()] == [3]
    if "recovered" in step:
        store = reopened(store)
    for source in (store, FolderSource(store.folder, "eiger")):
        states = source.states
        if step == "open":
            assert states.readable().tolist() == [0, 4]
            continue
        assert [states[i].name for i in range(6)] == [
            "stored", "incomplete", "missing", "incomplete", "stored", "pending",
        ]  # fmt: skip
        assert [found(source, i) for i in (0, 1, 3, 4)] == [[0, 1, 2], [0, 2], [2], [0, 1, 2]]
        assert states.cause(1) == states.cause(2) == states.cause(3) == "not received"
        assert [(i.frame_index, i.part) for i in source.infos(1, 5)] == [
            (1, 0), (1, 2), (3, 2), (4, 0), (4, 1), (4, 2),
        ]  # fmt: skip
        with pytest.raises(FrameMissing):
            source.read_parts(2)
        ledger = source.ledger()
        assert ledger.is_balanced
        assert (ledger.stored, ledger.incomplete, ledger.received, ledger.missing) == (2, 2, 4, 1)
    if step != "open":
        source = FolderSource(store.folder, "eiger")
        assert [(f.info.frame_index, f.info.part) for f in source.read(0, 2)] == [
            (0, 0),
            (0, 1),
            (0, 2),
            (1, 0),
            (1, 2),
        ]


@pytest.mark.parametrize("is_restarted", [False, True])
def test_part_that_comes_after_all(tmp_path, is_restarted):
    """Declared missing, but the chunk is open: some parts make it incomplete, all of them stored."""
    store = partial_store(tmp_path)
    store.account(0, 3, FrameState.missing, "not received")
    put(store, 2, part=1)
    put(store, 1, part=1)
    store = reopened(store) if is_restarted else store
    assert (store.states[1], store.states[2]) == (FrameState.stored, FrameState.incomplete)
    assert store.states.cause(2) == "not received"


@pytest.mark.parametrize("is_restarted", [False, True])
def test_parts_that_come_late(tmp_path, is_restarted):
    store = new_late_store(tmp_path)
    assert store.admit(frame_of(store, 1, 1)[0]) is Admission.late
    put_late(store, 1, part=1)
    put_late(store, 2, part=0)
    put_late(store, 3, part=0)
    put_late(store, 3, part=1)
    store = reopened(store) if is_restarted else store
    for source in (store, FolderSource(store.folder, "eiger")):
        assert [source.states[i].name for i in range(4)] == ["stored", "late", "incomplete", "late"]
        assert [found(source, i) for i in range(4)] == [[0, 1, 2], [0, 1, 2], [0], [0, 1, 2]]
        assert [f.info.late for f in source.read_parts(3)] == [True, True, False]
        # Frame 2 can be read in part, which it could not be when a group passed it.
        assert source.states.late_order == [1, 2, 3]
        assert source.ledger().is_balanced
    assert store.admit(frame_of(store, 3, 2)[0]) is Admission.duplicate
    assert store.admit(frame_of(store, 3, 1)[0]) is Admission.duplicate
    assert store.admit(frame_of(store, 2, 1)[0]) is Admission.late


def new_late_store(root):
    store = partial_store(root)
    store.account(0, 4, FrameState.missing, "not received")
    store.seal_complete()
    return store


@pytest.mark.parametrize("is_sealed", [False, True])
def test_part_twice(tmp_path, is_sealed):
    store = partial_store(tmp_path)
    if is_sealed:
        store.account(0, 4, FrameState.missing, "not received")
        store.seal_complete()
    assert store.admit(frame_of(store, 1, 2)[0]) is Admission.duplicate
    with pytest.raises(IndexConflict, match="frame 1 of eiger arrived twice"):
        store.admit(row(1, b"other", part=2))


@pytest.mark.parametrize("part", [-1, 3])
def test_part_that_cannot_be(tmp_path, part):
    store = new_store(tmp_path, **SMALL)
    with pytest.raises(BadFrame, match=f"cannot have a part {part}: its frames come in 3 parts"):
        store.admit(row(0, b"", part=part))


@pytest.mark.parametrize("options", [{"parts": 0}, {"parts": 1025}, {"parts": 1001, "frames_per_chunk": 100}], ids=str)
def test_header_with_too_many_parts_is_refused(options):
    with pytest.raises(ValueError, match="parts"):
        new_header(**options)


def test_chunk_digest_is_over_all_parts_in_order(tmp_path):
    store = new_late_store(tmp_path)
    rows = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (3, 2)]
    digests = b"".join(content_digest(frame_of(store, *slot)[0]) for slot in rows)
    assert store.sealed[0].digest == blake3.blake3(digests).hexdigest()
    assert content_digest(row(0, b"", part=0)) != content_digest(row(0, b"", part=1))


def test_zarr_reads_parts_and_holes(tmp_path):
    store = partial_store(tmp_path)
    store.finish(6, "not received")
    data = zarr.open(str(store.paths.zarr), mode="r")["data"]
    assert data.shape == (6, PARTS, 8, 16)
    assert data.metadata.dimension_names == ("frame", "part", "y", "x")
    there = {0: (0, 1, 2), 1: (0, 2), 3: (2,), 4: (0, 1, 2), 5: (0,)}
    for index in range(6):
        for part in range(PARTS):
            is_there = part in there.get(index, ())
            wanted = pixels(index + 1000 * part, shape=(8, 16)) if is_there else np.full((8, 16), 65535)
            assert np.array_equal(data[index][part], wanted), (index, part)


# ---- any number of axes -------------------------------------------------------------------------------

KINDS = {
    "scalar": {"shape": ()},
    "spectrum": {"shape": (37,)},
    "image": {"shape": (5, 7)},
    "volume": {"shape": (3, 4, 5)},
    "scalar in parts": {"shape": (), "parts": 2},
    "spectrum in parts": {"shape": (6,), "parts": 2},
    "volume in parts": {"shape": (2, 3, 4), "parts": 2},
    "table": {"shape": (), "dtype": "", "kind": "table", "codec": "raw"},
}


@pytest.mark.parametrize("codec", ["bslz4", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_frame(tmp_path, kind, codec):
    """Sealed, open and late frames through store, folder and Zarr."""
    options = {"dtype": "float32", "codec": codec} | KINDS[kind]
    store = new_store(tmp_path, **options)
    header, parts = store.header, store.header.parts
    for index in (0, 1, 3, 4, 5):
        for part in range(parts):
            put(store, index, part=part)
    store.account(2, 3, FrameState.missing, "not received")
    store.seal_complete()
    for part in range(parts):
        put_late(store, 2, part=part)
    store = reopened(store)
    for source in (store, FolderSource(store.folder, "eiger")):
        for index in range(6):
            frames = source.read_parts(index)
            assert [f.info.part for f in frames] == list(range(parts))
            for part, frame in enumerate(frames):
                assert bytes(frame.blob) == frame_of(store, index, part)[1]
                if header.kind == "frames":
                    out = decode(frame.blob, header.shape, header.dtype, header.codec)
                    assert np.array_equal(out, pixels(index + 1000 * part, "float32", header.shape))
        assert len(list(source.infos(0, 6))) == 6 * parts
        assert source.ledger().late == 1
    store.finish(6, "end")
    if header.kind == "table":
        assert not store.paths.zarr.exists()
        return
    data = zarr.open(str(store.paths.zarr), mode="r")["data"]
    assert data.shape == (6, *header.array_shape)
    whole = np.array([pixels(5 + 1000 * part, "float32", header.shape) for part in range(parts)])
    assert np.array_equal(data[5], whole if parts > 1 else whole[0])
    assert np.isnan(data[2]).all(), "a late frame is in the amendments; to Zarr it is missing"


def test_encode_gives_what_was_stored(tmp_path):
    store = new_store(tmp_path, **SMALL)
    put(store, 0, part=1)
    store.finish(1, "end")
    assert store.read(0).blob == encode(pixels(1000, shape=(8, 16)))
    assert store.read(0).info.part == 1
