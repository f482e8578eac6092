"""Where a crystal of known orientation puts its spots on a still, and how far out it diffracts.

A reflection h is near the Ewald sphere when its excitation error e = 1/λ - |A h + z/λ| is small;
how small is a property of each crystal (size, mosaic spread, bandwidth), read from the spots that
its lattice explains: the profile radius.
"""

import numpy as np
from numba import njit

from storage.geometry import Geometry
from tasks.index_frame import Crystal

__all__ = [
    "PREDICTION_DTYPE",
    "crystal_resolution",
    "predict_spots",
    "profile_radius",
    "resolution_limit",
    "spots_as_seen",
]

PREDICTION_DTYPE = np.dtype(
    [("h", "i4"), ("k", "i4"), ("l", "i4"), ("x", "f8"), ("y", "f8"), ("excitation", "f8"), ("panel", "i4")]
)
# A radius from so few spots would be luck; this one suits a good crystal in a narrow band, 1/Å.
_FEWEST_SPOTS, _DEFAULT_RADIUS = 5, 1e-3


def profile_radius(crystal: Crystal, q: np.ndarray, wavelength: float, tolerance: float = 0.25) -> float:
    """Excitation error up to which a crystal shows spots, 1/Å.

    The 98th percentile of |e| over the explained spots (White 2014), but not beyond three robust
    standard deviations, so that a few chance agreements do not widen it.

    Parameters
    ----------
    q : (n, 3) of the frame's spots, 1/Å. tolerance : largest distance from whole indices.
    """
    hkl, off = crystal.hkl(q, wavelength)
    n, far, middle = _errors_of_explained(hkl, off, np.ascontiguousarray(crystal.A), 1 / wavelength, tolerance)
    return max(1e-5, min(far, 3 * 1.4826 * middle)) if n >= _FEWEST_SPOTS else _DEFAULT_RADIUS


def resolution_limit(q: np.ndarray) -> float:
    """Resolution of a set of spots: d in Å of the farthest after the top 2 %, at least two, are dropped.

    q : (n, 3) or (n,) |q| in 1/Å. NaN with fewer than three spots.
    """
    length = np.sort(np.linalg.norm(q, axis=1) if q.ndim == 2 else q)
    if len(length) < 3:
        return float("nan")
    return float(1 / length[-1 - max(2, len(length) // 50)])


def crystal_resolution(crystal: Crystal, q: np.ndarray, wavelength: float, tolerance: float = 0.25) -> float:
    """Resolution limit, Å, of the spots q (n, 3) that a crystal explains; NaN with fewer than three."""
    _, off = crystal.hkl(q, wavelength)
    return resolution_limit(q[off <= tolerance])


def predict_spots(crystal: Crystal, geometry: Geometry, radius: float, hkl: np.ndarray) -> np.ndarray:
    """Reflections of a crystal that fall on the detector.

    Parameters
    ----------
    radius : profile radius, 1/Å: reflections with |e| below it are predicted.
    hkl : (n, 3) candidates, usually ``cell.hkl_within(q_max)``, made once per cell.

    Returns
    -------
    (n,) of PREDICTION_DTYPE sorted by h, k, l: x, y px from the frame's corner (pixel i spans i to
    i + 1), where the spot appears on the assumed geometry; excitation, 1/Å; panel.
    """
    A = np.ascontiguousarray(crystal.A)
    rows, q, error = _near_sphere(np.ascontiguousarray(hkl), A, 1 / geometry.wavelength, radius)
    hkl = hkl[rows]
    rows, x, y, panel = geometry.place(spots_as_seen(q, crystal, geometry))
    table = np.empty(len(rows), PREDICTION_DTYPE)
    table["h"], table["k"], table["l"] = hkl[rows].T
    table["x"], table["y"], table["excitation"], table["panel"] = x, y, error[rows], panel
    return table[np.lexsort((table["l"], table["k"], table["h"]))]


def spots_as_seen(q: np.ndarray, crystal: Crystal, geometry: Geometry) -> np.ndarray:
    """q as the assumed geometry would compute it from where the spot appears on the shifted detector."""
    ray = q * geometry.wavelength + [0.0, 0.0, 1.0]
    ray = ray / ray[:, 2:] - [crystal.shift[0], crystal.shift[1], 0.0]
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    return (ray - [0.0, 0.0, 1.0]) / geometry.wavelength


@njit(cache=True, nogil=True)
def _errors_of_explained(hkl, off, A, inverse_wavelength, tolerance):
    """Of the spots within the tolerance of whole indices: how many, and 98th percentile and median of |e|, 1/Å."""
    found = np.empty(hkl.shape[0])
    n = 0
    for i in range(hkl.shape[0]):
        if off[i] > tolerance:
            continue
        h, k, m = hkl[i, 0], hkl[i, 1], hkl[i, 2]
        x = A[0, 0] * h + A[0, 1] * k + A[0, 2] * m
        y = A[1, 0] * h + A[1, 1] * k + A[1, 2] * m
        z = A[2, 0] * h + A[2, 1] * k + A[2, 2] * m + inverse_wavelength
        found[n] = abs(inverse_wavelength - np.sqrt(x * x + y * y + z * z))
        n += 1
    if n == 0:
        return 0, 0.0, 0.0
    return n, np.percentile(found[:n], 98), np.median(found[:n])


@njit(cache=True, nogil=True)
def _near_sphere(hkl, A, inverse_wavelength, radius):
    """Rows of hkl whose excitation error is within the radius and that scatter forward, their q, and that error."""
    low, high = max(inverse_wavelength - radius, 0.0) ** 2, (inverse_wavelength + radius) ** 2
    rows = np.empty(hkl.shape[0], np.int64)
    q, error = np.empty((hkl.shape[0], 3)), np.empty(hkl.shape[0])
    n = 0
    for i in range(hkl.shape[0]):
        h, k, m = hkl[i, 0], hkl[i, 1], hkl[i, 2]
        x = A[0, 0] * h + A[0, 1] * k + A[0, 2] * m
        y = A[1, 0] * h + A[1, 1] * k + A[1, 2] * m
        z = A[2, 0] * h + A[2, 1] * k + A[2, 2] * m
        s = x * x + y * y + (z + inverse_wavelength) ** 2
        if low <= s <= high and z + inverse_wavelength > 0:
            rows[n] = i
            q[n, 0], q[n, 1], q[n, 2] = x, y, z
            error[n] = inverse_wavelength - np.sqrt(s)
            n += 1
    return rows[:n], q[:n], error[:n]
