"""The steps a recipe can name: each a pure function of a chunk, its parameters and earlier outputs.

A step returns tables. ``frames`` has one row per frame of the chunk, in order, and its columns
are what queries, stop criteria and the live view see; other tables (``peaks``, ``crystals``,
``reflections``) are keyed by ``frame_index``. A user's function does the same by returning a dict
of arrays with one value, or one array of a fixed length, per frame; a dict among them is a table.
"""

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from storage import codec as codec_module
from storage import crystfel as crystfel_module
from storage import geometry as geometry_module
from storage import photons, sensor
from storage.codec import encode
from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.masks import array_digest
from storage.step_store import Tables
from tasks import (
    bin_frames,
    chunk_frames,
    find_dispersed_peaks,
    find_peaks,
    index_frame,
    refine_lattice,
    ring_statistics,
    search_lattice,
    step_tables,
    unit_cell,
)
from tasks import integrate_spots as integrate_spots_module
from tasks import predict_spots as predict_spots_module
from tasks import step as step_module
from tasks.bin_frames import Binner
from tasks.chunk_frames import ChunkFrames
from tasks.engines import Engine, EngineJob, dials_stills, indexamajig
from tasks.engines import engine as engine_module
from tasks.engines.engine import flat_geometry, spots_where_rays_enter
from tasks.find_dispersed_peaks import DispersionFinder, DispersionParams
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.index_frame import Crystal, Indexer, IndexParams
from tasks.integrate_spots import Integration, IntegrationParams, integrate_spots
from tasks.predict_spots import crystal_resolution, predict_spots, profile_radius
from tasks.step import FrameWork, Step, Upstream
from tasks.step_tables import (
    IntegratedCrystal,
    column_before,
    crystal_table,
    integration_tables,
    read_crystal,
    rows_by_frame,
    scattering_vectors,
    table_before,
)
from tasks.unit_cell import UnitCell

__all__ = [
    "STEPS",
    "BinParams",
    "FindDispersedPeaksParams",
    "FindPeaksParams",
    "IntegrateParams",
]

_KEEP_FINDERS = 2
P = TypeVar("P", PeakParams, DispersionParams, IntegrationParams)


@dataclass(frozen=True)
class BinParams:
    """Binned frames, as a stream of their own and, on request, for the steps that follow.

    factor : pixels per side. feed_next : later steps work on the binned frames.
    """

    factor: int = 4
    feed_next: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= 64:
            raise BadRecipe(f"binning factor {self.factor} is not between 1 and 64")


@dataclass(frozen=True)
class FindPeaksParams(PeakParams):
    """Peak search, and what makes a frame a hit.

    min_peaks : a frame with at least so many peaks is a hit.
    """

    min_peaks: int = 15


@dataclass(frozen=True)
class FindDispersedPeaksParams(DispersionParams):
    """Peak search by variance, and what makes a frame a hit.

    min_peaks : a frame with at least so many peaks is a hit.
    """

    min_peaks: int = 15


@dataclass(frozen=True)
class IndexHitsParams(IndexParams):
    """Indexing, and which frames are tried.

    min_peaks : frames with at least so many peaks are tried as well, though they are no hits by the peak search alone;
        one that is indexed is a hit. None: hits only.
    """

    min_peaks: int | None = None


@dataclass(frozen=True)
class IntegrateParams(IntegrationParams):
    """Integration on predicted positions.

    d_min : Å; predictions end there. 0 for the corners of the detector.
    """

    d_min: float = 0.0


# ---- ours -------------------------------------------------------------------------------------


