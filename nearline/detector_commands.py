"""`nearline refine-detector`: where the detector stands, from the crystals of a processing."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nearline.options import AsJson, Folder, Service

__all__ = ["register"]

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command to the `nearline` command."""
    app.command("refine-detector")(refine_detector)


def refine_detector(
    run: Annotated[
        str, typer.Argument(help="lyso-2026/17, or with a processing lyso-2026/17:p2; it must have indexed.")
    ],
    trust_cell: Annotated[
        bool,
        typer.Option("--trust-cell", help="The recipe's cell is known better than the distance: refine that too."),
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw shifts and what is left over into this PNG.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the recipe with the beam centre, or panels, found, to reprocess with.")
    ] = None,
    geometry: Annotated[
        Path | None,
        typer.Option("--geometry", "--geom", help="Write what was found as a .geom, .expt or .poni, by its suffix."),
    ] = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Say where the detector truly stands, from the crystals that a processing has indexed.

    The beam centre comes out within some hundredths of a pixel from a hundred crystals. Where the recipe
    has a geometry of several panels, each panel with spots enough is placed along its two axes. The distance can be
    told from the cell only where the cell is known better. Then
    `nearline reprocess RUN --recipe FILE` with the file of --write.
    """
    from flows.comparison import open_processing
    from flows.detector_refinement import detector_of, draw_detector, write_geometry, write_recipe
    from storage.run_folder import RunFolder

    processing = open_processing(run, service=service, root=str(root) if root else None)
    findings, found = detector_of(processing, trust_cell=trust_cell)
    if picture is not None:
        shape = RunFolder.open(processing.run).stream_header(processing.manifest.data_source).shape
        draw_detector(picture, findings, found, (shape[0], shape[1]))
    if write is not None:
        write_recipe(processing, findings, found, write)
    if geometry is not None:
        write_geometry(processing, findings, found, geometry)
    if as_json:
        print(json.dumps(findings.model_dump(mode="json")))
        return
    for sentence in findings.words:
        console.print(f"{sentence}.", highlight=False, soft_wrap=True)
    console.print(f"from {findings.n_crystals} crystals and {findings.n_spots} spots", style="dim", highlight=False)
    for path in (picture, write, geometry):
        if path is not None:
            console.print(str(path), highlight=False, soft_wrap=True)
