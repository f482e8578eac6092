"""The Prefect flow that processes a run: `run_processing` with a task per chunk and group of steps, and a page.

Prefect records; it decides nothing. The results are the same without it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from flows.execution import Execution, Executor, Promise, dask_cluster
from flows.experiment import RECIPE_PREFIX, load_experiment, resolve_recipe, stop_for
from flows.giving_way import give_way
from flows.parameters import (
    DataSources,
    RecipeParameter,
    Root,
    RunName,
    ServiceAddress,
    SourceRecipes,
    Threads,
    described,
)
from flows.process_sources import process_sources
from flows.run_page import RunPage
from flows.run_processing import ProcessRequest, run_processing
from flows.telling import tell_enough
from storage.errors import BadRecipe, ProcessingBusy
from storage.run_folder import ChunkCommit
from streaming.retrieval import open_run
from tasks.chunk_job import ChunkJob, StepGroup

__all__ = ["process_run"]

log = logging.getLogger("nearline.process")


class _Silence(logging.Filter):
    """Leaves out that a task has finished: its state says so, and a line of log costs the server as much."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or not record.getMessage().startswith("Finished in state")


logging.getLogger("prefect.task_runs").addFilter(_Silence())

T = TypeVar("T")

Where = Annotated[
    Execution | None,
    described("Execution", "Where chunks are analysed, and how many at once; by default here, one after the other"),
]
IfDone = Annotated[
    Literal["repeat", "skip"],
    described(
        "If done", "If this recipe and code have processed the run: repeat makes another processing, skip leaves it"
    ),
]


StopCriteria = Annotated[
    list[str] | None,
    described(
        "Stop criteria",
        "When it is enough, judged after each chunk; an event tells when one is met",
        examples=[["n_indexed >= 1000", "sample: completeness(2.0) > 0.98"]],
    ),
]


@flow(name="process-run", flow_run_name="process {run}", persist_result=False, validate_parameters=True)
def process_run(
    run: RunName,
    recipe: RecipeParameter,
    data_source: DataSources = None,
    service: ServiceAddress = None,
    root: Root = None,
    n_threads: Threads = None,
    execution: Where = None,
    if_done: IfDone = "repeat",
    recipes: SourceRecipes = None,
    stop: StopCriteria = None,
) -> Any:
    """Follow a run, live or finished, and analyse each chunk as it is sealed.

    Parameters
    ----------
    run : experiment/number such as lyso-2026/17, or the path of a run folder.
    recipe : the recipe's content, the path of its file, or ``experiment:`` and the path of an experiment file, which
        says what the run's sample is processed with.
    data_source : which detector; needed only if the run has several. A list of them, or ``all``: each is processed as
        for itself, side by side in this flow run.
    service : address of the streaming service; by default the one on this machine.
    root : data folder to look in when no service answers.
    n_threads : threads over the frames of a chunk; by default one per core.
    execution : where chunks are analysed, and how many at once; by default here, one after the other.
    if_done : if the run was processed with the same recipe and code already: repeat makes another processing, skip
        leaves it at that.
    recipes : of single data sources, by name, where they differ: content, path or ``experiment:`` as above.
    stop : stop criteria, judged after each chunk; when one is met an event nearline.run.enough is sent. By default
        those of the experiment file, where the recipe names one.

    Returns
    -------
    The summary of the processing; of several data sources a mapping of their names to their summaries, None for one
    that somebody else is at. If somebody else is at it already, the flow run completes as *Claimed elsewhere*,
    and there is no summary.
    """
    give_way()
    flow_run = (str(runtime.flow_run.id), str(runtime.flow_run.ui_url))

    def process(source: str | None) -> dict[str, Any]:
        request = ProcessRequest(
            run=run,
            recipe=_recipe_content((recipes or {}).get(source or "", recipe), run, service, root),
            data_source=source,
            service=service,
            root=root,
            n_threads=n_threads,
            execution=execution or Execution(),
            if_done=if_done,
            stop=tuple(_stop_of(recipe, run, service, root) if stop is None else stop),
        )
        return run_processing(
            request, reporter=RunPage(), open_executor=_task_executor, flow_run=flow_run, tell=tell_enough
        )

    try:
        if data_source == "all" or isinstance(data_source, list):
            return process_sources(open_run(run, service=service, root=root), data_source, process)
        return process(data_source)
    except ProcessingBusy as error:
        return Completed(name="Claimed elsewhere", message=str(error))


def _stop_of(recipe: str | dict[str, Any], run: str, service: str | None, root: str | None) -> tuple[str, ...]:
    """The stop criteria of a run by the experiment file that the recipe names; none without one."""
    if not isinstance(recipe, str) or not recipe.startswith(RECIPE_PREFIX):
        return ()
    header = open_run(run, service=service, root=root).header
    return stop_for(load_experiment(recipe.removeprefix(RECIPE_PREFIX)), header.run, header.sample)


def _recipe_content(recipe: str | dict[str, Any], run: str, service: str | None, root: str | None) -> dict[str, Any]:
    is_by_file = isinstance(recipe, str) and recipe.startswith(RECIPE_PREFIX)
    sample = open_run(run, service=service, root=root).header.sample if is_by_file else None
    return resolve_recipe(recipe, run, sample).model_dump(mode="json")


# ---- tasks ------------------------------------------------------------------------------------


