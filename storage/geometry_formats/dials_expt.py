"""DIALS's experiment list: JSON with beams and detectors, of which the first of each is taken.

DIALS follows imgCIF: z against the beam, y up, x to the right looking along the beam; lengths in mm. The frame of
`storage.geometry` is that turned by half a turn about y, so that (x, y, z) of one is (-x, y, -z) of the other. A beam
that is not along z in the file is turned onto it by the shortest way, the detector with it.

Panels have `raw_image_offset` for their place in the frame's array. The sensor's thickness and material come along, so
that parallax, which DIALS has among a panel's strategies, is the same in both.

Source: dxtbx, model/detector.h, model/panel.h and the to_dict of experiment lists.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from storage.errors import BadGeometry
from storage.geometry import Geometry
from storage.panels import DetectorGeometry, Panel

__all__ = ["compose", "parse"]

# x and z of DIALS's frame point the other way.
_TURN = np.diag([-1.0, 1.0, -1.0])
_TRUSTED_MAX = 2**31 - 2


def parse(text: str) -> DetectorGeometry:
    """What an ``.expt`` says of its first detector, and of the beam that goes with it.

    Raises
    ------
    BadGeometry : names the key.
    """
    content = _mapping(text)
    used = content.get("experiment") or [{}]
    number, beam_number = used[0].get("detector", 0), used[0].get("beam", 0)
    try:
        detector, beams = content["detector"][number], content.get("beam") or []
        beam: Mapping[str, Any] = beams[beam_number] if beams else {}
        panels, notes = _panels(detector), []
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadGeometry(
            f"not an experiment list with a detector and its panels: {error!r}; export it with DIALS"
        ) from None
    if len(content["detector"]) > 1:
        notes.append(f"{len(content['detector'])} detectors are in the file; the first experiment's is taken")
    if len(panels) > 1 and not any(any(panel.origin) for panel in panels):
        raise BadGeometry(
            f"where its {len(panels)} panels lie in the frame's array is not in the file, as of those that DIALS makes "
            "of NeXus files with several modules; give each panel a raw_image_offset (fast, slow), or use a .geom"
        )
    onto_z = _onto_z(beam)
    first = detector["panels"][0]
    corrects = str(first.get("px_mm_strategy", {}).get("type", "")).startswith("Parallax")
    if not corrects and first.get("thickness"):
        notes.append("DIALS has no parallax correction in it; Nearline corrects for the thickness it states")
    return DetectorGeometry(
        panels=tuple(_turned(panel, onto_z) for panel in panels),
        wavelength=float(beam["wavelength"]) if beam.get("wavelength") else None,
        distance=Geometry(tuple(_turned(panel, onto_z) for panel in panels), 1.0).distance,
        # 0 and an empty name are what DIALS has where nobody said.
        sensor_thickness=float(first.get("thickness") or 0) * 1e-3 or None,
        sensor_material=str(first.get("material") or "") or None,
        bad=tuple(_bad(detector["panels"], panels)),
        notes=tuple(notes),
    )


def compose(geometry: Geometry, bad: Sequence[tuple[int, int, int, int]] = ()) -> str:
    """An experiment list with one beam and one detector; it loads without the images (``check_format=False``)."""
    beam = {
        "__id__": "monochromatic",
        "direction": [0.0, 0.0, 1.0],
        "wavelength": geometry.wavelength,
        "divergence": 0.0,
        "sigma_divergence": 0.0,
        "polarization_normal": [0.0, 1.0, 0.0],
        "polarization_fraction": 0.999,
        "flux": 0.0,
        "transmission": 1.0,
    }
    content = {
        "__id__": "ExperimentList",
        "experiment": [{"__id__": "Experiment", "identifier": "", "beam": 0, "detector": 0}],
        "imageset": [],
        "beam": [beam],
        "detector": [_detector(geometry, bad)],
        "goniometer": [],
        "scan": [],
        "crystal": [],
        "profile": [],
        "scaling_model": [],
    }
    return json.dumps(content, indent=1) + "\n"


def _mapping(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadGeometry(f"line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(content, dict) or not content.get("detector"):
        raise BadGeometry("there is no detector in it; give the .expt of dials.import or of a refinement")
    return content


def _panels(detector: Mapping[str, Any]) -> list[Panel]:
    frames = _frames(detector.get("hierarchy"), len(detector["panels"]))
    return [_panel(number, values, *frames[number]) for number, values in enumerate(detector["panels"])]


def _panel(number: int, values: Mapping[str, Any], axes: np.ndarray, at: np.ndarray) -> Panel:
    """A panel in our frame, m; ``axes`` and ``at`` (mm) are those of the group it is given in."""
    fast, slow = (axes @ _vector(values, key) for key in ("fast_axis", "slow_axis"))
    origin = axes @ _vector(values, "origin") + at
    size, offset = values["image_size"], values.get("raw_image_offset", (0, 0))
    pixel = [float(p) * 1e-3 for p in values["pixel_size"]]
    if min(pixel) <= 0 or min(size) <= 0:
        raise BadGeometry(f"detector.panels[{number}]: pixel_size {pixel} or image_size {size} is not above 0")
    return Panel(
        str(values.get("name") or f"p{number}").replace(" ", "_").replace("/", "_"),
        _three(_TURN @ origin * 1e-3),
        _three(_TURN @ fast * pixel[0]),
        _three(_TURN @ slow * pixel[1]),
        (int(size[1]), int(size[0])),
        (int(offset[1]), int(offset[0])),
    )


def _frames(hierarchy: Mapping[str, Any] | None, n_panels: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Axes and origin, mm, of the group each panel is given in: DIALS keeps both relative to the group above."""
    found = [(np.eye(3), np.zeros(3))] * n_panels

    def descend(node: Mapping[str, Any], axes: np.ndarray, at: np.ndarray) -> None:
        if "panel" in node:
            found[node["panel"]] = (axes, at)
            return
        fast, slow = _vector(node, "fast_axis"), _vector(node, "slow_axis")
        within = np.column_stack([fast, slow, np.cross(fast, slow)])
        for child in node.get("children", ()):
            descend(child, axes @ within, axes @ _vector(node, "origin") + at)

    if hierarchy and hierarchy.get("children"):
        descend(hierarchy, np.eye(3), np.zeros(3))
    return found


