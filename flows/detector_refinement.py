"""Where the detector stands, from a processing that has indexed crystals: in numbers, in words, and as a picture."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import Field

from flows.run_tally import cell_of, detector_values, header_of
from storage.crystfel import geometry_file
from storage.errors import BadRecipe
from storage.files import replace
from storage.geometry import Geometry, override_detector
from storage.geometry_formats import write_geometry as write_file
from storage.models import DetectorHeader, Record
from storage.panels import DetectorGeometry
from storage.step_store import Processing
from tasks.recipe import Recipe, load_recipe
from tasks.refine_detector import FEWEST_CRYSTALS, DetectorRefinement, refine_detector
from tasks.refine_panels import CrystalSpots, PanelShift
from tasks.step_tables import read_crystal, rows_by_frame
from tasks.unit_cell import UnitCell

__all__ = [
    "DetectorFindings",
    "crystal_spots",
    "detector_of",
    "draw_detector",
    "refined_values",
    "write_geometry",
    "write_recipe",
]

# px; regions that are off by more than this have something to tell.
_NOTABLE_PX = 0.3
# Relative; a cell that differs by more may as well be a distance.
_NOTABLE_SCALE = 1e-3


class PanelFinding(Record):
    """Where a panel is against where it was taken to be, along its own axes; None with too few spots."""

    name: str
    n_spots: int
    fast: float | None = Field(description="px")
    slow: float | None = Field(description="px")
    sigma_fast: float | None = Field(description="px, standard deviation")
    sigma_slow: float | None = Field(description="px, standard deviation")

    @classmethod
    def of(cls, found: PanelShift) -> "PanelFinding":
        return cls(**{name: getattr(found, name) for name in cls.model_fields})


class DetectorFindings(Record):
    """What a processing's crystals say of its detector."""

    run: str
    processing: str
    n_crystals: int
    n_spots: int
    beam_center_x: float = Field(description="px, as it should be")
    beam_center_y: float = Field(description="px, as it should be")
    shift_x: float = Field(description="px, against the one that was assumed")
    shift_y: float = Field(description="px, against the one that was assumed")
    shift_sigma_x: float = Field(description="px, standard deviation")
    shift_sigma_y: float = Field(description="px, standard deviation")
    cell_scale: float = Field(description="refined cell edges over those given")
    cell_scale_sigma: float
    distance: float | None = Field(description="m, as it should be by the cell, if that is trusted")
    distance_sigma: float | None = Field(description="m, standard deviation")
    largest_residual: float | None = Field(description="px, of the region of the detector that is off by most")
    is_clear: bool = Field(
        description="the assumed beam centre, the place of a panel, or the distance is certainly wrong"
    )
    panels: tuple[PanelFinding, ...] = Field((), description="of a geometry of several panels")
    words: tuple[str, ...] = Field(description="the same in words, and what to do")


def detector_of(processing: Processing, *, trust_cell: bool = False) -> tuple[DetectorFindings, DetectorRefinement]:
    """Refine the detector's place from all crystals of a processing, or of its newest geometry that has enough.

    Parameters
    ----------
    trust_cell : the recipe's cell is known better than the distance, which is refined too.

    Raises
    ------
    BadRecipe : it has no crystals, or too few, or no cell.
    """
    geometry = _newest_with_crystals(processing)
    header, cell = header_of(processing, geometry), cell_of(processing)
    if cell is None:
        raise BadRecipe(f"processing {processing.name} has no cell; index with one first (recipe: sample.cell)")
    assert header.detector is not None
    shape = (header.image_shape[0], header.image_shape[1])
    crystals = _crystals(processing, cell, geometry)
    found = refine_detector(crystals, header.detector, shape, cell, trust_cell=trust_cell)
    residual = found.largest_residual
    return DetectorFindings(
        run=f"{header.experiment}/{header.run}",
        processing=processing.name,
        n_crystals=found.n_crystals,
        n_spots=found.n_spots,
        beam_center_x=found.beam_center[0],
        beam_center_y=found.beam_center[1],
        shift_x=found.shift[0],
        shift_y=found.shift[1],
        shift_sigma_x=found.shift_sigma[0],
        shift_sigma_y=found.shift_sigma[1],
        cell_scale=found.cell_scale,
        cell_scale_sigma=found.cell_scale_sigma,
        distance=found.distance,
        distance_sigma=found.distance_scale_sigma * header.detector.detector_distance if trust_cell else None,
        largest_residual=residual if math.isfinite(residual) else None,
        is_clear=found.is_clear,
        panels=tuple(map(PanelFinding.of, found.panels)),
        words=tuple(_words(found, header.detector)),
    ), found


