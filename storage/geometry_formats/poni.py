"""pyFAI's PONI file: one flat detector by its point of normal incidence and three rotations; lengths in m.

pyFAI's axes are 1 up, 2 to the right looking along the beam, 3 along the beam: 1 is y here, 2 is -x and 3 is z. In its
``orientation`` 3, which it takes where none is stated, rows of the array run upwards and columns to the right; 2 is the
usual mounting (fast = -x, slow = -y). Rings look the same with both, the hand of a crystal does not.

Source: pyFAI, io/ponifile.py, geometry/core.py (rotation_matrix) and detectors (orientation).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from storage.errors import BadGeometry
from storage.geometry import Geometry
from storage.panels import DetectorGeometry, Panel

__all__ = ["compose", "parse"]

# Columns: axes 1, 2, 3 of pyFAI in our frame.
_AXES = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
_ORIENTATION = 3
# (slow, fast) px and m of detectors that a PONI only names: pyFAI keeps these out of the file.
_KNOWN: Mapping[str, tuple[tuple[int, int], float]] = {
    "pilatus100k": ((195, 487), 172e-6), "pilatus200k": ((407, 487), 172e-6), "pilatus300k": ((619, 487), 172e-6),
    "pilatus300kw": ((195, 1475), 172e-6), "pilatus1m": ((1043, 981), 172e-6), "pilatus2m": ((1679, 1475), 172e-6),
    "pilatus6m": ((2527, 2463), 172e-6), "pilatus900k": ((619, 1475), 172e-6),
    "eiger500k": ((514, 1030), 75e-6), "eiger1m": ((1065, 1030), 75e-6), "eiger4m": ((2167, 2070), 75e-6),
    "eiger9m": ((3269, 3110), 75e-6), "eiger16m": ((4371, 4150), 75e-6),
    "eiger2500k": ((512, 1028), 75e-6), "eiger21m": ((1062, 1028), 75e-6), "eiger24m": ((2162, 2068), 75e-6),
    "eiger29m": ((3262, 3108), 75e-6), "eiger216m": ((4362, 4148), 75e-6),
}  # fmt: skip
_LOST = 1e-9


def parse(text: str) -> DetectorGeometry:
    """What a ``.poni`` says; of several calibrations in it the last, as pyFAI reads it.

    Raises
    ------
    BadGeometry : names the key.
    """
    values = _values(text)
    config = _config(values)
    orientation, shape, (size_1, size_2) = _orientation(config), *_pixels(values, config)
    rotation = _rotation(*(_number(values, key, 0.0) for key in ("rot1", "rot2", "rot3")))
    poni_1, poni_2, distance = _number(values, "poni1"), _number(values, "poni2"), _number(values, "distance")
    # Steps and first corner along pyFAI's two pixel axes before it rotates them.
    flip_1, flip_2 = orientation in (1, 2), orientation in (1, 4)
    first = np.array([shape[0] * size_1 if flip_1 else 0.0, shape[1] * size_2 if flip_2 else 0.0, 0.0])
    corner = first - [poni_1, poni_2, -distance]
    slow = np.array([-size_1 if flip_1 else size_1, 0.0, 0.0])
    fast = np.array([0.0, -size_2 if flip_2 else size_2, 0.0])
    corner, fast, slow = (_AXES @ rotation @ v for v in (corner, fast, slow))
    panel = Panel("p0", _three(corner), _three(fast), _three(slow), shape)
    wavelength = _number(values, "wavelength", 0.0) * 1e10
    sensor = config.get("sensor") or {}
    return DetectorGeometry(
        panels=(panel,),
        wavelength=wavelength or None,
        distance=Geometry((panel,), 1.0).distance,
        sensor_thickness=sensor.get("thickness"),
        sensor_material=sensor.get("material"),
        notes=_notes(orientation, "orientation" in config),
    )


def compose(geometry: Geometry, bad: Sequence[tuple[int, int, int, int]] = ()) -> str:
    """A ``.poni`` (version 2.1) of one flat detector; a format without a place for bad regions.

    Raises
    ------
    BadGeometry : several panels that are not in one plane and grid.
    """
    panel = _as_one(geometry)
    size_1, size_2 = float(np.linalg.norm(panel.slow)), float(np.linalg.norm(panel.fast))
    corner, fast, slow = (_AXES.T @ np.array(v) for v in (panel.corner, panel.fast, panel.slow))
    if abs(fast @ slow) > _LOST * size_1 * size_2:
        raise BadGeometry(f"panel {panel.name!r}: fast and slow are not at right angles, which a PONI needs; use .geom")
    orientation, along_1, along_2 = _oriented(slow / size_1, fast / size_2)
    rotation = np.column_stack([along_1, along_2, np.cross(along_1, along_2)])
    at = rotation.T @ corner
    flip_1, flip_2 = orientation in (1, 2), orientation in (1, 4)
    poni_1 = (panel.shape[0] * size_1 if flip_1 else 0.0) - at[0]
    poni_2 = (panel.shape[1] * size_2 if flip_2 else 0.0) - at[1]
    rot_1, rot_2, rot_3 = _angles(rotation)
    config = {"pixel1": size_1, "pixel2": size_2, "max_shape": list(panel.shape), "orientation": orientation}
    lines = [
        "# written by Nearline; 1 refers to the slow axis, 2 to the fast one",
        "poni_version: 2.1",
        "Detector: Detector",
        f"Detector_config: {json.dumps(config)}",
        f"Distance: {float(at[2])!r}",
        f"Poni1: {float(poni_1)!r}",
        f"Poni2: {float(poni_2)!r}",
        f"Rot1: {rot_1!r}",
        f"Rot2: {rot_2!r}",
        f"Rot3: {rot_3!r}",
        f"Wavelength: {geometry.wavelength * 1e-10!r}",
    ]
    return "\n".join(lines) + "\n"


# ---- reading


def _values(text: str) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, colon, value = line.partition(":")
        if colon and not key.lstrip().startswith("#"):
            found[key.strip().lower()] = (value.strip(), number)
    if "distance" not in found:
        raise BadGeometry("there is no Distance in it; give a .poni as pyFAI's calibration writes it")
    return found


def _config(values: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    text, line = values.get("detector_config", ("{}", 0))
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadGeometry(f"line {line}: Detector_config is not JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise BadGeometry(f'line {line}: Detector_config is {text[:40]!r}; write it like {{"pixel1": 7.5e-5, …}}')
    for key in ("splineFile", "splinefile", "filename"):
        if config.get(key):
            raise BadGeometry(
                f"line {line}: pixels displaced by {key} {config[key]!r} are not flat; use .geom or .expt"
            )
    return config


def _orientation(config: Mapping[str, Any]) -> int:
    value = config.get("orientation") or _ORIENTATION
    if value not in (1, 2, 3, 4):
        raise BadGeometry(f"Detector_config: orientation is {value!r}; it is 1 to 4")
    return int(value)


def _pixels(
    values: Mapping[str, tuple[str, int]], config: Mapping[str, Any]
) -> tuple[tuple[int, int], tuple[float, float]]:
    """(slow, fast) px, and pixel sizes along both, m."""
    name = values.get("detector", ("", 0))[0]
    shape, size = _KNOWN.get(re.sub(r"[^a-z0-9]", "", name.lower()).replace("cdte", ""), (None, 0.0))
    sizes = [config.get(key) or _number(values, f"pixelsize{i}", size) for i, key in ((1, "pixel1"), (2, "pixel2"))]
    given = config.get("max_shape") or config.get("shape") or shape
    if given is None or len(given) != 2 or min(given) < 1:
        raise BadGeometry(
            f'Detector {name!r}: how many pixels it has is not in the file; add "max_shape": [slow, fast] to '
            "Detector_config"
        )
    if not min(sizes) > 0:
        raise BadGeometry(f"Detector {name!r}: pixels of {sizes} m; add pixel1 and pixel2 in m to Detector_config")
    return (int(given[0]), int(given[1])), (float(sizes[0]), float(sizes[1]))


def _number(values: Mapping[str, tuple[str, int]], key: str, default: float | None = None) -> float:
    text, line = values.get(key, ("", 0))
    if text in ("", "None") and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise BadGeometry(f"line {line}: {key.capitalize()} is {text!r}; give a number in m (rotations in radians)")
    return value


def _notes(orientation: int, is_stated: bool) -> tuple[str, ...]:
    if orientation == 2:
        return ()
    return (
        f"orientation {orientation}{'' if is_stated else ', taken because none is stated,'} has other axes than the "
        "usual mounting, which is 2: rings are the same, but the hand of a crystal may not be; state what is true",
    )


def _rotation(rot_1: float, rot_2: float, rot_3: float) -> np.ndarray:
    """(3, 3) in pyFAI's axes; 1 and 2 turn left-handed, 3 right-handed, in this order."""
    c1, c2, c3 = np.cos([rot_1, rot_2, rot_3])
    s1, s2, s3 = np.sin([rot_1, rot_2, rot_3])
    first = np.array([[1, 0, 0], [0, c1, s1], [0, -s1, c1]])
    second = np.array([[c2, 0, -s2], [0, 1, 0], [s2, 0, c2]])
    third = np.array([[c3, -s3, 0], [s3, c3, 0], [0, 0, 1]])
    return np.asarray(third @ second @ first)


