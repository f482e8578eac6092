"""Follow a run chunk by chunk, live or finished, and analyse each chunk as it is sealed.

`run_processing` is the whole of it as a plain function, with no server; the Prefect flow in
`flows.process_run` puts tasks and artifacts around it. Both do the same work in the same order
on the same step outputs, so a processing begun by one can be taken up by the other.
"""

import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import Field

from flows.exports import RunExporter
from flows.pictures import draw_frame
from storage.errors import NearlineError, StreamNotFound
from storage.models import Model, StreamHeader
from storage.run_folder import ChunkCommit
from storage.step_store import ChunkManifest, Manifest, Processing, find_processings
from streaming.derived import DerivedStream, open_derived
from streaming.retrieval import Chunk, Frame, Run, Stream, open_run
from tasks.bin_frames import binned_header
from tasks.chunk_frames import usable_mask
from tasks.process_chunk import ChunkResult, code_digest, process_chunk
from tasks.recipe import Recipe, load_recipe, read_mask
from tasks.steps import STEPS, BinParams

__all__ = ["ProcessRequest", "Progress", "Reporter", "RunTotals", "run_processing"]

log = logging.getLogger("nearline.process")

T = TypeVar("T")

_WAIT_FOR_STREAM_S = 60.0
_N_PICTURES = 4


class Call(Protocol):
    """Carries out one piece of work on one chunk; the flow puts a Prefect task here."""

    def __call__(self, stage: str, run: str, commit: ChunkCommit, work: Callable[[], T], /) -> T: ...


def call_plainly(stage: str, run: str, commit: ChunkCommit, work: Callable[[], T], /) -> T:
    """Just do it."""
    return work()


class ProcessRequest(Model):
    """What to process, and how."""

    run: str = Field(description="experiment/number, or the path of a run folder")
    recipe: dict[str, Any] = Field(description="the recipe's content")
    data_source: str | None = Field(None, description="which detector; needed only if the run has several")
    service: str | None = Field(None, description="service address; by default the one on this machine, if it runs")
    root: str | None = Field(None, description="data folder to look in when no service answers")
    n_threads: int = Field(default_factory=lambda: os.cpu_count() or 1, gt=0, description="threads over frames")


@dataclass
class RunTotals:
    """What has been processed so far; rates name their denominators."""

    frames: int = 0
    hits: int = 0
    indexed: int = 0
    chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Hits over processed frames."""
        return self.hits / self.frames if self.frames else 0.0

    @property
    def indexing_rate(self) -> float:
        """Indexed frames over hits."""
        return self.indexed / self.hits if self.hits else 0.0

    def add(self, chunk: ChunkManifest) -> None:
        self.frames += chunk.n_frames
        self.hits += chunk.n_hits
        self.indexed += chunk.n_indexed
        self.chunks += 1
        for name, seconds in chunk.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Progress:
    """A chunk has been done; for whoever shows it."""

    run: str
    processing: str
    chunk: ChunkManifest
    totals: RunTotals
    lag_frames: int
    planned: int
    pictures: tuple[Path, ...]


class Reporter(Protocol):
    """Told how a processing goes."""

    def started(self, run: Run, processing: Processing, recipe: Recipe) -> None: ...
    def chunk_done(self, progress: Progress) -> None: ...
    def finished(self, summary: dict[str, Any]) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def started(self, run: Run, processing: Processing, recipe: Recipe) -> None:
        pass

    def chunk_done(self, progress: Progress) -> None:
        pass

    def finished(self, summary: dict[str, Any]) -> None:
        pass


def run_processing(
    request: ProcessRequest,
    *,
    reporter: Reporter | None = None,
    call: Call = call_plainly,
    flow_run: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Process a run to its end; the summary, as in ``processed/<id>/summary.json``.

    Parameters
    ----------
    call : carries out each piece of work; the flow puts a Prefect task here.
    flow_run : id and URL of the Prefect run, for the record.

    Raises
    ------
    RunNotFound, StreamNotFound, BadRecipe, ProcessingBusy
    NotStored : the stream is in memory only.
    """
    recipe = load_recipe(request.recipe)
    run = open_run(request.run, service=request.service, root=request.root)
    stream = _wait_for_stream(run, request.data_source)
    stream.require_stored("processed")
    processing, claim = _claim_processing(run, stream, recipe, flow_run)
    try:
        work = _Work(run, stream, processing, recipe, request.n_threads, call, reporter or Silent())
        return work.carry_out()
    finally:
        os.close(claim)


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


def _claim_processing(
    run: Run, stream: Stream, recipe: Recipe, flow_run: tuple[str, str] | None
) -> tuple[Processing, int]:
    """The unfinished processing with this very recipe and code, or a new one, and the claim on it."""
    code = code_digest(recipe)
    for processing in find_processings(run.folder).values():
        manifest = processing.manifest
        same = (manifest.recipe_digest, manifest.code_digest, manifest.data_source) == (
            recipe.digest,
            code,
            stream.name,
        )
        if same and not processing.is_finished:
            return processing, processing.claim()
    number = 1 + max((int(n[1:]) for n in find_processings(run.folder) if n[1:].isdecimal()), default=0)
    while True:
        processing = Processing(run.folder, f"p{number}")
        try:
            manifest = _manifest(processing.name, stream, recipe, flow_run)
            processing = Processing.create(run.folder, manifest)
        except FileExistsError:
            number += 1
            continue
        return processing, processing.claim()


