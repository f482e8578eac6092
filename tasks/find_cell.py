"""The lattice in the spots of one still when nothing is known of the cell.

A real-space vector v of a lattice that is present makes q.v near-integer for every spot, so the sum of
cos(2π q.v) over spots has a maximum at each lattice vector (`tasks.lattice_vectors`). The highest maxima are refined
with their whole numbers fixed. Three of them make a cell; every
triple is judged by the probability that spots without a lattice agree with it so well, which also
prefers the smallest cell: in a cell too large by two each index is off by twice as much. The best are refined
as a whole, with kernels of `tasks.refine_lattice`, freed of points that no spot asks for, and reduced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np
from numba import njit

from storage.errors import BadRecipe
from tasks.lattice_vectors import lattice_vectors
from tasks.refine_lattice import refine_lattice, strain_basis, true_q
from tasks.search_lattice import refine_vectors, score_directions
from tasks.unit_cell import UnitCell, reduce_rows

__all__ = ["CellSearchParams", "FoundLattice", "distance_scale", "find_lattice"]


@dataclass(frozen=True)
class CellSearchParams:
    """How far to look for a cell, and what to accept.

    max_axis : Å; longest vector looked for. min_axis : Å; the shortest.
    min_indexed : spots that a lattice explains, at least.
    min_fraction : of the spots that it explains; the others may be spurious or of other crystals.
    tolerance : largest distance of each index from a whole number for a spot to count as explained.
    false_alarm : accepted probability that spots without any lattice give one.
    n_search_spots : innermost spots that search. max_spots : innermost spots that refine; counting uses all.
    shift_sigma : expected detector shift over distance. radial_weight : weight of the excitation error
        against the position, as in `tasks.index_frame.IndexParams`.
    """

    max_axis: float = 400.0
    min_axis: float = 3.0
    min_indexed: int = 8
    min_fraction: float = 0.3
    tolerance: float = 0.25
    false_alarm: float = 1e-4
    n_search_spots: int = 120
    max_spots: int = 500
    shift_sigma: float = 5e-4
    radial_weight: float = 0.25

    def __post_init__(self) -> None:
        if not 1 <= self.min_axis < self.max_axis <= 2000:
            raise BadRecipe(f"axes of {self.min_axis} to {self.max_axis} Å cannot be looked for; 1 to 2000 can")
        if self.min_indexed < 6 or not 0 < self.tolerance < 0.5:
            raise BadRecipe(
                f"min_indexed {self.min_indexed} (at least 6) or tolerance {self.tolerance} (0 to 0.5) is out of bounds"
            )


@dataclass(frozen=True)
class FoundLattice:
    """A lattice found in one still without knowing its cell.

    rows : (3, 3) Å, real axes of a reduced primitive cell in the laboratory frame, right-handed.
    n_indexed, n_spots : spots explained, and looked at. rmsd : root mean square distance of explained
        spots from their prediction across the diffracted ray, 1/Å.
    shift : (x, y) of the detector's true place minus the assumed one over its distance, rad.
    log10_chance : log10 of the probability that spots without a lattice agree so well with some cell.
    """

    rows: np.ndarray
    n_indexed: int
    n_spots: int
    rmsd: float
    shift: tuple[float, float]
    log10_chance: float


def find_lattice(q: np.ndarray, wavelength: float, params: CellSearchParams | None = None) -> FoundLattice | None:
    """The lattice that explains the spots of one still best; None where none is better than chance.

    Parameters
    ----------
    q : (n, 3) scattering vectors, 1/Å without 2π, laboratory frame with z along the beam. wavelength : Å.
    """
    p = params or CellSearchParams()
    if not 0.1 < wavelength < 20:
        raise BadRecipe(f"wavelength {wavelength} is not between 0.1 and 20 Å; give it in Å")
    q = _sorted_spots(q)
    if len(q) < p.min_indexed:
        return None
    best: FoundLattice | None = None
    bases: list[np.ndarray] = []
    for reach in _reaches(p.max_axis):
        vectors = lattice_vectors(q, reach, n_search_spots=p.n_search_spots, max_spots=p.max_spots, min_axis=p.min_axis)
        bases = _bases(q[: p.n_search_spots], vectors, wavelength) + bases
        best = _best_refined(q, bases[:_N_BASES], best, wavelength, p)
        if best is not None and _is_convincing(best, p):
            return best
    completed = [c for basis in bases[::_N_BASES] for c in _completed(q, basis, wavelength, p)]
    best = _best_refined(q, completed, best, wavelength, p)
    return best if best is not None and _is_accepted(best, p) else None


def _best_refined(
    q: np.ndarray, bases: list[np.ndarray], best: FoundLattice | None, wavelength: float, p: CellSearchParams
) -> FoundLattice | None:
    """The least accidental of some cells after refinement, and of the one that was the best before."""
    found = [_refined(q, basis, wavelength, p) for basis in bases]
    every = [one for one in (best, *found) if one is not None]
    return min(every, key=lambda one: one.log10_chance, default=None)


def distance_scale(
    stills: Sequence[tuple[np.ndarray, FoundLattice]], wavelength: float, params: CellSearchParams | None = None
) -> float:
    """True detector distance over the assumed one, as the lattices of several stills want it.

    A wrong distance bends the Ewald sphere that the spots are put on, so that lattices fit worse: how little chance
    explains them is compared at a few distances. A result at an end, 0.94 or 1.06, means that or more. Not
    seen are a wrong wavelength, and a wrong distance where all spots are near the beam: both only scale the cell.

    Parameters
    ----------
    stills : q (n, 3) and the lattice found in it, of each; without any, 1.
    """
    p = params or CellSearchParams()
    scales = np.linspace(0.94, 1.06, 13)
    chance = np.zeros(len(scales))
    for i, scale in enumerate(scales):
        for q, found in stills:
            moved = _sorted_spots(_at_distance(q, scale, wavelength))
            refined = _refined(moved, found.rows * scale, wavelength, p)
            chance[i] += refined.log10_chance if refined is not None else 0.0
    best = int(chance.argmin())
    if not chance.any() or best in (0, len(scales) - 1):
        return float(scales[best]) if chance.any() else 1.0
    before, here, after = chance[best - 1 : best + 2]
    return float(scales[best] + (scales[1] - scales[0]) * (before - after) / 2 / (before - 2 * here + after))


def _at_distance(q: np.ndarray, scale: float, wavelength: float) -> np.ndarray:
    """Scattering vectors of the same spots were the detector farther away by a factor."""
    ray = q * wavelength + [0.0, 0.0, 1.0]
    ray = ray / ray[:, 2:] * [1 / scale, 1 / scale, 1.0]
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    return np.asarray((ray - [0.0, 0.0, 1.0]) / wavelength)


# Explained fraction with which the search ends.
_CONVINCING = 0.6
_N_BASES = 4
_N_THIRDS = 400
_GROWTH = 1.6
# 1/Å; what lies at the beam itself fits every lattice and tells nothing, and spots so near to each other are one.
_BEAM = 1e-4
# Of third axes: distance of the other two from whole numbers, spots that score, steps in fringes of the farthest.
_FITTING, _N_THIRD_SPOTS, _THIRD_STEP = 0.2, 60, 0.5
_MOST_PLACES = 6e5
# Distances from a point of the lattice, 1/Å, at which agreement is counted: a still measures well across the ray only.
_ACROSS = (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
_ALONG = (6e-4, 1.5e-3, 4e-3)
# For the refinement of nine parameters and a shift, and for spots denser near the beam than the count of resolution
# elements assumes: with 2, 3 of 60 frames of 100 such spots had a lattice.
_LOG10_FREEDOM = 4.0
# Share of the explained spots that must do without half or two thirds of the points for these to be left out.
_OBEYING = 0.8
# Relative strain by which a cell may be refined away from where it was found.
_STRAIN_SIGMA = 0.03


def _sorted_spots(q: np.ndarray) -> np.ndarray:
    """Usable spots, innermost first; of several at one place one."""
    q = np.ascontiguousarray(q, float).reshape(-1, 3)
    length = np.linalg.norm(q, axis=1)
    usable = np.flatnonzero(np.isfinite(length) & (length > _BEAM))
    _, first = np.unique(np.rint(q[usable] / _BEAM).astype(int), axis=0, return_index=True)
    usable = usable[np.sort(first)]
    return q[usable[np.argsort(length[usable], kind="stable")]]


def _reaches(max_axis: float) -> list[float]:
    """Lengths, Å, up to which vectors are looked for in turn: short axes are found with farther spots."""
    return [reach for reach in (160.0,) if reach < max_axis] + [max_axis]


def _is_convincing(found: FoundLattice, p: CellSearchParams) -> bool:
    return found.n_indexed >= _CONVINCING * found.n_spots and _is_accepted(found, p)


def _is_accepted(found: FoundLattice, p: CellSearchParams) -> bool:
    return found.n_indexed >= max(p.min_indexed, p.min_fraction * found.n_spots) and found.log10_chance < np.log10(
        p.false_alarm
    )


# ---- cells ----------------------------------------------------------------------------------------


def _bases(q: np.ndarray, vectors: np.ndarray, wavelength: float) -> list[np.ndarray]:
    """The best triples of vectors, (3, 3) Å right-handed reduced rows, of different cells."""
    if len(vectors) < 3:
        return []
    triples = np.array(list(combinations(range(len(vectors)), 3)))
    rows = vectors[triples]
    volume = np.linalg.det(rows)
    # Vectors of one plane, or nearly, make no cell; a reduced one fills at least 1/√2 of its box.
    is_solid = np.abs(volume) > 0.3 * np.linalg.norm(rows, axis=2).prod(axis=1)
    rows, volume = rows[is_solid] * np.sign(volume[is_solid])[:, None, None], np.abs(volume[is_solid])
    chance = _log10_chances(q, rows, wavelength)
    chosen: list[np.ndarray] = []
    taken: list[float] = []
    for number in np.argsort(chance, kind="stable"):
        if len(chosen) == _N_BASES:
            break
        if all(abs(volume[number] / v - 1) > 0.03 for v in taken):
            taken.append(float(volume[number]))
            chosen.append(_reduced(rows[number]))
    return chosen


def _completed(q: np.ndarray, basis: np.ndarray, wavelength: float, p: CellSearchParams) -> list[np.ndarray]:
    """Cells of the two axes of a basis that fit the most spots, with other third axes, the best first.

    A long axis among short ones is missed where spots are few and far out: the transform would have to be both fine
    and wide. Up to sums with the two known axes a third lies above the mesh that they span; so few places are left
    that all can be tried, with just the spots that the two fit.
    """
    off = np.abs(q @ basis.T - np.rint(q @ basis.T))
    pairs = [(0, 1), (0, 2), (1, 2)]
    fits = [(off[:, pair] < _FITTING).all(axis=1) for pair in pairs]
    best = int(np.argmax([fit.sum() for fit in fits]))
    pair, spots = basis[list(pairs[best])], q[fits[best]][: p.max_spots]
    if len(spots) < p.min_indexed:
        return []
    places = _places_above(pair, spots[:_N_THIRD_SPOTS], p)
    score = np.empty(places.shape[1], np.float32)
    score_directions(spots[:_N_THIRD_SPOTS].astype(np.float32), places, np.float32(0.0625), score)
    top = np.argpartition(score, min(_N_THIRDS, len(score) - 1))[:_N_THIRDS]
    top = top[np.lexsort((top, score[top]))]
    thirds = refine_vectors(spots[:_N_THIRD_SPOTS], np.ascontiguousarray(places[:, top].T.astype(float)))
    thirds = refine_vectors(spots, thirds)
    rows = np.array([[*pair, third] for third in thirds])
    volume = np.linalg.det(rows)
    is_solid = np.abs(volume) > 0.3 * np.linalg.norm(np.cross(*pair)) * p.min_axis
    rows = rows[is_solid] * np.sign(volume[is_solid])[:, None, None]
    chance = _log10_chances(q[: p.max_spots], rows, wavelength)
    return [_reduced(rows[i]) for i in np.argsort(chance, kind="stable")[:_N_BASES]]


def _places_above(pair: np.ndarray, spots: np.ndarray, p: CellSearchParams) -> np.ndarray:
    """(3, n) float32, Å: ends of third axes over one mesh of the pair, up to the longest axis."""
    step = _THIRD_STEP / float(np.linalg.norm(spots, axis=1).max())
    normal = np.cross(*pair)
    normal /= np.linalg.norm(normal)
    heights = np.arange(max(p.min_axis, 5.0), p.max_axis, step)
    n = [max(2, int(np.ceil(np.linalg.norm(axis) / step))) for axis in pair]
    most = max(1, int(_MOST_PLACES / (n[0] * n[1])))
    up = np.outer(normal, heights[:most]).astype(np.float32)[:, :, None, None]
    first = np.outer(pair[0], np.arange(n[0]) / n[0]).astype(np.float32)[:, None, :, None]
    second = np.outer(pair[1], np.arange(n[1]) / n[1]).astype(np.float32)[:, None, None, :]
    return np.ascontiguousarray((up + first + second).reshape(3, -1))


def _log10_chances(q: np.ndarray, rows: np.ndarray, wavelength: float) -> np.ndarray:
    """log10 of an upper estimate of the chance to see such agreement without a lattice, with any cell.

    A spot falls within r across and e along the diffracted ray of one of a lattice's points with
    probability π r² 2e times the cell's volume; so many do by Chernoff's bound on the binomial law. The
    number of independent trials is that of cells up to this volume which such a spot can tell apart.

    Parameters
    ----------
    rows : (n, 3, 3) Å, real axes of n cells.
    """
    if not len(rows):
        return np.empty(0)
    counts = _count_near(q, rows, wavelength, np.array(_ACROSS), np.array(_ALONG))
    volume, spread = np.abs(np.linalg.det(rows)), _spread(q)
    best = np.zeros(len(rows))
    for i, across in enumerate(_ACROSS):
        for j, along in enumerate(_ALONG):
            chance = np.minimum(2 * np.pi * across**2 * along * volume, 1.0)
            tails = _log10_tails(counts[:, i, j], len(q), chance)
            best = np.minimum(best, tails + _log10_trials(volume, spread, chance))
    return best


@njit(cache=True, nogil=True)
def _count_near(q, rows, wavelength, across_limits, along_limits):
    """(cells, across, along): spots within these distances, 1/Å, of the point that rounding their indices gives."""
    counts = np.zeros((rows.shape[0], across_limits.size, along_limits.size), np.int64)
    for i in range(rows.shape[0]):
        cell, A = rows[i], np.linalg.inv(rows[i])
        for j in range(q.shape[0]):
            x, y, z = q[j, 0], q[j, 1], q[j, 2]
            dx, dy, dz = x, y, z
            for k in range(3):
                whole = np.rint(cell[k, 0] * x + cell[k, 1] * y + cell[k, 2] * z)
                dx -= A[0, k] * whole
                dy -= A[1, k] * whole
                dz -= A[2, k] * whole
            along = dx * x * wavelength + dy * y * wavelength + dz * (z * wavelength + 1)
            across = np.sqrt(max(dx * dx + dy * dy + dz * dz - along * along, 0.0))
            along = abs(along)
            for a in range(across_limits.size):
                if across <= across_limits[a]:
                    for b in range(along_limits.size):
                        if along <= along_limits[b]:
                            counts[i, a, b] += 1
    return counts


def _log10_tails(n: np.ndarray, n_spots: int, chance: np.ndarray) -> np.ndarray:
    """log10 of Chernoff's bound for n or more of so many spots, each with its chance; (cells,) as n and chance are."""
    x = np.clip(n / n_spots, 1e-12, 1)
    chance = np.minimum(chance, 1 - 1e-12)
    rest = np.where(x < 1, (1 - x) * np.log(np.maximum(1 - x, 1e-300) / (1 - chance)), 0.0)
    return np.where(x > chance, -n_spots * (x * np.log(x / chance) + rest) / np.log(10), 0.0)


