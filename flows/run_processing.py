"""Follow a run chunk by chunk, live or finished, and analyse each chunk as it is sealed.

`run_processing` is the whole of it as a plain function, with no server; the Prefect flow in
`flows.process_run` puts tasks and artifacts around it. Both do the same work in the same order
on the same step outputs, so a processing begun by one can be taken up by the other.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from flows.chunk_feeder import ChunkFeeder
from flows.criteria import read_criteria
from flows.decisions import Decision, Decisions
from flows.derived_streams import DerivedStreams
from flows.execution import Execution, Executor, Promise, plain_executor
from flows.exports import RunExporter
from flows.geometry_snapshots import GeometrySnapshots
from flows.pictures import draw_frame
from flows.progress import Progress, Reporter, Reporters, RunTotals, Silent
from flows.record_provenance import ProvenanceReporter
from flows.run_watch import RunWatch
from storage.errors import StreamNotFound
from storage.geometry_snapshot import GeometrySnapshot
from storage.models import Model
from storage.step_store import Manifest, Processing, find_processings
from storage.veto import hold_frames
from streaming.memory import give_back_freed_memory
from streaming.retrieval import Chunk, Run, Stream, open_run
from tasks.chunk_job import ChunkJob, analysis_header, analysis_mask
from tasks.process_chunk import ChunkResult, code_digest
from tasks.recipe import Recipe, load_recipe

__all__ = ["OpenExecutor", "ProcessRequest", "new_manifest", "run_processing"]

log = logging.getLogger("nearline.process")

_WAIT_FOR_STREAM_S = 60.0
_N_PICTURES = 4
# How often freed memory is given back.
_GIVE_BACK_S = 30.0

# Opens what carries out the jobs of a processing.
OpenExecutor = Callable[[Execution], AbstractContextManager[Executor]]


class ProcessRequest(Model):
    """What to process, and how."""

    run: str = Field(description="experiment/number, or the path of a run folder")
    recipe: dict[str, Any] = Field(description="the recipe's content")
    data_source: str | None = Field(None, description="which detector; needed only if the run has several")
    service: str | None = Field(None, description="service address; by default the one on this machine, if it runs")
    root: str | None = Field(None, description="data folder to look in when no service answers")
    n_threads: int | None = Field(None, gt=0, description="threads over the frames of a chunk; default: all cores")
    execution: Execution = Field(
        default_factory=Execution, description="where chunks are analysed, and how many at once"
    )
    if_done: Literal["repeat", "skip"] = Field(
        "repeat", description="if it was processed with the same recipe and code: make another processing, or leave it"
    )
    stop: tuple[str, ...] = Field((), description="stop criteria, judged after each chunk, e.g. n_indexed >= 1000")


def run_processing(
    request: ProcessRequest,
    *,
    reporter: Reporter | None = None,
    open_executor: OpenExecutor = plain_executor,
    flow_run: tuple[str, str] | None = None,
    tell: Callable[[Decision], None] = lambda decision: None,
) -> dict[str, Any]:
    """Process a run to its end; the summary, as in ``processed/<id>/summary.json``.

    Parameters
    ----------
    open_executor : what carries out the jobs; the flow puts Prefect tasks here.
    flow_run : id and URL of the Prefect run, for the record.
    tell : told of each stop criterion that is met.

    Raises
    ------
    RunNotFound, StreamNotFound, BadRecipe, BadCriterion
    ProcessingBusy : somebody is at it already.
    NotStored : the stream is in memory only.
    """
    recipe = load_recipe(request.recipe)
    read_criteria(request.stop)  # before anything is begun
    run = open_run(request.run, service=request.service, root=request.root)
    stream = _wait_for_stream(run, request.data_source)
    stream.require_stored("processed")
    if request.if_done == "skip" and (done := _finished_before(run, stream, recipe)) is not None:
        log.info("%s was processed with this recipe and code as %s", run.name, done.name)
        return (done.summary or {}) | {"done_before": True}
    # A veto replaces the shards that are read here.
    held = hold_frames(run.folder)
    try:
        processing, claim = _claim_processing(run, stream, recipe, flow_run)
    except BaseException:
        os.close(held)
        raise
    try:
        with open_executor(request.execution) as executor:
            n_threads = request.n_threads or request.execution.n_threads
            told = Reporters([ProvenanceReporter(flow_run[0] if flow_run else None), reporter or Silent()])
            decisions = Decisions(processing, recipe.digest, request.stop, tell)
            work = _Work(run, stream, processing, recipe, n_threads, executor, told, decisions)
            return work.carry_out(request.execution.n_ahead)
    finally:
        os.close(claim)
        os.close(held)


def _wait_for_stream(run: Run, data_source: str | None) -> Stream:
    """The stream to process; a live run's first header may still be on its way."""
    deadline = time.monotonic() + _WAIT_FOR_STREAM_S
    while True:
        try:
            return run[data_source] if data_source else run.detector
        except StreamNotFound:
            if run.state.is_terminal or time.monotonic() > deadline or run.data_sources:
                raise
        time.sleep(0.2)


