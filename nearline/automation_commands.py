"""`nearline up`, `down`, `catch-up` and `relay`: what goes by itself, and what keeps it going."""

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nearline.logs import configure_logs
from nearline.options import AsJson, Logs, Root

if TYPE_CHECKING:
    from flows.experiment import Experiment

__all__ = ["register"]

log = logging.getLogger("nearline.provenance")

# How old the tables of provenance may be, beside a catch-up.
_PROVENANCE_S = 60.0

console = Console()
errors = Console(stderr=True)

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment file (YAML or TOML); `nearline init` writes one.")]
Api = Annotated[
    str | None,
    typer.Option(help="Address of the Prefect API, in place of the file's, e.g. http://127.0.0.1:4200/api."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `nearline` command."""
    app.command("up")(up_)
    app.command()(down)
    app.command("catch-up")(catch_up)
    app.command()(relay)


def up_(file: ExperimentFile, as_json: AsJson = False) -> None:
    """Bring up all that an experiment needs on this machine, and look after it until Ctrl-C.

    A Prefect server (unless one is there), the streaming service, the deployments, the relay, a worker for each work
    pool, and the catch-up. What dies is started again. New runs are then processed by themselves; the Prefect UI shows
    them. Ctrl-C, or `nearline down` elsewhere, takes everything down.
    """
    from flows.experiment import load_experiment
    from nearline.up import up

    up(load_experiment(file.absolute()), console, as_json=as_json)


def down(
    file: ExperimentFile,
    timeout: Annotated[float, typer.Option(min=0, help="Wait so long until everything is down, s.")] = 90.0,
) -> None:
    """Take down what `nearline up` keeps running: chunks are sealed, flow runs are told to stop."""
    from flows.experiment import load_experiment
    from nearline.up import running_pid
    from storage.errors import ServiceUnavailable

    root = load_experiment(file.absolute()).root
    pid = running_pid(root)
    if pid is None:
        console.print(f"nothing is up for {root}", highlight=False, soft_wrap=True)
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while running_pid(root) == pid:
        if time.monotonic() > deadline:
            raise ServiceUnavailable(f"`nearline up` (pid {pid}) is still taking things down after {timeout:g} s")
        time.sleep(0.2)
    console.print("everything is down", highlight=False)


def catch_up(
    file: ExperimentFile,
    once: Annotated[bool, typer.Option("--once", help="Look once, and stop.")] = False,
    patience: Annotated[
        float, typer.Option(min=0, help="Leave a run to the automation for so long after its first chunk, s.")
    ] = 15.0,
    api: Api = None,
    log_format: Logs = "text",
    as_json: AsJson = False,
) -> None:
    """Start flow runs for runs that nobody has processed, and end those whose process is gone.

    After a power cut, a killed worker or a Prefect server that was away, the data folder and Prefect disagree: this
    looks again and again, and mends it. A run that any recipe has processed is left alone. Beside that it keeps the
    tables of provenance up to what the run folders say. Stop it with Ctrl-C.
    """
    from flows.catch_up import CatchUp
    from flows.experiment import load_experiment

    configure_logs(errors, log_format=log_format)
    experiment, stop = load_experiment(file.absolute()), _told_to_stop()
    work = CatchUp(experiment, api, patience_s=patience)
    if once:
        _refresh_provenance(experiment, set())
    else:
        threading.Thread(target=_keep_provenance, args=(experiment, stop), name="provenance", daemon=True).start()
    for deed in work.look() if once else work.follow(stop):
        if as_json:
            print(json.dumps(deed.as_json()), flush=True)
        else:
            console.print(f"{deed.run} {deed.action}: {deed.why}", highlight=False, soft_wrap=True, markup=False)


def _keep_provenance(experiment: "Experiment", stop: threading.Event) -> None:
    """Bring the tables up again and again, in a thread of its own: a database that is away holds nothing else up."""
    told: set[str] = set()
    while not stop.is_set():
        _refresh_provenance(experiment, told)
        stop.wait(_PROVENANCE_S)


def _refresh_provenance(experiment: "Experiment", told: set[str]) -> None:
    """Bring them up once; ``told`` is what has been complained of: each trouble is named once, not every minute."""
    from sqlalchemy.exc import SQLAlchemyError

    from nearline import provenance_commands

    if not experiment.root.is_dir():  # no run yet
        return

    def complain(why: str) -> None:
        if why not in told:
            log.warning("the tables of provenance are behind: %s", why)
        told.add(why)

    try:
        provenance_commands.refresh(experiment.root, experiment.deployment.service.catalog_url, left_out=complain)
    except (SQLAlchemyError, OSError) as error:
        complain(str(error))


def relay(
    root: Root = Path("nearline-data"),
    once: Annotated[bool, typer.Option("--once", help="Carry what is there, and stop.")] = False,
    log_format: Logs = "text",
) -> None:
    """Carry news of runs (started, chunk sealed, finished, ledger imbalance) to the Prefect server as events.

    The server is that of PREFECT_API_URL. While it is away the news waits in the data folder, and frames
    flow on. Stop it with Ctrl-C; it goes on where it was, and tells nothing twice.
    """
    from flows.relay_events import relay_events

    configure_logs(errors, log_format=log_format)
    relay_events(root.absolute(), _told_to_stop(), once=once)


def _told_to_stop() -> threading.Event:
    """Set by Ctrl-C and SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop
