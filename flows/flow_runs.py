"""Flow runs as the Prefect server has them: which there are, whether anybody can be at work on them, and their end."""

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Cancelled, Crashed, State
from prefect.workers.process import ProcessWorker

from storage.errors import NearlineError
from storage.run_folder import RunFolder
from storage.step_store import find_processings

__all__ = ["ACTIVE", "Deed", "end_flow_run", "flow_runs_of", "is_active", "run_of", "why_dead", "why_left"]

ACTIVE = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING, StateType.PAUSED]
_IN_HAND = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
# So long a worker may take between taking a flow run and naming the process that carries it out.
_NAMELESS_S = 60.0
# So long a flow run may be under way without a claim on its processing: it waits for the run's stream.
_UNCLAIMED_S = 120.0
# A mistake of a recipe fails each time; a crash is somebody else's doing.
_MOST_FAILED, _MOST_CRASHED = 3, 10
_PAGE = 200


@dataclass(frozen=True)
class Deed:
    """What was done about one run; ``why`` in words."""

    run: str
    action: Literal["started", "ended", "left", "told", "deleted"]
    why: str
    flow_run_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def flow_runs_of(
    client: SyncPrefectClient,
    deployments: Sequence[UUID],
    *,
    state: list[StateType] | None = None,
    name: str | None = None,
) -> list[FlowRun]:
    """All flow runs of these deployments in those states, or of that name."""
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=list(deployments)),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=state)) if state else None,
        name=FlowRunFilterName(any_=[name]) if name else None,
    )
    found: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE, offset=len(found)):
        found += page
    return found


def run_of(flow_run: FlowRun) -> str:
    """The run that it was told of; else its own name."""
    return str(flow_run.parameters.get("run") or flow_run.name)


def is_active(flow_run: FlowRun) -> bool:
    """Whether it waits for a worker, or one is thought to be at it."""
    return flow_run.state is not None and flow_run.state.type in ACTIVE


def end_flow_run(client: SyncPrefectClient, flow_run: FlowRun, why: str) -> Deed:
    """Say in the server what has happened to a flow run."""
    was_cancelled = flow_run.state is not None and flow_run.state.type is StateType.CANCELLING
    ended = Cancelled if was_cancelled else Crashed
    state: State[Any] = ended(message=f"{why}; ended by nearline catch-up")
    client.set_flow_run_state(flow_run.id, state, force=True)
    return Deed(run_of(flow_run), "ended", why, str(flow_run.id))


def why_left(before: Sequence[FlowRun]) -> str | None:
    """Why a run is not started once more; None if it is."""
    types = [flow_run.state.type for flow_run in before if flow_run.state is not None]
    if StateType.CANCELLED in types:
        return "its flow run was cancelled; start it from the deployment if it should be processed after all"
    for kind, most in ((StateType.FAILED, _MOST_FAILED), (StateType.CRASHED, _MOST_CRASHED)):
        if (n_times := types.count(kind)) >= most:
            return f"its flow run has {kind.value.lower()} {n_times} times; see the log of the last one"
    return None


# ---- whether anybody is at work -------------------------------------------------------------------


def why_dead(client: SyncPrefectClient, flow_run: FlowRun, root: Path, *, has_claim: bool = True) -> str | None:
    """Why nobody can be at work on it, though the server believes so; None if somebody may be.

    Parameters
    ----------
    root : data folder with the claims of those at work.
    has_claim : whether somebody who is at work on such a flow run holds a claim on a processing.
    """
    state = flow_run.state
    if state is None or state.type not in _IN_HAND:
        return None
    age_s = (datetime.now(UTC) - state.timestamp).total_seconds()
    if not _is_of_process_pool(client, flow_run):
        if not has_claim:
            return None
        is_gone = state.type is StateType.RUNNING and age_s > _UNCLAIMED_S
        why = f"nobody has claimed the run for {age_s:.0f} s"
    elif (pid := flow_run.infrastructure_pid) is None:
        is_gone, why = age_s > _NAMELESS_S, f"no process was named in {age_s:.0f} s"
    elif _is_alive(pid, flow_run.id):
        return None
    else:
        # Prefect does not say on which machine a process is.
        is_gone = age_s > _UNCLAIMED_S or not _has_workers_elsewhere(client, flow_run)
        why = f"process {pid} is gone"
    return why if is_gone and not (has_claim and _is_claimed(root, run_of(flow_run))) else None


def _is_claimed(root: Path, name: str) -> bool:
    try:
        folder = RunFolder.open(root / name)
    except NearlineError:
        return False
    return any(processing.is_claimed for processing in find_processings(folder.path).values())


def _is_alive(pid: str, flow_run_id: UUID) -> bool:
    """Whether a process of this machine carries out that flow run; numbers of processes are used again."""
    try:
        environment = Path(f"/proc/{int(pid)}/environ").read_bytes().split(b"\0")
    except PermissionError:  # somebody else's
        return True
    except (OSError, ValueError):
        return False if Path("/proc/self").exists() else _exists(pid)
    return f"PREFECT__FLOW_RUN_ID={flow_run_id}".encode() in environment


def _exists(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _is_of_process_pool(client: SyncPrefectClient, flow_run: FlowRun) -> bool:
    pool = flow_run.work_pool_name
    return pool is not None and client.read_work_pool(pool).type == ProcessWorker.type


def _has_workers_elsewhere(client: SyncPrefectClient, flow_run: FlowRun) -> bool:
    """Whether a worker of that pool is online that may be on another machine; ours begin with the name of theirs."""
    assert flow_run.work_pool_name is not None
    workers = client.read_workers_for_work_pool(flow_run.work_pool_name)
    here = f"{socket.gethostname()}-"
    return any(worker.status == "ONLINE" and not worker.name.startswith(here) for worker in workers)
