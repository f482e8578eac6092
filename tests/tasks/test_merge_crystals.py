"""Merging held against a plain implementation, gemmi, known means, and its own promise about order."""

import math
from collections import defaultdict

import gemmi
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.simulator.crystal import SimulatedCrystal
from tasks.merge_crystals import BadMerge, MergeSums, UniqueReflections, half_of_frames
from tasks.unit_cell import UnitCell, read_cell

CELLS = {
    "lysozyme": ("79.1,79.1,37.9,90,90,90", "P 43 21 2"),
    "triclinic": ("30,35,40,80,95,105", "P 1"),
    "centred": ("60,70,80,90,90,90", "C 2 2 21"),
    "monoclinic": ("40,50,60,90,103,90", "P 1 21 1"),
    "trigonal": ("50,50,70,90,90,120", "P 31 2 1"),
    "rhombohedral": ("60,60,90,90,90,120", "R 3:H"),
    "cubic": ("60,60,60,90,90,90", "I 21 3"),
    "small molecule": ("20,25,30,90,100,90", "P 1 21/c 1"),
}
per_cell = pytest.mark.parametrize("cell", [read_cell(*c) for c in CELLS.values()], ids=CELLS)


def observations(cell: UnitCell, d_min: float, n_frames: int = 40, seed: int = 0, noise: float = 0.3):
    """A table as `integrate` makes it, of random reflections out to a little beyond d_min, and the true means."""
    rng = np.random.default_rng(seed)
    crystal = SimulatedCrystal(cell.parameters, cell.space_group, bijvoet=0.2)
    every = cell.hkl_within(1.05 / d_min)
    table = defaultdict(list)
    for frame in rng.permutation(n_frames * 2)[:n_frames]:
        for number in range(1 + (frame % 5 == 0)):
            hkl = every[rng.random(len(every)) < 0.05]
            true = 1000 * crystal.intensity(hkl)
            sigma = noise * (10 + true)
            columns = {"h": hkl[:, 0], "k": hkl[:, 1], "l": hkl[:, 2]}
            columns |= {"intensity": rng.normal(true, sigma).astype("f4"), "sigma": sigma.astype("f4")}
            columns |= {"frame_index": np.full(len(hkl), frame), "crystal": np.full(len(hkl), number)}
            for name, values in columns.items():
                table[name].append(values)
    joined = {name: np.concatenate(parts) for name, parts in table.items()}
    order = np.lexsort((joined["crystal"], joined["frame_index"]))
    return {name: values[order] for name, values in joined.items()}


def plainly_merged(cell: UnitCell, d_min: float, table, is_apart: bool):
    """The same with a dictionary and gemmi's own asymmetric unit, one observation at a time."""
    group = cell.group
    asu, operations, metric = gemmi.ReciprocalAsu(group), group.operations(), gemmi.UnitCell(*cell.parameters)
    seen = defaultdict(list)
    for h, k, l, intensity, sigma, frame in zip(  # noqa: E741
        *(table[c].tolist() for c in ("h", "k", "l", "intensity", "sigma", "frame_index")), strict=True
    ):
        hkl = [h, k, l]
        if metric.calculate_d(hkl) < d_min or operations.is_systematically_absent(hkl):
            continue
        unique, isym = asu.to_asu(hkl, operations)
        is_minus = is_apart and isym % 2 == 0 and not operations.is_reflection_centric(hkl)
        half = int(half_of_frames("lyso/1", np.array([frame]))[0])
        seen[(*unique, is_minus)].append((intensity, sigma, half))
    return seen


def mean(values):
    return math.fsum(values) / len(values)


def plain_statistics(seen):
    pairs = []
    for rows in seen.values():
        halves = [[i for i, _, half in rows if half == wanted] for wanted in (0, 1)]
        if all(halves):
            pairs.append([mean(h) for h in halves])
    x, y = (np.array(column) for column in zip(*pairs, strict=True))
    return np.corrcoef(x, y)[0, 1], math.sqrt(2) * np.abs(x - y).sum() / (x + y).sum(), len(pairs)


