"""New parameters tried on the newest frames of a run, live or finished, and compared with the running processing.

A canary is a processing of its own, ``canary1`` …, of some sealed chunks only, marked so in its manifest. It writes
no files or streams and takes nothing from the live processing; what both compute alike is computed once.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.comparison import Comparison, compare_processings
from flows.progress import RunTotals
from flows.run_processing import new_manifest
from flows.run_tally import detector_values
from storage.errors import StreamNotFound
from storage.geometry_snapshot import GeometrySnapshot
from storage.promotion import default_processing
from storage.run_folder import ChunkCommit
from storage.step_store import Processing, find_processings
from streaming.retrieval import Chunk, Run, Stream
from tasks.chunk_job import ChunkJob
from tasks.recipe import Recipe

__all__ = ["compare_canary", "newest_chunks", "process_chunks", "try_recipe"]

_LOOK_AGAIN_S = 0.5


def try_recipe(
    run: Run,
    recipe: Recipe,
    minutes: float = 1.0,
    *,
    data_source: str | None = None,
    n_threads: int | None = None,
    flow_run: tuple[str, str] | None = None,
    wait: float = 30.0,
) -> tuple[dict[str, Any], Comparison | None]:
    """Process the newest sealed chunks with a recipe; the canary's summary, and how it compares.

    Parameters
    ----------
    minutes : of data, by the time at which the frames were taken; at least one chunk.
    n_threads : threads over the frames of a chunk; by default half the cores, at least one.
    wait : s in which the running processing may come as far; without it there is nothing to compare with.

    Returns
    -------
    The summary, and the comparison (A is the run's default or running processing), None if there is none.

    Raises
    ------
    StreamNotFound : no chunk of the run is sealed yet.
    """
    stream = run[data_source] if data_source else run.detector
    stream.require_stored("processed")
    chunks = newest_chunks(stream, minutes)
    threads = n_threads or max((os.cpu_count() or 2) // 2, 1)
    canary, summary = process_chunks(run, stream, recipe, chunks, n_threads=threads, flow_run=flow_run)
    found = compare_canary(run, canary, wait)
    return summary | {"comparison": found.as_json() if found else None}, found


def compare_canary(run: Run, canary: Processing, wait: float = 0.0) -> Comparison | None:
    """How a canary compares (B) with the run's running or default processing (A); None if there is none.

    wait : s in which that may come as far as the canary's frames.
    """
    numbers = [chunk.chunk for chunk in canary.chunks()]
    other = _beside(run, run[canary.manifest.data_source], numbers, wait)
    return compare_processings(other, canary) if other is not None else None


def newest_chunks(stream: Stream, minutes: float) -> list[Chunk]:
    """The newest sealed chunks that hold so many minutes of data, in order.

    Raises
    ------
    StreamNotFound : none is sealed yet.
    """
    found: list[Chunk] = []
    newest: float | None = None
    for commit in reversed(_commits(stream)):
        chunk = Chunk(stream, commit)
        taken = _taken_at(chunk)
        if taken is None:
            continue
        newest = taken[1] if newest is None else newest
        found.insert(0, chunk)
        if newest - taken[0] >= 60 * minutes:
            break
    if not found:
        raise StreamNotFound(f"{stream.run.name}/{stream.name} has no sealed chunk with frames yet; wait a few seconds")
    return found


def process_chunks(
    run: Run,
    stream: Stream,
    recipe: Recipe,
    chunks: Sequence[Chunk],
    *,
    n_threads: int = 1,
    flow_run: tuple[str, str] | None = None,
) -> tuple[Processing, dict[str, Any]]:
    """Carry out a recipe on some chunks as a canary; it and its summary."""
    started = time.perf_counter()
    geometries = _refined_of(run, stream, recipe)
    canary, claim = _create(run, stream, recipe, (chunks[0].start, chunks[-1].stop), flow_run)
    totals = RunTotals()
    try:
        for snapshot in geometries:
            canary.add_geometry(snapshot)
        for chunk in chunks:
            job = _job(run, stream, recipe, chunk.commit, n_threads, geometries)
            result = job.result(job.carry_out_all())
            canary.add_chunk(result.manifest)
            totals.add(result.manifest)
        summary = {
            "experiment": run.header.experiment,
            "run": run.header.run,
            "data_source": stream.name,
            "processing": canary.name,
            "recipe": recipe.name,
            "part": [chunks[0].start, chunks[-1].stop],
            "frames": totals.frames,
            "hits": totals.hits,
            "indexed": totals.indexed,
            "hit_rate": totals.hit_rate,
            "indexing_rate": totals.indexing_rate,
            "seconds": round(time.perf_counter() - started, 3),
            "seconds_by_stage": {name: round(seconds, 3) for name, seconds in totals.seconds.items()},
            "files": {},
            "pictures": [],
            "flow_run_url": flow_run[1] if flow_run else None,
        }
        canary.finish(summary)
    finally:
        os.close(claim)
    return canary, summary


def _refined_of(run: Run, stream: Stream, recipe: Recipe) -> list[GeometrySnapshot]:
    """The geometry snapshots of the newest processing of the stream that began with the same detector values.

    A canary is compared with the processing that runs: what that has found of the detector is no merit of a recipe.
    """
    for processing in reversed(list(run.processings.values())):
        manifest = processing.manifest
        is_its = manifest.part is None and manifest.data_source == stream.name
        if is_its and detector_values(processing, 0) == recipe.detector:
            return processing.geometries()
    return []


def _job(
    run: Run,
    stream: Stream,
    recipe: Recipe,
    commit: ChunkCommit,
    n_threads: int,
    geometries: Sequence[GeometrySnapshot],
) -> ChunkJob:
    """The recipe on one chunk, with the detector as it was known for it."""
    number = max((snapshot.number for snapshot in geometries if snapshot.from_chunk <= commit.chunk), default=0)
    detector = geometries[number - 1].detector if number else recipe.detector
    refined = recipe.model_copy(update={"detector": detector, "refine_detector": None})
    return ChunkJob(str(run.folder), stream.name, refined, commit, n_threads, number)


def _commits(stream: Stream) -> list[ChunkCommit]:
    """All sealed chunks so far."""
    found: list[ChunkCommit] = []
    while (commit := stream.source.wait_chunk(len(found), 0.0)) is not None:
        found.append(commit)
    return found


def _taken_at(chunk: Chunk) -> tuple[float, float] | None:
    """When the first and last frame of a chunk were taken, s from any origin; None if it has none.

    By the detector's frame time, else by when frames were received: not every source tells the time of each frame.
    """
    infos = list(chunk.stream.source.infos(chunk.start, chunk.stop))
    if not infos:
        return None
    detector = chunk.stream.header.detector
    if detector is not None and detector.frame_time > 0:
        times = [info.frame_index * detector.frame_time for info in infos]
    else:
        times = [info.received_ns / 1e9 for info in infos]
    return min(times), max(times)


def _create(
    run: Run, stream: Stream, recipe: Recipe, part: tuple[int, int], flow_run: tuple[str, str] | None
) -> tuple[Processing, int]:
    """A new canary and the claim on it."""
    number = 1
    while True:
        manifest = new_manifest(f"canary{number}", stream, recipe, flow_run, part=part)
        try:
            canary = Processing.create(run.folder, manifest)
        except FileExistsError:
            number += 1
            continue
        return canary, canary.claim(flow_run[0] if flow_run else None)


def _beside(run: Run, stream: Stream, numbers: Sequence[int], wait: float) -> Processing | None:
    """The processing to compare with, once it has done these chunks, or one in time; None if there is none."""
    deadline = time.monotonic() + wait
    while True:
        other = _running(run.folder, stream) or default_processing(run.folder, data_source=stream.name)
        if other is None or all(other.chunk(number) is not None for number in numbers):
            return other
        if other.is_finished or time.monotonic() > deadline:
            return other if any(other.chunk(number) is not None for number in numbers) else None
        time.sleep(_LOOK_AGAIN_S)


def _running(folder: Path, stream: Stream) -> Processing | None:
    """The newest processing of a live run that has not finished."""
    if not stream.is_live:
        return None
    for processing in reversed(find_processings(folder).values()):
        manifest = processing.manifest
        if manifest.part is None and manifest.data_source == stream.name and not processing.is_finished:
            return processing
    return None
