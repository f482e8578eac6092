"""How near merged intensities come to the truth: a thousand simulated crystals, from pixels to shells.

4M at 150 mm, 12 keV; a full reflection of mean strength at low resolution has the simulator's usual number of photons;
beam polarised to 99 % along x, Bijvoet differences of 10 %. Each frame is searched, indexed and integrated as a recipe
would do it, then all are scaled and merged with Friedel mates apart.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from benchmarks.analysis import N_THREADS
from benchmarks.frames import Options
from benchmarks.measure import Figure, Target, figure
from streaming.simulator import SimulatorSettings, StillSimulator
from tasks.chunk_frames import usable_mask
from tasks.correct_polarisation import polarisation_of_spots
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.index_frame import Indexer
from tasks.integrate_spots import IntegrationParams, integrate_spots
from tasks.merge_crystals import (
    Merged,
    MergeStatistics,
    MergeSums,
    ShellStatistics,
    merge_statistics,
    unique_reflections,
)
from tasks.model_partiality import model_partiality
from tasks.observations import gather_observations
from tasks.predict_spots import predict_spots, profile_radius
from tasks.scale_crystals import merge_scaled, scale_crystals
from tasks.unit_cell import UnitCell

__all__ = ["measure"]

log = logging.getLogger("benchmarks")

_N_CRYSTALS, _D_MIN, _N_SHELLS = 1000, 2.0, 10
_HORIZONTAL, _BIJVOET = 0.99, 0.1
_LEAST_CC, _LEAST_I_OVER_SIGMA = 0.9, 2.0
_EVERY = 100
Table = dict[str, np.ndarray]


def measure(options: Options) -> list[Figure]:
    n = options.choose(40, _N_CRYSTALS)
    settings = SimulatorSettings(
        size="4M", n_frames=n, hit_fraction=1.0, distance=0.15, polarisation=_HORIZONTAL, bijvoet=_BIJVOET, seed=7
    )
    simulator = settings.simulator()
    crystal = simulator.crystal
    cell = UnitCell(*crystal.cell, crystal.space_group)
    started = time.perf_counter()
    tables = list(_tables(simulator, cell, n))
    seconds = time.perf_counter() - started
    merged, statistics, plain = _merges(tables, cell)
    shells = [shell for shell in statistics.shells if (shell.i_over_sigma or 0) >= _LEAST_I_OVER_SIGMA]
    of_shells = [_with_truth(merged, simulator, shell) for shell in shells]
    of_plain = [_with_truth(plain, simulator, shell) for shell in shells]
    least = Target("at least", _LEAST_CC)
    return [
        figure("crystals merged", "crystals", [float(statistics.n_crystals)], higher_is_better=True),
        figure("shells of ten where I/σ is 2 or more", "shells", [float(len(shells))], higher_is_better=True),
        figure("least correlation with the truth in these", "", [min(of_shells)], higher_is_better=True, target=least),
        figure("mean correlation with the truth in these", "", [float(np.mean(of_shells))],
               ("a plain mean of all", [float(np.mean(of_plain))]), higher_is_better=True),
        figure("Bijvoet differences of the right sign", "%", [_right_signs(merged, simulator)], higher_is_better=True),
        figure("crystals simulated and analysed, 2 threads", "frames/s", [n / seconds], higher_is_better=True),
    ]  # fmt: skip


def _tables(simulator: StillSimulator, cell: UnitCell, n: int) -> Iterator[Table]:
    """The reflections of each frame, corrected for polarisation."""
    geometry, mask = simulator.geometry, usable_mask(simulator.pixel_mask, simulator.shape, None)
    saturation = simulator.header.saturation_value
    find = PeakFinder(geometry, mask, PeakParams(saturation=saturation))
    index, rings = Indexer(cell, geometry.wavelength), IntegrationParams(saturation=saturation)
    hkl = cell.hkl_within(1 / _D_MIN)

    def one(number: int) -> list[Table]:
        frame, _ = simulator.frame(number)
        peaks = find(frame)
        q = geometry.scattering_vector(peaks["x"], peaks["y"])
        found = []
        for crystal in index(q, peaks["intensity"]):
            predicted = predict_spots(crystal, geometry, profile_radius(crystal, q, geometry.wavelength), hkl)
            r = integrate_spots(frame, mask, predicted, geometry, rings).reflections
            factor = polarisation_of_spots(geometry, r["x"], r["y"], r["panel"], _HORIZONTAL)
            found.append(
                {name: r[name] for name in "hkl"}
                | {"intensity": r["intensity"] / factor, "sigma": r["sigma"] / factor, "excitation": r["excitation"]}
                | {"frame_index": np.full(len(r), number), "crystal": np.full(len(r), len(found))}
            )
        return found

    with ThreadPoolExecutor(N_THREADS) as pool:
        numbers = iter(range(n))
        while batch := list(islice(numbers, _EVERY)):
            for tables in pool.map(one, batch):
                yield from tables
            log.info("%d of %d crystals", batch[-1] + 1, n)


def _merges(tables: list[Table], cell: UnitCell) -> tuple[Merged, MergeStatistics, Merged]:
    """Scaled and merged, its statistics, and the plain mean beside it."""
    observations = gather_observations(unique_reflections(cell, _D_MIN, "apart"), [("bench/1", t) for t in tables])
    scales, partialities = model_partiality(observations, scale_crystals(observations))
    log.info("%s", partialities)
    scaled = merge_scaled(observations, scales)
    sums = MergeSums(cell, _D_MIN, "apart")
    for table in tables:
        sums.add("bench/1", table)
    return scaled.merged(), merge_statistics(scaled, _N_SHELLS), sums.merged()


def _with_truth(merged: Merged, simulator: StillSimulator, shell: ShellStatistics) -> float:
    """Correlation with the true intensities in a shell."""
    inside = (merged.d <= shell.d_max) & (merged.d > shell.d_min)
    truth = simulator.crystal.intensity(_signed(merged)[inside])
    return float(np.corrcoef(merged.intensity[inside], truth)[0, 1])


def _right_signs(merged: Merged, simulator: StillSimulator) -> float:
    """Share of the pairs whose I(+) - I(-) is three standard deviations from 0 that have the true sign, %."""
    plus = {tuple(h): i for i, h in enumerate(merged.hkl) if not merged.is_minus[i]}
    pairs = [(plus[tuple(h)], i) for i, h in enumerate(merged.hkl) if merged.is_minus[i] and tuple(h) in plus]
    if not pairs:
        return float("nan")
    a, b = np.array(pairs).T
    signed = _signed(merged)
    found = merged.intensity[a] - merged.intensity[b]
    truth = simulator.crystal.intensity(signed[a]) - simulator.crystal.intensity(signed[b])
    is_clear = (np.abs(found) > 3 * np.hypot(merged.sigma[a], merged.sigma[b])) & (truth != 0)
    return 100 * float((np.sign(found) == np.sign(truth))[is_clear].mean()) if is_clear.any() else float("nan")


def _signed(merged: Merged) -> np.ndarray:
    """Indices of what was observed: the mates of the minus half are -h, -k, -l."""
    return np.where(merged.is_minus[:, None], -merged.hkl, merged.hkl)