def write_recipe(processing: Processing, findings: DetectorFindings, found: DetectorRefinement, path: Path) -> None:
    """The processing's recipe with beam centre, or panels, and a distance as found, to reprocess with."""
    recipe = _newest_recipe(processing)
    refined = recipe.model_copy(update={"detector": refined_values(recipe, found), "refine_detector": None})
    content = refined.model_dump(mode="json", exclude_defaults=True)
    what = ("panels" if found.moved else "beam centre") + (" and distance" if found.distance else "")
    head = f"# {findings.run}:{findings.processing} with the {what} of its {findings.n_crystals} crystals\n"
    replace(path, (head + yaml.safe_dump(content, sort_keys=False)).encode())


def write_geometry(processing: Processing, findings: DetectorFindings, found: DetectorRefinement, path: Path) -> None:
    """A geometry file with the beam centre, or the panels, as found: .geom, .expt or .poni by its suffix.

    Raises
    ------
    BadGeometry : another suffix, or panels that the format has no words for.
    """
    header, recipe = header_of(processing), _newest_recipe(processing)
    detector = override_detector(header.detector or DetectorHeader(), refined_values(recipe, found))
    bad = recipe.geometry.bad if recipe.geometry else ()
    if path.suffix.lower() == ".geom":
        text = geometry_file(header.model_copy(update={"detector": detector}), bad=bad)
        replace(path, text.encode())
    else:
        write_file(path, Geometry.from_header(detector, (header.image_shape[0], header.image_shape[1])), bad)


def refined_values(recipe: Recipe, found: DetectorRefinement) -> dict[str, float | DetectorGeometry]:
    """A recipe's detector values with beam centre, or panels, and a distance as found."""
    values = {name: value for name, value in recipe.detector.items() if name != "geometry"}
    if found.moved:
        # The new places have any other distance that the recipe gave in them.
        values.pop("detector_distance", None)
        return values | {"geometry": _moved(recipe, found)}
    if found.distance is not None:
        values |= {"detector_distance": round(found.distance, 7)}
    x, y = found.beam_center
    return values | {"beam_center_x": round(x, 4), "beam_center_y": round(y, 4)}


def _newest_recipe(processing: Processing) -> Recipe:
    """The recipe, with the detector values of the newest geometry that was in force."""
    recipe = load_recipe(dict(processing.manifest.recipe))
    return recipe.model_copy(update={"detector": detector_values(processing)})


def _moved(recipe: Recipe, found: DetectorRefinement) -> DetectorGeometry:
    """The recipe's geometry with its panels where they were found to be."""
    known = recipe.geometry or DetectorGeometry(panels=found.moved)
    new = {"panels": found.moved, "distance": Geometry(found.moved, 1.0).distance, "digest": ""}
    return known.model_copy(update=new)


def draw_detector(path: Path, findings: DetectorFindings, found: DetectorRefinement, shape: tuple[int, int]) -> None:
    """Shift of each crystal, and what is left over on the detector, as a PNG."""
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_shifts(left, found)
    _draw_residuals(right, found, shape)
    figure.suptitle(f"{findings.run} · {findings.processing} · {found.n_crystals} crystals, {found.n_spots} spots")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_shifts(axes: Any, found: DetectorRefinement) -> None:
    axes.scatter(*found.shifts.T, s=12, alpha=0.5, color="#1f77b4", label="one crystal")
    axes.scatter(*found.shift, s=90, marker="+", color="#d62728", label="median")
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.axvline(0, color="#999999", linewidth=0.8)
    reach = max(1.0, float(np.percentile(np.abs(found.shifts), 98)) * 1.3)
    axes.set(xlim=(-reach, reach), ylim=(reach, -reach), xlabel="fast, px", ylabel="slow, px", aspect="equal")
    axes.set_title("beam centre against the one assumed")
    axes.legend(loc="upper right")


def _draw_residuals(axes: Any, found: DetectorRefinement, shape: tuple[int, int]) -> None:
    n = len(found.residuals)
    y, x = ((np.arange(n) + 0.5) * size / n for size in shape)
    known = np.isfinite(found.residuals[..., 0])
    rows, columns = np.nonzero(known)
    # An arrow of one tenth of the detector stands for a round number of pixels.
    largest = found.largest_residual if known.any() else 1.0
    unit = 10.0 ** math.ceil(math.log10(max(largest, 1e-3)))
    length = shape[1] / 10
    arrows = found.residuals[known] / unit * length
    axes.quiver(
        x[columns], y[rows], arrows[:, 0], arrows[:, 1], angles="xy", scale_units="xy", scale=1, color="#1f77b4"
    )
    axes.quiver([0.04 * shape[1]], [0.04 * shape[0]], [length], [0], angles="xy", scale_units="xy", scale=1)
    axes.text(0.04 * shape[1], 0.09 * shape[0], f"{unit:g} px", va="center")
    axes.set(xlim=(0, shape[1]), ylim=(shape[0], 0), xlabel="fast, px", ylabel="slow, px", aspect="equal")
    axes.set_title("left over: observed less predicted")


