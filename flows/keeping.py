"""What an experiment's file says of how long data are kept, put into effect by whoever looks after its runs."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prefect.client.orchestration import SyncPrefectClient

from flows.experiment import Experiment, retention_policy
from flows.flow_runs import Deed, flow_runs_of, is_active, why_left
from flows.run_tally import chosen_processing
from storage.catalog import note_runs
from storage.models import RunState
from storage.names import run_key
from storage.retention import Retained, apply_policy, parse_age
from storage.run_folder import RunFolder, find_runs
from storage.veto import find_veto, veto_stages

__all__ = ["DueVeto", "Keeper", "due_vetoes", "let_go_of_runs"]

log = logging.getLogger("nearline.catch_up")

# What may go is looked for so often.
_KEEP_S = 600.0


@dataclass(frozen=True)
class DueVeto:
    """A run of which the flow `retain-run` has something to do: mark the frames that may go, or let them go.

    key : the same as long as the same is to be done.
    """

    run: str
    parameters: dict[str, Any]
    key: str
    why: str


class Keeper:
    """Carries out the ``retention`` of one experiment: deletes runs itself, and has `retain-run` veto frames."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._next = 0.0
        # Of each run what was said last.
        self._left: dict[str, str] = {}

    def keep(self, client: SyncPrefectClient) -> Iterator[Deed]:
        """What may go, goes, if it was not looked for lately."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _KEEP_S
        gone = let_go_of_runs(self._experiment)
        for one in gone.deleted:
            yield Deed(one.run, "deleted", f"retention: {one.n_bytes / 1e9:.1f} GB in {one.n_files} files")
        for run, why in gone.refused.items():
            yield from self._leave(run, why)
        for due in due_vetoes(self._experiment):
            yield from self._ask(client, due)

    def _ask(self, client: SyncPrefectClient, due: DueVeto) -> Iterator[Deed]:
        """Have a worker take the next step of a veto; again if it has failed, but not for ever."""
        deployment = client.read_deployment_by_name(f"retain-run/{self._experiment.experiment}")
        named = flow_runs_of(client, [deployment.id], name=f"retain {due.run}")
        before = [one for one in named if (one.idempotency_key or "").startswith(f"{due.key}/")]
        if any(is_active(one) for one in before):
            return
        if (why := why_left(before)) is not None:
            yield from self._leave(due.run, f"retain-run: {why}")
        elif any(one.state is not None and one.state.is_completed() for one in before):
            yield from self._leave(due.run, "retain-run has completed, and left it as it was: see what it returned")
        else:
            flow_run = client.create_flow_run_from_deployment(
                deployment.id,
                name=f"retain {due.run}",
                parameters=due.parameters,
                tags=["catch-up"],
                idempotency_key=f"{due.key}/{len(before)}",
            )
            yield Deed(due.run, "started", f"retain-run: {due.why}", str(flow_run.id))

    def _leave(self, run: str, why: str) -> Iterator[Deed]:
        if self._left.get(run) != why:
            self._left[run] = why
            yield Deed(run, "left", why)


def let_go_of_runs(experiment: Experiment) -> Retained:
    """Delete the runs that ``retention.older_than`` lets go; none where the file does not say so."""
    policy = retention_policy(experiment)
    if policy is None or not experiment.root.is_dir():
        return Retained()
    done = apply_policy(experiment.root, policy, datetime.now(UTC), f"retention of {experiment.experiment}")
    folders = [RunFolder.open(experiment.root / one.run) for one in done.deleted]
    if (why := note_runs(experiment.root, folders, experiment.deployment.service.catalog_url)) is not None:
        log.warning("%s", why)
    return done


def due_vetoes(experiment: Experiment) -> Iterator[DueVeto]:
    """Runs whose non-hits ``retention.veto_non_hits`` lets go, as far as there is a step to take now.

    A run is marked once it has ended and been analysed, carried out when its grace time is over, and left alone where
    somebody has undone it, or has vetoed frames by hand.
    """
    grace = experiment.retention.veto_non_hits
    if grace is None:
        return
    for folder in find_runs(experiment.root, left_out=lambda why: None):
        if folder.header.experiment != experiment.experiment or not folder.state.is_terminal:
            continue
        if folder.state is not RunState.deleted and (found := _next_of(folder, grace)) is not None:
            yield found


def _next_of(folder: RunFolder, grace: str) -> DueVeto | None:
    name, stages = run_key(folder.header.experiment, folder.header.run), veto_stages(folder)
    if not stages:
        processing = chosen_processing(folder.path)
        ended = [event.at for event in folder.events("run_finished")]
        is_ready = processing is not None and processing.is_finished and "hit" in processing.frames.column_names
        if not is_ready or not ended or processing is None:
            return None
        left = parse_age(grace) - (datetime.now(UTC) - ended[-1])
        # The grace time is the run's: what is left of it can still be undone, and an hour at least.
        minutes = max(left.total_seconds() / 60, 60.0)
        parameters = {"run": name, "processing": processing.name, "grace": f"{minutes:.0f}min"}
        return DueVeto(name, parameters, f"retain/{name}/{processing.name}", f"marked by {processing.name}: not a hit")
    veto = find_veto(folder)
    if veto is None or datetime.now(UTC) < veto[0].due_at:
        return None
    return DueVeto(name, {"run": name}, f"retain/{name}/{veto[0].due_at.isoformat()}", "its grace time is over")
