"""CrystFEL's two text files: the geometry (.geom) and the stream of results (.stream).

Written here so that a run leaves Nearline in the form serial crystallographers merge
(``process_hkl``, ``partialator``) and look at. Stream format 2.3 as indexamajig 0.12 writes
it. Units are CrystFEL's at this edge only: nm and nm^-1 in the file; 1/Å in our arrays.

Both programs measure pixel positions from the outer corner of the first pixel and use the
same laboratory frame as NeXus (z along the beam, y up), so nothing is shifted or mirrored.
"""

import contextlib
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from storage.errors import BadFrame, OutputExists, ShapeMismatch, StorageFull
from storage.geometry import Geometry
from storage.geometry_formats.crystfel_geom import bad_lines, panel_lines
from storage.models import StreamHeader
from storage.photons import energy_from_wavelength

__all__ = [
    "CrystfelStreamWriter",
    "StreamCrystal",
    "StreamFrame",
    "StreamPeaks",
    "StreamPreamble",
    "StreamReflections",
    "geometry_file",
    "read_preamble",
    "read_stream",
]

_MAGIC = "CrystFEL stream format 2.3"
_INDEXERS = (
    "none", "asdf", "xgandalf", "taketwo", "file", "dirax",
    "mosflm", "xds", "felix", "pinkIndexer", "ffbidx", "smallcell",
)  # fmt: skip
_LATTICES = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "rhombohedral", "hexagonal", "cubic")
_CENTERINGS = "PABCIFRH"
# CrystFEL refuses a stream whose audit block or one of whose lines is longer.
_AUDIT_BYTES, _AUDIT_LINE_BYTES = 4000, 1022
_INT32_MAX = 2**31 - 1
_KEY_VALUE = re.compile(r"([^=:]*?)\s*(?::| =)\s?(.*?)\s*$")


@dataclass(frozen=True, slots=True)
class StreamPeaks:
    """The peak search of one frame; all arrays (peak,).

    x, y : px in the frame's array, fast and slow, from the outer corner of the first pixel.
    intensity : background-subtracted counts.
    q_invnm : |q| = 1/d, nm^-1; None: computed from the geometry.
    """

    x: np.ndarray
    y: np.ndarray
    intensity: np.ndarray
    q_invnm: np.ndarray | None = None

    @classmethod
    def none(cls) -> "StreamPeaks":
        """No peak."""
        return cls(np.zeros(0), np.zeros(0), np.zeros(0))


@dataclass(frozen=True, slots=True)
class StreamReflections:
    """Integrated reflections of one crystal; all arrays (reflection,).

    h, k, l : as observed, not reduced to the asymmetric unit; each triple once.
    intensity, sigma : background-subtracted sum and its error, counts, no Lorentz or polarisation correction.
    peak : highest raw pixel; background : mean per pixel; counts.
    x, y : predicted position, px from the outer corner of the first pixel.
    """

    h: np.ndarray
    k: np.ndarray
    l: np.ndarray  # noqa: E741 - the crystallographers' letter
    intensity: np.ndarray
    sigma: np.ndarray
    peak: np.ndarray
    background: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.h)


@dataclass(frozen=True, slots=True)
class StreamCrystal:
    """One lattice in a frame.

    A : (3, 3), rows a*, b*, c* in 1/Å in the laboratory frame, without 2π.
    lattice_type, centering, unique_axis : CrystFEL's words; "*" for no unique axis.
    profile_radius : of the reciprocal lattice points, nm^-1.
    resolution_limit : of the diffraction, nm^-1; None if not estimated.
    reflections : None or empty if nothing was integrated.
    det_shift_mm : (x, y) of the detector's true place minus the assumed one, laboratory axes.
    """

    A: np.ndarray
    lattice_type: str = "triclinic"
    centering: str = "P"
    unique_axis: str = "*"
    profile_radius: float = 0.002
    resolution_limit: float | None = None
    reflections: StreamReflections | None = None
    n_saturated: int = 0
    n_implausible: int = 0
    det_shift_mm: tuple[float, float] = (0.0, 0.0)

    @property
    def cell(self) -> tuple[float, float, float, float, float, float]:
        """a, b, c in Å and alpha, beta, gamma in degrees."""
        # Rows of A are reciprocal vectors, so the columns of its inverse are the direct ones.
        direct = np.linalg.inv(self.A).T
        a, b, c = np.linalg.norm(direct, axis=1)
        unit = direct / np.array([[a], [b], [c]])
        angles = (_angle(unit[i], unit[j]) for i, j in ((1, 2), (0, 2), (0, 1)))
        return (float(a), float(b), float(c), *angles)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class StreamFrame:
    """One chunk of a stream: a frame and what was found on it.

    frame_index is None in streams of other programs; ``event`` then says which frame.
    """

    image_filename: str
    event: str
    serial_number: int
    frame_index: int | None
    hit: bool
    indexed_by: str
    photon_energy: float
    peaks: StreamPeaks
    crystals: tuple[StreamCrystal, ...]


