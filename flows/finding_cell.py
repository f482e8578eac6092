"""The unit cell of an unknown sample from the first hits of a run, live or finished: what `nearline find-cell` shows.

Each hit is searched for a lattice alone; the lattices that agree give a cell, and the known-cell indexing, tried
on the same hits with it, says whether it holds. Where lattices do not agree, no cell is named.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import yaml
from pydantic import Field

from storage.errors import RunNotFound
from storage.geometry import Geometry
from storage.models import Record
from storage.step_store import Processing
from streaming.retrieval import Run, Stream
from tasks.agree_on_cell import AgreedCell, agree_on_cell
from tasks.bravais import BravaisLattice
from tasks.chunk_frames import trustworthy, usable_mask
from tasks.chunk_job import analysis_header
from tasks.find_cell import FoundLattice, distance_scale, find_lattice
from tasks.find_peaks import PEAK_DTYPE, PeakFinder, PeakParams
from tasks.index_frame import Indexer
from tasks.recipe import load_recipe
from tasks.step_tables import scattering_vectors
from tasks.unit_cell import UnitCell

__all__ = ["CellReport", "PossibleLattice", "StillSpots", "cell_of_stills", "find_cell", "recipe_text"]

T = TypeVar("T")
R = TypeVar("R")
# What is done, how much of it, of how much in all.
ProgressCall = Callable[[str, int, int], None]
# A frame with at least so many peaks is a hit where no processing has decided; as `FindPeaksParams.min_peaks`.
_MIN_PEAKS = 15
# To be called likely, and sure: hits that agree, their share of the lattices found, the share of all hits that the cell
# indexes, and the largest error of the distance that the lattices may ask for.
_LIKELY, _SURE = (5, 0.4, 0.3, 0.02), (10, 0.6, 0.5, 0.01)
_N_FOR_DISTANCE = 24
# With the distance off by more even the shape of the cell comes out wrong.
_MOST_DISTANCE_ERROR = 0.04


@dataclass(frozen=True)
class StillSpots:
    """Spots of one frame. q : (n, 3) 1/Å, laboratory frame. intensity : (n,), any measure of strength."""

    frame_index: int
    q: np.ndarray
    intensity: np.ndarray


class PossibleLattice(Record):
    """A lattice type that the cell may have."""

    lattice: str = Field(description="such as tetragonal P")
    cell: tuple[float, float, float, float, float, float]
    deviation: float = Field(description="relative strain from the measured cell")


class CellReport(Record):
    """What the hits of a run say of the cell, and how sure that is."""

    run: str = ""
    data_source: str = ""
    processing: str | None = Field(None, description="whose peaks; None where they were searched for this")
    n_frames: int = Field(0, description="looked at for hits")
    n_hits: int = Field(0, description="searched for a lattice")
    n_lattices: int = Field(0, description="hits with a lattice that is not chance")
    n_agreeing: int = Field(0, description="of these, with the proposed cell")
    certainty: str = Field("none", pattern="^(none|tentative|likely|sure)$")
    why: str = Field("", description="what the certainty rests on, or why there is no cell")
    lattice: str = Field("", description="such as tetragonal P")
    cell: tuple[float, float, float, float, float, float] | None = Field(
        None, description="conventional; Å and degrees"
    )
    space_group: str = Field(
        "", description="the lattice's highest rotation group: a stand-in until merging knows more"
    )
    volume: float = Field(0.0, description="Å³, of the conventional cell")
    spread: tuple[float, ...] = Field((), description="robust standard deviation of the six parameters over hits")
    error: float = Field(0.0, description="relative standard error of the cell's lengths")
    deviation: float = Field(
        0.0, description="relative strain by which the measured cell misses the lattice's symmetry"
    )
    alternatives: tuple[PossibleLattice, ...] = ()
    n_indexed: int = Field(0, description="of the same hits, indexed with the proposed cell")
    indexing_rate: float = Field(0.0, description="n_indexed over n_hits")
    distance_scale: float = Field(1.0, description="true over assumed distance, as lattices want it; 0.94 to 1.06")
    is_one_orientation: bool = Field(False, description="all lattices stand alike")
    cells: tuple[tuple[float, ...], ...] = Field((), description="of each agreeing hit, without constraint")

    @property
    def unit_cell(self) -> UnitCell | None:
        return None if self.cell is None else UnitCell(*self.cell, self.space_group)

    @property
    def recipe_lines(self) -> str:
        """What to put into a recipe."""
        if self.cell is None:
            return ""
        numbers = ", ".join(f"{v:g}" for v in self.cell)
        return f"sample:\n  cell: [{numbers}]\n  space_group: {self.space_group}\n"


def find_cell(
    run: Run,
    *,
    data_source: str | None = None,
    processing: str | None = None,
    n_hits: int = 200,
    timeout: float | None = 30.0,
    n_threads: int | None = None,
    progress: ProgressCall | None = None,
) -> CellReport:
    """Find the cell from up to ``n_hits`` hits of a run.

    Parameters
    ----------
    processing : whose peaks to take; by default the run's, and where there is none, peaks are searched here with
        default parameters, on a live run until there are enough hits.
    timeout : s without a new frame after which a live run is taken as it is.

    Raises
    ------
    RunNotFound : there is no such processing. BadFrame : the detector told no distance or wavelength.
    """
    tell = progress or (lambda stage, done, total: None)
    threads = n_threads or os.cpu_count() or 1
    chosen = _chosen_processing(run, processing)
    if chosen is not None:
        stream = run[chosen.manifest.data_source]
        stills, n_frames, geometry = _stills_of_processing(stream, chosen, n_hits)
    else:
        stream = run[data_source] if data_source else run.detector
        stills, n_frames = _searched_stills(stream, n_hits, timeout, threads, tell)
        geometry = stream.geometry
    report = cell_of_stills(stills, geometry.wavelength, n_threads=threads, progress=tell)
    return report.model_copy(
        update={
            "run": run.name,
            "data_source": stream.name,
            "processing": chosen.name if chosen else None,
            "n_frames": n_frames,
        }
    )


def cell_of_stills(
    stills: list[StillSpots], wavelength: float, *, n_threads: int = 1, progress: ProgressCall | None = None
) -> CellReport:
    """The cell that stills have in common. wavelength : Å."""
    tell = progress or (lambda stage, done, total: None)

    def lattice(still: StillSpots) -> FoundLattice | None:
        return find_lattice(still.q, wavelength)

    found = _each(lattice, stills, "lattices without a cell", n_threads, tell)
    lattices = [one for one in found if one is not None]
    agreed = agree_on_cell(lattices)
    known: dict[str, Any] = {"n_hits": len(stills), "n_lattices": len(lattices)}
    if agreed is None:
        return CellReport(**known, why=_why_nothing(len(stills), len(lattices)))
    cell = _rounded(agreed.lattice.cell)
    indexer = Indexer(cell, wavelength)
    indexed = _each(lambda s: bool(indexer(s.q, s.intensity)), stills, "indexing with the cell", n_threads, tell)
    pairs = [(s.q, one) for s, one in zip(stills, found, strict=True) if one is not None]
    some = [pairs[i] for i in agreed.members[:_N_FOR_DISTANCE]]
    return _report(agreed, cell, sum(indexed), distance_scale(some, wavelength), known)


# ---- spots ----------------------------------------------------------------------------------------


def _chosen_processing(run: Run, name: str | None) -> Processing | None:
    """The processing named, or the newest of those that have found peaks; None where there is none to choose."""
    if name is not None:
        chosen = run.processing(name)
        if not _has_hits(chosen):
            raise RunNotFound(f"processing {name} of {run.name} has no hits with peaks yet; leave out --processing")
        return chosen
    if run.visible_folder is None:
        return None
    return next((p for p in reversed(list(run.processings.values())) if _has_hits(p)), None)


def _has_hits(processing: Processing) -> bool:
    try:
        return bool(len(processing.peaks)) and "hit" in processing.frames.column_names
    except KeyError:
        return False


def _stills_of_processing(
    stream: Stream, processing: Processing, n_hits: int
) -> tuple[list[StillSpots], int, Geometry]:
    """The first hits of a processing, how many frames it had looked at, and the detector as its recipe has it."""
    header = analysis_header(stream, load_recipe(processing.manifest.recipe))
    assert header.detector is not None
    geometry = Geometry.from_header(header.detector, (header.image_shape[0], header.image_shape[1]))
    frames = processing.frames.sort_by("frame_index")
    is_hit = frames["hit"].fill_null(False).to_numpy().astype(bool)
    hits = frames["frame_index"].to_numpy()[is_hit][:n_hits]
    peaks = processing.peaks.sort_by("frame_index")
    index = peaks["frame_index"].to_numpy()
    starts, stops = np.searchsorted(index, hits, "left"), np.searchsorted(index, hits, "right")
    stills = [_spots(int(h), geometry, peaks.slice(a, b - a)) for h, a, b in zip(hits, starts, stops, strict=True)]
    return stills, len(frames), geometry


def _spots(frame_index: int, geometry: Geometry, peaks: pa.Table) -> StillSpots:
    return StillSpots(frame_index, scattering_vectors(geometry, peaks), peaks["intensity"].to_numpy())


def _searched_stills(
    stream: Stream, n_hits: int, timeout: float | None, n_threads: int, tell: ProgressCall
) -> tuple[list[StillSpots], int]:
    """The first hits of a stream by the default peak search, and how many frames that took."""
    geometry, header = stream.geometry, stream.header
    saturation = trustworthy(header.detector.saturation_value if header.detector else None, header)
    params = PeakParams(saturation=float(saturation) if saturation is not None else None)
    finder = PeakFinder(geometry, usable_mask(stream.pixel_mask, header.image_shape, None), params)

    def search(frame: Any) -> StillSpots:
        found = finder(frame.image)
        return _spots(frame.frame_index, geometry, _as_table(found))

    stills: list[StillSpots] = []
    n_frames, stop = 0, threading.Event()
    frames = stream.follow(timeout=timeout, stop=stop)
    with ThreadPoolExecutor(n_threads) as pool:
        for batch in _batches(frames, n_threads):
            n_frames += len(batch)
            stills += [s for s in pool.map(search, batch) if len(s.q) >= _MIN_PEAKS]
            tell("hits", min(len(stills), n_hits), n_hits)
            if len(stills) >= n_hits:
                stop.set()
                break
    return stills[:n_hits], n_frames


def _as_table(peaks: np.ndarray) -> pa.Table:
    return pa.table({name: np.ascontiguousarray(peaks[name]) for name in PEAK_DTYPE.names or ()})


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch


def _each(function: Callable[[T], R], items: list[T], stage: str, n_threads: int, tell: ProgressCall) -> list[R]:
    """The function of each item, in order, over threads; told as it goes."""
    results: list[R] = []
    with ThreadPoolExecutor(n_threads) as pool:
        for result in pool.map(function, items):
            results.append(result)
            tell(stage, len(results), len(items))
    return results


# ---- verdict --------------------------------------------------------------------------------------


def _rounded(cell: UnitCell) -> UnitCell:
    """Lengths to 0.01 Å and angles to 0.01°: no still says more. Equal values stay equal."""
    return cell.with_parameters([round(v, 2) for v in cell.parameters])


def _report(agreed: AgreedCell, cell: UnitCell, n_indexed: int, scale: float, known: dict[str, Any]) -> CellReport:
    rate = n_indexed / known["n_hits"]
    n_agreeing = len(agreed.members)
    facts = known | {"n_agreeing": n_agreeing, "n_indexed": n_indexed, "indexing_rate": rate, "distance_scale": scale}
    if n_indexed < n_agreeing / 2:
        return CellReport(
            **facts,
            why=f"{n_agreeing} hits agree on {cell.describe()}, but only {n_indexed} of {known['n_hits']} hits are "
            "indexed with it, so it is not proposed; check detector distance, wavelength and beam centre",
        )
    if abs(scale - 1) > _MOST_DISTANCE_ERROR:
        return CellReport(
            **facts,
            why=f"{n_agreeing} hits agree on {cell.describe()}, but want the detector {_distance_in_words(scale)}, "
            "so it is not proposed; correct detector_distance (or the wavelength) and try again",
        )
    return CellReport(
        **facts,
        certainty=_certainty(n_agreeing, n_agreeing / known["n_lattices"], rate, abs(scale - 1)),
        why=f"{n_agreeing} of {known['n_lattices']} lattices found in {known['n_hits']} hits agree; "
        f"{n_indexed} of {known['n_hits']} hits are indexed with this cell ({100 * rate:.0f} %)",
        lattice=agreed.lattice.name,
        cell=cell.parameters,
        space_group=cell.space_group,
        volume=round(cell.volume, 1),
        spread=tuple(float(v) for v in agreed.spread.round(4)),
        error=agreed.error,
        deviation=agreed.lattice.deviation,
        alternatives=tuple(_possible(lattice) for lattice in agreed.alternatives),
        is_one_orientation=agreed.is_one_orientation,
        cells=tuple(tuple(float(v) for v in row.round(3)) for row in agreed.parameters),
    )


def _distance_in_words(scale: float) -> str:
    """True over assumed distance; at either end of what is tried it may be more."""
    is_at_end = not 0.945 < scale < 1.055
    more = " or more" if is_at_end else ""
    return f"{100 * abs(scale - 1):.0f} %{more} {'farther away' if scale > 1 else 'nearer'}"


def _possible(lattice: BravaisLattice) -> PossibleLattice:
    return PossibleLattice(
        lattice=lattice.name, cell=_rounded(lattice.cell).parameters, deviation=round(lattice.deviation, 5)
    )


def _certainty(n_agreeing: int, share: float, rate: float, distance_error: float) -> str:
    for word, (least, least_share, least_rate, most_error) in (("sure", _SURE), ("likely", _LIKELY)):
        is_enough = n_agreeing >= least and share >= least_share and rate >= least_rate
        if is_enough and distance_error <= most_error:
            return word
    return "tentative"


def _why_nothing(n_hits: int, n_lattices: int) -> str:
    if not n_hits:
        return "no frame has enough peaks to be a hit; is there beam on the sample, and is the threshold right?"
    if n_lattices < 3:
        return (
            f"only {n_lattices} of {n_hits} hits show a lattice: too few spots, powder or ice rings, or noise; "
            "take more frames, or look at some with `nearline show`"
        )
    return (
        f"{n_lattices} of {n_hits} hits show lattices, but these do not agree on a cell; "
        "check detector distance, wavelength and beam centre, and whether crystals overlap"
    )


def recipe_text(report: CellReport) -> str:
    """A recipe with this cell: peaks, indexing, integration; YAML."""
    steps = [{"use": name} for name in ("bin", "find_peaks", "index", "integrate")]
    return f"name: found-cell\n{report.recipe_lines}{yaml.safe_dump({'steps': steps}, sort_keys=False)}"
