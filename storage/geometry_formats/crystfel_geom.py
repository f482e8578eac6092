"""CrystFEL's geometry file: one line a value, panels by name.

Both programs measure from the outer corner of the first pixel and use the same laboratory frame (z along the beam, y
up), so nothing is shifted or mirrored. Lengths are in pixels of 1/res, ``clen`` and ``coffset`` in m.

Where ``dim`` lines give each module a number of its own (data of an axis more), the modules of a frame lie one below
the other in that order, as the parts of a frame do.

Source: crystfel_geometry(5).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from storage.errors import BadGeometry
from storage.geometry import Geometry
from storage.panels import DetectorGeometry, Panel, rectangles_of
from storage.photons import energy_from_wavelength, wavelength_from_energy

__all__ = ["bad_lines", "compose", "panel_lines", "parse"]

_VECTOR = re.compile(r"\s*([+-]?)\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)?\s*([xyz])\s*")
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-zÅ]*)\s*$")
_ENERGY_EV = {"": 1.0, "eV": 1.0, "keV": 1e3, "MeV": 1e6}
_LENGTH_M = {"": 1.0, "m": 1.0, "mm": 1e-3}
_WAVELENGTH_ANGSTROM = {"A": 1.0, "Å": 1.0, "m": 1e10}
# Of a panel, and with what it begins where the file says nothing; None where it must say something.
_PANEL_KEYS: Mapping[str, str | None] = {
    "min_fs": None, "max_fs": None, "min_ss": None, "max_ss": None, "res": None, "corner_x": None, "corner_y": None,
    "fs": "+1.0x", "ss": "+1.0y", "coffset": "0", "clen": "", "no_index": "0",
}  # fmt: skip
_DIM = re.compile(r"dim\d")
_BAD_KEYS = ("min_fs", "max_fs", "min_ss", "max_ss", "min_x", "max_x", "min_y", "max_y", "panel")


@dataclass
class _File:
    """Values by key, each with its line number."""

    common: dict[str, tuple[str, int]] = field(default_factory=dict)
    panels: dict[str, dict[str, tuple[str, int]]] = field(default_factory=dict)
    bad: dict[str, dict[str, tuple[str, int]]] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)


def parse(text: str) -> DetectorGeometry:
    """What a ``.geom`` says of panels, photon energy and bad regions.

    Raises
    ------
    BadGeometry : names the line, its value, and what would do.
    """
    file = _lines(text)
    if not file.panels:
        raise BadGeometry("no panel is described; a CrystFEL geometry has lines like p0/min_fs = 0")
    distances = {name: _distance(name, values) for name, values in file.panels.items()}
    known = [d for d in distances.values() if d is not None]
    if known and len(known) < len(distances):
        missing = ", ".join(name for name, d in distances.items() if d is None)
        raise BadGeometry(f"clen is a number for some panels, but not for {missing}; give all of them one, or none")
    rows_above = _rows_above(file)
    panels = tuple(
        _panel(name, values, distances[name] or 0.0, rows_above[name]) for name, values in file.panels.items()
    )
    return DetectorGeometry(
        panels=panels,
        wavelength=_wavelength(file),
        distance=known[0] if known else None,
        bad=_bad(file, panels, rows_above),
        groups=file.groups,
        notes=tuple(_notes(file, bool(known), any(rows_above.values()))),
    )


def compose(geometry: Geometry, bad: Sequence[tuple[int, int, int, int]] = ()) -> str:
    """A ``.geom`` of these panels; where the frames lie in a file is left to the reader's own lines."""
    clen = geometry.panels[0].corner[2]
    lines = [
        "; written by Nearline; add data = and dim lines for your files",
        f"photon_energy = {energy_from_wavelength(geometry.wavelength):.6f} eV",
        f"clen = {clen:.12g} m",
        "adu_per_photon = 1",
    ]
    for panel in geometry.panels:
        lines += ["", *panel_lines(panel, clen)]
    lines += bad_lines(geometry.panels, bad)
    lines += ["", f"group_all = {','.join(p.name for p in geometry.panels)}"]
    return "\n".join(lines) + "\n"


