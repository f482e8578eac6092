"""Directions of beam and axes, against rotations that are known."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tasks.orientation_coverage import (
    axis_directions,
    beam_directions,
    largest_gap_deg,
    laue_rotations,
    preferred_axis,
)
from tasks.unit_cell import hkl_symmetry_ops, read_cell

LYSOZYME = read_cell("79.1,79.1,37.9,90,90,90", "P 43 21 2")
CELLS = {
    "triclinic": ("50,60,70,80,105,95", "P 1", 1),
    "monoclinic": ("50,60,70,90,105,90", "P 1 21 1", 2),
    "mirror": ("50,60,70,90,105,90", "P 1 m 1", 2),
    "orthorhombic": ("50,60,70,90,90,90", "P 21 21 21", 4),
    "tetragonal": ("79,79,38,90,90,90", "P 43 21 2", 8),
    "rhombohedral": ("60,60,60,75,75,75", "R 3:R", 3),
    "hexagonal": ("60,60,90,90,90,120", "P 61", 6),
    "cubic": ("80,80,80,90,90,90", "P 2 3", 12),
}
per_cell = pytest.mark.parametrize(("numbers", "group", "order"), CELLS.values(), ids=CELLS)


def random_matrices(cell, n, seed=0):
    return Rotation.random(n, random_state=seed).as_matrix() @ cell.B


def turned(cell, axis, n, spread_deg, seed=1):
    """Crystals whose ``axis`` (Cartesian) lies along the laboratory's y within a spread, turned at random about it."""
    rng = np.random.default_rng(seed)
    upright, _ = Rotation.align_vectors([[0, 1, 0]], [axis])
    about = Rotation.from_rotvec(rng.uniform(0, 2 * np.pi, (n, 1)) * [0, 1, 0])
    tilted = Rotation.from_rotvec(np.radians(spread_deg) * rng.normal(size=(n, 3)) * [1, 0, 1])
    return (tilted * about * upright).as_matrix() @ cell.B


@per_cell
def test_rotations_of_the_laue_group_leave_the_reciprocal_lattice_as_it_is(numbers, group, order):
    cell = read_cell(numbers, group)
    rotations = laue_rotations(cell)
    assert len(rotations) == order
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-9)
    assert np.linalg.det(rotations) == pytest.approx(np.ones(order))
    on_hkl = np.linalg.inv(cell.B) @ rotations @ cell.B
    assert np.allclose(on_hkl, np.rint(on_hkl), atol=1e-6)


def test_the_beam_in_the_crystal_is_the_inverse_of_its_rotation():
    turns = Rotation.random(50, random_state=2)
    assert np.allclose(beam_directions(turns.as_matrix() @ LYSOZYME.B, LYSOZYME), turns.inv().apply([0, 0, 1]))
    axis = LYSOZYME.B[:, 2] / np.linalg.norm(LYSOZYME.B[:, 2])
    assert np.allclose(axis_directions(turns.as_matrix() @ LYSOZYME.B, LYSOZYME, axis), turns.apply(axis))


@per_cell
def test_random_crystals_are_called_random(numbers, group, order):
    cell = read_cell(numbers, group)
    found = [preferred_axis(random_matrices(cell, 400, seed), cell) for seed in range(20)]
    if cell.lattice == "cubic":
        assert found == [None] * 20
        return
    assert not any(one.is_preferred for one in found)
    # Twenty chances, each evenly spread or above: that the least is below 1 in 5,000 happens once in 250.
    assert min(one.chance for one in found) > 2e-4
    assert all(1 / 3 < one.eigenvalue < one.highest_random for one in found)


def test_the_chance_is_what_it_says():
    """Of 2,000 samples of random crystals one in twenty has a chance below 5 %."""
    chances = np.array([preferred_axis(random_matrices(LYSOZYME, 100, s), LYSOZYME).chance for s in range(2000)])
    assert np.mean(chances < 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(chances < 0.5) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("spread_deg", [5.0, 20.0])
def test_needles_in_a_jet_are_found_whichever_equivalent_the_indexer_takes(spread_deg):
    A = turned(LYSOZYME, [0, 0, 1], 300, spread_deg)
    ops = hkl_symmetry_ops(LYSOZYME)
    A = A @ ops[np.random.default_rng(3).integers(len(ops), size=len(A))]
    found = preferred_axis(A, LYSOZYME)
    assert found.is_preferred
    assert found.axis == "c*"
    assert abs(found.direction[1]) > 0.99
    # Of a tilt with variance s² about both of the other axes the mean of cos² is about (1 + exp(-4 s²)) / 2.
    assert found.eigenvalue == pytest.approx((1 + math.exp(-4 * math.radians(spread_deg) ** 2)) / 2, abs=0.05)


@pytest.mark.parametrize(
    ("name", "axis"),
    [("b*", [0, 1, 0]), ("the threefold axis", [1, 1, 1])],
)
def test_the_axis_is_named(name, axis):
    cell = read_cell(*CELLS["orthorhombic" if name == "b*" else "rhombohedral"][:2])
    direction = cell.B @ axis
    assert preferred_axis(turned(cell, direction / np.linalg.norm(direction), 200, 10), cell).axis == name


def test_few_crystals_tell_nothing():
    assert preferred_axis(turned(LYSOZYME, [0, 0, 1], 19, 1), LYSOZYME) is None
    assert preferred_axis(np.empty((0, 3, 3)), LYSOZYME) is None
    assert math.isnan(largest_gap_deg(np.empty((0, 3)), laue_rotations(LYSOZYME)))


def test_gaps_are_what_one_direction_leaves_open():
    """Of the c axis alone the equator is farthest; of the whole sphere nothing is."""
    along_c = np.array([[0.0, 0.0, 1.0]])
    rotations = laue_rotations(LYSOZYME)
    assert largest_gap_deg(along_c, rotations) == pytest.approx(90, abs=1)
    # One general direction has 16 in 4/mmm; along a, b and c there are three pairs of opposite ones: 54.7°.
    assert largest_gap_deg(np.eye(3), np.eye(3)[None]) == pytest.approx(math.degrees(math.acos(3**-0.5)), abs=1)
    many = beam_directions(random_matrices(LYSOZYME, 20_000), LYSOZYME)
    assert largest_gap_deg(many, rotations) < 2
