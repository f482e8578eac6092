"""What a report rests on, read once, chunk by chunk, from the tables of one or several processings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import pyarrow as pa

from flows.chunk_figures import beam_shifts, figures_of_chunk, newest_table
from flows.criteria import Quantity
from flows.growing_merge import join_chunks
from flows.merging import are_alike
from flows.report.tallies import Blocks, DetectorMap, PeakCounts, Sample
from flows.run_tally import RunTally, cell_of, header_of, usual_d_min
from flows.run_warnings import ChunkFigures
from flows.step_columns import StepColumns
from storage.errors import BadFrame, BadRecipe, DamagedFile
from storage.geometry import Geometry
from storage.models import DetectorHeader, StreamHeader
from storage.run_folder import RunFolder
from storage.states import StreamLedger
from storage.step_store import ChunkManifest, Manifest, Processing, StepStore, join_frames
from streaming.retrieval import Run
from tasks.merge_crystals import BadMerge, MergeStatistics, MergeSums, merge_statistics
from tasks.model_partiality import PartialityReport
from tasks.scale_crystals import ScalingReport
from tasks.step_tables import indexed_by_frame
from tasks.unit_cell import UnitCell

__all__ = ["CRYSTAL_COLUMNS", "Gathered", "RunPart", "gather"]

Progress = Callable[[str, int, int], None]

_A = tuple(f"{axis}_{i}" for axis in ("a_star", "b_star", "c_star") for i in "xyz")
CELL_NAMES = ("a", "b", "c", "alpha", "beta", "gamma")
# Of the sample of crystals.
CRYSTAL_COLUMNS = (*_A, *CELL_NAMES, "resolution", "shift_x", "shift_y", "n_indexed")
_MERGED = Quantity("n_observations")
_OWN_COLUMNS = {"bin": ("total_counts",)}


@dataclass
class RunPart:
    """One processing of one run, as far as it has come.

    offset : of its frames among those of all runs of the report. detector : as the processing took it.
    sealed : (frame, UTC) at which chunks were sealed.
    """

    run: Run
    processing: Processing
    manifest: Manifest
    header: StreamHeader
    detector: DetectorHeader
    geometry: Geometry | None
    ledger: StreamLedger
    offset: int
    n_sealed: int
    tally: RunTally
    figures: list[ChunkFigures] = field(default_factory=list)
    sealed: list[tuple[int, datetime]] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """Behind its last processed frame, among those of all runs."""
        return self.offset + max((one.stop for one in self.figures), default=0)

    @property
    def is_whole(self) -> bool:
        """The run has ended, and each of its chunks is in."""
        return self.run.state.is_terminal and len(self.figures) == self.n_sealed


@dataclass(frozen=True, order=True)
class Example:
    """A frame to show; the larger ``rank``, the better an example."""

    rank: float
    part: int
    frame_index: int


class Gathered:
    """All parts, and what was counted over them."""

    def __init__(self, cell: UnitCell | None) -> None:
        self.cell = cell
        self.parts: list[RunPart] = []
        self.blocks, self.peaks, self.columns = Blocks(), PeakCounts(), StepColumns()
        self.crystals, self.shares = Sample(len(CRYSTAL_COLUMNS)), Sample(1)
        self.values: dict[str, Sample] = {}
        self.map: DetectorMap | None = None
        self.n_crystals = self.n_multiple = self.n_peaks_of_hits = 0
        self.n_spots_indexed = self.n_spots_of_indexed = 0
        self.seeks_hits = self.seeks_lattices = self.has_peaks = False
        self.best: Example | None = None
        self.near_hit: Example | None = None
        self.hits_with: dict[int, Example] = {}
        self.notes: list[str] = []
        self.statistics: MergeStatistics | None = None
        self.scaling: ScalingReport | None = None
        self.partiality: PartialityReport | None = None

    @property
    def figures(self) -> list[ChunkFigures]:
        return [one for part in self.parts for one in part.figures]

    def count(self, name: str) -> int:
        """``n_frames``, ``n_hits`` or ``n_indexed`` over all chunks."""
        return sum(getattr(one, name) for one in self.figures)

    def crystal_column(self, name: str) -> np.ndarray:
        return np.asarray(self.crystals.rows[:, CRYSTAL_COLUMNS.index(name)])

    @property
    def matrices(self) -> np.ndarray:
        """(n, 3, 3), 1/Å, of the sampled crystals: columns a*, b*, c* in the laboratory frame."""
        return np.asarray(self.crystals.rows[:, :9].reshape(-1, 3, 3).transpose(0, 2, 1))

    @property
    def is_whole(self) -> bool:
        return all(part.is_whole for part in self.parts)


def gather(pairs: Sequence[tuple[Run, Processing]], progress: Progress = lambda stage, done, total: None) -> Gathered:
    """Read what has been processed so far.

    Parameters
    ----------
    pairs : runs of one sample, each with the processing that stands for it.

    Raises
    ------
    BadRecipe : they were indexed with different cells.
    """
    found = Gathered(_common_cell([processing for _, processing in pairs]))
    d_min = _common_d_min(found, [processing for _, processing in pairs])
    numbers = [sorted(int(p.stem) for p in (one.folder / "chunks").glob("[0-9]*.json")) for _, one in pairs]
    n_done, n_all = 0, sum(map(len, numbers))
    for (run, processing), chunks in zip(pairs, numbers, strict=True):
        part = _part(run, processing, found, d_min)
        found.parts.append(part)
        for number in chunks:
            chunk = processing.chunk(number)
            if chunk is not None:
                _take(found, part, chunk)
            n_done += 1
            progress("chunks read", n_done, n_all)
    _merge(found, d_min)
    return found


# ---- what is common to all runs ---------------------------------------------------------------------


def _common_cell(processings: Sequence[Processing]) -> UnitCell | None:
    known = [(one, cell) for one in processings if (cell := cell_of(one)) is not None]
    for one, cell in known[1:]:
        if not are_alike(known[0][1], cell):
            raise BadRecipe(
                f"the cell of {known[0][0].run} is {known[0][1].describe()}, that of {one.run} {cell.describe()}: "
                "report runs of one sample together, others apart"
            )
    return known[0][1] if known else None


def _common_d_min(found: Gathered, processings: Sequence[Processing]) -> float | None:
    """Å; None where nothing can be merged, and a note why."""
    uses = {step["use"] for one in processings for step in one.manifest.recipe.get("steps", [])}
    if found.cell is None or "integrate" not in uses:
        return None
    try:
        d_min = max(usual_d_min(one) for one in processings)
        MergeSums(found.cell, d_min)
    except (BadFrame, BadMerge) as error:
        found.notes.append(f"no merging statistics: {error}")
        return None
    return d_min


def _part(run: Run, processing: Processing, found: Gathered, d_min: float | None) -> RunPart:
    manifest = processing.manifest
    stream = run[manifest.data_source]
    detector = header_of(processing).detector or DetectorHeader()
    return RunPart(
        run=run,
        processing=processing,
        manifest=manifest,
        header=stream.header,
        detector=detector,
        geometry=_geometry(detector, stream.header.image_shape),
        ledger=stream.ledger(),
        offset=found.parts[-1].stop if found.parts else 0,
        n_sealed=len(RunFolder.open(processing.run).stream(manifest.data_source).commits()),
        tally=RunTally(processing, [_MERGED] if d_min else [], found.cell, d_min),
    )


def _geometry(detector: DetectorHeader, shape: tuple[int, ...]) -> Geometry | None:
    try:
        return Geometry.from_header(detector, (shape[0], shape[1])) if len(shape) == 2 else None
    except BadFrame:
        return None


def _merge(found: Gathered, d_min: float | None) -> None:
    chunks = [chunk for part in found.parts for chunk in part.tally.reflections]
    if d_min is None or found.cell is None or not any(chunk.n_crystals for chunk in chunks):
        return
    joined = join_chunks(found.cell, d_min, chunks)
    found.statistics = merge_statistics(joined.merged())
    found.scaling, found.partiality = joined.scaling, joined.partiality
    found.notes += joined.notes


# ---- chunks -------------------------------------------------------------------------------------------


def _take(found: Gathered, part: RunPart, chunk: ChunkManifest) -> None:
    store = StepStore(part.processing.run)
    part.tally.take(chunk)
    frames = join_frames([store.read(digest, "frames") for digest in chunk.steps.values()])
    names = ("crystals", "crystal_quality", "peaks")
    crystals, quality, peaks = (newest_table(store, chunk, name) for name in names)
    part.figures.append(figures_of_chunk(chunk, part.detector, crystals=crystals, quality=quality, peaks=peaks))
    _take_time(part, chunk)
    _take_frames(found, part, frames)
    _take_columns(found, part, chunk, store)
    if peaks is not None:
        _take_peaks(found, part, peaks)
    if crystals is not None:
        _take_crystals(found, part, frames, crystals, quality)


def _take_time(part: RunPart, chunk: ChunkManifest) -> None:
    try:
        commit = RunFolder.open(part.processing.run).stream(part.manifest.data_source).read_commit(chunk.chunk)
    except (OSError, DamagedFile):
        return
    part.sealed.append((part.offset + chunk.stop, commit.sealed_at))


def _take_frames(found: Gathered, part: RunPart, frames: pa.Table) -> None:
    index = frames["frame_index"].to_numpy()
    known = set(frames.column_names)
    found.seeks_hits |= "hit" in known
    found.seeks_lattices |= "indexed" in known
    hit, indexed = (_flags(frames, name) for name in ("hit", "indexed"))
    n_peaks = frames["n_peaks"].to_numpy() if "n_peaks" in known else np.zeros(len(index), np.int64)
    found.blocks.add(index + part.offset, hit, indexed, n_peaks)
    if "n_peaks" in known:
        found.peaks.add(n_peaks, hit)
        found.n_peaks_of_hits += int(n_peaks[hit].sum())
        found.n_spots_of_indexed += int(n_peaks[indexed].sum())
        _take_examples(found, len(found.parts) - 1, index, n_peaks, hit)
    if "n_crystals" in known:
        found.n_multiple += int(np.count_nonzero(frames["n_crystals"].to_numpy() > 1))


def _take_examples(found: Gathered, part: int, index: np.ndarray, n_peaks: np.ndarray, hit: np.ndarray) -> None:
    """The fullest frame that is no hit, and one hit for each number of peaks."""
    others = np.flatnonzero(~hit)
    if len(others):
        at = others[n_peaks[others].argmax()]
        example = Example(float(n_peaks[at]), part, int(index[at]))
        if n_peaks[at] and (found.near_hit is None or example.rank > found.near_hit.rank):
            found.near_hit = example
    for at in np.flatnonzero(hit):
        found.hits_with.setdefault(int(n_peaks[at]), Example(float(n_peaks[at]), part, int(index[at])))


def _take_columns(found: Gathered, part: RunPart, chunk: ChunkManifest, store: StepStore) -> None:
    """The columns of users' steps, and of ours those that tell of the beam."""
    uses = {step["name"]: step["use"] for step in part.manifest.recipe.get("steps", [])}
    for name, digest in chunk.steps.items():
        use = uses.get(name, "")
        if ":" not in use and use not in _OWN_COLUMNS:
            continue
        frames = store.read(digest, "frames")
        if frames is None or not len(frames):
            continue
        if use in _OWN_COLUMNS:
            frames = frames.select(["frame_index", *_OWN_COLUMNS[use]])
        found.columns.take_in(frames, part.offset)
        for column in [name for name in frames.column_names if name in found.columns]:
            values = frames[column].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            found.values.setdefault(column, Sample(1)).add(values[np.isfinite(values)][:, None])