def _spread(q: np.ndarray) -> float:
    """Volume, 1/Å³, over which spots spread: the product of their root mean squares along the main axes."""
    return float(np.sqrt(max(np.linalg.det(q.T @ q / len(q)), 0.0)))


def _log10_trials(volume: np.ndarray, spread: float, chance: np.ndarray) -> np.ndarray:
    """log10 of the number of cells of up to this volume that spots can tell apart.

    A vector has as many different values as a half sphere with the radius of a mean axis holds elements of
    the resolution that spots give, when each counts with this chance.
    """
    vectors = 2 * np.pi / 3 * volume * spread / chance
    return 3 * np.log10(np.maximum(vectors, 1.0)) + _LOG10_FREEDOM


def _refined(q: np.ndarray, rows: np.ndarray, wavelength: float, p: CellSearchParams) -> FoundLattice | None:
    """A cell refined outward with more and more spots, without points that no spot asks for, and described."""
    n, last = min(p.n_search_spots, len(q)), min(p.max_spots, len(q))
    shift = np.zeros(2)
    while True:
        U, B, shift, n_used = refine_lattice(
            q[:n], np.eye(3), np.linalg.inv(rows), shift, rows, _free_strains(), wavelength,
            p.radial_weight, p.tolerance, p.shift_sigma, _STRAIN_SIGMA,
        )  # fmt: skip
        if n_used < 6 or not np.isfinite(B).all() or not 0.5 < np.linalg.det(B @ rows) < 2:
            return None
        rows = _without_idle_points(q[:n], np.linalg.inv(U @ B), p)
        if n == last:
            return _described(q, rows, shift, wavelength, p)
        n = min(int(_GROWTH * n), last)


