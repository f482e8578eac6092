"""Deployments of an experiment in a Prefect server: work pools, deployments, a variable, an automation.

`deploy` says what it did to each thing, and does nothing to a thing that is as it should be; so it
may be repeated after every change of the experiment file. Deployments are by dotted entrypoint: a
process worker imports the flows, from the installed packages or from the clone that was deployed.
"""

import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import VariableCreate, VariableUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from flows.experiment import RECIPE_PREFIX, Execution, Experiment, Pool, all_recipes, stop_for
from storage.errors import BadExperiment, ServiceUnavailable

__all__ = [
    "FLOWS",
    "RUN_STARTED",
    "Change",
    "DeployedFlow",
    "api_of",
    "automation_name",
    "default_api",
    "deploy",
    "deployments_of",
    "flow_run_counts",
    "prefect_client",
    "undeploy",
]

RUN_STARTED = "nearline.run.started"
_TAG = "nearline"
_COUNTED = (
    StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.COMPLETED, StateType.FAILED, StateType.CRASHED
)  # fmt: skip
_MARK = "made by nearline deploy"
_HOME = Path(__file__).resolve().parents[1]

Action = Literal["created", "updated", "unchanged", "removed", "kept", "left out"]


@dataclass(frozen=True, slots=True)
class DeployedFlow:
    """A flow as it is deployed for each experiment.

    pool : which of the experiment's three pools.
    suffix : of the deployment's name, which is the experiment's.
    takes_all : it processes several data sources in one flow run.
    """

    entrypoint: str
    pool: Literal["live", "reprocess", "export"]
    suffix: str = ""
    takes_all: bool = False


FLOWS = (
    DeployedFlow("flows.process_run.process_run", "live", takes_all=True),
    DeployedFlow("flows.process_run.process_run", "reprocess", "-again", takes_all=True),
    DeployedFlow("flows.reprocess_runs.reprocess_runs", "reprocess"),
    DeployedFlow("flows.canary_run.canary_run", "reprocess"),
    DeployedFlow("flows.merge_dataset.merge_dataset", "reprocess"),
    DeployedFlow("flows.retain_run.retain_run", "reprocess"),
    DeployedFlow("flows.export_nexus.export_nexus", "export"),
)


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to one thing in the Prefect server; ``detail`` names the fields that changed, or says why."""

    kind: Literal["work pool", "deployment", "variable", "automation"]
    name: str
    action: Action
    detail: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def api_of(experiment: Experiment) -> str:
    """Address of the Prefect API: the file's, else PREFECT_API_URL, else the server on this machine."""
    prefect = experiment.deployment.prefect
    return prefect.api or default_api(prefect.port)


def default_api(port: int = 4200) -> str:
    """PREFECT_API_URL, or the server on this machine."""
    return os.environ.get("PREFECT_API_URL") or f"http://127.0.0.1:{port}/api"


def deploy(experiment: Experiment, api: str | None = None) -> list[Change]:
    """Create or update all that the experiment needs in the Prefect server.

    Raises
    ------
    ServiceUnavailable : the server does not answer.
    BadRecipe, BadExperiment : a sample's recipe cannot be used, or a name is taken by another experiment.
    """
    parameters = flow_parameters(experiment)  # before anything is changed: it reads every recipe
    with prefect_client(api or api_of(experiment)) as client:
        pools = experiment.deployment.pools
        changes = [_put_pool(client, pool) for pool in (pools.live, pools.reprocess, pools.export)]
        for deployed in FLOWS:
            changes.append(_put_deployment(client, experiment, deployed, parameters))
        names = [change.name for change in changes if change.kind == "deployment" and change.action != "left out"]
        changes.append(_put_variable(client, experiment, names))
        changes.append(_put_automation(client, experiment))
    return changes


def undeploy(name: str, api: str) -> list[Change]:
    """Remove an experiment's automation, variable and deployments, and those pools of ours that nothing uses any more.

    Flow runs, their artifacts and everything in run folders stay.

    Raises
    ------
    ServiceUnavailable : the server does not answer.
    """
    with prefect_client(api) as client:
        changes = [_remove_automation(client, a) for a in client.read_automations_by_name(automation_name(name))]
        changes += _remove_variable(client, name)
        mine = deployments_of(client, name)
        for found in mine:
            client.delete_deployment(found.id)
            changes.append(Change("deployment", _full_name(client, found), "removed"))
        for pool in sorted({d.work_pool_name for d in mine if d.work_pool_name}):
            changes.append(_remove_pool(client, pool))
    return changes


