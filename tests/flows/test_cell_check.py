"""A recipe with another sample's cell: what the spots themselves say of it."""

import re

import pytest

from flows.cell_check import words_of_cell
from flows.finding_cell import CellReport
from flows.run_processing import ProcessRequest, run_processing
from streaming.simulator import SimulatorSettings, make_frames
from tasks.recipe import crystallography
from tasks.unit_cell import UnitCell, have_one_lattice, read_cell
from tests.flows.stored_runs import store_run

LYSOZYME = UnitCell(79.1, 79.1, 37.9, 90, 90, 90, "P 43 21 2")
SETTINGS = SimulatorSettings(size="1M", n_frames=80, hit_fraction=0.8, seed=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    simulator = SETTINGS.simulator()
    blobs, _ = make_frames(simulator, SETTINGS.n_frames)
    return store_run(tmp_path_factory.mktemp("cell"), simulator, blobs, 20)


def notes_of(run, cell, detector=None) -> list[str]:
    recipe = crystallography(read_cell(cell.parameters, cell.space_group)).model_dump(mode="json")
    recipe["detector"] = detector or {}
    recipe["export"] = {"nexus": "none", "crystfel": False}
    return run_processing(ProcessRequest(run=str(run.path), recipe=recipe))["notes"]


@pytest.mark.parametrize(
    "cell",
    [
        # A supercell of the true one within its errors: it indexes a third of the hits, plausibly.
        UnitCell(79.1, 79.1, 79.1, 90, 90, 90, "P 21 3"),
        pytest.param(UnitCell(58.4, 58.4, 152.3, 90, 90, 90, "P 41 21 2"), marks=pytest.mark.campaign),
    ],
    ids=["a supercell", "of thaumatin"],
)
def test_another_cell_is_said_with_the_one_that_the_spots_want(run, cell):
    note = notes_of(run, cell)[-1]
    assert note.startswith(f"The spots have another lattice than the recipe's cell, {cell.describe()}")
    assert "tetragonal P, 79.1" in note
    assert "nearline find-cell lyso/1" in note


@pytest.mark.parametrize("error", [0.9, 1.1])
def test_a_wrong_distance_is_said(run, error):
    at = SETTINGS.simulator().header.detector_distance
    hardly, why = notes_of(run, LYSOZYME, {"detector_distance": error * at})
    assert re.match(r"None of \d\d hits is indexed: cell, distance, wavelength or beam centre are wrong", hardly)
    assert re.match(r"Looked at without a cell: .* detector 6 % or more (nearer|farther away)", why)
    assert ("nearer" in why) == (error > 1)


def test_the_right_cell_is_not_talked_about(run):
    assert notes_of(run, LYSOZYME) == []


@pytest.mark.parametrize(
    ("other", "is_one"),
    [
        (UnitCell(37.9, 79.1, 79.1, 90, 90, 90, "P 2 2 2"), True),
        (UnitCell(111.86, 111.86, 37.9, 90, 90, 90, "C 2 2 2"), True),
        (UnitCell(80.5, 80.5, 38.5, 90, 90, 90, "P 4"), True),
        (UnitCell(79.1, 79.1, 75.8, 90, 90, 90, "P 4"), False),
        (UnitCell(111.86, 111.86, 37.9, 90, 90, 90, "P 4"), False),
        (UnitCell(79.1, 79.1, 75.8, 90, 90, 90, "I 4"), False),
        (UnitCell(72, 87, 37.9, 90, 90, 90, "P 2 2 2"), False),
    ],
)
def test_settings_of_one_lattice_are_one(other, is_one):
    assert have_one_lattice(LYSOZYME, other) is is_one
    assert have_one_lattice(other, LYSOZYME) is is_one


def test_steps_of_ones_own_are_not_looked_into(run):
    """They may say "indexed" of anything, and make no crystals."""
    recipe = {"steps": [{"use": "find_peaks"}, {"use": "tests.flows.own_steps:index_of_quality"}]}
    recipe["sample"] = {"cell": LYSOZYME.parameters, "space_group": LYSOZYME.space_group}
    recipe["export"] = {"nexus": "none", "crystfel": False}
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=recipe))
    assert (summary["indexed"], summary["notes"]) == (0, [])


@pytest.mark.parametrize("certainty", ["none", "tentative"])
def test_what_is_unsure_is_not_said(certainty):
    found = CellReport(certainty=certainty, cell=(50, 60, 70, 90, 90, 90), space_group="P 2 2 2", lattice="any")
    assert words_of_cell(found, LYSOZYME) == ""
