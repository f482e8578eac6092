"""Whether the cell of a recipe is that of the sample: asked of the spots themselves where indexing does badly.

A wrong cell mostly indexes nothing, but one that shares points with the true lattice indexes a part of the hits,
plausibly. So where too few hits are indexed, or too few of their spots, the first hits are searched for a lattice
without any cell (`flows.finding_cell`), once, in a thread of its own.
"""

import logging
import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from flows.finding_cell import CellReport, find_cell
from flows.run_tally import cell_of
from flows.run_warnings import ENOUGH_HITS, HARDLY_INDEXED
from storage.errors import NearlineError
from storage.step_store import ChunkManifest, Processing, StepStore
from streaming.retrieval import Run
from tasks.step_tables import indexed_by_frame
from tasks.unit_cell import UnitCell, have_one_lattice

__all__ = ["CellCheck", "words_of_cell", "words_of_no_cell"]

log = logging.getLogger("nearline.process")

# Of the first hits those that are searched.
_N_SEARCHED = 40
# Indexing does well when it indexes this share of the hits, and this share of the spots of a usual indexed frame.
_INDEXED_HITS, _INDEXED_SPOTS = 0.6, 0.9
_LAST_S = 60.0
_COUNTED = frozenset(("frame_index", "n_indexed", "n_spots"))
_INDEXERS = ("index", "index_dials", "index_indexamajig")


class CellCheck:
    """Watches one processing; `words` are empty while there is nothing to say."""

    def __init__(self, run: Run, processing: Processing) -> None:
        self._run, self._processing, self._store = run, processing, StepStore(run.folder)
        self._cell = cell_of(processing) if _indexes(processing) else None
        self._n_hits = self._n_indexed = 0
        self._shares: list[np.ndarray] = []
        self._thread: threading.Thread | None = None
        self.words = ""

    def take(self, chunk: ChunkManifest) -> None:
        """Take in a processed chunk; the first that makes hits enough may begin the search."""
        if self._cell is None or self._thread is not None or self._n_hits >= ENOUGH_HITS:
            return
        self._n_hits += chunk.n_hits
        self._n_indexed += chunk.n_indexed
        for digest in chunk.steps.values():
            table = self._store.read(digest, "crystals")
            if table is not None and len(table) and _COUNTED.issubset(table.column_names):
                self._shares.append(indexed_share(table))
        if self._n_hits >= ENOUGH_HITS and not self._does_well():
            self._thread = threading.Thread(target=self._search, args=(self._cell,), name="cell-check", daemon=True)
            self._thread.start()

    def finish(self) -> str:
        """The words, once a search that is under way has ended."""
        if self._thread is not None:
            self._thread.join(_LAST_S)
        return self.words

    def _does_well(self) -> bool:
        if self._n_indexed < _INDEXED_HITS * self._n_hits or not self._shares:
            return False
        return float(np.median(np.concatenate(self._shares))) >= _INDEXED_SPOTS

    def _search(self, cell: UnitCell) -> None:
        try:
            found = find_cell(self._run, processing=self._processing.name, n_hits=_N_SEARCHED, n_threads=1)
        except (NearlineError, OSError) as error:  # frames, or a table, that have gone meanwhile: nothing is said
            log.warning("the cell of %s was not looked into: %s", self._processing, error)
            return
        hardly_any = self._n_indexed < HARDLY_INDEXED * self._n_hits
        self.words = words_of_cell(found, cell) or (words_of_no_cell(found) if hardly_any else "")
        if self.words:
            log.warning("%s: %s", self._processing.name, self.words)


def words_of_cell(found: CellReport, cell: UnitCell) -> str:
    """What to say of a recipe's cell beside what the spots themselves want; nothing where they agree, or are unsure."""
    proposed = found.unit_cell
    if proposed is None or found.certainty not in ("likely", "sure") or have_one_lattice(proposed, cell):
        return ""
    numbers = ", ".join(f"{value:g}" for value in proposed.parameters)
    return (
        f"The spots have another lattice than the recipe's cell, {cell.describe()}: {found.n_agreeing} of "
        f"{found.n_hits} hits agree on {found.lattice}, {numbers} ({found.certainty}); look with "
        f"nearline find-cell {found.run}, and process with the cell it gives."
    )


def words_of_no_cell(found: CellReport) -> str:
    """Why the spots of hits that are not indexed give no cell either: a wrong distance, noise, several crystals."""
    return "" if found.unit_cell is not None or not found.why else f"Looked at without a cell: {found.why}."


def indexed_share(crystals: pa.Table) -> np.ndarray:
    """(n,) of each indexed frame, the share of its spots that its crystals explain."""
    _, first, n_indexed = indexed_by_frame(crystals)
    return np.asarray(n_indexed / np.maximum(crystals["n_spots"].to_numpy()[first], 1))


def _indexes(processing: Processing) -> bool:
    steps: Sequence[dict[str, str]] = processing.manifest.recipe.get("steps", ())
    # Ours: a step of somebody's own may index in any sense of the word.
    return any(step.get("use") in _INDEXERS for step in steps)