# ---- what a flow is told ------------------------------------------------------------------------


def flow_parameters(experiment: Experiment) -> dict[str, Any]:
    """What deployed flows may be told, by parameter; each takes those that it has.

    The recipe is its content where all runs get the same one, and else the experiment file, in which a
    run's sample chooses.
    """
    deployment, sources = experiment.deployment, experiment.data_sources
    recipes = {recipe.model_dump_json(): recipe for recipe in all_recipes(experiment).values()}
    stops = {stop_for(experiment, sample=s.name) for s in experiment.samples} | {experiment.stop}
    is_one = len(recipes) == 1 and len(stops) == 1
    if not is_one and experiment.file is None:
        raise BadExperiment("samples differ in their recipes: read the experiment from a file (load_experiment)")
    values = {
        "experiment": experiment.experiment,
        "recipe": next(iter(recipes.values())).model_dump(mode="json")
        if is_one
        else f"{RECIPE_PREFIX}{experiment.file}",
        "data_source": sources[0].name if len(sources) == 1 else None,
        "service": deployment.service.address,
        "root": deployment.root,
        "n_threads": deployment.n_threads,
        "execution": _execution(deployment.execution),
        # By the experiment file the flow reads the run's own.
        "stop": list(next(iter(stops))) or None if is_one else None,
        "frames_per_file": experiment.exports.frames_per_file,
        "grace": experiment.retention.veto_non_hits,
    }
    return {name: value for name, value in values.items() if value is not None}


def _execution(execution: Execution | None) -> dict[str, Any] | None:
    return execution.model_dump(mode="json", exclude_defaults=True) | {"kind": execution.kind} if execution else None


def job_variables(experiment: Experiment) -> dict[str, Any]:
    """What a process worker starts a flow run with: its folder, and where our packages and users' steps are.

    From a clone, it runs in it; installed, wherever the worker does.
    """
    is_clone = (_HOME / "pyproject.toml").is_file()
    folders = [str(_HOME)] if is_clone else []
    folders += experiment.deployment.python_path
    environment = dict(experiment.deployment.environment)
    if folders:
        given = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(folders + ([given] if given else []))
    return {"env": environment} | ({"working_dir": str(_HOME)} if is_clone else {})


# ---- work pools ---------------------------------------------------------------------------------


def _put_pool(client: SyncPrefectClient, pool: Pool) -> Change:
    limit = pool.concurrency_limit
    try:
        found = client.read_work_pool(pool.name)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(
                name=pool.name,
                type=ProcessWorker.type,
                description=_MARK,
                base_job_template=ProcessWorker.get_default_base_job_template(),
                concurrency_limit=limit,
            )
        )
        return Change("work pool", pool.name, "created", f"{'no limit' if limit is None else limit} at a time")
    if found.type != ProcessWorker.type:
        raise BadExperiment(
            f"work pool {pool.name!r} is of type {found.type}, not {ProcessWorker.type}; "
            "name another under deployment.pools"
        )
    if found.concurrency_limit == limit:
        return Change("work pool", pool.name, "unchanged")
    client.update_work_pool(pool.name, WorkPoolUpdate(concurrency_limit=limit))
    return Change("work pool", pool.name, "updated", f"limit {found.concurrency_limit} → {limit}")


def _remove_pool(client: SyncPrefectClient, name: str) -> Change:
    others = client.read_deployments(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[name])), limit=1)
    if others:
        return Change("work pool", name, "kept", f"{others[0].name} uses it")
    if client.read_work_pool(name).description != _MARK:
        return Change("work pool", name, "kept", "not made by nearline deploy")
    client.delete_work_pool(name)
    return Change("work pool", name, "removed")


# ---- deployments --------------------------------------------------------------------------------


