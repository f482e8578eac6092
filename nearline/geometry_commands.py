"""`nearline geometry`: where a detector stands, by a geometry file or a run; and the same in another format."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nearline.options import AsJson, Folder, Service

__all__ = ["register"]

console = Console()
errors = Console(stderr=True)

_MOST_PANELS = 16


def register(app: typer.Typer) -> None:
    """Add the command to the `nearline` command."""
    app.command()(geometry)


def geometry(
    source: Annotated[
        str,
        typer.Argument(
            help="A .geom, .expt or .poni file; a run, such as lyso-2026/17; or a processing, lyso-2026/17:p2."
        ),
    ],
    to: Annotated[Path | None, typer.Option(help="Write it as a .geom, .expt or .poni, by the file's suffix.")] = None,
    distance: Annotated[
        float | None, typer.Option(help="Sample to detector in m, instead of what is found (CrystFEL: of clen).")
    ] = None,
    energy: Annotated[float | None, typer.Option(help="Photon energy in eV, instead of what is found.")] = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Say where the panels of a detector stand: distance, beam centre, tilt, resolution at edge and corner.

    With --to the same detector is written for another program. In a recipe, `detector: {geometry: FILE}`
    has the analysis use such a file.
    """
    from flows.geometry_report import detector_in, report_of
    from storage.geometry_formats import write_geometry

    overrides = {"detector_distance": distance, "incident_energy": energy}
    given = {name: value for name, value in overrides.items() if value is not None}
    placed = detector_in(source, service=service, root=root, overrides=given)
    report = report_of(placed)
    if to is not None:
        write_geometry(to, placed.geometry, placed.bad)
    if as_json:
        print(report.model_dump_json())
        return
    _show(report)
    if to is not None:
        console.print(str(to), highlight=False, soft_wrap=True)


def _show(report: Any) -> None:
    n_slow, n_fast = report.shape
    lines = {
        "frame": f"{n_slow} × {n_fast} px (slow × fast), {report.n_panels} panel{'s' if report.n_panels > 1 else ''}",
        "pixels": f"{report.pixel_size_x * 1e6:.6g} × {report.pixel_size_y * 1e6:.6g} µm",
        "distance": _with_unit(report.distance, "m", ".6g"),
        "wavelength": _with_unit(report.wavelength, "Å", ".6g")
        + (f" ({report.energy:.6g} eV)" if report.energy else ""),
        "beam centre": f"({report.beam_center_x:.3f}, {report.beam_center_y:.3f}) px (fast, slow)",
        "tilt": f"{report.tilt_deg:.3f}°",
        "at the edge": _with_unit(report.d_edge, "Å", ".3f"),
        "at the corner": _with_unit(report.d_corner, "Å", ".3f"),
        "masked": f"{report.n_bad} px off the panels or in bad regions",
    }
    for name, text in lines.items():
        console.print(f"{name:<14}{text}", highlight=False, soft_wrap=True)
    if report.n_panels > 1:
        _show_panels(report)
    for note in report.notes:
        errors.print(f"{note}.", style="yellow", highlight=False, soft_wrap=True)


def _with_unit(value: float | None, unit: str, form: str) -> str:
    return "unknown" if value is None else f"{value:{form}} {unit}"


def _show_panels(report: Any) -> None:
    table = Table("panel", "slow, fast", "shape", "corner (mm)", "tilt (°)", box=None, header_style="bold")
    for panel in report.panels[:_MOST_PANELS]:
        x, y, z = (1e3 * v for v in panel.corner)
        table.add_row(
            panel.name,
            f"{panel.origin[0]}, {panel.origin[1]}",
            f"{panel.shape[0]} × {panel.shape[1]}",
            f"{x:.3f} {y:.3f} {z:.3f}",
            f"{panel.tilt_deg:.3f}",
        )
    console.print(table)
    if report.n_panels > _MOST_PANELS:
        console.print(f"and {report.n_panels - _MOST_PANELS} more; all of them with --json", style="dim")
