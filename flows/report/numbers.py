"""The figures of a report: what stands in its table, and in the JSON object."""

import math

import numpy as np
from pydantic import Field

from flows.decisions import Decision, decisions_of
from flows.report.gathering import CELL_NAMES, Gathered
from flows.report.tallies import Sample
from flows.run_warnings import along_the_run
from storage.models import Record
from tasks.merge_crystals import MergeStatistics
from tasks.model_partiality import PartialityReport
from tasks.orientation_coverage import (
    Alignment,
    beam_directions,
    largest_gap_deg,
    laue_rotations,
    preferred_axis,
)
from tasks.scale_crystals import ScalingReport

__all__ = ["ColumnFigures", "OrientationFigures", "ReportFigures", "RunFigures", "figures_of"]

# A standard deviation that a few strays do not touch.
_MAD_TO_SIGMA = 1.4826
# So near to an axis of the laboratory, a direction is called by its name.
_NEAR_DEG = 20.0


class RunFigures(Record):
    """One run of a report."""

    run: str
    processing: str
    data_source: str
    n_frames: int = Field(description="processed")
    n_hits: int
    n_indexed: int
    n_missing: int = Field(description="frames that never came")
    is_whole: bool = Field(description="the run has ended, and all of it is processed")
    digest: str = Field(description="over all step outputs that the report rests on")


class OrientationFigures(Record):
    """How the crystals stand; see `tasks.orientation_coverage`."""

    largest_gap_deg: float = Field(description="from the emptiest direction in the crystal to the nearest beam")
    axis: str | None = Field(description="the axis that is least random; null where nothing can be said")
    eigenvalue: float | None = Field(description="of its direction tensor: 1/3 if random, 1 if all are parallel")
    highest_random: float | None = Field(description="what random axes exceed once in a thousand times")
    chance: float | None = Field(description="probability of such a tensor for random axes")
    direction: tuple[float, float, float] | None = Field(description="laboratory frame, z along the beam, y up")
    is_preferred: bool


class ColumnFigures(Record):
    """The values of a column of the frames, those that are numbers."""

    n_values: int
    mean: float
    sigma: float = Field(description="standard deviation")
    least: float
    greatest: float


class ReportFigures(Record):
    """The figures of a report; null where the processing does not tell."""

    runs: tuple[RunFigures, ...]
    sample: str | None
    recipe: str
    n_frames: int
    n_hits: int | None = Field(description="null where no step tells hits from other frames")
    hit_rate: float | None = Field(description="hits over frames")
    n_indexed: int | None = Field(description="frames with a lattice")
    indexing_rate: float | None = Field(description="indexed frames over hits")
    n_crystals: int | None
    multiple_rate: float | None = Field(description="frames with several lattices over indexed frames")
    peaks_per_hit: float | None = Field(description="mean")
    spots_indexed: float | None = Field(description="indexed spots over all peaks of indexed frames")
    resolution: float | None = Field(description="Å, median over crystals")
    cell: tuple[float, ...] | None = Field(description="medians over crystals; Å and degrees")
    cell_sigma: tuple[float, ...] | None = Field(description="spread of single crystals, robust standard deviations")
    cell_given: tuple[float, ...] | None = Field(description="of the recipe")
    beam_shift: tuple[float, float] | None = Field(description="px, median over crystals: where the centre should be")
    background: float | None = Field(description="counts per pixel around the peaks, median over chunks")
    orientation: OrientationFigures | None
    merging: MergeStatistics | None = Field(description="of all crystals, scaled together where `scaling` says so")
    scaling: ScalingReport | None = Field(description="null where crystals were not scaled, but a plain mean taken")
    partiality: PartialityReport | None = Field(description="null where crystals were not scaled")
    columns: dict[str, ColumnFigures] = Field(description="of users' steps, and the total counts of bin")
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = Field(description="what was left out, and why")


def figures_of(found: Gathered) -> ReportFigures:
    """All figures of what was read."""
    n_frames, n_hits, n_indexed = (found.count(name) for name in ("n_frames", "n_hits", "n_indexed"))
    cells = np.column_stack([found.crystal_column(name) for name in CELL_NAMES])
    orientation = _orientation(found)
    return ReportFigures(
        runs=tuple(_of_runs(found)),
        sample=next((part.run.header.sample for part in found.parts if part.run.header.sample), None),
        recipe=str(found.parts[0].manifest.recipe.get("name", "recipe")),
        n_frames=n_frames,
        n_hits=n_hits if found.seeks_hits else None,
        hit_rate=_ratio(n_hits, n_frames) if found.seeks_hits else None,
        n_indexed=n_indexed if found.seeks_lattices else None,
        indexing_rate=_ratio(n_indexed, n_hits) if found.seeks_lattices else None,
        n_crystals=found.n_crystals if found.seeks_lattices else None,
        multiple_rate=_ratio(found.n_multiple, n_indexed) if found.seeks_lattices else None,
        peaks_per_hit=_ratio(found.n_peaks_of_hits, n_hits) if found.has_peaks else None,
        spots_indexed=_ratio(found.n_spots_indexed, found.n_spots_of_indexed),
        resolution=_median(found.crystal_column("resolution")),
        cell=tuple(np.median(cells, axis=0).tolist()) if len(cells) else None,
        cell_sigma=tuple(_sigma(cells).tolist()) if len(cells) else None,
        cell_given=found.cell.parameters if found.cell else None,
        beam_shift=_shift(found),
        background=_median(np.array([one.background for one in found.figures])),
        orientation=orientation,
        merging=found.statistics,
        scaling=found.scaling,
        partiality=found.partiality,
        columns={name: _of_column(sample) for name, sample in found.values.items() if sample.n_seen},
        decisions=tuple(decision for part in found.parts for decision in decisions_of(part.processing)),
        warnings=tuple(_warnings(found, orientation)),
        notes=tuple(_notes(found)),
    )


