"""Frames of a detector of four tilted and displaced panels, processed with and without knowing where these are."""

import json
import os
import shutil
import subprocess

import h5py
import hdf5plugin
import numpy as np
import pytest

from flows.comparison import compare_processings
from flows.explaining import explain
from flows.replaying import replay
from flows.run_processing import ProcessRequest, run_processing
from flows.run_tally import geometry_of, usual_d_min
from storage.crystfel import read_preamble
from storage.errors import BadGeometry, NearlineError
from storage.geometry import Geometry
from storage.geometry_formats import read_geometry, write_geometry
from storage.run_folder import RunFolder
from storage.step_store import Processing
from streaming.retrieval import open_run
from streaming.simulator import StillPhysics, StillSimulator, make_frames
from tasks.recipe import load_recipe
from tasks.unit_cell import read_cell, same_orientation
from tests.flows.panels import ORIGINS, SHAPE, flat_header, four_panels, header_of
from tests.flows.stored_runs import store_run

N_FRAMES = 16
CELL = read_cell("79.1,79.1,37.9,90,90,90", "P 43 21 2")
RECIPE = {
    "sample": {"cell": CELL.parameters, "space_group": CELL.space_group},
    "steps": [{"use": "find_peaks"}, {"use": "index"}, {"use": "integrate"}],
    "export": {"nexus": "hits"},
}


@pytest.fixture(scope="module")
def simulator():
    """Its truth is projected onto the four panels."""
    return StillSimulator(SHAPE, detector=header_of(four_panels()), physics=StillPhysics(hit_fraction=1.0), seed=11)


@pytest.fixture(scope="module")
def run(tmp_path_factory, simulator):
    """As a beamline takes it that describes its detector as a flat one, and masks nothing between the panels."""
    blobs, _ = make_frames(simulator, N_FRAMES)
    plain = StillSimulator(SHAPE, detector=flat_header(), physics=StillPhysics(gaps=False, bad_pixel_fraction=0))
    return store_run(tmp_path_factory.mktemp("panels"), plain, blobs, frames_per_chunk=8)


@pytest.fixture(scope="module")
def geometry_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("geometry") / "four.geom"
    header = header_of(four_panels())
    write_geometry(path, Geometry.from_header(header, SHAPE), ((0, 3, 0, 3),))
    return path


def process(run, detector):
    recipe = load_recipe(RECIPE | {"detector": detector})
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=recipe.model_dump(mode="json")))
    return Processing(run.path, summary["processing"])


@pytest.fixture(scope="module")
def known(run, geometry_file):
    processing = process(run, {"geometry": str(geometry_file)})
    # what was recorded must do from here on
    geometry_file.unlink()
    return processing


@pytest.fixture(scope="module")
def flat(run):
    return process(run, {})


def n_right(processing, simulator):
    """Frames with a lattice in the true orientation."""
    crystals = processing.table("crystals").to_pylist()
    names = [f"{axis}_star_{i}" for axis in "abc" for i in "xyz"]
    right = set()
    for row in crystals:
        A = np.array([row[name] for name in names]).reshape(3, 3).T
        truth = simulator.truth(row["frame_index"]).A.T
        if same_orientation(A, truth, CELL, tolerance_deg=0.3)[0]:
            right.add(row["frame_index"])
    return len(right)


def test_hits_index_with_the_right_geometry_and_not_with_the_flat_one(known, flat, simulator):
    assert n_right(known, simulator) >= N_FRAMES - 1
    assert n_right(flat, simulator) <= 2


def test_predictions_lie_where_the_truth_puts_the_spots(known, simulator):
    reflections = known.table("reflections")
    assert set(np.unique(reflections["panel"].to_numpy())) == {0, 1, 2, 3}
    at = np.column_stack([reflections["x"].to_numpy(), reflections["y"].to_numpy()])
    index = reflections["frame_index"].to_numpy()
    nearest = []
    for frame in np.unique(index):
        truth = simulator.truth(int(frame)).spots
        strong = truth[(truth["photons"] > 100) & ~truth["masked"]]
        apart = np.hypot(
            *(np.column_stack([strong["x"], strong["y"]])[:, None] - at[index == frame]).transpose(2, 0, 1)
        )
        nearest.append(apart.min(axis=1))
    nearest = np.concatenate(nearest)
    assert np.median(nearest) < 0.15
    assert (nearest < 1.0).mean() > 0.9


