"""The polarisation correction, held against the simulator's own formula and its spots."""

import numpy as np
import pytest

from storage.geometry import Geometry
from streaming.simulator.crystal import SimulatedCrystal
from streaming.simulator.stills import StillPhysics, StillSimulator, default_detector, polarisation_factor
from tasks.correct_polarisation import polarisation_of_spots
from tasks.merge_crystals import BadMerge

SHAPE = (1000, 1200)
GEOMETRY = Geometry.from_header(default_detector(SHAPE), SHAPE)


@pytest.mark.parametrize("horizontal", [0.0, 0.5, 0.99, 1.0])
def test_is_the_factor_of_each_direction(horizontal):
    rng = np.random.default_rng(1)
    x, y = rng.uniform(0, SHAPE[1], 500), rng.uniform(0, SHAPE[0], 500)
    at = GEOMETRY.lab_position(x, y)
    direction = at / np.linalg.norm(at, axis=1, keepdims=True)
    found = polarisation_of_spots(GEOMETRY, x, y, np.zeros(500, int), horizontal)
    assert found == pytest.approx(polarisation_factor(direction, horizontal), rel=1e-9)


def test_direct_beam_loses_nothing_and_horizontal_spots_most():
    x, y = GEOMETRY.project(np.zeros(3))
    assert polarisation_of_spots(GEOMETRY, np.array([x]), np.array([y]), np.zeros(1, int), 0.99) == pytest.approx(1.0)
    beside, above = polarisation_of_spots(
        GEOMETRY, np.array([x + 400, x]), np.array([y, y + 400]), np.zeros(2, int), 0.99
    )
    assert beside < above <= 1.0


def test_takes_out_what_the_simulator_puts_in():
    crystal, spots = SimulatedCrystal(), {}
    for fraction in (None, 0.99):
        physics = StillPhysics(hit_fraction=1.0, polarisation=fraction)
        spots[fraction] = StillSimulator(SHAPE, crystal=crystal, physics=physics).truth(3).spots
    polarised = spots[0.99]
    left = polarisation_of_spots(GEOMETRY, polarised["x"], polarised["y"], np.zeros(len(polarised), int), 0.99)
    assert left.min() < 0.95
    assert polarised["photons"] / left == pytest.approx(spots[None]["photons"], rel=1e-4)


def test_an_impossible_fraction_is_refused():
    with pytest.raises(BadMerge, match="not between 0 and 1"):
        polarisation_of_spots(GEOMETRY, np.zeros(1), np.zeros(1), np.zeros(1, int), 1.2)
