"""A crystal whose every intensity is known, and the same on every machine.

Intensities are drawn per symmetry-unique reflection from a hash of its indices and the seed, not
from a random stream: the same reflection has the same intensity whatever resolution was asked for,
in whatever order, in however many processes.
"""

from dataclasses import dataclass, field

import gemmi
import numpy as np

from storage.errors import BadFrame

__all__ = ["LYSOZYME_CELL", "LYSOZYME_SPACE_GROUP", "Reflections", "SimulatedCrystal"]

# Tetragonal hen egg-white lysozyme, the test crystal of every beamline.
LYSOZYME_CELL = (79.1, 79.1, 37.9, 90.0, 90.0, 90.0)
LYSOZYME_SPACE_GROUP = "P 43 21 2"

# Miller indices are packed into one integer with this offset per index; beyond any real crystal.
_INDEX_SPAN = 1 << 12
# Smallest relative intensity of a Bijvoet mate, so that a large difference never turns negative.
_SMALLEST_MATE = 0.05


@dataclass(frozen=True, slots=True)
class Reflections:
    """Every reflection of a crystal that is not systematically absent, down to a resolution.

    hkl : (reflection, 3), int32; both Friedel mates and all symmetry mates.
    intensity : (reflection,), relative to the mean at zero resolution; full, not partial.
    """

    hkl: np.ndarray
    intensity: np.ndarray

    def __len__(self) -> int:
        return len(self.hkl)


@dataclass(frozen=True)
class SimulatedCrystal:
    """A unit cell, a space group and the intensities that belong to a seed.

    Parameters
    ----------
    cell : a, b, c in Å; alpha, beta, gamma in degrees.
    space_group : Hermann-Mauguin name as gemmi reads it, "P43212" or "P 43 21 2".
    seed : another seed is another structure in the same cell.
    b_factor : Å²; mean intensity falls as exp(-B / 2d²).
    bijvoet : rms of (I(+) - I(-)) / mean I over acentric reflections; 0 keeps Friedel's law.

    Raises
    ------
    BadFrame : the space group is unknown, or its symmetry contradicts the cell.
    """

    cell: tuple[float, float, float, float, float, float] = LYSOZYME_CELL
    space_group: str = LYSOZYME_SPACE_GROUP
    seed: int = 0
    b_factor: float = 25.0
    bijvoet: float = 0.0
    unit_cell: gemmi.UnitCell = field(init=False, repr=False, compare=False)
    group: gemmi.SpaceGroup = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        group = gemmi.find_spacegroup_by_name(self.space_group)
        if group is None:
            raise BadFrame(
                f"space group {self.space_group!r} is unknown; "
                "write it as in the International Tables, e.g. 'P 43 21 2'"
            )
        cell = gemmi.UnitCell(*self.cell)
        if cell.volume <= 1 or not cell.is_compatible_with_spacegroup(group):
            raise BadFrame(f"cell {self.cell} does not fit space group {group.xhm()}; correct one of the two")
        object.__setattr__(self, "unit_cell", cell)
        object.__setattr__(self, "group", group)

    @property
    def reciprocal_basis(self) -> np.ndarray:
        """a*, b*, c* as rows, (3, 3), 1/Å without 2π, in the PDB's setting (a along x)."""
        return np.array(self.unit_cell.frac.mat.tolist())

    def reflections(self, d_min: float) -> Reflections:
        """All present reflections with d ≥ d_min (Å), in a fixed order."""
        hkl = _indices_in_sphere(self.unit_cell, d_min)
        hkl = hkl[~self.group.operations().systematic_absences(hkl)]
        return Reflections(hkl, self.intensity(hkl))

    def intensity(self, hkl: np.ndarray) -> np.ndarray:
        """Full intensity of each reflection, (reflection,), 1.0 = the mean at zero resolution.

        Acentric reflections follow Wilson's exponential distribution, centric ones its
        one-dimensional form (the square of a normal deviate); special reflections are stronger
        by their epsilon factor; systematic absences are zero.
        """
        hkl = np.ascontiguousarray(hkl, np.int32).reshape(-1, 3)
        operations = self.group.operations()
        plus, minus = self._orbit_keys(hkl), self._orbit_keys(-hkl)
        unique = np.maximum(plus, minus)  # the same for both Friedel mates: the Laue class
        centric = plus == minus
        one_dimensional = _hashed_normal(unique, self.seed, 1) ** 2
        intensity = np.where(centric, one_dimensional, _hashed_exponential(unique, self.seed, 2))
        if self.bijvoet:
            half_difference = 0.5 * self.bijvoet * _hashed_normal(unique, self.seed, 3)
            half_difference = np.clip(half_difference, _SMALLEST_MATE - 1, 1 - _SMALLEST_MATE)
            sign = np.where(centric, 0, np.where(plus > minus, 1, -1))
            intensity = intensity * (1 + sign * half_difference)
        one_over_d_squared = ((hkl @ self.reciprocal_basis) ** 2).sum(axis=1)
        intensity = intensity * operations.epsilon_factor_without_centering_array(hkl)
        intensity = intensity * np.exp(-0.5 * self.b_factor * one_over_d_squared)
        return np.where(operations.systematic_absences(hkl), 0.0, intensity)

    def _orbit_keys(self, hkl: np.ndarray) -> np.ndarray:
        """A number that all mates under the point group share (Friedel's law not included)."""
        keys = np.full(len(hkl), np.iinfo(np.int64).min)
        for operation in self.group.operations().sym_ops:
            rotation = np.array(operation.rot, np.int64) // operation.DEN
            keys = np.maximum(keys, _pack_indices(hkl @ rotation))
        return keys


def _indices_in_sphere(cell: gemmi.UnitCell, d_min: float) -> np.ndarray:
    """(reflection, 3), int32: every hkl except 000 with d ≥ d_min."""
    # |h| = |a · q| ≤ a / d_min
    limits = [int(length / d_min) for length in (cell.a, cell.b, cell.c)]
    if max(limits) >= _INDEX_SPAN // 2:
        raise BadFrame(f"d_min {d_min} Å needs Miller indices up to {max(limits)}; ask for a lower resolution")
    axes = [np.arange(-n, n + 1, dtype=np.int32) for n in limits]
    hkl = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    q_squared = ((hkl @ np.array(cell.frac.mat.tolist())) ** 2).sum(axis=1)
    return np.ascontiguousarray(hkl[(q_squared > 0) & (q_squared <= 1 / d_min**2)])


def _pack_indices(hkl: np.ndarray) -> np.ndarray:
    h, k, l = (hkl[:, i].astype(np.int64) for i in range(3))  # noqa: E741 - crystallography's letters
    return ((h * _INDEX_SPAN) + k) * _INDEX_SPAN + l


def _hashed_uniform(keys: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Uniform deviates in (0, 1), one per key: splitmix64 (Steele, Lea & Flood 2014)."""
    salt = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03) % 2**64
    z = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(float) + 0.5) / 2**53


def _hashed_exponential(keys: np.ndarray, seed: int, stream: int) -> np.ndarray:
    return -np.log(_hashed_uniform(keys, seed, stream))


def _hashed_normal(keys: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Standard normal deviates by Box and Muller."""
    radius = np.sqrt(-2 * np.log(_hashed_uniform(keys, seed, 10 * stream)))
    return radius * np.cos(2 * np.pi * _hashed_uniform(keys, seed, 10 * stream + 1))
