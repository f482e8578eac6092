"""Cells of unknown samples: lattices of single stills, agreement of many, Bravais lattices, and what must give none."""

import numpy as np
import pytest

from storage.errors import BadRecipe
from storage.geometry import Geometry
from tasks.agree_on_cell import agree_on_cell
from tasks.bravais import bravais_lattices
from tasks.find_cell import CellSearchParams, distance_scale, find_lattice
from tasks.unit_cell import UnitCell

from .test_index_frame import CELLS, GEOMETRY, HEADER, SHAPE, frame_spots

WAVELENGTH = GEOMETRY.wavelength
LATTICES = {
    "cubic P": (UnitCell(95, 95, 95, 90, 90, 90, "P 4 3 2"), "cP"),
    "cubic I": (UnitCell(78, 78, 78, 90, 90, 90, "I 2 3"), "cI"),
    "cubic F": (CELLS["face centred"], "cF"),
    "lysozyme": (CELLS["tetragonal"], "tP"),
    "long axis": (CELLS["long axis"], "tP"),
    "tetragonal I": (CELLS["body centred"], "tI"),
    "orthorhombic P": (CELLS["orthorhombic"], "oP"),
    "orthorhombic C": (UnitCell(60, 90, 110, 90, 90, 90, "C 2 2 21"), "oC"),
    "orthorhombic I": (UnitCell(60, 90, 110, 90, 90, 90, "I 2 2 2"), "oI"),
    "orthorhombic F": (UnitCell(90, 110, 130, 90, 90, 90, "F 2 2 2"), "oF"),
    "monoclinic P": (UnitCell(50, 60, 70, 90, 105, 90, "P 1 21 1"), "mP"),
    "monoclinic C": (CELLS["oblique, centred"], "mC"),
    "triclinic": (UnitCell(71, 83, 97, 78, 85, 73, "P 1"), "aP"),
    "hexagonal P": (UnitCell(60, 60, 75, 90, 90, 120, "P 61 2 2"), "hP"),
    "hexagonal, very long": (CELLS["hexagonal, very long"], "hP"),
    "rhombohedral": (CELLS["rhombohedral"], "hR"),
}
# One of each crystal system, and what is hard, each time; the others in a campaign.
OFTEN = ("cubic I", "lysozyme", "long axis", "orthorhombic P", "monoclinic C", "triclinic", "rhombohedral")
every_lattice = pytest.mark.parametrize(
    ("cell", "symbol"),
    [
        pytest.param(*lattice, id=name, marks=[] if name in OFTEN else [pytest.mark.campaign])
        for name, lattice in LATTICES.items()
    ],
)


def primitive_rows(cell):
    return cell.primitive_rows @ np.linalg.inv(cell.B)


def is_true_lattice(rows, A, cell):
    """Whether these axes are whole combinations of the true primitive ones, with a determinant of one."""
    change = rows @ A @ np.linalg.inv(cell.primitive_rows)
    whole = np.rint(change)
    return np.abs(change - whole).max() < 0.2 and round(abs(np.linalg.det(whole))) == 1


def lattices_of(cell, n, geometry=GEOMETRY, **options):
    """(q, lattice) of stills in random orientations, as seen with a geometry that may be wrong."""
    stills = []
    for seed in range(n):
        q = geometry.scattering_vector(*GEOMETRY.project(frame_spots(cell, seed, **options)[0]))
        found = find_lattice(q, geometry.wavelength)
        if found is not None:
            stills.append((q, found))
    return stills


# ---- Bravais lattices -----------------------------------------------------------------------------


@every_lattice
def test_lattice_type_and_conventional_cell_from_a_blurred_metric(cell, symbol):
    rng = np.random.default_rng(5)
    rows = primitive_rows(cell) @ (np.eye(3) + rng.normal(0, 1e-3, (3, 3)))
    best = bravais_lattices(rows, 0.01)[0]
    assert best.symbol == symbol
    assert best.deviation < 0.006
    np.testing.assert_allclose(best.cell.volume, cell.volume, rtol=0.01)
    np.testing.assert_allclose(sorted(best.cell.parameters[:3]), sorted(cell.parameters[:3]), rtol=0.01)


def test_a_symmetry_that_the_metric_misses_is_refused():
    rows = primitive_rows(UnitCell(79, 81, 38, 90, 90, 90, "P 2 2 2"))
    assert bravais_lattices(rows, 0.008)[0].symbol == "oP"
    first = bravais_lattices(rows, 0.03)[0]
    assert first.symbol == "tP"
    # 79 and 81 are each 1.25 % from their mean
    assert first.deviation == pytest.approx(0.0125, abs=0.001)


def test_rhombohedral_cells_are_obverse_as_the_group_says():
    lattice = bravais_lattices(primitive_rows(CELLS["rhombohedral"]), 0.01)[0]
    point = np.array([2 / 3, 1 / 3, 1 / 3]) @ lattice.rows
    np.testing.assert_allclose(point, np.rint(point), atol=1e-9)


# ---- one still ------------------------------------------------------------------------------------


@every_lattice
def test_finds_the_lattice_of_most_stills(cell, symbol):
    n_right = 0
    for seed in range(3):
        q, (A,) = frame_spots(cell, seed)  # three in ten of 214 spots are spurious
        found = find_lattice(q, WAVELENGTH)
        n_right += found is not None and is_true_lattice(found.rows, A, cell)
    assert n_right >= 2


def test_few_spots_are_enough_where_they_are_exact():
    cell = CELLS["tetragonal"]
    found = [find_lattice(frame_spots(cell, seed, n_spots=25, spurious=0)[0], WAVELENGTH) for seed in range(6)]
    assert sum(f is not None for f in found) >= 4


def test_two_lattices_in_a_frame_do_not_hide_each_other():
    cell, n_right = CELLS["tetragonal"], 0
    for seed in range(4):
        q, truth = frame_spots(cell, seed, n_spots=100, spurious=0.1, n_lattices=2)
        found = find_lattice(q, WAVELENGTH)
        n_right += found is not None and any(is_true_lattice(found.rows, A, cell) for A in truth)
    assert n_right >= 3


def random_spots(rng, n):
    return GEOMETRY.scattering_vector(*(rng.uniform(0, 1, (n, 2)) * SHAPE[::-1]).T)


def ring_spots(rng, n):
    """On powder rings, such as those of ice."""
    two_theta = 2 * np.arcsin(WAVELENGTH / 2 / rng.choice([3.9, 3.67, 3.44, 2.67, 2.25], n))
    r = HEADER.detector_distance * np.tan(two_theta) / HEADER.pixel_size_x + rng.normal(0, 0.5, n)
    azimuth = rng.uniform(0, 2 * np.pi, n)
    return GEOMETRY.scattering_vector(
        HEADER.beam_center_x + r * np.cos(azimuth), HEADER.beam_center_y + r * np.sin(azimuth)
    )


@pytest.mark.parametrize("spots", [random_spots, ring_spots], ids=["noise", "powder rings"])
def test_spots_without_a_lattice_give_none(spots):
    """Measured on 320 frames of 10 to 300 random spots: none; on rings one or two in a hundred, which never agree."""
    found = [
        find_lattice(spots(np.random.default_rng(seed), n), WAVELENGTH) for n in (12, 40, 100) for seed in range(4)
    ]
    lattices = [f for f in found if f is not None]
    assert len(lattices) <= 1
    assert agree_on_cell(lattices) is None


@pytest.mark.parametrize("n", [0, 1, 7], ids=str)
def test_too_few_spots_are_no_error(n):
    assert find_lattice(random_spots(np.random.default_rng(0), n), WAVELENGTH) is None


def test_all_spots_at_one_place_are_no_error():
    assert find_lattice(np.tile([0.1, 0.05, -0.006], (30, 1)), WAVELENGTH) is None


@pytest.mark.parametrize("options", [{"max_axis": 5000}, {"tolerance": 0.6}, {"min_indexed": 2}], ids=str)
def test_impossible_parameters_are_refused(options):
    with pytest.raises(BadRecipe):
        CellSearchParams(**options)


# ---- many stills ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cubic I", "lysozyme", "monoclinic C", "triclinic", "rhombohedral"])
def test_stills_agree_on_the_cell_and_its_lattice(name):
    cell, symbol = LATTICES[name]
    agreed = agree_on_cell([f for _, f in lattices_of(cell, 6, n_spots=100)])
    assert agreed is not None
    assert agreed.lattice.symbol == symbol
    np.testing.assert_allclose(agreed.lattice.cell.parameters[:3], cell.parameters[:3], rtol=0.005)
    np.testing.assert_allclose(agreed.lattice.cell.volume, cell.volume, rtol=0.01)
    assert len(agreed.members) >= 4
    assert agreed.parameters.shape == (len(agreed.members), 6)
    assert not agreed.is_one_orientation


def test_lattices_of_different_crystals_do_not_agree():
    cells = [LATTICES[name][0] for name in ("cubic P", "lysozyme", "triclinic", "rhombohedral", "monoclinic P")]
    assert agree_on_cell([lattices_of(cell, 1)[0][1] for cell in cells]) is None


def test_the_majority_wins():
    most, few = lattices_of(CELLS["tetragonal"], 5), lattices_of(LATTICES["triclinic"][0], 2)
    agreed = agree_on_cell([f for _, f in few + most])
    assert agreed is not None
    assert agreed.members == (2, 3, 4, 5, 6)


def test_one_crystal_that_does_not_turn_is_said_to():
    q, _ = frame_spots(CELLS["tetragonal"], 1)
    found = find_lattice(q, WAVELENGTH)
    agreed = agree_on_cell([found] * 4)
    assert agreed is not None
    assert agreed.is_one_orientation


@pytest.mark.parametrize("error", [0.0, 0.03, -0.03], ids=str)
def test_lattices_tell_a_wrong_distance(error):
    header = HEADER.model_copy(update={"detector_distance": HEADER.detector_distance * (1 + error)})
    geometry = Geometry.from_header(header, SHAPE)
    stills = lattices_of(CELLS["tetragonal"], 8, geometry, n_spots=100)
    agreed = agree_on_cell([f for _, f in stills])
    scale = distance_scale([stills[i] for i in agreed.members], WAVELENGTH)
    assert scale == pytest.approx(1 / (1 + error), abs=0.007)
