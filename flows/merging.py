"""Merging over runs: one set of intensities from all crystals of a sample, with the files that go on from here."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from flows.merge_splits import Labels, file_endings, labels_of_frames, split_crystals
from flows.merged_files import draw_statistics, hkl_text, merged_mtz
from flows.observed_reflections import POLARISATION, observed_reflections
from flows.run_choice import choose_runs
from flows.run_tally import cell_of, chosen_processing, geometry_of, usual_d_min
from storage.errors import BadFrame, BadQuery, BadRecipe, RunNotFound
from storage.files import replace
from storage.models import Model, Record
from storage.promotion import default_processing
from storage.step_store import Processing
from streaming.retrieval import open_run
from tasks.join_crystals import join_crystals
from tasks.merge_crystals import Mergeable, MergeStatistics, merge_statistics, unique_reflections
from tasks.model_partiality import PartialityReport
from tasks.observations import Observations, gather_observations
from tasks.resolve_ambiguity import AmbiguityReport
from tasks.scale_crystals import ScalingReport
from tasks.unit_cell import UnitCell, read_cell

__all__ = ["MergeRequest", "MergeResult", "are_alike", "lines_about", "merge_runs"]

# Cells that differ by more do not belong to one merge; relative, and degrees.
_LENGTH_TOLERANCE, _ANGLE_TOLERANCE = 0.02, 1.5

Progress = Callable[[int, int], None]


class MergeRequest(Model):
    """Which runs to merge, and how."""

    runs: tuple[str, ...] = Field(description="runs, ranges (lyso-2026/3-9) or whole experiments (lyso-2026/*)")
    where: str | None = Field(None, description="SQL condition over runs, such as sample = 'lysozyme'")
    processing: str | None = Field(None, description="whose reflections; by default each run's promoted or newest")
    cell: str | None = Field(None, description="cell and symmetry to merge with; by default those of the recipe")
    space_group: str | None = Field(None, description="with a cell of six numbers")
    d_min: float | None = Field(None, gt=0, description="Å; by default where the recipe, or the detector, ends")
    friedel_mates: Literal["merged", "apart"] = Field("merged", description="apart keeps I(+) and I(-)")
    scale: bool = Field(True, description="scale and B of each crystal; without, a plain mean")
    partiality: bool = Field(True, description="model partialities too, where that makes crystals more alike")
    resolve: bool = Field(True, description="resolve the indexing ambiguity, where the lattice has one")
    polarisation: float | None = Field(
        POLARISATION, ge=0, le=1, description="horizontal fraction of the beam, for the correction; null for none"
    )
    split: str | None = Field(None, description="a column of the frames, or a condition on them; a set for each value")
    n_shells: int = Field(10, ge=1, le=100, description="resolution shells of the statistics")
    name: str = Field("merged", pattern=r"^[\w.@+-]+$", description="of the files, without an ending")
    service: str | None = None
    root: str | None = None


class MergeResult(Record):
    """What came out."""

    statistics: MergeStatistics
    inputs: dict[str, str] = Field(description="processing by run")
    left_out: dict[str, str] = Field(description="runs without reflections, with the reason")
    scaling: ScalingReport | None = Field(None, description="null where crystals were not scaled")
    partiality: PartialityReport | None = Field(None, description="null where partialities were not modelled")
    ambiguity: AmbiguityReport | None = Field(None, description="null where the lattice has none")
    sets: dict[str, MergeStatistics] = Field(default_factory=dict, description="of a split, by value")
    notes: tuple[str, ...] = Field((), description="what was not done, and why")
    files: dict[str, str] = Field(default_factory=dict)


def merge_runs(
    request: MergeRequest, output: Path | None = None, progress: Progress = lambda n, of: None
) -> MergeResult:
    """Merge all reflections of some runs, and write MTZ, CrystFEL ``.hkl``, statistics and a picture of them.

    Crystals are indexed alike, scaled together, and then merged: all of them, and set by set if a split is asked for.
    The same reflections give the same files, in whatever order runs are named.

    Parameters
    ----------
    output : folder for the files; None to write none.

    Raises
    ------
    RunNotFound, BadQuery : no runs were chosen, or none has reflections; or no frame has what to split by.
    BadRecipe, BadMerge : cells differ, or there is none; the message names run and cell.
    """
    chosen = choose_runs(request.runs, request.where, service=request.service, root=request.root)
    found, left_out = _with_reflections(chosen.names, request)
    if not found:
        why = "; ".join(f"{run}: {reason}" for run, reason in left_out.items())
        raise RunNotFound(f"none of {len(chosen.names)} runs has reflections to merge: {why}")
    cell = _cell_of(found, request)
    labels = _labels(chosen.names, found, request) if request.split else {}
    observations, notes = _gather(found, cell, request, progress)
    joined = join_crystals(observations, resolve=request.resolve, scale=request.scale, partiality=request.partiality)
    sets = split_crystals(joined.observations, labels, request.split) if request.split else {}
    all_of_them, by_value = joined.merged(), {name: joined.merged(which) for name, which in sets.items()}
    result = MergeResult(
        statistics=merge_statistics(all_of_them, request.n_shells),
        inputs={run: processing.name for run, processing in found.items()},
        left_out=chosen.left_out | left_out,
        scaling=joined.scaling,
        partiality=joined.partiality,
        ambiguity=joined.ambiguity,
        sets={name: merge_statistics(one, request.n_shells) for name, one in by_value.items()},
        notes=(*notes, *joined.notes),
    )
    if output is None:
        return result
    files = _write(output, request.name, request, all_of_them, result)
    for name, ending in file_endings(request.split or "", by_value).items():
        one = result.model_copy(update={"statistics": result.sets[name], "sets": {}})
        written = _write(output, f"{request.name}-{ending}", request, by_value[name], one)
        files |= {f"{ending}.{kind}": path for kind, path in written.items()}
    return result.model_copy(update={"files": files})


def lines_about(result: MergeResult) -> list[str]:
    """How crystals were brought together, and what was not done, in sentences."""
    lines = []
    if (scaling := result.scaling) is not None:
        line = f"{scaling.n_scaled} crystals scaled"
        if scaling.scale_spread is not None and scaling.b_spread is not None:
            line += f", ln G within ±{scaling.scale_spread:.2f}, B within ±{scaling.b_spread:.1f} Å² of the median"
        lines += [line, *(f"{n} crystals left out: {why}" for why, n in scaling.left_out.items())]
    if (modelled := result.partiality) is not None and modelled.is_used:
        lines.append(
            f"partialities modelled: correlation of crystals {modelled.cc_with:.2f}, without {modelled.cc_without:.2f}"
        )
    if (found := result.ambiguity) is not None and found.is_resolved:
        lines.append(
            f"{found.n_reindexed} crystals reindexed: correlation with the others {found.cc_chosen:.2f} as chosen, "
            f"{found.cc_other:.2f} otherwise"
        )
    if result.statistics.n_outliers:
        lines.append(f"{result.statistics.n_outliers} observations left out as outliers")
    return [*lines, *result.notes]


def _gather(
    found: dict[str, Processing], cell: UnitCell, request: MergeRequest, progress: Progress
) -> tuple[Observations, list[str]]:
    d_min = request.d_min or max(usual_d_min(processing) for processing in found.values())
    tables, notes = [], []
    for n_done, (run, processing) in enumerate(found.items(), 1):
        columns, why = _observed(processing, request.polarisation)
        tables.append((run, columns))
        notes += [f"{run} is not corrected for polarisation: {why}"] if why else []
        progress(n_done, len(found))
    return gather_observations(unique_reflections(cell, d_min, request.friedel_mates), tables), notes


def _observed(processing: Processing, polarisation: float | None) -> tuple[dict[str, np.ndarray], str | None]:
    """Reflections of a processing, corrected for polarisation; or why not."""
    found = []
    for number in range(1 + len(processing.geometries())):
        with suppress(KeyError):  # a geometry that no chunk was analysed with
            table = processing.table("reflections", geometry=number)
            found.append(_observed_with(processing, number, table, polarisation))
    columns = {name: np.concatenate([part[name] for part, _ in found]) for name in found[0][0]}
    return columns, next((why for _, why in found if why), None)


def _observed_with(
    processing: Processing, geometry: int, table: pa.Table, polarisation: float | None
) -> tuple[dict[str, np.ndarray], str | None]:
    """The part of them that was measured with one geometry snapshot."""
    placed, why_unknown = None, None
    try:
        placed = geometry_of(processing, geometry) if polarisation is not None else None
    except BadFrame as error:
        why_unknown = str(error)
    columns, why_not = observed_reflections(table, placed, polarisation)
    return columns, why_not and (why_unknown or why_not)


def _labels(names: Sequence[str], found: dict[str, Processing], request: MergeRequest) -> dict[str, Labels]:
    """By run; runs in which nobody has the column are left to `UNSET`, but one must have it."""
    labels, refused = {}, None
    assert request.split is not None
    for name in names:
        run = open_run(name, service=request.service, root=request.root)
        if run.name not in found:
            continue
        try:
            labels[run.name] = labels_of_frames(run, found[run.name], request.split)
        except BadQuery as error:
            refused = refused or error
    if refused is not None and not labels:
        raise refused
    return labels


def _with_reflections(names: Sequence[str], request: MergeRequest) -> tuple[dict[str, Processing], dict[str, str]]:
    found, left_out = {}, {}
    for name in names:
        run = open_run(name, service=request.service, root=request.root)
        processing = _processing_of(run.folder, request.processing)
        if processing is None:
            left_out[run.name] = "it is not processed"
        elif not _has_reflections(processing):
            left_out[run.name] = f"{processing.name} has no reflections; put index and integrate in the recipe"
        else:
            found[run.name] = processing
    return found, left_out


def _processing_of(run: Path, name: str | None) -> Processing | None:
    return chosen_processing(run, name) if name is not None else default_processing(run)


def _has_reflections(processing: Processing) -> bool:
    try:
        return len(processing.table("reflections")) > 0
    except KeyError:
        return False


def _cell_of(found: dict[str, Processing], request: MergeRequest) -> UnitCell:
    """The one cell of all runs."""
    if request.cell is not None:
        return read_cell(request.cell, request.space_group)
    cells = {run: cell_of(processing) for run, processing in found.items()}
    first_run, first = next(iter(cells.items()))
    if first is None:
        raise BadRecipe(f"the recipe of {first_run} has no cell; give one with --cell")
    for run, cell in cells.items():
        if cell is None or not are_alike(first, cell):
            shown = cell.describe() if cell else "none"
            raise BadRecipe(
                f"the cell of {first_run} is {first.describe()}, that of {run} {shown}: merge runs of one sample, "
                "or give the cell with --cell"
            )
    return first


def are_alike(one: UnitCell, other: UnitCell) -> bool:
    """Whether two cells, and their space groups, are those of one sample."""
    lengths = np.allclose(one.parameters[:3], other.parameters[:3], rtol=_LENGTH_TOLERANCE)
    angles = np.allclose(one.parameters[3:], other.parameters[3:], atol=_ANGLE_TOLERANCE, rtol=0)
    return bool(lengths and angles and one.space_group == other.space_group)


def _write(output: Path, name: str, request: MergeRequest, merge: Mergeable, result: MergeResult) -> dict[str, str]:
    output.mkdir(parents=True, exist_ok=True)
    files = {kind: output / f"{name}.{kind}" for kind in ("mtz", "hkl", "png", "json")}
    is_modelled = result.partiality is not None and result.partiality.is_used
    how = "scaled, partialities modelled" if is_modelled else "scaled" if result.scaling else "plain mean"
    runs = f"{len(result.inputs)} run{'s' if len(result.inputs) != 1 else ''}"
    history = f"nearline merge: {runs}, {result.statistics.n_crystals} crystals, {how}"
    merged, unique = merge.merged(), merge.unique
    merged_mtz(merged, unique.cell, unique.is_apart, history).write_to_file(str(files["mtz"]))
    replace(files["hkl"], hkl_text(merged, unique.cell, unique.is_apart, history).encode())
    draw_statistics(files["png"], result.statistics, history)
    content = result.model_dump(mode="json") | {"request": request.model_dump(mode="json")}
    replace(files["json"], json.dumps(content, indent=1).encode())
    return {kind: str(path) for kind, path in files.items()}
