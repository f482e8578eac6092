"""Merging while measuring: how good the data are that have come so far.

Counts are those of all chunks. What tells how good a merge is (CC1/2, Rsplit, I/σ, resolution) is of crystals that
are indexed alike and scaled, with partialities modelled, as `nearline merge` does it; that is fitted anew whenever
crystals have become a tenth more, so that all fits together cost some ten times the last one. Which chunks a fit is
of follows from the chunks that are there: whoever asks, and however often, is told the same.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from flows.observed_reflections import observed_reflections
from storage.errors import DamagedOutput
from storage.geometry import Geometry
from storage.step_store import StepStore
from tasks.join_crystals import JoinedCrystals, join_crystals
from tasks.merge_crystals import MergeStatistics, merge_statistics, unique_reflections
from tasks.observations import gather_observations
from tasks.unit_cell import UnitCell

__all__ = ["OF_SCALED", "ChunkReflections", "GrowingMerge", "join_chunks"]

log = logging.getLogger("nearline.decisions")

# What of the statistics is taken from the scaled merge.
OF_SCALED = ("cc_half", "cc_star", "r_split", "i_over_sigma", "resolution")
# Crystals of the first fit: before, their plain mean says as much.
_FIRST = 20
_GROWTH = 1.1
_LONG_S = 10.0


@dataclass(frozen=True)
class ChunkReflections:
    """The reflections of one chunk, by where they are kept.

    run : experiment/number. sealed_at : of the chunk, None if it cannot be told any more.
    digest : of the step output that holds them.
    """

    run: str
    chunk: int
    sealed_at: datetime | None
    n_crystals: int
    store: StepStore
    digest: str
    geometry: Geometry | None

    def table(self) -> pa.Table:
        """Raises DamagedOutput where it is not there any more."""
        table = self.store.read(self.digest, "reflections")
        if table is None:
            raise DamagedOutput(
                f"the reflections of chunk {self.chunk} of {self.run} (step output {self.digest[:12]}) are gone; "
                "process the run again, and they are computed anew"
            )
        return table


class GrowingMerge:
    """The merge of what has been measured so far, to one resolution; remembers its last fit."""

    def __init__(self, cell: UnitCell, d_min: float) -> None:
        self._cell, self._d_min = cell, d_min
        self._fitted: tuple[tuple[str, int, str], ...] = ()
        self._statistics: MergeStatistics | None = None

    def statistics(self, chunks: Iterable[ChunkReflections]) -> MergeStatistics | None:
        """Statistics of the scaled merge of the first of these chunks, as they were sealed: new ones come last.

        They are of the fewest chunks that hold as many crystals as the last rung of the ladder 20, 22, 25 …, each a
        tenth more; None before the first rung.
        """
        wanted = _first_chunks(sorted(chunks, key=_as_sealed))
        fitted = tuple((chunk.run, chunk.chunk, chunk.digest) for chunk in wanted)
        if fitted != self._fitted:
            self._statistics, self._fitted = self._fit(wanted) if wanted else None, fitted
        return self._statistics

    def _fit(self, chunks: Sequence[ChunkReflections]) -> MergeStatistics:
        started = time.perf_counter()
        joined = join_chunks(self._cell, self._d_min, chunks)
        found = merge_statistics(joined.merged())
        took = time.perf_counter() - started
        log.log(
            logging.INFO if took > _LONG_S else logging.DEBUG,
            "%d crystals merged to %g Å in %.1f s", found.n_crystals, self._d_min, took,
        )  # fmt: skip
        return found


def join_chunks(cell: UnitCell, d_min: float, chunks: Iterable[ChunkReflections]) -> JoinedCrystals:
    """The crystals of some chunks, corrected for polarisation, joined as `nearline merge` does it; d_min in Å."""
    tables = [(chunk.run, observed_reflections(chunk.table(), chunk.geometry)[0]) for chunk in chunks]
    return join_crystals(gather_observations(unique_reflections(cell, d_min), tables))


def _as_sealed(chunk: ChunkReflections) -> tuple[datetime, str, int]:
    return chunk.sealed_at or datetime.min.replace(tzinfo=UTC), chunk.run, chunk.chunk


def _first_chunks(chunks: Sequence[ChunkReflections]) -> Sequence[ChunkReflections]:
    """As many as hold the crystals of the last rung that all of them reach."""
    total, rung = sum(chunk.n_crystals for chunk in chunks), _FIRST
    if total < rung:
        return ()
    while (following := max(int(_GROWTH * rung), rung + 1)) <= total:
        rung = following
    n_crystals = 0
    for n_chunks, chunk in enumerate(chunks, 1):
        n_crystals += chunk.n_crystals
        if n_crystals >= rung:
            return chunks[:n_chunks]
    return chunks
