"""How much of each reflection a still caught, from how far it was predicted from the Ewald sphere.

The share that is caught falls with the excitation error e like a Gaussian, of a width that grows with resolution,

    p = exp(−e² / 2s²),    s² = r² + (η / d)²

with the radius r of a reciprocal lattice point and the mosaic spread η, common to all crystals. Both are read off the
data: among observations of scaled crystals, the ratio to the merge at each e. Whether this describes what was
measured is judged by the crystals themselves: unless they correlate better with each other, it is not used.

Source: the model of White et al. 2013, Acta Cryst. D69, 1231 and Rossmann 1979, J. Appl. Cryst. 12, 225; its widths
from the ratios are our own.
"""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from storage.models import Record
from tasks.observations import Observations
from tasks.scale_crystals import CrystalScales, scale_crystals

__all__ = ["PartialityReport", "model_partiality"]

_ROUNDS = 2
# A better correlation that costs more crystals than that is none.
_KEPT = 0.9
_N_SHELLS, _N_BINS = 6, 12
_FEWEST_IN_SHELL, _FEWEST_BINS = 300, 4
# Bins in which less than this share of the largest is left show what is beside the model, such as background.
_LEAST_SHARE, _LEAST_SIGNAL = 0.15, 3.0


class PartialityReport(Record):
    """What modelling partialities came to."""

    is_used: bool = Field(description="crystals correlate better with each other for it")
    radius: float | None = Field(description="1/Å, of a reciprocal lattice point; null where the data do not show one")
    mosaic_spread: float | None = Field(description="rad")
    cc_without: float | None = Field(description="mean correlation of a crystal with the merge of the others, without")
    cc_with: float | None = Field(description="and with it")


@dataclass(frozen=True)
class _Widths:
    radius2: float
    spread2: float

    def partiality(self, observations: Observations) -> np.ndarray:
        """(n,); 1 where the excitation is not known."""
        s2 = self.radius2 + self.spread2 / np.where(observations.found >= 0, _d(observations), np.inf) ** 2
        p = np.exp(-0.5 * observations.excitation**2 / s2)
        return np.where(np.isfinite(p), p, 1.0)


def model_partiality(observations: Observations, scales: CrystalScales) -> tuple[CrystalScales, PartialityReport]:
    """The same crystals scaled with modelled partialities, or as they were if that makes them no more alike.

    Parameters
    ----------
    scales : of `scale_crystals`, without partialities.
    """
    before, widths, modelled = scales.report().mean_cc, None, scales
    for _ in range(_ROUNDS):
        found = _fit_widths(observations, modelled)
        if found is None:
            break
        widths = found
        modelled = scale_crystals(observations, widths.partiality(observations))
    after = modelled.report().mean_cc if widths is not None else None
    n_before, n_after = scales.is_scaled.sum(), modelled.is_scaled.sum()
    is_used = before is not None and after is not None and after > before and bool(n_after >= _KEPT * n_before)
    report = PartialityReport(
        is_used=is_used,
        radius=widths.radius2**0.5 if widths else None,
        mosaic_spread=widths.spread2**0.5 if widths else None,
        cc_without=before,
        cc_with=after,
    )
    return (modelled if is_used else scales), report


def _d(observations: Observations) -> np.ndarray:
    return observations.unique.d[np.maximum(observations.found, 0) // 2]


def _fit_widths(observations: Observations, scales: CrystalScales) -> _Widths | None:
    """r² and η² from the widths in shells of resolution; None where no shell shows one."""
    usable = (observations.found >= 0) & np.isfinite(observations.excitation) & ~scales.is_outlier
    at = np.flatnonzero(usable & observations.per_observation(scales.is_scaled))
    d, e2 = _d(observations)[at], observations.excitation[at] ** 2
    log_g = observations.per_observation(scales.log_scale)[at]
    g = np.exp(log_g - observations.per_observation(scales.b_factor)[at] * 0.5 / d**2)
    reference = np.maximum(scales.reference[observations.found[at] // 2], 0.0)
    noise = observations.per_observation(scales.noise)[at] / g**2
    weight = 1 / (noise + scales.scatter * reference**2)
    ratio, ratio_weight = weight * observations.intensity[at] / g * reference, weight * reference**2
    points = []
    for shell in np.array_split(np.argsort(-d, kind="stable"), _N_SHELLS):
        if len(shell) >= _FEWEST_IN_SHELL and (slope := _slope(e2[shell], ratio[shell], ratio_weight[shell])):
            value, error = slope
            # s² = 1 / 2a of exp(−a e²), with the error that follows.
            points.append((float((1 / d[shell] ** 2).mean()), 0.5 / value, 0.5 * error / value**2))
    return _line(np.array(points)) if points else None


def _slope(e2: np.ndarray, ratio: np.ndarray, weight: np.ndarray) -> tuple[float, float] | None:
    """a in exp(−a e²), and its error; None where nothing falls off."""
    bins = np.array_split(np.argsort(e2, kind="stable"), _N_BINS)
    x, y, w = (np.array([v[b].sum() for b in bins]) for v in (e2, ratio, weight))
    x = x / np.array([len(b) for b in bins])
    with np.errstate(invalid="ignore", divide="ignore"):
        share, error = y / w, 1 / np.sqrt(w)
        good = (share > _LEAST_SIGNAL * error) & (share > _LEAST_SHARE * np.nanmax(share))
    if np.count_nonzero(good) < _FEWEST_BINS:
        return None
    x, share, error = x[good], share[good], error[good]
    weights = (share / error) ** 2
    centred = x - np.average(x, weights=weights)
    spread = float((weights * centred**2).sum())
    if spread <= 0:
        return None
    a, a_error = -float((weights * centred * np.log(share)).sum()) / spread, spread**-0.5
    return (a, a_error) if a > _LEAST_SIGNAL * a_error else None


def _line(points: np.ndarray) -> _Widths:
    """s² = r² + η² / d², neither negative."""
    x, s2, error = points.T
    w = 1 / error**2
    mean_x, mean_y = np.average(x, weights=w), np.average(s2, weights=w)
    spread = float((w * (x - mean_x) ** 2).sum())
    slope = float((w * (x - mean_x) * (s2 - mean_y)).sum()) / spread if len(x) > 1 and spread > 0 else 0.0
    if slope <= 0:
        return _Widths(float(mean_y), 0.0)
    if mean_y - slope * mean_x <= 0:
        return _Widths(0.0, float((w * x * s2).sum() / (w * x * x).sum()))
    return _Widths(float(mean_y - slope * mean_x), slope)