def panel_lines(panel: Panel, clen: float) -> list[str]:
    """The lines of one panel; ``clen`` is the distance in m that the file gives for all."""
    (y0, x0), (slow, fast) = panel.origin, panel.shape
    res = 1.0 / float(np.linalg.norm(panel.fast))
    corner = np.asarray(panel.corner) * res
    lines = [
        f"{panel.name}/min_fs = {x0}",
        f"{panel.name}/max_fs = {x0 + fast - 1}",
        f"{panel.name}/min_ss = {y0}",
        f"{panel.name}/max_ss = {y0 + slow - 1}",
        f"{panel.name}/res = {res:.9g}",
        f"{panel.name}/fs = {_direction(panel.fast, res)}",
        f"{panel.name}/ss = {_direction(panel.slow, res)}",
        f"{panel.name}/corner_x = {corner[0]:.6f}",
        f"{panel.name}/corner_y = {corner[1]:.6f}",
    ]
    if panel.corner[2] != clen:
        lines.append(f"{panel.name}/coffset = {panel.corner[2] - clen:.12f}")
    return lines


def bad_lines(panels: Sequence[Panel], bad: Sequence[tuple[int, int, int, int]]) -> list[str]:
    """The lines of regions that must not be used, each on the panels that it touches."""
    lines = []
    for number, (y0, y1, x0, x1) in enumerate(bad):
        for panel in panels:
            part = max(y0, panel.origin[0]), min(y1, panel.end[0]), max(x0, panel.origin[1]), min(x1, panel.end[1])
            if part[0] < part[1] and part[2] < part[3]:
                lines += ["", *_bad_lines(f"bad{number}_{panel.name}", panel, part)]
    return lines


def _bad_lines(name: str, panel: Panel, part: tuple[int, int, int, int]) -> list[str]:
    y0, y1, x0, x1 = part
    return [
        f"{name}/panel = {panel.name}",
        f"{name}/min_fs = {x0}",
        f"{name}/max_fs = {x1 - 1}",
        f"{name}/min_ss = {y0}",
        f"{name}/max_ss = {y1 - 1}",
    ]


def _direction(step: Iterable[float], res: float) -> str:
    """A pixel step in CrystFEL's form, such as -1.000000x +0.000000y; z only where the panel is tilted."""
    # Rounded first and zero added, so that neither -0.0 nor 1e-17 is printed.
    x, y, z = (round(s * res, 9) + 0.0 for s in step)
    return f"{x:+.9f}x {y:+.9f}y" + (f" {z:+.9f}z" if z else "")


# ---- reading


def _lines(text: str) -> _File:
    """A value before a panel's first line is the default of that panel and those after it, as CrystFEL has it."""
    file, defaults = _File(), {key: (value, 0) for key, value in _PANEL_KEYS.items() if value is not None}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split(";", 1)[0].strip()
        if not line:
            continue
        key, sign, value = (part.strip() for part in line.partition("="))
        if not sign or not key:
            raise BadGeometry(f"line {number}: {raw.strip()[:80]!r} is not of the form key = value")
        name, _, last = key.rpartition("/")
        if name.startswith("bad"):
            if last not in _BAD_KEYS and last != "is_fsss":
                raise BadGeometry(f"line {number}: a bad region has no {last!r}; it has {', '.join(_BAD_KEYS)}")
            file.bad.setdefault(name, {})[last] = (value, number)
        elif name:
            file.panels.setdefault(name, dict(defaults))[last] = (value, number)
        elif key.startswith(("rigid_group_collection", "group_all")):
            continue
        elif key.startswith(("rigid_group_", "group_")):
            file.groups[key.removeprefix("rigid_").removeprefix("group_")] = tuple(re.split(r"[,\s]+", value))
        else:
            file.common[key] = (value, number)
            if key in _PANEL_KEYS or _DIM.fullmatch(key):
                defaults[key] = (value, number)
    return file


def _rows_above(file: _File) -> dict[str, int]:
    """Of each panel, the rows of the frame that lie above the first row of its module: 0 where there is but one."""
    numbers = {name: _fixed_indices(name, values) for name, values in file.panels.items()}
    dims = {dim for fixed in numbers.values() for dim in fixed}
    varying = sorted(dim for dim in dims if len({fixed.get(dim) for fixed in numbers.values()}) > 1)
    if not varying:
        return dict.fromkeys(numbers, 0)
    without = [name for name, fixed in numbers.items() if varying[0] not in fixed]
    if len(varying) > 1 or without:
        what = f"{', '.join(varying)} tell panels apart" if not without else f"{without[0]} has no {varying[0]}"
        raise BadGeometry(f"{what}; give every panel the number of its module in one dim line, the same for all")
    last_rows = {name: _whole(name, "max_ss", *v["max_ss"]) for name, v in file.panels.items() if "max_ss" in v}
    n_rows = 1 + max(last_rows.values(), default=0)
    return {name: fixed[varying[0]] * n_rows for name, fixed in numbers.items()}


