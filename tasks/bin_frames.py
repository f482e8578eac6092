"""Smaller frames for a live view or a quicker search: n x n pixels summed into one.

A sum is only as good as its worst child, so one masked or saturated child marks the whole
pixel; the far edge that does not fill a pixel is trimmed.
"""

import threading
from dataclasses import replace

import numpy as np
from numba import njit

from storage.errors import BadFrame, ShapeMismatch
from storage.models import DetectorHeader
from storage.panels import Panel

__all__ = ["MARKED", "Binner", "bin_frame", "binned_header"]

# What a marked pixel reads as, so that it is masked also where the mask is not at hand.
MARKED = np.iinfo(np.uint32).max


class Binner:
    """Sums blocks of pixels of one detector's frames, from any thread.

    Parameters
    ----------
    mask : (slow, fast), nonzero where a pixel is unusable.
    factor : pixels per edge, at least 1.
    saturation : largest trustworthy count of an unbinned pixel; None when it has none.

    Attributes
    ----------
    mask : (slow // factor, fast // factor) uint8, nonzero where a child is masked: marked in every frame.

    Raises
    ------
    BadFrame : the factor does not fit into the frames.
    """

    def __init__(self, mask: np.ndarray, factor: int, saturation: int | None = None) -> None:
        if not 1 <= factor <= min(mask.shape):
            raise BadFrame(f"binning factor {factor} does not fit shape {mask.shape}; use 1 to {min(mask.shape)}")
        self.factor, self._saturation, self._whole_shape = factor, saturation, mask.shape
        self._of_thread = threading.local()
        self.mask = np.zeros((mask.shape[0] // factor, mask.shape[1] // factor), np.uint8)
        n_masked, _ = self._sum((mask != 0).view(np.uint8), 1)
        self.mask = (n_masked != 0).view(np.uint8)

    def __call__(self, frame: np.ndarray) -> tuple[np.ndarray, int]:
        """Sum the blocks of a frame.

        Parameters
        ----------
        frame : (slow, fast), counts; any integer dtype. A negative count (the gap and dead marks
            of signed formats) is unusable, as is the largest value of an unsigned dtype.

        Returns
        -------
        sums : (slow // factor, fast // factor) uint32, counts; `MARKED` where a child was masked or
            saturated, or the sum overflows. In memory that this thread's next call fills anew.
        total : counts of all that is not marked.

        Raises
        ------
        BadFrame : not a 2-D integer frame. ShapeMismatch : not of the mask's shape.
        """
        frame = np.ascontiguousarray(frame)
        if frame.ndim != 2 or frame.dtype.kind not in "ui":
            raise BadFrame(f"cannot bin {frame.dtype} of shape {frame.shape}; give a 2-D frame of integer counts")
        if frame.shape != self._whole_shape:
            raise ShapeMismatch(
                f"mask {self._whole_shape} and frame {frame.shape} differ; use the mask of this detector"
            )
        return self._sum(frame, _largest_usable(frame.dtype, self._saturation))

    def _sum(self, frame: np.ndarray, largest: int) -> tuple[np.ndarray, int]:
        sums, columns, top = self._memory(frame.dtype)
        # A negative count, read as unsigned, is above all that can be trusted.
        counts = frame.view(top.dtype)
        return sums, int(_bin(counts, self.mask, self.factor, top.dtype.type(largest), columns, top, sums))

    def _memory(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This thread's sums, and room for the sums and the largest counts of a row of blocks."""
        memory = getattr(self._of_thread, "memory", None)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        if memory is None or memory[2].dtype != unsigned:
            # Narrow where they fit, since more of them are added at a time.
            wide = np.uint32 if dtype.itemsize <= 2 and self.factor <= 256 else np.uint64
            width = self.mask.shape[1] * self.factor
            memory = np.empty(self.mask.shape, np.uint32), np.empty((2, width), wide), np.empty((2, width), unsigned)
            self._of_thread.memory = memory
        return memory


def bin_frame(
    frame: np.ndarray, mask: np.ndarray | None, factor: int, saturation: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum blocks of a single frame, as `Binner` does.

    Returns
    -------
    sums : (slow // factor, fast // factor) uint32, counts; `MARKED` where marked.
    marked : same shape, uint8, 1 where a child was masked or saturated, or the sum overflows.
    """
    if frame.ndim != 2 or frame.dtype.kind not in "ui":
        raise BadFrame(f"cannot bin {frame.dtype} of shape {frame.shape}; give a 2-D frame of integer counts")
    sums, _ = Binner(np.zeros(frame.shape, np.uint8) if mask is None else mask, factor, saturation)(frame)
    return sums, (sums == MARKED).view(np.uint8)


def binned_header(detector: DetectorHeader, factor: int) -> DetectorHeader:
    """The header of the binned stream: pixels ``factor`` times larger, the beam at a smaller number.

    The saturation value stays that of an unbinned pixel, since marking used it.
    """
    if factor < 1:
        raise BadFrame(f"binning factor {factor} is not positive; use 1 or more")
    return detector.model_copy(
        update={
            "pixel_size_x": detector.pixel_size_x * factor,
            "pixel_size_y": detector.pixel_size_y * factor,
            "beam_center_x": detector.beam_center_x / factor,
            "beam_center_y": detector.beam_center_y / factor,
            "panels": tuple(_binned_panel(panel, factor) for panel in detector.panels),
        }
    )


def _binned_panel(panel: Panel, factor: int) -> Panel:
    """The large pixels whose children are all on the panel; those across its border are on none."""
    first = [-(-start // factor) for start in panel.origin]
    slow, fast = (max(0, end // factor - start) for end, start in zip(panel.end, first, strict=True))
    skipped = [start * factor - old for start, old in zip(first, panel.origin, strict=True)]
    step_fast, step_slow = np.array(panel.fast), np.array(panel.slow)
    corner = np.array(panel.corner) + skipped[1] * step_fast + skipped[0] * step_slow
    corner_x, corner_y, corner_z = corner.tolist()
    return replace(
        panel,
        corner=(corner_x, corner_y, corner_z),
        fast=tuple((step_fast * factor).tolist()),
        slow=tuple((step_slow * factor).tolist()),
        shape=(slow, fast),
        origin=(first[0], first[1]),
    )


def _largest_usable(dtype: np.dtype, saturation: int | None) -> int:
    """Largest count to trust: below the unsigned maximum, which detectors use as a mark."""
    ceiling = min(np.iinfo(dtype).max - (1 if dtype.kind == "u" else 0), np.iinfo(np.int64).max)
    return int(ceiling) if saturation is None else int(min(saturation, ceiling))


@njit(cache=True, nogil=True)
def _bin(frame, mask, factor, largest, columns, top, sums):
    """Down the columns first, then along them, many at a time. Returns the total of what is not marked.

    columns, top : two rows each, the second of them to halve into.
    """
    total = np.int64(0)
    for i in range(sums.shape[0]):
        _take_row(frame[i * factor, : columns.shape[1]], columns[0], top[0])
        for y in range(i * factor + 1, (i + 1) * factor):
            _add_row(frame[y, : columns.shape[1]], columns[0], top[0])
        at, rest, n = 0, factor, columns.shape[1]
        while rest % 2 == 0:
            rest, n = rest // 2, n // 2
            _halve(columns[at], top[at], columns[1 - at, :n], top[1 - at, :n])
            at = 1 - at
        if rest > 1:
            n //= rest
            _gather(columns[at], top[at], rest, columns[1 - at, :n], top[1 - at, :n])
            at = 1 - at
        total += _finish(columns[at], top[at], mask[i], largest, sums[i])
    return total


@njit(cache=True, nogil=True)
def _take_row(row, columns, top):
    for x in range(row.size):
        columns[x] = row[x]
        top[x] = row[x]


@njit(cache=True, nogil=True)
def _add_row(row, columns, top):
    for x in range(row.size):
        columns[x] += row[x]
        top[x] = max(top[x], row[x])


@njit(cache=True, nogil=True)
def _halve(columns, top, half_columns, half_top):
    for x in range(half_columns.size):
        half_columns[x] = columns[2 * x] + columns[2 * x + 1]
        half_top[x] = max(top[2 * x], top[2 * x + 1])


@njit(cache=True, nogil=True)
def _gather(columns, top, n, fewer_columns, fewer_top):
    for x in range(fewer_columns.size):
        counts, highest = columns[n * x], top[n * x]
        for at in range(n * x + 1, n * (x + 1)):
            counts += columns[at]
            highest = max(highest, top[at])
        fewer_columns[x], fewer_top[x] = counts, highest


@njit(cache=True, nogil=True)
def _finish(columns, top, mask, largest, sums):
    total = np.int64(0)
    for x in range(sums.size):
        fits = (mask[x] == 0) & (top[x] <= largest) & (columns[x] < MARKED)
        sums[x] = columns[x] if fits else MARKED
        total += columns[x] if fits else 0
    return total
