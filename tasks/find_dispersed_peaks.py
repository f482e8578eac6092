"""Bragg peaks of one frame by the variance of each pixel's neighbourhood (Winter et al. 2018, DIALS's *dispersion*).

Counts of a smooth background have a variance equal to their mean, wherever they are: where a small window has more,
something stands out of it, and its pixels well above the window's mean belong to a peak. Nothing is taken to depend on
the distance from the beam, so shadows, jets and scatter of one side do no harm, and every peak costs a window.

`DispersionFinder` is called per frame, keeps no state between calls, and may be shared by threads.
"""

import threading
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from storage.errors import BadRecipe
from storage.geometry import Geometry
from tasks.find_peaks import check_pixel_counts, largest_count, panel_bounds, searchable, strongest

__all__ = ["DispersionFinder", "DispersionParams"]

# Usable pixels of a window from which its variance says something.
_FEWEST = 6
# The spread given to a neighbourhood without any quiet pixel, counts.
_EMPTY_SIGMA = 0.01


@dataclass(frozen=True)
class DispersionParams:
    """What counts as a peak; the first three names and meaning are DIALS's.

    sigma_background : by how many standard deviations a window's index of dispersion must exceed 1.
    sigma_strong : by how many a pixel must exceed its window's mean.
    kernel : px; a window has 2 kernel + 1 of them a side.
    threshold : counts that a pixel must exceed besides.
    gain : counts per photon.
    min_pix_count, max_pix_count : pixels of a peak, both inclusive. Two refuse a single hot pixel.
    saturation : largest trustworthy count; brighter pixels are left out. None for none.
    max_peaks : at most this many are kept, the strongest.
    """

    sigma_background: float = 6.0
    sigma_strong: float = 3.0
    kernel: int = 3
    threshold: float = 0.0
    gain: float = 1.0
    min_pix_count: int = 2
    max_pix_count: int = 200
    saturation: float | None = None
    max_peaks: int = 4096

    def __post_init__(self) -> None:
        check_pixel_counts(self.min_pix_count, self.max_pix_count)
        if not 1 <= self.kernel <= 50 or self.max_peaks < 1:
            raise BadRecipe(
                f"kernel {self.kernel} and max_peaks {self.max_peaks} must be positive, the kernel 1 to 50 px"
            )
        if min(self.sigma_background, self.sigma_strong, self.gain) <= 0:
            raise BadRecipe(
                f"sigma_background {self.sigma_background}, sigma_strong {self.sigma_strong} and gain {self.gain} must "
                "be positive"
            )

    def for_binning(self, factor: int) -> "DispersionParams":
        """The same search on frames binned by ``factor``: lengths and areas in px shrink, counts stay."""
        area = factor * factor
        return replace(
            self,
            kernel=-(-self.kernel // factor),
            min_pix_count=-(-self.min_pix_count // area),
            max_pix_count=-(-self.max_pix_count // area),
        )


class DispersionFinder:
    """Peak search prepared for one detector and mask; windows end where panels do.

    Parameters
    ----------
    mask : (slow, fast) of the whole frame, nonzero where a pixel is unusable.
    """

    def __init__(self, geometry: Geometry, mask: np.ndarray, params: DispersionParams | None = None) -> None:
        self.params, self.shape = params or DispersionParams(), mask.shape
        self._panels = panel_bounds(geometry, self.shape)
        self._bad = np.ascontiguousarray(np.asarray(mask) != 0)
        self._of_thread = threading.local()

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Peaks of one frame, as `tasks.find_peaks.PeakFinder` gives them; background and snr are of the quiet pixels
        around a peak.

        Raises
        ------
        ShapeMismatch : the frame does not have the mask's shape. BadFrame : its dtype is none of counts.
        """
        frame, p = searchable(frame, self.shape), self.params
        marks = self._marks()
        # An infinite count would stay in the sums of all rows below it.
        largest = min(largest_count(frame.dtype, p.saturation), float(np.finfo(np.float32).max))
        for y0, y1, x0, x1 in self._panels:
            _mark(frame, self._bad, marks, y0, y1, x0, x1, p.kernel, largest, p.threshold, p.gain, p.sigma_strong,
                  p.sigma_background)  # fmt: skip

        def search(rows: np.ndarray) -> int:
            found: int = _gather(
                frame, self._bad, marks, self._panels, largest, p.min_pix_count, p.max_pix_count, 2 * p.kernel, rows
            )
            if found > len(rows):
                np.minimum(marks, 1, out=marks)  # it will be gone through once more
            return found

        return strongest(search, p.max_peaks)

    def _marks(self) -> np.ndarray:
        """(slow, fast) uint8, this thread's own: 1 for a pixel that stands out, 2 once it belongs to a peak."""
        marks = getattr(self._of_thread, "marks", None)
        if marks is None:
            marks = self._of_thread.marks = np.zeros(self.shape, np.uint8)
        return marks


@njit(cache=True, nogil=True)
def _mark(frame, bad, marks, y0, y1, x0, x1, k, largest, threshold, gain, sigma_strong, sigma_background):
    """Mark the pixels of a panel that stand out: sums over columns, kept up from row to row, are summed over windows.

    Rows of a window are kept as they were added, unusable pixels as zeros, and columns have k zeros at both ends: so
    no loop but the last has a branch, and many pixels are done at a time.
    """
    width, n_rows = x1 - x0, 2 * k + 2
    values, usable = np.zeros((n_rows, width)), np.zeros((n_rows, width))
    columns, windows = np.zeros((3, width + 2 * k)), np.empty((3, width))
    stands_out = np.empty(width, np.uint8)
    needed = sigma_strong * sigma_strong * gain
    for y in range(y0 - k, y1):
        new, old = (y + k) % n_rows, (y - k - 1) % n_rows
        if y + k < y1:
            _take_row(frame[y + k, x0:x1], bad[y + k, x0:x1], largest, values[new], usable[new])
        else:
            values[new], usable[new] = 0.0, 0.0
        _slide(columns[:, k : k + width], values[new], usable[new], values[old], usable[old])
        if y < y0:
            continue
        for what in range(3):
            _sum_windows(columns[what], windows[what], 2 * k + 1)
        row, n, total, squares = frame[y, x0:x1], windows[0], windows[1], windows[2]
        _above_windows(row, n, total, needed, stands_out)
        for i in range(width):
            marks[y, x0 + i] = 0
            if not stands_out[i]:
                continue
            v = float(row[i])
            if bad[y, x0 + i] or not v <= largest or v <= threshold or n[i] < _FEWEST:
                continue
            variance = (squares[i] - total[i] * total[i] / n[i]) / (n[i] - 1)
            if variance > gain * total[i] / n[i] * (1 + sigma_background * np.sqrt(2 / (n[i] - 1))):
                marks[y, x0 + i] = 1


@njit(cache=True, nogil=True)
def _sum_windows(columns, windows, size):
    """Sums over ``size`` neighbouring columns."""
    for i in range(windows.size):
        windows[i] = columns[i]
    for step in range(1, size):
        shifted = columns[step:]
        for i in range(windows.size):
            windows[i] += shifted[i]


@njit(cache=True, nogil=True)
def _above_windows(row, n, total, needed, stands_out):
    """1 for pixels that exceed their window's mean by enough for its counts; 0 for not-a-number."""
    for i in range(row.size):
        above = float(row[i]) * n[i] - total[i]
        stands_out[i] = (above > 0) & (above * above > needed * total[i] * n[i])


@njit(cache=True, nogil=True)
def _take_row(row, bad, largest, values, usable):
    """A row of the frame as numbers, unusable pixels as zeros."""
    for i in range(row.size):
        v = float(row[i])
        is_usable = (not bad[i]) & (v <= largest)
        values[i] = v if is_usable else 0.0
        usable[i] = 1.0 if is_usable else 0.0


@njit(cache=True, nogil=True)
def _slide(columns, new, new_usable, old, old_usable):
    """Number, sum and sum of squares of each column with one row more and one less."""
    n, total, squares = columns[0], columns[1], columns[2]
    for i in range(new.size):
        n[i] += new_usable[i] - old_usable[i]
        total[i] += new[i] - old[i]
        squares[i] += new[i] * new[i] - old[i] * old[i]


@njit(cache=True, nogil=True)
def _gather(frame, bad, marks, panels, largest, min_pix, max_pix, radius, rows):
    """Grow and measure peaks in raster order; how many, of which those that fit are in rows. Leaves marks of 2."""
    n_found = 0
    stack, member = np.empty((64, 2), np.int32), np.empty((max_pix, 2), np.int32)
    for p in range(panels.shape[0]):
        y0, y1, x0, x1 = panels[p, 0], panels[p, 1], panels[p, 2], panels[p, 3]
        for y in range(y0, y1):
            for x in range(x0, x1):
                if marks[y, x] != 1:
                    continue
                n, stack = _grow(marks, y, x, y0, y1, x0, x1, member, stack)
                if n < min_pix or n > max_pix:
                    continue
                is_kept = _measure(frame, bad, marks, largest, member[:n], y0, y1, x0, x1, radius, rows, n_found)
                if is_kept:
                    if n_found < rows.shape[0]:
                        rows[n_found, 7] = p
                    n_found += 1
    return n_found


@njit(cache=True, nogil=True)
def _grow(marks, y, x, y0, y1, x0, x1, member, stack):
    """Flood fill of marks over 8 neighbours inside the panel; the first pixels that fit are put in `member`."""
    stack[0, 0], stack[0, 1] = y, x
    marks[y, x] = 2
    n, top = 0, 1
    while top:
        top -= 1
        cy, cx = stack[top, 0], stack[top, 1]
        if n < member.shape[0]:
            member[n, 0], member[n, 1] = cy, cx
        n += 1
        for ny in range(max(cy - 1, y0), min(cy + 2, y1)):
            for nx in range(max(cx - 1, x0), min(cx + 2, x1)):
                if marks[ny, nx] != 1:
                    continue
                marks[ny, nx] = 2
                if top == stack.shape[0]:
                    larger = np.empty((2 * top, 2), np.int32)
                    larger[:top] = stack
                    stack = larger
                stack[top, 0], stack[top, 1] = ny, nx
                top += 1
    return n, stack


@njit(cache=True, nogil=True)
def _measure(frame, bad, marks, largest, member, y0, y1, x0, x1, radius, rows, at):
    """Background, intensity, SNR and centroid of a grown peak; False where it has no intensity."""
    cy, cx = member[:, 0].mean(), member[:, 1].mean()
    b, sigma = _background(frame, bad, marks, largest, int(np.rint(cy)), int(np.rint(cx)), y0, y1, x0, x1, radius)
    total, weight, sum_x, sum_y, peak = 0.0, 0.0, 0.0, 0.0, -np.inf
    for i in range(member.shape[0]):
        y, x = member[i, 0], member[i, 1]
        v = float(frame[y, x])
        w = max(v - b, 0.0)
        total += v - b
        weight += w
        sum_x += w * x
        sum_y += w * y
        peak = max(peak, v)
    if not (total > 0 and weight > 0):
        return False
    if at < rows.shape[0]:
        rows[at, 0], rows[at, 1] = sum_x / weight + 0.5, sum_y / weight + 0.5
        rows[at, 2], rows[at, 3], rows[at, 4] = total, total / sigma, member.shape[0]
        rows[at, 5], rows[at, 6] = peak, b
    return True


@njit(cache=True, nogil=True)
def _background(frame, bad, marks, largest, cy, cx, y0, y1, x0, x1, radius):
    """Mean and standard deviation of the quiet pixels in a disc."""
    n, total, squares = 0, 0.0, 0.0
    for y in range(max(cy - radius, y0), min(cy + radius + 1, y1)):
        for x in range(max(cx - radius, x0), min(cx + radius + 1, x1)):
            if (y - cy) ** 2 + (x - cx) ** 2 > radius * radius or bad[y, x] or marks[y, x]:
                continue
            v = float(frame[y, x])
            if not v <= largest:
                continue
            n += 1
            total += v
            squares += v * v
    if n == 0:
        return 0.0, _EMPTY_SIGMA
    b = total / n
    return b, max(np.sqrt(max(0.0, squares / n - b * b)), _EMPTY_SIGMA)
