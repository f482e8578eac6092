"""Scaling: how strong each crystal is, and how fast it falls off, from the reflections it shares with the others.

An observation i of reflection h in crystal j is taken for

    I_ij ≈ G_j exp(−B_j / 2d²) I_h,    with variance σ_j² + c² (G_j exp(−B_j / 2d²) I_h)² :

noise of counting, and the scatter of partialities, in proportion to the intensity. G and B come from a linear fit of
log ratios to the merge of all *other* crystals, in which weak and negative observations keep their part: the fit is
that of a linear model with a logarithmic link (McCullagh & Nelder 1989, Generalized Linear Models, ch. 2), whose
working residual (I − µ)/µ is the log ratio wherever that exists. Taking logarithms of the positive ones only would
make weak crystals look strong. Huber's weights keep single spots from deciding, and G and B are drawn to those of the
median crystal as far as crystals are found to be alike. Then all is merged again, and so on.

All sums run crystal by crystal in the order of `tasks.observations.Observations`, so that the same observations give
the same bits, whatever came first.

Source: Monte-Carlo merging with scales is that of White et al. 2016, J. Appl. Cryst. 49, 680; the fit is our own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from pydantic import Field

from storage.models import Record
from tasks.merge_crystals import Merged, UniqueReflections
from tasks.observations import Observations

__all__ = ["CrystalScales", "ScaledMerge", "ScalingReport", "merge_scaled", "scale_crystals"]

# Reflections that others have seen too; with fewer, two parameters mean nothing.
FEWEST_COMMON = 10
# What is left of a reflection is too little, and too uncertain, to tell the whole by.
LEAST_PARTIALITY = 0.15
# An observation is left out if it is so many standard deviations from the mean of the others, and if there are so
# many others. The mean of a few is now and then one of small partialities only: with 6 and 5, 15 of 31,000 simulated
# observations without any fault were left out, full ones, and CC with the truth lost 0.01; with 8 and 8 it was one.
OUTLIER_SIGMA, OUTLIER_FEWEST = 8.0, 8
_ROUNDS, _SETTLED = 30, 3e-3
# Where few crystals share a reflection, two of them would see-saw for ever: from this round on, half steps.
_FULL_STEPS = 2
_FIT_STEPS = 6
_HUBER = 3.0
# Intensities beyond so many times the mean at their resolution count as that, in the correlation of a crystal.
_MOST_RELATIVE = 10.0
# How far crystals of one sample differ in ln G, and in B (Å²): the first guess, and the least.
_SPREADS, _LEAST_SPREADS = (2.0, 20.0), (0.02, 1.0)
# c² to begin with, and its limits.
_SCATTER, _SCATTER_LIMITS = 0.5, (0.0025, 4.0)
# A scale beyond e^±5 of the median, or a B beyond ±200 Å² of it, is a fit that ran away.
_LOG_SCALE_LIMIT, _B_LIMIT = 5.0, 200.0
_N_LEVELS = 20
_SCALED, _TOO_FEW, _UNLIKE, _RAN_AWAY = 0, 1, 2, 3
REASONS = {
    _TOO_FEW: f"fewer than {FEWEST_COMMON} reflections that other crystals have too",
    _UNLIKE: "no correlation with the other crystals beyond chance",
    _RAN_AWAY: "its scale or B ran away",
}


class ScalingReport(Record):
    """What scaling came to."""

    n_scaled: int = Field(description="crystals")
    left_out: dict[str, int] = Field(description="crystals that could not be scaled, by reason")
    n_rounds: int = Field(description="of fitting and merging")
    has_settled: bool = Field(description="the last round changed scales by less than 0.3 % (rms)")
    scale_spread: float | None = Field(description="standard deviation of ln G")
    b_spread: float | None = Field(description="Å², standard deviation of B")
    scatter: float = Field(description="c: spread of scaled observations beyond counting, relative to the intensity")
    mean_cc: float | None = Field(description="mean correlation of a crystal with the merge of the others")


@dataclass(frozen=True)
class CrystalScales:
    """Scale and B of each crystal of some observations, relative to the median crystal.

    log_scale, b_factor (Å²), cc, status, noise (counts²) : (crystal,). status is 0 where it was scaled.
    is_outlier : (n,), observations that are left out. reference : (Laue unique,), the merge of all, for weights.
    scatter : c². partiality : (n,), if it was given.
    """

    log_scale: np.ndarray
    b_factor: np.ndarray
    cc: np.ndarray
    status: np.ndarray
    noise: np.ndarray
    is_outlier: np.ndarray
    reference: np.ndarray
    scatter: float
    n_rounds: int
    has_settled: bool
    partiality: np.ndarray | None = None

    @property
    def is_scaled(self) -> np.ndarray:
        """(crystal,)"""
        return self.status == _SCALED

    def report(self) -> ScalingReport:
        """In numbers for people."""
        mine = self.is_scaled
        known = self.cc[mine][np.isfinite(self.cc[mine])]
        return ScalingReport(
            n_scaled=int(mine.sum()),
            left_out={why: n for code, why in REASONS.items() if (n := int((self.status == code).sum()))},
            n_rounds=self.n_rounds,
            has_settled=self.has_settled,
            scale_spread=float(self.log_scale[mine].std()) if mine.any() else None,
            b_spread=float(self.b_factor[mine].std()) if mine.any() else None,
            scatter=float(self.scatter**0.5),
            mean_cc=float(known.mean()) if len(known) else None,
        )


@dataclass(frozen=True)
class ScaledMerge:
    """Scaled observations merged: what `tasks.merge_crystals.merge_statistics` asks for."""

    unique: UniqueReflections
    result: Merged
    n_frames: int
    n_crystals: int
    n_absent: int
    n_beyond: int
    n_refused: int
    n_outliers: int

    def merged(self) -> Merged:
        """The weighted mean of each unique reflection, with sigma."""
        return self.result


def scale_crystals(observations: Observations, partiality: np.ndarray | None = None) -> CrystalScales:
    """Fit scale and B of every crystal to the merge of the others, until they settle.

    Friedel mates count as one here, also where they are kept apart: their difference is small beside what scales
    have to find out. A crystal's noise σ_j² is the median of its σ²: a σ from counting is small where the count
    happened to be small, and weighting with it would pull every mean down.

    Parameters
    ----------
    partiality : (n,), a factor on G for each observation, as `tasks.model_partiality` finds it; those below 0.15 are
        not used. By default 1.
    """
    data, sigma2 = _data_of(observations, partiality), observations.sigma**2
    n, n_unique = len(observations), len(observations.unique.hkl)
    log_scale, b, status = np.zeros(n), np.zeros(n), np.zeros(n, np.int64)
    cc = np.full(n, np.nan)
    is_outlier, scatter, spreads = np.zeros(len(data.slot), bool), _SCATTER, _SPREADS
    reference, has_settled, n_round = np.full(n_unique, np.nan), False, 0
    for n_round in range(1, _ROUNDS + 1):
        is_in = status == _SCALED
        for _ in range(2 if n_round == 1 else 1):
            # Twice at first: the weights need a reference.
            sums, weights, numbers = _sum_up(*data, log_scale, b, is_in, is_outlier, reference, scatter)
            with np.errstate(invalid="ignore", divide="ignore"):
                reference = np.where(weights > 0, sums / weights, np.nan)
        level = _levels(reference, numbers, observations.unique)
        before = log_scale, b
        log_scale, b, variances, cc, n_common = _fit(
            *data, log_scale, b, is_in, is_outlier, reference, scatter, sums, weights, numbers, level, *spreads
        )
        status = np.full(n, _SCALED)
        if n_round > 1:
            # Not at once: outliers are still to be found. Of unrelated ones, five in six are below the standard error.
            status[~(cc > 1 / np.sqrt(np.maximum(n_common, 1)))] = _UNLIKE
        status[n_common < FEWEST_COMMON] = _TOO_FEW
        if n_round > _FULL_STEPS:
            log_scale, b = 0.5 * (log_scale + before[0]), 0.5 * (b + before[1])
        log_scale, b = _relative_to_median(log_scale, b, status == _SCALED)
        status[(status == _SCALED) & ((np.abs(log_scale) > _LOG_SCALE_LIMIT) | (np.abs(b) > _B_LIMIT))] = _RAN_AWAY
        is_in = status == _SCALED
        if is_in.any():
            spreads = _spreads_of(log_scale[is_in], b[is_in], variances[:, is_in])
        sums, weights, numbers = _sum_up(*data, log_scale, b, is_in, is_outlier, reference, scatter)
        is_outlier, found = _judge(
            *data, log_scale, b, is_in, is_outlier, reference, scatter, sums, weights, numbers, sigma2
        )
        scatter = float(np.clip(found, *_SCATTER_LIMITS)) if found > 0 else scatter
        if not is_in.any():
            break
        has_settled = bool(((log_scale - before[0])[is_in] ** 2).mean() < _SETTLED**2)
        if has_settled and n_round > _FULL_STEPS:
            break
    return CrystalScales(
        log_scale, b, cc, status, data.noise, is_outlier, np.nan_to_num(reference), scatter, n_round, has_settled,
        partiality,
    )  # fmt: skip


def merge_scaled(observations: Observations, scales: CrystalScales, which: np.ndarray | None = None) -> ScaledMerge:
    """Merge scaled observations.

    Parameters
    ----------
    which : (crystal,), those to merge; by default all that were scaled. Others that were not scaled are left out.

    Notes
    -----
    Each observation x = I / (G exp(−B/2d²)) has the weight w = 1 / (σ_j²/g² + c² I_h²): strong reflections, where
    partiality decides, count alike in all crystals, and weak ones by the noise of the crystal. Sigma of a mean is the
    larger of two, as in the plain merge: √(n/(n−1) Σ w² (x − I)²) / Σ w from the spread of n observations, and
    √(Σ w² σ²/g²) / Σ w from their own sigmas.
    """
    mine = scales.is_scaled if which is None else which & scales.is_scaled
    data = _data_of(observations, scales.partiality)
    sigma2 = observations.sigma**2
    n = 2 * len(observations.unique.hkl)
    sums, weights, numbers, spread, counting = _merge(
        *data, scales.log_scale, scales.b_factor, mine, scales.is_outlier, scales.reference, scales.scatter,
        observations.found.astype(np.int64), observations.half, sigma2, n,
    )  # fmt: skip
    number, weight = numbers.sum(axis=0), weights.sum(axis=0)
    at = np.flatnonzero(number)
    number, weight = number[at], weight[at]
    variance = spread[at] * number / np.maximum(number - 1, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        halves = sums[:, at] / weights[:, at]
    unique = observations.unique
    merged = Merged(
        hkl=unique.hkl[at // 2],
        is_minus=at % 2 == 1,
        d=unique.d[at // 2],
        intensity=sums[:, at].sum(axis=0) / weight,
        sigma=np.sqrt(np.maximum(variance, counting[at])) / weight,
        n_observations=number,
        halves=halves,
    )
    is_mine = observations.per_observation(mine)
    n_outliers = int(np.count_nonzero(scales.is_outlier & is_mine))
    return ScaledMerge(unique=unique, result=merged, n_outliers=n_outliers, **observations.counts(mine))


class _Data(NamedTuple):
    """What all kernels read first."""

    start: np.ndarray
    slot: np.ndarray  # Laue unique reflection, -1 where there is none
    intensity: np.ndarray
    noise: np.ndarray
    s2: np.ndarray  # of each unique reflection, 1/Å²: 1 / 2d²
    part: np.ndarray  # partiality of each observation


def _data_of(observations: Observations, partiality: np.ndarray | None) -> _Data:
    found = observations.found
    part = np.ones(len(found)) if partiality is None else partiality
    slot = np.where((found >= 0) & (part >= LEAST_PARTIALITY), found // 2, -1).astype(np.int64)
    noise = observations.median_of(observations.sigma**2)
    return _Data(observations.start, slot, observations.intensity, noise, 0.5 / observations.unique.d**2, part)


def _relative_to_median(log_scale: np.ndarray, b: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only ratios between crystals can be known: the median crystal gets scale 1 and B 0."""
    if not mine.any():
        return log_scale, b
    return log_scale - np.median(log_scale[mine]), b - np.median(b[mine])