@dataclass(frozen=True, slots=True)
class StreamPreamble:
    """What stands before the first frame: free lines, the geometry file, the target cell if any."""

    audit_lines: tuple[str, ...]
    geometry: str
    cell: str | None


def geometry_file(
    header: StreamHeader,
    *,
    geometry: Geometry | None = None,
    data_path: str = "/entry/data/data",
    mask_file: str | None = None,
    mask_path: str | None = None,
    adu_per_photon: float = 1.0,
    bad: Sequence[tuple[int, int, int, int]] = (),
) -> str:
    """The CrystFEL geometry file for frames exported by :class:`storage.nexus.NxmxWriter`.

    Parameters
    ----------
    header : of the stream.
    geometry : a refined geometry; default the flat detector of the header.
    data_path : HDF5 path of the (frame, slow, fast) array.
    mask_file : HDF5 file of the mask; default the data file itself.
    mask_path : HDF5 path of an NXmx pixel mask, or None for no mask.
    adu_per_photon : counts per photon, for sigma(I).
    bad : rectangles of the frame's array that must not be used, as in `storage.panels.DetectorGeometry`.

    Raises
    ------
    BadFrame : not an image, or distance or wavelength unknown.

    Source: crystfel_geometry(5).
    """
    geometry = geometry or _geometry(header)
    first = geometry.panels[0]
    lines = [
        f"; {header.experiment} run {header.run} {header.data_source}, written by Nearline",
        f"photon_energy = {energy_from_wavelength(geometry.wavelength):.6f} eV",
        f"clen = {first.corner[2]:.12g} m",
        f"adu_per_photon = {adu_per_photon:g}",
        f"data = {data_path}",
        "dim0 = %",
        "dim1 = ss",
        "dim2 = fs",
        f"flag_morethan = {_largest_count(header)}",
    ]
    if header.detector is not None and header.detector.saturation_value is not None:
        # max_adu in the geometry would drop reflections at integration; merging can still decide.
        lines.append(f"; merge with --max-adu={header.detector.saturation_value}")
    if mask_path is not None:
        lines += [f"mask0_file = {mask_file}"] if mask_file is not None else []
        # NXmx: bits 0 to 15 say "do not use"; bit 31 (virtual pixel) is no reason.
        lines += [f"mask0_data = {mask_path}", "mask0_goodbits = 0x0", "mask0_badbits = 0xffff"]
    for panel in geometry.panels:
        lines += ["", *panel_lines(panel, first.corner[2])]
    lines += bad_lines(geometry.panels, bad)
    lines += ["", f"group_all = {','.join(p.name for p in geometry.panels)}"]
    return "\n".join(lines) + "\n"


