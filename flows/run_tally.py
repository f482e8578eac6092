"""What is known so far of a processing, or of several of one sample: the values of a criterion's quantities."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import blake3
import numpy as np
import pyarrow as pa

from flows.criteria import AGGREGATES, Quantity
from flows.growing_merge import OF_SCALED, ChunkReflections, GrowingMerge
from storage.errors import BadCriterion, BadFrame, DamagedFile, NearlineError, RunNotFound
from storage.geometry import Geometry, override_detector
from storage.models import DetectorHeader, StreamHeader
from storage.names import run_key
from storage.panels import DetectorGeometry
from storage.promotion import read_promotion
from storage.run_folder import RunFolder
from storage.step_store import ChunkManifest, Processing, StepStore, find_processings, join_frames
from tasks.merge_crystals import REFLECTION_COLUMNS, MergeStatistics, MergeSums, merge_statistics
from tasks.recipe import load_recipe
from tasks.unit_cell import UnitCell, read_cell

__all__ = [
    "GrowingMerges",
    "RunTally",
    "cell_of",
    "chosen_processing",
    "detector_values",
    "geometry_of",
    "header_of",
    "runs_of_sample",
    "usual_d_min",
    "values_of",
]

log = logging.getLogger("nearline.decisions")

_COUNTS = {"n_frames": "n_frames", "n_hits": "n_hits", "n_indexed": "n_indexed"}


class RunTally:
    """One processing of a run: what its chunks have come to. Each chunk counts once, in whatever order they come.

    quantities : what will be asked for; only that is read. cell : to merge with; None if nothing is merged.
    d_min : Å, for quantities that do not name their own.
    """

    def __init__(
        self, processing: Processing, quantities: Iterable[Quantity], cell: UnitCell | None, d_min: float | None
    ) -> None:
        self.processing = processing
        self._folder = RunFolder.open(processing.run)
        self._source = processing.manifest.data_source
        header = self._folder.header
        self.run, self._started = run_key(header.experiment, header.run), header.started_at
        self._chunks: dict[int, ChunkManifest] = {}
        self._columns: dict[str, dict[int, np.ndarray]] = {}
        self._last: datetime | None = None
        wanted = list(quantities)
        names = {q.column for q in wanted if q.column} | {"n_crystals" for q in wanted if q.name == "n_crystals"}
        self._wanted = sorted(names)
        self.known_columns: list[str] = []
        limits = {q.d_min or d_min for q in wanted if q.is_merged}
        if limits and (cell is None or None in limits):
            names_ = ", ".join(sorted({str(q) for q in wanted if q.is_merged}))
            raise BadCriterion(
                f"{names_} needs merged reflections; give the recipe a sample with a cell, and integrate"
            )
        self.sums = {limit: MergeSums(cell, limit) for limit in limits if cell is not None and limit is not None}
        self.reflections: list[ChunkReflections] = []
        self._geometries: dict[int, Geometry | None] = {}

    def __len__(self) -> int:
        """Chunks so far."""
        return len(self._chunks)

    def refresh(self) -> int:
        """Take in the chunks that have been processed meanwhile; how many those were."""
        found = [int(p.stem) for p in (self.processing.folder / "chunks").glob("[0-9]*.json") if p.stem.isdecimal()]
        new = [self.processing.chunk(number) for number in sorted(found) if number not in self._chunks]
        for chunk in new:
            if chunk is not None:
                self.take(chunk)
        return len(new)

    def take(self, chunk: ChunkManifest) -> None:
        """Take in a processed chunk; one that is known already changes nothing."""
        if chunk.chunk in self._chunks:
            return
        self._chunks[chunk.chunk] = chunk
        store = StepStore(self.processing.run)
        if self._wanted:
            frames = join_frames([store.read(digest, "frames") for digest in chunk.steps.values()])
            self.known_columns = frames.column_names
            for name in set(self._wanted) & set(frames.column_names):
                self._columns.setdefault(name, {})[chunk.chunk] = _numbers(frames[name], name)
        sealed_at = self._sealed_at(chunk.chunk)
        if sealed_at is not None:
            self._last = sealed_at if self._last is None else max(self._last, sealed_at)
        if self.sums:
            self._merge(chunk, store, sealed_at)

    def _merge(self, chunk: ChunkManifest, store: StepStore, sealed_at: datetime | None) -> None:
        tables = {digest: store.read(digest, "reflections") for digest in chunk.steps.values()}
        for digest, table in [(d, table) for d, table in tables.items() if table is not None][-1:]:
            columns = {name: table[name].to_numpy() for name in REFLECTION_COLUMNS}
            for sums in self.sums.values():
                sums.add(self.run, columns)
            crystals = np.stack([columns["frame_index"], columns["crystal"]])
            n_crystals = int(np.unique(crystals, axis=1).shape[1])
            self.reflections.append(
                ChunkReflections(self.run, chunk.chunk, sealed_at, n_crystals, store, digest, self._geometry_of(chunk))
            )

    def _geometry_of(self, chunk: ChunkManifest) -> Geometry | None:
        if chunk.geometry not in self._geometries:
            self._geometries[chunk.geometry] = _known_geometry(self.processing, chunk.geometry)
        return self._geometries[chunk.geometry]

    def _sealed_at(self, chunk: int) -> datetime | None:
        try:
            return self._folder.stream(self._source).read_commit(chunk).sealed_at
        except (OSError, DamagedFile):
            return None

    @property
    def minutes(self) -> float:
        """From the start of the run to the sealing of its last processed chunk."""
        return max((self._last - self._started).total_seconds() / 60, 0.0) if self._last else 0.0

    def count(self, name: str) -> int:
        return sum(getattr(chunk, name) for chunk in self._chunks.values())

    def column(self, name: str) -> np.ndarray:
        """The values of a column over all chunks, in order, without those that are not there."""
        parts = self._columns.get(name, {})
        return np.concatenate([parts[k] for k in sorted(parts)]) if parts else np.empty(0)

    @property
    def inputs(self) -> dict[str, object]:
        """What the values rest on: processing, chunks, and a digest over all their step outputs."""
        digest = blake3.blake3()
        for number in sorted(self._chunks):
            digest.update(json.dumps([number, *self._chunks[number].steps.items()]).encode())
        return {
            "run": self.run,
            "processing": self.processing.name,
            "n_chunks": len(self._chunks),
            "last_chunk": max(self._chunks, default=None),
            "digest": digest.hexdigest(32),
        }


class GrowingMerges:
    """Scaled merges of the same runs to several resolutions, each remembering its last fit.

    d_min : Å, for quantities that do not name their own.
    """

    def __init__(self, d_min: float | None) -> None:
        self.d_min = d_min
        self._merges: dict[float, GrowingMerge] = {}

    def statistics(self, tallies: Sequence[RunTally], limit: float, cell: UnitCell) -> MergeStatistics | None:
        merge = self._merges.setdefault(limit, GrowingMerge(cell, limit))
        return merge.statistics([chunk for tally in tallies for chunk in tally.reflections])


def values_of(
    tallies: Sequence[RunTally], quantities: Iterable[Quantity], merges: GrowingMerges
) -> dict[Quantity, float | None]:
    """The value of each quantity over some runs; None where it cannot be said.

    Parameters
    ----------
    merges : of these runs; kept from one call to the next, since a fit takes long.

    Raises
    ------
    BadCriterion : an aggregate of a column that no step makes.
    """
    merged = _Merged(tallies, merges)
    return {quantity: _value(tallies, quantity, merged) for quantity in quantities}


def _value(tallies: Sequence[RunTally], quantity: Quantity, merged: "_Merged") -> float | None:
    name = quantity.name
    if quantity.column is not None:
        return AGGREGATES[name](_column(tallies, quantity.column))
    if quantity.is_merged:
        value = getattr(merged.statistics(quantity.d_min), name)
        return None if value is None else float(value)
    if name in _COUNTS:
        return float(sum(tally.count(name) for tally in tallies))
    if name == "n_crystals":
        return float(sum(tally.column(name).sum() for tally in tallies))
    if name == "n_chunks":
        return float(sum(map(len, tallies)))
    if name == "n_runs":
        return float(len({tally.run for tally in tallies if len(tally)}))
    if name == "minutes":
        return sum(tally.minutes for tally in tallies)
    over, below = ("n_hits", "n_frames") if name == "hit_rate" else ("n_indexed", "n_hits")
    n = sum(tally.count(below) for tally in tallies)
    return sum(tally.count(over) for tally in tallies) / n if n else None


def _column(tallies: Sequence[RunTally], name: str) -> np.ndarray:
    known = {column for tally in tallies for column in tally.known_columns}
    if known and name not in known:
        have = ", ".join(sorted(known - {"frame_index"}))
        raise BadCriterion(f"no step makes the column {name!r}; there are: {have}")
    parts = [tally.column(name) for tally in sorted(tallies, key=lambda t: t.run)]
    return np.concatenate(parts) if parts else np.empty(0)


class _Merged:
    """Statistics over several runs, made once for each d_min: counts of all, quality of what is scaled."""

    def __init__(self, tallies: Sequence[RunTally], merges: GrowingMerges) -> None:
        self._tallies, self._merges = tallies, merges
        self._made: dict[float, MergeStatistics] = {}

    def statistics(self, d_min: float | None) -> MergeStatistics:
        limit = d_min or self._merges.d_min
        assert limit is not None
        if limit not in self._made:
            sums = self._tallies[0].sums[limit]
            if len(self._tallies) > 1:
                sums = MergeSums(sums.unique.cell, limit)
                for tally in self._tallies:
                    sums.add_sums(tally.sums[limit])
            counted = merge_statistics(sums)
            scaled = self._merges.statistics(self._tallies, limit, sums.unique.cell)
            better = {name: getattr(scaled, name) for name in OF_SCALED} if scaled is not None else {}
            self._made[limit] = counted.model_copy(update=better)
        return self._made[limit]


def _known_geometry(processing: Processing, geometry: int) -> Geometry | None:
    try:
        return geometry_of(processing, geometry)
    except BadFrame:
        return None


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """As floating point, without what is not there; BadCriterion for text."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    try:
        values = column.drop_null().cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        raise BadCriterion(f"the column {name!r} holds {column.type}, not numbers; compare another one") from None
    return values[~np.isnan(values)]


