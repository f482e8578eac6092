"""Intensities of predicted spots by summation in three rings (White et al. 2013).

The peak is the disc within r1 of the predicted pixel, its background the ring between r2 and r3
without unusable pixels and without the peak discs of other predictions. The mean background is
subtracted, not the median: at a fraction of a count per pixel the median is 0 and the sum biased.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numba import njit

from storage.errors import BadFrame, BadRecipe, ShapeMismatch
from storage.geometry import Geometry

__all__ = ["REFLECTION_DTYPE", "Integration", "IntegrationParams", "integrate_spots"]

REFLECTION_DTYPE = np.dtype(
    [
        ("h", "i4"),
        ("k", "i4"),
        ("l", "i4"),
        ("intensity", "f4"),
        ("sigma", "f4"),
        ("peak", "f4"),
        ("background", "f4"),
        ("x", "f8"),
        ("y", "f8"),
        ("excitation", "f4"),
        ("panel", "i4"),
    ]
)
_KEPT, _MASKED, _SATURATED, _IMPLAUSIBLE = 0, 1, 2, 3


@dataclass(frozen=True)
class IntegrationParams:
    """Rings and the error model.

    inner, middle, outer : px; peak within inner, background from middle to outer.
    gain : detector counts per photon; 1 for a counting detector.
    saturation : largest trustworthy count. None for none.
    min_background_pixels : fewer give no estimate, and the spot is left out as masked.
    implausible_sigma : a spot more negative than so many sigma is left out.
    """

    inner: float = 3.0
    middle: float = 4.0
    outer: float = 6.0
    gain: float = 1.0
    saturation: float | None = None
    min_background_pixels: int = 10
    implausible_sigma: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.inner <= self.middle < self.outer <= 60 or self.gain <= 0:
            raise BadRecipe(
                f"rings {self.inner}, {self.middle}, {self.outer} px must rise and gain {self.gain} exceed 0; try 3,4,6"
            )

    def for_binning(self, factor: int) -> "IntegrationParams":
        """The same rings on frames binned by ``factor``; at least 1, 2 and 3 px."""
        inner, middle = max(1.0, self.inner / factor), max(2.0, self.middle / factor)
        return replace(self, inner=inner, middle=middle, outer=max(middle + 1.0, self.outer / factor))


@dataclass(frozen=True)
class Integration:
    """What came of the predictions of one crystal.

    reflections : (n,) of REFLECTION_DTYPE in the order of the predictions; intensity and sigma in
        counts; peak, the highest raw count in the disc; background, mean counts per pixel.
    n_masked, n_saturated, n_implausible : predictions left out, and why.
    """

    reflections: np.ndarray
    n_masked: int
    n_saturated: int
    n_implausible: int


def integrate_spots(
    frame: np.ndarray,
    mask: np.ndarray,
    predictions: np.ndarray,
    geometry: Geometry,
    params: IntegrationParams | None = None,
    neighbours: np.ndarray | None = None,
) -> Integration:
    """Sum the spots of one crystal.

    Parameters
    ----------
    frame : (slow, fast), counts. mask : same shape, nonzero where unusable.
    predictions : PREDICTION_DTYPE, see `predict_spots`.
    neighbours : predictions of the frame's other crystals; their peaks are kept out of backgrounds.

    Notes
    -----
    I = sum of the m peak pixels - m b. sigma² = g max(|I|, g) + m v + m² v / n, with the background's
    mean b, variance v and pixel number n; the last term is the error of b itself.
    """
    p = params or IntegrationParams()
    if frame.shape != mask.shape:
        raise ShapeMismatch(f"frame {frame.shape} and mask {mask.shape} differ; use this detector's mask")
    if frame.dtype.kind not in "uif":
        raise BadFrame(f"cannot integrate {frame.dtype}; give integer counts or float32")
    x, y = predictions["x"].astype(np.int64), predictions["y"].astype(np.int64)
    disc, ring = _offsets(-1.0, p.inner), _offsets(p.middle, p.outer)
    bounds = np.array(
        [(q.origin[0], q.origin[0] + q.shape[0], q.origin[1], q.origin[1] + q.shape[1]) for q in geometry.panels]
    )
    covered = np.zeros(frame.shape, np.bool_)
    _cover(covered, x, y, bounds[predictions["panel"]], disc)
    if neighbours is not None:
        _cover(
            covered,
            neighbours["x"].astype(np.int64),
            neighbours["y"].astype(np.int64),
            bounds[neighbours["panel"]],
            disc,
        )
    values, fate = np.empty((len(x), 4)), np.empty(len(x), np.uint8)
    # A mask of bytes, as the steps have it, is taken as it is: converting it costs as much as the sums.
    unusable = mask if mask.dtype == np.uint8 else mask != 0
    _sum_rings(
        np.ascontiguousarray(frame), unusable, covered, x, y, bounds[predictions["panel"]],
        disc, ring, p.gain, _largest(frame.dtype, p.saturation), p.min_background_pixels, p.implausible_sigma,
        values, fate,
    )  # fmt: skip
    return Integration(
        _as_table(predictions[fate == _KEPT], values[fate == _KEPT]),
        *(int((fate == why).sum()) for why in (_MASKED, _SATURATED, _IMPLAUSIBLE)),
    )


def _largest(dtype: np.dtype, saturation: float | None) -> float:
    """Largest count to use; the unsigned maximum is a detector's mark for unusable."""
    ceiling = float(np.iinfo(dtype).max) - 1 if dtype.kind == "u" else np.inf
    return ceiling if saturation is None else min(ceiling, float(saturation))