def test_nothing_is_integrated_between_the_panels_nor_in_a_bad_region(known):
    reflections, peaks = known.table("reflections"), known.table("peaks")
    geometry = geometry_of(known)
    for table in (reflections, peaks):
        found = geometry.panel_at(table["x"].to_numpy(), table["y"].to_numpy())
        np.testing.assert_array_equal(found, table["panel"].to_numpy())
    assert geometry.panels == four_panels_as_written(geometry)
    mask = load_recipe(dict(known.manifest.recipe)).geometry.mask(SHAPE)
    assert mask[:3, :3].all()
    assert mask[255].all()
    assert mask[:, 255].all()
    assert mask.sum() == 512 * 512 - 500 * 500 + 9


def four_panels_as_written(geometry):
    """The geometry file rounds to 1e-9 m; that is all that may differ."""
    for one, other in zip(geometry.panels, four_panels().panels, strict=True):
        np.testing.assert_allclose(one.corner, other.corner, atol=1e-9)
        np.testing.assert_allclose(one.fast, other.fast, atol=1e-12)
    return geometry.panels


def test_a_result_is_computed_again_without_the_file(known, run):
    opened = open_run(run.path)
    frame = int(known.table("crystals")["frame_index"][0].as_py())
    found = replay(opened, explain(opened, frame, processing=known.name))
    assert found.is_identical, found.differences


def test_the_stream_for_crystfel_names_the_panels(known):
    (path,) = known.folder.rglob("*.stream")
    text = read_preamble(path).geometry
    assert "q3/min_fs = 262" in text
    assert "q0/coffset" in text or "q1/coffset" in text


def test_the_nexus_file_has_a_module_for_each_panel(known, run):
    (path,) = (run.path / "nexus").glob(f"*_{known.name}.h5")
    with h5py.File(path) as file:
        detector = file["entry/instrument/detector"]
        modules = [detector[name] for name in sorted(detector) if name.startswith("module")]
        assert [tuple(module["data_origin"][()]) for module in modules] == list(ORIGINS)
        for module, panel in zip(modules, four_panels().panels, strict=True):
            x, y, z = module["module_offset"].attrs["offset"]
            at = [x, y, z + detector["transformations/det_z"][0] * 1e-3]
            np.testing.assert_allclose(at, panel.corner, atol=2e-9)
            fast = module["fast_pixel_direction"]
            np.testing.assert_allclose(fast[()] * fast.attrs["vector"], panel.fast, atol=1e-12)


