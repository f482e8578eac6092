"""Programs that send: arrays of any number, tables, metadata, acknowledgements."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage.codec import encode
from storage.errors import BadFrame, BadName, IndexConflict, NearlineError, ProtocolError
from storage.models import RunState, StreamHeader
from streaming.derived import Row, open_derived
from streaming.producer import Producer
from streaming.retrieval import open_run

from .harness import pixels, producing, record_run, serving, wait_for


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data"), gap_timeout_s=0.2) as service:
        yield service


@pytest.fixture
def producer(service, request):
    """An experiment for each test."""
    name = f"e{abs(hash(request.node.name))}"
    with Producer(service.address, name, "cam") as producer:
        yield producer


def opened(service, producer, run=1):
    return open_run(f"{service.address}/{producer.experiment}/{run}")


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "dtype",
    ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"],
)
def test_arrays_of_any_number(service, producer, shape, dtype):
    arrays = [(np.random.default_rng(i).random(shape) * 100).astype(dtype) for i in range(3)]
    with producer.run() as out:
        for array in arrays:
            out.send(array)
    run = opened(service, producer)
    assert all(np.array_equal(f.data, arrays[f.frame_index]) for f in run["cam"])
    assert [f.data.dtype for f in run["cam"]] == [np.dtype(dtype)] * 3
    assert np.array_equal(run["cam"].array[1], arrays[1])
    assert run.state is RunState.completed


@pytest.mark.parametrize(
    "array", [np.zeros(3, bool), np.zeros(3, complex), np.array(["a"]), np.array([None]), np.zeros((2, 2, 2, 2)),
              np.zeros((0, 4))], ids=["bool", "complex", "text", "object", "4-D", "empty"],
)  # fmt: skip
def test_what_is_not_a_frame(producer, array):
    with pytest.raises(ValueError, match=r"dtype|shape"):
        producer.run().send(array)


def test_numbers_and_strided_and_big_endian_arrays(service, producer):
    base = pixels(1)
    with producer.run() as out:
        out.send(base[::2, ::2])
        out.send(base[::2, ::2].astype(">u2"))
    assert [np.array_equal(f.data, base[::2, ::2]) for f in opened(service, producer)["cam"]] == [True, True]
    with Producer(service.address, producer.experiment, "diode") as diode, diode.run() as out:
        out.send(2.5)
        out.send(np.float64(3.5))
    assert [float(f.data) for f in opened(service, producer, 2)["diode"]] == [2.5, 3.5]


def test_ready_blobs_are_not_touched(service, producer):
    blobs = [encode(pixels(i)) for i in range(3)]
    out = producer.run()
    with pytest.raises(BadFrame, match=r"call start\(\) first"):
        out.send(blobs[0])
    out.start(StreamHeader(experiment=producer.experiment, run=1, data_source="cam", shape=(64, 80), dtype="uint16"))
    for content in (blobs[0], bytearray(blobs[1]), memoryview(blobs[2])):
        out.send(content)
    with pytest.raises(BadFrame, match="was cut on its way"):
        out.send(blobs[0][:-1])
    assert out.send(blobs[0]) == 3, "a refused frame leaves no gap"
    out.finish()
    assert [bytes(f.blob) for f in opened(service, producer)["cam"]] == [*blobs, blobs[0]]


def test_tables_and_metadata_columns(service, producer):
    with producer.run() as out:
        for i in range(5):
            out.send(meta={"delay": i / 2, "laser": i % 2 == 0, "sample": f"s{i}", "nested": {"a": [i]}})
    run = opened(service, producer)
    assert run["cam"][3].meta == {"delay": 1.5, "laser": False, "sample": "s3", "nested": {"a": [3]}}
    with pytest.raises(NearlineError, match="is a table"):
        _ = run["cam"][3].data
    table = pq.read_table(run.folder / "cam.frames" / "00000.parquet")
    assert table.column("delay").to_pylist() == [0, 0.5, 1, 1.5, 2]
    assert table.column("laser").to_pylist() == [True, False, True, False, True]
    assert "nested" not in table.column_names


def test_buffered_acknowledgement(service):
    with Producer(service.address, "buffered", "cam", ack="buffered") as producer, producer.run() as out:
        for i in range(50):
            out.send(pixels(i))
    assert len(list(open_run(f"{service.address}/buffered/1")["cam"].follow())) == 50


def test_stored_acknowledgement_is_on_disk(service, producer):
    out = producer.run()
    out.send(pixels(0))
    folder = service.settings.root / producer.experiment / "1"
    assert np.array_equal(open_run(folder)["cam"][0].data, pixels(0)), "read without the service"
    out.finish()


def test_duplicates_and_conflicts(service, producer):
    out = producer.run()
    out.send(pixels(0))
    assert out.send(pixels(0), frame_index=0) == 0
    with pytest.raises(IndexConflict, match="frame 0 of cam exists already with other content"):
        out.send(pixels(1), frame_index=0)
    assert out.send(pixels(1)) == 1
    out.finish()
    ledger = opened(service, producer)["cam"].ledger()
    assert (ledger.duplicate, ledger.stored) == (1, 2)
    assert ledger.is_balanced


def test_frame_that_comes_after_its_chunk_was_sealed(service, producer):
    out = producer.run()
    header = StreamHeader(
        experiment=producer.experiment, run=1, data_source="cam", shape=(64, 80), dtype="uint16", frames_per_chunk=2
    )
    out.start(header)
    out.send(pixels(1), frame_index=1)
    stream = opened(service, producer)["cam"]
    wait_for(lambda: stream.status.n_sealed == 1)
    assert out.send(pixels(0), frame_index=0) == 0
    assert np.array_equal(stream[0].data, pixels(0))
    assert stream[0].info.late
    out.finish()
    assert (stream.ledger().late, stream.ledger().missing) == (1, 0)


@pytest.mark.parametrize("other", [np.zeros((3, 3), "uint16"), np.zeros((64, 80), "uint32")], ids=["shape", "dtype"])
def test_frames_of_another_kind(producer, other):
    out = producer.run()
    out.send(pixels(0))
    with pytest.raises(BadFrame, match="but the stream began as uint16"):
        out.send(other)


@pytest.mark.parametrize("index", [-1, 10**6, 2**62])
def test_indices_that_cannot_be(producer, index):
    out = producer.run()
    out.send(pixels(0))
    with pytest.raises(BadFrame, match="frame_index"):
        out.send(pixels(1), frame_index=index)


def test_announced_frames_that_never_came(service, producer):
    out = producer.run(planned=10)
    out.send(pixels(0))
    out.finish(5)
    run = opened(service, producer)
    ledger = run["cam"].ledger()
    assert (ledger.announced, ledger.missing, ledger.planned) == (5, 4, 10)
    assert run.state is RunState.incomplete


@pytest.mark.parametrize("announced", [-1, 10**12])
def test_end_that_cannot_be(producer, announced):
    out = producer.run()
    out.send(pixels(0))
    out._next = announced
    with pytest.raises(BadFrame, match="cannot end with"):
        out.finish(announced)


def test_run_numbers(service, producer):
    assert [producer.run().run, producer.run(17).run, producer.run().run] == [1, 17, 18]
    with pytest.raises(BadName, match="17 exists already"):
        producer.run(17)


def test_ended_run_takes_no_new_stream(service, producer):
    with producer.run() as out:
        out.send(pixels(0))
    with pytest.raises(ProtocolError, match="has ended"):
        producer.derived(1, StreamHeader(experiment=producer.experiment, run=1, data_source="x", kind="table"))


def test_far_jump_is_accounted_for_without_holding_others_up(service, producer):
    """Thousands of empty chunks are sealed a few at a time."""
    out = producer.run()
    out.send(pixels(0))
    out.send(pixels(1), frame_index=99_000)
    with producing(service.address, run=None, data_source="other") as other:
        other.send(pixels(0))
    stream = opened(service, producer)["cam"]
    wait_for(lambda: stream.status.watermark == 99_001)
    out.finish()
    ledger = stream.ledger()
    assert (ledger.stored, ledger.missing) == (2, 98_999)
    assert ledger.is_balanced


# ---- derived streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("through_service", [True, False], ids=["service", "folder"])
def test_derived_stream(tmp_path, through_service):
    with serving(tmp_path) as service:
        record_run(service.address, range(6))
        run = open_run(f"{service.address}/lyso/1" if through_service else tmp_path / "lyso" / "1")
        parent = run["eiger"].header
        header = parent.model_copy(
            update={"data_source": "eiger.results@p1", "parent": "eiger", "kind": "table", "shape": (), "dtype": ""}
        )
        derived = open_derived(run, StreamHeader.model_validate(header.model_dump()))
        derived.send([Row(i, None, {"n_peaks": i}) for i in (0, 2, 5)])
        derived.send([Row(0, None, {"n_peaks": 0})])
        derived.finish(6)
        results = open_run(f"{service.address}/lyso/1")["eiger.results@p1"]
        assert [(f.frame_index, f.meta["n_peaks"]) for f in results.follow()] == [(0, 0), (2, 2), (5, 5)]
        assert results.ledger().is_balanced
        assert run.state is RunState.completed
        with pytest.raises((ProtocolError, FileExistsError)):
            open_derived(run, results.header)
