"""Parameters of the peak search from the frames themselves: bad pixels, thresholds, and where hits begin.

A `PixelSurvey` looks at some hundred frames; what it says rests on counting statistics, and each choice has a stated
rate of error:

* A pixel is **hot** if it is above the limit of its ring in more frames than chance and crystals explain (one good
  pixel in 10⁹ would be), **cold** if its sum over all frames is less than half of what its ring has, and that
  improbable as well. Pixels behind a beamstop are cold, too.
* The **threshold** is the least at which pairs of neighbouring background photons make less than one false peak in ten
  frames.
* The **hit cut** is the number of peaks that a frame without a crystal reaches once in ten thousand frames.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy import stats

from storage.errors import BadRecipe
from storage.geometry import Geometry
from tasks.find_peaks import PeakFinder, PeakParams

__all__ = ["BadPixels", "HitCut", "PixelSurvey", "hit_cut"]

# Of good pixels, so many may be taken for bad ones by chance.
_CHANCE = 1e-9
_FEWEST_HIGH = 3
# A sum that small is expected of a good pixel once in 10⁹: nothing can be said of darker rings.
_FEWEST_COUNTS = 20.0
_COLD = 0.5
_FALSE_PEAKS_PER_FRAME = 0.1
_NEIGHBOURS = 4
_LARGEST_THRESHOLD = 10_000
_FALSE_HITS = 1e-4
# No fewer spots can be indexed.
_FEWEST_PEAKS = 8
_FEWEST_FRAMES = 20
# Heaps of hits and blanks are parted if the one has so many times the peaks of the other, and some more.
_FAR, _MOST_ROUNDS = 3.0, 20


@dataclass(frozen=True)
class BadPixels:
    """(slow, fast) bool each."""

    hot: np.ndarray
    cold: np.ndarray

    @property
    def any(self) -> np.ndarray:
        return np.asarray(self.hot | self.cold)


@dataclass(frozen=True)
class HitCut:
    """Where hits begin.

    min_peaks : a frame with at least so many is a hit. n_hits : of the frames looked at. blank_mean : peaks of a frame
    without a crystal. false_hits : expected share of blank frames above the cut.
    """

    min_peaks: int
    n_hits: int
    blank_mean: float
    false_hits: float


class PixelSurvey:
    """What each pixel and each ring did over some frames. To be used from one thread.

    Parameters
    ----------
    mask : (slow, fast), nonzero where a pixel is known to be unusable. params : a first guess; its `min_snr` is kept.
    """

    def __init__(self, geometry: Geometry, mask: np.ndarray, params: PeakParams) -> None:
        self._finder, self._params = PeakFinder(geometry, mask, params), params
        self.rings = self._finder.rings
        self.n_rings = int(self.rings.max(initial=0)) + 1
        self.n_frames = 0
        self._sum = np.zeros(mask.shape, np.float64)
        self._n_high = np.zeros(mask.shape, np.uint32)
        self._means: list[np.ndarray] = []

    def add(self, frame: np.ndarray) -> None:
        """Look at one more frame, (slow, fast) counts."""
        mean, _ = self._finder.thresholds(frame)
        mean = np.concatenate([[0.0], mean])
        # Plain counting statistics, not the ring's own spread: flickering pixels would widen that.
        limit = mean + self._params.min_snr * np.sqrt(np.maximum(mean, 0.2))
        _survey(
            np.ascontiguousarray(frame), self.rings, limit, self._finder.largest(frame.dtype), self._sum, self._n_high
        )
        self._means.append(mean)
        self.n_frames += 1

    def background(self) -> np.ndarray:
        """(n_rings,) counts per pixel: what 9 in 10 frames stay below; NaN for rings that have no usable pixel."""
        self._require_frames()
        level = np.percentile(np.array(self._means), 90, axis=0)
        return np.where(np.bincount(self.rings.ravel(), minlength=self.n_rings) > 0, level, np.nan)

    def bad_pixels(self) -> BadPixels:
        """Pixels that are improbable among those of their ring."""
        self._require_frames()
        ring = self.rings
        usable = ring > 0
        count = np.bincount(ring[usable], minlength=self.n_rings)
        expected_high = np.bincount(ring[usable], self._n_high[usable], self.n_rings) / np.maximum(count, 1)
        expected_sum = np.mean(np.array(self._means), axis=0) * self.n_frames
        # One look-up for each ring, not one probability for each pixel.
        most_high = np.maximum(stats.poisson.isf(_CHANCE, np.maximum(expected_high, 1e-12)), _FEWEST_HIGH - 1)
        least_sum = np.minimum(_COLD * expected_sum, stats.poisson.ppf(_CHANCE, np.maximum(expected_sum, 1e-12)))
        least_sum[expected_sum < _FEWEST_COUNTS] = -1.0
        return BadPixels(usable & (self._n_high > most_high[ring]), usable & (self._sum <= least_sum[ring]))

    def threshold(self) -> float:
        """Counts: the least with which background alone makes fewer than one false peak in ten frames."""
        level = np.nan_to_num(self.background())
        n_pixels = np.bincount(self.rings.ravel(), minlength=self.n_rings).astype(float)
        n_pixels[0] = 0.0
        own = np.floor(level + self._params.min_snr * np.sqrt(level))
        for threshold in range(1, _LARGEST_THRESHOLD):
            # A peak of two pixels: a bright one beside another.
            p = stats.poisson.sf(np.maximum(own, threshold), np.maximum(level, 1e-12))
            if (_NEIGHBOURS * n_pixels * p * p).sum() <= _FALSE_PEAKS_PER_FRAME:
                return float(threshold)
        raise BadRecipe("no threshold parts peaks from this background; is the detector saturated or uncovered?")

    def _require_frames(self) -> None:
        if self.n_frames < _FEWEST_FRAMES:
            raise BadRecipe(f"{self.n_frames} frames are too few to tell what is usual; take {_FEWEST_FRAMES} or more")


def hit_cut(n_peaks: np.ndarray) -> HitCut:
    """Where hits begin, from the numbers of peaks of many frames, hits and blanks.

    Blanks are first the lower of two heaps (least variance of log(1 + n) within them, Otsu 1979) if these are far
    apart, else the lower three quarters of all; then, until nothing changes, those below the number that a blank
    reaches in one of 10⁴: by a Poisson law of their mean, or where they scatter more, a negative binomial one.
    """
    counts = np.sort(np.asarray(n_peaks))
    blanks = counts[: _first_blanks(counts)]
    reached = _reached(blanks)
    for _ in range(_MOST_ROUNDS):
        blanks = counts[counts <= reached]
        before, reached = reached, _reached(blanks)
        if reached == before:
            break
    cut = max(reached + 1, _FEWEST_PEAKS)
    mean = float(blanks.mean()) if len(blanks) else 0.0
    return HitCut(cut, int((counts >= cut).sum()), mean, _FALSE_HITS)


def _first_blanks(counts: np.ndarray) -> int:
    """How many of the sorted counts are surely blanks."""
    at = _split(np.log1p(counts))
    is_parted = at < len(counts) and counts[at:].mean() > _FAR * counts[:at].mean() + _FEWEST_PEAKS
    return at if is_parted else max(3 * len(counts) // 4, 1)


def _reached(blanks: np.ndarray) -> int:
    """The number of peaks that one blank in 10⁴ reaches; of blanks without any peak, as if one in ten had one."""
    mean, variance = (max(float(blanks.mean()), 0.1), float(blanks.var())) if len(blanks) else (0.1, 0.0)
    if variance > mean:
        return int(stats.nbinom.isf(_FALSE_HITS, mean * mean / (variance - mean), mean / variance))
    return int(stats.poisson.isf(_FALSE_HITS, mean))


def _split(values: np.ndarray) -> int:
    """How many of the sorted values belong to the lower of two heaps."""
    n = len(values)
    if n < 2 or values[-1] == values[0]:
        return n
    k = np.arange(1, n)
    total, squares = np.cumsum(values), np.cumsum(values**2)
    lower = squares[:-1] - total[:-1] ** 2 / k
    upper = squares[-1] - squares[:-1] - (total[-1] - total[:-1]) ** 2 / (n - k)
    return int(k[(lower + upper).argmin()])


@njit(cache=True, nogil=True)
def _survey(frame, rings, limit, largest, total, n_high):
    """Add a frame's counts, and count pixels above the limit of their ring."""
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            v, r = float(frame[y, x]), rings[y, x]
            if r == 0:
                continue
            if v <= largest:
                total[y, x] += v
                n_high[y, x] += v > limit[r]
            else:  # saturated, or marked: not usable in this frame
                n_high[y, x] += 1
