"""Where each pixel stands in the laboratory, and back.

One model everywhere: panels in the NeXus/McStas frame (z along the beam, y up, x to the
left looking along the beam), lengths in m. A panel has an outer corner of its first pixel
and two pixel vectors; pixel positions are measured from that corner, so pixel i spans i to
i + 1 and its centre is i + 0.5. The usual mounting is fast = -x, slow = -y.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from storage.errors import BadFrame
from storage.models import DetectorHeader
from storage.photons import energy_from_wavelength, wavelength_from_energy
from storage.sensor import Sensor, absorption_of

__all__ = ["Geometry", "Panel", "override_detector"]

log = logging.getLogger("nearline.geometry")

_FLAT = Sensor()


def override_detector(detector: DetectorHeader, values: Mapping[str, float | None]) -> DetectorHeader:
    """A header with some values replaced; energy and wavelength follow each other. None leaves a value.

    Raises
    ------
    BadFrame : a field that the header does not have, or a value it cannot have.
    """
    given = {name: value for name, value in values.items() if value is not None}
    unknown = sorted(set(given) - set(DetectorHeader.model_fields))
    if unknown:
        raise BadFrame(
            f"no header field {', '.join(unknown)}; there are {', '.join(sorted(DetectorHeader.model_fields))}"
        )
    if given.get("incident_wavelength"):
        given.setdefault("incident_energy", energy_from_wavelength(given["incident_wavelength"]))
    elif given.get("incident_energy"):
        given["incident_wavelength"] = wavelength_from_energy(given["incident_energy"])
    try:
        return DetectorHeader.model_validate(detector.model_dump() | given)
    except ValidationError as error:
        problems = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise BadFrame(f"impossible detector values: {problems}") from None


def _sensor(detector: DetectorHeader, wavelength: float) -> Sensor:
    if not detector.sensor_thickness:
        return _FLAT
    try:
        return Sensor(detector.sensor_thickness, absorption_of(detector.sensor_material, wavelength))
    except BadFrame as error:
        log.warning("no parallax is taken into account: %s", error)
        return _FLAT


@dataclass(frozen=True, slots=True)
class Panel:
    """A flat rectangle of pixels.

    corner : (x, y, z) of the outer corner of pixel (0, 0), m.
    fast, slow : vectors of one pixel step along each array axis, m.
    shape : (slow, fast) pixels.
    origin : (slow, fast) of the panel's first pixel in the frame's array.
    """

    name: str
    corner: tuple[float, float, float]
    fast: tuple[float, float, float]
    slow: tuple[float, float, float]
    shape: tuple[int, int]
    origin: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A detector in the beam: its panels, the wavelength in Å, and the sensor that oblique rays enter."""

    panels: tuple[Panel, ...]
    wavelength: float
    sensor: Sensor = _FLAT

    @classmethod
    def from_header(cls, detector: DetectorHeader, shape: tuple[int, int]) -> "Geometry":
        """The flat detector that a header describes, facing the beam; with parallax if it names a thickness.

        Raises
        ------
        BadFrame : distance or wavelength is zero, that is, the beamline never set it.
        """
        wavelength = detector.incident_wavelength
        if not wavelength and detector.incident_energy:
            wavelength = wavelength_from_energy(detector.incident_energy)
        if not wavelength or not detector.detector_distance:
            raise BadFrame(
                f"geometry is unknown: detector_distance is {detector.detector_distance} m and "
                f"incident_wavelength {detector.incident_wavelength} Å; set them at the detector or in the recipe"
            )
        px, py = detector.pixel_size_x, detector.pixel_size_y
        corner = (detector.beam_center_x * px, detector.beam_center_y * py, detector.detector_distance)
        panel = Panel("p0", corner, (-px, 0.0, 0.0), (0.0, -py, 0.0), shape)
        return cls((panel,), wavelength, _sensor(detector, wavelength))

    def lab_position(self, x: np.ndarray, y: np.ndarray, panel: int = 0) -> np.ndarray:
        """Laboratory positions, (…, 3) m, of points (x fast, y slow) px from the corner of a panel."""
        p = self.panels[panel]
        x, y = np.asarray(x, float)[..., None], np.asarray(y, float)[..., None]
        return np.asarray(p.corner) + x * np.asarray(p.fast) + y * np.asarray(p.slow)

    def scattering_vector(self, x: np.ndarray, y: np.ndarray, panel: int = 0) -> np.ndarray:
        """q = (k_out - k_in), (…, 3) in 1/Å without 2π, |q| = 1/d; of where a spot appears."""
        r = self.lab_position(x, y, panel)
        if self.sensor.thickness:
            # The direction is that of the apparent place: wrong by 1e-3 of a small correction.
            r = r - self._parallax(r, panel)
        r = r / np.linalg.norm(r, axis=-1, keepdims=True)
        r[..., 2] -= 1.0
        return r / self.wavelength

    def project(self, q: np.ndarray, panel: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Where the spots of rays k = q + z/λ appear on a panel's plane: (x fast, y slow), px; NaN where they miss.

        Solves corner + x fast + y slow = µ k for (x, y, 1/µ); only forward rays (µ > 0) count.
        """
        p = self.panels[panel]
        k = np.array(q, float, copy=True)
        k[..., 2] += 1.0 / self.wavelength
        basis = np.linalg.inv(np.column_stack([p.corner, p.fast, p.slow]))
        solved = k @ basis.T
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y = solved[..., 1] / solved[..., 0], solved[..., 2] / solved[..., 0]
        forward = solved[..., 0] > 0
        if self.sensor.thickness:
            moved = self._parallax(k, panel)
            x = x + moved @ np.asarray(p.fast) / np.dot(p.fast, p.fast)
            y = y + moved @ np.asarray(p.slow) / np.dot(p.slow, p.slow)
        return np.where(forward, x, np.nan), np.where(forward, y, np.nan)

    def _parallax(self, rays: np.ndarray, panel: int) -> np.ndarray:
        """How far in a panel's plane the spots of rays (…, 3) of any length appear from where they enter, (…, 3) m."""
        p = self.panels[panel]
        normal = np.cross(p.fast, p.slow)
        normal = normal / np.linalg.norm(normal)
        direction = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
        cosine = direction @ normal
        along = direction - cosine[..., None] * normal
        return np.asarray(self.sensor.mean_path(np.abs(cosine))[..., None] * along)

    def radius_px(self, panel: int = 0) -> np.ndarray:
        """Distance of each pixel's centre from the beam axis, (slow, fast), in fast-pixel widths."""
        p = self.panels[panel]
        y, x = np.mgrid[0 : p.shape[0], 0 : p.shape[1]] + 0.5
        r = self.lab_position(x, y, panel)
        return (np.hypot(r[..., 0], r[..., 1]) / np.linalg.norm(p.fast)).astype(np.float32)
