"""Flows started through their deployments, for a worker to carry out; and what came of them.

Only this module speaks to the Prefect server from a program that is no flow.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_UI_URL

from storage.errors import DeploymentNotFound, FlowRunFailed, ServiceUnavailable
from storage.step_store import Processing, find_processings
from streaming.retrieval import open_run

__all__ = ["StartedFlow", "find_deployment", "processing_of", "start_deployed", "wait_for_flow_run"]

T = TypeVar("T")

_POLL_S = 1.0


@dataclass(frozen=True)
class StartedFlow:
    """A flow run that a worker carries out, or will."""

    flow_run_id: str
    flow_run_name: str
    flow_run_url: str | None
    deployment: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_deployment(names: Sequence[str]) -> str:
    """The first of these deployments, ``flow/deployment``, that there is.

    Raises
    ------
    DeploymentNotFound : there is none of them.
    ServiceUnavailable : no server is named, or it does not answer.
    """
    return _outside_event_loop(lambda: _find_deployment(names))


def start_deployed(
    deployment: str, parameters: dict[str, Any], *, name: str | None = None, tags: Sequence[str] = ()
) -> StartedFlow:
    """Start a deployed flow and return at once.

    Parameters
    ----------
    deployment : ``flow/deployment``, such as process-run/lyso-2026.
    parameters : of the flow; the server checks them against the flow's own.
    name : of the flow run.

    Raises
    ------
    DeploymentNotFound, ServiceUnavailable
    """
    in_flow = FlowRunContext.get() is not None

    def start() -> FlowRun:
        found = run_deployment(
            deployment, parameters=parameters, timeout=0, flow_run_name=name, tags=list(tags), as_subflow=in_flow
        )
        return cast(FlowRun, found)

    flow_run = _outside_event_loop(lambda: _ask(start, deployment))
    return StartedFlow(str(flow_run.id), flow_run.name, _url(flow_run.id), deployment)


def wait_for_flow_run(started: StartedFlow, *, timeout: float | None = None) -> None:
    """Return once a flow run has completed.

    Parameters
    ----------
    timeout : s; None to wait as long as it takes.

    Raises
    ------
    FlowRunFailed : it ended otherwise, or not in time.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    where = started.flow_run_url or started.flow_run_id
    while True:
        state = _outside_event_loop(lambda: _ask(lambda: _read(started.flow_run_id), started.deployment)).state
        if state is not None and state.is_completed():
            return
        if state is not None and state.is_final():
            raise FlowRunFailed(
                f"{started.deployment} ended as {state.name}: {state.message or 'no word why'}; {where}"
            )
        if deadline is not None and time.monotonic() > deadline:
            said = f"is {state.name}" if state else "has not begun"
            raise FlowRunFailed(
                f"{started.deployment} {said} after {timeout:g} s; {where}; does a worker serve its pool?"
            )
        time.sleep(_POLL_S)


def processing_of(run: str, flow_run_id: str, *, service: str | None, root: str | None) -> Processing:
    """The processing that a flow run has made.

    Raises
    ------
    FlowRunFailed : the run's folder has none of it.
    """
    folder = open_run(run, service=service, root=root).folder
    for processing in reversed(find_processings(folder).values()):
        if processing.manifest.flow_run_id == flow_run_id:
            return processing
    raise FlowRunFailed(f"flow run {flow_run_id} has left no processing in {folder}; does the worker see this folder?")


def _find_deployment(names: Sequence[str]) -> str:
    def look() -> str | None:
        with get_client(sync_client=True) as client:
            for name in names:
                try:
                    client.read_deployment_by_name(name)
                except ObjectNotFound:
                    continue
                return name
        return None

    found = _ask(look, names[0])
    if found is None:
        raise DeploymentNotFound(
            f"the Prefect server has no deployment {' or '.join(names)}; `nearline deploy` makes them"
        )
    return found


def _ask(function: Callable[[], T], deployment: str) -> T:
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        # Prefect would start a server of its own, for a flow run that no worker ever sees.
        raise ServiceUnavailable("no Prefect server is named; set PREFECT_API_URL, e.g. http://127.0.0.1:4200/api")
    try:
        return function()
    except ObjectNotFound:
        raise DeploymentNotFound(
            f"the Prefect server has no deployment {deployment}; `nearline deploy` makes those of an experiment"
        ) from None
    except (httpx.HTTPError, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise ServiceUnavailable(
            f"the Prefect server at {api} does not answer: {error}; start it, or correct PREFECT_API_URL"
        ) from None


def _read(flow_run_id: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(flow_run_id))


def _url(flow_run_id: UUID) -> str | None:
    base = PREFECT_UI_URL.value()
    return f"{str(base).rstrip('/')}/runs/flow-run/{flow_run_id}" if base else None


def _outside_event_loop(function: Callable[[], T]) -> T:
    """Call it where no event loop runs: in a notebook, Prefect would hand back a coroutine instead."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()
