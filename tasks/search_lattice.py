"""Cells laid into the spots of a still, by sampling directions: the vectors that a lattice could repeat by, and the
turns of a whole cell about them.
"""

import math
from functools import lru_cache

import numpy as np
from numba import njit

__all__ = ["axis_candidates", "n_turns", "refine_vectors", "score_directions", "turned_cells"]

# Vectors that are kept of an axis, of all directions tried.
_N_VECTORS = 32
# Distance from a whole index beyond which a spot tells nothing.
_CLIP = 0.25


@lru_cache(maxsize=12)
def _half_sphere(n: int) -> np.ndarray:
    """(3, n) float32, nearly even directions by the Fibonacci lattice."""
    p = np.arange(n)
    z = 1 - (p + 0.5) / n
    r, azimuth = np.sqrt(1 - z * z), p * (np.pi * (3 - np.sqrt(5)))
    return np.stack([r * np.cos(azimuth), r * np.sin(azimuth), z]).astype(np.float32)


def _rounded_up(n: float) -> int:
    """To the next power of 1.2, so that a few sets of directions serve all frames."""
    return math.ceil(1.2 ** math.ceil(math.log(n) / math.log(1.2)))


def axis_candidates(q: np.ndarray, length: float, q_max: float) -> np.ndarray:
    """Refined real-space vectors, (n, 3) Å, of about this length that make q.v near-integer."""
    # The last spot may be off by 0.15 fringes halfway between two directions.
    spacing = 0.3 / (length * q_max)
    n = _rounded_up(float(np.clip(2 * np.pi / spacing**2, 2000, 400_000)))
    directions = _half_sphere(n)
    score = np.empty(n, np.float32)
    score_directions((q * length).astype(np.float32), directions, np.float32(_CLIP**2), score)
    best = np.argpartition(score, min(16 * _N_VECTORS, n - 1))[: 16 * _N_VECTORS]
    best = best[np.lexsort((best, score[best]))]
    chosen = _spread_out(directions[:, best].T.astype(float), np.cos(2.5 * spacing), _N_VECTORS)
    return refine_vectors(q, chosen * length)


@njit(cache=True, nogil=True)
def score_directions(q, directions, clip, score):
    """Sum over spots of the squared distance of q.u from a whole number, clipped; blocks stay in cache."""
    n, block = score.size, 1024
    for start in range(0, n, block):
        stop = min(start + block, n)
        for p in range(start, stop):
            score[p] = 0
        for j in range(q.shape[0]):
            x, y, z = q[j, 0], q[j, 1], q[j, 2]
            for p in range(start, stop):
                d = x * directions[0, p] + y * directions[1, p] + z * directions[2, p]
                d -= np.rint(d)
                d *= d
                score[p] += d if d < clip else clip


@njit(cache=True, nogil=True)
def _spread_out(directions, cosine, n_max):
    """The first directions that are not within the angle of an earlier one, up to sign."""
    chosen = np.empty((n_max, 3))
    n = 0
    for i in range(directions.shape[0]):
        u = directions[i]
        is_new = True
        for j in range(n):
            if abs(u[0] * chosen[j, 0] + u[1] * chosen[j, 1] + u[2] * chosen[j, 2]) > cosine:
                is_new = False
                break
        if is_new:
            chosen[n] = u
            n += 1
            if n == n_max:
                break
    return chosen[:n]


@njit(cache=True, nogil=True)
def refine_vectors(q, vectors):
    """Least squares of each vector with its whole numbers fixed, while the tolerance shrinks."""
    out = vectors.copy()
    for i in range(out.shape[0]):
        for t in (0.3, 0.2, 0.15, 0.1):
            M, r, n = np.zeros((3, 3)), np.zeros(3), 0
            for j in range(q.shape[0]):
                d = q[j, 0] * out[i, 0] + q[j, 1] * out[i, 1] + q[j, 2] * out[i, 2]
                whole = np.rint(d)
                if abs(d - whole) < t:
                    n += 1
                    for a in range(3):
                        r[a] += q[j, a] * whole
                        for b in range(3):
                            M[a, b] += q[j, a] * q[j, b]
            # Spots on a flat piece of the Ewald sphere leave the component along the beam open.
            ridge = 1e-3 * (M[0, 0] + M[1, 1] + M[2, 2]) / 3
            for a in range(3):
                M[a, a] += ridge
                r[a] += ridge * out[i, a]
            if n < 5 or ridge == 0.0:
                break
            out[i] = np.linalg.solve(M, r)
    return out


