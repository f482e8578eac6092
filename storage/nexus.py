"""A run as an NXmx file: the detector's own bytes, with everything a reader needs around them.

Frames are written as HDF5 chunks exactly as they were delivered (bslz4 is filter 32008, lz4
is 32004, raw is no filter), so an export costs a copy and no decompression. Two layouts:

one file (default)
    ``/entry/data/data`` (frame, slow, fast), chunk = one frame.
master and data files (``frames_per_file``)
    the same path is a virtual dataset over ``<stem>_000001.h5`` and so on, named relative to
    the master, so the files must stay together. No external links ``data_000001`` stand
    beside it: fabio opens every member whose name starts with "data" and would see all
    frames twice.

Nothing half-written stands under a final name: files grow as ``<name>.part`` and are renamed
by :meth:`NxmxWriter.close`, the master last.

Field names, units and the geometry chain are those of the NeXus application definition NXmx
and of Bernstein et al. (2020), "Gold Standard for macromolecular crystallography diffraction
data", IUCrJ 7, 784-792; where a reader asks for something else, the comment names it.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import h5py
import hdf5plugin
import numpy as np

from storage.codec import Buffer, check_blob
from storage.errors import BadFrame, IndexConflict, OutputExists, ShapeMismatch, StorageFull
from storage.geometry import Geometry, Panel
from storage.models import DetectorHeader, RunHeader, StreamHeader
from storage.photons import energy_from_wavelength

__all__ = ["DATA_PATH", "MASK_PATH", "Beamline", "NxmxWriter", "OutputExists"]

DATA_PATH = "/entry/data/data"
MASK_PATH = "/entry/instrument/detector/pixel_mask"

_DETECTOR = "/entry/instrument/detector"
_DET_Z = f"{_DETECTOR}/transformations/det_z"
_EXPORTED_DTYPES = ("uint8", "uint16", "uint32")
# NXmx: bit 31 marks a virtual (interpolated) pixel, which is good data; dxtbx masks every
# non-zero value, so the bit is not passed on.
_VIRTUAL_PIXEL = np.uint32(1 << 31)
# dxtbx knows these words and raises ValueError on any other.
_MATERIALS = {
    "silicon": "Si",
    "cadmium telluride": "CdTe",
    "gallium arsenide": "GaAs",
    "si": "Si",
    "cdte": "CdTe",
    "gaas": "GaAs",
}


@dataclass(frozen=True, slots=True)
class Beamline:
    """What the file says of the place; None is left out rather than guessed.

    source, instrument : names as in the wwPDB lists of synchrotrons and beamlines.
    time_zone : ISO 8601 offset such as +02:00; all times in the file are UTC.
    beam_size : (horizontal, vertical) at the sample, m.
    beam_profile : Gaussian, Airy, top-hat or rectangular.
    total_flux : photons per second, Hz.
    polarization_stokes : NXbeam incident_polarization_stokes, 4 values.
    """

    source: str = "unspecified synchrotron"
    source_short_name: str | None = None
    source_type: str = "Synchrotron X-ray Source"
    instrument: str = "unspecified beamline"
    instrument_short_name: str | None = None
    time_zone: str | None = None
    beam_size: tuple[float, float] | None = None
    beam_profile: str | None = None
    total_flux: float | None = None
    polarization_stokes: tuple[float, float, float, float] | None = None


class NxmxWriter:
    """Writes the frames of one stream to an NXmx file, byte for byte as they were delivered.

    Parameters
    ----------
    path : the file, or the master file if ``frames_per_file`` is given.
    header : of the stream; 2-D frames of uint8, uint16 or uint32, with distance and wavelength.
    pixel_mask : (slow, fast), NXmx bits, non-zero = do not use. Bit 31 (virtual pixel) is
        cleared; the attribute ``virtual_pixels`` keeps the count.
    flatfield : (slow, fast), factors; written as float32.
    run_header : gives start time, sample and comment.
    sample : sample name; default the run's, else "unknown".
    beamline : names and beam of the place.
    geometry : a refined geometry to write instead of the header's flat detector.
    start : frame index of the first row when holes are kept.
    stop : end (exclusive) of the frame range when holes are kept; default behind the last frame.
    keep_holes : True: one row per frame index, a frame that is never appended reads as the
        dtype's maximum. False, for a selection such as hits only: one row per appended frame.
        Either way ``/entry/data/frame`` holds the original frame index of each row.
    frames_per_file : write a master and data files of so many rows.
    libver : HDF5 format bound; v110 is read by HDF5 1.10 (Debian's DIALS) and newer.
    overwrite : replace an existing file at close; until then it stays as it is.

    Raises
    ------
    BadFrame : the header cannot be an NXmx image, or lacks distance or wavelength.
    ShapeMismatch : mask or flat field does not cover the frame.
    OutputExists : a file of that name is there and ``overwrite`` is False.
    StorageFull : the folder cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: StreamHeader,
        *,
        pixel_mask: np.ndarray | None = None,
        flatfield: np.ndarray | None = None,
        run_header: RunHeader | None = None,
        sample: str | None = None,
        beamline: Beamline | None = None,
        geometry: Geometry | None = None,
        start: int = 0,
        stop: int | None = None,
        keep_holes: bool = True,
        frames_per_file: int | None = None,
        libver: str = "v110",
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.header = header
        self._run_header = run_header
        self._keep_holes = keep_holes
        self._start, self._stop = start, stop
        self._n_processes = 0
        self._rows: dict[int, int] = {}
        self._utc: dict[int, datetime] = {}
        detector = _require_image(header)
        geometry = geometry or Geometry.from_header(detector, _image_shape(header))
        mask = None if pixel_mask is None else _as_frame(pixel_mask, header, "pixel_mask", np.uint32)
        flat = None if flatfield is None else _as_frame(flatfield, header, "flatfield", np.float32)
        if frames_per_file is not None and frames_per_file < 1:
            raise BadFrame(f"frames_per_file is {frames_per_file}; give a positive number, or None for one file")
        if not overwrite and self.path.exists():
            raise OutputExists(f"{self.path} exists; choose another name or pass overwrite=True")

        self._part = _part(self.path)
        with _disk(self.path):
            self._file = h5py.File(self._part, "w", libver=(libver, libver), locking="best-effort")
        try:
            with _disk(self.path):
                _write_entry(self._file, header, run_header, self.path.name)
                _write_place(self._file, sample or _sample_name(run_header), beamline or Beamline(), geometry)
                _write_detector(self._file, header, detector, geometry, mask, flat)
            self._frames: _Frames = (
                _OneFile(self._file, header)
                if frames_per_file is None
                else _FileSeries(self._file, self.path, header, frames_per_file, libver, overwrite)
            )
        except BaseException:
            _abandon(self._file)
            self._part.unlink(missing_ok=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, or leave nothing behind when the body failed."""
        if kind is None:
            self.close()
        else:
            self.discard()

    def append(self, frame_index: int, blob: Buffer, utc: datetime | None = None) -> int:
        """Write one frame's compressed bytes and return its row in ``/entry/data/data``.

        Parameters
        ----------
        frame_index : of the stream, from 0. With holes kept, in any order; in a selection, rising.
        blob : as delivered, in the header's codec; a reader's CrystFEL event is ``//row``.
        utc : when the frame was taken; a naive time counts as UTC.

        Raises
        ------
        BadFrame : the blob is not one frame of the header's shape and dtype, or the index is out of range.
        IndexConflict : the index was appended before.
        StorageFull : the disk refused the bytes.
        """
        return self.append_parts(frame_index, {0: blob}, utc)

    def append_parts(self, frame_index: int, blobs: Mapping[int, Buffer], utc: datetime | None = None) -> int:
        """As `append`, a frame of a detector in parts: those that came, by number; the others read as masked.

        They stand one below the other in the row, each an HDF5 chunk of its own.
        """
        row = self._row_of(frame_index)
        for blob in blobs.values():
            try:
                check_blob(blob, self.header.codec, self.header.shape, self.header.dtype)
            except BadFrame as error:
                raise BadFrame(f"frame {frame_index} of {self.header.data_source}: {error}") from error
        with _disk(self.path):
            for part, blob in blobs.items():
                self._frames.write(row, part, blob)
        self._rows[frame_index] = row
        if utc is not None:
            self._utc[row] = _as_utc(utc)
        return row

    def add_process(
        self,
        program: str,
        version: str,
        date: datetime | str,
        parameters: Mapping[str, Any],
        *,
        recipe: Mapping[str, Any] | None = None,
        recipe_digest: str = "",
        commits: Sequence[str] = (),
        environments: Sequence[str] = (),
    ) -> None:
        """Record one processing step, in the order of the calls, as NXprocess with its parameters as JSON.

        Parameters
        ----------
        recipe : all steps it was one of; kept as JSON in an NXnote, with its digest beside it.
        commits, environments : of the processes that carried it out, most times one; fields of our own, (process,).
        """
        self._n_processes += 1
        k = self._n_processes
        process = _group(self._file["entry"], f"process_{k}", "NXprocess")
        _fields(
            process,
            {
                "program": program,
                "version": version,
                "date": date if isinstance(date, str) else _iso(date),
                "sequence_index": np.int32(k),
            },
        )
        _fields(process, {"commit": list(commits) or None, "environment": list(environments) or None})
        _json_note(process, "parameters", f"parameters of {program}", parameters)
        if recipe is not None:
            note = _json_note(process, "recipe", "recipe that this is a step of", recipe)
            _fields(note, {"digest": recipe_digest or None})

    def close(self) -> None:
        """Finish axes and times, record the export itself, and give the files their final names.

        Raises
        ------
        BadFrame : no frame was appended; nothing is left behind.
        StorageFull : the disk refused a write; nothing is left behind.
        """
        if not self._file:
            return
        try:
            if not self._rows:
                raise BadFrame(f"no frame was appended to {self.path}; check the selection or the frame range")
            with _disk(self.path):
                self._finish()
                self._file.close()
                _sync(self._part)
                self._frames.publish()
                os.replace(self._part, self.path)
                _sync(self.path.parent)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Give up: remove what was written so far; an existing file of the final name is untouched."""
        _abandon(self._file)
        self._frames.discard()
        self._part.unlink(missing_ok=True)

    def _row_of(self, frame_index: int) -> int:
        if not self._file:
            raise BadFrame(f"{self.path} is closed; frame {frame_index} needs a new writer")
        if frame_index in self._rows:
            raise IndexConflict(f"frame {frame_index} was already written to {self.path}; append each frame once")
        if not self._keep_holes:
            last = next(reversed(self._rows), -1)
            if frame_index < last:
                raise BadFrame(f"frame {frame_index} comes after {last}; append a selection in rising order")
            return len(self._rows)
        if frame_index < self._start or (self._stop is not None and frame_index >= self._stop):
            raise BadFrame(
                f"frame {frame_index} is outside the exported range {self._start} to {self._stop}; "
                "widen start and stop, or leave it out"
            )
        return frame_index - self._start

    def _finish(self) -> None:
        frames = self._frame_numbers()
        self._frames.finish(frames)
        data = self._file["entry/data"]
        _set_axis(data, "frame", frames, {"long_name": "frame index in the stream, from 0"})
        data.attrs["axes"] = np.array(["frame", ".", "."], dtype=h5py.string_dtype())
        start = self._write_times(len(frames))
        if self._utc:
            seconds = np.full(len(frames), np.nan)
            for row, utc in self._utc.items():
                seconds[row] = (utc - start).total_seconds()
            _set_axis(data, "time", seconds, {"units": "s", "start": _iso(start)})
        # A second name for the same dataset; NXmx recommends data in the detector too.
        self._file[_DETECTOR]["data"] = data["data"]
        specific = _group(self._file[_DETECTOR], "detectorSpecific", "NXcollection")
        _write_legacy(specific, self.header, len(frames), self._file.get(MASK_PATH))
        self._record_export(data["frame"])

    def _frame_numbers(self) -> np.ndarray:
        """(row,), int64: the frame index of each row."""
        if not self._keep_holes:
            return np.fromiter(self._rows, np.int64, len(self._rows))
        stop = self._stop if self._stop is not None else max(self._rows) + 1
        return np.arange(self._start, stop, dtype=np.int64)

    def _write_times(self, n_frames: int) -> datetime:
        """start_time, end_time (only if observed) and end_time_estimated; returns the start."""
        start, known_from = self._start_time()
        detector, series = self.header.detector, self.header.series
        planned = self.header.planned or (series.number_of_images if series else 0) or n_frames
        frame_time = detector.frame_time if detector else 0.0
        observed = max(self._utc.values(), default=None)
        estimate = start + timedelta(seconds=planned * frame_time)
        entry = self._file["entry"]
        _fields(
            entry,
            {
                "start_time": _iso(start),
                "end_time": None if observed is None else _iso(observed),
                "end_time_estimated": _iso(estimate),
            },
        )
        entry["start_time"].attrs["known_from"] = known_from
        return start

    def _start_time(self) -> tuple[datetime, str]:
        series = self.header.series
        if self._run_header is not None:
            return _as_utc(self._run_header.started_at), "run header"
        if series is not None and series.arm_date is not None:
            return _as_utc(series.arm_date), "arm of the detector"
        if self._utc:
            return min(self._utc.values()), "first frame"
        return datetime.now(UTC), "time of export, the start of the run is not recorded"

    def _record_export(self, frames: h5py.Dataset) -> None:
        """The last NXprocess: this export, its source, and which frames it took."""
        self.add_process(
            "nearline",
            _nearline_version(),
            datetime.now(UTC),
            {
                "step": "export_nexus",
                "stream": self.header.model_dump(mode="json"),
                "run": self._run_header.model_dump(mode="json") if self._run_header else None,
                "keep_holes": self._keep_holes,
                "n_frames": len(self._rows),
                "n_rows": len(frames),
            },
        )
        selection = _group(self._file[f"entry/process_{self._n_processes}"], "selection", "NXcollection")
        selection["frame"] = frames


class _Frames(Protocol):
    """Where the rows go: one file, or a series of data files."""

    def write(self, row: int, part: int, blob: Buffer) -> None: ...

    def finish(self, frames: np.ndarray) -> None:
        """All rows are known: trim, and make ``/entry/data/data`` whole."""

    def publish(self) -> None:
        """Called with the master closed: sync and rename what lies beside it."""

    def discard(self) -> None: ...


class _FrameArray:
    """A growing (frame, slow, fast) dataset whose chunks are the detector's blobs, one for each part of a frame."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.dataset = dataset

    @classmethod
    def create(cls, group: h5py.Group, header: StreamHeader) -> Self:
        slow, fast = _image_shape(header)
        return cls(
            group.create_dataset(
                "data",
                shape=(0, slow, fast),
                maxshape=(None, slow, fast),
                chunks=(1, slow // header.parts, fast),
                dtype=np.dtype(header.dtype).newbyteorder("<"),
                fillvalue=header.fill_value,
                **_filter(header.codec),
            )
        )

    def write(self, row: int, part: int, blob: Buffer) -> None:
        if row >= len(self.dataset):
            # Doubling: a resize per frame would rewrite the dataspace message each time.
            self.dataset.resize(max(row + 1, 2 * len(self.dataset)), axis=0)
        self.dataset.id.write_direct_chunk((row, part * self.dataset.chunks[1], 0), _contiguous(blob))

    def trim(self, n_rows: int) -> None:
        self.dataset.resize(n_rows, axis=0)


class _OneFile:
    """All rows in the file itself."""

    def __init__(self, file: h5py.File, header: StreamHeader) -> None:
        self._array = _FrameArray.create(file["entry/data"], header)
        self.write = self._array.write

    def finish(self, frames: np.ndarray) -> None:
        self._array.trim(len(frames))

    def publish(self) -> None:
        """Nothing lies beside the file."""

    def discard(self) -> None:
        """Nothing lies beside the file."""


class _FileSeries:
    """Rows in data files of ``per_file`` rows each, joined by a virtual dataset in the master.

    One data file is open at a time; going back to an earlier one opens it again.
    """

    def __init__(
        self, master: h5py.File, path: Path, header: StreamHeader, per_file: int, libver: str, overwrite: bool
    ) -> None:
        self._master, self._path, self._header = master, path, header
        self._per_file, self._libver, self._overwrite = per_file, libver, overwrite
        self._started: list[int] = []
        self._current = -1
        self._open: h5py.File | None = None
        self._array: _FrameArray | None = None

    def write(self, row: int, part: int, blob: Buffer) -> None:
        k, inner = divmod(row, self._per_file)
        self._array_of(k).write(inner, part, blob)

    def finish(self, frames: np.ndarray) -> None:
        slow, fast = _image_shape(self._header)
        dtype = np.dtype(self._header.dtype).newbyteorder("<")
        layout = h5py.VirtualLayout((len(frames), slow, fast), dtype)
        for k in sorted(self._started):
            first = k * self._per_file
            n = min(self._per_file, len(frames) - first)
            array = self._array_of(k)
            array.trim(n)
            # DECTRIS file writer: the numbers of a file's first and last image, from 1.
            array.dataset.attrs.update({"image_nr_low": first + 1, "image_nr_high": first + n})
            layout[first : first + n] = h5py.VirtualSource(self._name(k), DATA_PATH, shape=(n, slow, fast))
        self._close()
        # A data file that went missing reads as fill too: the dtype's maximum, hence masked.
        self._master["entry/data"].create_virtual_dataset("data", layout, fillvalue=self._header.fill_value)

    def publish(self) -> None:
        for k in self._started:
            _sync(_part(self._file_path(k)))
        for k in self._started:
            os.replace(_part(self._file_path(k)), self._file_path(k))

    def discard(self) -> None:
        _abandon(self._open)
        for k in self._started:
            _part(self._file_path(k)).unlink(missing_ok=True)

    def _array_of(self, k: int) -> _FrameArray:
        if self._array is None or k != self._current:
            self._close()
            self._array = self._reopen(k) if k in self._started else self._create(k)
            self._current = k
        return self._array

    def _create(self, k: int) -> _FrameArray:
        target = self._file_path(k)
        if target.exists() and not self._overwrite:
            raise OutputExists(f"{target} exists; choose another master name or pass overwrite=True")
        self._open = h5py.File(_part(target), "w", libver=(self._libver, self._libver), locking="best-effort")
        self._started.append(k)
        _write_root(self._open, target.name)
        entry = _group(self._open, "entry", "NXentry")
        entry.attrs["default"] = "data"
        data = _group(entry, "data", "NXdata")
        data.attrs["signal"] = "data"
        return _FrameArray.create(data, self._header)

    def _reopen(self, k: int) -> _FrameArray:
        self._open = h5py.File(
            _part(self._file_path(k)), "r+", libver=(self._libver, self._libver), locking="best-effort"
        )
        return _FrameArray(self._open[DATA_PATH])

    def _close(self) -> None:
        if self._open:
            self._open.close()
        self._open = self._array = None

    def _name(self, k: int) -> str:
        return f"{self._path.stem}_{k + 1:06d}.h5"

    def _file_path(self, k: int) -> Path:
        return self._path.with_name(self._name(k))


# What stands in the file, from the root inwards.


def _write_root(file: h5py.File, name: str) -> None:
    file.attrs.update(
        {
            "NX_class": "NXroot",
            "default": "entry",
            "file_name": name,
            "file_time": _iso(datetime.now(UTC)),
            "creator": "nearline",
            "creator_version": _nearline_version(),
            "HDF5_Version": h5py.version.hdf5_version,
            "h5py_version": h5py.version.version,
        }
    )


def _write_entry(file: h5py.File, header: StreamHeader, run: RunHeader | None, name: str) -> None:
    """NXentry: identity; times come at close."""
    _write_root(file, name)
    entry = _group(file, "entry", "NXentry")
    entry.attrs["default"] = "data"
    _fields(
        entry,
        {
            "definition": "NXmx",
            # punx with its bundled definitions calls a missing title an error.
            "title": f"{header.experiment} run {header.run} {header.data_source}",
            "experiment_identifier": header.experiment,
            "entry_identifier": f"{header.experiment}/{header.run}/{header.data_source}",
        },
    )
    entry["definition"].attrs["version"] = "1.0"
    if run is not None and run.comment:
        note = _group(entry, "notes", "NXnote")
        _fields(note, {"type": "text/plain", "description": "comment on the run", "data": run.comment})
    data = _group(entry, "data", "NXdata")
    data.attrs["signal"] = "data"


def _write_place(file: h5py.File, sample: str, beamline: Beamline, geometry: Geometry) -> None:
    """NXsource (in the entry, as the present NXmx has it), NXinstrument, NXbeam and NXsample."""
    entry = file["entry"]
    source = _group(entry, "source", "NXsource")
    _fields(source, {"name": beamline.source, "type": beamline.source_type, "probe": "x-ray"})
    _short_name(source["name"], beamline.source_short_name)
    instrument = _group(entry, "instrument", "NXinstrument")
    _fields(instrument, {"name": beamline.instrument, "time_zone": beamline.time_zone})
    _short_name(instrument["name"], beamline.instrument_short_name)
    beam = _group(instrument, "beam", "NXbeam")
    _fields(
        beam,
        {
            "incident_wavelength": (geometry.wavelength, "angstrom"),
            # Not of NXmx but of NXbeam, and what CrystFEL's photon_energy can point at.
            "incident_energy": (energy_from_wavelength(geometry.wavelength), "eV"),
            "incident_beam_size": None if beamline.beam_size is None else (np.array(beamline.beam_size), "m"),
            "profile": beamline.beam_profile,
            "total_flux": None if beamline.total_flux is None else (beamline.total_flux, "Hz"),
            "incident_polarization_stokes": None
            if beamline.polarization_stokes is None
            else np.array(beamline.polarization_stokes, float),
        },
    )
    # Snapshots of unrelated crystals: no goniometer, so dxtbx makes separate still experiments.
    _fields(_group(entry, "sample", "NXsample"), {"name": sample, "depends_on": "."})


def _write_detector(
    file: h5py.File,
    header: StreamHeader,
    detector: DetectorHeader,
    geometry: Geometry,
    mask: np.ndarray | None,
    flat: np.ndarray | None,
) -> None:
    """NXdetector with its numbers, mask, flat field, transformations and modules."""
    instrument = file["entry/instrument"]
    group = _group(instrument, "detector", "NXdetector")
    _fields(group, _detector_fields(header, detector, geometry))
    names = np.array(["detector"], dtype=h5py.string_dtype())
    _fields(
        _group(instrument, "detector_group", "NXdetector_group"),
        {"group_names": names, "group_index": np.array([1], np.int32), "group_parent": np.array([-1], np.int32)},
    )
    if mask is not None:
        pixel_mask = _compressed(group, "pixel_mask", mask & ~_VIRTUAL_PIXEL)
        pixel_mask.attrs["virtual_pixels"] = int(np.count_nonzero(mask & _VIRTUAL_PIXEL))
    if flat is not None:
        _compressed(group, "flatfield", flat)
    _write_geometry(group, geometry)


def _detector_fields(header: StreamHeader, detector: DetectorHeader, geometry: Geometry) -> dict[str, Any]:
    """Scalars of NXdetector; a zero or None of the header means "never said" and is left out."""
    x, y = geometry.beam_center
    # dxtbx turns the two largest values of this depth into masked ones, which is where
    # detectors put gaps, bad pixels and overflow.
    depth = 8 * np.dtype(header.dtype).itemsize
    material = detector.sensor_material
    return {
        "description": detector.description or None,
        "serial_number": detector.serial_number or None,
        "sensor_material": _MATERIALS.get(material.lower(), material),
        # dxtbx refuses a sensor without depth; one of 1 nm has no parallax either.
        "sensor_thickness": (detector.sensor_thickness or 1e-9, "m"),
        "x_pixel_size": (detector.pixel_size_x, "m"),
        "y_pixel_size": (detector.pixel_size_y, "m"),
        "distance": (geometry.distance, "m"),
        "distance_derived": False,
        "beam_center_x": (float(x), "pixel"),
        "beam_center_y": (float(y), "pixel"),
        "count_time": (detector.count_time, "s") if detector.count_time else None,
        "frame_time": (detector.frame_time, "s") if detector.frame_time else None,
        "detector_readout_time": _readout_time(detector),
        "threshold_energy": None if detector.threshold_energy is None else (detector.threshold_energy, "eV"),
        "bit_depth_readout": np.int32(depth),
        "bit_depth_image": np.int32(depth),
        "saturation_value": _saturation_value(header, detector),
        "underload_value": np.int64(0),
        "pixel_mask_applied": detector.pixel_mask_enabled,
        "flatfield_applied": detector.flatfield_enabled,
        "countrate_correction_applied": detector.countrate_correction_enabled,
        "virtual_pixel_interpolation_applied": detector.virtual_pixel_interpolation_enabled,
        "depends_on": _DET_Z,
    }


def _readout_time(detector: DetectorHeader) -> tuple[float, str] | None:
    gap = detector.frame_time - detector.count_time
    return (gap, "s") if detector.count_time and gap >= 0 else None


def _saturation_value(header: StreamHeader, detector: DetectorHeader) -> np.int64:
    """The header's, else the largest count that no reader takes for a marker.

    The two top values of the dtype mark bad pixels and overflow; dxtbx reads int32, so of
    uint32 only the lower half counts.
    """
    if detector.saturation_value is not None:
        return np.int64(detector.saturation_value)
    return np.int64(min(int(np.iinfo(header.dtype).max), 2**31 - 1) - 2)


def _write_geometry(group: h5py.Group, geometry: Geometry) -> None:
    """The chain fast_pixel_direction → module_offset → det_z → "." for each panel."""
    distance = geometry.panels[0].corner[2]
    transformations = _group(group, "transformations", "NXtransformations")
    det_z = _axis(transformations, "det_z", np.array([distance * 1e3]), "mm", (0.0, 0.0, 1.0), ".")
    det_z.attrs["equipment_component"] = "detector"
    for k, panel in enumerate(geometry.panels, 1):
        name = "module" if len(geometry.panels) == 1 else f"module_{k}"
        _write_module(_group(group, name, "NXdetector_module"), panel, distance)


def _write_module(module: h5py.Group, panel: Panel, distance: float) -> None:
    x, y, z = panel.corner
    offset_path = f"{module.name}/module_offset"
    # data_size is (slow, fast) as NXmx defines it; some files of old have it reversed.
    _fields(
        module,
        {
            "data_origin": np.array(panel.origin, np.int64),
            "data_size": np.array(panel.shape, np.int64),
            "data_stride": np.ones(2, np.int64),
        },
    )
    _axis(module, "module_offset", 0.0, "m", (1.0, 0.0, 0.0), _DET_Z, offset=(x, y, z - distance))
    for name, step in (("fast_pixel_direction", panel.fast), ("slow_pixel_direction", panel.slow)):
        length = float(np.linalg.norm(step))
        _axis(module, name, length, "m", np.asarray(step) / length, offset_path)


def _write_legacy(group: h5py.Group, header: StreamHeader, n_frames: int, mask: h5py.Dataset | None) -> None:
    """DECTRIS file writer names that neggia (the XDS plugin) and older programs look for."""
    slow, fast = _image_shape(header)
    _fields(
        group,
        {
            "nimages": np.int64(n_frames),
            "ntrigger": np.int64(1),
            "x_pixels_in_detector": np.int64(fast),
            "y_pixels_in_detector": np.int64(slow),
        },
    )
    if mask is not None:
        group["pixel_mask"] = mask


# Small pieces of HDF5.


def _group(parent: h5py.Group, name: str, nx_class: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["NX_class"] = nx_class
    return group


def _fields(group: h5py.Group, fields: Mapping[str, Any]) -> None:
    """Datasets of a group; a value may be (value, units); None is left out."""
    for name, field in fields.items():
        value, units = field if isinstance(field, tuple) else (field, None)
        if value is None:
            continue
        dataset = group.create_dataset(name, data=value)
        if units:
            dataset.attrs["units"] = units


def _json_note(parent: h5py.Group, name: str, description: str, content: Mapping[str, Any]) -> h5py.Group:
    note = _group(parent, name, "NXnote")
    data = json.dumps(dict(content), default=str, indent=1)
    _fields(note, {"type": "application/json", "description": description, "data": data})
    return note


def _axis(
    group: h5py.Group,
    name: str,
    value: Any,
    units: str,
    vector: Any,
    depends_on: str,
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> h5py.Dataset:
    """One translation of a NeXus transformation chain; offset in m."""
    dataset = group.create_dataset(name, data=value)
    dataset.attrs.update(
        {
            "transformation_type": "translation",
            "units": units,
            # Adding zero turns -0.0 into 0.0, which people read.
            "vector": np.asarray(vector, float) + 0.0,
            "offset": np.asarray(offset, float) + 0.0,
            "offset_units": "m",
            "depends_on": depends_on,
        }
    )
    return dataset


def _set_axis(data: h5py.Group, name: str, values: np.ndarray, attributes: Mapping[str, Any]) -> None:
    """An axis of NXdata along the frames."""
    data.create_dataset(name, data=values).attrs.update(attributes)
    data.attrs[f"{name}_indices"] = np.int32(0)


def _compressed(group: h5py.Group, name: str, array: np.ndarray) -> h5py.Dataset:
    """A whole-frame array as one bslz4 chunk, the filter that readers of the frames have anyway."""
    return group.create_dataset(name, data=array, chunks=array.shape, **_filter("bslz4"))


def _short_name(dataset: h5py.Dataset, short_name: str | None) -> None:
    if short_name:
        dataset.attrs["short_name"] = short_name


def _filter(codec: str) -> Mapping[str, Any]:
    if codec == "bslz4":
        return hdf5plugin.Bitshuffle(cname="lz4")
    return hdf5plugin.LZ4() if codec == "lz4" else {}


def _contiguous(blob: Buffer) -> Any:
    """The blob as h5py takes it: anything with a contiguous buffer."""
    return np.ascontiguousarray(blob) if isinstance(blob, np.ndarray) else blob


# Checks at the boundary.


def _require_image(header: StreamHeader) -> DetectorHeader:
    if len(header.image_shape) != 2 or header.dtype not in _EXPORTED_DTYPES:
        raise BadFrame(
            f"{header.data_source} has frames of shape {header.image_shape} and dtype {header.dtype!r}; NXmx export "
            f"takes 2-D frames of {', '.join(_EXPORTED_DTYPES)}; read other streams from the Zarr store"
        )
    if header.detector is None:
        raise BadFrame(
            f"{header.data_source} has no detector header, and NXmx needs distance and wavelength; "
            "set them in the experiment file"
        )
    return header.detector


def _image_shape(header: StreamHeader) -> tuple[int, int]:
    slow, fast = header.image_shape
    return slow, fast


def _as_frame(array: np.ndarray, header: StreamHeader, name: str, dtype: type[np.generic]) -> np.ndarray:
    array = np.asarray(array)
    if array.shape != header.image_shape:
        raise ShapeMismatch(
            f"{name} has shape {array.shape}, but frames of {header.data_source} have {header.image_shape}; "
            "give the array of this detector and binning, axes (slow, fast)"
        )
    return np.ascontiguousarray(array, dtype)


def _sample_name(run: RunHeader | None) -> str:
    return (run.sample if run else None) or "unknown"


# Files and times.


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Say which file the disk refused; h5py gives OSError or RuntimeError, by the HDF5 call that failed."""
    try:
        yield
    except OutputExists:
        raise
    except (OSError, RuntimeError) as error:
        raise StorageFull(
            f"cannot write {path}: {error}; check that the folder exists, may be written, and has free space"
        ) from error


def _abandon(file: h5py.File | None) -> None:
    """Close a file that is about to be removed.

    On a full disk HDF5 fails a second time here, over the bytes it still holds; the first
    error is the one to report, and the file must be removed all the same.
    """
    if file:
        with contextlib.suppress(OSError, RuntimeError):
            file.close()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _as_utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _iso(time: datetime) -> str:
    """ISO 8601 in UTC with Z: the gold standard accepts no local time without an offset."""
    return _as_utc(time).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _nearline_version() -> str:
    try:
        return version("nearline")
    except PackageNotFoundError:  # a bare clone, nothing installed
        return "unknown"