def _spreads_of(log_scale: np.ndarray, b: np.ndarray, variances: np.ndarray) -> tuple[float, float]:
    """How far crystals differ in ln G and in B: of estimates that are drawn to the median, by what those lack.

    One step of expectation and maximisation for the spread of normal effects (Dempster, Laird & Rubin 1977).
    """
    found = [((values**2 + own).mean() ** 0.5) for values, own in zip((log_scale, b), variances, strict=True)]
    return max(float(found[0]), _LEAST_SPREADS[0]), max(float(found[1]), _LEAST_SPREADS[1])


def _levels(reference: np.ndarray, numbers: np.ndarray, unique: UniqueReflections) -> np.ndarray:
    """(unique,): the mean intensity around each reflection's resolution, positive."""
    known = (numbers > 0) & np.isfinite(reference)
    # `unique` is sorted by resolution, so shells are stretches of it.
    shells = np.array_split(np.arange(len(reference)), min(_N_LEVELS, max(len(reference) // 20, 1)))
    means = np.array([reference[s][known[s]].mean() if known[s].any() else np.nan for s in shells])
    if not (means > 0).any():
        return np.ones(len(reference))
    means = np.where(means > 0, means, means[means > 0].min())
    middle = np.array([unique.d[s[len(s) // 2]] for s in shells])
    return np.exp(np.interp(0.5 / unique.d**2, 0.5 / middle**2, np.log(means)))


@njit(cache=True, nogil=True)
def _weight(noise, g, reference, scatter):  # pragma: no cover - compiled
    """1 / variance of an observation that was divided by its scale g."""
    expected = reference if reference > 0 else 0.0
    return 1.0 / (noise / (g * g) + scatter * expected * expected)


@njit(cache=True, nogil=True)
def _sum_up(
    start, slot, intensity, noise, s2, part, log_scale, b, is_in, is_outlier, reference, scatter
):  # pragma: no cover - compiled
    """Weighted sums, weights and numbers of each unique reflection."""
    n_unique = len(s2)
    sums, weights, numbers = np.zeros(n_unique), np.zeros(n_unique), np.zeros(n_unique, np.int64)
    for j in range(len(start) - 1):
        if not is_in[j]:
            continue
        for i in range(start[j], start[j + 1]):
            h = slot[i]
            if h < 0 or is_outlier[i]:
                continue
            g = part[i] * np.exp(log_scale[j] - b[j] * s2[h])
            w = _weight(noise[j], g, reference[h], scatter)
            sums[h] += w * intensity[i] / g
            weights[h] += w
            numbers[h] += 1
    return sums, weights, numbers


@njit(cache=True, nogil=True)
def _without_own(i, h, j, intensity, g, noise, is_used, reference, scatter, sums, weights, numbers):
    # pragma: no cover - compiled
    """Mean of the others' observations, its variance, and how many they are."""
    total, weight, n = sums[h], weights[h], numbers[h]
    if is_used:
        w = _weight(noise[j], g, reference[h], scatter)
        total, weight, n = total - w * intensity[i] / g, weight - w, n - 1
    if n < 1 or weight <= 1e-9 * weights[h]:
        return 0.0, 0.0, 0
    return total / weight, 1.0 / weight, n


@njit(cache=True, nogil=True)
def _fit(
    start,
    slot,
    intensity,
    noise,
    s2,
    part,
    log_scale,
    b,
    is_in,
    is_outlier,
    reference,
    scatter,
    sums,
    weights,
    numbers,
    level,
    scale_spread,
    b_spread,
):  # pragma: no cover - compiled
    """ln G, B, their variances, correlation and number of common reflections of each crystal against the others."""
    n = len(start) - 1
    new_log, new_b, variances = np.zeros(n), np.zeros(n), np.zeros((2, n))
    cc, n_common = np.full(n, np.nan), np.zeros(n, np.int64)
    for j in range(n):
        size = start[j + 1] - start[j]
        value, mean, variance = np.empty(size), np.empty(size), np.empty(size)
        share, where = np.empty(size), np.empty(size, np.int64)
        m = 0
        for i in range(start[j], start[j + 1]):
            h = slot[i]
            if h < 0 or is_outlier[i]:
                continue
            g = part[i] * np.exp(log_scale[j] - b[j] * s2[h])
            r, v, others = _without_own(
                i, h, j, intensity, g, noise, is_in[j], reference, scatter, sums, weights, numbers
            )
            # Where the others see nothing, there is no ratio.
            if others < 1 or r <= 0:
                continue
            value[m], mean[m], variance[m], share[m], where[m] = intensity[i], r, v, part[i], h
            m += 1
        n_common[j] = m
        if m < 2:
            continue
        x, y = log_scale[j], b[j]
        for _ in range(_FIT_STEPS):
            # Restrained towards the median crystal, as far as crystals are found to be alike.
            a00, a01, a11 = 1.0 / scale_spread**2, 0.0, 1.0 / b_spread**2
            c0, c1 = -x / scale_spread**2, -y / b_spread**2
            for k in range(m):
                s = s2[where[k]]
                g = share[k] * np.exp(x - y * s)
                mu = g * mean[k]
                v = noise[j] + scatter * mu * mu + g * g * variance[k]
                residual = value[k] - mu
                z = abs(residual) / np.sqrt(v)
                w = mu * mu / v * (1.0 if z <= _HUBER else _HUBER / z)
                a00 += w
                a01 -= w * s
                a11 += w * s * s
                c0 += w * residual / mu
                c1 -= w * s * residual / mu
            determinant = a00 * a11 - a01 * a01
            dx = (c0 * a11 - c1 * a01) / determinant
            dy = (a00 * c1 - a01 * c0) / determinant
            x += min(max(dx, -1.0), 1.0)
            y += min(max(dy, -30.0), 30.0)
            if abs(dx) < 1e-4 and abs(dy) < 1e-3:
                break
        new_log[j], new_b[j] = x, y
        variances[0, j], variances[1, j] = a11 / determinant, a00 / determinant
        cc[j] = _normalised_correlation(m, value, mean, share, where, x, y, noise[j], s2, level)
    return new_log, new_b, variances, cc, n_common


@njit(cache=True, nogil=True)
def _normalised_correlation(m, value, mean, share, where, x, y, noise, s2, level):  # pragma: no cover - compiled
    """Weighted, of intensities relative to their resolution's mean: the common fall-off is no likeness."""
    n, sa, sb, saa, sbb, sab = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for k in range(m):
        expected = share[k] * np.exp(x - y * s2[where[k]]) * level[where[k]]
        w = 1.0 / (1.0 + noise / (expected * expected))
        a, c = min(value[k] / expected, _MOST_RELATIVE), min(mean[k] / level[where[k]], _MOST_RELATIVE)
        n, sa, sb = n + w, sa + w * a, sb + w * c
        saa, sbb, sab = saa + w * a * a, sbb + w * c * c, sab + w * a * c
    scale = (saa - sa * sa / n) * (sbb - sb * sb / n)
    return (sab - sa * sb / n) / np.sqrt(scale) if scale > 0 else np.nan


@njit(cache=True, nogil=True)
def _judge(
    start,
    slot,
    intensity,
    noise,
    s2,
    part,
    log_scale,
    b,
    is_in,
    is_outlier,
    reference,
    scatter,
    sums,
    weights,
    numbers,
    sigma2,
):  # pragma: no cover - compiled
    """Which observations are outliers, and c² from all others that are well above noise; 0 if there are none."""
    found, total, n_strong = np.zeros(len(slot), np.bool_), 0.0, 0
    for j in range(len(start) - 1):
        if not is_in[j]:
            continue
        for i in range(start[j], start[j + 1]):
            h = slot[i]
            if h < 0:
                continue
            g = part[i] * np.exp(log_scale[j] - b[j] * s2[h])
            r, v, others = _without_own(
                i, h, j, intensity, g, noise, not is_outlier[i], reference, scatter, sums, weights, numbers
            )
            if others < 1:
                continue
            x = intensity[i] / g
            # An outlier's own count makes its noise: without this, all strong spots of a weak crystal would be some.
            own = max(noise[j], sigma2[i]) / (g * g)
            expected = max(r, 0.0)
            residual2 = (x - r) ** 2
            if others >= OUTLIER_FEWEST and residual2 > OUTLIER_SIGMA**2 * (own + scatter * expected**2 + v):
                found[i] = True
            elif others >= 3 and r > 3 * np.sqrt(noise[j]) / g:
                total += min((residual2 - noise[j] / (g * g) - v) / (r * r), 25.0)
                n_strong += 1
    return found, total / n_strong if n_strong else 0.0


@njit(cache=True, nogil=True)
def _merge(
    start, slot, intensity, noise, s2, part, log_scale, b, is_in, is_outlier, reference, scatter, found, half, sigma2, n
):  # pragma: no cover - compiled
    """By half set and mate: sums, weights, numbers; and over both Σ w² (x − mean)² and Σ w² σ²/g², over (Σ w)²."""
    sums, weights, numbers = np.zeros((2, n)), np.zeros((2, n)), np.zeros((2, n), np.int64)
    spread, counting = np.zeros(n), np.zeros(n)
    for is_second in (False, True):
        for j in range(len(start) - 1):
            if not is_in[j]:
                continue
            for i in range(start[j], start[j + 1]):
                h, at = slot[i], found[i]
                if h < 0 or is_outlier[i]:
                    continue
                g = part[i] * np.exp(log_scale[j] - b[j] * s2[h])
                w, x = _weight(noise[j], g, reference[h], scatter), intensity[i] / g
                if is_second:
                    mean = (sums[0, at] + sums[1, at]) / (weights[0, at] + weights[1, at])
                    spread[at] += (w * (x - mean)) ** 2
                    counting[at] += w * w * sigma2[i] / (g * g)
                else:
                    sums[half[j], at] += w * x
                    weights[half[j], at] += w
                    numbers[half[j], at] += 1
    return sums, weights, numbers, spread, counting
