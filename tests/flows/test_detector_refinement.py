"""The detector's place from the crystals of a run, with a beam centre that is known to be wrong."""

import json

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import nearline
from flows.detector_refinement import detector_of
from flows.run_processing import ProcessRequest, run_processing
from nearline.cli import app
from storage.errors import BadRecipe
from storage.step_store import Processing
from streaming.simulator import SimulatorSettings, make_frames
from tasks.recipe import load_recipe
from tests.flows.stored_runs import store_run

OFF = (0.6, -0.45)
SETTINGS = SimulatorSettings(size="512", n_frames=40, hit_fraction=0.8, seed=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stored run of 512 x 512 px, about 32 hits."""
    simulator = SETTINGS.simulator()
    blobs, _ = make_frames(simulator, SETTINGS.n_frames)
    return store_run(tmp_path_factory.mktemp("detector"), simulator, blobs)


@pytest.fixture(scope="module")
def truth():
    return SETTINGS.simulator().header


@pytest.fixture(scope="module")
def processed(run, truth, recipe):
    """Processed with the beam centre off."""
    moved = {"beam_center_x": truth.beam_center_x + OFF[0], "beam_center_y": truth.beam_center_y + OFF[1]}
    content = recipe.model_dump(mode="json") | {"detector": moved}
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=content))
    return Processing(run.path, summary["processing"])


def test_a_wrong_beam_centre_is_found_and_said(processed, truth):
    findings, found = detector_of(processed)
    assert found.n_crystals >= 25
    assert (findings.beam_center_x, findings.beam_center_y) == pytest.approx(
        (truth.beam_center_x, truth.beam_center_y), abs=0.06
    )
    assert findings.is_clear
    assert findings.words[0].startswith(f"the beam centre is off by ({findings.shift_x:+.2f}, {findings.shift_y:+.2f})")
    assert findings.cell_scale == pytest.approx(1, abs=1e-3)
    assert not any("distance" in sentence for sentence in findings.words)


def test_with_the_recipe_it_writes_nothing_is_left_to_correct(processed, run, tmp_path):
    path, geometry, picture = tmp_path / "better.yaml", tmp_path / "better.geom", tmp_path / "detector.png"
    arguments = [
        "refine-detector", f"{run.path}:{processed.name}", "--json",
        "--write", str(path), "--geometry", str(geometry), "--picture", str(picture),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    findings = json.loads(result.output)
    assert yaml.safe_load(path.read_text())["detector"]["beam_center_x"] == pytest.approx(
        findings["beam_center_x"], abs=1e-3
    )
    assert f"corner_x = {findings['beam_center_x']:.3f}"[:-1] in geometry.read_text()
    with Image.open(picture) as opened:
        assert opened.size[0] > 800
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=load_recipe(path).model_dump(mode="json")))
    again, _ = detector_of(Processing(run.path, summary["processing"]))
    assert abs(again.shift_x) < 0.05
    assert abs(again.shift_y) < 0.05
    assert "is right within" in again.words[0]


def test_a_cell_that_is_too_large_leaves_the_distance_open(run, recipe):
    content = recipe.model_dump(mode="json")
    content["sample"]["cell"] = [1.01 * edge for edge in content["sample"]["cell"][:3]] + [90, 90, 90]
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=content))
    findings, _ = detector_of(Processing(run.path, summary["processing"]))
    assert findings.cell_scale == pytest.approx(1 / 1.01, abs=2e-3)
    assert any("distance unverified" in sentence for sentence in findings.words)


@pytest.mark.parametrize("part", [0.985, 1.012], ids=["nearer", "farther"])
def test_a_wrong_distance_is_found_by_a_cell_that_is_trusted(run, truth, recipe, tmp_path, part):
    wrong = {"detector_distance": part * truth.detector_distance}
    content = recipe.model_dump(mode="json") | {"detector": wrong}
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=content))
    name = f"{run.path}:{summary['processing']}"
    assert nearline.refine_detector(name)["distance"] is None

    path = tmp_path / "better.yaml"
    result = CliRunner().invoke(app, ["refine-detector", name, "--trust-cell", "--json", "--write", str(path)])
    assert result.exit_code == 0, result.output
    findings = json.loads(result.output)
    assert findings["is_clear"]
    assert findings["distance"] == pytest.approx(truth.detector_distance, rel=2e-4)
    assert abs(findings["distance"] - truth.detector_distance) < 4 * findings["distance_sigma"]
    assert any("by the cell that is trusted the detector is" in sentence for sentence in findings["words"])
    assert not any("unverified" in sentence for sentence in findings["words"])

    summary = run_processing(ProcessRequest(run=str(run.path), recipe=load_recipe(path).model_dump(mode="json")))
    again, _ = detector_of(Processing(run.path, summary["processing"]), trust_cell=True)
    assert again.distance == pytest.approx(findings["distance"], rel=2e-4)
    assert again.cell_scale == pytest.approx(1, abs=5e-4)
    assert any("is right within" in sentence and "distance" in sentence for sentence in again.words)


@pytest.mark.parametrize("steps", [["find_peaks"], []], ids=["no crystals", "nothing at all"])
def test_what_has_no_crystals_is_refused(run, recipe, steps):
    content = recipe.model_dump(mode="json")
    content["steps"] = [step for step in content["steps"] if step["use"] in steps] or [{"use": "bin", "params": {}}]
    content["export"] = {}
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=content))
    with pytest.raises(BadRecipe, match="no crystals"):
        detector_of(Processing(run.path, summary["processing"]))
