"""Geometry files of other programs: CrystFEL ``.geom``, DIALS ``.expt``, pyFAI ``.poni``; one module each.

Each reads text to a `DetectorGeometry` in the laboratory frame of `storage.geometry`, and writes a `Geometry` as text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import blake3
from pydantic import ValidationError

from storage.errors import BadGeometry
from storage.files import replace
from storage.geometry import Geometry
from storage.geometry_formats import crystfel_geom, dials_expt, poni
from storage.panels import DetectorGeometry

__all__ = ["SUFFIXES", "geometry_text", "read_geometry", "write_geometry"]

Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Format:
    read: Callable[[str], DetectorGeometry]
    write: Callable[[Geometry, Sequence[Rectangle]], str]


_FORMATS = {
    ".geom": _Format(crystfel_geom.parse, crystfel_geom.compose),
    ".expt": _Format(dials_expt.parse, dials_expt.compose),
    ".poni": _Format(poni.parse, poni.compose),
}
SUFFIXES = tuple(_FORMATS)
_MOST_BYTES = 64 << 20


def read_geometry(path: Path) -> DetectorGeometry:
    """What a geometry file says; its suffix tells the format.

    Raises
    ------
    BadGeometry : not to be read, or incomplete; the message names file, line or key, and the remedy.
    """
    form = _format_of(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise BadGeometry(f"{path} is larger than {_MOST_BYTES >> 20} MiB; that is no geometry file")
        content = path.read_bytes()
        found = form.read(content.decode())
    except OSError as error:
        raise BadGeometry(f"cannot read geometry {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadGeometry(f"{path} is not text; give a {', '.join(SUFFIXES)} file") from None
    except BadGeometry as error:
        raise BadGeometry(f"{path}: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadGeometry(f"{path}: {problems}") from None
    return found.model_copy(update={"file": path.name, "digest": blake3.blake3(content).hexdigest()})


def geometry_text(suffix: str, geometry: Geometry, bad: Sequence[Rectangle] = ()) -> str:
    """A detector in the form that a suffix stands for.

    bad : rectangles of the frame's array that must not be used, as in `DetectorGeometry`; a PONI has no place for them.

    Raises
    ------
    BadGeometry : an unknown suffix, or several panels in a PONI.
    """
    return _format_of(Path(f"geometry{suffix}")).write(geometry, bad)


def write_geometry(path: Path, geometry: Geometry, bad: Sequence[Rectangle] = ()) -> None:
    """Write a geometry file in the form that its suffix stands for; in one step, whatever was there. See above."""
    replace(path, geometry_text(path.suffix, geometry, bad).encode())


def _format_of(path: Path) -> _Format:
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise BadGeometry(f"{path.name}: no geometry format ends in {path.suffix!r}; use {', '.join(SUFFIXES)}")
    return form
