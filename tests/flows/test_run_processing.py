"""What a processing makes of a run: the same live and finished, resumable, and never done twice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401
import numpy as np
import pytest

from flows.run_processing import ProcessRequest, run_processing
from nearline.children import free_port
from nearline.truth import compare_with_truth
from storage.codec import encode
from storage.crystfel import read_stream
from storage.errors import BadRecipe, CorruptFrame, ProcessingBusy
from storage.models import StreamHeader
from storage.step_store import Processing
from streaming.producer import Producer
from streaming.retrieval import open_run
from streaming.service import Service, ServiceSettings, SourceSettings
from streaming.simulator import SimulatorSettings, make_frames
from tasks.recipe import Recipe, load_recipe
from tests.flows.conftest import N_FRAMES, take_run, wait_for_run
from tests.flows.stored_runs import store_run


def request(run, recipe: Recipe, **options) -> ProcessRequest:
    return ProcessRequest(run=str(run), recipe=recipe.model_dump(mode="json"), **options)


@pytest.fixture
def processed(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    return folder, run_processing(request(folder, recipe))


def test_results_agree_with_the_truth(processed, simulated_run, recipe):
    folder, summary = processed
    comparison = compare_with_truth(Processing(folder, "p1"), simulated_run.truth, recipe.sample.unit_cell)
    assert comparison.true_hits >= 5
    assert comparison.problems == []
    assert (summary["frames"], summary["indexed"]) == (N_FRAMES, comparison.correct)


def test_results_are_streams_of_the_run(processed):
    folder, summary = processed
    run = open_run(folder)
    rows = list(run["eiger.results@p1"])
    assert [row.frame_index for row in rows] == list(range(N_FRAMES))
    assert sum(row.meta["indexed"] for row in rows) == summary["indexed"]
    assert run["eiger.results@p1"].ledger().is_balanced
    binned = run["eiger.binned@p1"]
    frame, small = run["eiger"][0].data, binned[0].data
    block = frame[200:204, 200:204]
    assert small[50, 50] == (block.sum() if (block < 65535).all() else 2**32 - 1)
    assert binned.header.detector.pixel_size_x == pytest.approx(4 * run["eiger"].header.detector.pixel_size_x)


def test_exported_chunks_are_the_detectors_bytes(processed):
    folder, summary = processed
    stream = open_run(folder)["eiger"]
    with h5py.File(summary["files"]["nexus"]) as file:
        data = file["entry/data/data"]
        for frame in stream:
            _, blob = data.id.read_direct_chunk((frame.frame_index, 0, 0))
            assert blob == frame.blob


def test_crystfel_stream_holds_every_lattice(processed):
    _, summary = processed
    frames = list(read_stream(summary["files"]["crystfel_stream"]))
    assert len(frames) == N_FRAMES
    assert sum(bool(frame.crystals) for frame in frames) == summary["indexed"]
    assert all(len(crystal.reflections) > 20 for frame in frames for crystal in frame.crystals)


def test_pictures_are_drawn(processed):
    _, summary = processed
    assert summary["pictures"]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in summary["pictures"])


def test_repeating_reuses_every_step(processed, recipe):
    folder, _ = processed
    outputs = sorted((folder / "steps").iterdir())
    again = run_processing(request(folder, recipe))
    assert again["processing"] == "p2"
    assert sorted((folder / "steps").iterdir()) == outputs
    assert {name: s for name, s in again["seconds_by_stage"].items() if name != "export"} == {
        "bin": 0, "find_peaks": 0, "index": 0, "integrate": 0,
    }  # fmt: skip


def test_new_integration_parameters_reuse_peaks_and_lattices(processed, recipe):
    folder, _ = processed
    steps = [step.model_dump() for step in recipe.steps]
    steps[-1]["params"] = {"inner": 4.0, "middle": 5.0, "outer": 7.0}
    changed = load_recipe(recipe.model_dump() | {"steps": steps})
    seconds = run_processing(request(folder, changed))["seconds_by_stage"]
    assert (seconds["find_peaks"], seconds["index"]) == (0, 0)
    assert seconds["integrate"] > 0
    old, new = Processing(folder, "p1").reflections, Processing(folder, "p2").reflections
    assert old["intensity"].to_pylist() != new["intensity"].to_pylist()


class _Interrupts:
    """Ends a processing after its first chunk, as a crash would."""

    def started(self, run, processing, recipe):
        pass

    def chunk_done(self, progress):
        raise KeyboardInterrupt

    def finished(self, summary):
        raise AssertionError("it did not stop")


def test_interrupted_processing_is_taken_up_again(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    command = [sys.executable, "-c", _INTERRUPTED, str(folder), recipe.model_dump_json()]
    # A process of its own: the claim on the processing ends with it.
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode == 3
    assert list((folder / "nexus").glob("*")) == []
    summary = run_processing(request(folder, recipe))
    assert (summary["processing"], summary["frames"]) == ("p1", N_FRAMES)
    results = open_run(folder)["eiger.results@p1"]
    assert [row.frame_index for row in results] == list(range(N_FRAMES))


_INTERRUPTED = """
import sys, json
from flows.run_processing import ProcessRequest, run_processing
from tests.flows.test_run_processing import _Interrupts
try:
    run_processing(ProcessRequest(run=sys.argv[1], recipe=json.loads(sys.argv[2])), reporter=_Interrupts())
