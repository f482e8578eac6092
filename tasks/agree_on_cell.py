"""One cell out of the lattices of many stills: which of them agree, on what, and with what symmetry.

Lattices are compared by the lengths of their shortest vectors, which change smoothly where a reduced basis jumps.
The largest group of lattices that agree gives the median metric; its Bravais lattice is the one of highest
symmetry that the metric has within its own standard error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from tasks.bravais import BravaisLattice, bravais_lattices, metric_of, parameters_of
from tasks.find_cell import FoundLattice
from tasks.unit_cell import rotation_angle_deg, unimodular_matrices

__all__ = ["AgreedCell", "AgreementParams", "agree_on_cell"]


@dataclass(frozen=True)
class AgreementParams:
    """When lattices are the same, and when enough are.

    length_tolerance : largest relative difference of the shortest vectors of two lattices.
    min_agreeing : lattices that agree, at least. min_share : of all that were found.
    max_symmetry_error : largest relative strain by which a lattice may miss a symmetry that is proposed,
        however much the lattices spread.
    listed_error : symmetries that are missed by up to so much are listed.
    """

    length_tolerance: float = 0.03
    min_agreeing: int = 3
    min_share: float = 0.34
    max_symmetry_error: float = 0.015
    listed_error: float = 0.03


@dataclass(frozen=True)
class AgreedCell:
    """A cell on which lattices of several stills agree.

    lattice : the proposal. alternatives : other lattice types within `AgreementParams.listed_error`, highest
        symmetry first. members : which of the given lattices agree.
    parameters : (n, 6), the conventional cell of each member without constraint, Å and degrees.
    spread : (6,), robust standard deviation of these. error : relative standard error of the median cell.
    is_one_orientation : all members stand alike: one crystal, or an artefact of the detector.
    """

    lattice: BravaisLattice
    alternatives: tuple[BravaisLattice, ...]
    members: tuple[int, ...]
    parameters: np.ndarray
    spread: np.ndarray
    error: float
    is_one_orientation: bool


def agree_on_cell(lattices: Sequence[FoundLattice], params: AgreementParams | None = None) -> AgreedCell | None:
    """The cell that most lattices have; None where too few agree."""
    p = params or AgreementParams()
    if len(lattices) < p.min_agreeing:
        return None
    members, metrics = _largest_group([lattice.rows for lattice in lattices], p)
    if len(members) < max(p.min_agreeing, p.min_share * len(lattices)):
        return None
    metric = np.median(metrics, axis=0)
    found = bravais_lattices(np.linalg.cholesky(metric), p.listed_error)
    error = _relative_error(metrics)
    # A lattice without symmetry is met without error, so there always is one.
    limit = min(max(_SIGMAS * error, _LEAST_ERROR), p.max_symmetry_error)
    chosen = next(lattice for lattice in found if lattice.deviation <= limit)
    each = np.array([parameters_of(chosen.rows @ m @ chosen.rows.T) for m in metrics])
    return AgreedCell(
        lattice=chosen,
        alternatives=tuple(lattice for lattice in found if lattice is not chosen),
        members=tuple(int(i) for i in members),
        parameters=each,
        spread=_robust_sigma(each),
        error=error,
        is_one_orientation=_stand_alike([lattices[i].rows for i in members]),
    )


# Standard errors by which a symmetry may be missed, and the relative strain that is always allowed: geometry is not
# known better.
_SIGMAS, _LEAST_ERROR = 3.0, 0.004
# Smallest spread that is believed: a few lattices may agree by luck.
_LEAST_SPREAD = 0.003
_N_SHORTEST = 7
_ALIKE_DEG = 2.0


def _largest_group(cells: list[np.ndarray], p: AgreementParams) -> tuple[np.ndarray, np.ndarray]:
    """(members, their metrics in one basis): the most lattices that agree with one of them, then with their median."""
    lengths = np.array([_shortest_lengths(metric_of(rows)) for rows in cells])
    volume = np.array([abs(np.linalg.det(rows)) for rows in cells])
    apart = np.abs(lengths[:, None] / lengths[None] - 1).max(axis=2)
    is_near = (apart < p.length_tolerance) & (np.abs(volume[:, None] / volume[None] - 1) < 2 * p.length_tolerance)
    centre = int(np.lexsort((apart.sum(axis=1), -is_near.sum(axis=1)))[0])
    members, metrics = _aligned(cells, np.flatnonzero(is_near[centre]), metric_of(cells[centre]), p)
    if len(members):
        middle = np.median(metrics, axis=0)
        off = np.abs(lengths / _shortest_lengths(middle) - 1).max(axis=1)
        members, metrics = _aligned(cells, np.flatnonzero(off < p.length_tolerance), middle, p)
    return members, metrics


def _aligned(
    cells: list[np.ndarray], among: np.ndarray, target: np.ndarray, p: AgreementParams
) -> tuple[np.ndarray, np.ndarray]:
    """Those of some lattices that have a basis like the target's, and their metrics (n, 3, 3) in it."""
    changes = unimodular_matrices()
    scale = np.sqrt(np.outer(np.diag(target), np.diag(target)))
    members, metrics = [], []
    for i in among:
        moved = changes @ metric_of(cells[i]) @ changes.transpose(0, 2, 1)
        off = (np.abs(moved - target) / scale).max(axis=(1, 2))
        best = int(off.argmin())
        if off[best] < 3 * p.length_tolerance:
            members.append(i)
            metrics.append(moved[best])
    return np.array(members, int), np.array(metrics).reshape(-1, 3, 3)


@cache
def _pairs() -> np.ndarray:
    """(62, 3): lattice vectors of whole numbers up to 2, without their negatives."""
    every = np.array(list(product(range(-2, 3), repeat=3)))
    return every[len(every) // 2 + 1 :]


def _shortest_lengths(metric: np.ndarray) -> np.ndarray:
    """(7,) Å: lengths of the shortest lattice vectors in order; of a reduced basis these determine the lattice."""
    vectors = _pairs()
    return np.sqrt(np.sort(np.einsum("ni,ij,nj->n", vectors, metric, vectors))[:_N_SHORTEST])


def _robust_sigma(values: np.ndarray) -> np.ndarray:
    """Of each column, from the median absolute deviation."""
    return np.asarray(1.4826 * np.median(np.abs(values - np.median(values, axis=0)), axis=0))


def _relative_error(metrics: np.ndarray) -> float:
    """Relative standard error of the lengths of the median cell, the worst of its directions."""
    scale = np.sqrt(np.outer(np.diag(metrics[0]), np.diag(metrics[0])))
    sigma = float(_robust_sigma((metrics / scale).reshape(-1, 9)).max()) / 2
    # A median is less certain than a mean by the square root of π/2.
    return 1.2533 * max(sigma, _LEAST_SPREAD) / float(np.sqrt(len(metrics)))


def _stand_alike(cells: list[np.ndarray]) -> bool:
    """Whether all lattices have the orientation of the first, up to whole numbers."""
    for rows in cells[1:]:
        change = np.rint(rows @ np.linalg.inv(cells[0]))
        if abs(abs(np.linalg.det(change)) - 1) > 1e-6:
            return False
        u, _, vt = np.linalg.svd(np.linalg.solve(change @ cells[0], rows))
        if rotation_angle_deg(u @ vt) > _ALIKE_DEG:
            return False
    return True
