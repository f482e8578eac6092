"""Merging: the mean of all observations of each unique reflection, and how good it is.

A plain Monte-Carlo mean (Kirian et al. 2010): partiality, orientation and scale of single stills are
left to averaging. `MergeSums` takes observations as they come, a chunk at a time, and `statistics` can be
asked at any moment. With all observations at hand, `tasks.scale_crystals` does better; `merge_statistics` judges both.

The same observations give the same numbers, bit for bit, in any order: intensities are counted in
whole quanta of 2⁻¹⁶ count, so all sums are sums of integers, and those do not depend on the order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, Protocol

import blake3
import gemmi
import numpy as np
from pydantic import Field

from storage.errors import BadRecipe
from storage.models import Record
from tasks.unit_cell import UnitCell, hkl_symmetry_ops, lattice_rotations
from tasks.wilson_plot import WilsonPlot, wilson_plot

__all__ = [
    "REFLECTION_COLUMNS",
    "BadMerge",
    "FriedelMates",
    "MergeStatistics",
    "MergeSums",
    "Mergeable",
    "Merged",
    "ShellStatistics",
    "UniqueReflections",
    "half_of_frames",
    "merge_statistics",
    "reflection_columns",
    "unique_reflections",
]

FriedelMates = Literal["merged", "apart"]
# What merging needs of a table of reflections.
REFLECTION_COLUMNS = ("frame_index", "crystal", "h", "k", "l", "intensity", "sigma")

# 1.5e-5 count: finer than float32 itself above 256 counts, and far below any sigma.
_QUANTA = 1 << 16
_VARIANCE_QUANTA = 1 << 12
# Below these, sums of a million observations of one reflection fit 64 bits.
_LARGEST = 1 << 42
LARGEST_INTENSITY, LARGEST_SIGMA = float(_LARGEST // _QUANTA), math.sqrt(_LARGEST // _VARIANCE_QUANTA)
_MOST_OBSERVATIONS = 1 << 20
_SPLIT = 21
# Cells of the look-up table, 4 bytes each.
_LARGEST_TABLE = 1 << 27
# CC1/2 of a shell that still counts as resolved, and pairs without which it says nothing.
RESOLVED_CC_HALF = 0.3
_FEWEST_PAIRS = 10


class BadMerge(BadRecipe):
    """Observations that cannot be merged, or a question about them that has no answer."""


class ShellStatistics(Record):
    """Quality of the merged data between two resolutions; null where it cannot be said.

    Of Bijvoet mates that are kept apart each counts as a reflection.
    """

    d_max: float = Field(description="Å, low-resolution end (excluded)")
    d_min: float = Field(description="Å, high-resolution end (included)")
    n_possible: int = Field(description="unique reflections of the cell, without those the space group extinguishes")
    n_unique: int = Field(description="of these, observed at least once")
    n_observations: int
    completeness: float = Field(description="n_unique / n_possible")
    multiplicity: float | None = Field(description="n_observations / n_unique")
    i_over_sigma: float | None = Field(description="mean of I/σ(I) over unique reflections")
    cc_half: float | None = Field(description="correlation of the means of two half sets of frames")
    cc_star: float | None = Field(description="√(2 CC½ / (1 + CC½)), estimated correlation with the true intensities")
    r_split: float | None = Field(description="difference of the half sets, relative to their mean")
    n_pairs: int = Field(description="reflections that both half sets have, on which CC1/2 and Rsplit rest")
    cc_ano: float | None = Field(None, description="correlation of I(+) − I(−) between the half sets; of mates apart")
    n_anomalous: int = Field(0, description="acentric reflections of which both half sets have both mates")


class MergeStatistics(ShellStatistics):
    """The whole of it, and shell by shell."""

    cell: tuple[float, float, float, float, float, float] = Field(description="Å and degrees")
    space_group: str
    friedel_mates: FriedelMates
    n_frames: int = Field(description="frames with at least one crystal that was merged")
    n_crystals: int
    n_absent: int = Field(description="observations of reflections that the space group extinguishes; left out")
    n_beyond: int = Field(description="observations beyond d_min; left out")
    n_refused: int = Field(description="observations that are no usable number; left out")
    n_outliers: int = Field(0, description="observations far from all others of their reflection; left out")
    resolution: float | None = Field(description="Å, up to which CC1/2 stays above 0.3, shell by shell from the beam")
    is_ambiguous: bool = Field(description="the lattice has more symmetry than the crystal: two indexings are mixed")
    shells: tuple[ShellStatistics, ...] = Field(description="of equal volume in reciprocal space, low resolution first")
    wilson: WilsonPlot


@dataclass(frozen=True)
class UniqueReflections:
    """The unique reflections of a cell up to a resolution, in gemmi's asymmetric unit.

    cell : with its space group. d_min : Å. friedel_mates : merged into one, or kept apart as I(+) and I(−).
    """

    cell: UnitCell
    d_min: float
    friedel_mates: FriedelMates = "merged"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.d_min) and self.d_min > 0):
            raise BadMerge(f"d_min {self.d_min} is not a resolution; give it in Å, such as 2.0")
        if self.friedel_mates not in ("merged", "apart"):
            raise BadMerge(f"Friedel mates {self.friedel_mates!r} are neither merged nor apart; say which")
        if math.prod(2 * n + 1 for n in self._limits) > _LARGEST_TABLE:
            raise BadMerge(f"the cell {self.cell.describe()} has too many reflections to {self.d_min:g} Å; raise d_min")

    @property
    def is_apart(self) -> bool:
        return self.friedel_mates == "apart"

    @property
    def _limits(self) -> np.ndarray:
        edges = np.linalg.norm(np.linalg.inv(self.cell.B), axis=1)
        return np.floor(edges / self.d_min + 1e-9).astype(int)

    @cached_property
    def hkl(self) -> np.ndarray:
        """(n, 3) int32, in gemmi's reciprocal asymmetric unit, sorted by resolution, low first."""
        cell = gemmi.UnitCell(*self.cell.parameters)
        # A reflection exactly at d_min belongs to them, whichever way the last bit was rounded.
        found = gemmi.make_miller_array(cell, self.cell.group, self.d_min * (1 - 1e-9), unique=True)
        d = cell.calculate_d_array(found)
        found, d = found[d >= self.d_min], d[d >= self.d_min]
        return found[np.lexsort((*found.T, -d))]

    @cached_property
    def d(self) -> np.ndarray:
        """(n,), Å: where each is."""
        return gemmi.UnitCell(*self.cell.parameters).calculate_d_array(self.hkl)

    @cached_property
    def is_centric(self) -> np.ndarray:
        """(n,): its Friedel mate is equivalent to it, so that there is no other."""
        return self.cell.group.operations().centric_flag_array(self.hkl).astype(bool)

    @cached_property
    def _table(self) -> np.ndarray:
        """(2H+1, 2K+1, 2L+1) int32: 2 × unique + 1 for the minus mate; -1 beyond d_min, -2 extinguished."""
        table = np.full(2 * self._limits + 1, -1, np.int32)
        every = self._every_index(table.shape)
        table.reshape(-1)[gemmi.UnitCell(*self.cell.parameters).calculate_d_array(every) >= self.d_min] = -2
        number = 2 * np.arange(len(self.hkl), dtype=np.int32)
        operations = [np.array(op.rot) // gemmi.Op.DEN for op in self.cell.group.operations().sym_ops]
        # The plus mates last: a centric reflection is its own mate, and counts as plus.
        for sign in (-1, 1):
            for rotation in operations:
                h, k, l = (sign * self.hkl @ rotation + self._limits).T  # noqa: E741
                table[h, k, l] = number + (self.is_apart and sign < 0)
        return table

    def _every_index(self, shape: tuple[int, ...]) -> np.ndarray:
        return (np.indices(shape, np.int32).reshape(3, -1).T - self._limits).astype(np.int32)

    def find(self, hkl: np.ndarray) -> np.ndarray:
        """(n,) int32 for (n, 3) indices: 2 × unique + 1 for the minus mate; -1 beyond d_min, -2 extinguished."""
        at = hkl + self._limits
        is_inside = ((at >= 0) & (at <= 2 * self._limits)).all(axis=1)
        if not is_inside.all():
            found = np.full(len(hkl), -1, np.int32)
            found[is_inside] = self.find(hkl[is_inside])
            return found
        shape = self._table.shape
        flat = (at[:, 0] * shape[1] + at[:, 1]) * shape[2] + at[:, 2]
        return self._table.reshape(-1)[flat]


@lru_cache(maxsize=8)
def unique_reflections(cell: UnitCell, d_min: float, friedel_mates: FriedelMates = "merged") -> UniqueReflections:
    """The same, kept: the table of a large cell takes a second to make."""
    return UniqueReflections(cell, d_min, friedel_mates)


def half_of_frames(run: str, frame_index: np.ndarray) -> np.ndarray:
    """(n,) 0 or 1: the half set of each frame, by a digest of its name (run and index).

    The same in every processing and whenever the frame comes; all crystals of a frame are in one half.
    ``run`` is experiment/number. The mixing is that of splitmix64 (Steele et al. 2014).
    """
    seed = int.from_bytes(blake3.blake3(run.encode()).digest(8), "little")
    with np.errstate(over="ignore"):
        z = np.asarray(frame_index).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) & np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class Merged:
    """Merged intensities: one row for each unique reflection (or Bijvoet mate) that was observed.

    hkl : (n, 3), in gemmi's asymmetric unit; of a minus mate its plus mate's. is_minus : (n,).
    intensity, sigma : (n,), counts. n_observations : (n,). d : (n,), Å.
    halves : (2, n), counts: the mean of each half set, NaN where it has none.
    """

    hkl: np.ndarray
    is_minus: np.ndarray
    d: np.ndarray
    intensity: np.ndarray
    sigma: np.ndarray
    n_observations: np.ndarray
    halves: np.ndarray

    def __len__(self) -> int:
        return len(self.hkl)


