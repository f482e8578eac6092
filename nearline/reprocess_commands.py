"""`nearline reprocess`, `compare`, `promote` and `canary`: another recipe, held against the first."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nearline import show
from nearline.options import AsJson, Folder, Service
from storage.errors import DeploymentNotFound

if TYPE_CHECKING:
    from flows.comparison import Comparison, Difference

__all__ = ["add_to"]

console = Console()
errors = Console(stderr=True)

RecipeFile = Annotated[Path, typer.Option(help="Recipe file, YAML or TOML.")]
Source = Annotated[str | None, typer.Option(help="Data source; needed only if the run has several detectors.")]
Picture = Annotated[Path | None, typer.Option("--picture", "-o", help="Also draw the comparison: a PNG file.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads over frames.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (reprocess, compare, promote, canary):
        app.command()(command)


def reprocess(
    recipe: RecipeFile,
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUNS…", help="lyso-2026/3, a range lyso-2026/3-9, lyso-2026/\\*, or run folders."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="SQL condition over runs, such as \"sample = 'lysozyme' AND indexing_rate < 0.3\"."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="So many runs at a time.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Also runs that this very recipe has processed.")] = False,
    deployed: Annotated[
        bool, typer.Option("--deployed", help="Hand it to a worker, through reprocess-runs/EXPERIMENT, and return.")
    ] = False,
    source: Source = None,
    threads: ThreadsOption = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Process finished runs again with another recipe: old results stay, only steps that change are computed.

    A run that fails stops no other; exit code 2 says that some did. The same command again goes on with those.
    """
    from flows.reprocessing import reprocess_here
    from tasks.recipe import load_recipe

    place: dict[str, Any] = {"data_source": source, "service": service, "root": _text(root), "n_threads": threads}
    loaded = load_recipe(recipe)
    if deployed:
        from flows.calls import reprocess_deployed

        given = {"where": where, "parallel": parallel, "again": again, **place}
        started = reprocess_deployed(runs or [], loaded.model_dump(mode="json"), given, wait=False)
        said = f"{len(started['runs'])} runs handed over: {started['flow_run_url'] or started['flow_run_id']}"
        print(json.dumps(started)) if as_json else console.print(said, highlight=False, soft_wrap=True)
        return
    with show.quiet_process_log(), show.StageBars(errors) as bars:
        told = _Bars(bars)
        summary = reprocess_here(
            runs or [], loaded, where=where, parallel=parallel, again=again, reporter=told, **place
        )
    _show_reprocessing(summary, as_json)
    if summary["failed"]:
        raise typer.Exit(2)


