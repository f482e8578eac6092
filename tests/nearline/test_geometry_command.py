"""`nearline geometry` on files and runs, and as a way from one format to another."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from nearline.cli import app
from storage.errors import BadGeometry
from storage.geometry import Geometry
from storage.geometry_formats import read_geometry, write_geometry
from streaming.simulator import SimulatorSettings, make_frames
from tests.flows.panels import SHAPE, four_panels, header_of
from tests.flows.stored_runs import store_run


def geometry_of(*arguments):
    result = CliRunner().invoke(app, ["geometry", *map(str, arguments)])
    if result.exit_code and result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "four.geom"
    write_geometry(path, Geometry.from_header(header_of(four_panels()), SHAPE), ((0, 3, 0, 3),))
    return path


def test_a_file_is_said_in_numbers(file):
    report = json.loads(geometry_of(file, "--json").stdout)
    header = header_of(four_panels())
    assert (report["n_panels"], report["shape"]) == (4, list(SHAPE))
    assert report["distance"] == pytest.approx(header.detector_distance, abs=1e-8)
    assert (report["beam_center_x"], report["beam_center_y"]) == pytest.approx(
        (header.beam_center_x, header.beam_center_y), abs=1e-4
    )
    # 1.5° and -1° about x and y of the first panel
    tilt = np.degrees(np.arccos(np.cos(np.radians(1.5)) * np.cos(np.radians(1.0))))
    assert report["panels"][0]["tilt_deg"] == pytest.approx(tilt, abs=1e-4)
    assert report["n_bad"] == 512 * 512 - 500 * 500 + 9
    corners = [
        np.linalg.norm(Geometry((p,), header.incident_wavelength).scattering_vector([0, 250, 0, 250], [0, 0, 250, 250]),
                       axis=1)
        for p in four_panels().panels
    ]  # fmt: skip
    assert report["d_corner"] == pytest.approx(1 / np.max(corners), rel=1e-6)
    assert report["d_corner"] < report["d_edge"]


def test_a_file_goes_from_one_format_to_another_and_back(file, tmp_path):
    there, back = tmp_path / "there.expt", tmp_path / "back.geom"
    assert geometry_of(file, "--to", there).exit_code == 0
    assert geometry_of(there, "--to", back).exit_code == 0
    once, again = read_geometry(file), read_geometry(back)
    assert (once.bad, once.shape) == (again.bad, again.shape)
    for one, other in zip(once.panels, again.panels, strict=True):
        np.testing.assert_allclose(one.corner, other.corner, atol=1e-9)


def test_what_a_file_leaves_open_is_asked_for(tmp_path, file):
    text = file.read_text()
    path = tmp_path / "open.geom"
    lines = [line for line in text.splitlines() if not line.startswith(("photon_energy", "clen"))]
    path.write_text("\n".join([*lines[:1], "clen = /LCLS/detector_1/EncoderValue", *lines[1:]]))
    result = geometry_of(path)
    assert "distance      unknown" in result.stdout
    assert "clen is no number" in result.stderr
    with pytest.raises(ValueError, match="geometry is unknown"):
        geometry_of(path, "--to", tmp_path / "no.expt")
    done = geometry_of(path, "--distance", 0.08, "--energy", 12000, "--to", tmp_path / "yes.expt")
    assert done.exit_code == 0
    assert read_geometry(tmp_path / "yes.expt").wavelength == pytest.approx(1.0332, abs=1e-4)


def test_a_run_is_said_and_written_for_pyfai(tmp_path):
    settings = SimulatorSettings(size="512", n_frames=2, seed=1)
    simulator = settings.simulator()
    run = store_run(tmp_path, simulator, make_frames(simulator, 2)[0])
    path = tmp_path / "run.poni"
    report = json.loads(geometry_of(run.path, "--json", "--to", path).stdout)
    header = simulator.header
    assert report["distance"] == header.detector_distance
    assert (report["beam_center_x"], report["tilt_deg"]) == (pytest.approx(header.beam_center_x), 0)
    assert f"Distance: {header.detector_distance}" in path.read_text()
    assert f"Poni2: {header.beam_center_x * 75e-6:.6f}"[:-1] in path.read_text()
    assert "512 × 512 px" in geometry_of(run.path).stdout


def test_other_files_are_named(tmp_path):
    (tmp_path / "bad.geom").write_text("clen 3\n")
    with pytest.raises(BadGeometry, match="line 1: 'clen 3' is not of the form key = value"):
        geometry_of(tmp_path / "bad.geom")