def load_flow(entrypoint: str) -> "Flow[..., Any] | None":
    """The flow that a dotted entrypoint names; None where there is no such module."""
    module, _, name = entrypoint.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def _put_deployment(
    client: SyncPrefectClient, experiment: Experiment, deployed: DeployedFlow, parameters: Mapping[str, Any]
) -> Change:
    name = f"{experiment.experiment}{deployed.suffix}"
    flow = load_flow(deployed.entrypoint)
    if flow is None:
        return Change("deployment", f"{deployed.entrypoint}/{name}", "left out", "no such flow is installed here")
    schema = flow.parameters
    if deployed.takes_all and len(experiment.data_sources) > 1:
        parameters = {"data_source": "all", **parameters}
    values: dict[str, Any] = {
        "description": _first_paragraph(flow),
        "parameters": {k: v for k, v in parameters.items() if k in schema.properties},
        "tags": [_TAG, f"experiment:{experiment.experiment}", f"beamline:{experiment.beamline}"],
        "work_pool_name": getattr(experiment.deployment.pools, deployed.pool).name,
        "entrypoint": deployed.entrypoint,
        "job_variables": job_variables(experiment),
        "parameter_openapi_schema": schema.model_dump_for_openapi(),
    }
    full_name = f"{flow.name}/{name}"
    try:
        found = client.read_deployment_by_name(full_name)
    except ObjectNotFound:
        action: Action = "created"
        changed: list[str] = []
    else:
        changed = [key for key, value in values.items() if _comparable(getattr(found, key)) != _comparable(value)]
        if not changed:
            return Change("deployment", full_name, "unchanged")
        action = "updated"
    client.create_deployment(client.create_flow(flow), name, enforce_parameter_schema=True, **values)
    return Change("deployment", full_name, action, ", ".join(changed))


def _comparable(value: Any) -> str:
    """The same text for what a server would keep as the same."""
    return json.dumps(sorted(value) if isinstance(value, list) else value, sort_keys=True, default=str)


def _first_paragraph(flow: "Flow[..., Any]") -> str:
    return " ".join((flow.description or "").split("\n\n")[0].split())


def deployments_of(client: SyncPrefectClient, experiment: str) -> list[DeploymentResponse]:
    mine = DeploymentFilter(tags=DeploymentFilterTags(all_=[_TAG, f"experiment:{experiment}"]))
    return client.read_deployments(deployment_filter=mine)


def _full_name(client: SyncPrefectClient, found: DeploymentResponse) -> str:
    return f"{client.read_flow(found.flow_id).name}/{found.name}"


# ---- the variable -------------------------------------------------------------------------------


def variable_name(experiment: str) -> str:
    """The Prefect variable of an experiment; Prefect allows a-z, 0-9 and _ there."""
    return "nearline_" + re.sub(r"[^a-z0-9]+", "_", experiment.lower())


def _put_variable(client: SyncPrefectClient, experiment: Experiment, deployments: list[str]) -> Change:
    name, value = variable_name(experiment.experiment), _summary(experiment, deployments)
    found = client.read_variable_by_name(name)
    if found is None:
        client.create_variable(VariableCreate(name=name, value=value, tags=[_TAG]))
        return Change("variable", name, "created")
    before: Any = found.value
    owner = before.get("experiment") if isinstance(before, dict) else before
    if owner != experiment.experiment:
        raise BadExperiment(
            f"the Prefect variable {name} belongs to {owner!r}, not to {experiment.experiment!r}; "
            "rename the experiment, or remove that variable"
        )
    if before == value:
        return Change("variable", name, "unchanged")
    client.update_variable(VariableUpdate(name=name, value=value))
    return Change("variable", name, "updated", ", ".join(k for k in value if value[k] != before.get(k)))


def _summary(experiment: Experiment, deployments: list[str]) -> dict[str, Any]:
    """What other programs may want to know of a deployed experiment."""
    place = experiment.deployment
    return {
        "experiment": experiment.experiment,
        "beamline": experiment.beamline,
        "title": experiment.title,
        "contact": experiment.contact,
        "file": str(experiment.file) if experiment.file else None,
        "root": place.root,
        "service": place.service.address,
        "data_sources": [source.name for source in experiment.data_sources],
        "samples": [sample.name for sample in experiment.samples],
        "recipes": {name or "": recipe.digest for name, recipe in all_recipes(experiment).items()},
        "stop": list(experiment.stop),
        "deployments": deployments,
    }


