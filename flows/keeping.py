"""What an experiment's file says of how long data are kept, put into effect by whoever looks after its runs."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from flows.experiment import Experiment, retention_policy
from flows.run_tally import chosen_processing
from storage.catalog import Catalog, default_url
from storage.errors import NearlineError
from storage.models import RunState
from storage.names import run_key
from storage.retention import Retained, apply_policy, parse_age
from storage.run_folder import RunFolder, find_runs
from storage.veto import find_veto, veto_stages

__all__ = ["DueVeto", "due_vetoes", "let_go_of_runs"]

log = logging.getLogger("nearline.catch_up")


@dataclass(frozen=True)
class DueVeto:
    """A run of which the flow `retain-run` has something to do: mark the frames that may go, or let them go.

    key : the same as long as the same is to be done.
    """

    run: str
    parameters: dict[str, Any]
    key: str
    why: str


def let_go_of_runs(experiment: Experiment) -> Retained:
    """Delete the runs that ``retention.older_than`` lets go; none where the file does not say so."""
    policy = retention_policy(experiment)
    if policy is None or not experiment.root.is_dir():
        return Retained()
    done = apply_policy(experiment.root, policy, datetime.now(UTC), f"retention of {experiment.experiment}")
    _note(experiment, [RunFolder.open(experiment.root / one.run) for one in done.deleted])
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


def _note(experiment: Experiment, folders: list[RunFolder]) -> None:
    """Bring the catalog's rows up to date, where there is a catalog; it is an index, and can wait."""
    url = experiment.deployment.service.catalog_url
    if not folders or (url is None and not (experiment.root / "catalog.sqlite").exists()):
        return
    try:
        catalog = Catalog(url or default_url(experiment.root))
        try:
            for folder in folders:
                catalog.record(folder)
        finally:
            catalog.close()
    except (SQLAlchemyError, NearlineError) as error:
        log.warning("the catalog is behind (`nearline catalog rebuild` brings it up): %s", error)
