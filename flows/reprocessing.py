"""Many runs processed again with one recipe, each kept beside its older processings.

Only what the new recipe changes is computed: a step whose input, parameters and code are the same finds its
output in the run's ``steps/``. `reprocess` is the plain function; `flows.reprocess_runs` makes a flow of it.
"""

import contextvars
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from flows.progress import Reporter
from flows.run_choice import ChosenRuns, choose_runs
from flows.run_processing import ProcessRequest, run_processing
from storage.errors import NearlineError
from storage.step_store import ChunkManifest, Processing, find_processings
from streaming.retrieval import open_run
from tasks.process_chunk import code_digest
from tasks.recipe import Recipe

__all__ = [
    "BulkReporter",
    "Place",
    "RunOutcome",
    "StepCounts",
    "bulk_summary",
    "count_steps",
    "process_here",
    "reprocess",
    "reprocess_here",
]

log = logging.getLogger("nearline.process")

# Processes one run with the recipe and gives the summary of its processing.
ProcessOne = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where runs are looked for, and which of their data sources is meant."""

    service: str | None = None
    root: str | None = None
    data_source: str | None = None


@dataclass
class StepCounts:
    """Chunks for which a step's output was there already, and for which it was computed."""

    reused: int = 0
    computed: int = 0


@dataclass(frozen=True)
class RunOutcome:
    """What became of one run."""

    run: str
    state: Literal["done", "there already", "failed"]
    processing: str | None = None
    frames: int = 0
    hits: int = 0
    indexed: int = 0
    hit_rate: float = 0.0
    indexing_rate: float = 0.0
    steps: dict[str, StepCounts] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


class BulkReporter(Protocol):
    """Told how a bulk reprocessing goes."""

    def began(self, run: str) -> None:
        """A run is being worked on; called in the thread that does it."""

    def ended(self, outcome: RunOutcome, n_done: int, n_runs: int) -> None:
        """A run is done, or has failed."""


class _Silent:
    def began(self, run: str) -> None:
        pass

    def ended(self, outcome: RunOutcome, n_done: int, n_runs: int) -> None:
        pass


def reprocess(
    chosen: ChosenRuns,
    recipe: Recipe,
    process_one: ProcessOne,
    *,
    place: Place | None = None,
    parallel: int = 1,
    again: bool = False,
    reporter: BulkReporter | None = None,
) -> dict[str, Any]:
    """Process runs one after the other or a few at a time; what became of each.

    Old processings stay as they are. A run that fails is named in the summary and stops no other. A run that has
    a finished processing with this very recipe and code is left as it is, so that a bulk reprocessing that was
    broken off goes on where it was.

    Parameters
    ----------
    process_one : processes one run by name, such as `process_here`; the flow puts a subflow here.
    parallel : so many runs at a time.
    again : process also what is there already.

    Returns
    -------
    See `bulk_summary`.
    """
    place, reporter, started = place or Place(), reporter or _Silent(), time.perf_counter()
    outcomes: dict[str, RunOutcome] = {}
    with ThreadPoolExecutor(parallel, thread_name_prefix="reprocess") as pool:
        # Each in a copy of our context: in a flow, that is what makes its flow runs ours.
        work = [
            pool.submit(contextvars.copy_context().run, _one, name, recipe, process_one, place, again, reporter)
            for name in chosen.names
        ]
        for future in _until_interrupted(work):
            outcome = future.result()
            outcomes[outcome.run] = outcome
            reporter.ended(outcome, len(outcomes), len(work))
    in_order = [outcomes[name] for name in chosen.names]
    return bulk_summary(recipe, in_order, chosen.left_out, time.perf_counter() - started)


def process_here(recipe: Recipe, place: Place, *, n_threads: int | None = None, reporter: Any = None) -> ProcessOne:
    """A function that processes a run in this process, with no server.

    Parameters
    ----------
    n_threads : threads over the frames of a chunk; by default one per core.
    reporter : makes a `flows.progress.Reporter` for a run's name.
    """
    threads = n_threads or os.cpu_count() or 1

    def process_one(run: str) -> dict[str, Any]:
        request = ProcessRequest(
            run=run,
            recipe=recipe.model_dump(mode="json"),
            data_source=place.data_source,
            service=place.service,
            root=place.root,
            n_threads=threads,
        )
        told: Reporter | None = reporter(run) if reporter else None
        return run_processing(request, reporter=told)

    return process_one


