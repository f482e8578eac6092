"""Indexing by programs of others: the same spots in, the same tables out, and what happens when they die.

The simulator's truth judges them. DIALS is run where it is installed. indexamajig is not run anywhere: what it would
be given is read back here, and a stand-in that keeps to its documented command line shows that files,
exit codes and time limits are handled.
"""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from flows.run_processing import ProcessRequest, run_processing
from nearline.experiment_checks import check_engines
from storage.crystfel import read_stream
from storage.errors import BadRecipe, EngineFailed, EngineMissing
from storage.frame import FrameInfo, RawFrame, blob_crc32c, blob_digest
from storage.geometry import Geometry, Panel
from storage.models import StreamHeader
from storage.sensor import Sensor
from streaming.retrieval import open_run
from streaming.simulator import SimulatorSettings, make_frames
from tasks.chunk_frames import ChunkFrames, usable_mask
from tasks.engines import Answer, indexamajig
from tasks.engines.engine import flat_geometry, spots_where_rays_enter
from tasks.engines.indexamajig import IndexamajigParams
from tasks.process_chunk import code_digest
from tasks.recipe import load_recipe
from tasks.step_tables import crystal_matrix, read_crystal
from tasks.steps import STEPS, run_engine
from tasks.unit_cell import UnitCell, read_cell, same_orientation
from tests.flows.stored_runs import store_run

# Four hits and a blank.
N_FRAMES = 5
ROOT = Path(__file__).parents[2]
HAS_DIALS = shutil.which("dials.stills_process") is not None


@pytest.fixture(scope="module")
def simulator():
    return SimulatorSettings(size="1M", n_frames=N_FRAMES, seed=3).simulator()


@pytest.fixture(scope="module")
def frames(simulator):
    return make_frames(simulator, N_FRAMES)


@pytest.fixture(scope="module")
def chunk(simulator, frames):
    raw = [
        RawFrame(FrameInfo(frame_index=i, size_bytes=len(b), crc32c=blob_crc32c(b), digest=blob_digest(b)), b)
        for i, b in enumerate(frames[0])
    ]
    header = StreamHeader(
        experiment="e", run=1, data_source="eiger", shape=simulator.shape, dtype=simulator.dtype,
        frames_per_chunk=N_FRAMES, detector=simulator.header,
    )  # fmt: skip
    return ChunkFrames(raw, header, usable_mask(simulator.pixel_mask, simulator.shape, None), "digest", n_threads=1)


@pytest.fixture(scope="module")
def cell(simulator):
    return UnitCell(*simulator.crystal.cell, simulator.crystal.space_group)


@pytest.fixture(scope="module")
def peaks(chunk):
    step = STEPS["find_peaks"]
    return {"find_peaks": step.run(chunk, step.read_params({}), None, {})}


def tables_of(use, chunk, cell, peaks, **params):
    step = STEPS[use]
    return step.run(chunk, step.read_params(params), cell, peaks)


def judged(tables, truths, cell):
    """(right, wrong, misorientations) of the crystals beside the truth."""
    found = [
        same_orientation(crystal_matrix(row), truths[row["frame_index"]].A.T, cell)
        for row in tables["crystals"].to_pylist()
        if truths[row["frame_index"]].is_hit
    ]
    right = [angle for is_same, angle in found if is_same]
    return len(right), tables["crystals"].num_rows - len(right), right


@pytest.fixture(scope="module")
def of_dials(chunk, cell, peaks):
    if not HAS_DIALS:
        pytest.skip("DIALS is not installed (apt install dials)")
    # DIALS tries all triples of its basis vectors unless told otherwise, for 5 s a frame.
    few = "indexing.basis_vector_combinations.max_combinations=100"
    return tables_of("index_dials", chunk, cell, peaks, phil=[few])


@pytest.mark.dials
def test_dials_indexes_simulated_hits_as_the_truth_says(of_dials, frames, cell):
    n_hits = sum(truth.is_hit for truth in frames[1])
    right, wrong, angles = judged(of_dials, frames[1], cell)
    assert n_hits > 2
    assert (right, wrong) == (n_hits, 0)
    assert max(angles) < 0.2
    assert of_dials["frames"]["indexed"].to_pylist() == [truth.is_hit for truth in frames[1]]