def _onto_z(beam: Mapping[str, Any]) -> np.ndarray:
    """(3, 3): the shortest rotation, in our frame, of the file's beam onto z; exactly nothing where it is along it."""
    to_source = np.array(beam.get("direction", (0.0, 0.0, 1.0)), float)
    along = _TURN @ -to_source / np.linalg.norm(to_source)
    axis, cosine = np.cross(along, [0.0, 0.0, 1.0]), along[2]
    if cosine < -0.999999:
        raise BadGeometry(f"beam.direction {to_source.tolist()} is along the beam; DIALS states it towards the source")
    across = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.asarray(np.eye(3) + across + across @ across / (1 + cosine))


def _turned(panel: Panel, by: np.ndarray) -> Panel:
    corner, fast, slow = (_three(by @ np.array(v)) for v in (panel.corner, panel.fast, panel.slow))
    return Panel(panel.name, corner, fast, slow, panel.shape, panel.origin)


def _vector(values: Mapping[str, Any], key: str) -> np.ndarray:
    vector = np.array(values[key], float)
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise BadGeometry(f"{key} is {values[key]}; it has three numbers")
    return vector


def _three(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (values + 0.0).tolist()
    return x, y, z


def _bad(given: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> Iterator[tuple[int, int, int, int]]:
    """DIALS keeps untrusted rectangles of each panel as first and last fast and slow, the last excluded."""
    for values, panel in zip(given, panels, strict=True):
        for x0, y0, x1, y1 in values.get("mask") or ():
            y, x = panel.origin
            yield int(y0) + y, int(y1) + y, int(x0) + x, int(x1) + x


def _detector(geometry: Geometry, bad: Sequence[tuple[int, int, int, int]]) -> dict[str, Any]:
    root = _frame("", (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)) | {
        "children": [{"panel": number} for number in range(len(geometry.panels))]
    }
    return {"panels": [_panel_values(geometry, panel, bad) for panel in geometry.panels], "hierarchy": root}


def _panel_values(geometry: Geometry, panel: Panel, bad: Sequence[tuple[int, int, int, int]]) -> dict[str, Any]:
    px, py = (float(np.linalg.norm(step)) for step in (panel.fast, panel.slow))
    fast, slow = (_three(_TURN @ np.array(v) / size) for v, size in ((panel.fast, px), (panel.slow, py)))
    if abs(np.dot(fast, slow)) > 1e-6:
        raise BadGeometry(f"panel {panel.name!r}: fast and slow are not at right angles, which DIALS needs; use .geom")
    values = _frame(panel.name, fast, slow, _three(_TURN @ np.array(panel.corner) * 1e3))
    (slow_0, fast_0), (n_slow, n_fast) = panel.origin, panel.shape
    sensor, mask = geometry.sensor, []
    for y0, y1, x0, x1 in bad:
        part = max(x0, fast_0), max(y0, slow_0), min(x1, fast_0 + n_fast), min(y1, slow_0 + n_slow)
        if part[0] < part[2] and part[1] < part[3]:
            mask.append([part[0] - fast_0, part[1] - slow_0, part[2] - fast_0, part[3] - slow_0])
    mu = sensor.absorption * 1e-3
    strategy = "ParallaxCorrectedPxMmStrategy" if sensor.thickness and mu else "SimplePxMmStrategy"
    return values | {
        "type": "SENSOR_PAD",
        "raw_image_offset": [fast_0, slow_0],
        "image_size": [n_fast, n_slow],
        "pixel_size": [px * 1e3, py * 1e3],
        "trusted_range": [0.0, float(_TRUSTED_MAX)],
        "thickness": sensor.thickness * 1e3,
        "mu": mu,
        "mask": mask,
        "px_mm_strategy": {"type": strategy},
    }


def _frame(
    name: str,
    fast: tuple[float, float, float],
    slow: tuple[float, float, float],
    origin: tuple[float, float, float],
) -> dict[str, Any]:
    """A panel or group of DIALS without pixels."""
    return {
        "name": name,
        "type": "",
        "fast_axis": fast,
        "slow_axis": slow,
        "origin": origin,
        "raw_image_offset": [0, 0],
        "image_size": [0, 0],
        "pixel_size": [0.0, 0.0],
        "trusted_range": [0.0, 0.0],
        "thickness": 0.0,
        "material": "",
        "mu": 0.0,
        "identifier": "",
        "mask": [],
        "gain": 1.0,
        "pedestal": 0.0,
        "px_mm_strategy": {"type": "SimplePxMmStrategy"},
    }