class CrystfelStreamWriter:
    """Writes a CrystFEL stream frame by frame; what is written can be read at once.

    Parameters
    ----------
    path : of the stream.
    header : of the data stream the frames come from.
    geometry : a refined geometry; default the flat detector of the header.
    geometry_text : the geometry block; default :func:`geometry_file` of header and geometry.
    cell_text : a CrystFEL cell file, verbatim, or None.
    audit_lines : program, version, command line: free text, below 4 kB in all.
    image_filename : the exported NeXus file that the events point into.
    event_format : of the event line, with {row} for the frame's row in that file.
    indexed_by : CrystFEL's name of the indexer; "file" for results from outside CrystFEL.
    overwrite : replace an existing stream; it is gone at once.
    resume : go on behind the last whole chunk of an existing stream; what a crash left of a
        chunk is cut off. :func:`read_stream` says which frames are there.

    Raises
    ------
    BadFrame : geometry unknown, unknown indexer, audit lines that CrystFEL would refuse, or a
        stream to resume that began with another preamble.
    OutputExists : the file is there and ``overwrite`` is False.
    StorageFull : the folder cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: StreamHeader,
        *,
        geometry: Geometry | None = None,
        geometry_text: str | None = None,
        cell_text: str | None = None,
        audit_lines: Sequence[str] = (),
        image_filename: str,
        event_format: str = "//{row}",
        indexed_by: str = "file",
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.path = Path(path)
        self.header = header
        self.geometry = geometry or _geometry(header)
        if indexed_by not in _INDEXERS:
            raise BadFrame(f"indexed_by is {indexed_by!r}, which CrystFEL does not know; use 'file'")
        if "\n" in image_filename:
            raise BadFrame(f"image_filename {image_filename!r} has a line break; CrystFEL reads one line")
        self._image_filename, self._event_format = image_filename, event_format
        self._indexed_by = indexed_by
        preamble = _preamble(
            audit_lines or ("Generated by Nearline",),
            geometry_text or geometry_file(header, geometry=self.geometry),
            cell_text,
        )
        if resume and self.path.exists():
            if _cut_to_whole_chunks(self.path, preamble):
                self._out = self._open("ab")
                return
            overwrite = True
        self._out = self._open("wb" if overwrite else "xb")
        try:
            self._write(preamble)
        except StorageFull:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_frame(
        self,
        frame_index: int,
        *,
        hit: bool,
        peaks: StreamPeaks | None = None,
        crystals: Sequence[StreamCrystal] = (),
        row: int | None = None,
    ) -> None:
        """Append one frame as one chunk, whole or (if it is refused) not at all.

        Parameters
        ----------
        frame_index : in the stream; the serial number is one more, as CrystFEL counts from 1.
        hit : enough peaks.
        peaks : None if no peak search was made.
        row : in the exported file, if it is not the frame index (hits-only exports).

        Raises
        ------
        BadFrame : arrays of unequal length, numbers that are not finite, a reflection twice in
            a crystal, positions off every panel, or a lattice word that CrystFEL does not know.
        StorageFull : the disk refused the chunk.
        """
        event = self._event_format.format(row=frame_index if row is None else row)
        wavelength, distance = self.geometry.wavelength, self.geometry.panels[0].corner[2]
        lines = [
            "----- Begin chunk -----",
            f"Image filename: {self._image_filename}",
            f"Event: {event}",
            f"Image serial number: {frame_index + 1}",
            f"hit = {int(hit)}",
            f"indexed_by = {self._indexed_by if crystals else 'none'}",
            *(["n_indexing_tries = 1"] if crystals else []),
            f"photon_energy_eV = {energy_from_wavelength(wavelength):.6f}",
            "beam_divergence = 0.00e+00 rad",
            # partialator aborts without a bandwidth; 1e-8 stands for "none".
            "beam_bandwidth = 1.00e-08 (fraction)",
            f"header/int/frame_index = {frame_index}",
            f"average_camera_length = {distance:f} m",
        ]
        try:
            if peaks is not None:
                lines += self._peak_lines(peaks)
            for crystal in crystals:
                lines += self._crystal_lines(crystal)
        except (BadFrame, ShapeMismatch) as error:
            raise type(error)(f"frame {frame_index}: {error}") from error
        lines.append("----- End chunk -----\n")
        self._write("\n".join(lines))

    def close(self) -> None:
        """Close the stream; every frame written is already in it."""
        self._out.close()

    def _open(self, mode: Literal["ab", "wb", "xb"]) -> FileIO:
        try:
            # Unbuffered: a chunk is one write, and nothing is left to fail at close.
            return self.path.open(mode, buffering=0)
        except FileExistsError as error:
            raise OutputExists(f"{self.path} exists; choose another name or pass overwrite=True") from error
        except OSError as error:
            raise self._refused(error) from error

    def _write(self, text: str) -> None:
        start, rest = self._out.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[self._out.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._out.truncate(start)
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> StorageFull:
        return StorageFull(
            f"cannot write {self.path}: {error}; check that the folder exists, may be written, and has free space"
        )

    def _peak_lines(self, peaks: StreamPeaks) -> list[str]:
        x, y, intensity = _columns(("x", peaks.x), ("y", peaks.y), ("intensity", peaks.intensity))
        panels = self._panels_at(x, y)
        q = self._q_invnm(x, y, panels) if peaks.q_invnm is None else np.asarray(peaks.q_invnm, float)
        if q.shape != x.shape:
            raise ShapeMismatch(f"q_invnm has shape {q.shape}, but there are {len(x)} peaks; give one value a peak")
        lines = [f"num_peaks = {len(x)}"]
        if len(x):
            limit = _peak_resolution(q)
            lines.append(f"peak_resolution = {limit:f} nm^-1 or {10.0 / limit if limit else np.inf:f} A")
        names = [self.geometry.panels[k].name for k in panels]
        return [
            *lines,
            "Peaks from peak search",
            "  fs/px   ss/px (1/d)/nm^-1   Intensity  Panel",
            *map("%7.2f %7.2f %10.2f  %10.2f   %s".__mod__, zip(x, y, q, intensity, names, strict=True)),
            "End of peak list",
        ]

    def _crystal_lines(self, crystal: StreamCrystal) -> list[str]:
        _check_lattice(crystal)
        a, b, c, al, be, ga = crystal.cell
        lines = [
            "--- Begin crystal",
            f"Cell parameters {a / 10:7.5f} {b / 10:7.5f} {c / 10:7.5f} nm, {al:7.5f} {be:7.5f} {ga:7.5f} deg",
            *(
                f"{name} = {v[0]:+9.7f} {v[1]:+9.7f} {v[2]:+9.7f} nm^-1"
                for name, v in zip(("astar", "bstar", "cstar"), np.asarray(crystal.A, float) * 10.0, strict=True)
            ),
            f"lattice_type = {crystal.lattice_type}",
            f"centering = {crystal.centering}",
            f"unique_axis = {crystal.unique_axis}",
            f"profile_radius = {crystal.profile_radius:.5f} nm^-1",
            "predict_refine/det_shift x = {:.3f} y = {:.3f} mm".format(*crystal.det_shift_mm),
        ]
        if crystal.resolution_limit:
            limit = crystal.resolution_limit
            lines.append(f"diffraction_resolution_limit = {limit:.2f} nm^-1 or {10.0 / limit:.2f} A")
        n = len(crystal.reflections) if crystal.reflections else 0
        lines += [
            f"num_reflections = {n}",
            f"num_saturated_reflections = {crystal.n_saturated}",
            f"num_implausible_reflections = {crystal.n_implausible}",
        ]
        lines += self._reflection_lines(crystal.reflections) if crystal.reflections else ["No integrated reflections."]
        return [*lines, "--- End crystal"]

    def _reflection_lines(self, r: StreamReflections) -> list[str]:
        h, k, l, intensity, sigma, peak, background, x, y = _columns(  # noqa: E741
            ("h", r.h), ("k", r.k), ("l", r.l), ("intensity", r.intensity), ("sigma", r.sigma),
            ("peak", r.peak), ("background", r.background), ("x", r.x), ("y", r.y),
        )  # fmt: skip
        hkl = np.column_stack([h, k, l]).astype(np.int64)
        unique, counts = np.unique(hkl, axis=0, return_counts=True)
        if (counts > 1).any():
            twice = tuple(int(i) for i in unique[counts > 1][0])
            raise BadFrame(f"reflection {twice} occurs more than once in a crystal; sum or choose before writing")
        names = [self.geometry.panels[p].name for p in self._panels_at(x, y)]
        rows = zip(*hkl.T, intensity, sigma, peak, background, x, y, names, strict=True)
        return [
            "Reflections measured after indexing",
            "   h    k    l          I   sigma(I)       peak background  fs/px  ss/px panel",
            *map("%4i %4i %4i %10.2f %10.2f %10.2f %10.2f %6.1f %6.1f %s".__mod__, rows),
            "End of reflections",
        ]

    def _panels_at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(n,), the number of the panel under each position."""
        found = self.geometry.panel_at(x, y)
        if (found < 0).any():
            i = int(np.argmax(found < 0))
            raise BadFrame(f"position x {x[i]:.2f}, y {y[i]:.2f} px is on no panel; leave it out or check the units")
        return found

    def _q_invnm(self, x: np.ndarray, y: np.ndarray, panels: np.ndarray) -> np.ndarray:
        """|q| = 1/d in nm^-1 at positions of the frame's array."""
        return np.asarray(10.0 * np.linalg.norm(self.geometry.q_at(x, y, panels), axis=-1))


