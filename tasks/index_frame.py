"""Lattices in the spots of one still, with a known unit cell.

Direction sampling (as in TORO and ffbidx, Gasparotto et al. 2024): a real axis a of a lattice that
is present makes q.a near-integer for every spot. So for each edge length of the reduced primitive
cell, all directions are scored with the innermost spots; the best are refined, the whole cell is
turned about each of them, and the best cells are refined with all spots: orientation, the free
cell parameters of the crystal system, and a small detector shift. Any lattice and centring goes the
same way, since sampling sees only a reduced primitive cell.

A lattice is accepted for the number and the fraction of spots it explains, and only if so good an
agreement is improbable by chance over all orientations that could have been tried.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit

from storage.errors import BadRecipe
from tasks.unit_cell import (
    BadCell,
    UnitCell,
    hkl_symmetry_ops,
    lattice_rotations,
    rotation_angle_deg,
    symmetrised,
)

__all__ = [
    "Crystal",
    "IndexParams",
    "Indexer",
    "refine_lattice",
    "refine_vectors",
    "score_directions",
    "strain_basis",
    "true_q",
]


@dataclass(frozen=True)
class IndexParams:
    """How hard to look, and what to accept.

    min_indexed, min_fraction : spots that a lattice explains, and as a fraction of those that
        earlier lattices left over.
    tolerance : largest distance of each index from a whole number for a spot to count as explained.
    false_alarm : accepted probability that spots without any lattice give one.
    min_evidence : improbability that a lattice brings, decades per spot looked at; 1.6 times as much
        where spots scatter widely about their places. Spots of another lattice agree with a wrong cell by
        coincidence, the better the larger it is: of up to 350 Å it brought 0.1 to 0.25, at times 0.4 with
        a wide scatter. True lattices bring 0.26 (285 Å, many spurious spots) to 2.5.
    max_lattices : lattices to look for in one frame.
    n_search_spots : innermost spots that score directions; more cost time, fewer miss weak frames.
    max_spots : innermost spots that refine; counting uses all.
    length_scales : factors on the cell edges tried in turn until a lattice is accepted.
    max_strain : largest change of an edge by refinement, relative.
    refine_cell, refine_shift : whether cell and detector shift are free beside the orientation.
    shift_sigma : expected detector shift over distance (1 px of 75 µm at 0.15 m is 5e-4).
    strain_sigma : expected relative error of the given cell.
    radial_weight : weight of the excitation error against the position. A still measures it badly, and yet it says
        most of a rotation across the beam: with 1/4 the orientation of simulated hits is up to two fifths less
        exact, and of the peaks of real stills fewer are explained than by DIALS.
    """

    min_indexed: int = 8
    min_fraction: float = 0.25
    tolerance: float = 0.25
    false_alarm: float = 1e-4
    min_evidence: float = 0.25
    max_lattices: int = 1
    n_search_spots: int = 80
    max_spots: int = 600
    length_scales: tuple[float, ...] = (1.0, 0.985, 1.015)
    max_strain: float = 0.04
    refine_cell: bool = True
    refine_shift: bool = True
    shift_sigma: float = 5e-4
    strain_sigma: float = 0.01
    radial_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.min_indexed < 5 or not 0 < self.tolerance < 0.5 or self.max_lattices < 1:
            raise BadRecipe(
                f"min_indexed {self.min_indexed} (at least 5), tolerance {self.tolerance} (0 to 0.5) or "
                f"max_lattices {self.max_lattices} (at least 1) is out of bounds; see IndexParams"
            )
        if not self.length_scales or self.n_search_spots < 10:
            raise BadRecipe("length_scales needs a factor, and n_search_spots at least 10; see IndexParams")


@dataclass(frozen=True)
class Crystal:
    """One lattice found in a frame.

    A : (3, 3), 1/Å, columns a*, b*, c* in the laboratory frame: q = A @ h; det(A) > 0.
    cell : the refined cell. n_indexed : spots within the tolerance. n_spots : spots looked at.
    rmsd : root mean square distance of explained spots from their prediction, across the
        diffracted ray, 1/Å. excitation_rmsd : the same along the ray.
    shift : (x, y) of the detector's true place minus the assumed one over its distance, rad;
        laboratory axes. Predictions on the assumed geometry must be moved by minus this.
    log10_chance : log10 of the probability that spots without a lattice agree so well.
    """

    A: np.ndarray
    cell: UnitCell
    n_indexed: int
    n_spots: int
    rmsd: float
    excitation_rmsd: float
    shift: tuple[float, float]
    log10_chance: float

    def hkl(self, q: np.ndarray, wavelength: float) -> tuple[np.ndarray, np.ndarray]:
        """Nearest whole indices (n, 3) int of spots q (n, 3), and the largest distance (n,) from them."""
        index = true_q(q, np.array(self.shift), wavelength) @ np.linalg.inv(self.A).T
        nearest = np.rint(index)
        return nearest.astype(int), np.abs(index - nearest).max(axis=1, initial=0.0)


class Indexer:
    """Indexing prepared for one cell and wavelength; keeps no state between calls.

    Parameters
    ----------
    cell : the known unit cell. wavelength : Å.
    """

    def __init__(self, cell: UnitCell, wavelength: float, params: IndexParams | None = None) -> None:
        if not 0.1 < wavelength < 20:
            raise BadRecipe(f"wavelength {wavelength} is not between 0.1 and 20 Å; give it in Å")
        self.cell, self.wavelength, self.params = cell, float(wavelength), params or IndexParams()
        self._to_primitive = cell.primitive_rows
        # Right-handed rows of the reduced primitive cell in the crystal frame.
        self._rows = self._to_primitive @ np.linalg.inv(cell.B)
        self._B = np.linalg.inv(self._rows)
        self._strains = strain_basis(cell) if self.params.refine_cell else np.empty((0, 3, 3))
        self._axes = _distinct_axes(self._rows)
        self._has_opposite = [_has_twofold_across(cell, i, self._rows) for i in range(3)]

    def __call__(self, q: np.ndarray, intensity: np.ndarray | None = None) -> list[Crystal]:
        """Lattices that explain the spots.

        Parameters
        ----------
        q : (n, 3) scattering vectors of the spots, 1/Å without 2π, on the Ewald sphere, laboratory frame.
        intensity : (n,), any measure of strength; where there are more than twice
            n_search_spots inner spots, the stronger half of them is used for the search.

        Returns
        -------
        Accepted lattices, the one that explains most first; empty when there is none.
        """
        q = np.ascontiguousarray(q, float).reshape(-1, 3)
        length = np.linalg.norm(q, axis=1)
        # What lies at the beam itself fits every lattice and tells nothing.
        left = np.flatnonzero(np.isfinite(length) & (length > _BEAM))
        left = left[np.argsort(length[left], kind="stable")]
        found: list[Crystal] = []
        while len(found) < self.params.max_lattices and len(left) >= self.params.min_indexed:
            crystal = self._one_lattice(q[left], None if intensity is None else np.asarray(intensity)[left], found)
            if crystal is None:
                break
            found.append(crystal)
            _, off = crystal.hkl(q[left], self.wavelength)
            left = left[off > self.params.tolerance]
        return found

    def described(self, q: np.ndarray, A: np.ndarray, shift: tuple[float, float] = (0.0, 0.0)) -> Crystal | None:
        """A lattice that another program found, counted and measured as ours are; None if it explains no spot.

        Parameters
        ----------
        q : (n, 3) scattering vectors of all spots of the frame, 1/Å.
        A : (3, 3), 1/Å, columns a*, b*, c* of the cell in its own setting; its symmetry is imposed on them.
        shift : as `Crystal` has it.
        """
        length = np.linalg.norm(q, axis=1)
        q = q[np.isfinite(length) & (length > _BEAM)]
        if not len(q):
            return None
        return self._described(q, symmetrised(A, self.cell) @ np.linalg.inv(self._to_primitive), np.array(shift))

    def _one_lattice(self, q: np.ndarray, intensity: np.ndarray | None, known: list[Crystal]) -> Crystal | None:
        accepted: list[Crystal] = []
        for scale in self.params.length_scales:
            for n_spots, axes in self._searches(len(q)):
                best = self._searched(q, self._search_spots(q, intensity, n_spots), axes, scale, known)
                if best is None:
                    continue
                accepted.append(best)
                # A long axis taken at a wrong length explains part of the spots; another scale may explain all.
                if best.n_indexed >= _CONVINCING * best.n_spots:
                    return min(accepted, key=lambda c: c.log10_chance)
        return min(accepted, key=lambda c: c.log10_chance, default=None)

    def _searches(self, n_spots: int) -> Iterator[tuple[int, list[int]]]:
        """(spots, axes) of the searches at one scale, the cheap ones first: one of them finds most lattices."""
        few, many = min(_N_FEW, self.params.n_search_spots), self.params.n_search_spots
        yield few, self._axes[:1]
        if len(self._axes) > 1:
            yield few, self._axes[1:]
        if min(n_spots, many) > few:
            yield many, self._axes

    def _searched(
        self, q: np.ndarray, search: np.ndarray, axes: list[int], scale: float, known: list[Crystal]
    ) -> Crystal | None:
        starts = []
        for start in self._starts(search, axes, scale):
            starts.append(self._settled(search, start))
            if starts[-1].n_used >= _PLAIN * len(search):
                break
        starts.sort(key=lambda s: -s.n_used)
        found: list[Crystal] = []
        for start in starts[:_N_REFINED]:
            crystal = self._refined(q, start, len(search))
            if crystal is None or not self._is_accepted(crystal) or any(self._is_same(crystal, c) for c in known):
                continue
            found.append(crystal)
            if crystal.n_indexed >= _PLAIN * crystal.n_spots:
                break
        return min(found, key=lambda c: c.log10_chance, default=None)

    def _search_spots(self, q: np.ndarray, intensity: np.ndarray | None, n: int) -> np.ndarray:
        if intensity is None or len(q) <= 2 * n:
            return q[:n]
        strong = np.sort(np.argsort(-intensity[: 2 * n], kind="stable")[:n])
        return q[strong]

    def _starts(self, q: np.ndarray, axes: list[int], scale: float) -> np.ndarray:
        """(n, 3, 3): orientation times scale of the most promising cells, best first."""
        q_max = float(np.linalg.norm(q, axis=1).max())
        score, turned = np.empty(0), np.empty((0, 3, 3))
        for axis in axes:
            vectors = _axis_candidates(q, scale * float(np.linalg.norm(self._rows[axis])), q_max)
            for sign in (1,) if self._has_opposite[axis] else (1, -1):
                value, cells = _turned_cells(q, self._rows, axis, sign * vectors, _n_turns(self._rows, axis, q_max))
                score, turned = np.concatenate([score, value]), np.concatenate([turned, cells])
        return turned[np.argsort(-score, kind="stable")[:_N_STARTS]]

    def _settled(self, q: np.ndarray, start: np.ndarray) -> "_Start":
        """A start after refinement with the search spots, and how many of them it explains."""
        # It scales real lengths, so reciprocal ones go the other way.
        scale = np.cbrt(np.linalg.det(start))
        return _Start(*self._refine(q, _Start(start / scale, self._B / scale, np.zeros(2), 0)))

    def _refined(self, q: np.ndarray, start: "_Start", n: int) -> Crystal | None:
        """Refined outward from n spots: more each time, so that far indices are right before they count."""
        p = self.params
        last = min(p.max_spots, len(q))
        while n < last:
            n = min(int(_GROWTH * n), last)
            start = _Start(*self._refine(q[:n], start))
            if start.n_used < min(p.min_indexed, 6):
                return None
        edges = np.linalg.norm(np.linalg.inv(start.B), axis=1) / np.linalg.norm(self._rows, axis=1)
        if np.abs(edges - 1).max() > p.max_strain:
            return None
        return self._described(q, start.U @ start.B, start.shift)

    def _refine(self, q: np.ndarray, start: "_Start") -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        p = self.params
        return refine_lattice(
            q, start.U, start.B, start.shift, self._rows, self._strains, self.wavelength,
            p.radial_weight, p.tolerance, p.shift_sigma if p.refine_shift else 0.0, p.strain_sigma,
        )  # fmt: skip

    def _described(self, q: np.ndarray, A: np.ndarray, shift: np.ndarray) -> Crystal | None:
        """Count, compare and convert: A of the primitive cell becomes that of the cell itself."""
        observed = true_q(q, shift, self.wavelength)
        index = observed @ np.linalg.inv(A).T
        off = np.abs(index - np.rint(index)).max(axis=1)
        is_in = off <= self.params.tolerance
        if not is_in.any():
            return None
        rest = observed[is_in] - np.rint(index[is_in]) @ A.T
        ray = observed[is_in] * self.wavelength + [0, 0, 1]
        along = (rest * ray).sum(1)
        across = rest - along[:, None] * ray
        chance = self._log10_chance(off, observed, A)
        if -chance < len(q) * self._needed_evidence(across @ np.linalg.inv(A).T):
            return None
        A_cell = A @ self._to_primitive
        try:
            cell = self.cell.with_matrix(A_cell)
        except BadCell:
            return None
        return Crystal(
            A=A_cell, cell=cell, n_indexed=int(is_in.sum()), n_spots=len(q),
            rmsd=float(np.sqrt((across**2).sum(1).mean())), excitation_rmsd=float(np.sqrt((along**2).mean())),
            shift=(float(shift[0]), float(shift[1])), log10_chance=chance,
        )  # fmt: skip

    def _needed_evidence(self, across: np.ndarray) -> float:
        """Decades per spot; less where spots are just where the lattice has them on the detector, (n, 3) indices off.

        Excitation errors blur the indices along a long axis, and with them the chance; across the ray they do not.
        """
        is_sharp = np.median(np.abs(across).max(axis=1)) <= _SHARP * self.params.tolerance
        return self.params.min_evidence * (1.0 if is_sharp else _BLURRED)

    def _log10_chance(self, off: np.ndarray, q: np.ndarray, A: np.ndarray) -> float:
        """log10 of an upper estimate of the chance to see such agreement without a lattice.

        One spot falls within t of whole indices with probability (2t)^3; so many do by
        Chernoff's bound on the binomial law; the number of independent trials is the volume of all rotations, 8π², over
        that of one resolved rotation, (2t / (|a| |q|))^3, times a factor for each refined parameter.
        """
        n_free = len(self._strains) + (2 if self.params.refine_shift else 0)
        reach = np.cbrt(1 / np.linalg.det(A)) * np.sqrt((q**2).sum(1).mean())
        best = 0.0
        for t in (0.06, 0.09, 0.13, 0.18, self.params.tolerance):
            tail = _log10_binomial_tail(int((off <= t).sum()), len(off), (2 * t) ** 3)
            trials = np.log10(8 * np.pi**2) + 3 * np.log10(max(reach / (2 * t), 1.0)) + 0.7 * n_free + 1.0
            best = min(best, float(tail + trials))
        return best

    def _is_accepted(self, crystal: Crystal) -> bool:
        p = self.params
        return (
            crystal.n_indexed >= p.min_indexed
            and crystal.n_indexed >= p.min_fraction * crystal.n_spots
            and crystal.log10_chance < np.log10(p.false_alarm)
        )

    def _is_same(self, one: Crystal, other: Crystal) -> bool:
        rest = one.A @ lattice_rotations(self.cell) @ np.linalg.inv(other.A)
        u, _, vt = np.linalg.svd(rest)
        return min(rotation_angle_deg(m) for m in u @ vt) < _SAME_LATTICE_DEG


@dataclass(frozen=True)
class _Start:
    """A cell in the laboratory, U B, that is being refined. shift : (x, y) rad; n_used : spots that fit."""

    U: np.ndarray
    B: np.ndarray
    shift: np.ndarray
    n_used: int


# Spots of the first, cheap search; starts that are refined with them, and how many of these with all spots.
_N_FEW = 40
_N_STARTS = 16
_N_REFINED = 3
# Explained fraction with which the search ends, and growth of the spots used from one refinement to the next.
_CONVINCING, _GROWTH = 0.6, 1.35
# With such a part of the spots explained nothing better will be found.
_PLAIN = 0.85
_N_VECTORS = 32
_N_CYCLES = 12
# Cycles in which the tolerance still shrinks, and the largest step (rad, relative) after which nothing changes.
_N_NARROWING, _SETTLED = 5, 1e-7
# 1/Å; no crystal here has a cell edge of 1 µm.
_BEAM = 1e-4
# Half the explained spots of a true lattice are within this share of the tolerance across the ray (real, rather mosaic
# crystals: 0.2; wrong cells 0.2 to 0.5); where they are not, it takes so much more evidence.
_SHARP, _BLURRED = 0.16, 1.6
# Two lattices closer than this are one crystal with a wide mosaic spread.
_SAME_LATTICE_DEG = 1.5
# Distance from a whole index beyond which a spot tells nothing in the searches.
_CLIP = 0.25


def _log10_binomial_tail(n: int, trials: int, p: float) -> float:
    """Upper bound on log10 P(X >= n) of the binomial law (Chernoff): exp of minus the relative entropy."""
    x = n / trials
    if x <= p:
        return 0.0
    rest = 0.0 if n == trials else (1 - x) * np.log((1 - x) / (1 - p))
    return float(-trials * (x * np.log(x / p) + rest) / np.log(10))


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


def _distinct_axes(rows: np.ndarray) -> list[int]:
    """Axes of different length, the short, cheap ones first: equal ones would be found by the same search."""
    lengths = np.linalg.norm(rows, axis=1)
    distinct = [i for i in range(3) if all(abs(lengths[i] - lengths[j]) > 0.005 * lengths[i] for j in range(i))]
    return sorted(distinct, key=lambda i: float(lengths[i]))


def _has_twofold_across(cell: UnitCell, axis: int, rows: np.ndarray) -> bool:
    """Whether a lattice rotation reverses the axis, so that its two senses are the same lattice."""
    turns = cell.B @ lattice_rotations(cell) @ np.linalg.inv(cell.B)
    return bool((np.linalg.norm(turns @ rows[axis] + rows[axis], axis=1) < 0.01 * np.linalg.norm(rows[axis])).any())


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


def _axis_candidates(q: np.ndarray, length: float, q_max: float) -> np.ndarray:
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


def _n_turns(rows: np.ndarray, axis: int, q_max: float) -> int:
    """Steps of a full turn about an axis between which the farthest spot is off by 0.15 fringes."""
    unit = rows[axis] / np.linalg.norm(rows[axis])
    reach = np.linalg.norm(rows - (rows @ unit)[:, None] * unit, axis=1).max()
    return int(np.clip(2 * np.pi * reach * q_max / 0.3, 90, 3000))


@njit(cache=True, nogil=True)
def _turned_cells(q, rows, axis, vectors, n_turns):
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
