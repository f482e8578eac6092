"""Which of several indexings each crystal has, where the lattice has more symmetry than the crystal.

In space groups such as P 4, P 3 or P 2 3, or where two axes are equal by accident, an indexer sees the lattice alone:
each crystal comes in one of two or more indexings, and a merge of all mixes them like a twin. Crystals of the same
indexing correlate better with each other (Brehm & Diederichs 2014, Acta Cryst. D70, 101). Here each crystal is held
against the merge of all others under each of its indexings, and takes the best, until none changes.

Where this begins decides where it ends, so it begins several times: by growing from one crystal after another, and
from indexings drawn at random (by numbers that are the same every time). If most beginnings end alike, that is the
answer; if they do not, there is none.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit
from pydantic import Field

from storage.models import Record
from tasks.observations import Observations
from tasks.unit_cell import UnitCell, hkl_symmetry_ops, lattice_rotations

__all__ = ["AmbiguityReport", "Indexings", "indexing_operations", "resolve_ambiguity"]

_N_GROWN, _N_RANDOM = 3, 3
_MOST_SWEEPS = 50
# Crystals that a beginning has to have in common with the best one, up to a change of all.
_ALIKE = 0.9
# Relative to the mean at their resolution; a single spot must not decide.
_LOWEST, _HIGHEST = -1.0, 6.0
_N_LEVELS = 20


class AmbiguityReport(Record):
    """How well the indexings of crystals could be told apart."""

    operations: tuple[str, ...] = Field(
        description="indexings that the lattice allows, as new h, k, l; the first as they came"
    )
    is_resolved: bool = Field(description="most beginnings ended alike; if not, all crystals were left as they came")
    n_reindexed: int = Field(description="crystals whose indices were changed")
    cc_chosen: float | None = Field(description="mean correlation of a crystal with the others' merge, as chosen")
    cc_other: float | None = Field(description="the same under the best of its other indexings")
    agreement: float | None = Field(description="share of crystals alike between the best end and the others; median")
    n_undecided: int = Field(description="crystals that share too little with the others to be told")


@dataclass(frozen=True)
class Indexings:
    """The indexing of each crystal.

    operations : (k, 3, 3), the first is the identity. choice : (crystal,), which of them makes the new indices.
    """

    operations: np.ndarray
    choice: np.ndarray
    report: AmbiguityReport

    def applied(self, observations: Observations) -> Observations:
        """The observations under their chosen indexing."""
        return observations.reindexed(self.operations[self.choice]) if self.choice.any() else observations


def indexing_operations(cell: UnitCell, tolerance: float = 2e-3) -> np.ndarray:
    """Rotations of the lattice that are not the crystal's, one of each kind, (k, 3, 3) int; the first is the identity.

    ``operations[i] @ hkl`` are the indices of the same spots under another indexing. ``tolerance`` is that of
    `lattice_rotations`: how far axes that are taken for equal may differ, relative.
    """
    own = hkl_symmetry_ops(cell)
    seen: set[bytes] = set()
    kept = []
    # From the identity on by trace, so that the choice between equivalent ones is always the same.
    found = sorted(lattice_rotations(cell, tolerance), key=lambda m: (-int(np.trace(m)), m.ravel().tolist()))
    for operation in found:
        if operation.tobytes() not in seen:
            kept.append(operation)
            seen |= {np.ascontiguousarray(o).tobytes() for o in own @ operation}
    return np.array(kept)


def resolve_ambiguity(observations: Observations, tolerance: float = 2e-3) -> Indexings | None:
    """The indexing of each crystal; None where the lattice has no more symmetry than the crystal.

    Among solutions that differ by a change of all crystals, the one is taken that changes fewest. If the beginnings
    do not end alike, no crystal is changed.
    """
    operations = indexing_operations(observations.unique.cell, tolerance)
    if len(operations) == 1:
        return None
    search = _Search(observations, operations)
    ends = [search.run(number) for number in range(_N_GROWN + _N_RANDOM if len(observations) else 0)]
    nothing = np.zeros(len(observations), np.int64)
    if not ends:
        return Indexings(operations, nothing, _report(operations, False, nothing, nothing, np.empty((0, 2)), None))
    scores = [float(np.nan_to_num(cc[np.arange(len(c)), c]).mean()) for c, cc in ends]
    best = int(np.argmax(scores))
    choice, cc = ends[best]
    is_told = np.isfinite(cc).all(axis=1)
    others = [search.agreement(choice, other, is_told) for i, (other, _) in enumerate(ends) if i != best]
    agreement = float(np.median(others)) if is_told.any() else None
    is_resolved = agreement is not None and agreement >= _ALIKE
    shift = search.fewest_changes(choice)
    final = search.shifted(choice, shift) if is_resolved else nothing
    return Indexings(operations, final, _report(operations, is_resolved, final, choice, cc, agreement))


def _report(
    operations: np.ndarray,
    is_resolved: bool,
    final: np.ndarray,
    choice: np.ndarray,
    cc: np.ndarray,
    agreement: float | None,
) -> AmbiguityReport:
    is_told = np.isfinite(cc).all(axis=1)
    rows = np.flatnonzero(is_told)
    chosen = cc[rows, choice[rows]]
    others = cc.copy()
    others[np.arange(len(cc)), choice[: len(cc)]] = -np.inf
    return AmbiguityReport(
        operations=tuple(_in_words(m) for m in operations),
        is_resolved=is_resolved,
        n_reindexed=int(np.count_nonzero(final)),
        cc_chosen=float(chosen.mean()) if len(rows) else None,
        cc_other=float(others[rows].max(axis=1).mean()) if len(rows) else None,
        agreement=agreement,
        n_undecided=len(final) - len(rows),
    )


def _in_words(operation: np.ndarray) -> str:
    """As ``k, h, -l``."""

    def one(row: np.ndarray) -> str:
        terms = zip(row.tolist(), "hkl", strict=True)
        words = [f"{'+' if n > 0 else '-'}{abs(n) if abs(n) > 1 else ''}{name}" for n, name in terms if n]
        return "".join(words).removeprefix("+")

    return ", ".join(one(row) for row in operation)


class _Search:
    """Observations under each indexing, ready for many beginnings."""

    def __init__(self, observations: Observations, operations: np.ndarray) -> None:
        self.operations = operations
        self._observations = observations
        unique = observations.unique
        self._n_unique = len(unique.hkl)
        # Friedel mates as one.
        found = np.stack([unique.find((observations.hkl @ m.T).astype(np.int32)) for m in operations])
        self._slots = np.where(found >= 0, found // 2, -1).astype(np.int64)
        level = _levels(observations)
        relative = observations.intensity / level
        crystal = observations.per_observation(np.arange(len(observations)))
        is_used = np.isfinite(relative)
        n = np.bincount(crystal[is_used], minlength=len(observations))
        scale = np.bincount(crystal[is_used], relative[is_used], len(observations)) / np.maximum(n, 1)
        scale = np.where(scale > 0, scale, np.inf)
        noise = observations.sigma / level / observations.per_observation(scale)
        noise = observations.median_of(np.nan_to_num(noise, nan=np.inf))
        value = relative / observations.per_observation(scale)
        self._value = np.where(is_used, np.clip(value, _LOWEST, _HIGHEST) - 1.0, 0.0)
        self._weight = np.where(is_used, 1.0 / (1.0 + observations.per_observation(noise) ** 2), 0.0)

    def run(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The end of one beginning: (crystal,) choices, and (crystal, k) correlations with the others, NaN for none."""
        n, k = len(self._observations), len(self.operations)
        order = np.argsort(-np.diff(self._observations.start), kind="stable").astype(np.int64)
        if number < _N_GROWN:
            # Growing: from one crystal, the next ones in the order of how much they say.
            order = np.roll(order, -number * max(n // _N_GROWN, 1))
            choice, is_in = np.zeros(n, np.int64), np.zeros(n, np.bool_)
        else:
            choice = np.random.default_rng(number).integers(0, k, n)
            is_in = np.ones(n, np.bool_)
        cc = _settle(
            self._observations.start, self._slots, self._value, self._weight, order, choice, is_in, self._n_unique,
            _MOST_SWEEPS,
        )  # fmt: skip
        return choice, cc

    @cached_property
    def _shifts(self) -> np.ndarray:
        """(m, k): what each choice becomes when all crystals are changed by one operation of the lattice."""
        own = hkl_symmetry_ops(self._observations.unique.cell)
        kinds = {np.ascontiguousarray(o @ m).tobytes(): i for i, m in enumerate(self.operations) for o in own}
        tables = []
        for change in self.operations:
            images = [{kinds[np.ascontiguousarray(change @ o @ m).tobytes()] for o in own} for m in self.operations]
            # A change that does not keep the crystal's own symmetry is no other choice of axes.
            if all(len(image) == 1 for image in images):
                tables.append([image.pop() for image in images])
        return np.array(tables)

    def shifted(self, choice: np.ndarray, shift: int) -> np.ndarray:
        return self._shifts[shift][choice]

    def agreement(self, one: np.ndarray, other: np.ndarray, which: np.ndarray) -> float:
        """Share of crystals alike in two solutions, up to a change of all."""
        if not which.any():
            return 0.0
        return float(max((one[which] == table[other[which]]).mean() for table in self._shifts))

    def fewest_changes(self, choice: np.ndarray) -> int:
        """The change of all after which most crystals are as they came; the first of equals."""
        return int(np.argmax([(table[choice] == 0).sum() for table in self._shifts]))


def _levels(observations: Observations) -> np.ndarray:
    """(n,): the mean intensity at each observation's resolution; NaN where none is possible."""
    found = observations.found
    level = np.full(len(found), np.nan)
    known = np.flatnonzero(found >= 0)
    if not len(known):
        return level
    rank = found[known] // 2
    # `unique` is sorted by resolution.
    shell = rank * _N_LEVELS // max(len(observations.unique.hkl), 1)
    n = np.bincount(shell, minlength=_N_LEVELS)
    mean = np.bincount(shell, observations.intensity[known], _N_LEVELS) / np.maximum(n, 1)
    mean = np.where(mean > 0, mean, np.nan)
    level[known] = mean[shell]
    return level


@njit(cache=True, nogil=True)
def _add(j, sign, start, slot, value, weight, sums, weights):  # pragma: no cover - compiled
    for i in range(start[j], start[j + 1]):
        if slot[i] >= 0:
            sums[slot[i]] += sign * weight[i] * value[i]
            weights[slot[i]] += sign * weight[i]


@njit(cache=True, nogil=True)
def _correlation(j, start, slot, value, weight, sums, weights):  # pragma: no cover - compiled
    """Of a crystal with sums that it is not in; NaN with fewer than three common reflections."""
    n, m, sa, sb, saa, sbb, sab = 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(start[j], start[j + 1]):
        h = slot[i]
        # 1e-6: what subtraction leaves of a crystal's own weight.
        if h < 0 or weights[h] <= 1e-6 or weight[i] <= 0:
            continue
        other = sums[h] / weights[h]
        # The mean of few says less than that of many.
        w = weight[i] * weights[h] / (weights[h] + 1.0)
        n, m, sa, sb = n + 1, m + w, sa + w * value[i], sb + w * other
        saa, sbb, sab = saa + w * value[i] ** 2, sbb + w * other * other, sab + w * value[i] * other
    if n < 3:
        return np.nan
    scale = (saa - sa * sa / m) * (sbb - sb * sb / m)
    return (sab - sa * sb / m) / np.sqrt(scale) if scale > 0 else np.nan


@njit(cache=True, nogil=True)
def _settle(start, slots, value, weight, order, choice, is_in, n_unique, most_sweeps):  # pragma: no cover - compiled
    """Give each crystal its best indexing against all others, one after the other, until none changes."""
    n, k = len(start) - 1, len(slots)
    sums, weights = np.zeros(n_unique), np.zeros(n_unique)
    for j in range(n):
        if is_in[j]:
            _add(j, 1.0, start, slots[choice[j]], value, weight, sums, weights)
    cc = np.full((n, k), np.nan)
    for _ in range(most_sweeps):
        n_changed = 0
        for j in order:
            if is_in[j]:
                _add(j, -1.0, start, slots[choice[j]], value, weight, sums, weights)
            best = choice[j]
            for m in range(k):
                cc[j, m] = _correlation(j, start, slots[m], value, weight, sums, weights)
            for m in range(k):
                if cc[j, m] > cc[j, best] or (np.isnan(cc[j, best]) and not np.isnan(cc[j, m])):
                    best = m
            n_changed += best != choice[j] or not is_in[j]
            choice[j], is_in[j] = best, True
            _add(j, 1.0, start, slots[best], value, weight, sums, weights)
        if n_changed == 0:
            break
    return cc