def _manifest(name: str, stream: Stream, recipe: Recipe, flow_run: tuple[str, str] | None) -> Manifest:
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
        call: Call,
        reporter: Reporter,
    ) -> None:
        self._run, self._stream, self._processing, self._recipe = run, stream, processing, recipe
        self._n_threads, self._call, self._reporter = n_threads, call, reporter
        self._header = stream.header.model_copy(update={"detector": recipe.detector_header(stream.header.detector)})
        user_mask = read_mask(Path(recipe.mask)) if recipe.mask else None
        self._mask = usable_mask(stream.pixel_mask, stream.header.shape, user_mask)
        self._totals = RunTotals()
        self._pictures: list[Path] = []
        self._derived: dict[str, DerivedStream] = {}

    def carry_out(self) -> dict[str, Any]:
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
            self._open_derived()
            for chunk in self._stream.chunks():
                self._do_chunk(chunk, exporter)
            files = exporter.close()
        except BaseException:
            exporter.discard()
            raise
        announced = self._stream.status.announced
        for derived in self._derived.values():
            derived.finish(announced)
        summary = self._summary(files, time.perf_counter() - started)
        self._processing.finish(summary)
        self._reporter.finished(summary)
        return summary

    def _do_chunk(self, chunk: Chunk, exporter: RunExporter) -> None:
        frames = list(chunk.frames())
        analyse = partial(
            process_chunk,
            self._recipe,
            chunk.commit,
            [frame.raw for frame in frames],
            self._header,
            self._mask,
            self._run.folder,
            n_threads=self._n_threads,
        )
        result = self._call("process", self._run.name, chunk.commit, analyse)
        self._publish(result)
        before = time.perf_counter()
        self._call("export", self._run.name, chunk.commit, partial(exporter.add_chunk, frames, result))
        result.manifest.seconds["export"] = time.perf_counter() - before
        self._totals.add(result.manifest)
        log.info(
            "chunk %d: %d frames, %d hits, %d indexed",
            chunk.commit.chunk,
            result.manifest.n_frames,
            result.manifest.n_hits,
            result.manifest.n_indexed,
        )
        self._draw(frames, result)
        self._processing.add_chunk(result.manifest)
        status = self._stream.status
        self._reporter.chunk_done(
            Progress(
                run=self._run.name,
                processing=self._processing.name,
                chunk=result.manifest,
                totals=self._totals,
                lag_frames=status.announced - chunk.stop,
                planned=self._stream.header.planned,
                pictures=tuple(self._pictures),
            )
        )

    # ---- derived streams ----------------------------------------------------------------------

    def _open_derived(self) -> None:
        """``<source>.results@<id>``, one row per frame, and ``<source>.binned@<id>`` where a step bins."""
        base = {
            "parent": self._stream.name,
            "processing": self._processing.name,
            "planned": self._header.planned,
            "series": None,
        }
        headers = {"results": {"kind": "table", "shape": (), "dtype": "", "codec": "raw", "detector": None}}
        for spec in self._recipe.steps:
            if spec.use == "bin":
                factor = STEPS["bin"].read_params(spec.params)
                headers["binned"] = self._binned_header(factor)
        for name, changes in headers.items():
            source = f"{self._stream.name}.{name}@{self._processing.name}"
            header = self._stream.header.model_copy(update=base | changes | {"data_source": source, "user_data": {}})
            try:
                self._derived[name] = open_derived(self._run, StreamHeader.model_validate(header.model_dump()))
            except (NearlineError, FileExistsError) as error:
                # A processing taken up again after its streams have ended: its tables are complete all the same.
                log.warning("not writing the stream %s: %s", source, error)

    def _binned_header(self, params: BinParams) -> dict[str, Any]:
        slow, fast = self._header.shape
        assert self._header.detector is not None
        return {
            "shape": (slow // params.factor, fast // params.factor),
            "dtype": "uint32",
            "codec": "bslz4",
            "detector": binned_header(self._header.detector, params.factor),
        }

    def _publish(self, result: ChunkResult) -> None:
        if "results" in self._derived:
            rows = [_plain(row) for row in result.frames.to_pylist()]
            self._derived["results"].send([(row.pop("frame_index"), None, row) for row in rows])
        binned = result.table("binned")
        if "binned" in self._derived and binned is not None:
            pairs = zip(binned["frame_index"].to_pylist(), binned["blob"].to_pylist(), strict=True)
            self._derived["binned"].send([(index, blob, {}) for index, blob in pairs])

    # ---- for people ---------------------------------------------------------------------------

    def _draw(self, frames: list[Frame], result: ChunkResult) -> None:
        """Pictures of the first few hits, indexed ones first."""
        table, peaks = result.frames, result.table("peaks")
        if len(self._pictures) >= _N_PICTURES or peaks is None or not result.manifest.n_hits:
            return
        rows = sorted(table.to_pylist(), key=lambda r: (not r.get("indexed"), not r["hit"], -r["n_peaks"]))
        by_index = {frame.frame_index: frame for frame in frames}
        reflections = result.table("reflections")
        for row in rows[: min(2, _N_PICTURES - len(self._pictures))]:
            if not row["hit"]:
                continue
            index = row["frame_index"]
            words = [f"{row['n_peaks']} peaks", "indexed" if row.get("indexed") else "not indexed"]
            path = self._processing.folder / "pictures" / f"frame-{index:06d}.png"
            draw_frame(
                path,
                by_index[index].data,
                self._mask,
                self._header,
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
            "files": {name: str(path) for name, path in files.items()},
            "pictures": [str(path) for path in self._pictures],
            "flow_run_url": self._processing.manifest.flow_run_url,
        }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it: not-a-number becomes nothing."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