def read_preamble(path: str | os.PathLike[str]) -> StreamPreamble:
    """What stands before the first frame of a stream of any program.

    Raises
    ------
    BadFrame : not a CrystFEL stream, or one without a geometry block.
    """
    with Path(path).open(encoding="utf-8") as file:
        lines = iter(file)
        _check_magic(path, lines)
        audit: list[str] = []
        blocks: dict[str, str] = {}
        for line in lines:
            if line.startswith("----- Begin chunk"):
                break
            if begin := re.match(r"----- Begin (geometry file|unit cell) -----", line):
                blocks[begin[1]] = "".join(_until(lines, f"----- End {begin[1]}"))
            else:
                audit.append(line.rstrip("\n"))
    if "geometry file" not in blocks:
        raise BadFrame(f"{path} has no geometry block; CrystFEL cannot read it either")
    return StreamPreamble(tuple(audit), blocks["geometry file"], blocks.get("unit cell"))


def read_stream(path: str | os.PathLike[str]) -> Iterator[StreamFrame]:
    """The frames of a CrystFEL stream, in file order, ours or indexamajig's.

    A stream may still be growing: a last chunk without its end line is not given. Lines that
    are not known are skipped, as CrystFEL does.

    Raises
    ------
    BadFrame : not a CrystFEL stream, or a table or number in it that cannot be read.
    """
    with Path(path).open(encoding="utf-8") as file:
        lines = iter(file)
        _check_magic(path, lines)
        for line in lines:
            if not line.startswith("----- Begin chunk"):
                continue
            chunk = _Chunk()
            if not chunk.read(lines):
                return
            yield chunk.frame()


