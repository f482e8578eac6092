"""How fast mean intensities fall off with resolution (Wilson 1942, Nature 150, 152).

The mean intensity at a resolution goes as exp(−2B s²) with s = 1/(2d), so its logarithm over s² is a line of slope −2B
beyond about 4 Å; nearer to the beam the solvent bends it. The atoms' own scattering factors are left in, because the
content of the cell is not known here: B is that of the intensities, a little above that of the atoms.
"""

import numpy as np
from pydantic import Field

from storage.models import Record

__all__ = ["WilsonPlot", "wilson_plot"]

_N_BINS, _FEWEST_IN_BIN = 20, 20
# Å: from here on the plot is a line; and the least span of 1/(4d²) on which a slope means something, 4 to 2.9 Å.
_LINEAR_BELOW, _LEAST_SPAN = 4.0, 0.014
_FEWEST_BINS = 4
# A mean below so many of its standard errors has no logarithm worth fitting.
_LEAST_SIGNAL = 3.0


class WilsonPlot(Record):
    """ln of the mean intensity over 1/(4d²), and a line through it."""

    s_squared: tuple[float, ...] = Field(description="1/Å²: 1/(4d²), in the middle of each bin")
    ln_mean_intensity: tuple[float, ...]
    b_factor: float | None = Field(description="Å², from the slope beyond 4 Å; null where there is too little of it")
    ln_intercept: float | None = Field(description="of the line, at 1/(4d²) = 0")


def wilson_plot(d: np.ndarray, intensity: np.ndarray) -> WilsonPlot:
    """The plot of merged intensities.

    Parameters
    ----------
    d : (n,), Å. intensity : (n,), any scale. Bins hold equal numbers of reflections; bins without signal are left out.
    """
    order = np.argsort(-d, kind="stable")
    s_squared, intensity = 0.25 / d[order] ** 2, intensity[order]
    bins = np.array_split(np.arange(len(d)), max(min(_N_BINS, len(d) // _FEWEST_IN_BIN), 1))
    points = [(s_squared[b].mean(), *_mean_with_error(intensity[b])) for b in bins if len(b) >= _FEWEST_IN_BIN]
    x, mean, error = np.array([p for p in points if p[1] > _LEAST_SIGNAL * p[2] > 0]).reshape(-1, 3).T
    plot = WilsonPlot(
        s_squared=tuple(x.tolist()), ln_mean_intensity=tuple(np.log(mean).tolist()), b_factor=None, ln_intercept=None
    )
    is_linear = x > 0.25 / _LINEAR_BELOW**2
    if np.count_nonzero(is_linear) < _FEWEST_BINS or np.ptp(x[is_linear]) < _LEAST_SPAN:
        return plot
    slope, intercept = np.polyfit(x[is_linear], np.log(mean[is_linear]), 1, w=(mean / error)[is_linear])
    return plot.model_copy(update={"b_factor": float(-slope / 2), "ln_intercept": float(intercept)})


def _mean_with_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / np.sqrt(len(values)))
