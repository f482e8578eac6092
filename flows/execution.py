"""Where chunks are analysed: here, on threads, in processes, or on Dask; chosen by configuration alone.

An executor takes jobs and gives promises of them. What a job leaves behind is in the run's step store, so the results
are the same whoever carried it out.
"""

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, Protocol, Self, TypeVar

from pydantic import Field, model_validator

from storage.errors import BadRecipe
from storage.models import Model
from storage.run_folder import ChunkCommit
from tasks.chunk_job import ChunkJob

__all__ = ["Execution", "Executor", "Promise", "dask_cluster", "plain_executor"]

T = TypeVar("T")
Seconds = dict[str, float]


class Execution(Model):
    """Where the chunks of a run are analysed, and how many at a time."""

    kind: Literal["inline", "threads", "processes", "dask"] = Field(
        "inline",
        description="inline: one chunk after the other, its frames on all cores; threads or processes of this host: "
        "several chunks at once; dask: workers on any host that sees the data folder",
    )
    workers: int = Field(2, gt=0, le=10_000, description="chunks at a time; of dask, workers of a cluster made here")
    threads_per_worker: int | None = Field(
        None, gt=0, description="threads over the frames of one chunk; by default the cores of a host over its workers"
    )
    address: str | None = Field(None, description="dask: scheduler of a cluster that runs, such as tcp://host:8786")
    cluster: str | None = Field(
        None, description="dask: cluster to make, such as dask_jobqueue.SLURMCluster; by default workers on this host"
    )
    cluster_options: dict[str, Any] = Field(default_factory=dict, description="dask: keywords of that cluster")
    limit: str | None = Field(
        None, description="Prefect global concurrency limit that each task occupies, so that flows share it"
    )

    @model_validator(mode="after")
    def _dask_alone_has_a_cluster(self) -> Self:
        if self.kind != "dask" and (self.address or self.cluster or self.cluster_options):
            raise ValueError(f"address, cluster, cluster_options are for kind: dask, not {self.kind}; leave them out")
        if self.address and (self.cluster or self.cluster_options):
            raise ValueError("address is of a running scheduler; leave out cluster and cluster_options, or address")
        return self

    @property
    def n_ahead(self) -> int:
        """Chunks that may be under way before the first of them is taken."""
        return 1 if self.kind == "inline" else self.workers + 1

    @property
    def n_threads(self) -> int:
        """Threads over the frames of one chunk."""
        cores = os.cpu_count() or 1
        return self.threads_per_worker or (cores if self.kind == "inline" else max(1, cores // self.workers))


class Promise(Protocol):
    """A job under way; ``result`` waits, and gives the s that each step took."""

    def result(self) -> Any: ...


class Executor(Protocol):
    """Carries out jobs; the flow puts Prefect tasks here."""

    def submit(self, job: ChunkJob) -> Promise:
        """Have a chunk analysed; called in the order of chunks."""
        ...

    def export(self, run: str, commit: ChunkCommit, work: Callable[[], T]) -> T:
        """Append a chunk to the files, here and now."""
        ...

    def task_runs(self, chunk: int) -> dict[str, str]:
        """Ids of the Prefect task runs that worked on a chunk, by group of steps; asked once, when it is done."""
        ...


@contextmanager
def plain_executor(execution: Execution) -> Iterator[Executor]:
    """An executor without a server.

    Raises
    ------
    BadRecipe : a cluster that cannot be made, or a package that is not installed.
    """
    if execution.kind == "inline":
        yield _Inline()
    elif execution.kind == "threads":
        with ThreadPoolExecutor(execution.workers, thread_name_prefix="chunk") as threads:
            yield _Pool(threads.submit)
    elif execution.kind == "processes":
        # Spawned: a fork would copy locks that other threads hold.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(execution.workers, mp_context=context) as processes:
            yield _Pool(processes.submit)
    else:
        with dask_cluster(execution) as address:
            client_class = _from_dask("distributed", "Client")
            with client_class(address, set_as_default=False) as client:
                yield _Pool(lambda work: client.submit(work, pure=False))


@contextmanager
def dask_cluster(execution: Execution) -> Iterator[str]:
    """The scheduler's address: of the cluster named, or of one made here and ended afterwards."""
    if execution.address is not None:
        yield execution.address
        return
    module, _, name = (execution.cluster or "distributed.LocalCluster").rpartition(".")
    options = dict(execution.cluster_options)
    if execution.cluster is None:
        options = {
            "n_workers": execution.workers, "threads_per_worker": 1, "processes": True, "dashboard_address": None
        } | options  # fmt: skip
    cluster_class = _from_dask(module, name)
    with cluster_class(**options) as cluster:
        if execution.cluster is not None:
            cluster.scale(execution.workers)
        yield str(cluster.scheduler_address)


def _from_dask(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadRecipe(
            f"cannot use {module}.{name}: {error}; install it (pip install prefect-dask dask-jobqueue), or choose "
            "another execution: inline, threads or processes"
        ) from None


class _Done:
    def __init__(self, value: Seconds) -> None:
        self._value = value

    def result(self) -> Seconds:
        return self._value


class _Plain:
    def export(self, run: str, commit: ChunkCommit, work: Callable[[], T]) -> T:
        return work()

    def task_runs(self, chunk: int) -> dict[str, str]:
        return {}


class _Inline(_Plain):
    def submit(self, job: ChunkJob) -> Promise:
        return _Done(job.carry_out_all())


class _Pool(_Plain):
    def __init__(self, submit: "Callable[[Callable[[], Seconds]], Future[Seconds]]") -> None:
        self._submit = submit

    def submit(self, job: ChunkJob) -> Promise:
        return self._submit(job.carry_out_all)
