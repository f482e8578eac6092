"""Vectors of the lattice that is in the spots of a still: maxima of a Fourier transform, refined and chosen among.

The transform is the sum of cos(2π q.v) over spots, as in DIALS's fft3d. Of one still the spots lie on a thin cap of the
Ewald sphere: the grid needs a few dozen points along the beam only, and the whole transform costs less than 1-D
transforms along directions (Steller 1997), which must be dense for long axes.
"""

import numpy as np
from numba import njit
from scipy.fft import next_fast_len, rfftn

from tasks.search_lattice import refine_vectors

__all__ = ["lattice_vectors"]

_N_VECTORS = 32
_N_PEAKS = 400
# Of these, multiples of the shortest and others of a plane with it; the sine below which a vector counts as such.
_N_LINE, _N_PLANE, _SINE = 2, 8, 0.04
_GROWTH = 1.6
# Of the transform. Twice as many take 0.1 s.
_MOST_POINTS = 1.6e6
# Samples of the transform per spacing of its finest fringes, over the two of Nyquist.
_OVERSAMPLING = 1.25


def lattice_vectors(q: np.ndarray, reach: float, *, n_search_spots: int, max_spots: int, min_axis: float) -> np.ndarray:
    """Refined vectors, (n, 3) Å, that make q.v near-integer for the most spots; short ones first.

    Parameters
    ----------
    q : (n, 3) 1/Å, innermost first. reach : Å, the longest vector.
    n_search_spots : innermost spots of the transform. max_spots : that refine. min_axis : Å, the shortest vector.
    """
    inner, reach = _spots_for_grid(q[:n_search_spots], reach)
    vectors = refine_vectors(inner, _maxima(inner, reach))
    n = len(inner)
    while n < min(len(q), max_spots):
        n = int(_GROWTH * n)
        vectors = refine_vectors(q[: min(n, max_spots)], vectors)
    off = vectors @ inner.T
    is_used = np.abs(off).max(axis=1, initial=0.0) > 0.75
    off = np.abs(off - np.rint(off))
    score = np.maximum(0, 1 - (off / 0.25) ** 2).sum(axis=1)
    length = np.linalg.norm(vectors, axis=1)
    good = is_used & (length >= min_axis) & (length <= 1.1 * reach)
    return _shortest_good(vectors[good], score[good])


def _spots_for_grid(q: np.ndarray, reach: float) -> tuple[np.ndarray, float]:
    """Innermost spots and the length, Å, for which the transform stays below `_MOST_POINTS`.

    At least 30 spots are kept where there are as many: then rather the length is shortened.
    """
    n = len(q)
    while n > 30 and np.prod(_grid_shape(q[:n], reach)) > _MOST_POINTS:
        n = max(30, n - 5)
    while np.prod(_grid_shape(q[:n], reach)) > _MOST_POINTS:
        reach *= 0.93
    return q[:n], reach


def _grid_shape(q: np.ndarray, reach: float) -> tuple[int, ...]:
    extent = 4 * _OVERSAMPLING * reach * np.abs(q).max(axis=0)
    return tuple(next_fast_len(max(8, int(np.ceil(n))), real=True) for n in extent[::-1])


def _maxima(q: np.ndarray, reach: float) -> np.ndarray:
    """Places (n, 3), Å, of the highest maxima of the sum of cos(2π q.v) over spots, highest first, v or -v."""
    shape = _grid_shape(q, reach)
    place = np.rint(q[:, ::-1] * (2 * reach)).astype(int) % shape
    grid = np.zeros(shape, np.float32)
    np.add.at(grid, tuple(place.T), 1)
    transform = np.ascontiguousarray(rfftn(grid).real)
    index, height = _local_maxima(transform, np.float32(3 * np.sqrt(len(q) / 2)))
    best = np.lexsort((np.arange(len(height)), -height))
    size = np.array(shape)
    wrapped = np.where(index > size // 2, index - size, index)
    vectors = (wrapped * (2 * reach / size))[:, ::-1]
    length = np.linalg.norm(vectors, axis=1)
    best = best[(length[best] > 1.0) & (length[best] <= reach)]
    return np.ascontiguousarray(vectors[best[:_N_PEAKS]])


@njit(cache=True, nogil=True)
def _local_maxima(values, threshold):
    """Index (n, 3) and height (n,) of points above the threshold that none of their neighbours exceeds."""
    nz, ny, nx = values.shape
    index, height = [(0, 0, 0)], [np.float32(0)]
    for i in range(nz):
        for j in range(ny):
            for k in range(nx):
                here = values[i, j, k]
                if here <= threshold:
                    continue
                is_top = True
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        for dk in (-1, 0, 1):
                            at = k + dk
                            if 0 <= at < nx and values[(i + di) % nz, (j + dj) % ny, at] > here:
                                is_top = False
                if is_top:
                    index.append((i, j, k))
                    height.append(here)
    return np.array(index[1:]).reshape(-1, 3), np.array(height[1:])


def _shortest_good(vectors: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Distinct vectors that spots agree with: a few of one line, some of one plane, and most of neither.

    Sums of lattice vectors are as good as these, so that the many short ones of a plane would leave no room for
    a long axis, whose score is lower, too, since excitation errors blur it most.
    """
    if not len(vectors):
        return vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    first = _good_first(vectors, score, np.arange(len(vectors)))[0]
    is_of_line = np.linalg.norm(np.cross(unit, unit[first]), axis=1) < _SINE
    chosen = _good_first(vectors, score, np.flatnonzero(is_of_line))[:_N_LINE]
    off_line = np.flatnonzero(~is_of_line)
    if not len(off_line):
        return vectors[chosen]
    normal = np.cross(unit[first], unit[_good_first(vectors, score, off_line)[0]])
    is_of_plane = np.abs(unit[off_line] @ normal) < _SINE * np.linalg.norm(normal)
    chosen += _good_first(vectors, score, off_line[is_of_plane])[:_N_PLANE]
    off_plane = off_line[~is_of_plane]
    if len(off_plane):
        chosen += _good_first(vectors, score, off_plane)[: _N_VECTORS - len(chosen)]
    return vectors[chosen]


def _good_first(vectors: np.ndarray, score: np.ndarray, among: np.ndarray) -> list[int]:
    """Distinct vectors of some: those of nearly the best score by length, then the others by score."""
    length = np.linalg.norm(vectors[among], axis=1)
    best = np.argsort(-score[among], kind="stable")
    good = best[score[among][best] > 0.75 * score[among][best[0]]]
    order = np.concatenate([good[np.argsort(length[good], kind="stable")][: _N_VECTORS // 2], best])
    return [int(i) for i in _distinct(vectors, among[order], _N_VECTORS)]


@njit(cache=True, nogil=True)
def _distinct(vectors, order, n_max):
    """The first of ``order`` that are none of the earlier ones, or their negatives, within 2 %."""
    chosen = [order[0]]
    for i in order[1:]:
        is_new = True
        for j in chosen:
            limit = 0.02 * 0.02 * np.sum(vectors[j] ** 2)
            if np.sum((vectors[i] - vectors[j]) ** 2) < limit or np.sum((vectors[i] + vectors[j]) ** 2) < limit:
                is_new = False
                break
        if is_new:
            chosen.append(i)
            if len(chosen) == n_max:
                break
    return np.array(chosen)
