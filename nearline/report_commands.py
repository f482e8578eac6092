"""`nearline report`: what a run came to, as one file for everybody."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nearline.options import AsJson, Service
from nearline.show import StageBars

__all__ = ["register"]

console = Console()
errors = Console(stderr=True)


def register(app: typer.Typer) -> None:
    """Add the command to the `nearline` command."""
    app.command()(report)


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUNS…", help="lyso-2026/3, a range lyso-2026/3-9, lyso-2026/\\*, or run folders."),
    ] = None,
    sample: Annotated[
        str | None, typer.Option(help="Only runs of this sample; without RUNS, of all that there are.")
    ] = None,
    processing: Annotated[str | None, typer.Option(help="Whose results; default promoted or newest.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file; default report-<run>-<processing>.html here.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder for the pictures as PNG files, too.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    service: Service = None,
    root: Annotated[Path | None, typer.Option(envvar="NEARLINE_ROOT", help="Data folder, without a service.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run, or of the runs of a sample: one HTML file that needs nothing else.

    Works on a live or a finished run, with what is processed so far: rates, peaks on the detector, cells, resolution,
    orientations, merging statistics, warnings in words, the account of frames, and what it was all made with.
    """
    from flows.report import ReportRequest, write_report

    if not runs and sample is None:
        raise typer.BadParameter("name a run, such as lyso-2026/17, or a --sample")
    request = ReportRequest(
        runs=tuple(runs or ()), sample=sample, processing=processing, service=service, root=str(root) if root else None
    )
    with StageBars(errors) as bars:
        written = write_report(request, out, pictures, bars.update)
    if show:
        typer.launch(Path(written.path).absolute().as_uri())
    if as_json:
        print(written.model_dump_json())
        return
    for text in written.figures.warnings:
        console.print(f"look: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for run, why in written.left_out.items():
        errors.print(f"left out {run}: {why}", markup=False, highlight=False, soft_wrap=True)
    console.print(written.path, markup=False, highlight=False, soft_wrap=True)
