"""A lattice fitted to the spots of a still: orientation, strains that its symmetry allows, and a detector shift."""

import numpy as np
from numba import njit

from tasks.unit_cell import UnitCell, hkl_symmetry_ops

__all__ = ["agreement", "nearest_indices", "refine_lattice", "strain_basis", "true_q"]

_N_CYCLES = 12
# Cycles in which the tolerance still shrinks, and the largest step (rad, relative) after which nothing changes.
_N_NARROWING, _SETTLED = 5, 1e-7


def strain_basis(cell: UnitCell) -> np.ndarray:
    """Symmetric strains that keep the point group's symmetry, (n_free, 3, 3), orthonormal.

    Averaging any strain over the group's rotations gives one that commutes with them all: six
    free parameters for triclinic, four monoclinic, three, two, two, and one for cubic crystals.
    """
    ops = hkl_symmetry_ops(cell)
    turns = cell.B @ ops @ np.linalg.inv(cell.B)
    averaged = []
    for i in range(3):
        for j in range(i, 3):
            unit = np.zeros((3, 3))
            unit[i, j] = unit[j, i] = 1.0
            averaged.append((turns @ unit @ turns.transpose(0, 2, 1)).mean(axis=0).ravel())
    _, size, basis = np.linalg.svd(np.array(averaged))
    return np.ascontiguousarray(basis[: int((size > 1e-6).sum())].reshape(-1, 3, 3))


def true_q(q: np.ndarray, shift: np.ndarray, wavelength: float) -> np.ndarray:
    """Scattering vectors after the detector has been moved by ``shift`` (x, y) times its distance."""
    ray = q * wavelength + [0.0, 0.0, 1.0]
    ray = ray / ray[:, 2:] + [shift[0], shift[1], 0.0]
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    return (ray - [0.0, 0.0, 1.0]) / wavelength


@njit(cache=True, nogil=True)
def refine_lattice(q, U, B, shift, rows, strains, wavelength, radial_weight, tolerance, shift_sigma, strain_sigma):
    """Gauss-Newton of orientation, strain and shift on the spots that fit, while the tolerance shrinks.

    Residual of a spot: q_observed - shift effect - U B h; across the ray it is measured by the
    position, along the ray it is the excitation error and counts with radial_weight.
    Returns U, B, shift (x, y), and the number of spots used last.
    """
    n_strain = strains.shape[0]
    n_shift = 2 if shift_sigma > 0 else 0
    m = 3 + n_strain + n_shift
    shift, n_used = shift.copy(), 0
    wanted = 1 - radial_weight * radial_weight
    total, so_far = np.zeros(n_strain), B @ rows - np.eye(3)
    for i in range(n_strain):
        total[i] = np.sum(strains[i] * so_far)
    derivative, columns = np.empty((n_strain, 3, 3)), np.empty((m, 3))
    h, predicted, rest = np.empty(3), np.empty(3), np.empty(3)
    for cycle in range(_N_CYCLES):
        t = max(0.35 - 0.03 * cycle, min(tolerance, 0.2))
        A = U @ B
        inverse = np.linalg.inv(A)
        for i in range(n_strain):
            derivative[i] = U @ strains[i] @ B
        normal, right, n_used, squares = np.zeros((m, m)), np.zeros(m), 0, 0.0
        for j in range(q.shape[0]):
            observed, ray = _shifted(q[j, 0], q[j, 1], q[j, 2], shift[0], shift[1], wavelength)
            fits = True
            for a in range(3):
                index = inverse[a, 0] * observed[0] + inverse[a, 1] * observed[1] + inverse[a, 2] * observed[2]
                h[a] = np.rint(index)
                fits = fits and abs(index - h[a]) <= t
            if not fits:
                continue
            n_used += 1
            for b in range(3):
                predicted[b] = A[b, 0] * h[0] + A[b, 1] * h[1] + A[b, 2] * h[2]
                rest[b] = observed[b] - predicted[b]
            _fill_columns(columns, predicted, h, derivative, n_shift, ray, wavelength)
            along = rest[0] * ray[0] + rest[1] * ray[1] + rest[2] * ray[2]
            squares += rest[0] ** 2 + rest[1] ** 2 + rest[2] ** 2 - wanted * along * along
            _add_to_normal(normal, right, columns, rest, ray, along, wanted)
        if n_used < 6:
            return U, B, shift, n_used
        for a in range(m):
            for b in range(a):
                normal[a, b] = normal[b, a]
        # What is known beforehand of cell and shift, in units of the spots' own variance.
        variance = max(squares / (2 * n_used), 1e-12)
        for i in range(n_strain):
            normal[3 + i, 3 + i] += variance / strain_sigma**2
            right[3 + i] -= total[i] * variance / strain_sigma**2
        for a in range(3 + n_strain, m):
            normal[a, a] += variance / shift_sigma**2
            right[a] -= shift[a - 3 - n_strain] * variance / shift_sigma**2
        step = np.linalg.solve(normal + 1e-12 * np.trace(normal) * np.eye(m), right)
        U = _turn(step[:3]) @ U
        change = np.eye(3)
        for i in range(n_strain):
            change += step[3 + i] * strains[i]
            total[i] += step[3 + i]
        B = change @ B
        for a in range(n_shift):
            shift[a] += step[3 + n_strain + a]
        if cycle > _N_NARROWING and np.abs(step).max() < _SETTLED:
            break
    return U, B, shift, n_used


