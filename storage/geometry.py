"""Where each pixel stands in the laboratory, and back.

One model everywhere: panels in the NeXus/McStas frame (z along the beam, y up, x to the
left looking along the beam), lengths in m. A panel has an outer corner of its first pixel
and two pixel vectors; pixel positions are measured from that corner, so pixel i spans i to
i + 1 and its centre is i + 0.5. The usual mounting is fast = -x, slow = -y.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import ValidationError

from storage.errors import BadFrame
from storage.models import DetectorHeader
from storage.panels import DetectorGeometry, Panel, check_panels
from storage.photons import energy_from_wavelength, wavelength_from_energy
from storage.sensor import Sensor, absorption_of

__all__ = ["Geometry", "Panel", "override_detector"]

log = logging.getLogger("nearline.geometry")

_FLAT = Sensor()


def override_detector(
    detector: DetectorHeader, values: Mapping[str, float | DetectorGeometry | None]
) -> DetectorHeader:
    """A header with some values replaced; energy and wavelength follow each other. None leaves a value.

    ``geometry`` brings the panels, and the wavelength and sensor where it knows them; a ``detector_distance`` beside it
    is in place of the distance it states (CrystFEL's ``clen``), and moves all panels along the beam.

    Raises
    ------
    BadFrame : a field that the header does not have, a value it cannot have, or one that contradicts the geometry.
    """
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    geometry = given.pop("geometry", None)
    if geometry is not None:
        given = _as_header(geometry, detector, given)
    elif "panels" in given:
        raise BadFrame("panels cannot be given in a recipe; name a file of them: detector: {geometry: panels.geom}")
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


def _as_header(geometry: DetectorGeometry, detector: DetectorHeader, given: Mapping[str, Any]) -> dict[str, Any]:
    """Header values that place the panels of a geometry; ``given`` are those that go before it."""
    twice = sorted({"beam_center_x", "beam_center_y", "pixel_size_x", "pixel_size_y", "panels"} & set(given))
    if twice:
        raise BadFrame(
            f"{', '.join(twice)} beside geometry {geometry.file or '(panels)'}, which says where every pixel is; "
            "leave them out, or the geometry"
        )
    found = dict(given)
    if geometry.wavelength and not {"incident_wavelength", "incident_energy"} & set(given):
        found["incident_wavelength"] = geometry.wavelength
    for name in ("sensor_thickness", "sensor_material"):
        if getattr(geometry, name) is not None:
            found.setdefault(name, getattr(geometry, name))
    distance = given.get("detector_distance")
    if distance is None:
        distance = geometry.distance if geometry.distance is not None else detector.detector_distance
    by = distance - (geometry.distance or 0.0)
    panels = tuple(panel.moved((0.0, 0.0, by)) if by else panel for panel in geometry.panels)
    placed = Geometry(panels, 1.0)
    nearest = panels[placed.central_panel]
    x, y = placed.beam_center
    # A distance of zero says, as in any header, that nobody knows it.
    known = distance or geometry.distance is not None
    return found | {
        "panels": panels,
        "detector_distance": placed.distance if known else 0.0,
        "beam_center_x": x,
        "beam_center_y": y,
        "pixel_size_x": float(np.linalg.norm(nearest.fast)),
        "pixel_size_y": float(np.linalg.norm(nearest.slow)),
    }


def _sensor(detector: DetectorHeader, wavelength: float) -> Sensor:
    if not detector.sensor_thickness:
        return _FLAT
    try:
        return Sensor(detector.sensor_thickness, absorption_of(detector.sensor_material, wavelength))
    except BadFrame as error:
        log.warning("no parallax is taken into account: %s", error)
        return _FLAT


@dataclass(frozen=True, slots=True)
class Geometry:
    """A detector in the beam: its panels, the wavelength in Å, and the sensor that oblique rays enter."""

    panels: tuple[Panel, ...]
    wavelength: float
    sensor: Sensor = _FLAT

    @classmethod
    def from_header(cls, detector: DetectorHeader, shape: tuple[int, int]) -> "Geometry":
        """The panels of a header, or the flat detector it describes, facing the beam; with parallax if it names a
        thickness.

        Raises
        ------
        BadFrame : distance or wavelength is zero, that is, the beamline never set it; or a panel is outside the frame.
        """
        wavelength = detector.incident_wavelength
        if not wavelength and detector.incident_energy:
            wavelength = wavelength_from_energy(detector.incident_energy)
        if not wavelength or not detector.detector_distance:
            raise BadFrame(
                f"geometry is unknown: detector_distance is {detector.detector_distance} m and "
                f"incident_wavelength {detector.incident_wavelength} Å; set them at the detector or in the recipe"
            )
        if detector.panels:
            check_panels(detector.panels, shape)
            return cls(detector.panels, wavelength, _sensor(detector, wavelength))
        px, py = detector.pixel_size_x, detector.pixel_size_y
        corner = (detector.beam_center_x * px, detector.beam_center_y * py, detector.detector_distance)
        panel = Panel("p0", corner, (-px, 0.0, 0.0), (0.0, -py, 0.0), shape)
        return cls((panel,), wavelength, _sensor(detector, wavelength))

    @property
    def is_one_array(self) -> bool:
        """Whether one panel begins with the frame, so that its positions are the frame's."""
        return len(self.panels) == 1 and self.panels[0].origin == (0, 0)

    @property
    def central_panel(self) -> int:
        """Number of the panel that the direct beam meets, or passes at the smallest distance of its edges."""
        return _central(self.panels) if len(self.panels) > 1 else 0

    @property
    def beam_center(self) -> tuple[float, float]:
        """(x, y) px in the frame's array where the direct beam meets the plane of the central panel; NaN if nowhere."""
        number = self.central_panel
        (y0, x0), (x, y) = self.panels[number].origin, _beam_on(self.panels[number])
        return x + x0, y + y0

    @property
    def distance(self) -> float:
        """From the sample to the plane of the central panel along the beam, m."""
        p = self.panels[self.central_panel]
        if p.fast[2] == p.slow[2] == 0:
            return p.corner[2]
        normal = np.cross(p.fast, p.slow)
        return float(np.dot(p.corner, normal) / normal[2])

    @property
    def tilt_deg(self) -> float:
        """Angle between the beam and the normal of the central panel, °."""
        p = self.panels[self.central_panel]
        normal = np.cross(p.fast, p.slow)
        return float(np.degrees(np.arctan2(np.hypot(normal[0], normal[1]), abs(normal[2]))))

    @property
    def q_at_corner(self) -> float:
        """|q| at the farthest corner of any panel, 1/Å."""
        corners = []
        for number, panel in enumerate(self.panels):
            x, y = np.array([0, panel.shape[1], 0, panel.shape[1]]), np.array([0, 0, panel.shape[0], panel.shape[0]])
            corners.append(np.linalg.norm(self.scattering_vector(x, y, number), axis=-1).max())
        return float(max(corners))

    @property
    def q_at_edge(self) -> float:
        """|q| of the largest full circle around the beam in the frame's array, 1/Å.

        Of several panels the rectangle around them counts, as if the central one went on to its edges.
        """
        x, y = self.beam_center
        slow, fast = (max(p.end[axis] for p in self.panels) for axis in (0, 1))
        edges = np.array([[0, y], [fast, y], [x, 0], [x, slow]], float)
        q = self.q_at(edges[:, 0], edges[:, 1], np.full(4, self.central_panel))
        return float(np.linalg.norm(q, axis=1).min())

    def panel_at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(…,) number of the panel at points (x fast, y slow) px of the frame's array; -1 off every panel.

        A point on the edge between two is on that of which it begins a pixel; the far edges belong to their panel.
        """
        x, y = np.asarray(x, float), np.asarray(y, float)
        found = np.full(np.broadcast(x, y).shape, -1)
        for number, (y0, x0, y1, x1) in enumerate(_bounds(self.panels)):
            inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
            found[inside & ((found < 0) | ((x < x1) & (y < y1)))] = number
        return found

    def lab_at(self, x: np.ndarray, y: np.ndarray, panel: np.ndarray | None = None) -> np.ndarray:
        """Laboratory positions, (…, 3) m, of points (x fast, y slow) px of the frame's array; NaN off every panel.

        panel : (…,) as `panel_at` gives it, where it is known.
        """
        if self.is_one_array:
            return self.lab_position(x, y)
        x, y = np.asarray(x, float), np.asarray(y, float)
        panel = self.panel_at(x, y) if panel is None else np.asarray(panel)
        corner, fast, slow = _vectors(self.panels)
        r = np.asarray(corner[panel] + x[..., None] * fast[panel] + y[..., None] * slow[panel])
        r[panel < 0] = np.nan
        return r

    def q_at(self, x: np.ndarray, y: np.ndarray, panel: np.ndarray | None = None) -> np.ndarray:
        """`scattering_vector` of where spots appear in the frame's array, (…, 3) in 1/Å; NaN off every panel."""
        if self.is_one_array:
            return self.scattering_vector(x, y)
        panel = self.panel_at(x, y) if panel is None else np.asarray(panel)
        r = self.lab_at(x, y, panel)
        if self.sensor.thickness:
            r = r - _parallax_of(r, _normals(self.panels)[panel], self.sensor)
        r = r / np.linalg.norm(r, axis=-1, keepdims=True)
        r[..., 2] -= 1.0
        return np.asarray(r / self.wavelength)

    def place(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where rays k = q + z/λ, q (n, 3) in 1/Å, are seen in the frame's array: only where a panel is.

        Returns
        -------
        row, x, y, panel : (m,) number of the ray, px of the frame's array, and number of the panel. In the order of
            panels, then rays; a ray may be on several panels where one stands in front of another.
        """
        q = np.asarray(q, float)
        if len(self.panels) == 1:
            (panel,), (x, y) = self.panels, self.project(q)
            rows = np.flatnonzero((x >= 0) & (x < panel.shape[1]) & (y >= 0) & (y < panel.shape[0]))
            return rows, x[rows] + panel.origin[1], y[rows] + panel.origin[0], np.zeros(len(rows), int)
        rows, numbers = self._candidates(q)
        x, y = self._project_onto(q[rows], numbers)
        shape = np.array([p.shape for p in self.panels])[numbers]
        on = (x >= 0) & (x < shape[:, 1]) & (y >= 0) & (y < shape[:, 0])
        rows, numbers, origin = rows[on], numbers[on], np.array([p.origin for p in self.panels])[numbers[on]]
        return rows, x[on] + origin[:, 1], y[on] + origin[:, 0], numbers

    def _candidates(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (ray, panel) that may meet: those whose slopes x/z and y/z are within the panel's."""
        if len(self.panels) == 1:
            return np.arange(len(q)), np.zeros(len(q), int)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = q[:, :2] / (q[:, 2:] + 1.0 / self.wavelength)
        rows = [
            np.flatnonzero((slope[:, 0] >= x0) & (slope[:, 0] <= x1) & (slope[:, 1] >= y0) & (slope[:, 1] <= y1))
            if np.isfinite(x0)
            else np.arange(len(q))
            for x0, x1, y0, y1 in _slopes(self)
        ]
        return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(r) for r in rows])

    def project_at(self, q: np.ndarray, panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `project`, each ray (n, 3) onto the plane of a panel (n,) of its own, in px of the frame's array."""
        origin = np.array([p.origin for p in self.panels])[panel]
        x, y = self._project_onto(np.asarray(q, float), np.asarray(panel))
        return x + origin[:, 1], y + origin[:, 0]

    def px_per_ray(self, q: np.ndarray, panel: np.ndarray) -> np.ndarray:
        """Derivatives (n, 2, 3), px per 1/Å, of `project_at`'s x and y by the components of q; without parallax."""
        k = np.asarray(q, float) + np.array([0.0, 0.0, 1.0 / self.wavelength])
        inverse = _inverses(self.panels)[panel]
        solved = np.einsum("nij,nj->ni", inverse, k)
        at = solved[:, 1:] / solved[:, :1]
        return np.asarray((inverse[:, 1:] - at[:, :, None] * inverse[:, :1]) / solved[:, :1, None])

    def _project_onto(self, q: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `project`, each ray onto the plane of a panel of its own."""
        if len(self.panels) == 1:
            return self.project(q)
        k = np.array(q, float, copy=True)
        k[..., 2] += 1.0 / self.wavelength
        solved = np.einsum("nij,nj->ni", _inverses(self.panels)[numbers], k)
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y = solved[:, 1] / solved[:, 0], solved[:, 2] / solved[:, 0]
        if self.sensor.thickness:
            _, fast, slow = (values[numbers] for values in _vectors(self.panels))
            moved = _parallax_of(k, _normals(self.panels)[numbers], self.sensor)
            x = x + (moved * fast).sum(axis=1) / (fast**2).sum(axis=1)
            y = y + (moved * slow).sum(axis=1) / (slow**2).sum(axis=1)
        forward = solved[:, 0] > 0
        return np.where(forward, x, np.nan), np.where(forward, y, np.nan)

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
        """Distance of each pixel's centre from the beam axis, (slow, fast), in fast-pixel widths.

        On tilted panels, and on several, that of its ray in the plane at the detector's distance, so that a ring is a
        scattering angle; infinite where a ray goes backwards.
        """
        p = self.panels[panel]
        y, x = np.mgrid[0 : p.shape[0], 0 : p.shape[1]] + 0.5
        r = self.lab_position(x, y, panel)
        across = np.hypot(r[..., 0], r[..., 1])
        if len(self.panels) > 1 or p.fast[2] or p.slow[2]:
            with np.errstate(divide="ignore"):
                across = np.where(r[..., 2] > 0, across * (self.distance / r[..., 2]), np.inf)
        return (across / np.linalg.norm(p.fast)).astype(np.float32)


def _beam_on(panel: Panel) -> tuple[float, float]:
    """(x, y) px of a panel where the direct beam meets its plane; NaN where it does not."""
    across = np.array([panel.fast[:2], panel.slow[:2]]).T
    if abs(np.linalg.det(across)) < 1e-12 * np.linalg.norm(panel.fast) * np.linalg.norm(panel.slow):
        return float("nan"), float("nan")
    x, y = np.linalg.solve(across, -np.asarray(panel.corner[:2]))
    return float(x), float(y)


@lru_cache(maxsize=16)
def _central(panels: tuple[Panel, ...]) -> int:
    """As `Geometry.central_panel`."""
    outside = []
    for panel in panels:
        (x, y), (slow, fast) = _beam_on(panel), panel.shape
        off = np.hypot(max(-x, x - fast, 0.0), max(-y, y - slow, 0.0)) * np.linalg.norm(panel.fast)
        outside.append(off if np.isfinite(x) else np.inf)
    return int(np.argmin(outside))


def _parallax_of(rays: np.ndarray, normal: np.ndarray, sensor: Sensor) -> np.ndarray:
    """`Geometry._parallax` with a normal (…, 3) for each ray."""
    direction = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    cosine = (direction * normal).sum(axis=-1)
    along = direction - cosine[..., None] * normal
    return np.asarray(sensor.mean_path(np.abs(cosine))[..., None] * along)


@lru_cache(maxsize=16)
def _bounds(panels: tuple[Panel, ...]) -> list[tuple[int, int, int, int]]:
    return [(*p.origin, *p.end) for p in panels]


@lru_cache(maxsize=16)
def _vectors(panels: tuple[Panel, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(panel, 3) each, m: where the frame's own corner would be if the panel went on to it; fast; slow."""
    fast, slow = np.array([p.fast for p in panels]), np.array([p.slow for p in panels])
    origin = np.array([p.origin for p in panels], float)
    corner = np.array([p.corner for p in panels]) - origin[:, 1:] * fast - origin[:, :1] * slow
    return corner, fast, slow


@lru_cache(maxsize=16)
def _normals(panels: tuple[Panel, ...]) -> np.ndarray:
    normal = np.array([np.cross(p.fast, p.slow) for p in panels])
    return np.asarray(normal / np.linalg.norm(normal, axis=1, keepdims=True))


@lru_cache(maxsize=16)
def _inverses(panels: tuple[Panel, ...]) -> np.ndarray:
    """(panel, 3, 3): the matrix of `Geometry.project` of each panel."""
    return np.linalg.inv(np.array([np.column_stack([p.corner, p.fast, p.slow]) for p in panels]))


@lru_cache(maxsize=16)
def _slopes(geometry: Geometry) -> list[tuple[float, float, float, float]]:
    """Least and largest x/z, least and largest y/z of each panel, with room for parallax; NaN where z ≤ 0 on it.

    The image of a rectangle in the plane z = 1 is a quadrilateral inside the box of its corners.
    """
    found = []
    for number, panel in enumerate(geometry.panels):
        (slow, fast), x, y = panel.shape, np.array([0.0, 1, 0, 1]), np.array([0.0, 0, 1, 1])
        r = geometry.lab_position(x * fast, y * slow, number)
        reach = np.abs(geometry._parallax(r, number)).max() / np.linalg.norm(panel.fast) if len(r) else 0.0
        reach = 2.0 + 2.0 * reach
        r = geometry.lab_position(x * (fast + 2 * reach) - reach, y * (slow + 2 * reach) - reach, number)
        if (r[:, 2] <= 0).any():
            found.append((np.nan,) * 4)
            continue
        s = r[:, :2] / r[:, 2:]
        found.append((s[:, 0].min(), s[:, 0].max(), s[:, 1].min(), s[:, 1].max()))
    return found
