"""Indexing on spots made from known lattices, in the manner of a detector 0.13 m away at 12 keV."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.models import DetectorHeader
from streaming.simulator.stills import StillPhysics, StillSimulator
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.index_frame import Crystal, Indexer, IndexParams
from tasks.refine_lattice import strain_basis
from tasks.unit_cell import UnitCell, lattice_rotations, parameters_from_matrix, same_orientation

SHAPE = (2162, 2068)
HEADER = DetectorHeader(beam_center_x=1048.5, beam_center_y=1066, detector_distance=0.13, incident_energy=12000)
GEOMETRY = Geometry.from_header(HEADER, SHAPE)

CELLS = {
    "tetragonal": UnitCell(79.1, 79.1, 37.9, 90, 90, 90, "P 43 21 2"),
    "long axis": UnitCell(58.4, 58.4, 152.3, 90, 90, 90, "P 41 21 2"),
    "triclinic": UnitCell(71, 83, 97, 78, 95, 107, "P 1"),
    "oblique, centred": UnitCell(180, 50, 90, 90, 112, 90, "C 1 2 1"),
    "orthorhombic": UnitCell(61, 72, 183, 90, 90, 90, "P 21 21 21"),
    "body centred": UnitCell(80, 80, 150, 90, 90, 90, "I 4"),
    "rhombohedral": UnitCell(101, 101, 210, 90, 90, 120, "R 3:H"),
    "hexagonal, very long": UnitCell(60, 60, 285, 90, 90, 120, "P 61"),
    "face centred": UnitCell(120, 120, 120, 90, 90, 90, "F 4 3 2"),
}


def lattice_spots(A, cell, rng, n_spots):
    """Pixel positions of up to n_spots reflections near the Ewald sphere, blurred by 0.3 px."""
    q = cell.hkl_within(1 / 2.2) @ A.T
    error = 1 / GEOMETRY.wavelength - np.linalg.norm(q + np.array([0, 0, 1 / GEOMETRY.wavelength]), axis=1)
    x, y = GEOMETRY.project(q[np.abs(error) < np.abs(rng.normal(0, 1.2e-3, len(q)))])
    on = (x > 0) & (x < SHAPE[1]) & (y > 0) & (y < SHAPE[0])
    xy = np.column_stack([x[on], y[on]])
    return rng.permutation(xy)[:n_spots] + rng.normal(0, 0.3, (min(n_spots, len(xy)), 2))


def frame_spots(cell, seed, n_spots=150, spurious=0.3, scale=1.0, beam_off=0.0, n_lattices=1):
    """(q as computed with the assumed geometry, true A of each lattice)."""
    rng = np.random.default_rng(seed)
    truth = [Rotation.random(random_state=rng).as_matrix() @ cell.B / scale for _ in range(n_lattices)]
    xy = np.concatenate([lattice_spots(A, cell, rng, n_spots) for A in truth])
    xy = np.concatenate([xy, rng.uniform(0, 1, (int(len(xy) * spurious / (1 - spurious)), 2)) * SHAPE[::-1]])
    xy += [beam_off, -beam_off]
    return GEOMETRY.scattering_vector(*xy.T), truth


CONDITIONS = {
    "clear": {"spurious": 0.0},
    "three in ten spurious": {},
    "cell and beam off": {"scale": 1.012, "beam_off": 0.7},
    "cell small, beam off": {"scale": 0.988, "beam_off": -0.7},
}


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_finds_orientation_and_cell_of_any_lattice(cell, condition):
    indexer = Indexer(cell, GEOMETRY.wavelength)
    for seed in range(3):
        q, (A,) = frame_spots(cell, seed, **condition)
        (crystal,) = indexer(q)
        assert np.linalg.det(crystal.A) > 0
        assert same_orientation(crystal.A, A, cell, tolerance_deg=0.3)[0]
        np.testing.assert_allclose(crystal.cell.parameters[:3], parameters_from_matrix(A)[:3], rtol=0.01)
        # the excitation spread alone moves the index along 285 Å by a third
        assert crystal.n_indexed > 0.4 * len(q)
        assert crystal.log10_chance < -10


def test_indices_are_the_true_ones_up_to_the_lattices_rotations():
    cell = CELLS["triclinic"]
    q, (A,) = frame_spots(cell, 4, spurious=0)
    (crystal,) = Indexer(cell, GEOMETRY.wavelength)(q)
    hkl, off = crystal.hkl(q, GEOMETRY.wavelength)
    true = np.rint(q @ np.linalg.inv(A).T).astype(int)
    assert (off < 0.25).mean() > 0.9
    assert (hkl == true).all(axis=1).mean() > 0.95


def test_detector_shift_is_found():
    cell = CELLS["long axis"]
    q, _ = frame_spots(cell, 2, n_spots=400, beam_off=1.0)
    (crystal,) = Indexer(cell, GEOMETRY.wavelength)(q)
    # Spots seen 1 px too far in fast (-x) and 1 px too near in slow (-y): the true place is +x, -y of it.
    expected = np.array([1, -1]) * HEADER.pixel_size_x / HEADER.detector_distance
    np.testing.assert_allclose(crystal.shift, expected, atol=1.5e-4)


@pytest.mark.parametrize("name", ["tetragonal", "long axis", "triclinic", "face centred"])
def test_random_spots_give_no_lattice(name):
    indexer = Indexer(CELLS[name], GEOMETRY.wavelength)
    for n, seed in [(12, 0), (25, 1), (60, 2), (200, 3)]:
        rng = np.random.default_rng(seed)
        q = GEOMETRY.scattering_vector(*(rng.uniform(0, 1, (n, 2)) * SHAPE[::-1]).T)
        assert indexer(q) == []


def test_two_lattices_are_told_apart():
    cell = CELLS["tetragonal"]
    indexer = Indexer(cell, GEOMETRY.wavelength, IndexParams(max_lattices=3))
    for seed in range(3):
        q, truth = frame_spots(cell, 10 + seed, n_spots=120, spurious=0.1, n_lattices=2)
        found = indexer(q)
        assert len(found) == 2
        matched = {i for c in found for i, A in enumerate(truth) if same_orientation(c.A, A, cell, 0.3)[0]}
        assert matched == {0, 1}


def test_another_crystals_spots_are_not_explained():
    q, _ = frame_spots(CELLS["triclinic"], 5)
    assert Indexer(CELLS["tetragonal"], GEOMETRY.wavelength)(q) == []


def test_same_input_gives_the_same_answer():
    q, _ = frame_spots(CELLS["orthorhombic"], 6)
    one, two = (Indexer(CELLS["orthorhombic"], GEOMETRY.wavelength)(q)[0] for _ in range(2))
    np.testing.assert_array_equal(one.A, two.A)


def test_nothing_in_nothing_out():
    indexer = Indexer(CELLS["tetragonal"], GEOMETRY.wavelength)
    assert indexer(np.empty((0, 3))) == []
    assert indexer(np.full((30, 3), np.nan)) == []
    assert indexer(np.zeros((30, 3))) == []


def test_bad_parameters_are_refused():
    with pytest.raises(BadRecipe, match="out of bounds"):
        IndexParams(tolerance=0.6)
    with pytest.raises(BadRecipe, match="give it in Å"):
        Indexer(CELLS["tetragonal"], 1e-10)


FREE = {"triclinic": 6, "oblique, centred": 4, "orthorhombic": 3, "tetragonal": 2, "rhombohedral": 2, "face centred": 1}


@pytest.mark.parametrize(("name", "n_free"), FREE.items(), ids=FREE)
def test_free_cell_parameters_of_each_system(name, n_free):
    cell = CELLS[name]
    strains = strain_basis(cell)
    assert len(strains) == n_free
    turns = cell.B @ lattice_rotations(cell) @ np.linalg.inv(cell.B) if name != "body centred" else np.eye(3)[None]
    for strain in strains:
        cell.with_matrix((np.eye(3) + 0.005 * strain) @ cell.B)
        np.testing.assert_allclose(turns @ strain, strain @ turns, atol=1e-9)


def test_simulated_frames_end_to_end():
    simulator = StillSimulator(shape=(1062, 1028), seed=11)
    geometry, header = simulator.geometry, simulator.header
    cell = UnitCell(*simulator.crystal.cell, simulator.crystal.space_group)
    finder = PeakFinder(geometry, simulator.pixel_mask, PeakParams(saturation=header.saturation_value))
    indexer = Indexer(cell, geometry.wavelength)
    hits, right = 0, 0
    for i in range(20):
        frame, truth = simulator.frame(i)
        peaks = finder(frame)
        assert (len(peaks) >= 10) == truth.is_hit
        if not truth.is_hit:
            continue
        hits += 1
        crystals = indexer(geometry.scattering_vector(peaks["x"], peaks["y"]), peaks["snr"])
        for crystal in crystals:
            # the simulator's A holds a*, b*, c* as rows
            assert same_orientation(crystal.A, truth.A.T, cell, 0.3)[0]
            np.testing.assert_allclose(crystal.cell.parameters[:3], cell.parameters[:3], rtol=0.01)
        right += len(crystals) == 1
    assert hits >= 5
    assert right >= 0.9 * hits


def test_with_parallax_in_the_model_the_cell_comes_out_right():
    # The sensor's depth is 0.2 % of this distance: left out, the cell is that much too small.
    simulator = StillSimulator((1062, 1028), physics=StillPhysics(hit_fraction=1.0, parallax=True))
    headers = [simulator.header, simulator.header.model_copy(update={"sensor_thickness": 0.0})]
    with_parallax, without = (edge_over_truth(simulator, header) for header in headers)
    assert with_parallax == pytest.approx(1, abs=3e-4)
    assert without < 1 - 1e-3


def edge_over_truth(simulator, header):
    """Median of the refined a of some frames' crystals, over the true one."""
    geometry = Geometry.from_header(header, simulator.shape)
    find = PeakFinder(geometry, simulator.pixel_mask)
    indexer = Indexer(UnitCell(*simulator.crystal.cell, simulator.crystal.space_group), geometry.wavelength)
    edges = []
    for number in range(6):
        frame, truth = simulator.frame(number)
        peaks = find(frame)
        (crystal,) = indexer(geometry.scattering_vector(peaks["x"], peaks["y"]), peaks["intensity"])
        assert same_orientation(crystal.A, truth.A.T, indexer.cell, 0.2)[0]
        edges.append(crystal.cell.a)
    return np.median(edges) / simulator.crystal.cell[0]


def test_a_spot_that_is_nowhere_is_explained_by_no_lattice():
    """Between panels a place has no scattering vector."""
    cell = UnitCell(79.1, 79.1, 37.9, 90, 90, 90, "P 43 21 2")
    crystal = Crystal(cell.B, cell, 9, 9, 1e-4, 1e-4, (0.0, 0.0), -20.0)
    q = np.array([[np.nan, 0.0, 0.0], [0.02, 0.01, 0.0], [0.0, np.inf, 0.0]])
    hkl, off = crystal.hkl(q, 1.0)
    assert np.isinf(off).tolist() == [True, False, True]
    assert hkl[[0, 2]].tolist() == [[0, 0, 0]] * 2
