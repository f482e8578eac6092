"""`nearline wait` and `nearline merge`: is there enough, and what is it worth together."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from nearline.options import AsJson, Folder, Service
from nearline.show import StageBars

if TYPE_CHECKING:
    from tasks.merge_crystals import MergeStatistics

__all__ = ["register"]

console = Console()
errors = Console(stderr=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the `nearline` command."""
    app.command()(wait)
    app.command()(merge)


def wait(
    run: Annotated[str, typer.Argument(help="experiment/number, such as lyso-2026/17, or the path of a run folder.")],
    criterion: Annotated[str, typer.Argument(help="Such as 'n_indexed >= 1000', or 'completeness(2.0) > 0.98'.")],
    processing: Annotated[str | None, typer.Option(help="Whose results, such as p1; default the newest.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Wait so long, s; default as long as it takes.")] = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Wait until what was processed of a run meets a stop criterion, and say when that will be.

    The exit code is 0 once it is met, and 1 if the processing has finished, or the time is over, without.
    """
    from flows.waiting import Waited, wait_until
    from streaming.retrieval import open_run

    def tell(now: Waited) -> None:
        values = ", ".join(f"{k} {'unknown' if v is None else f'{v:.5g}'}" for k, v in now.values.items())
        errors.print(f"{now.run} {now.processing}, {now.n_chunks} chunks: {values}; {now.outlook}", highlight=False)

    opened = open_run(run, service=service, root=root)
    found = wait_until(opened, criterion, processing=processing, timeout=timeout, tell=tell)
    if as_json:
        print(found.model_dump_json())


def merge(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUNS…", help="lyso-2026/3, a range lyso-2026/3-9, lyso-2026/\\*, or run folders."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for MTZ, .hkl, JSON and PNG.")] = None,
    name: Annotated[str, typer.Option(help="Name of the files, without an ending.")] = "merged",
    where: Annotated[str | None, typer.Option(help="SQL condition over runs, such as \"sample = 'lysozyme'\".")] = None,
    processing: Annotated[str | None, typer.Option(help="Whose reflections; default promoted or newest.")] = None,
    cell: Annotated[str | None, typer.Option(help="a,b,c,alpha,beta,gamma or a file; default the recipe's.")] = None,
    space_group: Annotated[str | None, typer.Option(help="With six numbers.")] = None,
    d_min: Annotated[
        float | None, typer.Option(min=0.1, help="Resolution, Å; default where the detector ends.")
    ] = None,
    friedel_mates: Annotated[Literal["merged", "apart"], typer.Option(help="apart keeps I(+) and I(-).")] = "merged",
    scale: Annotated[
        bool, typer.Option("--scale/--no-scale", help="Scale and B of each crystal, or a plain mean.")
    ] = True,
    partiality: Annotated[
        bool, typer.Option("--partiality/--no-partiality", help="Model partialities where that helps.")
    ] = True,
    resolve: Annotated[
        bool, typer.Option("--resolve/--no-resolve", help="Tell indexings apart where the lattice has several.")
    ] = True,
    polarisation: Annotated[
        float, typer.Option(min=0, max=1, help="Horizontal fraction of the beam's polarisation.")
    ] = 0.99,
    no_polarisation: Annotated[bool, typer.Option("--no-polarisation", help="Correct for none.")] = False,
    split: Annotated[
        str | None, typer.Option(help="Also merge by a column of the frames, such as laser, or by a condition.")
    ] = None,
    shells: Annotated[int, typer.Option(min=1, max=100, help="Resolution shells.")] = 10,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Merge the reflections of all crystals of some runs, and say shell by shell how good they are."""
    from flows.merging import MergeRequest, lines_about, merge_runs

    request = MergeRequest(
        runs=tuple(runs), where=where, processing=processing, cell=cell, space_group=space_group, d_min=d_min,
        friedel_mates=friedel_mates, scale=scale, partiality=partiality, resolve=resolve, split=split,
        polarisation=None if no_polarisation else polarisation,
        n_shells=shells, name=name, service=service, root=str(root) if root else None,
    )  # fmt: skip
    with StageBars(errors) as bars:
        result = merge_runs(request, output, lambda done, total: bars.update("runs merged", done, total))
    if as_json:
        print(json.dumps(result.model_dump(mode="json")))
        return
    _show_table(result.statistics, f"{result.statistics.n_crystals} crystals of {len(result.inputs)} runs")
    for name, statistics in result.sets.items():
        _show_table(statistics, f"{split}: {name}, {statistics.n_crystals} crystals")
    for line in lines_about(result):
        errors.print(line, highlight=False, soft_wrap=True)
    for run, why in result.left_out.items():
        errors.print(f"left out {run}: {why}", highlight=False, soft_wrap=True)
    for path in result.files.values():
        console.print(path, highlight=False, soft_wrap=True)


def _show_table(statistics: "MergeStatistics", caption: str) -> None:
    from flows.merged_files import shell_table

    head, _, *rows = (line.strip("| ").split(" | ") for line in shell_table(statistics).splitlines())
    table = Table(*head, caption=caption)
    for row in rows:
        table.add_row(*row)
    console.print(table)
