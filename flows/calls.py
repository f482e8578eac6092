"""Programmatic calls through deployments: what `nearline.process` and `nearline.reprocess` do with a worker."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.canary import compare_canary
from flows.deployed import find_deployment, processing_of, start_deployed, wait_for_flow_run
from flows.run_choice import choose_runs
from streaming.retrieval import open_run

__all__ = ["canary_deployed", "process_deployed", "reprocess_deployed"]


def process_deployed(
    run: str,
    recipe: dict[str, Any],
    options: dict[str, Any],
    *,
    deployment: str | None = None,
    wait: bool = True,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Have a worker process a run; the summary, or without waiting the flow run.

    Raises
    ------
    RunNotFound, DeploymentNotFound, ServiceUnavailable, FlowRunFailed
    """
    where = {name: options.get(name) for name in ("service", "root")}
    opened = open_run(run, **where)
    experiment = opened.header.experiment
    again, live = f"process-run/{experiment}-again", f"process-run/{experiment}"
    # What is under way must not wait behind old runs, nor the other way round.
    names = [deployment] if deployment else [again, live] if opened.state.is_terminal else [live, again]
    started = start_deployed(find_deployment(names), {"run": run, "recipe": recipe, **_given(options)})
    if not wait:
        return started.as_json()
    wait_for_flow_run(started, timeout=timeout)
    processing = processing_of(run, started.flow_run_id, **where)
    return (processing.summary or {}) | started.as_json()


def reprocess_deployed(
    runs: Sequence[str],
    recipe: dict[str, Any],
    options: dict[str, Any],
    *,
    deployment: str | None = None,
    wait: bool = True,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Have a worker process runs again; returns the flow run, once it has completed if that is waited for.

    Raises
    ------
    RunNotFound, BadQuery, DeploymentNotFound, ServiceUnavailable
    FlowRunFailed : it ended otherwise; its message names the runs that failed.
    """
    chosen = choose_runs(runs, options.get("where"), service=options.get("service"), root=options.get("root"))
    first = open_run(chosen.names[0], service=options.get("service"), root=options.get("root"))
    name = deployment or find_deployment([f"reprocess-runs/{first.header.experiment}"])
    started = start_deployed(name, {"runs": chosen.names, "recipe": recipe, **_given(options | {"where": None})})
    if wait:
        wait_for_flow_run(started, timeout=timeout)
    return started.as_json() | {"runs": chosen.names, "left_out": chosen.left_out}


def canary_deployed(
    run: str, recipe: dict[str, Any], options: dict[str, Any], *, timeout: float | None = None
) -> dict[str, Any]:
    """Have a worker try a recipe on the newest frames of a run; the canary's summary, and how it compares.

    Raises
    ------
    RunNotFound, DeploymentNotFound, ServiceUnavailable, FlowRunFailed
    """
    where = {name: options.get(name) for name in ("service", "root")}
    opened = open_run(run, **where)
    name = find_deployment([f"canary-run/{opened.header.experiment}"])
    started = start_deployed(name, {"run": run, "recipe": recipe, **_given(options)})
    wait_for_flow_run(started, timeout=timeout)
    canary = processing_of(run, started.flow_run_id, **where)
    found = compare_canary(opened, canary)
    return (canary.summary or {}) | {"comparison": found.as_json() if found else None} | started.as_json()


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Options that say something; the rest is the flow's, and the worker's, own default."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in options.items() if v is not None}
