"""`nearline find-cell`: the unit cell of an unknown sample from its first hits."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nearline.options import AsJson, Service
from nearline.show import StageBars

__all__ = ["register"]

console = Console()
errors = Console(stderr=True)

_WORDS = {
    "sure": "[green]sure[/green]",
    "likely": "[green]likely[/green]",
    "tentative": "[yellow]tentative: do not rely on it yet[/yellow]",
}
_MOST_ALTERNATIVES = 6
_DISTANCE_ERROR = 0.01


def register(app: typer.Typer) -> None:
    """Add the command to the `nearline` command."""
    app.command()(find_cell)


def find_cell(
    run: Annotated[str, typer.Argument(help="experiment/number, such as lyso-2026/17, or the path of a run folder.")],
    frames: Annotated[int, typer.Option(min=3, help="Hits to try, at most.")] = 200,
    processing: Annotated[
        str | None, typer.Option(help="Whose peaks, such as p1; default the newest, or searched for here.")
    ] = None,
    data_source: Annotated[str | None, typer.Option(help="Which detector, where there are several.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw histograms of the cells into this PNG.")] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the cell: a CrystFEL .cell file, or with .yaml a recipe that indexes with it."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Go on without waiting after so long without a new frame, s.")] = 30.0,
    service: Service = None,
    root: Annotated[Path | None, typer.Option(envvar="NEARLINE_ROOT", help="Data folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the unit cell when nothing is known of it; exit code 2 where hits do not agree on one.

    Works on a live or a finished run, with the peaks of a processing, or with a peak search of its own.
    """
    from flows.cell_picture import draw_cells
    from flows.finding_cell import find_cell as find
    from streaming.retrieval import open_run

    opened = open_run(run, service=service, root=root)
    with StageBars(errors) as bars:
        report = find(
            opened,
            data_source=data_source,
            processing=processing,
            n_hits=frames,
            timeout=timeout,
            progress=bars.update,
        )
    if picture is not None:
        errors.print(f"{draw_cells(picture, report)} is drawn", highlight=False, soft_wrap=True)
    if write is not None and report.cell is not None:
        _write(write, report)
    if as_json:
        print(report.model_dump_json())
    else:
        _show(report)
    raise typer.Exit(0 if report.cell is not None else 2)


def _write(path: Path, report: Any) -> None:
    from flows.exports import cell_file_text
    from flows.finding_cell import recipe_text

    is_recipe = path.suffix in (".yaml", ".yml")
    path.write_text(recipe_text(report) if is_recipe else cell_file_text(report.unit_cell))
    errors.print(f"{path} is written", highlight=False, soft_wrap=True)


def _show(report: Any) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    peaks = f"peaks of {report.processing}" if report.processing else "peaks searched with default parameters"
    say(f"{report.run}/{report.data_source}: {report.n_hits} hits in {report.n_frames} frames ({peaks})")
    if report.cell is None:
        say(f"[red]no cell:[/red] {report.why}")
        return
    numbers = "  ".join(f"{v:.2f}" for v in report.cell)
    spread = "  ".join(f"{v:.2f}" for v in report.spread)
    say(f"proposed cell: [bold]{numbers}[/bold]  (Å, °), {report.volume:,.0f} Å³")
    say(f"spread of single hits: {spread}")
    say(f"lattice: [bold]{report.lattice}[/bold], whose symmetry is met within {100 * report.deviation:.2f} %")
    say(f"how sure: {_WORDS[report.certainty]}; {report.why}")
    if abs(report.distance_scale - 1) > _DISTANCE_ERROR:
        say(
            f"[yellow]the detector distance seems wrong: {100 * (report.distance_scale - 1):+.1f} % fits better; "
            "the cell's lengths are wrong by as much[/yellow]"
        )
    if report.is_one_orientation:
        say("[yellow]all lattices stand alike: one crystal, or an artefact of the detector; move the sample[/yellow]")
    _show_alternatives(report, say)
    say(
        "next: put this into the recipe (the space group is the lattice's; its screw axes, or a lower one, are for you)"
    )
    say(report.recipe_lines.rstrip())


def _show_alternatives(report: Any, say: Any) -> None:
    if not report.alternatives:
        return
    say("also compatible:")
    for other in report.alternatives[:_MOST_ALTERNATIVES]:
        numbers = "  ".join(f"{v:.2f}" for v in other.cell)
        say(f"  {other.lattice:15s} {numbers}  misses it by {100 * other.deviation:.2f} %")
    n_more = len(report.alternatives) - _MOST_ALTERNATIVES
    if n_more > 0:
        say(f"  and {n_more} of lower symmetry; --json lists them")
