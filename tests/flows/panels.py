"""A detector of four panels that stand as no header says: each tilted and displaced in its own way."""

from dataclasses import replace

import numpy as np

from storage.geometry import Panel, override_detector
from storage.models import DetectorHeader
from storage.panels import DetectorGeometry
from streaming.simulator.stills import default_detector

SHAPE = (512, 512)
SIZE = 250
# (slow, fast) of each panel's first pixel; twelve pixels between them see nothing.
ORIGINS = ((0, 0), (0, 262), (262, 0), (262, 262))
# px along fast and slow that each is displaced, and degrees by which it is turned about x and y.
MOVED = ((4.0, -5.0), (-6.0, 3.0), (5.0, 6.0), (-3.0, -5.0))
TILTS = ((1.5, -1.0), (-2.0, 1.0), (0.5, 2.5), (-1.0, -1.5))


def flat_header() -> DetectorHeader:
    """As the beamline describes it: one flat detector."""
    return default_detector(SHAPE)


def four_panels(moved=MOVED, tilts=TILTS) -> DetectorGeometry:
    """Where the panels truly stand."""
    header = flat_header()
    px = header.pixel_size_x
    panels = []
    for number, ((y0, x0), shift, tilt) in enumerate(zip(ORIGINS, moved, tilts, strict=True)):
        a, b = np.radians(tilt)
        rotation = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]) @ np.array(
            [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
        )
        fast, slow = rotation @ [-px, 0, 0], rotation @ [0, -px, 0]
        middle = (x0 + SIZE / 2 + shift[0], y0 + SIZE / 2 + shift[1])
        centre = [(header.beam_center_x - middle[0]) * px, (header.beam_center_y - middle[1]) * px]
        corner = np.array([*centre, header.detector_distance]) - SIZE / 2 * (fast + slow)
        panels.append(
            Panel(
                f"q{number}", tuple(corner.tolist()), tuple(fast.tolist()), tuple(slow.tolist()), (SIZE, SIZE), (y0, x0)
            )
        )
    return DetectorGeometry(
        panels=tuple(panels), wavelength=header.incident_wavelength, distance=header.detector_distance
    )


def header_of(geometry: DetectorGeometry) -> DetectorHeader:
    """The header of a detector that stands so."""
    return override_detector(flat_header(), {"geometry": geometry})


def displaced(geometry: DetectorGeometry, number: int, by: tuple[float, float]) -> DetectorGeometry:
    """The same with one panel elsewhere, by (fast, slow) px of its own axes."""
    panels = list(geometry.panels)
    p = panels[number]
    corner = np.array(p.corner) + by[0] * np.array(p.fast) + by[1] * np.array(p.slow)
    panels[number] = replace(p, corner=tuple(corner.tolist()))
    return geometry.model_copy(update={"panels": tuple(panels)})