@njit(cache=True, nogil=True)
def nearest_indices(q, A, shift, wavelength):
    """Nearest whole indices (n, 3) int64 of spots q in the lattice A, and the largest distance (n,) from them.

    A spot that is nowhere, not-a-number, is infinitely far from all.
    """
    inverse = np.linalg.inv(A)
    whole, off = np.empty((q.shape[0], 3), np.int64), np.zeros(q.shape[0])
    for j in range(q.shape[0]):
        if not np.isfinite(q[j, 0] + q[j, 1] + q[j, 2]):
            whole[j], off[j] = 0, np.inf
            continue
        observed, _ = _shifted(q[j, 0], q[j, 1], q[j, 2], shift[0], shift[1], wavelength)
        for a in range(3):
            index = inverse[a, 0] * observed[0] + inverse[a, 1] * observed[1] + inverse[a, 2] * observed[2]
            nearest = np.rint(index)
            whole[j, a] = np.int64(nearest)
            off[j] = max(off[j], abs(index - nearest))
    return whole, off


@njit(cache=True, nogil=True)
def agreement(q, A, shift, wavelength, limits):
    """How well a lattice explains spots, in terms of the last of some rising limits of distance from whole indices.

    Returns the number of spots within each limit (k,); of those within the last, the sums of squares of what is left
    across the ray and along it, 1/Å², and the median of the largest index that is left across; and of all spots the
    sum of squares of their length, 1/Å². Spots must be finite.
    """
    inverse = np.linalg.inv(A)
    n_within, blurred = np.zeros(limits.size, np.int64), np.empty(q.shape[0])
    n_in, across_squares, along_squares, squares = 0, 0.0, 0.0, 0.0
    rest, h = np.empty(3), np.empty(3)
    for j in range(q.shape[0]):
        observed, ray = _shifted(q[j, 0], q[j, 1], q[j, 2], shift[0], shift[1], wavelength)
        squares += observed[0] ** 2 + observed[1] ** 2 + observed[2] ** 2
        off = 0.0
        for a in range(3):
            index = inverse[a, 0] * observed[0] + inverse[a, 1] * observed[1] + inverse[a, 2] * observed[2]
            h[a] = np.rint(index)
            off = max(off, abs(index - h[a]))
        for k in range(limits.size):
            n_within[k] += off <= limits[k]
        if off > limits[-1]:
            continue
        along = 0.0
        for b in range(3):
            rest[b] = observed[b] - (A[b, 0] * h[0] + A[b, 1] * h[1] + A[b, 2] * h[2])
            along += rest[b] * ray[b]
        for b in range(3):
            rest[b] -= along * ray[b]
            across_squares += rest[b] * rest[b]
        along_squares += along * along
        worst = 0.0
        for a in range(3):
            worst = max(worst, abs(inverse[a, 0] * rest[0] + inverse[a, 1] * rest[1] + inverse[a, 2] * rest[2]))
        blurred[n_in] = worst
        n_in += 1
    blur = np.median(blurred[:n_in]) if n_in else 0.0
    return n_within, across_squares, along_squares, blur, squares


@njit(cache=True, nogil=True)
def _shifted(x, y, z, shift_x, shift_y, wavelength):
    """True scattering vector and ray (unit) of a spot whose detector stands shifted; as `true_q`."""
    kz = z * wavelength + 1.0
    kx, ky = x * wavelength / kz + shift_x, y * wavelength / kz + shift_y
    length = np.sqrt(kx * kx + ky * ky + 1.0)
    ray = (kx / length, ky / length, 1.0 / length)
    return (ray[0] / wavelength, ray[1] / wavelength, (ray[2] - 1.0) / wavelength), ray


@njit(cache=True, nogil=True)
def _fill_columns(columns, predicted, h, derivative, n_shift, ray, wavelength):
    """Derivatives of (prediction - observation) by rotation about x, y, z, by strain, and by shift."""
    x, y, z = predicted[0], predicted[1], predicted[2]
    columns[0, 0], columns[0, 1], columns[0, 2] = 0.0, -z, y
    columns[1, 0], columns[1, 1], columns[1, 2] = z, 0.0, -x
    columns[2, 0], columns[2, 1], columns[2, 2] = -y, x, 0.0
    n_strain = derivative.shape[0]
    for i in range(n_strain):
        for b in range(3):
            columns[3 + i, b] = derivative[i, b, 0] * h[0] + derivative[i, b, 1] * h[1] + derivative[i, b, 2] * h[2]
    for a in range(n_shift):
        for b in range(3):
            columns[3 + n_strain + a, b] = -ray[2] / wavelength * ((1.0 if a == b else 0.0) - ray[a] * ray[b])


@njit(cache=True, nogil=True)
def _add_to_normal(normal, right, columns, rest, ray, along, wanted):
    """Add one spot to the normal equations, its component along the ray weighted down."""
    m = columns.shape[0]
    for a in range(m):
        ca = columns[a, 0] * ray[0] + columns[a, 1] * ray[1] + columns[a, 2] * ray[2]
        x, y, z = (
            columns[a, 0] - wanted * ca * ray[0],
            columns[a, 1] - wanted * ca * ray[1],
            columns[a, 2] - wanted * ca * ray[2],
        )
        right[a] += x * rest[0] + y * rest[1] + z * rest[2]
        for b in range(a, m):
            normal[a, b] += x * columns[b, 0] + y * columns[b, 1] + z * columns[b, 2]


@njit(cache=True, nogil=True)
def _turn(w):
    """Rotation by the vector w (rad), Rodrigues."""
    angle = np.sqrt(np.sum(w * w))
    K = np.array([[0.0, -w[2], w[1]], [w[2], 0.0, -w[0]], [-w[1], w[0], 0.0]])
    if angle < 1e-12:
        return np.eye(3) + K
    return np.eye(3) + np.sin(angle) / angle * K + (1 - np.cos(angle)) / angle**2 * (K @ K)
