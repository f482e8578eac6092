"""Where the detector stands, refined while a run is processed: another geometry from a chunk on.

What a chunk is analysed with may follow from chunks before it and from nothing else, so that a resumed processing, or
one on more workers, comes to the same: a look at the crystals of chunks up to c is in force from chunk c + lag on, and
that chunk is not begun before the look has been taken.
"""

import logging
import threading
from bisect import bisect_right
from datetime import UTC, datetime
from typing import Self

import blake3
import pyarrow as pa

from flows.detector_refinement import crystal_spots, refined_values
from storage.crystfel import geometry_file
from storage.errors import BadRecipe, Interrupted
from storage.files import replace
from storage.geometry_snapshot import GeometrySnapshot
from storage.models import StreamHeader
from storage.step_store import Processing
from tasks.process_chunk import ChunkResult
from tasks.recipe import Recipe, RefineDetector
from tasks.refine_detector import DetectorRefinement, refine_detector
from tasks.refine_panels import CrystalSpots
from tasks.unit_cell import UnitCell

__all__ = ["GeometrySnapshots"]

log = logging.getLogger("nearline.process")

# Looks are at n, 2 n, 4 n … crystals; behind the last of them crystals are gathered anew, so that a drift is seen.
_LAST_LOOK = 16


class GeometrySnapshots:
    """The geometries of one processing: asked by whoever submits chunks, told by whoever takes their results.

    header : of the stream, as the detector described itself.
    """

    def __init__(self, processing: Processing, recipe: Recipe, header: StreamHeader) -> None:
        self._processing, self._header = processing, header
        self._watch = _Watch(recipe.refine_detector, recipe) if recipe.refine_detector is not None else None
        self._recipes = [recipe.model_copy(update={"refine_detector": None})]
        self._from = [0]
        self._under_way: set[int] = set()
        self._changed = threading.Condition()
        self._is_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whoever waits in `recipe_for` gets `Interrupted`."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def recipe_for(self, chunk: int) -> tuple[int, Recipe]:
        """Number of the snapshot that a chunk is analysed with, and the recipe that has its values.

        Waits until all chunks have been taken that have a say in it. To be called in the order of chunks.
        """
        with self._changed:
            if self._watch is not None:
                first = chunk - self._watch.rule.lag + 1
                self._changed.wait_for(lambda: self._is_over or min(self._under_way, default=first) >= first)
                if self._is_over:
                    raise Interrupted("the processing has ended")
                self._under_way.add(chunk)
            number = bisect_right(self._from, chunk) - 1
            return number, self._recipes[number]

    def header(self, number: int) -> StreamHeader:
        """The stream's header as a snapshot has it."""
        detector = self._recipes[number].detector_header(self._header.detector)
        return self._header.model_copy(update={"detector": detector})

    def take(self, result: ChunkResult) -> GeometrySnapshot | None:
        """Take in what was found in a chunk, in the order of chunks; the new geometry if that tells of one."""
        if self._watch is None:
            return None
        found = self._look(self._watch, result) if result.manifest.geometry == len(self._recipes) - 1 else None
        with self._changed:
            if found is not None:
                self._recipes.append(self._recipes[-1].model_copy(update={"detector": found.detector}))
                self._from.append(found.from_chunk)
            self._under_way.discard(result.manifest.chunk)
            self._changed.notify_all()
        return found

    def _look(self, watch: "_Watch", result: ChunkResult) -> GeometrySnapshot | None:
        newest, chunk = len(self._recipes) - 1, result.manifest.chunk
        if not watch.is_due(result):
            return None
        # One that was written stands: chunks may have been analysed with it before the processing was interrupted.
        known = {snapshot.number: snapshot for snapshot in self._processing.geometries()}.get(newest + 1)
        snapshot = known if known is not None and known.looked_at[1] == chunk else None
        if snapshot is None:
            snapshot = watch.snapshot(self._recipes[newest], self.header(newest), newest + 1)
        if snapshot is not None:
            watch.begin_anew()
            self._write(snapshot)
            log.warning("%s: %s", self._processing.name, snapshot.words)
        return snapshot

    def _write(self, snapshot: GeometrySnapshot) -> None:
        recipe = self._recipes[0].model_copy(update={"detector": snapshot.detector})
        header = self._header.model_copy(update={"detector": recipe.detector_header(self._header.detector)})
        text = geometry_file(header, bad=recipe.geometry.bad if recipe.geometry else ())
        self._processing.add_geometry(snapshot)
        replace(self._processing.geometry_file(snapshot.number), text.encode())


