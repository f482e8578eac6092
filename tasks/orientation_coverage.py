"""Which way crystals stand: the directions in which the beam went through them, and whether they prefer to lie so.

Needles line up with the jet and plates with the film they lie in; then some directions of reciprocal space are
measured again and again, and others never.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import chdtrc

from tasks.unit_cell import UnitCell

__all__ = ["Alignment", "axis_directions", "beam_directions", "largest_gap_deg", "laue_rotations", "preferred_axis"]

# Of axes that point anywhere, one sample in a thousand has a largest eigenvalue above 1/3 + 3.38 √(2/(15 n)): the
# largest eigenvalue of a traceless symmetric matrix of five independent normal elements, by 400,000 trials.
_ONE_IN_A_THOUSAND = 3.38
# Below so many crystals nothing can be said; above such an eigenvalue it is worth saying.
_FEWEST, _NOTABLE, _SURE = 20, 0.38, 1e-3
# Of a sphere, for gaps: about 2° apart.
_N_PROBES = 10_000


@dataclass(frozen=True)
class Alignment:
    """Whether an axis of the crystals points somewhere in the laboratory more often than elsewhere.

    axis : its name, such as ``c*``. eigenvalue : largest of the mean of n nᵀ over the axes' directions n: 1/3 if they
    point anywhere, 1 if all are parallel. highest_random : what random ones exceed once in a thousand times.
    chance : probability of such a tensor for random ones. direction : unit vector in the laboratory frame (z along
    the beam, y up), up to its sign.
    """

    axis: str
    eigenvalue: float
    highest_random: float
    chance: float
    direction: tuple[float, float, float]
    n_crystals: int

    @property
    def is_preferred(self) -> bool:
        """Certain, and strong enough to matter."""
        return self.chance < _SURE and self.eigenvalue > _NOTABLE


def laue_rotations(cell: UnitCell) -> np.ndarray:
    """(n, 3, 3): the rotations of the Laue group in the crystal's Cartesian frame (that of ``cell.B``)."""
    ops = cell.group.operations().derive_symmorphic().sym_ops
    on_hkl = np.array([np.rint(np.array(op.rot).T / op.DEN) for op in ops])
    # With the inversion, which the Laue group has, a mirror is a rotation.
    on_hkl = np.unique(on_hkl * np.sign(np.linalg.det(on_hkl))[:, None, None], axis=0)
    u, _, vt = np.linalg.svd(cell.B @ on_hkl @ np.linalg.inv(cell.B))
    rotations: np.ndarray = u @ vt
    return rotations


def beam_directions(A: np.ndarray, cell: UnitCell) -> np.ndarray:
    """(n, 3): unit vectors of the beam in the crystals' Cartesian frame.

    A : (n, 3, 3), 1/Å, columns a*, b*, c* in the laboratory frame, whose z is along the beam.
    """
    beam = np.linalg.inv(A)[:, :, 2] @ cell.B.T
    directions: np.ndarray = beam / np.linalg.norm(beam, axis=1, keepdims=True)
    return directions


def axis_directions(A: np.ndarray, cell: UnitCell, axis: np.ndarray) -> np.ndarray:
    """(n, 3): where an axis, given in the crystal's Cartesian frame, points in the laboratory.

    A : (n, 3, 3) as above.
    """
    directions = A @ np.linalg.inv(cell.B) @ axis
    return np.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


def largest_gap_deg(directions: np.ndarray, rotations: np.ndarray) -> float:
    """Angle, degrees, from the emptiest direction to the nearest one of ``directions``, (n, 3), or its equivalents.

    Opposite directions count as one: they see the same reflections, up to Friedel's law. NaN without any.
    """
    if not len(directions):
        return float("nan")
    every = np.einsum("mij,nj->mni", rotations, directions).reshape(-1, 3)
    distance, _ = cKDTree(np.concatenate([every, -every])).query(_sphere(_N_PROBES))
    return float(np.degrees(2 * np.arcsin(min(distance.max() / 2, 1.0))))


def preferred_axis(A: np.ndarray, cell: UnitCell) -> Alignment | None:
    """The axis of the crystals that is least random in the laboratory; None where nothing can be said.

    Only axes that symmetry leaves alone are looked at: the main axis of a tetragonal, trigonal or hexagonal crystal,
    a*, b* and c* where symmetry is lower. Of a cubic crystal the tensor of equivalent axes is the same however it
    stands.

    Parameters
    ----------
    A : (n, 3, 3) as above; fewer than 20 crystals tell nothing.

    The test is Bingham's (K. V. Mardia & P. E. Jupp, Directional Statistics, 2000, section 10.7): with T the mean of
    n nᵀ, 15 n/2 (tr T² − 1/3) is a χ² with five degrees of freedom for random axes. Of three axes tried, the chance
    is taken threefold.
    """
    axes = _own_axes(cell)
    if len(A) < _FEWEST or not axes:
        return None
    found = [_alignment(name, axis_directions(A, cell, axis), len(axes)) for name, axis in axes]
    return min(found, key=lambda one: (one.chance, -one.eigenvalue))


def _alignment(name: str, directions: np.ndarray, n_tried: int) -> Alignment:
    n = len(directions)
    tensor = directions.T @ directions / n
    values, vectors = np.linalg.eigh(tensor)
    x, y, z = vectors[:, -1].tolist()
    return Alignment(
        axis=name,
        eigenvalue=float(values[-1]),
        highest_random=1 / 3 + _ONE_IN_A_THOUSAND * (2 / (15 * n)) ** 0.5,
        chance=min(1.0, n_tried * float(chdtrc(5, 7.5 * n * (np.sum(tensor**2) - 1 / 3)))),
        direction=(x, y, z),
        n_crystals=n,
    )


def _own_axes(cell: UnitCell) -> Sequence[tuple[str, np.ndarray]]:
    """Axes that every symmetry operation leaves alone, or turns round."""
    rotations = laue_rotations(cell)
    named = [(name, column / np.linalg.norm(column)) for name, column in zip(("a*", "b*", "c*"), cell.B.T, strict=True)]
    alone = [(name, axis) for name, axis in named if _is_alone(axis, rotations)]
    if alone or cell.lattice == "cubic":
        return alone
    # A rhombohedral cell on its own axes: the threefold one is between them.
    diagonal = sum(axis for _, axis in named)
    return [("the threefold axis", diagonal / np.linalg.norm(diagonal))]


def _is_alone(axis: np.ndarray, rotations: np.ndarray) -> bool:
    return bool(np.allclose(np.abs(rotations @ axis @ axis), 1, atol=1e-6))


def _sphere(n: int) -> np.ndarray:
    """(n, 3): points spread evenly over the unit sphere (a Fibonacci lattice)."""
    k = np.arange(n) + 0.5
    z, turn = 1 - 2 * k / n, np.pi * (1 + 5**0.5) * k
    r = np.sqrt(1 - z * z)
    return np.column_stack([r * np.cos(turn), r * np.sin(turn), z])