def _same(run: Run, stream: Stream, recipe: Recipe) -> Iterator[Processing]:
    """The processings of a stream with this very recipe and code, oldest first."""
    wanted = (recipe.digest, code_digest(recipe), stream.name)
    for processing in find_processings(run.folder).values():
        manifest = processing.manifest
        # A part of a run that was tried out is no processing of it.
        is_whole = manifest.part is None
        if is_whole and (manifest.recipe_digest, manifest.code_digest, manifest.data_source) == wanted:
            yield processing


def _finished_before(run: Run, stream: Stream, recipe: Recipe) -> Processing | None:
    return next((one for one in _same(run, stream, recipe) if one.is_finished), None)


def _claim_processing(
    run: Run, stream: Stream, recipe: Recipe, flow_run: tuple[str, str] | None
) -> tuple[Processing, int]:
    """The unfinished processing with this very recipe and code, or a new one, and the claim on it."""
    while True:
        unfinished = next((one for one in _same(run, stream, recipe) if not one.is_finished), None)
        if unfinished is not None:
            return unfinished, unfinished.claim(flow_run[0] if flow_run else None)
        number = 1 + max((int(n[1:]) for n in find_processings(run.folder) if n[1:].isdecimal()), default=0)
        try:
            processing = Processing.create(run.folder, new_manifest(f"p{number}", stream, recipe, flow_run))
        except FileExistsError:
            continue  # somebody else began one just now; if it is the same, it is theirs
        return processing, processing.claim(flow_run[0] if flow_run else None)


def new_manifest(
    name: str,
    stream: Stream,
    recipe: Recipe,
    flow_run: tuple[str, str] | None,
    *,
    part: tuple[int, int] | None = None,
) -> Manifest:
    """What is known of a processing as it begins; ``part`` is (start, stop) of the frames of a canary."""
    packages = ("nearline", "numpy", "numba", "gemmi", "zarr", "h5py")
    return Manifest(
        processing=name,
        data_source=stream.name,
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=recipe.digest,
        code_digest=code_digest(recipe),
        started_at=datetime.now(UTC),
        versions={package: version(package) for package in packages},
        host=socket.gethostname(),
        flow_run_id=flow_run[0] if flow_run else None,
        flow_run_url=flow_run[1] if flow_run else None,
        part=part,
    )


