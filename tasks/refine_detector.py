"""Where the detector truly stands, from the crystals of many frames.

Each crystal was refined with a shift of the detector across the beam of its own, so the beam centre is a matter of
their median. What is left over, place by place on the detector, shows tilted or displaced modules. The distance
cannot be had that way: a detector farther away and a smaller cell put all spots at the same places.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.models import DetectorHeader
from storage.panels import Panel
from tasks.predict_spots import spots_as_seen
from tasks.refine_panels import CrystalSpots, PanelShift, displaced, refine_panels
from tasks.unit_cell import UnitCell

__all__ = ["FEWEST_CRYSTALS", "DetectorRefinement", "refine_detector"]

# Fewer crystals could agree by chance.
FEWEST_CRYSTALS = 10
_FEWEST_SPOTS = 20
_TOLERANCE = 0.25
_REGIONS = 6
# Standard deviation from the median absolute deviation of a normal law.
_MAD = 1.4826
_CLEAR = 3.0


@dataclass(frozen=True)
class DetectorRefinement:
    """What the crystals say of the detector; x along the fast axis, y along the slow one.

    shift, shift_sigma : (x, y) px, of the beam centre against the one assumed, and its standard deviation.
    beam_center : (x, y) px, the new one.
    cell_scale, cell_scale_sigma : refined edges over those given, the mean of the three; and its standard deviation.
    residuals : (rows, columns, 2) px, observed less predicted, the median of each region of the detector once the shift
        is taken out; NaN where there are too few spots.
    n_in_region : (rows, columns).
    shifts : (n_crystals, 2) px, of each crystal.
    panels : where those of a geometry of several are, against where they were taken to be; each includes the shift of
        all. moved : the panels of the geometry in their new places; empty for a flat detector that a header describes.
    """

    n_crystals: int
    n_spots: int
    shift: tuple[float, float]
    shift_sigma: tuple[float, float]
    beam_center: tuple[float, float]
    cell_scale: float
    cell_scale_sigma: float
    residuals: np.ndarray
    n_in_region: np.ndarray
    shifts: np.ndarray
    panels: tuple[PanelShift, ...] = ()
    moved: tuple[Panel, ...] = ()

    @property
    def is_clear(self) -> bool:
        """Whether the beam centre, or a panel of several, is more than three standard deviations and 0.05 px away."""
        pairs = zip(self.shift, self.shift_sigma, strict=True)
        is_off = any(abs(value) > max(_CLEAR * sigma, 0.05) for value, sigma in pairs)
        return any(panel.is_clear for panel in self.panels) if self.panels else is_off

    @property
    def largest_residual(self) -> float:
        """px, of the region that is off by most; NaN without any."""
        size = np.hypot(*np.moveaxis(self.residuals, -1, 0))
        return float(np.nanmax(size)) if np.isfinite(size).any() else float("nan")


def refine_detector(
    found: Iterable[CrystalSpots], detector: DetectorHeader, shape: tuple[int, int], cell: UnitCell
) -> DetectorRefinement:
    """Beam centre, panels and residual map from indexed crystals.

    Parameters
    ----------
    detector : as it was assumed when the crystals were indexed. shape : (slow, fast). cell : the one given to indexing.

    Raises
    ------
    BadRecipe : fewer than ten crystals.
    """
    geometry = Geometry.from_header(detector, shape)
    found = list(found) if len(geometry.panels) > 1 else found
    pixel = np.array([detector.pixel_size_x, detector.pixel_size_y])
    shifts, scales, residuals = [], [], []
    for one in found:
        shifts.append(np.array(one.crystal.shift) * detector.detector_distance / pixel)
        scales.append(_scale(one.crystal.cell, cell))
        residuals.append(_residuals(one, geometry))
    if len(shifts) < FEWEST_CRYSTALS:
        raise BadRecipe(f"{len(shifts)} crystals are too few to place a detector by; take frames for {FEWEST_CRYSTALS}")
    shift, sigma = _middle(np.array(shifts))
    scale, scale_sigma = _middle(np.array(scales)[:, None])
    placed = np.concatenate(residuals)
    medians, counts = _by_region(placed, shape)
    panels = refine_panels(found, geometry) if len(geometry.panels) > 1 else ()
    all_of_them = (float(shift[0] * pixel[0]), float(shift[1] * pixel[1]), 0.0)
    moved = (
        displaced(geometry.panels, panels, all_of_them)
        if panels
        else tuple(p.moved(all_of_them) for p in detector.panels)
    )
    beam_center = (detector.beam_center_x + float(shift[0]), detector.beam_center_y + float(shift[1]))
    if moved:
        beam_center = Geometry(moved, geometry.wavelength).beam_center
        shift = np.array(beam_center) - [detector.beam_center_x, detector.beam_center_y]
    return DetectorRefinement(
        n_crystals=len(shifts),
        n_spots=len(placed),
        shift=(float(shift[0]), float(shift[1])),
        shift_sigma=(float(sigma[0]), float(sigma[1])),
        beam_center=beam_center,
        cell_scale=float(scale[0]),
        cell_scale_sigma=float(scale_sigma[0]),
        residuals=medians,
        n_in_region=counts,
        shifts=np.array(shifts),
        panels=panels,
        moved=moved,
    )


def _scale(found: UnitCell, given: UnitCell) -> float:
    return float(np.mean(np.array(found.parameters[:3]) / np.array(given.parameters[:3])))


def _middle(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median of each column, and the standard deviation of it for values that are normal but for outliers."""
    median = np.median(values, axis=0)
    spread = _MAD * np.median(np.abs(values - median), axis=0)
    return median, spread * np.sqrt(np.pi / 2 / len(values))


def _residuals(one: CrystalSpots, geometry: Geometry) -> np.ndarray:
    """(n, 4) px: x, y of the crystal's spots, and observed less predicted there with its own shift taken out."""
    panel = geometry.panel_at(one.x, one.y)
    hkl, off = one.crystal.hkl(geometry.q_at(one.x, one.y, panel), geometry.wavelength)
    is_in = off <= _TOLERANCE
    seen = spots_as_seen(hkl[is_in] @ one.crystal.A.T, one.crystal, geometry)
    x, y = geometry.project_at(seen, panel[is_in])
    return np.column_stack([one.x[is_in], one.y[is_in], one.x[is_in] - x, one.y[is_in] - y])


def _by_region(placed: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    medians, counts = np.full((_REGIONS, _REGIONS, 2), np.nan), np.zeros((_REGIONS, _REGIONS), int)
    for row, column, inside in _regions(placed, shape):
        counts[row, column] = inside.sum()
        if counts[row, column] >= _FEWEST_SPOTS:
            medians[row, column] = np.median(placed[inside, 2:], axis=0)
    return medians, counts


def _regions(placed: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[int, int, np.ndarray]]:
    rows = np.clip(placed[:, 1] * _REGIONS / shape[0], 0, _REGIONS - 1).astype(int)
    columns = np.clip(placed[:, 0] * _REGIONS / shape[1], 0, _REGIONS - 1).astype(int)
    for row in range(_REGIONS):
        for column in range(_REGIONS):
            yield row, column, (rows == row) & (columns == column)