@pytest.mark.dials
def test_dials_and_our_indexer_agree_spot_by_spot(of_dials, chunk, cell, peaks):
    ours = tables_of("index", chunk, cell, peaks)["crystals"]
    theirs = of_dials["crystals"]
    assert theirs["frame_index"].to_pylist() == ours["frame_index"].to_pylist()
    assert set(ours.column_names) == set(theirs.column_names) - {"n_indexed_by_engine"}
    for mine, other in zip(ours.to_pylist(), theirs.to_pylist(), strict=True):
        assert same_orientation(crystal_matrix(mine), crystal_matrix(other), cell, tolerance_deg=0.2)[0]
        np.testing.assert_allclose([other[k] for k in "abc"], [mine[k] for k in "abc"], rtol=0.005)
        assert mine["n_spots"] == other["n_spots"]
        assert 0.9 * mine["n_indexed"] <= other["n_indexed"] <= other["n_spots"]
        assert 0 < other["n_indexed_by_engine"] <= other["n_spots"]
        assert other["log10_chance"] < -10
        assert np.linalg.det(read_crystal(other, cell).A) > 0


# ---- what leaves us ---------------------------------------------------------------------------------


def tilted_pair():
    """Two panels, one behind the other in the array and tilted, of a thick sensor."""
    sensor = Sensor(0.45e-3, 3.6e3)
    flat = Panel("p0", (0.02, 0.03, 0.1), (-75e-6, 0, 0), (0, -75e-6, 0), (300, 400), (0, 0))
    turn = 75e-6 * np.array([-np.cos(0.1), 0, -np.sin(0.1)])
    tilted = Panel("p1", (0.02, -0.03, 0.1), tuple(turn), (0, -75e-6, 0), (300, 400), (300, 0))
    return Geometry((flat, tilted), 1.03, sensor)


def test_spots_given_away_have_no_parallax_left():
    geometry = tilted_pair()
    panel, x, y = np.array([0, 1, 1]), np.array([10.0, 20.0, 390.0]), np.array([20.0, 40.0, 280.0])
    q = np.array([geometry.scattering_vector(a, b, p) for a, b, p in zip(x, y, panel, strict=True)])
    spots = spots_where_rays_enter(geometry, q, panel, np.ones(3))
    moved = np.hypot(spots.x - x, spots.y - np.where(panel == 1, y + 300, y))
    assert (moved > 0.05).all()
    plain = flat_geometry(geometry)
    again = [plain.scattering_vector(a, b - 300 * p, p) for a, b, p in zip(spots.x, spots.y, spots.panel, strict=True)]
    np.testing.assert_allclose(again, q, atol=1e-6)


def job_of(chunk, cell, peaks):
    """The job that a step would give a program."""
    seen = []
    engine = replace(STEPS["index_indexamajig"].engine, index=lambda job, params: seen.append(job) or [Answer()] * 99)
    with contextlib.suppress(ValueError):
        run_engine(engine, chunk, None, cell, peaks)
    return seen[0]


def test_peaks_are_stored_as_cxi_has_them(chunk, cell, peaks, tmp_path):
    job = job_of(chunk, cell, peaks)
    indexamajig.write_job(tmp_path, job)
    with h5py.File(tmp_path / "frames.cxi") as file:
        result = file["entry_1/result_1"]
        assert file["entry_1/data_1/data"].shape == (len(job.frames), *job.header.shape)
        for row, spots in enumerate(job.frames):
            n = result["nPeaks"][row]
            assert n == len(spots) > 10
            np.testing.assert_allclose(result["peakXPosRaw"][row, :n] + 0.5, spots.x, atol=1e-3)
            np.testing.assert_allclose(result["peakYPosRaw"][row, :n] + 0.5, spots.y, atol=1e-3)
            assert not result["peakTotalIntensity"][row, n:].any()
    assert (tmp_path / "frames.cxi").stat().st_size < 200_000
    assert read_cell(tmp_path / "target.cell").parameters == pytest.approx(cell.parameters)


@pytest.mark.parametrize("word", ["-j8", "-j", "--peaks=zaef", "out", "-p", "--output=/x"])
def test_arguments_that_would_lead_astray_are_refused(word):
    with pytest.raises(BadRecipe, match="leave it out"):
        IndexamajigParams(arguments=(word,))
    IndexamajigParams(arguments=("--tolerance=5,5,5,2,2,2",))


# ---- a stream as CrystFEL writes it -----------------------------------------------------------------