class _Work:
    """One processing under way: chunk in, tables, streams, files and pictures out."""

    def __init__(
        self,
        run: Run,
        stream: Stream,
        processing: Processing,
        recipe: Recipe,
        n_threads: int,
        executor: Executor,
        reporter: Reporter,
        decisions: Decisions,
    ) -> None:
        self._run, self._stream, self._processing, self._recipe = run, stream, processing, recipe
        self._n_threads, self._executor, self._reporter = n_threads, executor, reporter
        self._decisions = decisions
        self._header, self._mask = analysis_header(stream, recipe), analysis_mask(stream, recipe)
        self._geometries = GeometrySnapshots(processing, recipe, stream.header)
        self._totals = RunTotals()
        self._pictures: list[Path] = []
        self._give_back_at = time.monotonic() + _GIVE_BACK_S
        self._snapshots: list[GeometrySnapshot] = []
        self._watch = RunWatch(run, processing, self._header, self._mask)
        self._derived = DerivedStreams(run, stream, processing, recipe, self._header)

    def carry_out(self, n_ahead: int) -> dict[str, Any]:
        """Chunk after chunk to the run's end; while one is taken, ``n_ahead`` more are under way."""
        started = time.perf_counter()
        self._reporter.started(self._run, self._processing, self._recipe)
        exporter = RunExporter(
            self._run.folder,
            self._processing.name,
            self._recipe,
            self._header,
            self._run.header,
            self._stream.pixel_mask,
        )
        try:
            self._derived.open()
            with self._geometries, ChunkFeeder(self._stream, self._submit, n_ahead) as under_way:
                for chunk, job, promise in under_way:
                    self._take(chunk, job, promise.result(), exporter)
            files = exporter.close()
            self._watch.finish()
        except BaseException:
            exporter.discard()
            raise
        announced = self._stream.status.announced
        self._derived.finish(announced)
        summary = self._summary(files, time.perf_counter() - started)
        self._processing.finish(summary)
        self._reporter.finished(summary)
        return summary

    def _submit(self, chunk: Chunk) -> tuple[ChunkJob, Promise]:
        geometry, recipe = self._geometries.recipe_for(chunk.commit.chunk)
        job = ChunkJob(str(self._run.folder), self._stream.name, recipe, chunk.commit, self._n_threads, geometry)
        return job, self._executor.submit(job)

    def _take(self, chunk: Chunk, job: ChunkJob, seconds: dict[str, float], exporter: RunExporter) -> None:
        """What a job has left in the step store goes into streams, files and pictures."""
        result = job.result(seconds)
        self._derived.send(job, result)
        before = time.perf_counter()
        export = partial(self._export, exporter, job, result)
        self._executor.export(self._run.name, chunk.commit, export)
        result.manifest.seconds["export"] = time.perf_counter() - before
        self._totals.add(result.manifest)
        log.info(
            "chunk %d: %d frames, %d hits, %d indexed",
            chunk.commit.chunk,
            result.manifest.n_frames,
            result.manifest.n_hits,
            result.manifest.n_indexed,
        )
        self._draw(job, result)
        if (snapshot := self._geometries.take(result)) is not None:
            self._snapshots.append(snapshot)
        self._processing.add_chunk(result.manifest)
        if time.monotonic() > self._give_back_at:
            give_back_freed_memory()
            self._give_back_at = time.monotonic() + _GIVE_BACK_S
        lag_frames = self._stream.status.announced - chunk.stop
        detector = self._geometries.header(job.geometry).detector
        self._reporter.chunk_done(
            Progress(
                run=self._run.name,
                processing=self._processing.name,
                chunk=result.manifest,
                totals=self._totals,
                figures=self._watch.take(result, job.frames, detector, lag_frames),
                lag_s=max((datetime.now(UTC) - chunk.commit.sealed_at).total_seconds(), 0.0),
                planned=self._stream.header.planned,
                pictures=tuple(self._pictures),
                geometries=tuple(self._snapshots),
                notes=self._watch.words,
                outlook=self._decisions.judge(chunk.commit.chunk),
                task_runs=self._executor.task_runs(chunk.commit.chunk),
            )
        )

    def _export(self, exporter: RunExporter, job: ChunkJob, result: ChunkResult) -> None:
        if job.geometry != exporter.geometry:
            exporter.use_geometry(job.geometry, self._geometries.header(job.geometry), job.commit.start)
        exporter.add_chunk(job.frames() if exporter.files else [], result)

    # ---- for people ---------------------------------------------------------------------------

    def _draw(self, job: ChunkJob, result: ChunkResult) -> None:
        """Pictures of the first few hits, indexed ones first."""
        table, peaks = result.frames, result.table("peaks")
        if len(self._pictures) >= _N_PICTURES or peaks is None or not result.manifest.n_hits:
            return
        rows = sorted(table.to_pylist(), key=lambda r: (not r.get("indexed"), not r["hit"], -r["n_peaks"]))
        by_index = {frame.frame_index: frame for frame in job.frames()}
        reflections = result.table("reflections")
        for row in rows[: min(2, _N_PICTURES - len(self._pictures))]:
            if not row["hit"]:
                continue
            index = row["frame_index"]
            words = [f"{row['n_peaks']} peaks", "indexed" if row.get("indexed") else "not indexed"]
            path = self._processing.folder / "pictures" / f"frame-{index:06d}.png"
            draw_frame(
                path,
                by_index[index].image,
                self._mask,
                self._geometries.header(job.geometry),
                f"{self._run.name} frame {index}: {', '.join(words)}",
                peaks.filter(peaks["frame_index"].to_numpy() == index),
                reflections.filter(reflections["frame_index"].to_numpy() == index) if reflections else None,
            )
            self._pictures.append(path)

    def _summary(self, files: dict[str, Path], seconds: float) -> dict[str, Any]:
        totals = self._totals
        return {
            "experiment": self._run.header.experiment,
            "run": self._run.header.run,
            "data_source": self._stream.name,
            "processing": self._processing.name,
            "recipe": self._recipe.name,
            "frames": totals.frames,
            "hits": totals.hits,
            "indexed": totals.indexed,
            "hit_rate": totals.hit_rate,
            "indexing_rate": totals.indexing_rate,
            "seconds": round(seconds, 3),
            "seconds_by_stage": {k: round(v, 3) for k, v in totals.seconds.items()},
            "chunks": totals.chunks,
            "steps_computed": totals.steps_computed,
            "steps_reused": totals.steps_reused,
            "geometries": [snapshot.words for snapshot in self._snapshots],
            "notes": list(self._watch.last_words),
            "files": {name: str(path) for name, path in files.items()},
            "pictures": [str(path) for path in self._pictures],
            "flow_run_url": self._processing.manifest.flow_run_url,
        }