def _remove_variable(client: SyncPrefectClient, experiment: str) -> list[Change]:
    name = variable_name(experiment)
    found = client.read_variable_by_name(name)
    if found is None or not isinstance(found.value, dict) or found.value.get("experiment") != experiment:
        return []
    client.delete_variable_by_name(name)
    return [Change("variable", name, "removed")]


# ---- the automation -----------------------------------------------------------------------------


def automation_name(experiment: str) -> str:
    """Of the automation that starts `process-run` for each new run."""
    return f"nearline {experiment}: process each run"


def _put_automation(client: SyncPrefectClient, experiment: Experiment) -> Change:
    wanted = _automation(client, experiment.experiment)
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return Change("automation", wanted.name, "created")
    first, *others = found
    for other in others:  # two would start each run twice
        client.delete_automation(other.id)
    before = AutomationCore.model_validate(first.model_dump())
    changed = [key for key in ("description", "trigger", "actions") if _kept(before, key) != _kept(wanted, key)]
    if not changed:
        return Change("automation", wanted.name, "updated" if others else "unchanged")
    # Whether somebody has paused it is theirs to decide.
    client.update_automation(first.id, wanted.model_copy(update={"enabled": first.enabled}))
    return Change("automation", wanted.name, "updated", ", ".join(changed))


def _automation(client: SyncPrefectClient, experiment: str) -> AutomationCore:
    deployment = client.read_deployment_by_name(f"process-run/{experiment}")
    return AutomationCore(
        name=automation_name(experiment),
        description=f"Starts process-run/{experiment} when the service begins a run of {experiment}.",
        tags=[_TAG],
        trigger=EventTrigger(
            expect={RUN_STARTED},
            # The name as well: lyso.2 has ids that begin like those of lyso.
            match={
                "prefect.resource.id": f"nearline.run.{experiment}.*",
                "prefect.resource.name": f"{experiment}/*",
            },
            posture=Posture.Reactive,
            threshold=1,
            within=0,
        ),
        actions=[
            RunDeployment(
                source="selected",
                deployment_id=deployment.id,
                parameters={
                    "run": {"__prefect_kind": "jinja", "template": "{{ event.payload.name }}"},
                    # An event may be told twice, and somebody may have been faster.
                    "if_done": "skip",
                },
            )
        ],
    )


def _kept(automation: AutomationCore, key: str) -> str:
    """A part of an automation, without the ids that the server gives and what it fills in."""
    content = automation.model_dump(mode="json", exclude_none=True)[key]
    if key == "trigger":
        content = {k: content[k] for k in ("type", "expect", "match", "posture", "threshold", "within")}
    return json.dumps(content, sort_keys=True)


def _remove_automation(client: SyncPrefectClient, found: Any) -> Change:
    client.delete_automation(found.id)
    return Change("automation", found.name, "removed")


# ---- flow runs ----------------------------------------------------------------------------------


def flow_run_counts(experiment: str, api: str) -> dict[str, int]:
    """How many flow runs of an experiment there are by state, such as ``{"Running": 1, "Completed": 12}``.

    Raises
    ------
    ServiceUnavailable : the server does not answer.
    """
    mine = {"tags": {"all_": [_TAG, f"experiment:{experiment}"]}}
    found = {}
    with prefect_client(api) as client:
        for kind in _COUNTED:
            query = {"flow_runs": {"state": {"type": {"any_": [kind.value]}}}, "deployments": mine}
            answer = client.request("POST", "/flow_runs/count", json=query)
            if n_runs := answer.json():
                found[kind.value.capitalize()] = int(n_runs)
    return found


# ---- the server ---------------------------------------------------------------------------------


@contextmanager
def prefect_client(api: str) -> Iterator[SyncPrefectClient]:
    """A client of the server at that address, whatever the environment says.

    Raises
    ------
    ServiceUnavailable : the server does not answer, or refuses.
    """
    with temporary_settings({PREFECT_API_URL: api}):
        try:
            with get_client(sync_client=True) as client:
                yield client
        except (httpx.TransportError, ConnectionError) as error:
            raise ServiceUnavailable(
                f"the Prefect server at {api} does not answer ({error}); start it, or correct deployment.prefect.api"
            ) from error
        except (httpx.HTTPStatusError, PrefectException) as error:
            raise ServiceUnavailable(f"the Prefect server at {api} refused: {error}; see its log") from error
