"""`nearline find-cell` and `nearline.find_cell`: a simulated run, real stills, and what has no cell."""

import json
import time

import fabio
import numpy as np
import pytest
from typer.testing import CliRunner

import nearline
from flows.cell_picture import draw_cells
from flows.finding_cell import CellReport, StillSpots, cell_of_stills
from nearline.children import free_port
from nearline.cli import app
from storage.errors import RunNotFound
from storage.geometry import Geometry
from storage.models import DetectorHeader
from streaming.service import Service, ServiceSettings, SourceSettings
from streaming.simulator import SimulatorSettings, simulate
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.recipe import load_recipe
from tasks.unit_cell import read_cell
from tests.real_data import THAUMATIN, needs_thaumatin

N_FRAMES = 16


def take_run(folder, **options):
    """A finished run of simulated lysozyme (1M) that nothing has processed; its folder."""
    detector = f"tcp://127.0.0.1:{free_port()}"
    settings = ServiceSettings(root=folder, bind="tcp://127.0.0.1:*", sources=(SourceSettings(endpoint=detector),))
    with Service(settings) as service:
        simulate(
            SimulatorSettings(size="1M", n_frames=N_FRAMES, bind=detector, experiment="lyso", frame_time=0.2, **options)
        )
        run = nearline.open(f"{service.address}/lyso/1", wait=20)
        deadline = time.monotonic() + 20
        while "eiger" not in run.data_sources and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sum(1 for _ in run["eiger"].follow(timeout=30)) == N_FRAMES
    return folder / "lyso" / "1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return take_run(tmp_path_factory.mktemp("unknown"), hit_fraction=0.75)


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    return take_run(tmp_path_factory.mktemp("blank"), hit_fraction=0.0)


def command(*arguments):
    done = CliRunner().invoke(app, ["find-cell", *map(str, arguments)], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_run_that_was_never_processed_gives_its_cell(run, tmp_path):
    picture, cell_file = tmp_path / "cell.png", tmp_path / "found.cell"
    done = command(run, "--picture", picture, "--write", cell_file, "--json")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    np.testing.assert_allclose(report["cell"], (79.1, 79.1, 37.9, 90, 90, 90), rtol=0.01)
    assert (report["lattice"], report["space_group"]) == ("tetragonal P", "P 4 2 2")
    assert report["processing"] is None
    assert report["n_agreeing"] >= 0.8 * report["n_hits"] >= 6
    assert report["indexing_rate"] > 0.8
    assert report["distance_scale"] == pytest.approx(1, abs=0.005)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert read_cell(cell_file).centring == "P"


def test_it_is_printed_in_words_with_the_next_step(run):
    printed = command(run, "--frames", "6").stdout
    assert "tetragonal P" in printed
    assert "how sure: likely" in printed or "how sure: tentative" in printed
    assert "space_group: P 4 2 2" in printed


def test_the_recipe_written_processes_the_run_and_its_peaks_give_the_cell_again(run, tmp_path):
    recipe = tmp_path / "found.yaml"
    command(run, "--write", recipe)
    assert load_recipe(recipe).sample is not None
    summary = nearline.process(run, recipe, n_threads=2)
    found = nearline.find_cell(run, processing=summary["processing"])
    assert found["processing"] == summary["processing"]
    np.testing.assert_allclose(found["cell"], (79.1, 79.1, 37.9, 90, 90, 90), rtol=0.01)


def test_frames_without_crystals_give_no_cell(blank):
    done = command(blank)
    assert done.exit_code == 2
    assert "no cell" in done.stdout
    assert "hit" in done.stdout


def test_a_processing_that_is_not_there(run):
    with pytest.raises(RunNotFound, match="p77"):
        nearline.find_cell(run, processing="p77")


@pytest.mark.parametrize("error", [0.9, 1.1])
def test_a_wrong_distance_gives_no_cell(run, error):
    """All edges of such a cell are wrong by as much, so that it would look right."""
    at = nearline.open(run)["eiger"].header.detector.detector_distance
    recipe = {"steps": [{"use": "find_peaks"}], "detector": {"detector_distance": error * at}}
    summary = nearline.process(run, recipe, n_threads=2)
    report = nearline.find_cell(run, processing=summary["processing"])
    assert report["cell"] is None
    assert "distance" in report["why"]


def test_noise_is_not_given_a_cell():
    rng = np.random.default_rng(3)
    stills = [StillSpots(i, rng.uniform(-0.3, 0.3, (40, 3)) * [1, 1, 0.1], np.ones(40)) for i in range(4)]
    report = cell_of_stills(stills, 1.0)
    assert (report.cell, report.certainty) == (None, "none")
    assert "0 of 4 hits show a lattice" in report.why
    assert report.recipe_lines == ""


def test_a_picture_also_where_there_is_no_cell(tmp_path):
    assert draw_cells(tmp_path / "none.png", CellReport(run="lyso/1")).stat().st_size > 1000


@needs_thaumatin
def test_three_real_stills_give_the_published_cell_of_thaumatin():
    header = DetectorHeader(
        pixel_size_x=172e-6,
        pixel_size_y=172e-6,
        beam_center_x=1261.61,
        beam_center_y=1306.96,
        detector_distance=0.351,
        incident_wavelength=0.96859,
    )
    stills = []
    for number in ("0005", "0011", "0014"):
        frame = fabio.open(str(THAUMATIN / f"thau_3_2_{number}.cbf.bz2")).data.astype(np.int32)
        geometry = Geometry.from_header(header, frame.shape)
        peaks = PeakFinder(geometry, frame < 0, PeakParams(saturation=115897))(frame)
        stills.append(StillSpots(int(number), geometry.scattering_vector(peaks["x"], peaks["y"]), peaks["snr"]))
    report = cell_of_stills(stills, header.incident_wavelength)
    np.testing.assert_allclose(report.cell, (58.4, 58.4, 152.3, 90, 90, 90), rtol=0.01)
    assert report.lattice == "tetragonal P"
    assert report.n_indexed == 3
    # three frames of one crystal that does not turn are not much
    assert report.certainty == "tentative"
    assert report.is_one_orientation