def cell_of(processing: Processing) -> UnitCell | None:
    """The cell that a processing's recipe gives; None without one."""
    sample = processing.manifest.recipe.get("sample") or {}
    return read_cell(sample["cell"], sample.get("space_group")) if sample.get("cell") else None


def usual_d_min(processing: Processing) -> float:
    """Å: where the recipe ends integration, else the largest full circle on the detector, rounded up to 0.01."""
    steps = processing.manifest.recipe.get("steps", [])
    limits = [step.get("params", {}).get("d_min", 0.0) for step in steps if step.get("use") == "integrate"]
    if any(limits):
        return float(max(limits))
    return math.ceil(100 / geometry_of(processing, 0).q_at_edge) / 100


def header_of(processing: Processing, geometry: int | None = None) -> StreamHeader:
    """The stream's header as a processing took it: with what its recipe corrects of the detector.

    geometry : number of a geometry snapshot, 0 for what the recipe says; by default that of the last chunk.
    """
    header = RunFolder.open(processing.run).stream_header(processing.manifest.data_source)
    detector = override_detector(header.detector or DetectorHeader(), detector_values(processing, geometry))
    return header.model_copy(update={"detector": detector})


def detector_values(processing: Processing, geometry: int | None = None) -> dict[str, float | DetectorGeometry]:
    """What a processing put in place of the detector's own values; ``geometry`` as for `header_of`."""
    if number := processing.newest_geometry if geometry is None else geometry:
        return dict(processing.geometries()[number - 1].detector)
    return load_recipe({"detector": processing.manifest.recipe.get("detector") or {}}).detector


