"""Observations of many crystals together, in an order that does not depend on how they came.

Crystals are sorted by their names (run, frame, number in the frame), the observations of each by their indices. All
that is computed crystal by crystal in this order is the same, bit for bit, whatever came first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from tasks.merge_crystals import (
    LARGEST_INTENSITY,
    LARGEST_SIGMA,
    REFLECTION_COLUMNS,
    UniqueReflections,
    half_of_frames,
    reflection_columns,
)

__all__ = ["Observations", "gather_observations"]

# Miller indices are packed into one number with this many bits each.
_INDEX_BITS = 20


@dataclass(frozen=True)
class Observations:
    """What was observed of the reflections of a cell, crystal by crystal.

    runs : their names (experiment/number), sorted.
    run_number, frame_index, number, n_refused : (crystal,), the crystal's run in ``runs``, its frame, its number in the
        frame, and how many of its observations were no usable number and are not here.
    start : (crystal + 1,), where the observations of each crystal begin.
    hkl : (n, 3) int32, as indexed. intensity, sigma : (n,), counts.
    excitation : (n,), 1/Å: how far each was predicted from the Ewald sphere; NaN where that is not known.
    """

    unique: UniqueReflections
    runs: tuple[str, ...]
    run_number: np.ndarray
    frame_index: np.ndarray
    number: np.ndarray
    n_refused: np.ndarray
    start: np.ndarray
    hkl: np.ndarray
    intensity: np.ndarray
    sigma: np.ndarray
    excitation: np.ndarray

    def __len__(self) -> int:
        """Crystals."""
        return len(self.frame_index)

    @cached_property
    def found(self) -> np.ndarray:
        """(n,) int32: 2 × unique reflection + 1 for the minus mate; -1 beyond d_min, -2 extinguished."""
        return self.unique.find(self.hkl)

    @cached_property
    def half(self) -> np.ndarray:
        """(crystal,) 0 or 1: the half set of its frame."""
        half = np.empty(len(self), np.int64)
        for number, run in enumerate(self.runs):
            mine = self.run_number == number
            half[mine] = half_of_frames(run, self.frame_index[mine])
        return half

    def per_observation(self, of_crystals: np.ndarray) -> np.ndarray:
        """(n,): a value of each crystal for each of its observations."""
        return np.repeat(of_crystals, np.diff(self.start), axis=0)

    def median_of(self, values: np.ndarray) -> np.ndarray:
        """(crystal,): the median over each crystal's observations of (n,) values; 1 where it has none."""
        return np.array([np.median(values[a:b]) if b > a else 1.0 for a, b in pairwise(self.start.tolist())])

    def reindexed(self, operations: np.ndarray) -> "Observations":
        """The same with other indices, ``operations[crystal] @ hkl`` of (crystal, 3, 3)."""
        each = self.per_observation(operations)
        return replace(self, hkl=np.einsum("nij,nj->ni", each, self.hkl).astype(np.int32))

    def by_run(self, which: np.ndarray) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Some crystals as tables, a run at a time, as `tasks.merge_crystals.MergeSums.add` takes them."""
        for number, run in enumerate(self.runs):
            mine = self.per_observation(which & (self.run_number == number))
            columns = {name: self.hkl[mine, axis] for axis, name in enumerate("hkl")}
            columns |= {"intensity": self.intensity[mine], "sigma": self.sigma[mine]}
            columns |= {
                "frame_index": self.per_observation(self.frame_index)[mine],
                "crystal": self.per_observation(self.number)[mine],
            }
            yield run, columns

    def counts(self, which: np.ndarray) -> dict[str, int]:
        """Of some crystals, (crystal,) bool: frames, crystals, and observations that cannot be merged."""
        found = self.found[self.per_observation(which)]
        frames = np.stack([self.run_number[which], self.frame_index[which]])
        return {
            "n_frames": int(np.count_nonzero(np.diff(frames, axis=1).any(axis=0))) + bool(which.any()),
            "n_crystals": int(np.count_nonzero(which)),
            "n_absent": int(np.count_nonzero(found == -2)),
            "n_beyond": int(np.count_nonzero(found == -1)),
            "n_refused": int(self.n_refused[which].sum()),
        }


def gather_observations(
    unique: UniqueReflections, tables: Iterable[tuple[str, Mapping[str, np.ndarray]]]
) -> Observations:
    """All observations of some tables.

    Parameters
    ----------
    tables : run (experiment/number), and columns frame_index, crystal, h, k, l, intensity and sigma (counts), all
        (n,); excitation (1/Å) where it is known. A run may come in several tables, a crystal not.

    Raises
    ------
    BadMerge : columns are missing.
    """
    given, excitations = [], [np.empty(0)]
    for run, table in tables:
        given.append((run, reflection_columns(table)))
        excitations.append(np.asarray(table.get("excitation", np.full(len(given[-1][1][0]), np.nan)), float))
    runs = tuple(sorted({run for run, _ in given}))
    run_of = np.concatenate([np.empty(0, np.int64), *(np.full(len(c[0]), runs.index(run)) for run, c in given)])
    none = reflection_columns(dict.fromkeys(REFLECTION_COLUMNS, np.empty(0)))
    joined = [np.concatenate(parts) for parts in zip(none, *(columns for _, columns in given), strict=True)]
    frame_index, number, h, k, l, intensity, sigma = joined  # noqa: E741
    packed = (((h << _INDEX_BITS) + k) << _INDEX_BITS) + l
    order = np.lexsort((sigma, intensity, packed, number, frame_index, run_of))
    run_of, frame_index, number = run_of[order], frame_index[order], number[order]
    intensity, sigma, hkl = intensity[order], sigma[order], np.stack([h, k, l], axis=1)[order].astype(np.int32)
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.diff(np.stack([run_of, frame_index, number]), axis=1).any(axis=0)
    first, crystal_of = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    # A comparison with not-a-number is false.
    is_number = (np.abs(intensity) < LARGEST_INTENSITY) & (sigma > 0) & (sigma < LARGEST_SIGMA)
    n_kept = np.bincount(crystal_of[is_number], minlength=len(first))
    return Observations(
        unique=unique,
        runs=runs,
        run_number=run_of[first],
        frame_index=frame_index[first],
        number=number[first],
        n_refused=np.bincount(crystal_of, minlength=len(first)) - n_kept,
        start=np.append(0, np.cumsum(n_kept)),
        hkl=hkl[is_number],
        intensity=intensity[is_number],
        sigma=sigma[is_number],
        excitation=np.concatenate(excitations)[order][is_number],
    )