# ---- writing


def _as_one(geometry: Geometry) -> Panel:
    """One panel over the whole frame, if all are in its plane and on its grid."""
    first = geometry.panels[0]
    fast, slow = np.array(first.fast), np.array(first.slow)
    corner = np.array(first.corner) - first.origin[1] * fast - first.origin[0] * slow
    for panel in geometry.panels:
        expected = corner + panel.origin[1] * fast + panel.origin[0] * slow
        steps = np.abs(np.array([panel.fast, panel.slow]) - [fast, slow]).max() * max(panel.shape)
        if max(steps, np.abs(expected - panel.corner).max()) > _LOST:
            raise BadGeometry(
                f"panel {panel.name!r} is not in the plane and grid of {first.name!r}; a PONI has one flat detector: "
                "write .geom or .expt"
            )
    shape = max(p.end[0] for p in geometry.panels), max(p.end[1] for p in geometry.panels)
    return Panel(first.name, _three(corner), first.fast, first.slow, shape)


def _oriented(slow: np.ndarray, fast: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """pyFAI's orientation, and the unit vectors of its two pixel axes, which are right-handed with the third forward.

    Of the two that are, the one that leaves less to turn about the beam.
    """
    flips = {3: (1, 1), 2: (-1, 1), 1: (-1, -1), 4: (1, -1)}
    choices = [
        (one * slow[0] + two * fast[1], number, one * slow, two * fast)
        for number, (one, two) in flips.items()
        if np.cross(one * slow, two * fast)[2] > 0
    ]
    if not choices:
        raise BadGeometry("the detector stands along the beam, which a PONI cannot say; use .geom")
    _, number, along_1, along_2 = max(choices, key=lambda choice: choice[0])
    return number, along_1, along_2


def _angles(rotation: np.ndarray) -> tuple[float, float, float]:
    """Rotations of a matrix as `_rotation` makes it, for a detector that faces the sample."""
    # third @ second @ first has the row (s2, -s1 c2, c1 c2) last, and (c3 c2, s3 c2) in its first column.
    rot_2 = np.arcsin(np.clip(rotation[2, 0], -1, 1))
    return (
        float(np.arctan2(-rotation[2, 1], rotation[2, 2])),
        float(rot_2),
        float(np.arctan2(rotation[1, 0], rotation[0, 0])),
    )


def _three(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (values + 0.0).tolist()
    return x, y, z