def n_turns(rows: np.ndarray, axis: int, q_max: float) -> int:
    """Steps of a full turn about an axis between which the farthest spot is off by 0.15 fringes."""
    unit = rows[axis] / np.linalg.norm(rows[axis])
    reach = np.linalg.norm(rows - (rows @ unit)[:, None] * unit, axis=1).max()
    return int(np.clip(2 * np.pi * reach * q_max / 0.3, 90, 3000))


@njit(cache=True, nogil=True)
def turned_cells(q, rows, axis, vectors, n_turns):
    """The cell laid on each vector and turned about it: score (2n,), rotation x scale (2n, 3, 3) of the best turns."""
    n = vectors.shape[0]
    score, cells = np.empty(2 * n), np.empty((2 * n, 3, 3))
    edge = np.sqrt(np.sum(rows[axis] ** 2))
    unit = rows[axis] / edge
    frame0 = _frame_on(unit, rows[(axis + 1) % 3])
    own = rows @ frame0
    hint = np.array([1.0, 0.3, 0.2])
    for i in range(n):
        length = np.sqrt(np.sum(vectors[i] ** 2))
        scale = min(max(length / edge, 0.96), 1.04)
        frame = _frame_on(vectors[i] / length, hint)
        turns, values = _best_turns((q @ frame) * scale, own, axis, n_turns)
        for j in range(2):
            angle = 2 * np.pi * turns[j] / n_turns
            c, s = np.cos(angle), np.sin(angle)
            spin = np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
            score[2 * i + j] = values[j]
            # reciprocal lengths shrink as real ones grow; only the determinant is read from the scale
            cells[2 * i + j] = frame @ spin @ frame0.T * scale
    return score, cells


@njit(cache=True, nogil=True)
def _frame_on(unit, hint):
    """(3, 3), columns: unit, and two directions across it, right-handed; the first towards the hint."""
    first = hint - np.sum(hint * unit) * unit
    size = np.sqrt(np.sum(first**2))
    if size < 1e-6:
        other = np.array([0.0, 0.0, 1.0]) if abs(unit[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
        first = other - np.sum(other * unit) * unit
        size = np.sqrt(np.sum(first**2))
    first = first / size
    frame = np.empty((3, 3))
    frame[:, 0], frame[:, 1] = unit, first
    for a in range(3):
        b, c = (a + 1) % 3, (a + 2) % 3
        frame[a, 2] = unit[b] * first[c] - unit[c] * first[b]
    return frame


@njit(cache=True, nogil=True)
def _best_turns(q, rows, axis, n_turns):
    """Score the cell at every turn about its axis; the best two turns that are not neighbours.

    q : (n, 3) in a frame whose first axis is the vector; rows : the cell in its own such frame.
    A spot adds 1 - |d|²/clip² for the distances d of its indices from whole numbers, if positive.
    """
    cosine, sine = np.empty(n_turns, np.float32), np.empty(n_turns, np.float32)
    for p in range(n_turns):
        cosine[p], sine[p] = np.cos(2 * np.pi * p / n_turns), np.sin(2 * np.pi * p / n_turns)
    score, off = np.zeros(n_turns, np.float32), np.empty(n_turns, np.float32)
    clip = np.float32(0.0625 * 1.5)
    for j in range(q.shape[0]):
        d0 = q[j, 0] * rows[axis, 0]
        d0 -= np.rint(d0)
        if d0 * d0 > clip:
            continue
        off[:] = np.float32(d0 * d0)
        for i in range(3):
            if i == axis:
                continue
            along = np.float32(q[j, 0] * rows[i, 0])
            # rows turned by the angle: (y c - z s, y s + z c) . (qy, qz)
            even = np.float32(q[j, 1] * rows[i, 1] + q[j, 2] * rows[i, 2])
            odd = np.float32(q[j, 2] * rows[i, 1] - q[j, 1] * rows[i, 2])
            for p in range(n_turns):
                d = along + even * cosine[p] + odd * sine[p]
                d -= np.rint(d)
                off[p] += d * d
        for p in range(n_turns):
            gain = np.float32(1) - off[p] / clip
            score[p] += gain if gain > 0 else np.float32(0)
    first = int(np.argmax(score))
    second, value = first, np.float32(-1)
    for p in range(n_turns):
        apart = abs(p - first)
        if min(apart, n_turns - apart) > 3 and score[p] > value:
            second, value = p, score[p]
    return np.array([first, second]), np.array([score[first], value])
