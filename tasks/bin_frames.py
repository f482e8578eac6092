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
    usable = np.zeros((0, 0), np.uint8) if mask is None else np.ascontiguousarray(mask != 0).view(np.uint8)
    shape = frame.shape[0] // factor, frame.shape[1] // factor
    sums, marked = np.empty(shape, np.uint32), np.empty(shape, np.uint8)
    _bin(frame, usable, factor, _largest_usable(frame.dtype, saturation), sums, marked)
    return sums, marked


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
def _bin(frame, mask, factor, largest, sums, marked):
    has_mask = mask.size > 0
    for i in range(sums.shape[0]):
        for j in range(sums.shape[1]):
            total, bad = np.int64(0), False
            for y in range(i * factor, (i + 1) * factor):
                for x in range(j * factor, (j + 1) * factor):
                    v = np.int64(frame[y, x])
                    if v < 0 or v > largest or (has_mask and mask[y, x] != 0):
                        bad = True
                    total += v
            if total >= MARKED:
                bad = True
            marked[i, j] = 1 if bad else 0
            sums[i, j] = MARKED if bad else np.uint32(total)