@lru_cache(maxsize=16)
def _offsets(inner: float, outer: float) -> np.ndarray:
    """(n, 2) int64: steps (y, x) to the pixels farther than inner and within outer."""
    reach = int(outer)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    distance = np.hypot(x, y)
    inside = (distance > inner) & (distance <= outer)
    return np.column_stack([y[inside], x[inside]]).astype(np.int64)


def _as_table(predictions: np.ndarray, values: np.ndarray) -> np.ndarray:
    table = np.empty(len(predictions), REFLECTION_DTYPE)
    for name in ("h", "k", "l", "x", "y", "excitation", "panel"):
        table[name] = predictions[name]
    for i, name in enumerate(("intensity", "sigma", "peak", "background")):
        table[name] = values[:, i]
    return table


@njit(cache=True, nogil=True)
def _cover(covered, x, y, bounds, disc):
    """Mark the pixels of every peak disc, which ends where its panel does."""
    for i in range(x.size):
        for j in range(disc.shape[0]):
            v, u = y[i] + disc[j, 0], x[i] + disc[j, 1]
            if bounds[i, 0] <= v < bounds[i, 1] and bounds[i, 2] <= u < bounds[i, 3]:
                covered[v, u] = True


@njit(cache=True, nogil=True)
def _sum_rings(
    frame, mask, covered, x, y, bounds, disc, ring, gain, largest, min_background, implausible, values, fate
):
    """Intensity, sigma, peak and background of each spot, and its fate."""
    for i in range(x.size):
        n, total, squares = 0, 0.0, 0.0
        for j in range(ring.shape[0]):
            v, u = y[i] + ring[j, 0], x[i] + ring[j, 1]
            if v < bounds[i, 0] or v >= bounds[i, 1] or u < bounds[i, 2] or u >= bounds[i, 3]:
                continue
            count = float(frame[v, u])
            # the last test also leaves NaN out
            if mask[v, u] or covered[v, u] or not count <= largest:
                continue
            n += 1
            total += count
            squares += count * count
        fate[i] = _KEPT if n >= min_background else _MASKED
        signal, highest = 0.0, -np.inf
        for j in range(disc.shape[0]):
            v, u = y[i] + disc[j, 0], x[i] + disc[j, 1]
            if v < bounds[i, 0] or v >= bounds[i, 1] or u < bounds[i, 2] or u >= bounds[i, 3] or mask[v, u]:
                fate[i] = _MASKED
                break
            count = float(frame[v, u])
            if not count <= largest:
                fate[i] = _SATURATED
                break
            signal += count
            highest = max(highest, count)
        if fate[i] != _KEPT:
            continue
        m, b = disc.shape[0], total / n
        variance = max(0.0, squares / n - b * b) * n / max(n - 1, 1)
        intensity = signal - m * b
        sigma = np.sqrt(gain * max(abs(intensity), gain) + m * variance + m * m * variance / n)
        if intensity < -implausible * sigma:
            fate[i] = _IMPLAUSIBLE
            continue
        values[i, 0], values[i, 1], values[i, 2], values[i, 3] = intensity, sigma, highest, b
