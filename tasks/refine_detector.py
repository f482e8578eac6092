"""Where the detector truly stands, from the crystals of many frames.

Each crystal was refined with a shift of the detector across the beam of its own, so the beam centre is a matter of
their median. What is left over, place by place on the detector, shows tilted or displaced modules. The distance can
be had only if the cell is known better than it: a detector farther away and a smaller cell put all spots at the same
places.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.models import DetectorHeader
from storage.panels import Panel
from tasks.predict_spots import spots_as_seen
from tasks.refine_lattice import true_q
from tasks.refine_panels import CrystalSpots, PanelShift, displaced, refine_panels
from tasks.unit_cell import UnitCell

__all__ = ["FEWEST_CRYSTALS", "DetectorRefinement", "refine_detector"]

# Fewer crystals could agree by chance.
FEWEST_CRYSTALS = 10
_FEWEST_SPOTS = 20
_NEARLY_ALL = 95.0
_TOLERANCE = 0.25
_REGIONS = 6
# Standard deviation from the median absolute deviation of a normal law.
_MAD = 1.4826
_CLEAR = 3.0
# Parts of the distance; less is not told from nothing: 0.05 px, 500 px from the beam.
_CLEAR_SCALE = 1e-4


@dataclass(frozen=True)
class DetectorRefinement:
    """What the crystals say of the detector; x along the fast axis, y along the slow one.

    shift, shift_sigma : (x, y) px, of the beam centre against the one assumed, and its standard deviation.
    beam_center : (x, y) px, the new one.
    cell_scale, cell_scale_sigma : refined edges over those given, the mean of the three; and its standard deviation.
    distance_scale, distance_scale_sigma : the distance at which the spots would be those of the very cell that was
        given, over the one assumed; and its standard deviation.
    distance : m, that distance if the cell is trusted; else None, and everything is left where it is along the beam.
    reach : px from the beam centre, of nearly all spots.
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
    distance_scale: float
    distance_scale_sigma: float
    reach: float
    residuals: np.ndarray
    n_in_region: np.ndarray
    shifts: np.ndarray
    panels: tuple[PanelShift, ...] = ()
    moved: tuple[Panel, ...] = ()
    distance: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether beam centre, a panel of several, or the distance is more than three standard deviations away."""
        return self.is_distance_clear or self.is_shift_clear

    @property
    def is_shift_clear(self) -> bool:
        """Whether the beam centre, or a panel of several, is more than three standard deviations and 0.05 px away."""
        pairs = zip(self.shift, self.shift_sigma, strict=True)
        is_off = any(abs(value) > max(_CLEAR * sigma, 0.05) for value, sigma in pairs)
        return any(panel.is_clear for panel in self.panels) if self.panels else is_off

    @property
    def is_distance_clear(self) -> bool:
        """Whether the distance differs by more than three standard deviations and 0.01 %, by a cell that is trusted."""
        limit = max(_CLEAR * self.distance_scale_sigma, _CLEAR_SCALE)
        return self.distance is not None and abs(self.distance_scale - 1) > limit

    @property
    def distance_shift(self) -> float:
        """px, by which the outer spots are displaced because of the distance; 0 if that is left alone."""
        return abs(self.distance_scale - 1) * self.reach if self.is_distance_clear else 0.0

    @property
    def largest_residual(self) -> float:
        """px, of the region that is off by most; NaN without any."""
        size = np.hypot(*np.moveaxis(self.residuals, -1, 0))
        return float(np.nanmax(size)) if np.isfinite(size).any() else float("nan")


def refine_detector(
    found: Iterable[CrystalSpots],
    detector: DetectorHeader,
    shape: tuple[int, int],
    cell: UnitCell,
    *,
    trust_cell: bool = False,
) -> DetectorRefinement:
    """Beam centre, panels and residual map from indexed crystals; the distance too if the cell is trusted.

    Parameters
    ----------
    detector : as it was assumed when the crystals were indexed. shape : (slow, fast). cell : the one given to indexing.
    trust_cell : it is known better than the distance, which is made to agree with it.

    Raises
    ------
    BadRecipe : fewer than ten crystals.
    """
    geometry = Geometry.from_header(detector, shape)
    found = list(found) if len(geometry.panels) > 1 else found
    pixel = np.array([detector.pixel_size_x, detector.pixel_size_y])
    shifts, scales, farther, residuals = [], [], [], []
    for one in found:
        shifts.append(np.array(one.crystal.shift) * detector.detector_distance / pixel)
        scales.append(_scale(one.crystal.cell, cell))
        hkl, is_in, panel = _indexed(one, geometry)
        farther.append(_farther(one, hkl, is_in, geometry, cell))
        residuals.append(_residuals(one, hkl, is_in, panel, geometry))
    if len(shifts) < FEWEST_CRYSTALS:
        raise BadRecipe(f"{len(shifts)} crystals are too few to place a detector by; take frames for {FEWEST_CRYSTALS}")
    shift, sigma = _middle(np.array(shifts))
    scale, scale_sigma = _middle(np.array(scales)[:, None])
    distance_scale, distance_sigma = (float(v[0]) for v in _middle(_finite(farther)[:, None]))
    distance = distance_scale * detector.detector_distance if trust_cell else None
    along = 0.0 if distance is None else distance - detector.detector_distance
    placed = np.concatenate(residuals)
    medians, counts = _by_region(placed, shape)
    panels = refine_panels(found, geometry) if len(geometry.panels) > 1 else ()
    all_of_them = (float(shift[0] * pixel[0]), float(shift[1] * pixel[1]), along)
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
        distance_scale=distance_scale,
        distance_scale_sigma=distance_sigma,
        reach=float(np.percentile(np.hypot(*(placed[:, :2] - beam_center).T), _NEARLY_ALL)),
        residuals=medians,
        n_in_region=counts,
        shifts=np.array(shifts),
        panels=panels,
        moved=moved,
        distance=distance,
    )


def _scale(found: UnitCell, given: UnitCell) -> float:
    return float(np.mean(np.array(found.parameters[:3]) / np.array(given.parameters[:3])))


def _finite(values: Sequence[float]) -> np.ndarray:
    """Those that are numbers; 1 if none is: a crystal without spots says nothing."""
    kept = np.array([value for value in values if np.isfinite(value)])
    return kept if len(kept) else np.ones(1)


def _middle(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median of each column, and the standard deviation of it for values that are normal but for outliers."""
    median = np.median(values, axis=0)
    spread = _MAD * np.median(np.abs(values - median), axis=0)
    return median, spread * np.sqrt(np.pi / 2 / len(values))


def _indexed(one: CrystalSpots, geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a crystal's spots: indices (n, 3), whether they are the crystal's, and panels."""
    panel = geometry.panel_at(one.x, one.y)
    hkl, off = one.crystal.hkl(geometry.q_at(one.x, one.y, panel), geometry.wavelength)
    return hkl, off <= _TOLERANCE, panel


def _farther(one: CrystalSpots, hkl: np.ndarray, is_in: np.ndarray, geometry: Geometry, cell: UnitCell) -> float:
    """How much farther away the detector were if the crystal had the cell given; NaN without any spot.

    Radius over distance is the tangent of the scattering angle: a line through the origin, of what is seen over what
    the cell has, by least squares. That a still has its spots off the sphere by a little averages out.
    """
    q = geometry.q_at(one.x[is_in], one.y[is_in])
    seen = _tangent(true_q(q, np.asarray(one.crystal.shift), geometry.wavelength), geometry.wavelength)
    given = _tangent(hkl[is_in] @ cell.B.T, geometry.wavelength)
    return float(seen @ given / (given @ given)) if len(given) else float("nan")


def _tangent(q: np.ndarray, wavelength: float) -> np.ndarray:
    """Of the scattering angle 2θ; sin θ = λ |q| / 2."""
    return np.tan(2 * np.arcsin(np.minimum(wavelength * np.linalg.norm(q, axis=1) / 2, 1.0)))


def _residuals(
    one: CrystalSpots, hkl: np.ndarray, is_in: np.ndarray, panel: np.ndarray, geometry: Geometry
) -> np.ndarray:
    """(n, 4) px: x, y of the crystal's spots, and observed less predicted there with its own shift taken out."""
    hkl = hkl[is_in]
    seen = spots_as_seen(hkl @ one.crystal.A.T, one.crystal, geometry)
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
