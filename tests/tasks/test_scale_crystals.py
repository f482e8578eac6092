"""Scaled merging of simulated stills, held against their true intensities, a plain mean, and a naive computation."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from streaming.simulator.crystal import SimulatedCrystal
from tasks.merge_crystals import MergeSums, half_of_frames, merge_statistics, unique_reflections
from tasks.model_partiality import model_partiality
from tasks.observations import gather_observations
from tasks.scale_crystals import FEWEST_COMMON, LEAST_PARTIALITY, REASONS, merge_scaled, scale_crystals
from tasks.unit_cell import UnitCell, read_cell
from tasks.wilson_plot import wilson_plot

from .still_tables import StillTables, shuffled

CRYSTAL = SimulatedCrystal()
CELL = read_cell(CRYSTAL.cell, CRYSTAL.space_group)
D_MIN = 3.0
N_SHELLS = 6
STILLS = {
    "alike": StillTables(CRYSTAL, 300, D_MIN, scale_spread=0.1),
    "different": StillTables(CRYSTAL, 300, D_MIN, scale_spread=0.7, b_spread=6.0),
    "weak": StillTables(CRYSTAL, 300, D_MIN, scale_spread=1.0, b_spread=10.0, strength=100.0),
    "few": StillTables(CRYSTAL, 80, D_MIN, scale_spread=0.7, b_spread=6.0),
}


def observed(table, mates="merged", run="lyso/1", cell: UnitCell = CELL):
    return gather_observations(unique_reflections(cell, D_MIN, mates), [(run, table)])


def plain(table, mates="merged"):
    sums = MergeSums(CELL, D_MIN, mates)
    sums.add("lyso/1", table)
    return sums


def scaled(table, mates="merged"):
    observations = observed(table, mates)
    return merge_scaled(observations, scale_crystals(observations))


def truth_by_shell(merged, crystal=CRYSTAL):
    """Correlation with the true intensities, shell by shell, where both merges have the reflection."""
    true = crystal.intensity(merged.hkl)
    return [np.corrcoef(merged.intensity[s], true[s])[0, 1] for s in np.array_split(np.arange(len(merged)), N_SHELLS)]


@pytest.fixture(scope="module")
def tables():
    return {name: stills.table() for name, stills in STILLS.items()}


@pytest.mark.parametrize(("name", "gain"), [("alike", -0.005), ("different", 0.03), ("weak", 0.06), ("few", 0.05)])
def test_nearer_to_the_truth_than_a_plain_mean(tables, name, gain):
    before, after = truth_by_shell(plain(tables[name]).merged()), truth_by_shell(scaled(tables[name]).merged())
    assert all(b >= a - 0.005 for a, b in zip(before, after, strict=True)), (before, after)
    assert np.mean(after) - np.mean(before) >= gain


def test_scales_and_falloffs_are_those_of_the_crystals(tables):
    stills, observations = STILLS["different"], observed(tables["different"])
    scales = scale_crystals(observations)
    true = np.array([stills.log_scale_and_b(int(i)) for i in observations.frame_index])
    assert scales.has_settled
    assert scales.is_scaled.all()
    assert np.corrcoef(scales.log_scale, true[:, 0])[0, 1] > 0.95
    assert np.corrcoef(scales.b_factor, true[:, 1])[0, 1] > 0.6
    assert np.std(scales.log_scale - true[:, 0]) < 0.25
    assert np.polyfit(true[:, 0], scales.log_scale, 1)[0] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_gives_the_same_bits(tables, seed):
    table = tables["few"]
    two_runs = [("lyso/1", table), ("lyso/2", table | {"intensity": 0.9 * table["intensity"]})]
    parts = []
    for run, rows in two_runs:
        mixed = shuffled(rows, seed)
        cut = mixed["frame_index"] % (seed + 2) == 0
        parts += [(run, {n: c[w] for n, c in mixed.items()}) for w in (cut, ~cut)]
    unique = unique_reflections(CELL, D_MIN, "apart")
    results = []
    for given in (two_runs, parts[::-1]):
        observations = gather_observations(unique, given)
        results.append(merge_scaled(observations, scale_crystals(observations)))
    first, second = results
    mine, whole = first.merged(), second.merged()
    assert all(getattr(mine, n).tobytes() == getattr(whole, n).tobytes() for n in mine.__dataclass_fields__)
    assert merge_statistics(first).model_dump_json() == merge_statistics(second).model_dump_json()


@pytest.mark.parametrize("mates", ["merged", "apart"])
def test_agrees_with_a_naive_computation(tables, mates):
    """The weighted means, CC1/2 and Rsplit, one observation at a time, from the formulas."""
    # With partialities, so that all of the formula is there.
    observations = observed(predicted("few", 5e-5), mates)
    scales, report = model_partiality(observations, scale_crystals(observations))
    assert report.is_used
    result = merge_scaled(observations, scales)
    unique = observations.unique
    rows = defaultdict(list)
    for j in range(len(observations)):
        half = int(half_of_frames("lyso/1", observations.frame_index[j : j + 1])[0])
        for i in range(observations.start[j], observations.start[j + 1]):
            found = int(observations.found[i])
            p = scales.partiality[i]
            if found < 0 or scales.is_outlier[i] or not scales.is_scaled[j] or p < LEAST_PARTIALITY:
                continue
            g = p * math.exp(scales.log_scale[j] - scales.b_factor[j] / (2 * unique.d[found // 2] ** 2))
            expected = max(float(scales.reference[found // 2]), 0.0)
            w = 1 / (scales.noise[j] / g**2 + scales.scatter * expected**2)
            key = (*unique.hkl[found // 2].tolist(), found % 2 == 1)
            rows[key].append((half, w, observations.intensity[i] / g, observations.sigma[i] / g))
    merged = result.merged()
    keys = [(*h, m) for h, m in zip(merged.hkl.tolist(), merged.is_minus.tolist(), strict=True)]
    assert set(keys) == set(rows)
    halves = []
    for key, intensity, sigma, n in zip(keys, merged.intensity, merged.sigma, merged.n_observations, strict=True):
        total = math.fsum(w for _, w, _, _ in rows[key])
        mean = math.fsum(w * x for _, w, x, _ in rows[key]) / total
        spread = math.fsum((w * (x - mean)) ** 2 for _, w, x, _ in rows[key]) * n / max(n - 1, 1)
        counting = math.fsum((w * s) ** 2 for _, w, _, s in rows[key])
        assert n == len(rows[key])
        assert intensity == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert sigma == pytest.approx(math.sqrt(max(spread, counting)) / total, rel=1e-6)
        parts = [[(w, x) for half, w, x, _ in rows[key] if half == wanted] for wanted in (0, 1)]
        if all(parts):
            halves.append([math.fsum(w * x for w, x in p) / math.fsum(w for w, _ in p) for p in parts])
    x, y = np.array(halves).T
    found = merge_statistics(result)
    assert found.n_pairs == len(halves)
    assert found.cc_half == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    assert found.r_split == pytest.approx(math.sqrt(2) * np.abs(x - y).sum() / (x + y).sum(), rel=1e-9)
    assert found.cc_star == pytest.approx(math.sqrt(2 * found.cc_half / (1 + found.cc_half)), rel=1e-12)


def predicted(name, error):
    return replace(STILLS[name], excitation_error=error).table()


# At 3.5 Å, an orientation that is wrong by 0.01 degrees moves e by 5e-5 1/Å.
@pytest.mark.parametrize(("error", "gain"), [(0.0, 0.06), (5e-5, 0.05), (2e-4, -0.002)])
def test_modelled_partialities_are_nearer_to_the_truth_still(error, gain):
    observations = observed(predicted("different", error))
    scales = scale_crystals(observations)
    modelled, report = model_partiality(observations, scales)
    before, after = (truth_by_shell(merge_scaled(observations, s).merged()) for s in (scales, modelled))
    assert report.is_used
    assert report.cc_with > report.cc_without
    assert np.mean(after) - np.mean(before) >= gain
    if error == 0.0:
        # Those of the simulator.
        assert report.radius == pytest.approx(2e-4, rel=0.15)
        assert report.mosaic_spread == pytest.approx(3e-4, rel=0.15)


@pytest.mark.parametrize("what", ["shuffled", "unknown"])
def test_partialities_that_say_nothing_are_not_used(what):
    table = predicted("different", 0.0)
    if what == "unknown":
        del table["excitation"]
    else:
        table["excitation"] = np.random.default_rng(1).permutation(table["excitation"])
    observations = observed(table)
    scales = scale_crystals(observations)
    modelled, report = model_partiality(observations, scales)
    assert not report.is_used
    assert modelled is scales


def test_modelled_partialities_are_the_same_in_any_order():
    table = predicted("few", 5e-5)
    results = []
    for given in (table, shuffled(table, 3)):
        observations = observed(given)
        modelled, report = model_partiality(observations, scale_crystals(observations))
        results.append((merge_scaled(observations, modelled).merged().intensity.tobytes(), report))
    assert results[0] == results[1]


def test_sigma_says_how_far_the_half_sets_are_apart():
    merged = scaled(StillTables(CRYSTAL, 600, D_MIN, scale_spread=0.7, b_spread=6.0).table()).merged()
    many = (merged.n_observations > 20) & np.isfinite(merged.halves).all(axis=0)
    assert np.count_nonzero(many) > 500
    difference = (merged.halves[0] - merged.halves[1])[many] / (2 * merged.sigma[many])
    assert np.std(difference) == pytest.approx(1.0, abs=0.2)


def test_crystals_that_cannot_be_scaled_are_left_out_with_the_reason(tables):
    table = {name: column.copy() for name, column in tables["different"].items()}
    rng = np.random.default_rng(3)
    for frame in range(20):  # no likeness to the others
        mine = np.flatnonzero(table["frame_index"] == frame)
        table["intensity"][mine] = table["intensity"][rng.permutation(mine)]
    kept = np.ones(len(table["h"]), bool)
    for frame in range(20, 25):  # too few reflections
        kept[np.flatnonzero(table["frame_index"] == frame)[FEWEST_COMMON - 1 :]] = False
    table = {name: column[kept] for name, column in table.items()}
    observations = observed(table)
    scales = scale_crystals(observations)
    report = scales.report()
    too_few, unlike, _ = REASONS.values()
    assert report.left_out[too_few] == 5
    assert 10 <= report.left_out[unlike] <= 20
    assert report.n_scaled + sum(report.left_out.values()) == len(observations)
    assert not scales.is_scaled[20:25].any()
    assert scales.is_scaled[25:].mean() > 0.98
    assert merge_statistics(merge_scaled(observations, scales)).n_crystals == report.n_scaled


def test_outliers_are_found_and_little_else(tables):
    table = {name: column.copy() for name, column in tables["different"].items()}
    clean = observed(table)
    scales = scale_crystals(clean)
    assert scales.is_outlier.mean() < 2e-4
    often = (clean.found >= 0) & (np.bincount(np.maximum(clean.found, 0))[clean.found] >= 10)
    hit = np.random.default_rng(1).choice(np.flatnonzero(often), 30, replace=False)
    spoilt = gather_observations(clean.unique, [("lyso/1", spoil(clean, hit))])
    found = scale_crystals(spoilt)
    assert found.is_outlier[hit].mean() > 0.95
    before, after = merge_scaled(clean, scales).merged(), merge_scaled(spoilt, found).merged()
    assert np.corrcoef(before.intensity, after.intensity)[0, 1] > 0.99


def spoil(observations, hit):
    (_, table), *_ = observations.by_run(np.ones(len(observations), bool))
    table["intensity"][hit] = 1e5
    table["sigma"][hit] = 300.0
    return table


def test_bijvoet_differences_have_the_right_sign():
    crystal = SimulatedCrystal(bijvoet=0.4)
    table = StillTables(crystal, 1000, D_MIN, scale_spread=0.5, b_spread=4.0).table()
    result = scaled(table, "apart")
    merged, found = result.merged(), merge_statistics(result)
    pairs = np.flatnonzero(merged.is_minus[1:] & (merged.hkl[1:] == merged.hkl[:-1]).all(axis=1))
    difference = merged.intensity[pairs] - merged.intensity[pairs + 1]
    sigma = np.hypot(merged.sigma[pairs], merged.sigma[pairs + 1])
    hkl = merged.hkl[pairs]
    true = crystal.intensity(hkl) - crystal.intensity(-hkl)
    clear = np.abs(difference) > 2.5 * sigma
    assert np.count_nonzero(clear) > 50
    assert (np.sign(difference) == np.sign(true))[clear].mean() > 0.9
    assert np.corrcoef(difference, true)[0, 1] > 0.3
    # CCano from the half sets, naively.
    halves = merged.halves[:, pairs] - merged.halves[:, pairs + 1]
    both = np.isfinite(halves).all(axis=0)
    assert found.n_anomalous == np.count_nonzero(both)
    assert found.cc_ano == pytest.approx(np.corrcoef(halves[:, both])[0, 1], rel=1e-9)
    assert found.cc_ano > 0.05
    assert merge_statistics(scaled(table)).cc_ano is None


def test_counts_are_those_of_the_plain_merge(tables):
    table = {name: column.copy() for name, column in tables["few"].items()}
    table["sigma"][[3, 500]] = 0.0
    table["intensity"][700] = np.nan
    sums, observations = plain(table), observed(table)
    every = np.ones(len(observations), bool)
    assert observations.counts(every) == {n: getattr(sums, n) for n in observations.counts(every)}
    again = MergeSums(CELL, D_MIN)
    for run, columns in observations.by_run(every):
        again.add(run, columns)
    assert again.merged().intensity.tobytes() == sums.merged().intensity.tobytes()


@pytest.mark.parametrize("n_crystals", [0, 1, 2])
def test_next_to_nothing_is_no_error(n_crystals):
    table = StillTables(CRYSTAL, 3, D_MIN).table()
    few = table["frame_index"] < n_crystals
    observations = observed({name: column[few] for name, column in table.items()})
    scales = scale_crystals(observations)
    assert len(scales.log_scale) == n_crystals
    assert merge_statistics(merge_scaled(observations, scales)).n_crystals == scales.report().n_scaled


def test_wilson_plot_finds_the_falloff():
    unique = unique_reflections(CELL, 2.0, "merged")
    intensity = CRYSTAL.intensity(unique.hkl)
    plot = wilson_plot(unique.d, 1000 * intensity)
    assert plot.b_factor == pytest.approx(CRYSTAL.b_factor, abs=2.0)
    # With little more than the solvent region there is no line.
    low = unique.d > 3.4
    assert wilson_plot(unique.d[low], intensity[low]).b_factor is None
    assert wilson_plot(unique.d[:5], intensity[:5]).s_squared == ()