STREAM = """CrystFEL stream format 2.3
Generated by CrystFEL 0.11.1
indexamajig -i frames.lst
----- Begin geometry file -----
clen = 0.1 m
----- End geometry file -----
----- Begin chunk -----
Image filename: frames.cxi
Event: //2
Image serial number: 1
hit = 1
indexed_by = asdf-latt-cell
n_indexing_tries = 1
photon_energy_eV = 12000.000000
beam_divergence = 0.00e+00 rad
beam_bandwidth = 1.00e-08 (fraction)
average_camera_length = 0.100000 m
num_peaks = 0
peak_resolution = nan nm^-1 or nan A
Peaks from peak search
  fs/px   ss/px (1/d)/nm^-1   Intensity  Panel
End of peak list
--- Begin crystal
Cell parameters 7.91593 7.91593 3.79251 nm, 90.00000 90.00000 90.00000 deg
astar = +0.0275025 -0.0701365 -0.1014057 nm^-1
bstar = +0.0556216 +0.0997826 -0.0539287 nm^-1
cstar = +0.2296783 -0.0686870 +0.1097986 nm^-1
lattice_type = tetragonal
centering = P
unique_axis = c
profile_radius = 0.00273 nm^-1
predict_refine/initial_residual = 0.1
predict_refine/final_residual = 0.05
predict_refine/det_shift x = 0.152 y = -0.023 mm
diffraction_resolution_limit = 4.00 nm^-1 or 2.50 A
num_reflections = 0
num_saturated_reflections = 0
num_implausible_reflections = 0
No integrated reflections.
--- End crystal
----- End chunk -----
----- Begin chunk -----
Image filename: frames.cxi
Event: //0
Image serial number: 2
hit = 1
indexed_by = none
photon_energy_eV = 12000.000000
num_peaks = 0
----- End chunk -----
----- Begin chunk -----
Image filename: frames.cxi
Event: //1
"""


def test_a_stream_is_read_frame_by_frame_up_to_where_it_breaks_off(chunk, cell, peaks, tmp_path):
    (tmp_path / "out.stream").write_text(STREAM)
    answers = dict(indexamajig.read_answers(tmp_path, replace(job_of(chunk, cell, peaks), geometry=tilted_pair())))
    assert answers[0] == Answer(why="no lattice found")
    assert list(answers) == [2, 0]
    (lattice,) = answers[2].lattices
    # nm^-1 and rows there, 1/Å and columns here
    np.testing.assert_allclose(lattice.A[:, 0], [0.00275025, -0.00701365, -0.01014057])
    np.testing.assert_allclose(lattice.shift, (0.152e-3 / 0.1, -0.023e-3 / 0.1))


# ---- a whole step around a program ------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch, frames):
    (tmp_path / "truths.json").write_text(json.dumps([truth.A.tolist() for truth in frames[1] if truth.is_hit]))
    monkeypatch.setenv("STAND_IN_KNOWS", str(tmp_path / "truths.json"))
    program = tmp_path / "indexamajig"
    stand_in = Path(__file__).with_name("indexamajig_stand_in.py")
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {stand_in} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return monkeypatch


def test_what_a_program_finds_becomes_our_table(stand_in, chunk, cell, peaks, frames):
    stand_in.setenv("STAND_IN_SHIFT", "0.001,-0.002")
    tables = tables_of("index_indexamajig", chunk, cell, peaks, arguments=["--tolerance=5,5,5,2,2,2"])
    right, wrong, angles = judged(tables, frames[1], cell)
    assert (right, wrong) == (sum(truth.is_hit for truth in frames[1]), 0)
    assert max(angles) < 0.1
    assert tables["crystals"]["n_indexed_by_engine"].null_count == right
    distance_mm = 1e3 * chunk.detector.detector_distance
    assert tables["crystals"]["shift_y"].to_pylist() == pytest.approx([-0.002 / distance_mm] * right)


@pytest.mark.parametrize("how", [pytest.param("HANGS", marks=pytest.mark.campaign), "DIES"])
def test_a_frame_that_ends_the_program_is_left_alone(stand_in, how, chunk, cell, peaks, frames):
    stand_in.setenv(f"STAND_IN_{how}", "1")
    tables = tables_of("index_indexamajig", chunk, cell, peaks, frame_seconds=3.0)
    hits = [truth.index for truth in frames[1] if truth.is_hit]
    assert tables["crystals"]["frame_index"].to_pylist() == [index for index in hits if index != hits[1]]
    why = tables["frames"]["not_indexed_because"].to_pylist()
    assert ("was not done within" if how == "HANGS" else "code 1: Segmentation fault") in why[hits[1]]
    assert [i for i, text in enumerate(why) if text] == [hits[1]]