except KeyboardInterrupt:
    sys.exit(3)
"""


def test_a_processing_belongs_to_one_process(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)

    class Rival(_Interrupts):
        def chunk_done(self, progress):
            # flock is held per open file, so a second claim here is as foreign as another process's.
            with pytest.raises(ProcessingBusy, match="being worked on"):
                run_processing(request(folder, recipe))

        def finished(self, summary):
            pass

    run_processing(request(folder, recipe), reporter=Rival())


def test_live_and_finished_give_the_same_tables(simulated_run, recipe, tmp_path, in_thread):
    detector = f"tcp://127.0.0.1:{free_port()}"
    settings = ServiceSettings(root=tmp_path, bind="tcp://127.0.0.1:*", sources=(SourceSettings(endpoint=detector),))
    with Service(settings) as service:
        taking = in_thread(take_run, service, detector, tmp_path / "truth.parquet")
        wait_for_run(service)
        summary = run_processing(request("lyso/1", recipe, service=service.address))
        run = taking()
        assert [row.frame_index for row in run["eiger.results@p1"].follow()] == list(range(N_FRAMES))
    folder = simulated_run.copy_to(tmp_path / "finished")
    finished = run_processing(request(folder, recipe))
    assert summary["indexed"] == finished["indexed"]
    for table in ("frames", "peaks", "crystals", "reflections"):
        live, later = (Processing(where, "p1").table(table).to_pylist() for where in (run.folder, folder))
        assert repr(live) == repr(later), table  # repr: not-a-number equals itself


def test_run_with_lost_frames_is_processed(recipe, tmp_path):
    """What came is analysed; what did not is missing in every table, not blank."""
    simulator = SimulatorSettings(size="1M", n_frames=6, frame_time=0.2).simulator()
    with Service(ServiceSettings(root=tmp_path, bind="tcp://127.0.0.1:*", sources=())) as service:
        with Producer(service.address, "lyso", "eiger") as producer, producer.run() as out:
            header = StreamHeader(
                experiment="lyso", run=out.run, data_source="eiger", shape=simulator.shape,
                dtype="uint16", frames_per_chunk=3, detector=simulator.header, planned=6,
            )  # fmt: skip
            out.start(header, simulator.pixel_mask)
            for index in (0, 2, 5):
                out.send(encode(simulator.frame(index)[0]), frame_index=index)
        summary = run_processing(request("lyso/1", recipe, service=service.address))
        ledger = open_run(f"{service.address}/lyso/1")["eiger"].ledger()
    assert (ledger.stored, ledger.missing, ledger.is_balanced) == (3, 3, True)
    assert summary["frames"] == 3
    assert Processing(tmp_path / "lyso" / "1", "p1").frames["frame_index"].to_pylist() == [0, 2, 5]
    with h5py.File(summary["files"]["nexus"]) as file:
        assert np.all(file["entry/data/data"][1] == 65535)


def test_binned_frames_can_feed_the_search(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    content = recipe.model_dump(mode="json")
    content["steps"][0]["params"] = {"factor": 2, "feed_next": True}
    summary = run_processing(request(folder, load_recipe(content)))
    comparison = compare_with_truth(Processing(folder, "p1"), simulated_run.truth, recipe.sample.unit_cell)
    assert comparison.found_hits >= 0.8 * comparison.true_hits
    assert comparison.correct >= 0.8 * summary["hits"]
    assert comparison.wrong == 0
    # Positions are the detector's own pixels, whatever the search worked on.
    with_full_frames = simulated_run.copy_to(tmp_path / "full")
    run_processing(request(with_full_frames, recipe))
    full, binned = (Processing(f, "p1").reflections for f in (with_full_frames, folder))
    places = {(r["frame_index"], r["h"], r["k"], r["l"]): (r["x"], r["y"]) for r in full.to_pylist()}
    both = [(places[key], (r["x"], r["y"])) for r in binned.to_pylist() if (key := _spot(r)) in places]
    assert len(both) > 50
    assert np.median([np.hypot(a[0] - b[0], a[1] - b[1]) for a, b in both]) < 1.0


def _spot(row) -> tuple:
    return row["frame_index"], row["h"], row["k"], row["l"]


BAD_RECIPES = [
    ({"steps": [{"use": "find_peeks"}]}, "no step 'find_peeks'"),
    ({"steps": [{"use": "find_peaks", "params": {"treshold": 3}}]}, "unknown parameter treshold"),
    ({"steps": [{"use": "index"}]}, "needs sample"),
    ({"steps": [{"use": "nowhere.at_all:f"}]}, "cannot import step"),
    ({"steps": [{"use": "bin"}, {"use": "bin"}]}, "appear twice"),
    ({"detector": {"distance": 0.1}}, "no .*field.* distance"),
    ({"detector": {"detector_distance": -1.0}}, "impossible detector values"),
    ({"steps": [{"use": "find_peaks", "params": {"threshold": float("nan")}}]}, "not a usable number"),
    ({"steps": [{"use": "bin", "params": {"factor": 0}}]}, "factor 0"),
    ({"sample": {"cell": "no-such.cell", "space_group": "P 1"}}, "neither a file nor six numbers"),
    ({"stepps": []}, "stepps"),
]


@pytest.mark.parametrize(("content", "words"), BAD_RECIPES, ids=[words for _, words in BAD_RECIPES])
def test_bad_recipes_are_refused_in_words(content, words):
    with pytest.raises(BadRecipe, match=words):
        load_recipe(content)


def test_processing_needs_no_prefect(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    code = (
        "import sys, json, nearline; nearline.process(sys.argv[1], json.loads(sys.argv[2])); "
        "print('prefect' in sys.modules)"
    )
    content = json.dumps({"steps": [{"use": "find_peaks"}], "export": {"nexus": "none", "crystfel": False}})
    out = subprocess.run([sys.executable, "-c", code, str(folder), content], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("False")


def test_another_run_under_the_same_path_is_analysed_as_itself(recipe, tmp_path):
    """A data folder that was deleted and filled anew, under a worker that lives on."""
    for size in ("512", "1M"):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        settings = SimulatorSettings(size=size, n_frames=4, hit_fraction=1.0, seed=1)
        simulator = settings.simulator()
        blobs, _ = make_frames(simulator, settings.n_frames)
        folder = store_run(tmp_path / "data", simulator, blobs)
        summary = run_processing(ProcessRequest(run=str(folder.path), recipe=recipe.model_dump(mode="json")))
        assert (summary["frames"], summary["indexed"]) == (4, 4)


def test_a_missing_commit_is_no_end_of_the_run(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    (folder / "eiger.chunks" / "00001.json").unlink()
    with pytest.raises(CorruptFrame, match="the commit of chunk 1"):
        run_processing(request(folder, recipe))
    assert not Processing(folder, "p1").is_finished