def compare(
    a: Annotated[str, typer.Argument(help="RUN:PROCESSING, such as lyso-2026/3:p1, or with --processings a run.")],
    b: Annotated[str | None, typer.Argument(help="RUN:PROCESSING of the other.")] = None,
    processings: Annotated[
        tuple[str, str] | None, typer.Option(help="Two processings of the run, such as p1 p2.")
    ] = None,
    picture: Picture = None,
    artifact: Annotated[
        bool | None,
        typer.Option("--artifact/--no-artifact", help="Also as a page in Prefect; default: if PREFECT_API_URL is set."),
    ] = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Hold two processings side by side: parameters, code, rates, cell, resolution, time, frames gained and lost."""
    from flows.comparison import compare_processings, open_processing

    if (b is None) == (processings is None):
        raise typer.BadParameter("give RUN:PROCESSING twice, or one RUN with --processings p1 p2")
    names = [f"{a}:{name}" for name in processings] if processings else [a, str(b)]
    found = compare_processings(*(open_processing(name, service=service, root=_text(root)) for name in names))
    if picture is not None:
        from flows.comparison_picture import draw_comparison

        draw_comparison(picture, found)
    if artifact or (artifact is None and os.environ.get("PREFECT_API_URL")):
        from flows.comparison_page import show_comparison

        if not show_comparison(found):
            errors.print("the Prefect server did not take the page", highlight=False)
    _show_comparison(found, as_json)
    if picture is not None and not as_json:
        console.print(f"drawn in {picture}", highlight=False, soft_wrap=True)


def promote(
    run: Annotated[str, typer.Argument(help="experiment/number, such as lyso-2026/17, or the path of a run folder.")],
    processing: Annotated[str, typer.Argument(help="The processing to use from now on, such as p2.")],
    why: Annotated[str, typer.Option(help="Why, for those who ask later.")] = "",
    by: Annotated[str | None, typer.Option(help="Who says so; default the user.")] = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Make a processing the default of its run: queries, `nearline info` and `run.processing()` then mean it."""
    from storage import promotion

    opened = show.open_run(run, service, root)
    made = promotion.promote(opened.folder, processing, by=by, why=why)
    if as_json:
        print(json.dumps({"run": opened.name, **made.model_dump(mode="json")}))
    else:
        before = f" (before: {made.previous})" if made.previous else ""
        console.print(f"{made.processing} is the default of {opened.name}{before}", highlight=False)


def canary(
    run: Annotated[str, typer.Argument(help="experiment/number, such as lyso-2026/17, or the path of a run folder.")],
    recipe: RecipeFile,
    minutes: Annotated[float, typer.Option(min=0.01, help="So much of the newest data, minutes.")] = 1.0,
    here: Annotated[bool, typer.Option("--here", help="In this process, even if a worker could do it.")] = False,
    picture: Picture = None,
    source: Source = None,
    threads: ThreadsOption = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Try new parameters on the newest minute of a run, live or finished, beside the processing that runs.

    Done by a worker of the reprocess pool where PREFECT_API_URL names a server with canary-run/EXPERIMENT, else in
    this process at the lowest priority.
    """
    from flows.comparison import compare_processings, open_processing
    from tasks.recipe import load_recipe

    loaded = load_recipe(recipe)
    options = {
        "minutes": minutes, "data_source": source, "service": service, "root": _text(root), "n_threads": threads,
    }  # fmt: skip
    summary = None
    if os.environ.get("PREFECT_API_URL") and not here:
        from flows.calls import canary_deployed

        try:
            summary = canary_deployed(run, loaded.model_dump(mode="json"), options)
        except DeploymentNotFound as error:
            errors.print(f"{error}; trying it here", highlight=False, soft_wrap=True)
    if summary is None:
        from flows.canary import try_recipe

        os.nice(19)  # the live analysis comes first
        opened = show.open_run(run, service, root)
        summary, _ = try_recipe(opened, loaded, minutes, data_source=source, n_threads=threads)
    found = None
    if summary.get("comparison"):
        names = [summary["comparison"][side]["name"].rpartition(":")[2] for side in "ab"]
        both = [open_processing(f"{run}:{name}", service=service, root=_text(root)) for name in names]
        found = compare_processings(*both)
    if found is not None and picture is not None:
        from flows.comparison_picture import draw_comparison

        draw_comparison(picture, found)
    if as_json:
        print(json.dumps(summary, default=str))
        return
    show.processing_summary(console, summary, as_json=False)
    if found is None:
        console.print("there is no other processing of these frames to compare with", highlight=False)
    else:
        _show_comparison(found, as_json=False)


class _Bars:
    """A `flows.reprocessing.BulkReporter` that shows a bar over runs."""

    def __init__(self, bars: show.StageBars) -> None:
        self._bars = bars

    def began(self, run: str) -> None:
        self._bars.update(f"{run} …", 0, 0)

    def ended(self, outcome: Any, n_done: int, n_runs: int) -> None:
        why = f": {outcome.error}" if outcome.error else f" as {outcome.processing}"
        self._bars.update(f"{outcome.run} {outcome.state}{why}", 0, 0)
        self._bars.update("runs", n_done, n_runs)


def _show_reprocessing(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    table = Table("run", "state", "processing", "frames", "hits of frames", "indexed of hits", "chunks computed", "s")
    for one in summary["runs"]:
        steps = (f"{name} {n['computed']}/{n['computed'] + n['reused']}" for name, n in one["steps"].items())
        rates = (f"{100 * one[name]:.1f} %" for name in ("hit_rate", "indexing_rate"))
        values = (one["run"], one["state"], one["processing"] or "", str(one["frames"]), *rates)
        table.add_row(*values, ", ".join(steps), f"{one['seconds']:.1f}")
    console.print(table)
    for run, why in summary["left_out"].items():
        console.print(f"{run} is left out: {why}", highlight=False, soft_wrap=True)
    for run, why in summary["failed"].items():
        console.print(f"[red]{run} failed:[/red] {why}", highlight=False, soft_wrap=True)


def _show_comparison(found: "Comparison", as_json: bool) -> None:
    from flows.comparison import comparison_rows

    if as_json:
        print(json.dumps(found.as_json()))
        return
    _differences("parameters", found.parameters)
    _differences("code and versions", found.code)
    table = Table("", f"A  {found.a.name}", f"B  {found.b.name}")
    for row in comparison_rows(found):
        table.add_row(*row)
    console.print(table)


def _differences(title: str, rows: "list[Difference]") -> None:
    if not rows:
        console.print(f"{title}: the same", highlight=False)
        return
    table = Table(title, "A", "B")
    for row in rows:
        table.add_row(row.name, *("–" if value is None else str(value) for value in (row.a, row.b)))
    console.print(table)


def _text(root: Path | None) -> str | None:
    return str(root) if root else None