class MergeSums:
    """Sums over observations, for each unique reflection and half set. Not for several threads at once."""

    def __init__(self, cell: UnitCell, d_min: float, friedel_mates: FriedelMates = "merged") -> None:
        self.unique = unique_reflections(cell, d_min, friedel_mates)
        n = 2 * len(self.unique.hkl)
        # (half, mate of unique): numbers, and sums of quanta.
        self._numbers = np.zeros(2 * n, np.int64)
        self._sums = np.zeros(2 * n, np.int64)
        # Squares of 42-bit numbers as three sums: high², high × low, low².
        self._squares = np.zeros((3, n), np.int64)
        self._variances = np.zeros(n, np.int64)
        self.n_frames = self.n_crystals = self.n_absent = self.n_beyond = self.n_refused = 0
        # The plain mean has none: what an outlier is, only all observations can say.
        self.n_outliers = 0

    def add(self, run: str, reflections: Mapping[str, np.ndarray]) -> None:
        """Take in the observations of some frames; no frame may be given in two calls.

        Parameters
        ----------
        run : experiment/number, of which the frames are.
        reflections : columns frame_index, crystal, h, k, l, intensity and sigma (counts), all (n,).

        Raises
        ------
        BadMerge : columns are missing; or a million observations of one reflection.
        """
        frame_index, crystal, h, k, l, intensity, sigma = reflection_columns(reflections)  # noqa: E741
        if not len(frame_index):
            return
        self._count_crystals(frame_index, crystal)
        found = self.unique.find(np.stack([h, k, l], axis=1))
        quanta, variance = np.rint(intensity * _QUANTA), np.rint(sigma * sigma * _VARIANCE_QUANTA)
        # A comparison with not-a-number is false.
        is_number = (np.abs(quanta) < _LARGEST) & (variance < _LARGEST) & (sigma > 0)
        self.n_beyond += int(np.count_nonzero(found == -1))
        self.n_absent += int(np.count_nonzero(found == -2))
        self.n_refused += int(np.count_nonzero((found >= 0) & ~is_number))
        is_used = (found >= 0) & is_number
        half = half_of_frames(run, frame_index)
        if not is_used.all():
            found, quanta, variance, half = found[is_used], quanta[is_used], variance[is_used], half[is_used]
        self._add(found.astype(np.int64), half, quanta.astype(np.int64), variance.astype(np.int64))

    def _count_crystals(self, frame_index: np.ndarray, crystal: np.ndarray) -> None:
        order = np.lexsort((crystal, frame_index))
        is_new_frame = np.diff(frame_index[order]) != 0
        self.n_frames += 1 + int(np.count_nonzero(is_new_frame))
        self.n_crystals += 1 + int(np.count_nonzero(is_new_frame | (np.diff(crystal[order]) != 0)))

    def _add(self, found: np.ndarray, half: np.ndarray, quanta: np.ndarray, variance: np.ndarray) -> None:
        slot = found + half * self._squares.shape[1]
        np.add.at(self._numbers, slot, 1)
        np.add.at(self._sums, slot, quanta)
        high, low = quanta >> _SPLIT, quanta & ((1 << _SPLIT) - 1)
        for sums, values in zip(self._squares, (high * high, high * low, low * low), strict=True):
            np.add.at(sums, found, values)
        np.add.at(self._variances, found, variance)
        if len(slot) and self._numbers.max() >= _MOST_OBSERVATIONS:
            raise BadMerge(f"one reflection has {_MOST_OBSERVATIONS} observations; merge fewer runs at once")

    def add_sums(self, other: "MergeSums") -> None:
        """Take in what another has summed over other frames; BadMerge if it is of another cell or resolution."""
        if other.unique is not self.unique and other.unique != self.unique:
            raise BadMerge(
                f"sums for {other.unique.cell.describe()} to {other.unique.d_min:g} Å cannot be added to those for "
                f"{self.unique.cell.describe()} to {self.unique.d_min:g} Å; merge with one cell and d_min"
            )
        self._numbers += other._numbers
        self._sums += other._sums
        self._squares += other._squares
        self._variances += other._variances
        for name in ("n_frames", "n_crystals", "n_absent", "n_beyond", "n_refused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def n_observations(self) -> int:
        """Observations that were merged."""
        return int(self._numbers.sum())

    def merged(self) -> Merged:
        """The mean of each unique reflection, with sigma.

        Sigma of a mean is the larger of two: the spread of its n observations over √n (White et al. 2012), and what
        their own sigmas give. With few observations the spread alone is small by chance now and then, and I/σ then
        huge.
        """
        numbers, sums = self._numbers.reshape(2, -1), self._sums.reshape(2, -1)
        n = numbers.sum(axis=0)
        at = np.flatnonzero(n)
        n, total = n[at].astype(float), sums.sum(axis=0)[at].astype(float)
        high, cross, low = self._squares[:, at].astype(float)
        squares = high * 4.0**_SPLIT + cross * 2.0 ** (_SPLIT + 1) + low
        spread = np.maximum(squares - total * total / n, 0.0) / np.maximum(n - 1, 1) / n / float(_QUANTA) ** 2
        counting = self._variances[at] / _VARIANCE_QUANTA / n**2
        with np.errstate(invalid="ignore", divide="ignore"):
            halves = sums[:, at] / numbers[:, at] / _QUANTA
        return Merged(
            hkl=self.unique.hkl[at // 2],
            is_minus=at % 2 == 1,
            d=self.unique.d[at // 2],
            intensity=total / n / _QUANTA,
            sigma=np.sqrt(np.maximum(spread, counting)),
            n_observations=n.astype(np.int64),
            halves=halves,
        )

    def statistics(self, n_shells: int = 10) -> MergeStatistics:
        """How good the merged data are now, overall and in shells of equal volume in reciprocal space."""
        return merge_statistics(self, n_shells)


class Mergeable(Protocol):
    """Merged data of which statistics can be made, and what was left out of them."""

    @property
    def unique(self) -> UniqueReflections: ...
    @property
    def n_frames(self) -> int: ...
    @property
    def n_crystals(self) -> int: ...
    @property
    def n_absent(self) -> int: ...
    @property
    def n_beyond(self) -> int: ...
    @property
    def n_refused(self) -> int: ...
    @property
    def n_outliers(self) -> int: ...
    def merged(self) -> Merged:
        """The mean of each unique reflection, with sigma."""


def merge_statistics(sums: Mergeable, n_shells: int = 10) -> MergeStatistics:
    """Completeness, multiplicity, I/σ, CC1/2 and Rsplit, overall and by shell.

    Completeness is against all reflections of the cell to d_min. With the means I₁, I₂ of the half sets, over
    reflections that both have:

        CC½ = correlation(I₁, I₂)            CC* = √(2 CC½ / (1 + CC½))
        Rsplit = Σ|I₁ − I₂| / √2 / (½ Σ(I₁ + I₂))
        CCano = correlation(I₁(+) − I₁(−), I₂(+) − I₂(−)), where Friedel mates are kept apart

    Source: Karplus & Diederichs 2012, Science 336, 1030 (CC½, CC*);
    White et al. 2012, J. Appl. Cryst. 45, 335 (Rsplit).
    """
    if not 1 <= n_shells <= 100:
        raise BadMerge(f"{n_shells} shells are not between 1 and 100; 10 are usual")
    unique, merged = sums.unique, sums.merged()
    if not len(unique.hkl):
        raise BadMerge(f"the cell {unique.cell.describe()} has no reflection to {unique.d_min:g} Å; lower d_min")
    mates = 1 + (~unique.is_centric if unique.is_apart else np.zeros(len(unique.hkl), int))
    edges = _shell_edges(float(unique.d.max()), unique.d_min, n_shells)
    shell_of_unique, shell_of_merged = (_shell(d, edges) for d in (unique.d, merged.d))
    anomalous = _anomalous_differences(merged, unique)
    shells = []
    for number in range(n_shells):
        n_possible = int(mates[shell_of_unique == number].sum())
        is_mine = shell_of_merged == number
        shells.append(_statistics(merged, is_mine, n_possible, edges[number], edges[number + 1], anomalous))
    everything = _statistics(merged, np.ones(len(merged), bool), int(mates.sum()), edges[0], edges[-1], anomalous)
    return MergeStatistics(
        **dict(everything),
        cell=unique.cell.parameters,
        space_group=unique.cell.space_group,
        friedel_mates=unique.friedel_mates,
        n_frames=sums.n_frames,
        n_crystals=sums.n_crystals,
        n_absent=sums.n_absent,
        n_beyond=sums.n_beyond,
        n_refused=sums.n_refused,
        n_outliers=sums.n_outliers,
        resolution=_resolution(shells),
        is_ambiguous=_is_ambiguous(unique.cell),
        shells=tuple(shells),
        wilson=wilson_plot(merged.d, merged.intensity),
    )


def reflection_columns(reflections: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The `REFLECTION_COLUMNS` of a table: names and indices as int64, intensity and sigma as float64.

    Raises
    ------
    BadMerge : a column is missing.
    """
    kinds = [np.int64] * 5 + [np.float64] * 2
    try:
        return [
            np.asarray(reflections[name]).astype(kind) for name, kind in zip(REFLECTION_COLUMNS, kinds, strict=True)
        ]
    except KeyError as error:
        raise BadMerge(f"a table without the column {error} has no reflections; put integrate in the recipe") from None


def _shell_edges(d_max: float, d_min: float, n_shells: int) -> list[float]:
    """n + 1 resolutions, Å, from low to high; equal volumes between them, so equal steps in 1/d³."""
    inverse = np.linspace(d_max**-3, d_min**-3, n_shells + 1)[1:-1]
    return [d_max, *(inverse ** (-1 / 3)).tolist(), d_min]


def _shell(d: np.ndarray, edges: list[float]) -> np.ndarray:
    """The shell of each: edges[i] >= d > edges[i + 1], the first one with the lowest and the last with the highest."""
    return np.searchsorted(-np.array(edges[1:-1]), -d, side="left")


def _anomalous_differences(merged: Merged, unique: UniqueReflections) -> np.ndarray:
    """(2, n), one for each row: I(+) − I(−) in either half set; NaN on minus mates, and where one is missing."""
    differences = np.full((2, len(merged)), np.nan)
    if unique.is_apart:
        # A minus mate comes right after its plus mate.
        pairs = np.flatnonzero(merged.is_minus[1:] & (merged.hkl[1:] == merged.hkl[:-1]).all(axis=1))
        differences[:, pairs] = merged.halves[:, pairs] - merged.halves[:, pairs + 1]
    return differences


def _statistics(
    merged: Merged, which: np.ndarray, n_possible: int, d_max: float, d_min: float, anomalous: np.ndarray
) -> ShellStatistics:
    n_unique, n_observations = int(np.count_nonzero(which)), int(merged.n_observations[which].sum())
    first, second = merged.halves[:, which & np.isfinite(merged.halves).all(axis=0)]
    cc_half = _correlation(first, second)
    both = float((first + second).sum())
    one, other = anomalous[:, which & np.isfinite(anomalous).all(axis=0)]
    return ShellStatistics(
        d_max=d_max,
        d_min=d_min,
        n_possible=n_possible,
        n_unique=n_unique,
        n_observations=n_observations,
        completeness=n_unique / n_possible if n_possible else 0.0,
        multiplicity=n_observations / n_unique if n_unique else None,
        i_over_sigma=float((merged.intensity[which] / merged.sigma[which]).mean()) if n_unique else None,
        cc_half=cc_half,
        cc_star=math.sqrt(2 * cc_half / (1 + cc_half)) if cc_half is not None and cc_half >= 0 else None,
        r_split=float(np.abs(first - second).sum()) * math.sqrt(2) / both if both > 0 else None,
        n_pairs=len(first),
        cc_ano=_correlation(one, other),
        n_anomalous=len(one),
    )


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's; None for fewer than three pairs, or where nothing varies."""
    if len(first) < 3:
        return None
    x, y = first - first.mean(), second - second.mean()
    scale = float(x @ x) * float(y @ y)
    return float(np.clip(x @ y / math.sqrt(scale), -1.0, 1.0)) if scale > 0 else None


def _resolution(shells: list[ShellStatistics]) -> float | None:
    """Å, high-resolution end of the last shell, from low to high, whose CC1/2 is at least 0.3."""
    reached = None
    for shell in shells:
        if shell.cc_half is None or shell.cc_half < RESOLVED_CC_HALF or shell.n_pairs < _FEWEST_PAIRS:
            return reached
        reached = shell.d_min
    return reached


@lru_cache(maxsize=8)
def _is_ambiguous(cell: UnitCell) -> bool:
    return len(lattice_rotations(cell)) > len(hkl_symmetry_ops(cell))
