"""Bragg peaks of one frame by radial statistics (peakfinder8, Barty et al. 2014).

Background is taken to depend on the distance from the beam alone. Pixels well above the
statistics of their ring are candidates; touching candidates form a peak; a peak counts if its
size and its signal over the noise of its neighbourhood are in bounds.

A `PeakFinder` holds what depends on detector, mask and parameters, and is called per frame;
it keeps no state between calls and may be shared by threads.

A frame is searched in pieces of rows: one comparison, many pixels at a time, with the lowest limit of the rings a
piece crosses tells for nearly all pieces that nothing in them can be above its own. The others are looked at pixel by
pixel, with the same result as if all were.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from storage.errors import BadFrame, BadRecipe, ShapeMismatch
from storage.geometry import Geometry
from tasks.ring_statistics import RingStatistics

__all__ = [
    "PEAK_DTYPE",
    "PeakFinder",
    "PeakParams",
    "check_pixel_counts",
    "largest_count",
    "panel_bounds",
    "searchable",
    "strongest",
]

PEAK_DTYPE = np.dtype(
    [
        ("x", "f8"),
        ("y", "f8"),
        ("intensity", "f4"),
        ("snr", "f4"),
        ("n_pixels", "i4"),
        ("max_value", "f4"),
        ("background", "f4"),
        ("panel", "i4"),
    ]
)
# Pixels of a piece of a row, compared at a time.
_PIECE = 128
# The spread given to a neighbourhood without any usable pixel, counts; as peakfinder8 has it.
_EMPTY_SIGMA = 0.01


@dataclass(frozen=True)
class PeakParams:
    """What counts as a peak; names and meaning as in peakfinder8.

    threshold : counts; a lower bound on the ring's own threshold. Decides where the background is
        below about one count, and must exceed the count of a lone background photon well.
    min_snr : both of a pixel over its ring, in standard deviations, and of the peak's summed
        intensity over the spread of its local background.
    min_pix_count, max_pix_count : pixels of a peak, both inclusive. Two refuse a single hot pixel.
    local_bg_radius : px; the background disc has twice this radius.
    min_res, max_res : px from the beam axis, both inclusive.
    saturation : largest trustworthy count; brighter pixels are left out. None for none.
    max_peaks : at most this many are kept, the strongest.
    sample_per_ring : 0 for statistics from every pixel; otherwise rows are left out of large rings, such that so
        many pixels of each stay: the limits become uncertain by 1/√(2n), 5 %, and the search several times as fast.
    """

    threshold: float = 8.0
    min_snr: float = 5.0
    min_pix_count: int = 2
    max_pix_count: int = 200
    local_bg_radius: int = 3
    min_res: float = 0.0
    max_res: float = float("inf")
    saturation: float | None = None
    max_peaks: int = 4096
    sample_per_ring: int = 200

    def __post_init__(self) -> None:
        check_pixel_counts(self.min_pix_count, self.max_pix_count)
        if self.min_snr <= 0 or not 1 <= self.local_bg_radius <= 50 or self.max_peaks < 1:
            raise BadRecipe(
                f"min_snr {self.min_snr}, local_bg_radius {self.local_bg_radius} and max_peaks {self.max_peaks} "
                "must be positive, the radius 1 to 50 px"
            )

    def for_binning(self, factor: int) -> "PeakParams":
        """The same search on frames binned by ``factor``: lengths and areas in px shrink, counts stay."""
        area = factor * factor
        return replace(
            self,
            min_pix_count=-(-self.min_pix_count // area),
            max_pix_count=-(-self.max_pix_count // area),
            local_bg_radius=-(-self.local_bg_radius // factor),
            min_res=self.min_res / factor,
            max_res=self.max_res / factor,
        )


class PeakFinder:
    """Peak search prepared for one detector and mask.

    Parameters
    ----------
    geometry : panels and where they stand; gives the rings.
    mask : (slow, fast) of the whole frame, nonzero where a pixel is unusable.
    params : what counts as a peak.

    Attributes
    ----------
    rings : (slow, fast) uint16: 1 + whole-pixel radius; 0 for pixels that are not looked at.
    """

    def __init__(self, geometry: Geometry, mask: np.ndarray, params: PeakParams | None = None) -> None:
        self.params = params or PeakParams()
        self.shape = mask.shape
        self._panels = panel_bounds(geometry, self.shape)
        self.rings = self._ring_numbers(geometry, np.asarray(mask) != 0)
        self._statistics = RingStatistics(self.rings, self.params.sample_per_ring)
        self._pieces = _pieces(self.rings, self._panels)
        self._of_thread = threading.local()

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Peaks of one frame.

        Parameters
        ----------
        frame : (slow, fast), counts; an integer dtype or float32. The largest value of an
            unsigned dtype is a detector's mark for unusable, and NaN is too.

        Returns
        -------
        (n,) of PEAK_DTYPE, sorted by y then x. x, y: px from the frame's corner, pixel i
        spanning i to i + 1; intensity: counts above the local background; snr: intensity over the
        local background's standard deviation; max_value: the largest raw count; background: local
        mean, counts; panel: index into the geometry's panels. Empty without peaks.

        Raises
        ------
        ShapeMismatch : the frame does not have the mask's shape.
        """
        frame = searchable(frame, self.shape)
        largest = self.largest(frame.dtype)
        mean, upper = self._thresholds(frame, largest)
        limit = _as_limits(upper, frame.dtype)
        least = _least_of_ranges(limit)
        p = self.params

        def search(rows: np.ndarray) -> int:
            found: int = _search(
                frame, self.rings, self._panels, self._pieces, mean, limit, least, frame.dtype.type(largest),
                self._used(), p.min_snr, p.min_pix_count, p.max_pix_count, p.local_bg_radius, rows,
            )  # fmt: skip
            return found

        return strongest(search, p.max_peaks)

    def thresholds(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, upper) of each whole-pixel radius, counts, float64; upper is inf where none is usable."""
        mean, upper = self._thresholds(np.ascontiguousarray(frame), self.largest(frame.dtype))
        return mean[1:], upper[1:]

    def _thresholds(self, frame: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
        return self._statistics(frame, largest, self.params.threshold, self.params.min_snr)

    def _used(self) -> np.ndarray:
        """(slow, fast) uint8 of zeros, this thread's own; whoever marks pixels in it takes the marks out again."""
        used = getattr(self._of_thread, "used", None)
        if used is None:
            used = self._of_thread.used = np.zeros(self.shape, np.uint8)
        return used

    def largest(self, dtype: np.dtype) -> float:
        """Largest count to use."""
        return largest_count(dtype, self.params.saturation)

    def _ring_numbers(self, geometry: Geometry, mask: np.ndarray) -> np.ndarray:
        """(slow, fast) uint16: 1 + whole-pixel radius; 0 where masked, outside the limits or off every panel."""
        rings = np.zeros(self.shape, np.uint16)
        for i, panel in enumerate(geometry.panels):
            y, x = panel.origin
            radius = geometry.radius_px(i)
            usable = (radius >= self.params.min_res) & (radius <= self.params.max_res)
            block = rings[y : y + panel.shape[0], x : x + panel.shape[1]]
            block[...] = np.where(usable, np.minimum(np.rint(radius), 65000) + 1, 0)
        rings[mask] = 0
        return rings