def _words(found: DetectorRefinement, detector: DetectorHeader) -> Iterator[str]:
    x, y = found.shift
    sigma = max(*found.shift_sigma, 0.01)
    where = f"({detector.beam_center_x:.2f}, {detector.beam_center_y:.2f})"
    yield from _words_of_panels(found)
    if found.is_shift_clear and not found.panels:
        yield (
            f"the beam centre is off by ({x:+.2f}, {y:+.2f}) ± {sigma:.2f} px: it is at "
            f"({found.beam_center[0]:.2f}, {found.beam_center[1]:.2f}), not {where}; reprocess with it"
        )
    elif not found.panels:
        yield f"the beam centre {where} is right within {max(3 * sigma, 0.05):.2f} px"
    yield from _words_of_distance(found, detector)
    if found.largest_residual > _NOTABLE_PX:
        yield (
            f"a region of the detector is off by {found.largest_residual:.2f} px from the rest: a displaced module, a "
            "tilt, or a beam that is not at right angles; look at the picture"
        )


def _words_of_distance(found: DetectorRefinement, detector: DetectorHeader) -> Iterator[str]:
    if found.distance is not None:
        sigma = 1e3 * max(3 * found.distance_scale_sigma, 1e-4) * detector.detector_distance
        where = f"{1e3 * detector.detector_distance:.3f} mm"
        yield (
            f"by the cell that is trusted the detector is {1e3 * found.distance:.3f} ± {sigma / 3:.3f} mm away, not "
            f"{where} ({100 * (found.distance_scale - 1):+.3f} %); reprocess with it"
            if found.is_distance_clear
            else f"by the cell that is trusted the distance, {where}, is right within {sigma:.3f} mm"
        )
    elif abs(found.cell_scale - 1) > max(_NOTABLE_SCALE, 3 * found.cell_scale_sigma):
        yield (
            f"the cell comes out {100 * (found.cell_scale - 1):+.2f} % against the one given: distance unverified, for "
            "a detector farther away by as much would look the same; compare with a powder of known lattice, or trust "
            "the cell (--trust-cell)"
        )


def _words_of_panels(found: DetectorRefinement) -> Iterator[str]:
    clear = [panel for panel in found.panels if panel.is_clear]
    for panel in clear:
        fast, slow = panel.fast or 0.0, panel.slow or 0.0
        sigma = max(panel.sigma_fast or 0.0, panel.sigma_slow or 0.0, 0.01)
        yield (
            f"panel {panel.name} is displaced by ({fast:+.2f}, {slow:+.2f}) ± {sigma:.2f} px "
            "along its fast and slow axes"
        )
    few = [panel.name for panel in found.panels if panel.fast is None]
    if few:
        yield f"too few spots to place {', '.join(few)}: moved with the others"
    if clear:
        yield "write the panels found with --geometry or --write, and reprocess with them"
    elif found.panels and not few:
        yield f"all {len(found.panels)} panels are where they were taken to be, within three standard deviations"


def _newest_with_crystals(processing: Processing) -> int:
    """The newest geometry snapshot with crystals for a refinement; the one with most of them where none has enough."""
    n_indexed: Counter[int] = Counter()
    for chunk in processing.chunks():
        n_indexed[chunk.geometry] += chunk.n_indexed
    enough = [number for number, n in n_indexed.items() if n >= FEWEST_CRYSTALS]
    return max(enough) if enough else max(n_indexed, key=lambda number: n_indexed[number], default=0)


def _crystals(processing: Processing, cell: UnitCell, geometry: int) -> Iterator[CrystalSpots]:
    try:
        tables = [processing.table(name, geometry=geometry) for name in ("crystals", "peaks")]
    except KeyError:
        raise BadRecipe(
            f"processing {processing.name} has no crystals; put find_peaks and index in its recipe"
        ) from None
    return crystal_spots(tables[0], tables[1], cell)


def crystal_spots(crystals: pa.Table, peaks: pa.Table, cell: UnitCell) -> Iterator[CrystalSpots]:
    """The crystals of a table with the spots of their frames; both tables in the order of frames."""
    index = np.unique(crystals["frame_index"].to_numpy())
    x, y = peaks["x"].to_numpy(), peaks["y"].to_numpy()
    for (at, n), (first, n_peaks) in zip(rows_by_frame(crystals, index), rows_by_frame(peaks, index), strict=True):
        mine = slice(first, first + n_peaks)
        for row in crystals.slice(at, n).to_pylist():
            yield CrystalSpots(read_crystal(row, cell), x[mine], y[mine])