@pytest.mark.dials
@pytest.mark.skipif(shutil.which("dials.import") is None, reason="DIALS is not installed")
def test_dials_sees_the_panels_of_the_nexus_file_where_they_stand(known, run, tmp_path):
    (path,) = (run.path / "nexus").glob(f"*_{known.name}.h5")
    shutil.copy(path, tmp_path / "hits.h5")
    with h5py.File(tmp_path / "hits.h5", "r+") as file:
        # DIALS 3.12 cannot cut a mask into modules that lie side by side; this is about where they are.
        del file["entry/instrument/detector/pixel_mask"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    environment["HDF5_PLUGIN_PATH"] = hdf5plugin.PLUGIN_PATH
    done = subprocess.run(
        ["dials.import", "hits.h5", "output.experiments=seen.expt"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-800:]
    with pytest.raises(BadGeometry, match="raw_image_offset"):
        read_geometry(tmp_path / "seen.expt")
    content = json.loads((tmp_path / "seen.expt").read_text())
    for panel, (slow, fast) in zip(content["detector"][0]["panels"], ORIGINS, strict=True):
        panel["raw_image_offset"] = [fast, slow]
    (tmp_path / "seen.expt").write_text(json.dumps(content))
    seen = read_geometry(tmp_path / "seen.expt")
    for one, truth in zip(seen.panels, four_panels().panels, strict=True):
        for name in ("corner", "fast", "slow"):
            np.testing.assert_allclose(getattr(one, name), getattr(truth, name), atol=2e-9)


def test_comparing_names_the_geometry(known, flat, run):
    found = compare_processings(known, flat)
    shown = [d for d in found.parameters if d.name == "detector.geometry"]
    assert len(shown) == 1
    assert shown[0].a.startswith("four.geom ")
    assert shown[0].b is None


def test_other_programs_of_the_run_use_the_panels(known):
    """Merging's limit is the largest circle around the beam that the frame holds."""
    assert 1 < usual_d_min(known) < 10


def test_the_file_is_part_of_the_recipe_by_its_content(tmp_path):
    geometry = Geometry.from_header(header_of(four_panels()), SHAPE)
    (tmp_path / "other").mkdir()
    write_geometry(tmp_path / "a.geom", geometry)
    write_geometry(tmp_path / "other" / "b.geom", geometry)
    moved = Geometry((geometry.panels[0].moved((1e-5, 0, 0)), *geometry.panels[1:]), geometry.wavelength)
    write_geometry(tmp_path / "c.geom", moved)
    (tmp_path / "recipe.yaml").write_text("detector: {geometry: other/b.geom}\nsteps: [{use: find_peaks}]\n")
    a, c = (
        load_recipe({"detector": {"geometry": str(tmp_path / name)}, "steps": [{"use": "find_peaks"}]})
        for name in ("a.geom", "c.geom")
    )
    b = load_recipe(tmp_path / "recipe.yaml")
    assert a.digest == b.digest != c.digest
    assert load_recipe(b.model_dump(mode="json")).digest == b.digest
    assert b.geometry.file == "b.geom"


def test_a_recipe_without_a_geometry_keeps_its_digest():
    recipe = load_recipe({"steps": [], "detector": {"detector_distance": 0.15, "incident_energy": 12000}})
    assert recipe.digest == DIGEST_BEFORE


# Of this recipe before recipes could name a geometry.
DIGEST_BEFORE = "531c463b816eac7b2804e37f6664b16f117224d188dee16afb7e78622aa8d198"


@pytest.mark.parametrize(
    ("detector", "words"),
    [
        ({"geometry": "missing.geom"}, "detector.geometry: cannot read geometry"),
        ({"geometry": 3.0}, "geometry is a float; geometry is a file"),
        ({"geometry": "four.geom", "beam_center_x": 3.0}, "beam_center_x beside geometry four.geom"),
    ],
)
def test_a_geometry_that_cannot_be_meant_is_refused(tmp_path, detector, words):
    write_geometry(tmp_path / "four.geom", Geometry.from_header(header_of(four_panels()), SHAPE))
    if str(detector["geometry"]).endswith(".geom"):
        detector = detector | {"geometry": str(tmp_path / detector["geometry"])}
    with pytest.raises(NearlineError, match=words):
        load_recipe({"detector": detector})


def test_frames_of_another_size_are_refused(run, tmp_path):
    geometry = four_panels()
    panels = tuple(p if p.origin[0] == 0 else type(p)(p.name, p.corner, p.fast, p.slow, (300, 250), p.origin)
                   for p in geometry.panels)  # fmt: skip
    write_geometry(tmp_path / "large.geom", Geometry(panels, geometry.wavelength))
    with pytest.raises(NearlineError, match=r"panel 'q2' spans \(262, 0\) to \(562, 250\) .* frames are \(512, 512\)"):
        process(run, {"geometry": str(tmp_path / "large.geom")})
    assert RunFolder.open(run.path).header.run == 1


def test_binned_frames_keep_their_panels(run, geometry_file, tmp_path):
    path = tmp_path / "four.geom"
    write_geometry(path, Geometry.from_header(header_of(four_panels()), SHAPE))
    recipe = load_recipe(
        {"detector": {"geometry": str(path)},
         "steps": [{"use": "bin", "params": {"factor": 2, "feed_next": True}}, {"use": "find_peaks"}],
         "export": {"nexus": "none", "crystfel": False}}
    )  # fmt: skip
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=recipe.model_dump(mode="json")))
    peaks = Processing(run.path, summary["processing"]).table("peaks")
    x, y = peaks["x"].to_numpy(), peaks["y"].to_numpy()
    geometry = Geometry.from_header(header_of(four_panels()), SHAPE)
    assert len(x) > 50 * N_FRAMES / 4
    np.testing.assert_array_equal(geometry.panel_at(x, y), peaks["panel"].to_numpy())