def bin_work(chunk: ChunkFrames, params: BinParams) -> FrameWork:
    """Sum n x n pixels of each frame; ``binned`` holds each frame as bslz4 uint32."""
    binner = Binner(chunk.detector_mask, params.factor, chunk.saturation_value)

    def one(position: int) -> tuple[bytes, int]:
        sums, total = binner(chunk.borrowed_unbinned(position))
        return encode(sums), total

    def gather(results: list[tuple[bytes, int]]) -> Tables:
        index = chunk.frame_index
        return {
            "frames": pa.table({"frame_index": index, "total_counts": np.array([t for _, t in results], np.int64)}),
            "binned": pa.table({"frame_index": index, "blob": pa.array([b for b, _ in results], pa.binary())}),
        }

    return FrameWork(one, gather)


def find_peaks_work(chunk: ChunkFrames, params: FindPeaksParams) -> FrameWork:
    """Peaks of each frame, and whether it is a hit."""
    return _peak_work(chunk, _finder_for(chunk.geometry, chunk.mask, _kernel_params(params, PeakParams, chunk)), params)


def find_dispersed_peaks_work(chunk: ChunkFrames, params: FindDispersedPeaksParams) -> FrameWork:
    """The same, by the variance of each pixel's neighbourhood."""
    finder = DispersionFinder(chunk.geometry, chunk.mask, _kernel_params(params, DispersionParams, chunk))
    return _peak_work(chunk, finder, params)


def _peak_work(
    chunk: ChunkFrames, finder: PeakFinder | DispersionFinder, params: FindPeaksParams | FindDispersedPeaksParams
) -> FrameWork:
    def gather(tables: list[np.ndarray]) -> Tables:
        n_peaks = np.array([len(t) for t in tables], np.int64)
        peaks = np.concatenate(tables) if tables else np.empty(0, find_peaks.PEAK_DTYPE)
        columns: dict[str, Any] = {"frame_index": np.repeat(chunk.frame_index, n_peaks)}
        columns |= {name: np.ascontiguousarray(peaks[name]) for name in peaks.dtype.names or ()}
        hit = n_peaks >= params.min_peaks
        return {
            "frames": pa.table({"frame_index": chunk.frame_index, "n_peaks": n_peaks, "hit": hit}),
            "peaks": pa.table(columns),
        }

    return FrameWork(lambda position: _in_detector_px(finder(chunk.borrowed(position)), chunk), gather)


_finders: OrderedDict[tuple[Geometry, str, PeakParams], PeakFinder] = OrderedDict()


def _finder_for(geometry: Geometry, mask: np.ndarray, params: PeakParams) -> PeakFinder:
    """The peak finder for this detector; kept, since preparing one takes as long as 25 frames of 4M."""
    key = (geometry, array_digest(mask), params)
    finder = _finders.get(key)
    if finder is None:
        finder = _finders[key] = PeakFinder(geometry, mask, params)
        while len(_finders) > _KEEP_FINDERS:
            _finders.popitem(last=False)
    return finder


def run_index(chunk: ChunkFrames, params: IndexHitsParams, cell: UnitCell | None, upstream: Upstream) -> Tables:
    """Lattices in the hits, and in what may be one, with the known cell."""
    assert cell is not None
    peaks, hit = table_before(upstream, "peaks"), column_before(upstream, "hit")
    geometry = chunk.detector_geometry
    indexer = _indexer_for(cell, geometry.wavelength, params)
    rows = rows_by_frame(peaks, chunk.frame_index)
    n_peaks = np.array([n for _, n in rows], np.int64)
    is_tried = hit if params.min_peaks is None else hit | (n_peaks >= params.min_peaks)

    def one(position: int) -> list[Crystal]:
        if not is_tried[position]:
            return []
        mine = peaks.slice(*rows[position])
        return indexer(scattering_vectors(geometry, mine), mine["intensity"].to_numpy())

    crystals = chunk.map(one)
    n_crystals = np.array([len(c) for c in crystals], np.int64)
    columns = {"frame_index": chunk.frame_index, "indexed": n_crystals > 0, "n_crystals": n_crystals}
    if params.min_peaks is not None:
        columns["hit"] = hit | columns["indexed"]
    return {"frames": pa.table(columns), "crystals": crystal_table(chunk.frame_index, crystals)}


