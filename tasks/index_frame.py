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

import numpy as np

from storage.errors import BadRecipe
from tasks.refine_lattice import agreement, nearest_indices, refine_lattice, strain_basis
from tasks.search_lattice import axis_candidates, n_turns, turned_cells
from tasks.unit_cell import BadCell, UnitCell, lattice_rotations, rotation_angle_deg, symmetrised

__all__ = ["Crystal", "IndexParams", "Indexer"]


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
        q, A = np.ascontiguousarray(q, float).reshape(-1, 3), np.ascontiguousarray(self.A, float)
        whole, off = nearest_indices(q, A, np.array(self.shift), wavelength)
        return whole, off


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
        self._limits = np.array([t for t in _CHANCE_LIMITS if t < self.params.tolerance] + [self.params.tolerance])
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
            vectors = axis_candidates(q, scale * float(np.linalg.norm(self._rows[axis])), q_max)
            for sign in (1,) if self._has_opposite[axis] else (1, -1):
                value, cells = turned_cells(q, self._rows, axis, sign * vectors, n_turns(self._rows, axis, q_max))
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
        q, A = np.ascontiguousarray(q, float), np.ascontiguousarray(A)
        n_within, across, along, blur, squares = agreement(q, A, shift, self.wavelength, self._limits)
        n_in = int(n_within[-1])
        if not n_in:
            return None
        chance = self._log10_chance(n_within, squares / len(q), len(q), A)
        if -chance < len(q) * self._needed_evidence(blur):
            return None
        A_cell = A @ self._to_primitive
        try:
            cell = self.cell.with_matrix(A_cell)
        except BadCell:
            return None
        return Crystal(
            A=A_cell, cell=cell, n_indexed=n_in, n_spots=len(q),
            rmsd=math.sqrt(across / n_in), excitation_rmsd=math.sqrt(along / n_in),
            shift=(float(shift[0]), float(shift[1])), log10_chance=chance,
        )  # fmt: skip

    def _needed_evidence(self, blur: float) -> float:
        """Decades per spot; less where spots are just where the lattice has them on the detector, ``blur`` indices off.

        Excitation errors blur the indices along a long axis, and with them the chance; across the ray they do not.
        """
        return self.params.min_evidence * (1.0 if blur <= _SHARP * self.params.tolerance else _BLURRED)

    def _log10_chance(self, n_within: np.ndarray, mean_square: float, n_spots: int, A: np.ndarray) -> float:
        """log10 of an upper estimate of the chance to see such agreement without a lattice.

        One spot falls within t of whole indices with probability (2t)^3; so many do by
        Chernoff's bound on the binomial law; the number of independent trials is the volume of all rotations, 8π², over
        that of one resolved rotation, (2t / (|a| |q|))^3, times a factor for each refined parameter.
        """
        n_free = len(self._strains) + (2 if self.params.refine_shift else 0)
        reach = math.sqrt(mean_square) / float(np.linalg.det(A)) ** (1 / 3)
        best = 0.0
        for t, n in zip(self._limits.tolist(), n_within.tolist(), strict=True):
            tail = _log10_binomial_tail(n, n_spots, (2 * t) ** 3)
            trials = math.log10(8 * math.pi**2) + 3 * math.log10(max(reach / (2 * t), 1.0)) + 0.7 * n_free + 1.0
            best = min(best, tail + trials)
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
# 1/Å; no crystal here has a cell edge of 1 µm.
_BEAM = 1e-4
# Distances from whole indices at which agreement is counted for its chance, beside the tolerance.
_CHANCE_LIMITS = (0.06, 0.09, 0.13, 0.18)
# Half the explained spots of a true lattice are within this share of the tolerance across the ray (real, rather mosaic
# crystals: 0.2; wrong cells 0.2 to 0.5); where they are not, it takes so much more evidence.
_SHARP, _BLURRED = 0.16, 1.6
# Two lattices closer than this are one crystal with a wide mosaic spread.
_SAME_LATTICE_DEG = 1.5


def _log10_binomial_tail(n: int, trials: int, p: float) -> float:
    """Upper bound on log10 P(X >= n) of the binomial law (Chernoff): exp of minus the relative entropy."""
    x = n / trials
    if x <= p:
        return 0.0
    rest = 0.0 if n == trials else (1 - x) * math.log((1 - x) / (1 - p))
    return -trials * (x * math.log(x / p) + rest) / math.log(10)


def _distinct_axes(rows: np.ndarray) -> list[int]:
    """Axes of different length, the short, cheap ones first: equal ones would be found by the same search."""
    lengths = np.linalg.norm(rows, axis=1)
    distinct = [i for i in range(3) if all(abs(lengths[i] - lengths[j]) > 0.005 * lengths[i] for j in range(i))]
    return sorted(distinct, key=lambda i: float(lengths[i]))


def _has_twofold_across(cell: UnitCell, axis: int, rows: np.ndarray) -> bool:
    """Whether a lattice rotation reverses the axis, so that its two senses are the same lattice."""
    turns = cell.B @ lattice_rotations(cell) @ np.linalg.inv(cell.B)
    return bool((np.linalg.norm(turns @ rows[axis] + rows[axis], axis=1) < 0.01 * np.linalg.norm(rows[axis])).any())
