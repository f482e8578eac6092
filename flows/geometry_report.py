"""What a geometry file, a run or a processing says of its detector, in numbers; and the same as another file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from flows.comparison import open_processing
from flows.run_tally import header_of
from storage.errors import BadFrame, BadGeometry
from storage.geometry import Geometry, override_detector
from storage.geometry_formats import SUFFIXES, read_geometry
from storage.models import DetectorHeader, Record
from storage.panels import DetectorGeometry, Panel
from storage.photons import energy_from_wavelength
from streaming.retrieval import open_run
from tasks.recipe import load_recipe

__all__ = ["GeometryReport", "PlacedDetector", "detector_in", "report_of"]

Rectangles = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class PlacedDetector:
    """A detector in the beam, and what is said beside it. geometry : None while distance or wavelength is unknown."""

    source: str
    header: DetectorHeader
    shape: tuple[int, int]
    bad: Rectangles = ()
    notes: tuple[str, ...] = ()

    @property
    def geometry(self) -> Geometry:
        """BadFrame if distance or wavelength is unknown."""
        return Geometry.from_header(self.header, self.shape)


class PanelReport(Record):
    """One panel: where it is, and how it stands."""

    name: str
    origin: tuple[int, int] = Field(description="(slow, fast) of its first pixel in the frame's array")
    shape: tuple[int, int] = Field(description="(slow, fast), px")
    corner: tuple[float, float, float] = Field(description="m, x to the left along the beam, y up, z along the beam")
    fast: tuple[float, float, float] = Field(description="m, one pixel along the fast axis")
    slow: tuple[float, float, float] = Field(description="m, one pixel along the slow axis")
    tilt_deg: float = Field(description="°, between its normal and the beam")


class GeometryReport(Record):
    """A detector in the beam, in numbers."""

    source: str
    shape: tuple[int, int] = Field(description="(slow, fast) of the frame's array, px")
    n_panels: int
    distance: float | None = Field(description="m along the beam to the central panel; None if unknown")
    wavelength: float | None = Field(description="Å; None if unknown")
    energy: float | None = Field(description="eV; None if unknown")
    beam_center_x: float = Field(description="px along the fast axis, from the frame's corner")
    beam_center_y: float = Field(description="px along the slow axis")
    pixel_size_x: float = Field(description="m")
    pixel_size_y: float = Field(description="m")
    tilt_deg: float = Field(description="° of the central panel")
    d_edge: float | None = Field(description="Å at the largest full circle; None if unknown, or the beam is off it")
    d_corner: float | None = Field(description="Å at the farthest corner; None if unknown")
    n_bad: int = Field(description="pixels off every panel or in a bad region")
    panels: tuple[PanelReport, ...]
    notes: tuple[str, ...]


def detector_in(
    source: str, *, service: str | None = None, root: Path | None = None, overrides: dict[str, float] | None = None
) -> PlacedDetector:
    """The detector of a geometry file, of a run, or of a run's processing (``lyso-2026/17:p2``).

    Parameters
    ----------
    overrides : header values that go before what is found, such as detector_distance in m.

    Raises
    ------
    BadGeometry : the file cannot be read, or the run has no detector. RunNotFound : there is no such run.
    """
    given: dict[str, Any] = {name: value for name, value in (overrides or {}).items() if value is not None}
    if Path(source).suffix.lower() in SUFFIXES:
        file = read_geometry(Path(source))
        header = override_detector(DetectorHeader(sensor_thickness=0.0), given | {"geometry": file})
        return PlacedDetector(source, header, file.shape, file.bad, file.notes)
    if ":" in Path(source).name:
        processing = open_processing(source, service=service, root=str(root) if root else None)
        stream, known = header_of(processing), load_recipe(dict(processing.manifest.recipe)).geometry
    else:
        stream, known = open_run(source, service=service, root=root).detector.header, None
    if stream.detector is None or len(stream.image_shape) != 2:
        raise BadGeometry(f"{source} has frames of shape {stream.shape} and no detector that places their pixels")
    bad, notes = (known.bad, known.notes) if known else ((), ())
    shape = (stream.image_shape[0], stream.image_shape[1])
    return PlacedDetector(source, _overridden(stream.detector, given), shape, bad, notes)


def _overridden(detector: DetectorHeader, given: dict[str, Any]) -> DetectorHeader:
    if detector.panels and "detector_distance" in given:
        known = DetectorGeometry(panels=detector.panels, distance=detector.detector_distance)
        return override_detector(detector, given | {"geometry": known})
    return override_detector(detector, given)


def report_of(placed: PlacedDetector) -> GeometryReport:
    """The detector in numbers; those that need a distance or wavelength are None where it is unknown."""
    header, shape = placed.header, placed.shape
    try:
        geometry = placed.geometry
    except BadFrame:
        geometry = None
    panels = geometry.panels if geometry else _panels_alone(header, shape)
    central = geometry or Geometry(panels, 1.0)
    x, y = central.beam_center
    is_inside = 0 <= x <= shape[1] and 0 <= y <= shape[0]
    wavelength = header.incident_wavelength or None
    return GeometryReport(
        source=placed.source,
        shape=shape,
        n_panels=len(panels),
        distance=header.detector_distance or None,
        wavelength=wavelength,
        energy=energy_from_wavelength(wavelength) if wavelength else None,
        beam_center_x=x,
        beam_center_y=y,
        pixel_size_x=header.pixel_size_x,
        pixel_size_y=header.pixel_size_y,
        tilt_deg=central.tilt_deg,
        d_edge=1 / geometry.q_at_edge if geometry and is_inside else None,
        d_corner=1 / geometry.q_at_corner if geometry else None,
        n_bad=int(DetectorGeometry(panels=panels, bad=placed.bad).mask(shape).sum()),
        panels=tuple(_panel_report(panel) for panel in panels),
        notes=placed.notes,
    )


def _panels_alone(header: DetectorHeader, shape: tuple[int, int]) -> tuple[Panel, ...]:
    """Panels of a detector at an unknown distance, or in an unknown beam: their z means nothing."""
    known = override_detector(header, {"incident_wavelength": 1.0})
    if not known.detector_distance:
        known = known.model_copy(update={"detector_distance": 1.0})
    return Geometry.from_header(known, shape).panels


def _panel_report(panel: Panel) -> PanelReport:
    normal = np.cross(panel.fast, panel.slow)
    return PanelReport(
        name=panel.name,
        origin=panel.origin,
        shape=panel.shape,
        corner=panel.corner,
        fast=panel.fast,
        slow=panel.slow,
        tilt_deg=float(np.degrees(np.arctan2(np.hypot(normal[0], normal[1]), abs(normal[2])))),
    )