class _Watch:
    """The crystals that were found with the newest geometry, and when to look at them."""

    def __init__(self, rule: RefineDetector, recipe: Recipe) -> None:
        assert recipe.sample is not None, "a recipe that indexes has a cell"
        self.rule, self._cell = rule, recipe.sample.unit_cell
        self.begin_anew()

    def begin_anew(self) -> None:
        self._crystals: list[CrystalSpots] = []
        self._chunks: list[int] = []
        self._inputs = blake3.blake3()
        self._next = self.rule.n_crystals

    def is_due(self, result: ChunkResult) -> bool:
        """Take in a chunk's crystals; whether there are enough now for the next look."""
        self._chunks.append(result.manifest.chunk)
        self._inputs.update("".join(result.manifest.steps.values()).encode())
        self._crystals += _spots_of(result, self._cell)
        return len(self._crystals) >= self._next

    def snapshot(self, recipe: Recipe, header: StreamHeader, number: int) -> GeometrySnapshot | None:
        """Look: the geometry as it should be, if it certainly differs from the recipe's."""
        assert header.detector is not None
        shape = (header.image_shape[0], header.image_shape[1])
        try:
            found = refine_detector(self._crystals, header.detector, shape, self._cell, trust_cell=self.rule.distance)
        except BadRecipe as error:  # crystals, but too few with spots enough
            log.info("geometry not refined: %s", error)
            found = None
        snapshot = self._snapshot(recipe, found, number) if found is not None and self._is_notable(found) else None
        self._after_look()
        return snapshot

    def _is_notable(self, found: DetectorRefinement) -> bool:
        return found.is_clear and _largest_shift(found) >= self.rule.min_shift

    def _snapshot(self, recipe: Recipe, found: DetectorRefinement, number: int) -> GeometrySnapshot:
        last = self._chunks[-1]
        return GeometrySnapshot(
            number=number,
            from_chunk=last + self.rule.lag,
            looked_at=(self._chunks[0], last),
            n_crystals=found.n_crystals,
            n_spots=found.n_spots,
            shift=found.shift,
            shift_sigma=found.shift_sigma,
            largest_shift=_largest_shift(found),
            distance=found.distance,
            detector=refined_values(recipe, found),
            inputs=self._inputs.hexdigest(),
            made_at=datetime.now(UTC),
        )

    def _after_look(self) -> None:
        if self._next >= _LAST_LOOK * self.rule.n_crystals:
            self.begin_anew()
        while self._next <= len(self._crystals):
            self._next *= 2


def _spots_of(result: ChunkResult, cell: UnitCell) -> list[CrystalSpots]:
    crystals: pa.Table | None = result.table("crystals")
    peaks = result.table("peaks")
    return list(crystal_spots(crystals, peaks, cell)) if crystals is not None and peaks is not None else []


def _largest_shift(found: DetectorRefinement) -> float:
    """px, of the beam centre, of the panel that is certainly off by most, or of the outer spots by the distance."""
    shifts = [(panel.fast or 0.0, panel.slow or 0.0) for panel in found.panels if panel.is_clear]
    return max(found.distance_shift, *(float((x * x + y * y) ** 0.5) for x, y in shifts or [found.shift]))