def _of_runs(found: Gathered) -> list[RunFigures]:
    return [
        RunFigures(
            run=part.run.name,
            processing=part.processing.name,
            data_source=part.manifest.data_source,
            n_frames=sum(one.n_frames for one in part.figures),
            n_hits=sum(one.n_hits for one in part.figures),
            n_indexed=sum(one.n_indexed for one in part.figures),
            n_missing=part.ledger.missing,
            is_whole=part.is_whole,
            digest=str(part.tally.inputs["digest"]),
        )
        for part in found.parts
    ]


def _of_column(sample: Sample) -> ColumnFigures:
    values = sample.rows[:, 0]
    return ColumnFigures(
        n_values=sample.n_seen,
        mean=float(values.mean()),
        sigma=float(values.std()),
        least=float(values.min()),
        greatest=float(values.max()),
    )


def _orientation(found: Gathered) -> OrientationFigures | None:
    if found.cell is None or not len(found.crystals.rows):
        return None
    A = found.matrices
    axis: Alignment | None = preferred_axis(A, found.cell)
    return OrientationFigures(
        largest_gap_deg=largest_gap_deg(beam_directions(A, found.cell), laue_rotations(found.cell)),
        axis=axis.axis if axis else None,
        eigenvalue=axis.eigenvalue if axis else None,
        highest_random=axis.highest_random if axis else None,
        chance=axis.chance if axis else None,
        direction=axis.direction if axis else None,
        is_preferred=bool(axis and axis.is_preferred),
    )


# ---- in words -------------------------------------------------------------------------------------------


def _warnings(found: Gathered, orientation: OrientationFigures | None) -> list[str]:
    said = [
        f"{part.run.name}: {text}" if len(found.parts) > 1 else text
        for part in found.parts
        for text in along_the_run(part.figures, seeks_hits=found.seeks_hits)
    ]
    for part in found.parts:
        said += [f"The ledger does not balance: {problem}." for problem in part.ledger.problems]
    if orientation is not None and orientation.is_preferred and orientation.direction is not None:
        said.append(
            f"The crystals lie in a preferred orientation: {orientation.axis} points {_towards(orientation.direction)} "
            f"more often than elsewhere (largest eigenvalue {orientation.eigenvalue:.2f}; random orientations stay "
            f"below {orientation.highest_random:.2f}). Completeness may stop rising; tilt or mix."
        )
    if found.statistics is not None and found.statistics.is_ambiguous:
        said.append(
            "The lattice has more symmetry than the crystal, so two indexings are mixed in the statistics below: "
            "nearline merge tells them apart."
        )
    return said


def _towards(direction: tuple[float, float, float]) -> str:
    """A direction in words, where it is near to one that has a name."""
    at = int(np.abs(direction).argmax())
    angle = math.degrees(math.acos(min(abs(direction[at]), 1.0)))
    if angle > _NEAR_DEG:
        return "along ({:.2f}, {:.2f}, {:.2f}) in the laboratory".format(*direction)
    return ("sideways", "up and down", "along the beam")[at]


def _notes(found: Gathered) -> list[str]:
    notes = list(found.notes)
    if not found.figures:
        notes.append("no chunk is processed yet")
        return notes
    if not found.has_peaks:
        notes.append("no peaks: no step of the recipe seeks any")
    if not found.seeks_lattices:
        notes.append("no crystals: the recipe does not index" + ("" if found.cell else ", and gives no cell"))
    elif not found.n_crystals:
        notes.append("no crystals: no lattice was found on any frame")
    if found.seeks_lattices and found.statistics is None and not found.notes:
        notes.append("no merging statistics: there are no integrated reflections")
    if found.map is None and found.has_peaks:
        notes.append("no map of peaks: the frames are not images")
    others = sum(part.header.image_shape != found.parts[0].header.image_shape for part in found.parts)
    if others:
        notes.append(f"the map of peaks is of the first detector: {others} runs have frames of another shape")
    if not found.crystals.is_whole:
        n_kept = len(found.crystals.rows)
        notes.append(f"medians and pictures of crystals are of {n_kept} of {found.n_crystals}, evenly chosen")
    return notes


# ---- numbers ----------------------------------------------------------------------------------------------


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _sigma(rows: np.ndarray) -> np.ndarray:
    return np.asarray(_MAD_TO_SIGMA * np.median(np.abs(rows - np.median(rows, axis=0)), axis=0))


def _shift(found: Gathered) -> tuple[float, float] | None:
    x, y = (_median(found.crystal_column(name)) for name in ("shift_x", "shift_y"))
    return None if x is None or y is None else (x, y)
