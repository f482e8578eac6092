"""Frames that the peak search calls no hit, tried by indexing all the same."""

from pathlib import Path

import numpy as np
import pytest

from flows.run_processing import ProcessRequest, run_processing
from streaming.retrieval import open_run
from streaming.simulator import SimulatorSettings, make_frames
from streaming.simulator.stills import StillPhysics
from tasks.recipe import crystallography
from tasks.step_tables import crystal_matrix
from tasks.unit_cell import UnitCell, lattice_rotations, rotation_angle_deg
from tests.flows.stored_runs import store_run

LYSOZYME = UnitCell(79.1, 79.1, 37.9, 90, 90, 90, "P 43 21 2")
# Eight times weaker than usual: about half the crystals have fewer than the 15 peaks of a hit.
SETTINGS = SimulatorSettings(
    size="512", n_frames=60, hit_fraction=0.5, seed=3, spot_strength=StillPhysics().spot_strength / 8
)


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    simulator = SETTINGS.simulator()
    blobs, truths = make_frames(simulator, SETTINGS.n_frames)
    return store_run(tmp_path_factory.mktemp("weak"), simulator, blobs), truths


def processed(run, **of_index):
    recipe = crystallography(LYSOZYME).model_dump(mode="json")
    recipe["steps"] = [
        step | ({"params": of_index} if step["use"] == "index" else {})
        for step in recipe["steps"]
        if step["use"] in ("find_peaks", "index")
    ]
    recipe["export"] = {"nexus": "hits", "crystfel": True, "hits_stream": True}
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=recipe, n_threads=2))
    return summary, open_run(str(run.path)).processing(summary["processing"])


def test_what_is_indexed_is_a_hit_and_more_is_found(taken):
    run, truths = taken
    usual, _ = processed(run)
    weak, processing = processed(run, min_peaks=8)
    assert weak["indexed"] >= usual["indexed"] + 3
    frames = processing.frames.sort_by("frame_index")
    hit, indexed, n_peaks = (frames[name].to_numpy() for name in ("hit", "indexed", "n_peaks"))
    np.testing.assert_array_equal(hit, (n_peaks >= 15) | indexed)
    assert (weak["hits"], weak["indexed"]) == (hit.sum(), indexed.sum())
    assert n_peaks[indexed].min() < 15
    for row in processing.crystals.to_pylist():
        truth = truths[row["frame_index"]]
        assert truth.is_hit
        turn = crystal_matrix(row) @ lattice_rotations(LYSOZYME) @ np.linalg.inv(truth.A.T)
        u, _, vt = np.linalg.svd(turn)
        assert min(rotation_angle_deg(m) for m in u @ vt) < 1


def test_weak_hits_are_exported_and_streamed_like_others(taken):
    run, _ = taken
    summary, processing = processed(run, min_peaks=8, min_fraction=0.3)
    hits = {row["frame_index"] for row in processing.frames.to_pylist() if row["hit"]}
    stream = open_run(str(run.path))[f"eiger.hits@{summary['processing']}"]
    assert {frame.frame_index for frame in stream} == hits
    text = Path(summary["files"]["crystfel_stream"]).read_text()
    assert text.count("hit = 1") == len(hits)
