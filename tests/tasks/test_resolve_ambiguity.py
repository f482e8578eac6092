"""Indexings that a lattice leaves open, mixed at random and found again."""

import numpy as np
import pytest

from streaming.simulator.crystal import SimulatedCrystal
from tasks.merge_crystals import unique_reflections
from tasks.observations import gather_observations
from tasks.resolve_ambiguity import indexing_operations, resolve_ambiguity
from tasks.scale_crystals import merge_scaled, scale_crystals
from tasks.unit_cell import hkl_symmetry_ops, read_cell

from .still_tables import StillTables, shuffled

TETRAGONAL, CUBIC = (79.1, 79.1, 37.9, 90.0, 90.0, 90.0), (70.0, 70.0, 70.0, 90.0, 90.0, 90.0)
HEXAGONAL = (60.0, 60.0, 40.0, 90.0, 90.0, 120.0)
D_MIN, N_CRYSTALS = 2.5, 200
CASES = {
    "P 4": (TETRAGONAL, "P 4", 2),
    "P 41": (TETRAGONAL, "P 41", 2),
    "P 3": (HEXAGONAL, "P 3", 4),
    "P 6": (HEXAGONAL, "P 6", 2),
    "P 2 3": (CUBIC, "P 2 3", 2),
    "a = b by accident": ((60.0, 60.0, 90.0, 90.0, 90.0, 90.0), "P 21 21 21", 2),
}


def mixed(parameters, space_group, n_crystals=N_CRYSTALS, **options):
    """Stills of which each crystal has one of the indexings at random: cell, table, and which it has."""
    crystal, cell = SimulatedCrystal(parameters, space_group), read_cell(parameters, space_group)
    table = StillTables(crystal, n_crystals, D_MIN, scale_spread=0.5, b_spread=4.0, **options).table()
    operations = indexing_operations(cell)
    drawn = np.random.default_rng(5).integers(0, len(operations), n_crystals)
    hkl = np.stack([table[name] for name in "hkl"], axis=1)
    back = np.rint(np.linalg.inv(operations)).astype(int)[drawn[table["frame_index"]]]
    as_indexed = np.einsum("nij,nj->ni", back, hkl)
    return crystal, cell, table | {name: as_indexed[:, axis] for axis, name in enumerate("hkl")}, drawn


def observed(cell, table):
    return gather_observations(unique_reflections(cell, D_MIN, "merged"), [("lyso/1", table)])


def share_right(cell, found, drawn):
    """Crystals whose true indices are those of the most, up to one change of all; naively, by the operations."""
    own = hkl_symmetry_ops(cell)
    operations = indexing_operations(cell)
    # What each crystal still needs to come back to the truth, as a kind of operation.
    rest = [operations[c] @ np.linalg.inv(operations[d]) for c, d in zip(found, drawn, strict=True)]
    kinds = [frozenset(np.rint(o @ m).astype(int).tobytes() for o in own) for m in rest]
    return max(kinds.count(kind) for kind in set(kinds)) / len(kinds)


@pytest.mark.parametrize(("parameters", "space_group", "n_indexings"), CASES.values(), ids=CASES)
def test_indexings_are_told_apart(parameters, space_group, n_indexings):
    _, cell, table, drawn = mixed(parameters, space_group)
    observations = observed(cell, table)
    found = resolve_ambiguity(observations)
    report = found.report
    assert len(report.operations) == n_indexings
    assert report.operations[0] == "h, k, l"
    assert report.is_resolved
    assert share_right(cell, found.choice, drawn[observations.frame_index]) > 0.95
    assert report.cc_chosen > report.cc_other + 0.1
    assert report.n_reindexed <= len(observations) * (1 - 1 / n_indexings) + 20


def test_the_merge_is_no_twin_any_more():
    crystal, cell, table, _ = mixed(TETRAGONAL, "P 4")
    observations = observed(cell, table)
    resolved = resolve_ambiguity(observations).applied(observations)
    correlations = []
    for one in (observations, resolved):
        merged = merge_scaled(one, scale_crystals(one)).merged()
        correlations.append(
            max(
                np.corrcoef(merged.intensity, crystal.intensity(merged.hkl @ m.T))[0, 1]
                for m in indexing_operations(cell)
            )
        )
    assert correlations[1] > correlations[0] + 0.1
    assert correlations[1] > 0.8


def test_any_order_gives_the_same_indexings():
    _, cell, table, _ = mixed(TETRAGONAL, "P 4", 60)
    first = resolve_ambiguity(observed(cell, table))
    again = resolve_ambiguity(observed(cell, shuffled(table, 1)))
    assert first.choice.tobytes() == again.choice.tobytes()
    assert first.report == again.report


@pytest.mark.parametrize("what", ["noise", "twin"])
def test_what_cannot_be_told_is_said_and_left(what):
    crystal, cell, table, _ = mixed(TETRAGONAL, "P 4")
    if what == "noise":
        table["intensity"] = np.random.default_rng(1).permutation(table["intensity"])
    else:  # perfect twins: both indexings have the same intensities
        twin = indexing_operations(cell)[1]
        hkl = np.stack([table[name] for name in "hkl"], axis=1)
        mean = 0.5 * (crystal.intensity(hkl) + crystal.intensity(hkl @ twin.T))
        noise = np.random.default_rng(2).gamma(1.2, 1 / 1.2, len(hkl))
        table["intensity"] = 900 * mean * noise
    found = resolve_ambiguity(observed(cell, table))
    assert not found.report.is_resolved
    assert found.report.n_reindexed == 0
    assert not found.choice.any()
    assert found.report.agreement < 0.9


def test_crystals_that_are_alike_stay_as_they_are():
    crystal, cell = SimulatedCrystal(TETRAGONAL, "P 4"), read_cell(TETRAGONAL, "P 4")
    found = resolve_ambiguity(observed(cell, StillTables(crystal, 100, D_MIN).table()))
    assert found.report.is_resolved
    assert found.report.n_reindexed <= 5


@pytest.mark.parametrize(
    ("parameters", "space_group"),
    [(TETRAGONAL, "P 43 21 2"), ((50.0, 60.0, 70.0, 90.0, 90.0, 90.0), "P 21 21 21"), (CUBIC, "P 4 3 2")],
)
def test_most_crystals_leave_no_choice(parameters, space_group):
    cell = read_cell(parameters, space_group)
    assert len(indexing_operations(cell)) == 1
    assert (
        resolve_ambiguity(observed(cell, StillTables(SimulatedCrystal(parameters, space_group), 2, D_MIN).table()))
        is None
    )


@pytest.mark.parametrize("n_crystals", [0, 1, 2])
def test_next_to_nothing_is_no_error(n_crystals):
    _, cell, table, _ = mixed(TETRAGONAL, "P 4", 3)
    few = table["frame_index"] < n_crystals
    found = resolve_ambiguity(observed(cell, {name: column[few] for name, column in table.items()}))
    assert len(found.choice) == n_crystals
