"""Runs that nobody analysed, found and started; flow runs whose process is gone, found and ended.

An automation starts a flow run for each new run. It does not where Prefect was away, where a worker was killed with a
run in its hands, or where the whole machine lost its power. `CatchUp.look` compares what there is on disk with what
the Prefect server believes, and mends both: the disk is right. A claim on the processing keeps two from doing one
work, so it does no harm to start a run that somebody else is about to start as well.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
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
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, State
from prefect.workers.process import ProcessWorker

from flows.decisions import Decision, decisions_of
from flows.deploying import api_of, deployments_of, prefect_client
from flows.experiment import Experiment, recipe_for
from flows.keeping import due_vetoes, let_go_of_runs
from flows.telling import event_id, tell_again
from storage.errors import BadRecipe, DeploymentNotFound, NearlineError, ServiceUnavailable
from storage.models import RunState
from storage.names import run_key
from storage.run_folder import RunFolder, find_runs
from storage.step_store import Processing, find_processings

__all__ = ["CatchUp", "Deed"]

log = logging.getLogger("nearline.catch_up")

LOOK_S = 5.0
# The automation is faster, if all is well.
_PATIENCE_S = 15.0
# So long a worker may take between taking a flow run and naming the process that carries it out.
_NAMELESS_S = 60.0
# So long a flow run may be under way without a claim on its processing: it waits for the run's stream.
_UNCLAIMED_S = 120.0
# A mistake of a recipe fails each time; a crash is somebody else's doing.
_MOST_FAILED, _MOST_CRASHED = 3, 10
_ACTIVE = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING, StateType.PAUSED]
_IN_HAND = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
_PAGE = 200
# So long the flow that made a decision may take to tell it; a server forgets events after days, and so do we.
_UNTOLD_S, _FORGOTTEN_S = 30.0, 86_400.0
# What may go is looked for so often.
_KEEP_S = 600.0


@dataclass(frozen=True)
class Deed:
    """What was done about one run; ``why`` in words."""

    run: str
    action: Literal["started", "ended", "left", "told", "deleted"]
    why: str
    flow_run_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class CatchUp:
    """Looks after the runs of one experiment."""

    def __init__(self, experiment: Experiment, api: str | None = None, *, patience_s: float = _PATIENCE_S) -> None:
        self._experiment, self._api = experiment, api or api_of(experiment)
        self._patience_s = patience_s
        self._done: set[str] = set()
        self._left: dict[str, str] = {}
        self._told: set[UUID] = set()
        self._next_keeping, self._kept = 0.0, set[str]()

    def follow(self, stop: threading.Event, *, every_s: float = LOOK_S) -> Iterator[Deed]:
        """Look again and again until told to stop; a server that is away is waited for."""
        is_away = False
        while not stop.is_set():
            try:
                yield from self.look()
                if is_away:
                    log.info("the Prefect server is back")
                is_away = False
            except (ServiceUnavailable, DeploymentNotFound) as error:
                if not is_away:
                    log.warning("%s; trying again", error)
                is_away = True
            stop.wait(every_s)

    def look(self) -> list[Deed]:
        """Compare disk and server once, and mend what differs.

        Raises
        ------
        ServiceUnavailable : the Prefect server does not answer.
        DeploymentNotFound : the experiment is not deployed there.
        """
        with prefect_client(self._api) as client:
            deployments = self._deployments(client)
            active = _flow_runs(client, list(deployments.values()), state=_ACTIVE)
            deeds, alive = [], set()
            for flow_run in active:
                if (why := self._why_dead(client, flow_run)) is not None:
                    deeds.append(_end(client, flow_run, why))
                else:
                    alive.add(_run_of(flow_run))
            for folder in self._missed(alive):
                deeds += self._start(client, deployments, folder)
            deeds += self._end_others(client, deployments)
            deeds += self._tell(client)
            if time.monotonic() >= self._next_keeping:
                self._next_keeping = time.monotonic() + _KEEP_S
                deeds += self._keep(client)
        return deeds

    # ---- runs on disk -----------------------------------------------------------------------------

    def _missed(self, alive: set[str]) -> list[RunFolder]:
        """Runs with stored chunks that nobody has analysed, nor is about to."""
        found = []
        for folder in find_runs(self._experiment.root, left_out=lambda why: None):
            name = run_key(folder.header.experiment, folder.header.run)
            if folder.header.experiment != self._experiment.experiment or name in self._done or name in alive:
                continue
            if self._is_done(folder):
                self._done.add(name)
            elif self._is_due(folder):
                found.append(folder)
        return found

    def _is_done(self, folder: RunFolder) -> bool:
        """Whether it has been analysed, with whatever recipe: to do it again is for people to decide."""
        if folder.state is RunState.deleted:
            return True
        whole = [p for p in find_processings(folder.path).values() if p.manifest.part is None]
        done = {p.manifest.data_source for p in whole if p.is_finished}
        return bool(done) and done.issuperset(self._sources(folder))

    def _is_due(self, folder: RunFolder) -> bool:
        first = min((t for s in self._sources(folder) if (t := _first_sealed(folder, s)) is not None), default=None)
        if first is None or datetime.now(UTC) - first < timedelta(seconds=self._patience_s):
            return False
        return not any(processing.is_claimed for processing in find_processings(folder.path).values())

    def _sources(self, folder: RunFolder) -> list[str]:
        stored = (s.name for s in self._experiment.data_sources if s.persistence == "stored")
        return [name for name in stored if name in folder.data_sources()]

    # ---- the server -------------------------------------------------------------------------------

    def _deployments(self, client: SyncPrefectClient) -> dict[str, UUID]:
        """Of `process-run`: ``live``, and ``again`` for runs that have ended."""
        name = self._experiment.experiment
        try:
            found = {
                role: client.read_deployment_by_name(f"process-run/{name}{suffix}").id
                for role, suffix in (("live", ""), ("again", "-again"))
            }
        except ObjectNotFound:
            raise DeploymentNotFound(
                f"{name} is not deployed at {self._api}; `nearline deploy {self._experiment.file or 'FILE'}` does it"
            ) from None
        return found

    def _start(self, client: SyncPrefectClient, deployments: dict[str, UUID], folder: RunFolder) -> Iterator[Deed]:
        name = run_key(folder.header.experiment, folder.header.run)
        before = _flow_runs(client, list(deployments.values()), name=_flow_run_name(name))
        if (why := _why_left(before)) is not None:
            if self._left.get(name) != why:
                self._left[name] = why
                yield Deed(name, "left", why)
            return
        role = "again" if folder.state.is_terminal else "live"
        try:
            digest = recipe_for(self._experiment, folder.header.run, folder.header.sample).digest
        except BadRecipe as error:
            yield Deed(name, "left", str(error))
            return
        flow_run = client.create_flow_run_from_deployment(
            deployments[role],
            name=_flow_run_name(name),
            parameters={"run": name, "if_done": "skip"},
            tags=["catch-up"],
            # Of two that look at once, one starts it.
            idempotency_key=f"catch-up/{name}/{digest}/{len(before)}",
        )
        yield Deed(name, "started", _why_started(before), str(flow_run.id))

    def _end_others(self, client: SyncPrefectClient, deployments: dict[str, UUID]) -> Iterator[Deed]:
        """Flow runs of the other deployments whose process is gone: each takes a place of its pool until it has ended.

        They are not begun again: who asked for a comparison or a merge sees that it crashed, and asks anew.
        """
        mine = {one.id for one in deployments_of(client, self._experiment.experiment)}
        others = sorted(mine - set(deployments.values()))
        for flow_run in _flow_runs(client, others, state=_ACTIVE) if others else ():
            if (why := self._why_dead(client, flow_run, has_claim=False)) is not None:
                yield _end(client, flow_run, why)

    def _why_dead(self, client: SyncPrefectClient, flow_run: FlowRun, *, has_claim: bool = True) -> str | None:
        """Why nobody can be at work on it, though the server believes so; None if somebody may be.

        has_claim : whether somebody who is at work holds a claim on a processing.
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
        return why if is_gone and not (has_claim and self._is_claimed(_run_of(flow_run))) else None

    def _is_claimed(self, name: str) -> bool:
        try:
            folder = RunFolder.open(self._experiment.root / name)
        except NearlineError:
            return False
        return any(processing.is_claimed for processing in find_processings(folder.path).values())

    # ---- what may go ------------------------------------------------------------------------------

    def _keep(self, client: SyncPrefectClient) -> Iterator[Deed]:
        """What the experiment's file says of how long data are kept; nothing goes where it says nothing."""
        gone = let_go_of_runs(self._experiment)
        for one in gone.deleted:
            yield Deed(one.run, "deleted", f"retention: {one.n_bytes / 1e9:.1f} GB in {one.n_files} files")
        for run, why in gone.refused.items():
            if self._left.get(run) != why:
                self._left[run] = why
                yield Deed(run, "left", why)
        wanted = [due for due in due_vetoes(self._experiment) if due.key not in self._kept]
        if not wanted:
            return
        deployment = client.read_deployment_by_name(f"retain-run/{self._experiment.experiment}")
        for due in wanted:
            flow_run = client.create_flow_run_from_deployment(
                deployment.id, parameters=due.parameters, tags=["catch-up"], idempotency_key=due.key
            )
            self._kept.add(due.key)
            yield Deed(due.run, "started", f"retain-run: {due.why}", str(flow_run.id))

    # ---- decisions --------------------------------------------------------------------------------

    def _tell(self, client: SyncPrefectClient) -> Iterator[Deed]:
        """Tell the server of decisions whose event was lost: it was away when they were made."""
        waiting = {event_id(decision): decision for decision in self._lately_decided()}
        new = [decision for known_as, decision in waiting.items() if known_as not in self._told]
        for decision in tell_again(client, new):
            yield Deed(decision.run, "told", f"the server did not know that it has enough: {decision.criterion}")
        self._told = set(waiting)

    def _lately_decided(self) -> Iterator[Decision]:
        now = datetime.now(UTC)
        for path in (self._experiment.root / self._experiment.experiment).glob("*/processed/*/decisions.jsonl"):
            if now.timestamp() - path.stat().st_mtime > _FORGOTTEN_S:
                continue
            processing = Processing(path.parents[2], path.parent.name)
            for decision in decisions_of(processing):
                if min(_UNTOLD_S, self._patience_s) <= (now - decision.at).total_seconds() < _FORGOTTEN_S:
                    yield decision


