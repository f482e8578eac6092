"""Real stills of one thaumatin crystal (DLS I24, PILATUS3 6M), and DIALS's opinion of them.

The frames are not part of the repository: they are looked for in NEARLINE_TEST_DATA or in
../shared/data beside the checkout. The indices that DIALS gave for frame 0005 are, in
data/thaumatin_0005_dials.csv, so that the hand is checked also where DIALS is not installed.
"""

import csv
import os
import shutil
import subprocess
from bz2 import decompress
from pathlib import Path

import fabio
import msgspec
import numpy as np
import pytest

from storage.geometry import Geometry
from storage.models import DetectorHeader, StreamHeader
from tasks.engines import EngineJob, dials_stills
from tasks.engines.dials_stills import DialsParams
from tasks.engines.engine import flat_geometry, spots_where_rays_enter
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.index_frame import Indexer
from tasks.integrate_spots import IntegrationParams, integrate_spots
from tasks.predict_spots import crystal_resolution, predict_spots, profile_radius
from tasks.unit_cell import UnitCell, hkl_symmetry_ops, same_orientation
from tests.real_data import THAUMATIN, needs_thaumatin

REFERENCE = Path(__file__).parent / "data" / "thaumatin_0005_dials.csv"
CELL = UnitCell(58.4, 58.4, 152.3, 90, 90, 90, "P 41 21 2")
HEADER = DetectorHeader(
    pixel_size_x=172e-6,
    pixel_size_y=172e-6,
    beam_center_x=1261.61,
    beam_center_y=1306.96,
    detector_distance=0.351,
    incident_wavelength=0.96859,
    saturation_value=115897,
)

pytestmark = needs_thaumatin


def still(number):
    frame = fabio.open(str(THAUMATIN / f"thau_3_2_{number}.cbf.bz2")).data.astype(np.int32)
    # -1 is a gap, -2 a bad pixel
    return frame, frame < 0, Geometry.from_header(HEADER, frame.shape)


def spots_of(number):
    frame, mask, geometry = still(number)
    peaks = PeakFinder(geometry, mask, PeakParams(saturation=HEADER.saturation_value))(frame)
    return peaks, geometry.scattering_vector(peaks["x"], peaks["y"])


@pytest.mark.parametrize("number", ["0005", "0011", "0014"])
def test_diffracting_stills_index_with_the_published_cell(number):
    peaks, q = spots_of(number)
    assert len(peaks) > 100
    (crystal,) = Indexer(CELL, HEADER.incident_wavelength)(q, peaks["snr"])
    np.testing.assert_allclose(crystal.cell.parameters[:3], (58.4, 58.4, 152.3), rtol=0.01)
    assert crystal.n_indexed > 0.6 * len(peaks)
    assert crystal.log10_chance < -100
    # between a beam stop's shadow and the detector's corner
    assert 1.2 < crystal_resolution(crystal, q, HEADER.incident_wavelength) < 3.0


def test_the_blank_still_is_no_hit():
    peaks, _ = spots_of("0016")
    assert len(peaks) < 10


def test_one_crystal_keeps_its_orientation_over_the_scan():
    found = [Indexer(CELL, HEADER.incident_wavelength)(spots_of(n)[1])[0] for n in ("0005", "0011", "0014")]
    assert all(same_orientation(c.A, found[0].A, CELL, tolerance_deg=2.0)[0] for c in found[1:])


def test_strong_spots_are_integrated():
    frame, mask, geometry = still("0011")
    peaks, q = spots_of("0011")
    (crystal,) = Indexer(CELL, geometry.wavelength)(q)
    radius = profile_radius(crystal, q, geometry.wavelength)
    predictions = predict_spots(crystal, geometry, radius, CELL.hkl_within(1 / 2.0))
    result = integrate_spots(frame, mask, predictions, geometry, IntegrationParams(saturation=HEADER.saturation_value))
    table = result.reflections
    assert len(table) + result.n_masked + result.n_saturated + result.n_implausible == len(predictions)
    assert result.n_implausible < 0.02 * len(predictions)
    _, off = crystal.hkl(q, geometry.wavelength)
    strong = peaks[(off < 0.15) & (peaks["snr"] > 30) & (np.linalg.norm(q, axis=1) < 1 / 2.1)]
    distance = np.hypot(strong["x"][:, None] - table["x"], strong["y"][:, None] - table["y"])
    near = distance.min(axis=1) < 2.5
    assert near.mean() > 0.8
    summed = table["intensity"][distance.argmin(axis=1)[near]]
    # The peak search sums fewer pixels of the same spot.
    assert 0.9 < np.median(summed / strong["intensity"][near]) < 1.5


# ---- the hand, against DIALS


def agreement(hkl, x, y, number):
    """Of spots that both programs indexed: the best agreement over proper rotations, and over improper ones.

    hkl, x, y : DIALS's indices and positions, px from the first pixel's outer corner.
    Returns (proper, improper, n, median offset (x, y)).
    """
    peaks, q = spots_of(number)
    (crystal,) = Indexer(CELL, HEADER.incident_wavelength)(q, peaks["snr"])
    ours, off = crystal.hkl(q, HEADER.incident_wavelength)
    distance = np.hypot(peaks["x"][:, None] - x, peaks["y"][:, None] - y)
    partner = distance.argmin(axis=1)
    both = (distance.min(axis=1) < 1.0) & (off < 0.25)
    # Centric reflections of 422 (a zero index, or |h| = |k|) look alike in both hands.
    both &= (hkl[partner] != 0).all(axis=1) & (np.abs(hkl[partner, 0]) != np.abs(hkl[partner, 1]))
    a, b = ours[both], hkl[partner[both]]
    agreed = [(a == b @ op.T).all(axis=1).mean() for op in hkl_symmetry_ops(CELL)]
    inverted = [(a == -b @ op.T).all(axis=1).mean() for op in hkl_symmetry_ops(CELL)]
    shift = peaks["x"][both] - x[partner[both]], peaks["y"][both] - y[partner[both]]
    return max(agreed), max(inverted), len(a), np.median(shift, axis=1)