def reprocess_here(
    runs: Sequence[str],
    recipe: Recipe,
    *,
    where: str | None = None,
    parallel: int = 1,
    again: bool = False,
    data_source: str | None = None,
    service: str | None = None,
    root: str | None = None,
    n_threads: int | None = None,
    reporter: BulkReporter | None = None,
) -> dict[str, Any]:
    """Choose runs and process them again in this process, with no server; see `reprocess`.

    Raises
    ------
    RunNotFound, BadName, BadQuery : no run is meant.
    """
    chosen = choose_runs(runs, where, service=service, root=root)
    place = Place(service, root, data_source)
    threads = n_threads or max((os.cpu_count() or 1) // parallel, 1)
    process_one = process_here(recipe, place, n_threads=threads)
    return reprocess(chosen, recipe, process_one, place=place, parallel=parallel, again=again, reporter=reporter)


def count_steps(chunks: Iterator[ChunkManifest] | list[ChunkManifest]) -> dict[str, StepCounts]:
    """For each step of a processing, in how many chunks it was reused and computed."""
    counts: dict[str, StepCounts] = {}
    for chunk in chunks:
        for step in chunk.steps:
            mine = counts.setdefault(step, StepCounts())
            if chunk.seconds.get(step, 0.0) == 0.0:
                mine.reused += 1
            else:
                mine.computed += 1
    return counts


def bulk_summary(
    recipe: Recipe, outcomes: list[RunOutcome], left_out: dict[str, str], seconds: float
) -> dict[str, Any]:
    """The end of a bulk reprocessing as JSON can hold it; ``failed`` names each failing run and why."""
    return {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "n_runs": len(outcomes),
        "n_done": sum(one.state == "done" for one in outcomes),
        "n_there_already": sum(one.state == "there already" for one in outcomes),
        "n_failed": sum(one.state == "failed" for one in outcomes),
        "failed": {one.run: one.error for one in outcomes if one.state == "failed"},
        "left_out": left_out,
        "runs": [asdict(one) for one in outcomes],
        "seconds": round(seconds, 3),
    }


def _one(
    run: str, recipe: Recipe, process_one: ProcessOne, place: Place, again: bool, reporter: BulkReporter
) -> RunOutcome:
    started = time.perf_counter()
    try:
        reporter.began(run)
        there = None if again else _there_already(run, recipe, place)
        if there is not None:
            return _outcome(run, "there already", there, there.summary or {}, 0.0)
        summary = process_one(run)
        processing = Processing(open_run(run, service=place.service, root=place.root).folder, summary["processing"])
        return _outcome(run, "done", processing, summary, time.perf_counter() - started)
    except Exception as error:  # whatever it is: it is told, and the other runs go on
        log.warning("run %s failed: %s", run, error)
        words = str(error) if isinstance(error, NearlineError) else f"{type(error).__name__}: {error}"
        return RunOutcome(run, "failed", seconds=round(time.perf_counter() - started, 3), error=words)


def _there_already(run: str, recipe: Recipe, place: Place) -> Processing | None:
    """A finished processing of this run with this very recipe and code."""
    opened = open_run(run, service=place.service, root=place.root)
    code = code_digest(recipe)
    for processing in reversed(find_processings(opened.folder).values()):
        manifest = processing.manifest
        is_same = (manifest.recipe_digest, manifest.code_digest) == (recipe.digest, code)
        is_source = place.data_source in (None, manifest.data_source)
        if is_same and is_source and manifest.part is None and processing.is_finished:
            return processing
    return None


def _outcome(
    run: str, state: Literal["done", "there already"], processing: Processing, summary: dict[str, Any], seconds: float
) -> RunOutcome:
    counted = ("frames", "hits", "indexed", "hit_rate", "indexing_rate")
    values = {name: summary[name] for name in counted if name in summary}
    steps = count_steps(processing.chunks())
    if state == "there already":
        steps = {name: StepCounts(reused=one.reused + one.computed) for name, one in steps.items()}
    return RunOutcome(run, state, processing.name, steps=steps, seconds=round(seconds, 3), **values)


def _until_interrupted(work: list[Future[RunOutcome]]) -> Iterator[Future[RunOutcome]]:
    try:
        yield from as_completed(work)
    except BaseException:
        for future in work:
            future.cancel()
        raise