@cache
def _free_strains() -> np.ndarray:
    """(6, 3, 3): all strains, as no symmetry is known."""
    return strain_basis(UnitCell(10, 11, 12, 85, 95, 100, "P 1"))


def _without_idle_points(q: np.ndarray, rows: np.ndarray, p: CellSearchParams) -> np.ndarray:
    """The cell divided by 2 or 3 as long as nearly all explained spots have indices of its superlattice."""
    while True:
        index = q @ rows.T
        whole = np.rint(index)
        whole = whole[np.abs(index - whole).max(axis=1, initial=0.0) <= p.tolerance]
        smaller = next((form for form in _index_2_and_3() if _is_obeyed(whole, form)), None)
        if smaller is None or np.linalg.norm(smaller @ rows, axis=1).min() < p.min_axis:
            return rows
        rows = _reduced(smaller @ rows)


def _is_obeyed(whole: np.ndarray, change: np.ndarray) -> bool:
    """Whether indices (n, 3) stay whole for nearly all spots after a change of basis."""
    changed = whole @ change.T
    n = int((np.abs(changed - np.rint(changed)).max(axis=1, initial=0.0) < 0.01).sum())
    return n >= max(_OBEYING * len(whole), 6)


@cache
def _index_2_and_3() -> tuple[np.ndarray, ...]:
    """Changes of basis to the superlattices of index 3 and 2: inverse Hermite normal forms."""
    forms = []
    for n in (2, 3):
        for a, b, c in product((1, n), repeat=3):
            if a * b * c == n:
                for x, y, z in product(range(b), range(c), range(c)):
                    forms.append(np.array([[a, x, y], [0, b, z], [0, 0, c]], float))
    return tuple(np.linalg.inv(form).T for form in forms)


def _described(
    q: np.ndarray, rows: np.ndarray, shift: np.ndarray, wavelength: float, p: CellSearchParams
) -> FoundLattice | None:
    rows = _reduced(rows)
    observed = true_q(q, shift, wavelength)
    index = observed @ rows.T
    is_in = np.abs(index - np.rint(index)).max(axis=1) <= p.tolerance
    if not is_in.any():
        return None
    rest = observed[is_in] - np.rint(index[is_in]) @ np.linalg.inv(rows).T
    ray = observed[is_in] * wavelength + [0, 0, 1]
    across = rest - (rest * ray).sum(1)[:, None] * ray
    return FoundLattice(
        rows=rows,
        n_indexed=int(is_in.sum()),
        n_spots=len(q),
        rmsd=float(np.sqrt((across**2).sum(1).mean())),
        shift=(float(shift[0]), float(shift[1])),
        log10_chance=float(_log10_chances(observed, rows[None], wavelength)[0]),
    )


def _reduced(rows: np.ndarray) -> np.ndarray:
    """The same lattice by a right-handed basis of shortest vectors."""
    return reduce_rows(np.eye(3), rows) @ rows
