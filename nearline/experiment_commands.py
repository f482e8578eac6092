"""`nearline init`, `check`, `deploy` and `undeploy`: an experiment's file, and its place in Prefect."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nearline.options import AsJson
from storage.errors import OutputExists, ServiceUnavailable
from storage.names import check_name

__all__ = ["register"]

console = Console()
errors = Console(stderr=True)

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment file (YAML or TOML); `nearline init` writes one.")]
Api = Annotated[
    str | None,
    typer.Option(help="Address of the Prefect API, in place of the file's, e.g. http://127.0.0.1:4200/api."),
]
_STYLES = {"created": "green", "updated": "yellow", "removed": "yellow", "unchanged": "dim", "kept": "dim"}


def register(app: typer.Typer) -> None:
    """Add the commands to the `nearline` command."""
    for function in (init, check, deploy, undeploy):
        app.command()(function)


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("experiment.yaml"),
    experiment: Annotated[str | None, typer.Option(help="Name of the experiment, such as lyso-2026.")] = None,
    beamline: Annotated[str | None, typer.Option(help="Name of the beamline.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead, for an editor.")] = False,
) -> None:
    """Write an experiment file with comments, to be edited; as it stands it fits `nearline simulate`."""
    from flows.experiment import EXAMPLE, Experiment

    if schema:
        print(json.dumps(Experiment.model_json_schema(), indent=2))
        return
    if file.exists() and not overwrite:
        raise OutputExists(f"{file} exists; edit it, name another file, or replace it with --overwrite")
    text = EXAMPLE.read_text()
    if experiment:
        text = text.replace("experiment: lyso-2026 ", f"experiment: {check_name(experiment, 'experiment')} ")
    if beamline:
        text = text.replace("beamline: simulated", f"beamline: {check_name(beamline, 'beamline')}")
    file.write_text(text)
    console.print(f"{file} is written; edit it, then: nearline check {file}", highlight=False, soft_wrap=True)


def check(file: ExperimentFile, api: Api = None, as_json: AsJson = False) -> None:
    """Hold an experiment file against reality: cells, recipes, geometry, masks, detectors, disk, servers.

    What only needs to be started later is a warning. The exit code is 1 if a check failed.
    """
    from nearline.doctor import show_checks
    from nearline.experiment_checks import check_experiment

    checks = check_experiment(file, api)
    if as_json:
        done = list(checks)
        is_well = all(c.state != "fail" for c in done)
        print(json.dumps({"file": str(file), "is_well": is_well, "checks": [asdict(c) for c in done]}))
    else:
        is_well = show_checks(console, checks)
    raise typer.Exit(0 if is_well else 1)


def deploy(file: ExperimentFile, api: Api = None, as_json: AsJson = False) -> None:
    """Make the experiment's work pools, deployments, variable and automation in Prefect, or bring them up to date.

    Repeat it after each change of the file: what is as it should be is left alone. New runs are then processed by
    whatever worker serves the pool `live`: prefect worker start --pool live
    """
    from flows.deploying import api_of
    from flows.deploying import deploy as deploy_experiment
    from flows.experiment import load_experiment

    experiment = load_experiment(file)
    address = _answering(api or api_of(experiment))
    changes = deploy_experiment(experiment, address)
    _show(changes, as_json)
    if not as_json:
        n_changed = sum(change.action in ("created", "updated") for change in changes)
        verdict = f"{n_changed} changed" if n_changed else "nothing had to be changed"
        console.print(f"[bold]{experiment.experiment}[/bold] is deployed at {address}: {verdict}", highlight=False)


def undeploy(
    experiment: Annotated[str, typer.Argument(help="Experiment file, or the name of the experiment.")],
    api: Api = None,
    as_json: AsJson = False,
) -> None:
    """Remove the experiment's automation, variable and deployments, and the work pools that nothing else uses.

    Flow runs that were, and everything in run folders, stay.
    """
    from flows.deploying import api_of, default_api
    from flows.deploying import undeploy as undeploy_experiment
    from flows.experiment import load_experiment

    name, address = experiment, api or default_api()
    if Path(experiment).is_file():
        loaded = load_experiment(experiment)
        name, address = loaded.experiment, api or api_of(loaded)
    changes = undeploy_experiment(check_name(name, "experiment"), _answering(address))
    _show(changes, as_json)
    if not as_json and not changes:
        console.print(f"there is nothing of {name} at {address}", highlight=False)


def _answering(api: str) -> str:
    from nearline.prefect_server import is_healthy

    if not is_healthy(api):
        raise ServiceUnavailable(
            f"no Prefect server answers at {api}; start one (prefect server start), or name it with --api"
        )
    return api


def _show(changes: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps([change.as_json() for change in changes]))
        return
    if not changes:
        return
    table = Table("", "name", "done", "")
    for change in changes:
        style = _STYLES.get(change.action, "red")
        table.add_row(change.kind, change.name, f"[{style}]{change.action}[/]", change.detail)
    console.print(table)