def run_engine(engine: Engine, chunk: ChunkFrames, params: Any, cell: UnitCell | None, upstream: Upstream) -> Tables:
    """Lattices that a program of others finds in the peaks of the hits, counted as ours are."""
    assert cell is not None
    peaks, hit = table_before(upstream, "peaks"), column_before(upstream, "hit")
    geometry, rows = chunk.detector_geometry, rows_by_frame(peaks, chunk.frame_index)
    hits = np.flatnonzero(hit)
    mine = [peaks.slice(*rows[position]) for position in hits]
    vectors = [scattering_vectors(geometry, table) for table in mine]
    spots = [
        spots_where_rays_enter(geometry, q, table["panel"].to_numpy(), table["intensity"].to_numpy())
        for q, table in zip(vectors, mine, strict=True)
    ]
    job = EngineJob(chunk.header, flat_geometry(geometry), cell, tuple(spots))
    answers = engine.index(job, params) if spots else []
    counter = _indexer_for(cell, geometry.wavelength, IndexParams())
    crystals: list[list[Crystal]] = [[] for _ in range(len(chunk))]
    why, counts = [""] * len(chunk), []
    for position, q, answer in zip(hits, vectors, answers, strict=True):
        why[position] = answer.why
        for lattice in answer.lattices:
            crystal = counter.described(q, lattice.A, lattice.shift)
            if crystal is None:
                why[position] = f"{engine.name} gave a lattice that explains no spot"
                continue
            crystals[position].append(crystal)
            counts.append(lattice.n_indexed)
    table = crystal_table(chunk.frame_index, crystals)
    n_crystals = np.array([len(c) for c in crystals], np.int64)
    return {
        "frames": pa.table(
            {
                "frame_index": chunk.frame_index,
                "indexed": n_crystals > 0,
                "n_crystals": n_crystals,
                "not_indexed_because": why,
            }
        ),
        "crystals": table.append_column("n_indexed_by_engine", pa.array(counts, pa.int64())),
    }


@functools.lru_cache(maxsize=_KEEP_FINDERS)
def _indexer_for(cell: UnitCell, wavelength: float, params: IndexParams) -> Indexer:
    """Kept from chunk to chunk: preparing one takes as long as indexing several frames."""
    return Indexer(cell, wavelength, params)


@functools.lru_cache(maxsize=_KEEP_FINDERS)
def _indices_within(cell: UnitCell, q_max: float) -> np.ndarray:
    """(n, 3): reflections that may be seen at all; tens of milliseconds to list."""
    hkl = cell.hkl_within(q_max)
    hkl.flags.writeable = False
    return hkl


def run_integrate(chunk: ChunkFrames, params: IntegrateParams, cell: UnitCell | None, upstream: Upstream) -> Tables:
    """Intensities on the predicted positions of each indexed lattice."""
    assert cell is not None
    geometry = chunk.geometry
    crystals, peaks = table_before(upstream, "crystals"), table_before(upstream, "peaks")
    rows, peak_rows = rows_by_frame(crystals, chunk.frame_index), rows_by_frame(peaks, chunk.frame_index)
    hkl = _indices_within(cell, 1 / params.d_min if params.d_min else geometry.q_at_corner)
    rings = _kernel_params(params, IntegrationParams, chunk)

    def one(position: int) -> list[IntegratedCrystal]:
        found = [read_crystal(row, cell) for row in crystals.slice(*rows[position]).to_pylist()]
        if not found:
            return []
        q = scattering_vectors(chunk.detector_geometry, peaks.slice(*peak_rows[position]))
        radii = [profile_radius(crystal, q, geometry.wavelength) for crystal in found]
        predicted = [predict_spots(c, geometry, r, hkl) for c, r in zip(found, radii, strict=True)]
        frame = chunk.borrowed(position)
        return [
            IntegratedCrystal(
                _integrate(frame, chunk, mine, rings, _others(predicted, number)),
                radii[number],
                crystal_resolution(found[number], q, geometry.wavelength),
            )
            for number, mine in enumerate(predicted)
        ]

    return integration_tables(chunk.frame_index, chunk.map(one))


def _integrate(
    frame: np.ndarray,
    chunk: ChunkFrames,
    predicted: np.ndarray,
    rings: IntegrationParams,
    neighbours: np.ndarray | None,
) -> Integration:
    found = integrate_spots(frame, chunk.mask, predicted, chunk.geometry, rings, neighbours)
    return replace(found, reflections=_in_detector_px(found.reflections, chunk))


def _others(predicted: list[np.ndarray], number: int) -> np.ndarray | None:
    rest = [table for i, table in enumerate(predicted) if i != number]
    return np.concatenate(rest) if rest else None


def _kernel_params(params: Any, kind: type[P], chunk: ChunkFrames) -> P:
    """The kernel's parameters for frames as the step sees them.

    The detector's saturation value holds unless the recipe gives another. Binned frames need
    none, since binning has marked what was saturated, and their lengths in px are scaled.
    """
    values = {field.name: getattr(params, field.name) for field in fields(kind)}
    if values["saturation"] is None and chunk.binning == 1 and chunk.saturation_value is not None:
        values["saturation"] = float(chunk.saturation_value)
    kernel_params = kind(**values)
    return kernel_params.for_binning(chunk.binning) if chunk.binning > 1 else kernel_params


def _in_detector_px(table: np.ndarray, chunk: ChunkFrames) -> np.ndarray:
    """Positions found on binned frames as positions on the detector's own."""
    if chunk.binning > 1:
        table["x"] *= chunk.binning
        table["y"] *= chunk.binning
    return table


# What every step is computed with, whatever its kernel.
_SHARED = (
    sys.modules[__name__], step_module, step_tables, chunk_frames, bin_frames, geometry_module, sensor, photons,
    codec_module,
)  # fmt: skip


def _frame_step(params: type, begin: Callable[[ChunkFrames, Any], FrameWork], kernels: tuple[ModuleType, ...]) -> Step:
    def run(chunk: ChunkFrames, params: Any, cell: UnitCell | None, upstream: Upstream) -> Tables:
        work = begin(chunk, params)
        return work.gather(chunk.map(work.each))

    return Step(params, run, (*kernels, *_SHARED), frame_work=begin)


_DIALS = Engine("DIALS", dials_stills.DialsParams, dials_stills.version, dials_stills.index)
_INDEXAMAJIG = Engine("indexamajig", indexamajig.IndexamajigParams, indexamajig.version, indexamajig.index)


def _engine_step(engine: Engine, *modules: ModuleType) -> Step:
    kernels = (*modules, engine_module, index_frame, refine_lattice, unit_cell, *_SHARED)
    return Step(engine.params, functools.partial(run_engine, engine), kernels, needs_cell=True, engine=engine)


STEPS: dict[str, Step] = {
    "bin": _frame_step(BinParams, bin_work, (bin_frames,)),
    "find_peaks": _frame_step(FindPeaksParams, find_peaks_work, (find_peaks, ring_statistics)),
    "find_peaks_dispersion": _frame_step(
        FindDispersedPeaksParams, find_dispersed_peaks_work, (find_dispersed_peaks, find_peaks)
    ),
    "index": Step(
        IndexHitsParams, run_index, (index_frame, search_lattice, refine_lattice, unit_cell, *_SHARED), needs_cell=True
    ),
    "index_dials": _engine_step(_DIALS, dials_stills, dials_stills.dials_driver),
    "index_indexamajig": _engine_step(_INDEXAMAJIG, indexamajig, crystfel_module),
    "integrate": Step(
        IntegrateParams,
        run_integrate,
        (predict_spots_module, integrate_spots_module, unit_cell, *_SHARED),
        needs_cell=True,
    ),
}