def _task_run_name() -> str:
    given = {name: getattr(value, "value", value) for name, value in runtime.task_run.parameters.items()}
    commit = given["job"].commit
    return f"{given['group'].name} {given['run']} chunk {commit.chunk}: frames {commit.start} to {commit.stop - 1}"


# Step outputs are content-addressed already, and the state says whether they were there: a second cache could only
# disagree.
@task(name="steps", task_run_name=_task_run_name, cache_policy=NO_CACHE, persist_result=False, retries=1)
def _steps_task(run: str, job: ChunkJob, group: StepGroup, limit: str | None, before: Any) -> Any:
    """Carry out one group of steps on one chunk; ``before`` is what the groups before it took."""
    if job.is_done(group):
        seconds = dict.fromkeys(group.steps, 0.0)
        kept = ", ".join(f"{name} {digest[:12]}" for name, digest in job.digests(group).items())
        return Completed(name="Cached", message=f"kept from before: {kept}", data=(before or {}) | seconds)
    with concurrency(limit, occupy=1, strict=True) if limit else nullcontext():
        return (before or {}) | job.carry_out(group)


def _export_run_name() -> str:
    given = runtime.task_run.parameters
    return f"export {given['run']} chunk {given['chunk']}: frames {given['first']} to {given['last']}"


# An export appends to an open file: doing it twice would not be the same.
@task(name="export", task_run_name=_export_run_name, cache_policy=NO_CACHE, persist_result=False)
def _export_task(run: str, chunk: int, first: int, last: int, work: Callable[[], Any]) -> Any:
    return work()


class _TaskExecutor:
    """One task run per chunk and group of steps, where the runner puts them; without one, here."""

    def __init__(self, runner: TaskRunner[Any] | None, limit: str | None) -> None:
        self._runner, self._limit = runner, limit
        # The states or futures of each chunk's groups, until it is done.
        self._tasks: dict[int, dict[str, Any]] = {}

    def submit(self, job: ChunkJob) -> Promise:
        # Prefect finds what a task depends on by the identity of its parameters, which a chunk's may have inherited
        # from values that are gone: here, only what a group takes from the one before it is looked at. (Not on
        # a runner: Dask makes plain tuples of quotes.)
        fixed: dict[str, Any] = {"run": _run_name(job), "job": job, "limit": self._limit}
        keep: Callable[[Any], Any] = quote if self._runner is None else _as_it_is
        promise: Any = None
        for group in job.groups:
            given = {name: keep(value) for name, value in (fixed | {"group": group}).items()} | {"before": promise}
            if self._runner is None:
                promise = _steps_task(**given, return_state=True)
            else:
                promise = self._runner.submit(_steps_task, parameters=given)
            self._tasks.setdefault(job.commit.chunk, {})[group.name] = promise
        return promise if promise is not None else _Nothing()

    def task_runs(self, chunk: int) -> dict[str, str]:
        ids = {name: _task_run_id(promise) for name, promise in self._tasks.pop(chunk, {}).items()}
        _forget_results()
        return {name: task_run for name, task_run in ids.items() if task_run is not None}

    def export(self, run: str, commit: ChunkCommit, work: Callable[[], T]) -> T:
        done: Any = _export_task(run, commit.chunk, commit.start, commit.stop - 1, work)
        return cast(T, done)


def _forget_results() -> None:
    """Prefect keeps of every task its result and its assets, to find dependencies: in hours, hundreds of megabytes."""
    context = FlowRunContext.get()
    if context is not None:
        context.run_results.clear()
        context.task_run_assets.clear()


def _as_it_is(value: T) -> T:
    return value


def _task_run_id(promise: Any) -> str | None:
    """Of a future, or of the state that a task ended in."""
    found = getattr(promise, "task_run_id", None) or getattr(promise, "state_details", promise).task_run_id
    return str(found) if found is not None else None


class _Nothing:
    """What no group at all has taken."""

    def result(self) -> dict[str, float]:
        return {}


@contextmanager
def _task_executor(execution: Execution) -> Iterator[Executor]:
    """An executor whose jobs are Prefect tasks, on the task runner that the execution names."""
    if execution.limit is not None:
        _require_limit(execution.limit)
    if execution.kind == "inline":
        yield _TaskExecutor(None, execution.limit)
    elif execution.kind == "dask":
        try:
            from prefect_dask import DaskTaskRunner
        except ImportError as error:
            raise BadRecipe(f"execution on Dask needs prefect-dask ({error}); pip install prefect-dask") from None
        with dask_cluster(execution) as address, DaskTaskRunner(address=address) as runner:
            yield _TaskExecutor(runner, execution.limit)
    else:
        kind = ThreadPoolTaskRunner if execution.kind == "threads" else ProcessPoolTaskRunner
        pool: TaskRunner[Any] = kind(max_workers=execution.workers)
        with pool:
            yield _TaskExecutor(pool, execution.limit)


def _require_limit(name: str) -> None:
    """BadRecipe unless the server has that concurrency limit: each task would fail, one after the other."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            raise BadRecipe(
                f"the Prefect server has no concurrency limit {name!r} (execution.limit); make it with "
                f"`prefect gcl create {name} --limit 4`, or leave it out"
            ) from None


def _run_name(job: ChunkJob) -> str:
    folder = Path(job.folder)
    return f"{folder.parent.name}/{folder.name}"