def check_pixel_counts(least: int, most: int) -> None:
    """BadRecipe if no peak has at least so many pixels and at most so many."""
    if not 1 <= least <= most:
        raise BadRecipe(f"pixel counts {least} to {most} hold none; order them, from 1")


def searchable(frame: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The frame, contiguous, if a finder for masks of ``shape`` can search it; else ShapeMismatch or BadFrame."""
    if frame.shape != shape:
        raise ShapeMismatch(f"frame {frame.shape} and mask {shape} differ; make a finder for this detector")
    if frame.dtype.kind not in "uif":
        raise BadFrame(f"cannot search {frame.dtype}; give integer counts or float32")
    return np.ascontiguousarray(frame)


def strongest(search: Callable[[np.ndarray], int], max_peaks: int) -> np.ndarray:
    """A table of the strongest peaks of a search, which fills rows (n, 8) as far as they go and says how many it found.

    A frame with more peaks than fit is searched once more.
    """
    rows = np.empty((4 * max_peaks, 8))
    n_found = search(rows)
    if n_found > len(rows):
        rows = np.empty((n_found, 8))
        n_found = search(rows)
    return _as_table(rows[:n_found], max_peaks)


def largest_count(dtype: np.dtype, saturation: float | None) -> float:
    """Largest count to use; below the unsigned maximum, which detectors use as a mark."""
    ceiling = float(np.iinfo(dtype).max) - 1.0 if dtype.kind == "u" else np.inf
    if dtype == np.uint64:
        ceiling = float(2**53)
    if dtype.kind == "i":
        ceiling = float(np.iinfo(dtype).max) if dtype.itemsize < 8 else float(2**53)
    return ceiling if saturation is None else min(ceiling, float(saturation))


def panel_bounds(geometry: Geometry, shape: tuple[int, ...]) -> np.ndarray:
    """(panel, 4) int64: y0, y1, x0, x1 of each panel in the frame's array."""
    bounds = []
    for panel in geometry.panels:
        (y, x), (h, w) = panel.origin, panel.shape
        if y + h > shape[0] or x + w > shape[1]:
            raise ShapeMismatch(
                f"panel {panel.name!r} ends at {(y + h, x + w)} outside the mask's {shape}; use this geometry's mask"
            )
        bounds.append((y, y + h, x, x + w))
    return np.array(bounds, np.int64)


def _pieces(rings: np.ndarray, panels: np.ndarray) -> np.ndarray:
    """Rows in pieces of `_PIECE` pixels, panel by panel without the outermost pixels, as far as any is usable.

    Returns (n, 6) int32: panel, y, first and last x (excluded), lowest and highest ring.
    """
    found = []
    for number, (y0, y1, x0, x1) in enumerate(panels):
        inner = rings[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1]
        if not inner.size:
            continue
        at = np.arange(0, inner.shape[1], _PIECE)
        highest = np.maximum.reduceat(inner, at, axis=1)
        lowest = np.minimum.reduceat(np.where(inner == 0, np.iinfo(rings.dtype).max, inner), at, axis=1)
        y, piece = np.nonzero(highest)
        x = x0 + 1 + at[piece]
        last = np.minimum(x + _PIECE, x1 - 1)
        found.append(
            np.column_stack([np.full(len(y), number), y + y0 + 1, x, last, lowest[y, piece], highest[y, piece]])
        )
    return np.concatenate(found).astype(np.int32) if found else np.empty((0, 6), np.int32)


def _as_limits(upper: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Limits in the frame's own dtype, where a count above the limit is above the one it stands for as well."""
    if dtype.kind == "f":
        limit = upper.astype(dtype)
        return np.where(limit > upper, np.nextafter(limit, dtype.type(-np.inf)), limit)
    info = np.iinfo(dtype)
    # The next smaller float of a 64-bit maximum still fits.
    highest = float(info.max) if dtype.itemsize < 8 else np.nextafter(float(info.max), 0)
    return np.clip(np.floor(upper), float(info.min), highest).astype(dtype)


@njit(cache=True, nogil=True)
def _least_of_ranges(limit):
    """(levels, n): the least of 2^level limits from each on; two cover any range of some `_PIECE` rings."""
    n_levels = 1
    while (1 << (n_levels - 1)) <= _PIECE:
        n_levels += 1
    least = np.empty((n_levels, limit.size), limit.dtype)
    least[0] = limit
    for level in range(1, n_levels):
        step = 1 << (level - 1)
        for i in range(limit.size):
            least[level, i] = min(least[level - 1, i], least[level - 1, min(i + step, limit.size - 1)])
    return least


def _as_table(rows: np.ndarray, max_peaks: int) -> np.ndarray:
    """Rows (n, 8) in the order of PEAK_DTYPE as a table, sorted by y then x; of too many the strongest by SNR."""
    if len(rows) > max_peaks:
        rows = rows[np.argsort(-rows[:, 3], kind="stable")[:max_peaks]]
    rows = rows[np.lexsort((rows[:, 0], rows[:, 1]))]
    table = np.empty(len(rows), PEAK_DTYPE)
    for i, name in enumerate(PEAK_DTYPE.names or ()):
        table[name] = rows[:, i]
    return table


@njit(cache=True, nogil=True)
def _search(
    frame, rings, panels, pieces, mean, limit, least, largest, used,
    min_snr, min_pix, max_pix, bg_radius, rows,
):  # fmt: skip
    """Grow, size and measure peaks in raster order; returns how many, of which those that fit are in rows.

    `used` is zeros on entry and again at the end; meanwhile 1 for a pixel of a grown peak, kept or not.
    """
    n_found, n_used = 0, 0
    stack, touched = np.empty((64, 2), np.int32), np.empty((4096, 2), np.int32)
    member = np.empty((max_pix, 2), np.int32)
    for i in range(pieces.shape[0]):
        p, y, x_first, x_last = pieces[i, 0], pieces[i, 1], pieces[i, 2], pieces[i, 3]
        if not _may_hold_peak(frame[y, x_first:x_last], _least(least, pieces[i, 4], pieces[i, 5]), largest):
            continue
        y0, y1, x0, x1 = panels[p]
        for x in range(x_first, x_last):
            v = frame[y, x]
            if rings[y, x] == 0 or not (v > limit[rings[y, x]] and v <= largest) or used[y, x]:
                continue
            n, stack = _grow(frame, rings, limit, largest, used, y, x, y0, y1, x0, x1, member, stack)
            if n_used >= 0:
                n_used, touched = _remember(touched, n_used, member, n)
            if n < min_pix or n > max_pix:
                continue
            is_kept = _measure(
                frame, rings, mean, limit, largest, used, member[:n], y0, y1, x0, x1, bg_radius, min_snr, rows, n_found
            )  # fmt: skip
            if is_kept:
                if n_found < rows.shape[0]:
                    rows[n_found, 7] = p
                n_found += 1
    if n_used < 0:
        used[:] = 0
    for i in range(n_used):
        used[touched[i, 0], touched[i, 1]] = 0
    return n_found


@njit(cache=True, nogil=True)
def _least(least, low, high):
    """The least limit of the rings from low to high, both included; those of a piece are near each other."""
    level = 0
    while (2 << level) <= high - low + 1 and level + 1 < least.shape[0]:
        level += 1
    if (2 << level) < high - low + 1:  # rings of a tilted detector, far apart
        return least[0, low : high + 1].min()
    return min(least[level, low], least[level, high + 1 - (1 << level)])


@njit(cache=True, nogil=True)
def _may_hold_peak(piece, limit, largest):
    """Whether any pixel is above the limit, and not too large; without a branch, so that many are compared at once."""
    found = False
    for i in range(piece.size):
        found |= (piece[i] > limit) & (piece[i] <= largest)
    return found


@njit(cache=True, nogil=True)
def _remember(touched, n_used, member, n):
    """Note the pixels of a grown peak; -1 when they are too many to note, and all marks must be taken out."""
    if n > member.shape[0] or n_used + n > 65536:
        return -1, touched
    if n_used + n > touched.shape[0]:
        larger = np.empty((2 * (n_used + n), 2), np.int32)
        larger[:n_used] = touched[:n_used]
        touched = larger
    touched[n_used : n_used + n] = member[:n]
    return n_used + n, touched


@njit(cache=True, nogil=True)
def _grow(frame, rings, limit, largest, used, y, x, y0, y1, x0, x1, member, stack):
    """Flood fill over 8 neighbours inside the panel; the first pixels that fit are put in `member`."""
    stack[0, 0], stack[0, 1] = y, x
    used[y, x] = 1
    n, top = 0, 1
    while top:
        top -= 1
        cy, cx = stack[top, 0], stack[top, 1]
        if n < member.shape[0]:
            member[n, 0], member[n, 1] = cy, cx
        n += 1
        for ny in range(max(cy - 1, y0 + 1), min(cy + 2, y1 - 1)):
            for nx in range(max(cx - 1, x0 + 1), min(cx + 2, x1 - 1)):
                v = frame[ny, nx]
                if used[ny, nx] or rings[ny, nx] == 0 or not (v > limit[rings[ny, nx]] and v <= largest):
                    continue
                used[ny, nx] = 1
                if top == stack.shape[0]:
                    larger = np.empty((2 * top, 2), np.int32)
                    larger[:top] = stack
                    stack = larger
                stack[top, 0], stack[top, 1] = ny, nx
                top += 1
    return n, stack


@njit(cache=True, nogil=True)
def _measure(frame, rings, mean, limit, largest, used, member, y0, y1, x0, x1, bg_radius, min_snr, rows, at):
    """Background, intensity, SNR and centroid of a grown peak; False where the peak is refused."""
    total, sum_x, sum_y, peak = 0.0, 0.0, 0.0, -np.inf
    for i in range(member.shape[0]):
        y, x = member[i, 0], member[i, 1]
        v = float(frame[y, x])
        total += v
        sum_x += v * x
        sum_y += v * y
        peak = max(peak, v)
    if total <= 0:
        return False
    cx, cy = sum_x / total, sum_y / total
    b, sigma, highest = _background(
        frame, rings, mean, limit, largest, used, int(np.rint(cy)), int(np.rint(cx)), y0, y1, x0, x1, 2 * bg_radius
    )
    intensity = total - b * member.shape[0]
    snr = intensity / sigma
    if snr < min_snr or peak < highest:
        return False
    if at < rows.shape[0]:
        rows[at, 0], rows[at, 1] = cx + 0.5, cy + 0.5
        rows[at, 2], rows[at, 3], rows[at, 4] = intensity, snr, member.shape[0]
        rows[at, 5], rows[at, 6] = peak, b
    return True


@njit(cache=True, nogil=True)
def _background(frame, rings, mean, limit, largest, used, cy, cx, y0, y1, x0, x1, radius):
    """Mean, standard deviation and maximum of the quiet pixels in a disc."""
    n, total, squares, highest = 0, 0.0, 0.0, -np.inf
    for y in range(max(cy - radius, y0), min(cy + radius + 1, y1)):
        for x in range(max(cx - radius, x0), min(cx + radius + 1, x1)):
            if (y - cy) ** 2 + (x - cx) ** 2 > radius * radius or rings[y, x] == 0 or used[y, x]:
                continue
            v = float(frame[y, x])
            if v > largest or not frame[y, x] <= limit[rings[y, x]]:
                continue
            n += 1
            total += v
            squares += v * v
            highest = max(highest, v)
    if n == 0:
        return mean[rings[cy, cx]], _EMPTY_SIGMA, -np.inf
    b = total / n
    sd = np.sqrt(max(0.0, squares / n - b * b))
    return b, max(sd, _EMPTY_SIGMA), highest
