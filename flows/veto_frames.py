"""Which frames of a processed run nobody wants, and the next step of their veto: mark it, or carry out what is due."""

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
from pydantic import Field

from storage.errors import BadQuery, RunNotFound, VetoRefused
from storage.models import Model
from storage.retention import parse_age
from storage.run_folder import RunFolder
from storage.veto import Stage, VetoPlan, carry_out_veto, find_veto, mark_veto, plan_veto
from streaming.retrieval import Stream, open_run

__all__ = ["VetoRequest", "VetoStep", "folder_of", "next_step", "plan_for"]


class VetoRequest(Model):
    """What to veto, and when."""

    run: str = Field(description="experiment/number, or the path of a run folder")
    processing: str | None = Field(None, description="whose results decide, such as p1; needed to mark")
    condition: str = Field("results.hit", description="of the frames that stay, as in queries")
    keep_fraction: float = Field(0.01, ge=0, lt=1, description="of the others, kept as a random control sample")
    grace: str = Field("7d", description="how long it can be undone: a number and min, h, d or w")
    by: str = Field(description="who wants it")
    why: str = ""
    despite_processing: bool = Field(False, description="also while another processing of the run is at work")
    service: str | None = Field(None, description="service address; by default the one on this machine, if it runs")
    root: str | None = Field(None, description="data folder to look in when no service answers")


class VetoStep(Model):
    """A veto, and how far it is now."""

    plan: VetoPlan
    stage: Stage


def folder_of(request: VetoRequest) -> RunFolder:
    """The run's folder; VetoRefused where this machine does not see it."""
    folder = open_run(request.run, service=request.service, root=request.root).visible_folder
    if folder is None:
        raise VetoRefused(f"the folder of {request.run} is not to be seen from here; veto where the data are")
    return folder


def plan_for(request: VetoRequest) -> VetoPlan:
    """What the veto would do; changes nothing.

    Raises
    ------
    RunNotFound : there is no such processing.
    BadQuery : the condition is none, or names no column there is.
    VetoRefused, RunBusy : as of `plan_veto`, or the processing is not finished or saw other frames.
    """
    folder = folder_of(request)
    run = open_run(str(folder.path.absolute()))
    if request.processing not in run.processings:
        have = ", ".join(run.processings) or "none yet"
        raise RunNotFound(f"run {run.name} has no processing {request.processing!r}; it has: {have}")
    processing = run.processings[request.processing]
    if not processing.is_finished:
        raise VetoRefused(f"processing {processing.name} of {run.name} is not finished; let it end first")
    data_source = processing.manifest.data_source
    paths = folder.stream(data_source)
    for chunk in processing.chunks():
        commit = paths.read_commit(chunk.chunk)
        if chunk.chunk_digest not in (commit.digest, *(veto.digest for veto in commit.vetoes)):
            raise VetoRefused(f"{processing.name} saw another chunk {chunk.chunk} of {run.name}; process it anew first")
    unwanted = _without(run[data_source], request.condition, processing.name)
    return plan_veto(
        folder,
        data_source,
        unwanted.tolist(),
        processing=processing.name,
        condition=request.condition,
        by=request.by,
        why=request.why,
        keep_fraction=request.keep_fraction,
        grace=parse_age(request.grace),
    )


def _without(stream: Stream, condition: str, processing: str) -> np.ndarray:
    """The frames for which a condition is false; where it is unknown, its opposite is so too, and the frame stays."""
    wanted = stream.where(condition, processing=processing).indices
    unwanted = stream.where(f"NOT ({condition})", processing=processing).indices
    if np.intersect1d(wanted, unwanted).size:  # a bracket too many, and NOT belongs to a part of it only
        raise BadQuery(f"{condition!r} is no condition of one piece; check its brackets")
    return unwanted


def next_step(request: VetoRequest, progress: Callable[[int, int], None] = lambda done, total: None) -> VetoStep:
    """Mark a veto where there is none; carry it out, or complete it, once it is due."""
    folder = folder_of(request)
    found = find_veto(folder)
    plan, stage = found if found is not None else (mark_veto(folder, plan_for(request)), "marked")
    if stage == "marked" and datetime.now(UTC) < plan.due_at:
        return VetoStep(plan=plan, stage="marked")
    carry_out_veto(folder, despite_processing=request.despite_processing, progress=progress)
    return VetoStep(plan=plan, stage="done")