def _fixed_indices(name: str, values: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """The axes of the data along which a panel is at one place: the number of its module, mostly.

    Raises
    ------
    BadGeometry : fs before ss, which would be a frame that lies on its side.
    """
    dims = {key: text for key, (text, _) in sorted(values.items()) if _DIM.fullmatch(key)}
    order = [text for text in dims.values() if text in ("ss", "fs")]
    if order == ["fs", "ss"]:
        line = next(values[key][1] for key, text in dims.items() if text == "fs")
        raise BadGeometry(
            f"line {line}: panel {name!r} has fs before ss; frames are (slow, fast) here: exchange fs and ss in the "
            "dim lines, and with them min_fs and min_ss, max_fs and max_ss, and the directions"
        )
    return {key: _whole(name, key, text, values[key][1]) for key, text in dims.items() if text.isdecimal()}


def _panel(name: str, values: Mapping[str, tuple[str, int]], distance: float, rows_above: int) -> Panel:
    missing = [key for key, value in _PANEL_KEYS.items() if value is None and key not in values]
    if missing:
        raise BadGeometry(f"panel {name!r} has no {', '.join(missing)}; add lines like {name}/{missing[0]} = …")
    x0, x1, y0, y1 = (_whole(name, key, *values[key]) for key in ("min_fs", "max_fs", "min_ss", "max_ss"))
    if not 0 <= x0 <= x1 or not 0 <= y0 <= y1:
        raise BadGeometry(f"panel {name!r} spans fs {x0} to {x1} and ss {y0} to {y1}, which holds no pixel; order them")
    res = _number(name, "res", *values["res"])
    if res <= 0:
        raise BadGeometry(
            f"line {values['res'][1]}: res of panel {name!r} is {res}; give pixels per m, such as 13333.3"
        )
    fast, slow = (np.array(_vector(name, key, *values[key])) / res for key in ("fs", "ss"))
    normal = np.linalg.norm(np.cross(fast, slow))
    if normal < 1e-3 / res**2:
        raise BadGeometry(
            f"line {values['ss'][1]}: fs and ss of panel {name!r} do not span a plane; correct one of them"
        )
    corner_x, corner_y = (_number(name, key, *values[key]) for key in ("corner_x", "corner_y"))
    corner = (corner_x / res, corner_y / res, distance + _number(name, "coffset", *values["coffset"], units=_LENGTH_M))
    return Panel(name, corner, _three(fast), _three(slow), (y1 - y0 + 1, x1 - x0 + 1), (y0 + rows_above, x0))


def _three(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = values.tolist()
    return x, y, z


def _distance(name: str, values: Mapping[str, tuple[str, int]]) -> float | None:
    """``clen`` in m; None where it is left out, or a path in the data file."""
    text, line = values["clen"]
    return _number(name, "clen", text, line, units=_LENGTH_M) if _NUMBER.match(text) else None


def _wavelength(file: _File) -> float | None:
    text, line = file.common.get("wavelength", ("", 0))
    if _NUMBER.match(text):
        return _positive("wavelength", text, line, _WAVELENGTH_ANGSTROM)
    text, line = file.common.get("photon_energy", ("", 0))
    if _NUMBER.match(text):
        return wavelength_from_energy(_positive("photon_energy", text, line, _ENERGY_EV))
    return None


def _positive(key: str, text: str, line: int, units: Mapping[str, float]) -> float:
    value = _number("", key, text, line, units=units)
    if value <= 0:
        raise BadGeometry(f"line {line}: {key} is {text}; give one above 0, or leave it to the detector")
    return value


def _number(panel: str, key: str, text: str, line: int, *, units: Mapping[str, float] | None = None) -> float:
    found = _NUMBER.match(text)
    known = {"": 1.0} if units is None else units
    if found is None or found[2] not in known:
        unit = f" in {', '.join(u for u in known if u)}" if len(known) > 1 else ""
        raise BadGeometry(f"line {line}: {_full(panel, key)} is {text!r}; give a number{unit}")
    value = float(found[1]) * known[found[2]]
    if not math.isfinite(value):
        raise BadGeometry(f"line {line}: {_full(panel, key)} is {text!r}; give a number that can be")
    return value


def _whole(panel: str, key: str, text: str, line: int) -> int:
    value = _number(panel, key, text, line)
    if value != int(value):
        raise BadGeometry(f"line {line}: {_full(panel, key)} is {text!r}; give a whole number of pixels")
    return int(value)


def _full(panel: str, key: str) -> str:
    return f"{panel}/{key}" if panel else key


def _vector(panel: str, key: str, text: str, line: int) -> tuple[float, float, float]:
    """A direction such as ``+0.999x -0.01y`` in px."""
    at, sums = 0, {"x": 0.0, "y": 0.0, "z": 0.0}
    while at < len(text) and (term := _VECTOR.match(text, at)):
        sums[term[3]] += float(f"{term[1]}{term[2] or '1'}")
        at = term.end()
    if at < len(text) or not text.strip():
        raise BadGeometry(f"line {line}: {panel}/{key} is {text!r}; write a direction like +1.0x -0.002y")
    return sums["x"], sums["y"], sums["z"]


def _bad(
    file: _File, panels: tuple[Panel, ...], rows_above: Mapping[str, int]
) -> tuple[tuple[int, int, int, int], ...]:
    """Rectangles of the bad regions, and of whole panels that are not to be used."""
    found = []
    for panel in panels:
        if _number(panel.name, "no_index", *file.panels[panel.name]["no_index"]):
            found.append((panel.origin[0], panel.end[0], panel.origin[1], panel.end[1]))
    for name, values in file.bad.items():
        if {"min_fs", "max_fs", "min_ss", "max_ss"} <= set(values):
            found += _bad_pixels(name, values, panels, rows_above)
        elif {"min_x", "max_x", "min_y", "max_y"} <= set(values):
            found += _bad_places(name, values, panels)
        else:
            raise BadGeometry(
                f"bad region {name!r} has {', '.join(values)}; give min_fs, max_fs, min_ss, max_ss, or min_x … max_y"
            )
    return tuple(dict.fromkeys(found))


def _bad_pixels(
    name: str, values: Mapping[str, tuple[str, int]], panels: tuple[Panel, ...], rows_above: Mapping[str, int]
) -> list[tuple[int, int, int, int]]:
    """Of a region in pixels of the data; one that names no panel is there in every module."""
    x0, x1, y0, y1 = (_whole(name, key, *values[key]) for key in ("min_fs", "max_fs", "min_ss", "max_ss"))
    only, line = values.get("panel", ("", 0))
    if only and only not in {p.name for p in panels}:
        raise BadGeometry(f"line {line}: bad region {name!r} is on panel {only!r}, which is not described")
    found = []
    for panel in panels:
        first, stop = y0 + rows_above[panel.name], y1 + 1 + rows_above[panel.name]
        part = max(first, panel.origin[0]), min(stop, panel.end[0]), max(x0, panel.origin[1]), min(x1 + 1, panel.end[1])
        if only in ("", panel.name) and part[0] < part[1] and part[2] < part[3]:
            found.append(part)
    return found


def _bad_places(
    name: str, values: Mapping[str, tuple[str, int]], panels: tuple[Panel, ...]
) -> list[tuple[int, int, int, int]]:
    """Of a region in the laboratory, in px of each panel: the pixels whose first corner lies in it."""
    low_x, high_x, low_y, high_y = (_number(name, key, *values[key]) for key in ("min_x", "max_x", "min_y", "max_y"))
    found = []
    for panel in panels:
        res = 1 / float(np.linalg.norm(panel.fast))
        y, x = np.ogrid[0 : panel.shape[0], 0 : panel.shape[1]]
        across, up = ((panel.corner[i] + x * panel.fast[i] + y * panel.slow[i]) * res for i in (0, 1))
        inside = (across > low_x) & (across < high_x) & (up > low_y) & (up < high_y)
        y0, x0 = panel.origin
        found += [(a + y0, b + y0, c + x0, d + x0) for a, b, c, d in rectangles_of(inside)]
    return found


def _notes(file: _File, distance_known: bool, has_modules: bool) -> Iterable[str]:
    if not distance_known:
        yield "clen is no number: the distance is taken from the detector's header or the recipe"
    masks = [f"{key} = {value}" for key, (value, _) in file.common.items() if key.startswith("mask")]
    if masks:
        yield f"{', '.join(masks)} is not read: the run's own pixel mask holds, and a recipe's mask"
    if has_modules:
        yield "modules are numbered by a dim line: frames hold them one below the other, in that order"
    elif any(_DIM.fullmatch(key) and value.strip().isdecimal() for key, (value, _) in file.common.items()):
        yield "a dim line fixes one index of the data: frames are taken to be 2-D, (slow, fast)"
