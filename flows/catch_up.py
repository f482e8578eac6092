"""Runs that nobody analysed, found and started; flow runs whose process is gone, found and ended.

An automation starts a flow run for each new run. It does not where Prefect was away, where a worker was killed with a
run in its hands, or where the whole machine lost its power. `CatchUp.look` compares what there is on disk with what
the Prefect server believes, and mends both: the disk is right. A claim on the processing keeps two from doing one
work, so it does no harm to start a run that somebody else is about to start as well.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound

from flows.deploying import api_of, deployments_of, prefect_client
from flows.experiment import Experiment, recipe_for
from flows.flow_runs import ACTIVE, Deed, end_flow_run, flow_runs_of, run_of, why_dead, why_left
from flows.keeping import Keeper
from flows.telling import DecisionTeller
from storage.errors import BadRecipe, DeploymentNotFound, ServiceUnavailable
from storage.models import RunState
from storage.names import run_key
from storage.run_folder import RunFolder, find_runs
from storage.step_store import find_processings

__all__ = ["CatchUp"]

log = logging.getLogger("nearline.catch_up")

LOOK_S = 5.0
# The automation is faster, if all is well.
_PATIENCE_S = 15.0


class CatchUp:
    """Looks after the runs of one experiment."""

    def __init__(self, experiment: Experiment, api: str | None = None, *, patience_s: float = _PATIENCE_S) -> None:
        self._experiment, self._api = experiment, api or api_of(experiment)
        self._patience_s = patience_s
        self._done: set[str] = set()
        self._left: dict[str, str] = {}
        self._keeper = Keeper(experiment)
        self._teller = DecisionTeller(experiment, patience_s)

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
            active = flow_runs_of(client, list(deployments.values()), state=ACTIVE)
            deeds, alive = [], set()
            for flow_run in active:
                if (why := why_dead(client, flow_run, self._experiment.root)) is not None:
                    deeds.append(end_flow_run(client, flow_run, why))
                else:
                    alive.add(run_of(flow_run))
            for folder in self._missed(alive):
                deeds += self._start(client, deployments, folder)
            deeds += self._end_others(client, deployments)
            deeds += self._teller.tell(client)
            deeds += self._keeper.keep(client)
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
        before = flow_runs_of(client, list(deployments.values()), name=_flow_run_name(name))
        if (why := why_left(before)) is not None:
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
        for flow_run in flow_runs_of(client, others, state=ACTIVE) if others else ():
            if (why := why_dead(client, flow_run, self._experiment.root, has_claim=False)) is not None:
                yield end_flow_run(client, flow_run, why)


def _first_sealed(folder: RunFolder, data_source: str) -> datetime | None:
    paths = folder.stream(data_source)
    chunks = paths.commits()
    return paths.read_commit(chunks[0]).sealed_at if chunks else None


def _flow_run_name(run: str) -> str:
    """As `process_run` calls its flow runs."""
    return f"process {run}"


def _why_started(before: Sequence[FlowRun]) -> str:
    if not before:
        return "nobody has processed it"
    last = max(before, key=lambda flow_run: flow_run.expected_start_time or flow_run.created or datetime.now(UTC))
    return f"its flow run {last.id} ended as {last.state_name}, and the run is not processed"