def _first_sealed(folder: RunFolder, data_source: str) -> datetime | None:
    paths = folder.stream(data_source)
    chunks = paths.commits()
    return paths.read_commit(chunks[0]).sealed_at if chunks else None


def _flow_runs(
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


def _flow_run_name(run: str) -> str:
    """As `process_run` calls its flow runs."""
    return f"process {run}"


def _run_of(flow_run: FlowRun) -> str:
    return str(flow_run.parameters.get("run") or flow_run.name)


def _end(client: SyncPrefectClient, flow_run: FlowRun, why: str) -> Deed:
    """Say in the server what has happened to a flow run."""
    was_cancelled = flow_run.state is not None and flow_run.state.type is StateType.CANCELLING
    ended = Cancelled if was_cancelled else Crashed
    state: State[Any] = ended(message=f"{why}; ended by nearline catch-up")
    client.set_flow_run_state(flow_run.id, state, force=True)
    return Deed(_run_of(flow_run), "ended", why, str(flow_run.id))


def _why_left(before: Sequence[FlowRun]) -> str | None:
    """Why a run is not started once more; None if it is."""
    types = [flow_run.state.type for flow_run in before if flow_run.state is not None]
    if StateType.CANCELLED in types:
        return "its flow run was cancelled; start it from the deployment if it should be processed after all"
    for kind, most in ((StateType.FAILED, _MOST_FAILED), (StateType.CRASHED, _MOST_CRASHED)):
        if (n_times := types.count(kind)) >= most:
            return f"its flow run has {kind.value.lower()} {n_times} times; see the log of the last one"
    return None


def _why_started(before: Sequence[FlowRun]) -> str:
    if not before:
        return "nobody has processed it"
    last = max(before, key=lambda flow_run: flow_run.expected_start_time or flow_run.created or datetime.now(UTC))
    return f"its flow run {last.id} ended as {last.state_name}, and the run is not processed"


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