def check(hkl, x, y, number):
    proper, improper, n, offset = agreement(hkl, x, y, number)
    assert n > 200
    assert proper > 0.9
    assert improper == 0
    # DIALS counts from the corner too: half a pixel would show.
    assert np.abs(offset).max() < 0.15


def test_hand_and_indices_agree_with_the_kept_dials_table():
    with REFERENCE.open() as lines:
        rows = [tuple(map(float, row)) for row in csv.reader(line for line in lines if line[0] not in "#h")]
    table = np.array(rows)
    check(table[:, :3].astype(int), table[:, 3], table[:, 4], "0005")


STILLS_PROCESS = """
dispatch.integrate=False
indexing.known_symmetry.space_group=P41212
indexing.known_symmetry.unit_cell=58.4,58.4,152.3,90,90,90
indexing.method=real_space_grid_search
indexing.stills.indexer=stills
mp.nproc=1
output.composite_output=False
"""


@pytest.mark.dials
@pytest.mark.skipif(not shutil.which("dials.stills_process"), reason="dials.stills_process is not on PATH")
@pytest.mark.parametrize("number", ["0005", pytest.param("0011", marks=pytest.mark.campaign)])
def test_hand_and_indices_agree_with_dials_run_now(number, tmp_path):
    check(*dials_indices(number, tmp_path), number)


def dials_indices(number, folder):
    """hkl (n, 3), x, y (n,) px of the spots that DIALS indexes in a still."""
    (folder / "still_0001.cbf").write_bytes(decompress((THAUMATIN / f"thau_3_2_{number}.cbf.bz2").read_bytes()))
    (folder / "stills.phil").write_text(STILLS_PROCESS)
    # DIALS imports this FEL module for stills, and Debian does not ship it; empty is enough.
    (folder / "stub").mkdir()
    (folder / "stub" / "xfel_mono_sim_ext.py").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        ["dials.stills_process", "stills.phil", "still_0001.cbf"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder / "stub")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    tables = list(folder.glob("*_indexed.refl"))
    assert tables, f"dials.stills_process indexed nothing: {done.stdout[-500:]} {done.stderr[-500:]}"
    return reflection_columns(tables[0])


def reflection_columns(path):
    """Indices and observed positions in a DIALS reflection table, which is MessagePack."""
    data = msgspec.msgpack.decode(path.read_bytes())[2]["data"]

    def column(name, dtype, width):
        return np.frombuffer(data[name][1][1], dtype).reshape(-1, width)

    xyz = column("xyzobs.px.value", "<f8", 3)
    return column("miller_index", "<i4", 3).astype(int), xyz[:, 0], xyz[:, 1]


# ---- as many spots as DIALS, on the same peaks

STILLS = ("0005", "0011", "0014")


@pytest.fixture(scope="module")
def both():
    """For each still: the peaks' vectors, our crystal, and DIALS's lattice found in the very same peaks."""
    spots = {number: spots_of(number) for number in STILLS}
    frame, _, geometry = still(STILLS[0])
    header = StreamHeader(
        experiment="thau", run=1, data_source="pilatus", shape=frame.shape, dtype="int32", frames_per_chunk=1,
        detector=HEADER,
    )  # fmt: skip
    frames = [
        spots_where_rays_enter(geometry, q, np.zeros(len(q), int), peaks["intensity"]) for peaks, q in spots.values()
    ]
    few = "indexing.basis_vector_combinations.max_combinations=100"
    job = EngineJob(header, flat_geometry(geometry), CELL, tuple(frames))
    answers = dials_stills.index(job, DialsParams(phil=(few,), frame_seconds=600.0))
    indexer = Indexer(CELL, HEADER.incident_wavelength)
    return {
        number: (q, indexer(q, peaks["snr"])[0], answer.lattices[0])
        for (number, (peaks, q)), answer in zip(spots.items(), answers, strict=True)
    }


@pytest.mark.dials
@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("dials.stills_process"), reason="dials.stills_process is not on PATH")
@pytest.mark.parametrize("number", STILLS)
def test_at_least_as_many_spots_are_indexed_as_dials_indexes(number, both):
    q, ours, lattice = both[number]
    theirs = Indexer(CELL, HEADER.incident_wavelength).described(q, lattice.A)
    assert ours.n_spots == theirs.n_spots
    assert ours.n_indexed >= lattice.n_indexed  # what DIALS keeps after its own rejection of outliers
    assert ours.n_indexed >= theirs.n_indexed  # the same count made with its matrix
    np.testing.assert_allclose(ours.cell.parameters[:3], theirs.cell.parameters[:3], rtol=0.005)
    np.testing.assert_allclose(ours.cell.parameters[:3], CELL.parameters[:3], rtol=0.005)
    assert same_orientation(ours.A, lattice.A, CELL, tolerance_deg=0.5)[0]