@per_cell
@pytest.mark.parametrize("mates", ["merged", "apart"])
def test_agrees_with_a_plain_implementation(cell, mates):
    table = observations(cell, 4.0, n_frames=20)
    sums = MergeSums(cell, 4.0, mates)
    sums.add("lyso/1", table)
    seen, merged, found = plainly_merged(cell, 4.0, table, mates == "apart"), sums.merged(), sums.statistics()

    assert {(*h, m) for h, m in zip(merged.hkl.tolist(), merged.is_minus.tolist(), strict=True)} == set(seen)
    for hkl, minus, intensity, sigma, n in zip(
        merged.hkl.tolist(),
        merged.is_minus.tolist(),
        merged.intensity,
        merged.sigma,
        merged.n_observations,
        strict=True,
    ):
        rows = seen[(*hkl, minus)]
        values = [row[0] for row in rows]
        counting = math.sqrt(math.fsum(row[1] ** 2 for row in rows)) / len(rows)
        spread = np.std(values, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
        assert n == len(rows)
        assert intensity == pytest.approx(mean(values), rel=1e-6, abs=1e-4)
        assert sigma == pytest.approx(max(spread, counting), rel=1e-4)
    cc_half, r_split, n_pairs = plain_statistics(seen)
    assert found.cc_half == pytest.approx(cc_half, rel=1e-5)
    assert found.r_split == pytest.approx(r_split, rel=1e-5)
    assert found.n_pairs == n_pairs
    assert found.n_observations == sum(map(len, seen.values()))
    assert found.n_observations + found.n_beyond + found.n_absent == len(table["h"])
    assert found.n_crystals == len(set(zip(table["frame_index"], table["crystal"], strict=True)))
    assert found.n_frames == len(set(table["frame_index"]))


@per_cell
@pytest.mark.parametrize("mates", ["merged", "apart"])
def test_completeness_agrees_with_gemmi(cell, mates):
    metric, operations = gemmi.UnitCell(*cell.parameters), cell.group.operations()
    possible = gemmi.make_miller_array(metric, cell.group, 3.97, unique=True)
    n_mates = len(possible) + (
        np.count_nonzero(operations.centric_flag_array(possible) == 0) if mates == "apart" else 0
    )
    sums = MergeSums(cell, 3.97, mates)
    assert sums.statistics().n_possible == n_mates
    sums.add("lyso/1", observations(cell, 3.97, n_frames=3))
    found = sums.statistics()
    assert found.completeness == found.n_unique / n_mates
    assert sum(s.n_possible for s in found.shells) == n_mates
    assert sum(s.n_unique for s in found.shells) == found.n_unique
    assert (found.d_min, found.shells[-1].d_min) == (3.97, 3.97)

    every = cell.hkl_within(1 / 3.97)
    n = len(every)
    all_of_them = {"h": every[:, 0], "k": every[:, 1], "l": every[:, 2], "intensity": np.ones(n), "sigma": np.ones(n)}
    sums.add("lyso/1", all_of_them | {"frame_index": np.full(n, 999), "crystal": np.zeros(n, int)})
    assert sums.statistics().completeness == 1.0
    assert all(shell.completeness == 1.0 for shell in sums.statistics().shells if shell.n_possible)


def test_gemmis_merging_gives_the_same_means():
    cell = read_cell(*CELLS["lysozyme"])
    table = observations(cell, 3.0)
    sums = MergeSums(cell, 3.0)
    sums.add("lyso/1", table | {"sigma": np.full(len(table["h"]), 10.0)})
    theirs = gemmi.Intensities()
    hkl = np.stack([table[c] for c in "hkl"], axis=1).astype(np.int32)
    theirs.set_data(
        gemmi.UnitCell(*cell.parameters), cell.group, hkl, table["intensity"].astype(float), np.full(len(hkl), 10.0)
    )
    theirs.remove_systematic_absences()
    theirs.merge_in_place(gemmi.DataType.Mean)
    means = dict(zip(map(tuple, theirs.miller_array.tolist()), theirs.value_array, strict=True))
    merged = sums.merged()
    ours = dict(zip(map(tuple, merged.hkl.tolist()), merged.intensity, strict=True))
    assert len(ours) > 1000
    assert all(ours[hkl] == pytest.approx(means[hkl], rel=1e-5, abs=1e-3) for hkl in ours)


def test_known_means_come_out():
    """Means approach the truth as 1/√n, and the estimated sigma says how far they are."""
    cell = read_cell(*CELLS["lysozyme"])
    crystal = SimulatedCrystal(cell.parameters, cell.space_group, bijvoet=0.2)
    sums = MergeSums(cell, 4.0, "apart")
    sums.add("lyso/1", observations(cell, 4.0, n_frames=200))
    merged = sums.merged()
    true = 1000 * crystal.intensity(np.where(merged.is_minus[:, None], -merged.hkl, merged.hkl))
    many = merged.n_observations > 20
    assert np.count_nonzero(many) > 200
    assert np.std((merged.intensity - true)[many] / merged.sigma[many]) == pytest.approx(1.0, abs=0.15)
    assert np.corrcoef(merged.intensity, true)[0, 1] > 0.98
    found = sums.statistics()
    # CC* estimates the correlation with the truth.
    assert found.cc_star == pytest.approx(np.corrcoef(merged.intensity, true)[0, 1], abs=0.02)


CELL = read_cell(*CELLS["lysozyme"])
TABLE = observations(CELL, 4.0, n_frames=24)
FRAMES = np.unique(TABLE["frame_index"])


def merged_in(parts, mates="merged"):
    sums = MergeSums(CELL, 4.0, mates)
    for part in parts:
        which = np.isin(TABLE["frame_index"], part)
        sums.add("lyso/1", {name: values[which] for name, values in TABLE.items()})
    return sums


WHOLE = merged_in([FRAMES])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order_gives_the_same_bits(data):
    order = data.draw(st.permutations(FRAMES.tolist()))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=6)))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    split = data.draw(st.integers(0, len(parts)))
    sums = merged_in(parts[:split])
    sums.add_sums(merged_in(parts[split:]))
    assert sums.statistics().model_dump_json() == WHOLE.statistics().model_dump_json()
    mine, whole = sums.merged(), WHOLE.merged()
    assert all(getattr(mine, name).tobytes() == getattr(whole, name).tobytes() for name in whole.__dataclass_fields__)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**62), 2**62), st.text(max_size=5)), max_size=20))