def geometry_of(processing: Processing, geometry: int | None = None) -> Geometry:
    """The detector in the beam as a processing took it; ``geometry`` as for `header_of`.

    Raises
    ------
    BadFrame : distance or wavelength is unknown.
    """
    header = header_of(processing, geometry)
    slow, fast = header.image_shape
    return Geometry.from_header(header.detector or DetectorHeader(), (slow, fast))


def chosen_processing(run: Path, name: str | None = None) -> Processing | None:
    """The processing that stands for a run: the one named, else the promoted one, else the newest whole one.

    Raises
    ------
    RunNotFound : it has none of that name; the message lists those it has.
    """
    found = find_processings(run)
    if name is not None:
        if name not in found:
            raise RunNotFound(f"{run} has no processing {name!r}; it has: {', '.join(found) or 'none yet'}")
        return found[name]
    promotion = read_promotion(run)
    if promotion is not None and promotion.processing in found:
        return found[promotion.processing]
    whole = [processing for processing in found.values() if processing.manifest.part is None]
    return whole[-1] if whole else None


def runs_of_sample(experiment: Path, sample: str) -> Iterator[RunFolder]:
    """The runs of an experiment's folder that were taken of a sample, in order."""
    folders = [p.parent for p in experiment.glob("*/run.json") if p.parent.name.isdecimal()]
    for path in sorted(folders, key=lambda p: int(p.name)):
        try:
            folder = RunFolder.open(path)
        except (NearlineError, OSError) as error:
            log.warning("left out of sample %s: %s", sample, error)
            continue
        if folder.header.sample == sample:
            yield folder
