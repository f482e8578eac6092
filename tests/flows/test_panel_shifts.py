"""Panels that stand elsewhere than the geometry file says: found from the crystals, written, and right from then on."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.detector_refinement import detector_of
from flows.detector_refinement import write_geometry as write_found
from flows.run_processing import ProcessRequest, run_processing
from nearline.cli import app
from storage.errors import BadGeometry
from storage.geometry import Geometry
from storage.geometry_formats import read_geometry, write_geometry
from storage.step_store import Processing
from streaming.simulator import StillPhysics, StillSimulator, make_frames
from tasks.recipe import load_recipe
from tests.flows.panels import SHAPE, displaced, flat_header, four_panels, header_of
from tests.flows.stored_runs import store_run

N_FRAMES = 40
# px along fast and slow by which the file is wrong, of two of the four panels.
WRONG = {1: (1.1, -0.7), 2: (-0.6, 0.4)}
BAD = ((0, 3, 0, 3),)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    truth = StillSimulator(SHAPE, detector=header_of(four_panels()), physics=StillPhysics(hit_fraction=1.0), seed=5)
    blobs, _ = make_frames(truth, N_FRAMES)
    plain = StillSimulator(SHAPE, detector=flat_header(), physics=StillPhysics(gaps=False, bad_pixel_fraction=0))
    return store_run(tmp_path_factory.mktemp("shifts"), plain, blobs)


def process(run, recipe, geometry):
    content = recipe.model_dump(mode="json") | {"detector": {"geometry": str(geometry)}}
    content["steps"] = [step for step in content["steps"] if step["use"] in ("find_peaks", "index")]
    content["export"] = {"nexus": "none", "crystfel": False}
    request = ProcessRequest(run=str(run.path), recipe=load_recipe(content).model_dump(mode="json"))
    return Processing(run.path, run_processing(request)["processing"])


@pytest.fixture(scope="module")
def processed(run, recipe, tmp_path_factory):
    """Indexed with a file that has two panels in the wrong place."""
    wrong = four_panels()
    for number, (fast, slow) in WRONG.items():
        wrong = displaced(wrong, number, (-fast, -slow))
    path = tmp_path_factory.mktemp("wrong") / "wrong.geom"
    write_geometry(path, Geometry.from_header(header_of(wrong), SHAPE), BAD)
    return process(run, recipe, path)


@pytest.fixture(scope="module")
def found(processed):
    return detector_of(processed)


def test_each_panel_is_found_within_its_uncertainty(found):
    findings, _ = found
    for number, panel in enumerate(findings.panels):
        expected = WRONG.get(number, (0.0, 0.0))
        assert panel.n_spots > 100
        for value, sigma, truth in zip(
            (panel.fast, panel.slow), (panel.sigma_fast, panel.sigma_slow), expected, strict=True
        ):
            assert 0.001 < sigma < 0.1
            assert abs(value - truth) < 4 * sigma
    assert findings.is_clear
    said = " ".join(findings.words)
    assert "panel q1 is displaced by (+1." in said
    assert "panel q2 is displaced by (-0." in said


def test_all_panels_are_moved_to_the_distance_of_a_cell_that_is_trusted(run, recipe, tmp_path):
    right = four_panels()
    nearer = [panel.moved((0, 0, -0.01 * right.distance)) for panel in right.panels]
    changes = {"panels": tuple(nearer), "distance": 0.99 * right.distance}
    path, better = tmp_path / "nearer.geom", tmp_path / "better.geom"
    write_geometry(path, Geometry.from_header(header_of(right.model_copy(update=changes)), SHAPE), BAD)
    processing = process(run, recipe, path)
    name = f"{processing.run}:{processing.name}"
    result = CliRunner().invoke(app, ["refine-detector", name, "--trust-cell", "--geometry", str(better)])
    assert result.exit_code == 0, result.output
    assert "by the cell that is trusted the detector is" in result.output
    for one, truth in zip(read_geometry(better).panels, four_panels().panels, strict=True):
        assert one.corner[2] == pytest.approx(truth.corner[2], rel=5e-4)
        np.testing.assert_allclose(one.corner[:2], truth.corner[:2], atol=7.5e-6)


@pytest.mark.parametrize("suffix", [".geom", ".expt"])
def test_what_it_writes_has_the_panels_in_their_places(processed, found, tmp_path, suffix):
    path = tmp_path / f"better{suffix}"
    arguments = ["refine-detector", f"{processed.run}:{processed.name}", "--json", "--geom", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [panel["name"] for panel in json.loads(result.output)["panels"]] == ["q0", "q1", "q2", "q3"]
    written = read_geometry(path)
    for one, truth in zip(written.panels, four_panels().panels, strict=True):
        # 0.1 px of 75 µm
        np.testing.assert_allclose(one.corner, truth.corner, atol=7.5e-6)
    assert written.bad == BAD


def test_with_the_recipe_it_writes_no_panel_is_left_to_correct(run, processed, tmp_path):
    path = tmp_path / "better.yaml"
    result = CliRunner().invoke(app, ["refine-detector", f"{processed.run}:{processed.name}", "--write", str(path)])
    assert result.exit_code == 0, result.output
    recipe = load_recipe(path)
    assert recipe.geometry.bad == BAD
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=recipe.model_dump(mode="json")))
    findings, _ = detector_of(Processing(run.path, summary["processing"]))
    assert max(abs(v) for panel in findings.panels for v in (panel.fast, panel.slow)) < 0.06
    assert not findings.is_clear
    assert findings.words[0].startswith("all 4 panels are where they were taken to be")


def test_several_panels_do_not_fit_into_a_poni(processed, found, tmp_path):
    with pytest.raises(BadGeometry, match="a PONI has one flat detector"):
        write_found(processed, *found, tmp_path / "better.poni")
