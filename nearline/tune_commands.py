"""`nearline tune`: how to search a run for peaks, proposed from its own frames."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nearline.options import AsJson, Folder, Service
from nearline.show import StageBars

__all__ = ["register"]

console = Console()
errors = Console(stderr=True)


def register(app: typer.Typer) -> None:
    """Add the command to the `nearline` command."""
    app.command()(tune)


def tune(
    run: Annotated[str, typer.Argument(help="experiment/number, such as lyso-2026/17, or the path of a run folder.")],
    frames: Annotated[int, typer.Option(min=20, help="Look at so many, spread over the run.")] = 300,
    recipe: Annotated[Path | None, typer.Option(help="What is in use now: detector values, mask, parameters.")] = None,
    source: Annotated[str | None, typer.Option(help="Which detector, where there are several.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw what is proposed into this PNG.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the recipe with what is proposed, and its mask beside it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads.")] = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Propose threshold, mask and hit cut of the peak search, from a minute of a run instead of a guess.

    Works on a live or a finished run. Each proposal comes with its reason and its rate of error.
    """
    from flows.tuning import draw_tuning, write_tuned_recipe
    from flows.tuning import tune as propose
    from streaming.retrieval import open_run
    from tasks.recipe import load_recipe

    opened = open_run(run, service=service, root=root)
    loaded = load_recipe(recipe) if recipe else None
    with StageBars(errors) as bars:
        report, survey = propose(
            opened, data_source=source, n_frames=frames, recipe=loaded, n_threads=threads, progress=bars.update
        )
    if picture is not None:
        draw_tuning(picture, report, survey)
    if write is not None:
        write_tuned_recipe(write, report, survey)
    if as_json:
        print(report.model_dump_json())
        return
    for sentence in report.words:
        console.print(f"{sentence}.", highlight=False, soft_wrap=True)
    line = f"find_peaks: {{threshold: {report.threshold:g}, min_peaks: {report.min_peaks}}}"
    console.print(line, style="bold", highlight=False)
    for path in (picture, write):
        if path is not None:
            console.print(str(path), highlight=False, soft_wrap=True)