@dataclass(slots=True)
class _Chunk:
    """A chunk while its lines are read."""

    values: dict[str, str] = field(default_factory=dict)
    peaks: StreamPeaks = field(default_factory=StreamPeaks.none)
    crystals: list[StreamCrystal] = field(default_factory=list)

    def read(self, lines: Iterator[str]) -> bool:
        """Take the lines up to the chunk's end; False if the file ends before."""
        for line in lines:
            if line.startswith("----- End chunk"):
                return True
            if line.startswith("Peaks from peak search"):
                table = _table(lines, "End of peak list", 5)
                if table is None:
                    return False
                self.peaks = StreamPeaks(table[0], table[1], table[3], table[2])
            elif line.startswith("--- Begin crystal"):
                crystal = _read_crystal(lines)
                if crystal is None:
                    return False
                self.crystals.append(crystal)
            else:
                self.values.update([_key_value(line)])
        return False

    def frame(self) -> StreamFrame:
        index = self.values.get("header/int/frame_index")
        try:
            return StreamFrame(
                image_filename=self.values.get("Image filename", ""),
                event=self.values.get("Event", "//"),
                serial_number=int(self.values.get("Image serial number", 0)),
                frame_index=None if index is None else int(index),
                hit=self.values.get("hit") == "1",
                indexed_by=self.values.get("indexed_by", "none"),
                photon_energy=float(self.values["photon_energy_eV"]),
                peaks=self.peaks,
                crystals=tuple(self.crystals),
            )
        except (KeyError, ValueError) as error:
            event = self.values.get("Event")
            raise BadFrame(f"chunk of event {event}: {error}; the stream is damaged there") from error


