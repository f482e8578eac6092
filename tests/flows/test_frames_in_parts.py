"""A detector whose modules come apart is analysed as one array, and comes to what the whole frame comes to."""

from datetime import UTC, datetime

import h5py
import numpy as np
import pytest

from flows.explaining import explain
from flows.exports import export_stream
from flows.replaying import replay
from flows.report import write_processing_report
from flows.run_processing import ProcessRequest, run_processing
from flows.tuning import tune
from storage.codec import decode, encode
from storage.frame import FrameInfo, blob_crc32c, blob_digest
from storage.models import RunHeader, StreamHeader
from storage.run_folder import RunFolder
from storage.step_store import Processing
from storage.stream_store import StreamStore
from storage.table_digest import table_digest
from streaming.producer import Producer
from streaming.retrieval import open_run
from streaming.simulator import SimulatorSettings, make_frames
from tests.flows.stored_runs import store_run
from tests.streaming.harness import serving

N_FRAMES, PARTS = 24, 2
# This frame's second module never came.
TORN = 7
SETTINGS = SimulatorSettings(size="512", n_frames=N_FRAMES, hit_fraction=0.6, seed=3)


@pytest.fixture(scope="module")
def simulator():
    return SETTINGS.simulator()


@pytest.fixture(scope="module")
def frames(simulator):
    blobs, _ = make_frames(simulator, N_FRAMES)
    return [decode(blob, simulator.shape, simulator.dtype) for blob in blobs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, simulator, frames):
    torn = [*frames]
    torn[TORN] = frames[TORN].copy()
    torn[TORN][simulator.shape[0] // PARTS :] = np.iinfo(simulator.dtype).max
    return store_run(tmp_path_factory.mktemp("whole"), simulator, [encode(frame) for frame in torn])


def header_of(simulator, **changes) -> StreamHeader:
    slow, fast = simulator.shape
    known = {
        "experiment": "lyso", "run": 1, "data_source": "eiger", "shape": (slow // PARTS, fast), "parts": PARTS,
        "dtype": simulator.dtype, "frames_per_chunk": 20, "planned": N_FRAMES, "detector": simulator.header,
    }  # fmt: skip
    return StreamHeader.model_validate(known | changes)


def modules_of(frames):
    """(frame_index, part, array) of all modules that came, the last module of a frame first."""
    for index, frame in enumerate(frames):
        for part, array in reversed(list(enumerate(np.split(frame, PARTS)))):
            if (index, part) != (TORN, 1):
                yield index, part, array


@pytest.fixture(scope="module")
def parted(tmp_path_factory, simulator, frames):
    root = tmp_path_factory.mktemp("parted")
    folder = RunFolder.create(root, RunHeader(experiment="lyso", run=1, started_at=datetime.now(UTC)))
    store = StreamStore.create(folder, header_of(simulator), pixel_mask=simulator.pixel_mask)
    for index, part, array in modules_of(frames):
        blob = encode(array)
        info = FrameInfo(
            frame_index=index, part=part, size_bytes=len(blob), crc32c=blob_crc32c(blob), digest=blob_digest(blob)
        )
        store.append(info, blob)
    store.finish(N_FRAMES, "not received")
    store.close()
    folder.add_event("run_finished", {"state": "incomplete", "cause": None, "ledgers": []})
    return folder


def process(folder, recipe, **export) -> Processing:
    content = recipe.model_dump(mode="json")
    content["export"] |= export
    return Processing(folder.path, run_processing(ProcessRequest(run=str(folder.path), recipe=content))["processing"])


@pytest.fixture(scope="module")
def processed(parted, recipe):
    return process(parted, recipe, hits_stream=True)


@pytest.fixture(scope="module")
def processed_whole(whole, recipe):
    return process(whole, recipe)


@pytest.mark.parametrize("table", ["frames", "peaks", "crystals", "reflections", "binned"])
def test_it_comes_to_what_whole_frames_come_to(processed, processed_whole, table):
    assert len(processed.table(table))
    assert table_digest(processed.table(table)) == table_digest(processed_whole.table(table))


def test_the_nexus_file_holds_each_module_as_it_came(processed, parted, processed_whole, frames):
    stream = open_run(str(parted.path))["eiger"]
    with h5py.File(processed.summary["files"]["nexus"]) as file:
        data = file["entry/data/data"]
        slow, fast = frames[0].shape
        assert data.chunks == (1, slow // PARTS, fast)
        for part in range(PARTS):
            raw = bytes(data.id.read_direct_chunk((3, part * slow // PARTS, 0))[1])
            assert raw == stream.read_blob(3, part)
        with h5py.File(processed_whole.summary["files"]["nexus"]) as other:
            np.testing.assert_array_equal(data[()], other["entry/data/data"][()])
            mask = "entry/instrument/detector/pixel_mask"
            np.testing.assert_array_equal(file[mask][()], other[mask][()])


def test_an_exported_series_of_files_too(parted, tmp_path, frames):
    run = open_run(str(parted.path))
    export_stream(run, run["eiger"], tmp_path / "master.h5", frames_per_file=10)
    with h5py.File(tmp_path / "master.h5") as file:
        np.testing.assert_array_equal(file["entry/data/data"][13], frames[13])


def test_hits_keep_their_modules(processed, parted):
    run = open_run(str(parted.path))
    hits, parent = run[f"eiger.hits@{processed.name}"], run["eiger"]
    table = processed.frames
    wanted = table.filter(table["hit"])["frame_index"].to_pylist()
    assert 0 < len(wanted) < N_FRAMES
    assert [frame.frame_index for frame in hits] == wanted
    for frame in hits:
        assert [(raw.info.part, bytes(raw.blob)) for raw in frame.raw_parts] == [
            (raw.info.part, bytes(raw.blob)) for raw in parent[frame.frame_index].raw_parts
        ]
        np.testing.assert_array_equal(frame.image, parent[frame.frame_index].image)
    ledger = hits.ledger()
    assert (ledger.is_balanced, ledger.left_out) == (True, N_FRAMES - len(wanted))


def test_a_peak_of_the_second_module_is_replayed(processed, parted, simulator):
    peaks = processed.peaks
    row = int(np.flatnonzero(peaks["y"].to_numpy() > simulator.shape[0] / 2)[0])
    frame = peaks["frame_index"][row].as_py()
    first = int(np.searchsorted(peaks["frame_index"].to_numpy(), frame))
    run = open_run(str(parted.path))
    explained = explain(run, frame, peak=row - first, processing=processed.name)
    assert [(place.part, place.is_verified) for place in explained.bytes] == [(0, True), (1, True)]
    done = replay(run, explained)
    assert done.is_identical
    assert not done.differences


def test_it_is_tuned_and_reported_as_one_array(processed, parted, simulator, tmp_path):
    run = open_run(str(parted.path))
    report, survey = tune(run)
    assert survey.mask.shape == simulator.shape
    assert report.n_frames == N_FRAMES
    write_processing_report(run, processed, tmp_path / "report.html")
    assert "a frame with its peaks" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("of", ["one module", "the frame"])
def test_a_live_run_of_modules(tmp_path, simulator, frames, recipe, of):
    """Through the service, with a mask of the whole frame or of a module that stands for all."""
    mask = simulator.pixel_mask if of == "the frame" else np.zeros_like(simulator.pixel_mask[: len(frames[0]) // PARTS])
    with serving(tmp_path) as service, Producer(service.address, "lyso", "eiger") as producer:
        with producer.run(1) as out:
            out.start(header_of(simulator, frames_per_chunk=8), pixel_mask=mask)
            for index, part, array in modules_of(frames):
                out.put(array, frame_index=index, part=part)
        content = recipe.model_dump(mode="json") | {"steps": [{"use": "find_peaks"}]}
        content["export"] = {"nexus": "none", "crystfel": False, "hits_stream": True}
        request = ProcessRequest(run="lyso/1", recipe=content, service=service.address)
        summary = run_processing(request)
        run = open_run(f"{service.address}/lyso/1")
        stream = run["eiger"]
        expected = mask if of == "the frame" else np.concatenate([mask] * PARTS)
        np.testing.assert_array_equal(stream.pixel_mask, expected)
        np.testing.assert_array_equal(stream[3].image, frames[3])
        hits = run[f"eiger.hits@{summary['processing']}"]
        assert 0 < summary["hits"] < N_FRAMES
        assert len([frame for frame in hits if len(frame.raw_parts) == PARTS]) >= summary["hits"] - 1


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_other_numbers_than_the_detectors_come_in_parts_too(tmp_path, simulator, frames, dtype):
    """Without a saturation value: a module that never came is no field of bright pixels."""
    detector = simulator.header.model_copy(update={"saturation_value": None})
    header = header_of(simulator, dtype=dtype, frames_per_chunk=8, planned=8, detector=detector)
    folder = RunFolder.create(tmp_path, RunHeader(experiment="lyso", run=1, started_at=datetime.now(UTC)))
    store = StreamStore.create(folder, header, pixel_mask=simulator.pixel_mask)
    for index, part, array in modules_of(frames[:8]):
        blob = encode(np.where(array == np.iinfo(array.dtype).max, 0, array).astype(dtype))
        info = FrameInfo(
            frame_index=index, part=part, size_bytes=len(blob), crc32c=blob_crc32c(blob), digest=blob_digest(blob)
        )
        store.append(info, blob)
    store.finish(8, "not received")
    store.close()
    folder.add_event("run_finished", {"state": "incomplete", "cause": None, "ledgers": []})
    content = {"steps": [{"use": "find_peaks"}], "export": {"nexus": "none", "crystfel": False}}
    summary = run_processing(ProcessRequest(run=str(folder.path), recipe=content))
    peaks = Processing(folder.path, summary["processing"]).peaks
    of_torn = peaks.filter(peaks["frame_index"].to_numpy() == TORN)
    assert len(peaks)
    assert not len(of_torn) or of_torn["y"].to_numpy().max() < simulator.shape[0] / PARTS
