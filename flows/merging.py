"""Merging over runs: one set of intensities from all crystals of a sample, with the files that go on from here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from flows.merged_files import draw_statistics, hkl_text, merged_mtz
from flows.run_choice import choose_runs
from flows.run_tally import cell_of, chosen_processing, usual_d_min
from storage.errors import BadRecipe, RunNotFound
from storage.files import replace
from storage.models import Model, Record
from storage.promotion import default_processing
from storage.step_store import Processing
from streaming.retrieval import open_run
from tasks.merge_crystals import Merged, MergeStatistics, MergeSums
from tasks.unit_cell import UnitCell, read_cell

__all__ = ["MergeRequest", "MergeResult", "merge_runs"]

# Cells that differ by more do not belong to one merge; relative, and degrees.
_LENGTH_TOLERANCE, _ANGLE_TOLERANCE = 0.02, 1.5
_COLUMNS = ("frame_index", "crystal", "h", "k", "l", "intensity", "sigma")

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
    n_shells: int = Field(10, ge=1, le=100, description="resolution shells of the statistics")
    name: str = Field("merged", pattern=r"^[\w.@+-]+$", description="of the files, without an ending")
    service: str | None = None
    root: str | None = None


class MergeResult(Record):
    """What came out."""

    statistics: MergeStatistics
    inputs: dict[str, str] = Field(description="processing by run")
    left_out: dict[str, str] = Field(description="runs without reflections, with the reason")
    files: dict[str, str] = Field(default_factory=dict)


def merge_runs(
    request: MergeRequest, output: Path | None = None, progress: Progress = lambda n, of: None
) -> MergeResult:
    """Merge all reflections of some runs, and write MTZ, CrystFEL ``.hkl``, statistics and a picture of them.

    Parameters
    ----------
    output : folder for the files; None to write none.

    Raises
    ------
    RunNotFound, BadQuery : no runs were chosen, or none has reflections.
    BadRecipe, BadMerge : cells differ, or there is none; the message names run and cell.
    """
    chosen = choose_runs(request.runs, request.where, service=request.service, root=request.root)
    found, left_out = _with_reflections(chosen.names, request)
    if not found:
        why = "; ".join(f"{run}: {reason}" for run, reason in left_out.items())
        raise RunNotFound(f"none of {len(chosen.names)} runs has reflections to merge: {why}")
    cell = _cell_of(found, request)
    d_min = request.d_min or max(usual_d_min(processing) for processing in found.values())
    sums = MergeSums(cell, d_min, request.friedel_mates)
    for n_done, (run, processing) in enumerate(found.items(), 1):
        table = processing.table("reflections")
        sums.add(run, {name: table[name].to_numpy() for name in _COLUMNS})
        progress(n_done, len(found))
    statistics = sums.statistics(request.n_shells)
    inputs = {run: processing.name for run, processing in found.items()}
    result = MergeResult(statistics=statistics, inputs=inputs, left_out=chosen.left_out | left_out)
    if output is None:
        return result
    return result.model_copy(update={"files": _write(output, request, sums.merged(), result, cell)})


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
        if cell is None or not _are_alike(first, cell):
            shown = cell.describe() if cell else "none"
            raise BadRecipe(
                f"the cell of {first_run} is {first.describe()}, that of {run} {shown}: merge runs of one sample, "
                "or give the cell with --cell"
            )
    return first


def _are_alike(one: UnitCell, other: UnitCell) -> bool:
    lengths = np.allclose(one.parameters[:3], other.parameters[:3], rtol=_LENGTH_TOLERANCE)
    angles = np.allclose(one.parameters[3:], other.parameters[3:], atol=_ANGLE_TOLERANCE, rtol=0)
    return bool(lengths and angles and one.space_group == other.space_group)


def _write(output: Path, request: MergeRequest, merged: Merged, result: MergeResult, cell: UnitCell) -> dict[str, str]:
    output.mkdir(parents=True, exist_ok=True)
    base = output / request.name
    is_apart = request.friedel_mates == "apart"
    files = {kind: base.with_name(f"{base.name}.{kind}") for kind in ("mtz", "hkl", "png", "json")}
    history = f"nearline merge: {len(result.inputs)} runs, {result.statistics.n_crystals} crystals"
    merged_mtz(merged, cell, is_apart, history).write_to_file(str(files["mtz"]))
    replace(files["hkl"], hkl_text(merged, cell, is_apart, history).encode())
    draw_statistics(files["png"], result.statistics, history)
    content = result.model_dump(mode="json") | {"request": request.model_dump(mode="json")}
    replace(files["json"], json.dumps(content, indent=1).encode())
    return {kind: str(path) for kind, path in files.items()}