def _read_crystal(lines: Iterator[str]) -> StreamCrystal | None:
    """The crystal block that has begun; None if the file ends inside."""
    values: dict[str, str] = {}
    reflections = None
    for line in lines:
        if line.startswith("--- End crystal"):
            break
        if line.startswith("Reflections measured after indexing"):
            table = _table(lines, "End of reflections", 10)
            if table is None:
                return None
            hkl = table[:3].astype(np.int32)
            reflections = StreamReflections(*hkl, *table[3:])
        else:
            values.update([_key_value(line)])
    else:
        return None
    try:
        stars = [values[name].split()[:3] for name in ("astar", "bstar", "cstar")]
        limit = values.get("diffraction_resolution_limit")
        return StreamCrystal(
            A=np.array(stars, float) / 10.0,
            lattice_type=values.get("lattice_type", "triclinic"),
            centering=values.get("centering", "P"),
            unique_axis=values.get("unique_axis", "*"),
            profile_radius=_first_number(values.get("profile_radius", "0")),
            resolution_limit=None if limit is None else _first_number(limit),
            reflections=reflections,
            n_saturated=int(values.get("num_saturated_reflections", 0)),
            n_implausible=int(values.get("num_implausible_reflections", 0)),
            det_shift_mm=_read_shift(values.get("predict_refine/det_shift x", "0 y = 0 mm")),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise BadFrame(f"a crystal block lacks or garbles {error}; the stream is damaged there") from error


def _read_shift(text: str) -> tuple[float, float]:
    """x and y in ``0.152 y = -0.023 mm``, which is what stands behind the first sign of equality."""
    x, _, y = text.partition("y =")
    return _first_number(x), _first_number(y)


# Helpers of the writer.


def _geometry(header: StreamHeader) -> Geometry:
    if len(header.image_shape) != 2 or header.detector is None:
        raise BadFrame(
            f"{header.data_source} has shape {header.image_shape} and "
            f"{'no' if header.detector is None else 'a'} detector header; CrystFEL takes 2-D frames of a known detector"
        )
    slow, fast = header.image_shape
    return Geometry.from_header(header.detector, (slow, fast))


def _largest_count(header: StreamHeader) -> int:
    """Counts above it are markers: the two top values of the dtype.

    CrystFEL compares in float32, where 2**32 - 3 and 2**32 - 1 are the same number, and counts
    of 2**31 do not occur; so uint32 is cut there.
    """
    dtype = np.dtype(header.dtype)
    return min(int(np.iinfo(dtype).max), _INT32_MAX) - 2 if dtype.kind in "ui" else _INT32_MAX - 2


def _preamble(audit_lines: Sequence[str], geometry: str, cell: str | None) -> str:
    lines = [_MAGIC, *(line for text in audit_lines for line in text.splitlines())]
    longest = max(len(line.encode()) for line in lines)
    total = sum(len(line.encode()) + 1 for line in lines)
    if longest > _AUDIT_LINE_BYTES or total > _AUDIT_BYTES:
        raise BadFrame(
            f"audit lines of {total} bytes, the longest {longest}: CrystFEL refuses more than {_AUDIT_BYTES} "
            f"and {_AUDIT_LINE_BYTES}; keep program, version and command line"
        )
    if any(line.startswith("-----") for line in lines):
        raise BadFrame("an audit line starts with -----, which is how CrystFEL marks its blocks; reword it")
    lines += ["----- Begin geometry file -----", geometry.rstrip("\n"), "----- End geometry file -----"]
    if cell is not None:
        lines += ["----- Begin unit cell -----", cell.rstrip("\n"), "----- End unit cell -----"]
    return "\n".join(lines) + "\n"


def _cut_to_whole_chunks(path: Path, preamble: str) -> bool:
    """Cut a stream behind its last whole chunk; False if not even its preamble is whole.

    Raises BadFrame, and cuts nothing, if the stream did not begin as this writer would.
    """
    head, begin, end = preamble.encode(), b"----- Begin chunk -----\n", b"----- End chunk -----\n"
    with path.open("rb") as file:
        found = file.read(len(head) + len(begin))
        if head.startswith(found):
            return found == head
        # Behind the preamble comes a chunk, perhaps torn in its first line, and not a cell.
        if not (head + begin).startswith(found):
            raise BadFrame(
                f"{path} began with another geometry, cell or command line; write a new stream beside it, "
                "and concatenate only if the geometry is the same"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            last = text.rfind(end)
    os.truncate(path, len(head) if last < 0 else last + len(end))
    return True


def _columns(*named: tuple[str, np.ndarray]) -> list[np.ndarray]:
    """The columns as float arrays of one length, all finite."""
    columns = [np.asarray(values, float) for _, values in named]
    n = len(columns[0])
    for (name, _), column in zip(named, columns, strict=True):
        if column.shape != (n,):
            raise ShapeMismatch(f"{name} has shape {column.shape}, {named[0][0]} has {n} rows; give one value a row")
        if not np.isfinite(column).all():
            row = int(np.argmin(np.isfinite(column)))
            raise BadFrame(f"{name} is {column[row]} in row {row}; leave such rows out")
    return columns


def _check_lattice(crystal: StreamCrystal) -> None:
    if crystal.lattice_type not in _LATTICES:
        raise BadFrame(f"lattice_type is {crystal.lattice_type!r}; CrystFEL knows {', '.join(_LATTICES)}")
    if len(crystal.centering) != 1 or crystal.centering not in _CENTERINGS:
        raise BadFrame(f"centering is {crystal.centering!r}; CrystFEL knows {', '.join(_CENTERINGS)}")
    if crystal.unique_axis not in ("a", "b", "c", "*", "?"):
        raise BadFrame(f"unique_axis is {crystal.unique_axis!r}; use a, b, c, or * for none")
    A = np.asarray(crystal.A, float)
    if A.shape != (3, 3) or not np.isfinite(A).all() or abs(np.linalg.det(A)) < 1e-18:
        raise BadFrame(f"A is {A.tolist()}; give three independent reciprocal vectors in 1/Å as rows")


def _peak_resolution(q: np.ndarray) -> float:
    """The largest 1/d when the top 2 % are dropped as outliers, as indexamajig states it."""
    return float(np.sort(q)[len(q) - 1 - len(q) // 50])


def _angle(u: np.ndarray, v: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip(u @ v, -1.0, 1.0))))


# Helpers of the reader.


def _check_magic(path: str | os.PathLike[str], lines: Iterator[str]) -> None:
    first = next(lines, "").rstrip("\n")
    if not first.startswith(_MAGIC):
        raise BadFrame(f"{path} starts with {first[:40]!r}, not {_MAGIC!r}; give a CrystFEL stream")


def _until(lines: Iterator[str], end: str) -> Iterator[str]:
    for line in lines:
        if line.startswith(end):
            return
        yield line


def _table(lines: Iterator[str], end: str, n_columns: int) -> np.ndarray | None:
    """A table without its heading: (column, row), the panel's name left off; None if the file ends inside."""
    next(lines, None)
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith(end):
            return _numbers(rows, n_columns)
        rows.append(line.split())
    return None


def _numbers(rows: list[list[str]], n_columns: int) -> np.ndarray:
    for row in rows:
        if len(row) != n_columns:
            raise BadFrame(f"table row {' '.join(row)!r} has {len(row)} columns, not {n_columns}; it is damaged")
    try:
        return np.array([row[:-1] for row in rows], float).reshape(len(rows), n_columns - 1).T
    except ValueError as error:
        raise BadFrame(f"a table of the stream is damaged: {error}") from error


def _key_value(line: str) -> tuple[str, str]:
    """A line of the form "key = value" or "key: value", whichever sign comes first."""
    match = _KEY_VALUE.match(line)
    return (match[1], match[2]) if match else (line.strip(), "")


def _first_number(text: str) -> float:
    """The number before its unit."""
    return float(text.split()[0])