def test_a_program_that_always_dies_is_an_error_and_no_result(stand_in, chunk, cell, peaks):
    stand_in.setenv("STAND_IN_DIES", "always")
    with pytest.raises(EngineFailed, match="Segmentation fault, or so, 3 frames in a row"):
        tables_of("index_indexamajig", chunk, cell, peaks)


def test_integration_goes_on_from_it_unchanged(stand_in, chunk, cell, peaks):
    upstream = peaks | {"index_indexamajig": tables_of("index_indexamajig", chunk, cell, peaks)}
    integrated = tables_of("integrate", chunk, cell, upstream, d_min=3.0)
    assert integrated["crystal_quality"].num_rows == upstream["index_indexamajig"]["crystals"].num_rows
    assert integrated["reflections"].num_rows > 50


def test_a_run_is_processed_through_and_through(stand_in, tmp_path, simulator, frames, cell):
    stand_in.setenv("STAND_IN_DIES", "1")
    folder = store_run(tmp_path / "data", simulator, frames[0])
    recipe = {
        "sample": {"cell": cell.parameters, "space_group": cell.space_group},
        "steps": [{"use": "find_peaks"}, {"use": "index_indexamajig"}, {"use": "integrate", "params": {"d_min": 3.0}}],
    }
    summary = run_processing(ProcessRequest(run=str(folder.path), recipe=recipe, n_threads=1))
    run = open_run(str(folder.path))
    (stream,) = folder.path.glob("processed/*/*.stream")
    indexed = [frame.frame_index for frame in read_stream(stream) if frame.crystals]
    hits = [truth.index for truth in frames[1] if truth.is_hit]
    assert indexed == [index for index in hits if index != hits[1]]
    assert summary["indexed"] == len(indexed)
    (lost,) = run["eiger"].where("not_indexed_because LIKE '%Segmentation%'").indices
    assert lost == hits[1]


# ---- which program ----------------------------------------------------------------------------------

RECIPE = {
    "sample": {"cell": [79.1, 79.1, 37.9, 90, 90, 90], "space_group": "P 43 21 2"},
    "steps": [{"use": "find_peaks"}, {"use": "index_dials"}],
}


@pytest.mark.parametrize(("use", "what"), [("index_dials", "apt install dials"), ("index_indexamajig", "CrystFEL")])
def test_a_program_that_is_not_there_is_named_with_its_remedy(use, what, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NEARLINE_DIALS_PYTHON", raising=False)
    # A recipe of a run that was processed elsewhere can be read all the same.
    recipe = load_recipe(RECIPE | {"steps": [{"use": "find_peaks"}, {"use": use}]})
    with pytest.raises(EngineMissing, match=what):
        code_digest(recipe)
    (check,) = check_engines(recipe)
    assert (check.state, what in check.found + check.remedy) == ("fail", True), check


def python_with_dials(folder, version):
    program = folder / f"python-{version}"
    program.write_text(f"#!/bin/sh\necho DIALS {version}\n")
    program.chmod(0o755)
    return str(program)


def test_another_version_is_another_step(monkeypatch, tmp_path):
    digests = set()
    for version in ("3.12", "3.22", "3.12"):
        monkeypatch.setenv("NEARLINE_DIALS_PYTHON", python_with_dials(tmp_path, version))
        digests.add(code_digest(load_recipe(RECIPE)))
        assert STEPS["index_dials"].identity["DIALS"] == f"DIALS {version}"
    assert len(digests) == 2


@pytest.mark.parametrize("params", [{"phil": ["no_value"]}, {"frame_seconds": 0}, {"max_lattices": 0}])
def test_parameters_that_say_nothing_are_refused(params):
    with pytest.raises((BadRecipe, ValueError)):
        load_recipe(RECIPE | {"steps": [{"use": "index_dials", "params": params}]})


@pytest.mark.dials
@pytest.mark.campaign
@pytest.mark.skipif(not HAS_DIALS, reason="DIALS is not installed (apt install dials)")
def test_dials_says_which_parameter_it_does_not_know(chunk, cell, peaks):
    with pytest.raises(EngineFailed, match="no_such_thing"):
        tables_of("index_dials", chunk, cell, peaks, phil=["indexing.no_such_thing=3"])


@pytest.mark.dials
@pytest.mark.campaign
@pytest.mark.skipif(not HAS_DIALS, reason="DIALS is not installed (apt install dials)")
def test_dials_without_time_is_an_error(chunk, cell, peaks):
    with pytest.raises(EngineFailed, match="did not answer within"):
        tables_of("index_dials", chunk, cell, peaks, frame_seconds=0.01)
