"""Smaller frames for a live view or a quicker search: n x n pixels summed into one.

A sum is only as good as its worst child, so one masked or saturated child marks the whole
pixel; the far edge that does not fill a pixel is trimmed.
"""

import numpy as np
from numba import njit

from storage.errors import BadFrame, ShapeMismatch
from storage.models import DetectorHeader

__all__ = ["MARKED", "bin_frame", "binned_header"]

# What a marked pixel reads as, so that it is masked also where the mask is not at hand.
MARKED = np.iinfo(np.uint32).max


def bin_frame(
    frame: np.ndarray, mask: np.ndarray | None, factor: int, saturation: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum blocks of ``factor`` x ``factor`` pixels.

    Parameters
    ----------
    frame : (slow, fast), counts; any integer dtype. A negative count (the gap and dead marks
        of signed formats) is unusable, as is the largest value of an unsigned dtype.
    mask : (slow, fast), nonzero where a pixel is unusable; None for none.
    factor : pixels per edge, at least 1.
    saturation : largest trustworthy count of an unbinned pixel; None when it has none.

    Returns
    -------
    sums : (slow // factor, fast // factor) uint32, counts; the largest uint32 where marked.
    marked : same shape, uint8, 1 where a child was masked or saturated, or the sum overflows.

    Raises
    ------
    BadFrame : not a 2-D integer frame, or the factor does not fit into it.
    ShapeMismatch : frame and mask differ.
    """
    frame = np.ascontiguousarray(frame)
    if frame.ndim != 2 or frame.dtype.kind not in "ui":
        raise BadFrame(f"cannot bin {frame.dtype} of shape {frame.shape}; give a 2-D frame of integer counts")
    if not 1 <= factor <= min(frame.shape):
        raise BadFrame(f"binning factor {factor} does not fit shape {frame.shape}; use 1 to {min(frame.shape)}")
    if mask is not None and mask.shape != frame.shape:
        raise ShapeMismatch(f"mask {mask.shape} and frame {frame.shape} differ; use the mask of this detector")
    unusable = np.zeros((0, frame.shape[1]), np.uint8) if mask is None else _as_bytes(mask)
    shape = frame.shape[0] // factor, frame.shape[1] // factor
    sums, marked = np.empty(shape, np.uint32), np.empty(shape, np.uint8)
    # Sums of a column's pixels; narrow where they fit, since more of them are added at a time.
    columns = np.empty(frame.shape[1], np.uint32 if frame.dtype.itemsize <= 2 and factor <= 256 else np.int64)
    _bin(frame, unusable, factor, frame.dtype.type(_largest_usable(frame.dtype, saturation)), columns, sums, marked)
    return sums, marked


def _as_bytes(mask: np.ndarray) -> np.ndarray:
    """Nonzero where unusable; a mask of bytes is taken as it is."""
    return np.ascontiguousarray(mask if mask.dtype == np.uint8 else (mask != 0).view(np.uint8))


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
        }
    )


def _largest_usable(dtype: np.dtype, saturation: int | None) -> int:
    """Largest count to trust: below the unsigned maximum, which detectors use as a mark."""
    ceiling = min(np.iinfo(dtype).max - (1 if dtype.kind == "u" else 0), np.iinfo(np.int64).max)
    return int(ceiling) if saturation is None else int(min(saturation, ceiling))


@njit(cache=True, nogil=True)
def _bin(frame, mask, factor, largest, columns, sums, marked):
    """Down the columns first, many at a time; then along them."""
    width = sums.shape[1] * factor
    bad = np.empty(width, np.uint8)
    for i in range(sums.shape[0]):
        columns[:], bad[:] = 0, 0
        for y in range(i * factor, (i + 1) * factor):
            _add_row(frame[y, :width], largest, columns, bad)
            if mask.shape[0]:
                _add_mask(mask[y, :width], bad)
        _add_columns(columns, bad, factor, sums[i], marked[i])


@njit(cache=True, nogil=True)
def _add_row(row, largest, columns, bad):
    for x in range(row.size):
        v = row[x]
        bad[x] |= (v < 0) | (v > largest)
        columns[x] += v


@njit(cache=True, nogil=True)
def _add_mask(row, bad):
    for x in range(row.size):
        bad[x] |= row[x]


@njit(cache=True, nogil=True)
def _add_columns(columns, bad, factor, sums, marked):
    at = 0
    for j in range(sums.size):
        total, is_bad = np.int64(0), np.uint8(0)
        for _ in range(factor):
            total += columns[at]
            is_bad |= bad[at]
            at += 1
        fits = is_bad == 0 and total < MARKED
        marked[j] = 0 if fits else 1
        sums[j] = np.uint32(total) if fits else MARKED