def test_halves_depend_on_run_and_frame_only(names):
    for frame, run in names:
        alone = half_of_frames(run, np.array([frame]))[0]
        assert alone in (0, 1)
        assert half_of_frames(run, np.array([5, frame, 7]))[1] == alone


def test_halves_are_halves_and_unrelated_between_runs():
    first, second = (half_of_frames(f"lyso/{n}", np.arange(100_000)) for n in (1, 2))
    assert abs(first.mean() - 0.5) < 0.01
    assert abs((first == second).mean() - 0.5) < 0.01
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < 0.01


def test_large_and_small_values_are_summed_exactly():
    values = [3e7, -3e7, 1.5, 2.25, 1e-4]
    n = len(values)
    table = {"h": np.full(n, 1), "k": np.full(n, 2), "l": np.full(n, 3), "intensity": np.array(values)}
    table |= {"sigma": np.full(n, 1.0), "frame_index": np.arange(n), "crystal": np.zeros(n, int)}
    sums = MergeSums(CELL, 4.0)
    sums.add("lyso/1", table)
    merged = sums.merged()
    assert merged.intensity[0] == pytest.approx(math.fsum(values) / n, abs=2**-16)
    assert merged.sigma[0] == pytest.approx(np.std(values, ddof=1) / math.sqrt(n), rel=1e-9)


@pytest.mark.parametrize(
    ("column", "value"), [("intensity", np.nan), ("intensity", np.inf), ("intensity", 1e9), ("sigma", np.nan),
                          ("sigma", 0.0), ("sigma", -1.0), ("sigma", 1e9)],
)  # fmt: skip
def test_unusable_observations_are_counted_and_left_out(column, value):
    table = {name: values.copy() for name, values in TABLE.items()}
    table[column] = table[column].astype(float)
    table[column][7] = value
    sums = MergeSums(CELL, 1.0)
    sums.add("lyso/1", table)
    found = sums.statistics()
    assert found.n_refused == 1
    assert found.n_observations + found.n_absent == len(table["h"]) - 1


def test_nothing_gives_no_numbers():
    found = MergeSums(CELL, 4.0).statistics()
    assert (found.completeness, found.n_unique, found.n_crystals) == (0.0, 0, 0)
    assert (found.cc_half, found.r_split, found.i_over_sigma, found.multiplicity, found.resolution) == (None,) * 5


def test_noise_has_no_resolution_and_signal_does():
    rng = np.random.default_rng(1)
    table = TABLE | {"intensity": rng.normal(0, 10, len(TABLE["h"]))}
    sums = MergeSums(CELL, 4.0)
    sums.add("lyso/1", table)
    assert sums.statistics().resolution is None
    assert abs(sums.statistics().cc_half) < 0.2
    assert WHOLE.statistics().resolution == 4.0


def test_ambiguous_indexing_is_named():
    assert MergeSums(read_cell("60,60,60,90,90,90", "I 21 3"), 6.0).statistics().is_ambiguous
    assert not WHOLE.statistics().is_ambiguous


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UniqueReflections(CELL, 0.0), "not a resolution"),
        (lambda: UniqueReflections(CELL, float("nan")), "not a resolution"),
        (lambda: UniqueReflections(CELL, 0.1), "raise d_min"),
        (lambda: UniqueReflections(CELL, 3.0, "other"), "neither merged nor apart"),
        (lambda: MergeSums(CELL, 4.0).add("lyso/1", {"h": np.zeros(1)}), "put integrate in the recipe"),
        (lambda: MergeSums(CELL, 4.0).add_sums(MergeSums(CELL, 5.0)), "one cell and d_min"),
        (lambda: MergeSums(CELL, 4.0).statistics(0), "shells"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(BadMerge, match=words):
        make()