def _take_peaks(found: Gathered, part: RunPart, peaks: pa.Table) -> None:
    found.has_peaks = True
    shape = part.header.image_shape
    if len(shape) != 2:
        return
    if found.map is None:
        found.map = DetectorMap((shape[0], shape[1]))
    if found.map.shape == shape:
        found.map.add(peaks["x"].to_numpy(), peaks["y"].to_numpy())


def _take_crystals(
    found: Gathered, part: RunPart, frames: pa.Table, crystals: pa.Table, quality: pa.Table | None
) -> None:
    found.n_crystals += len(crystals)
    if not len(crystals):
        return
    columns = [crystals[name].to_numpy() for name in (*_A, *CELL_NAMES)]
    spots, shifts = crystals["n_indexed"].to_numpy(), beam_shifts(crystals, part.detector)
    found.crystals.add(np.column_stack([*columns, _resolutions(crystals, quality), shifts, spots]))
    index, _, n_indexed = indexed_by_frame(crystals)
    found.n_spots_indexed += int(n_indexed.sum())
    best = int(n_indexed.argmax())
    example = Example(float(n_indexed[best]), len(found.parts) - 1, int(index[best]))
    if found.best is None or example.rank > found.best.rank:
        found.best = example
    if "n_peaks" in frames.column_names:
        n_peaks = frames["n_peaks"].to_numpy()[np.searchsorted(frames["frame_index"].to_numpy(), index)]
        found.shares.add((n_indexed / np.maximum(n_peaks, 1))[:, None])


def _resolutions(crystals: pa.Table, quality: pa.Table | None) -> np.ndarray:
    """(n,), Å, of each crystal; NaN where it was not integrated."""
    if quality is None:
        return np.full(len(crystals), math.nan)
    known = zip(*(quality[name].to_pylist() for name in ("frame_index", "crystal", "resolution")), strict=True)
    by_crystal = {(frame, number): value for frame, number, value in known}
    wanted = zip(crystals["frame_index"].to_pylist(), crystals["crystal"].to_pylist(), strict=True)
    return np.array([by_crystal.get(one, math.nan) for one in wanted])


def _flags(frames: pa.Table, name: str) -> np.ndarray:
    if name not in frames.column_names:
        return np.zeros(len(frames), bool)
    return np.asarray(frames[name].cast(pa.bool_()).fill_null(False).to_numpy())
