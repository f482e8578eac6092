"""Recorded files sent again as a detector would send them.

miniCBF files (Pilatus) and HDF5 masters (NXmx, DECTRIS filewriter) become the same stream v2 messages
that the simulator sends. An HDF5 chunk that holds one frame as bslz4 or lz4 is passed on as it is; all
else is decoded and encoded again, which the start message declares under "source", and every frame
from a CBF file carries its original's name, digest and header text in its user_data.
"""

import bz2
import contextlib
import glob
import gzip
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fabio
import h5py
import hdf5plugin  # noqa: F401 - registers the detectors' compression filters
import numpy as np
from blake3 import blake3

from storage.codec import encode
from storage.errors import BadFrame, NearlineError, RunNotFound, ShapeMismatch
from storage.geometry import energy_from_wavelength, wavelength_from_energy
from storage.models import DetectorHeader
from streaming.simulator.dectris import (
    DectrisStreamSender,
    PreparedImage,
    Progress,
    SenderSettings,
    finish,
    nearline_user_data,
    send_images,
)
from streaming.simulator.run import SeriesSent, map_ahead

__all__ = ["ReplayFrame", "ReplaySeries", "parse_cbf_header", "read_files", "replay"]

_CBF_ENDINGS = (".cbf", ".cbf.gz", ".cbf.bz2")
_HDF5_ENDINGS = (".h5", ".hdf5", ".nxs")

# Bits of the NXmx pixel_mask that Pilatus' marker values stand for.
_GAP_BIT, _DEAD_BIT = 1 << 0, 1 << 1
_CBF_GAP, _CBF_DEAD = -1, -2

# HDF5 filter numbers of the codecs that stream v2 carries as they are.
_BITSHUFFLE_FILTER, _LZ4_FILTER, _BITSHUFFLE_WITH_LZ4 = 32008, 32004, 2

_LENGTH_M = {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "um": 1e-6, "µm": 1e-6, "micron": 1e-6}
_WAVELENGTH_A = {"angstrom": 1.0, "a": 1.0, "å": 1.0, "nm": 10.0}
_ENERGY_EV = {"ev": 1.0, "kev": 1e3}
_TIME_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_NO_UNIT = {"": 1.0}

Codec = Literal["bslz4", "lz4"]
_Image = tuple[int, bytes | PreparedImage, dict[str, Any] | None]  # image_id, image, user_data


@dataclass(frozen=True, slots=True)
class ReplayFrame:
    """One recorded frame.

    data : the compressed bytes as recorded, or (slow, fast) pixels where they had to be decoded.
    user_data : where it came from; becomes the image message's user_data.
    """

    index: int
    data: bytes | np.ndarray
    user_data: dict[str, Any]

    @property
    def blob(self) -> bytes:
        """The frame as it is sent."""
        return encode(self.data) if isinstance(self.data, np.ndarray) else self.data


@dataclass
class ReplaySeries:
    """Recorded frames with what a start message needs; iterate it for the frames in order.

    shape : (slow, fast), px. dtype : "uint8", "uint16" or "uint32", its maximum marks masked pixels.
    pixel_mask : (slow, fast), uint32, NXmx bits; None where the files have none.
    n_images : frames of the series, those never written included; these are not yielded.
    codec : of the blobs. source : what the start message says of the origin.
    """

    header: DetectorHeader
    shape: tuple[int, int]
    dtype: str
    pixel_mask: np.ndarray | None
    n_images: int
    codec: Codec
    source: dict[str, Any]
    read: Callable[[int], ReplayFrame | None] = field(repr=False)
    """Frame by index; None when the file has a place for it but it was never written."""
    close: Callable[[], None] = field(default=lambda: None, repr=False)

    def __len__(self) -> int:
        return self.n_images

    def __iter__(self) -> Iterator[ReplayFrame]:
        return (frame for frame in map(self.read, range(self.n_images)) if frame is not None)

    def __enter__(self) -> "ReplaySeries":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, channel: int | None = None, **overrides: Any
) -> ReplaySeries:
    """Open recorded frames as one series.

    Parameters
    ----------
    paths : files, folders or patterns (*.cbf); CBF files are ordered by the number in their names.
    channel : which channel of a file that holds several thresholds.
    overrides : fields of DetectorHeader that replace what the files say, e.g. detector_distance=0.2 (m),
        beam_center_x=1030.5 (px), incident_wavelength=0.98 (Å; the energy then follows).

    Raises
    ------
    RunNotFound : a file is missing, or nothing matches.
    BadFrame : unknown or mixed formats, or no images inside.
    ShapeMismatch : frames of different shapes.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    files = _find_files(paths)
    series = _open_cbf(files) if _is_cbf(files[0]) else _open_hdf5(files, channel)
    try:
        series.header = _override(series.header, overrides)
    except BaseException:
        series.close()
        raise
    return series


def replay(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    settings: SenderSettings | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    channel: int | None = None,
    preload: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    on_bound: Callable[[str], None] | None = None,
) -> SeriesSent:
    """Send recorded files as DECTRIS stream v2.

    Parameters
    ----------
    settings : where to bind, rate in frames per second, repeats, experiment, run, sample.
    overrides : header values that replace the files', as in read_files.
    preload : read and encode everything before the first message, to hold a rate that reading cannot.
    threads : that read ahead; None is one per core.
    progress : called with (stage, done, total).
    stop : looked at between frames; when set, the series ends early with its end message.
    on_bound : called with the bound endpoint before anything is sent.

    Raises
    ------
    As read_files; ServiceUnavailable when the port is taken or no receiver comes in time.
    """
    settings = settings or SenderSettings()
    tell = progress or (lambda stage, done, total: None)
    with (
        read_files(paths, channel=channel, **(overrides or {})) as series,
        DectrisStreamSender(
            settings.bind,
            high_water_mark=settings.high_water_mark,
            receiver_timeout=settings.receiver_timeout,
            report=lambda sentence: tell(sentence, 0, 0),
        ) as sender,
    ):
        if on_bound is not None:
            on_bound(sender.endpoint)
        held = _preload(series, threads, tell) if preload else None
        sender.wait_for_receiver()
        started, unique_ids, n_sent = time.monotonic(), [], 0
        prepared: list[_Image] = []
        for repeat in range(settings.repeat):
            if stop is not None and stop.is_set():
                break
            _send_start(sender, series, settings, repeat)
            unique_ids.append(sender.series_unique_id)
            if held and not prepared:
                prepared = [(f.index, sender.prepare_image(f.blob, f.user_data), None) for f in held]
                held.clear()
                started = time.monotonic()
            images = _until_stopped(prepared or _images_ahead(series, threads), stop)
            n_sent += send_images(sender, images, rate=settings.rate, total=series.n_images, progress=progress)
            sender.send_end()
        finish(sender)
        seconds = time.monotonic() - started
    return SeriesSent(sender.endpoint, len(unique_ids), n_sent, sender.n_bytes_sent, seconds, tuple(unique_ids))


def _send_start(sender: DectrisStreamSender, series: ReplaySeries, settings: SenderSettings, repeat: int) -> None:
    run = None if settings.run is None else settings.run + repeat
    sender.send_start(
        series.header,
        series.shape,
        series.dtype,
        series.n_images,
        series_id=settings.series_id + repeat,
        codec=series.codec,
        header_detail=settings.header_detail,
        pixel_mask=series.pixel_mask,
        user_data={**nearline_user_data(settings.experiment, run, settings.sample), "source": series.source},
    )


def _frames_ahead(series: ReplaySeries, threads: int | None) -> Iterator[ReplayFrame]:
    """The frames, read and encoded in threads while the ones before are being sent."""

    def encoded(index: int) -> ReplayFrame | None:
        frame = series.read(index)
        return None if frame is None else ReplayFrame(frame.index, frame.blob, frame.user_data)

    frames = map_ahead(encoded, range(series.n_images), threads=threads)
    return (frame for frame in frames if frame is not None)


def _images_ahead(series: ReplaySeries, threads: int | None) -> Iterator[_Image]:
    return ((frame.index, frame.blob, frame.user_data) for frame in _frames_ahead(series, threads))


def _until_stopped(images: Iterable[_Image], stop: threading.Event | None) -> Iterator[_Image]:
    return itertools.takewhile(lambda image: stop is None or not stop.is_set(), images)


def _preload(series: ReplaySeries, threads: int | None, tell: Progress) -> list[ReplayFrame]:
    frames: list[ReplayFrame] = []
    for frame in _frames_ahead(series, threads):
        frames.append(frame)
        tell("reading frames", len(frames), series.n_images)
    return frames


def _override(header: DetectorHeader, overrides: Mapping[str, Any]) -> DetectorHeader:
    values = {name: value for name, value in overrides.items() if value is not None}
    unknown = sorted(set(values) - set(DetectorHeader.model_fields))
    if unknown:
        raise BadFrame(
            f"cannot override {', '.join(unknown)}; header fields are {', '.join(sorted(DetectorHeader.model_fields))}"
        )
    if "incident_wavelength" in values:
        values.setdefault("incident_energy", energy_from_wavelength(values["incident_wavelength"]))
    elif "incident_energy" in values:
        values["incident_wavelength"] = wavelength_from_energy(values["incident_energy"])
    return DetectorHeader.model_validate(header.model_dump() | values)


# ---- finding files


def _find_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Existing files of one format, CBF files by their numbers."""
    files = [file for path in paths for file in _expand(path)]
    if not files:
        raise RunNotFound("no files were named; give CBF files, an HDF5 master, a folder or a pattern")
    kinds = {_is_cbf(file) for file in files}
    if len(kinds) > 1:
        raise BadFrame(
            f"both CBF and HDF5 files are named ({files[0].name} … {files[-1].name}); replay one kind at a time"
        )
    return sorted(files, key=_number_in_name) if kinds == {True} else files


def _expand(path: str | os.PathLike[str]) -> list[Path]:
    found = Path(path)
    if found.is_dir():
        return _files_of_folder(found)
    if found.is_file():
        if not found.name.lower().endswith((*_CBF_ENDINGS, *_HDF5_ENDINGS)):
            raise BadFrame(f"{found} has no known format; replay reads {', '.join((*_CBF_ENDINGS, *_HDF5_ENDINGS))}")
        return [found]
    if glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path)))
        if not matches:
            raise RunNotFound(f"no files match {path}; check the folder and the pattern")
        return [file for match in matches for file in _expand(match)]
    raise RunNotFound(f"no file or folder {path}; check the name")


def _files_of_folder(folder: Path) -> list[Path]:
    names = sorted(entry for entry in folder.iterdir() if entry.is_file())
    files = [file for file in names if file.name.lower().endswith((*_CBF_ENDINGS, *_HDF5_ENDINGS))]
    if not files:
        raise RunNotFound(f"folder {folder} holds no CBF or HDF5 files; name the folder of the images")
    # data files beside their master would be sent twice
    masters = [file for file in files if file.stem.endswith("_master") or file.suffix == ".nxs"]
    return masters if masters and not any(map(_is_cbf, files)) else files


def _is_cbf(file: Path) -> bool:
    return file.name.lower().endswith(_CBF_ENDINGS)


def _number_in_name(file: Path) -> tuple[str, int, str]:
    """(prefix, last number in the name, name): there is no frame number in a CBF header."""
    stem = re.sub(r"\.cbf(\.gz|\.bz2)?$", "", file.name, flags=re.IGNORECASE)
    match = re.fullmatch(r"(.*?)(\d+)\D*", stem)
    # folder first, so that scans in several folders do not interleave
    return (str(file.parent / match[1]), int(match[2]), stem) if match else (str(file.parent / stem), -1, stem)


# ---- miniCBF


def _open_cbf(files: list[Path]) -> ReplaySeries:
    shapes = {file: _cbf_shape(file) for file in files}
    shape = shapes[files[0]]
    for file, other in shapes.items():
        if other != shape:
            raise ShapeMismatch(
                f"{file.name} is {other[0]} x {other[1]} px, but {files[0].name} is {shape[0]} x {shape[1]}; "
                "replay files of one detector and region at a time"
            )
    counts, text = _read_cbf(files[0])
    mask = np.where(counts == _CBF_GAP, _GAP_BIT, np.where(counts < _CBF_GAP, _DEAD_BIT, 0)).astype(np.uint32)

    def read(index: int) -> ReplayFrame:
        file = files[index]
        counts, header_text = _read_cbf(file)
        provenance = {
            "source_file": file.name,
            "source_digest": "blake3:" + blake3(file.read_bytes()).hexdigest(),
            "cbf_header": header_text,
        }
        return ReplayFrame(index, _mark_masked(counts, np.dtype(np.uint32)), provenance)

    source = {"format": "miniCBF", "n_files": len(files), "transcoded": True, "compression": "x-CBF_BYTE_OFFSET"}
    return ReplaySeries(parse_cbf_header(text), shape, "uint32", mask, len(files), "bslz4", source, read)


def _read_cbf(file: Path) -> tuple[np.ndarray, str]:
    """(slow, fast) int32 counts and the text of the header."""
    try:
        with fabio.open(os.fspath(file)) as image:
            return image.data, image.header.get("_array_data.header_contents", "").replace("\r\n", "\n")
    except NearlineError:
        raise
    except Exception as error:  # fabio raises whatever its decoder meets in a damaged file
        raise BadFrame(f"{file} cannot be read as CBF ({error}); it may be cut off or still being written") from error


def _cbf_shape(file: Path) -> tuple[int, int]:
    """(slow, fast) from the binary section's header, without reading the pixels."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
    try:
        with openers.get(file.suffix.lower(), open)(file, "rb") as stream:
            start = stream.read(65536)
    except (OSError, EOFError) as error:
        raise BadFrame(f"{file} cannot be read ({error}); it may be cut off or still being written") from error
    fast = re.search(rb"X-Binary-Size-Fastest-Dimension:\s*(\d+)", start)
    slow = re.search(rb"X-Binary-Size-Second-Dimension:\s*(\d+)", start)
    if not (fast and slow):
        raise BadFrame(f"{file} is no miniCBF file: it does not say its dimensions")
    return int(slow[1]), int(fast[1])


def parse_cbf_header(text: str) -> DetectorHeader:
    """The header lines that camserver writes, as far as they are there; units converted to ours.

    Lines are ``# Key value unit`` with an optional colon or equals sign; unknown lines are left alone.
    Many beamlines leave distance, wavelength and beam centre at 0: those stay 0 and can be overridden.
    """

    def number(key: str, default: float = 0.0) -> float:
        match = re.search(rf"^#?\s*{key}\s*[:=]?\s*([-+]?[0-9.]+(?:[eE][-+]?\d+)?)", text, re.MULTILINE)
        return float(match[1]) if match else default

    def pair(pattern: str) -> tuple[float, float]:
        match = re.search(pattern, text)
        return (float(match[1]), float(match[2])) if match else (0.0, 0.0)

    detector = re.search(r"^#?\s*Detector:?\s+(.*?)(?:,?\s+S/N\s+(.*?))?\s*$", text, re.MULTILINE)
    sensor = re.search(r"^#?\s*(\w+) sensor, thickness\s+([0-9.eE+-]+)\s*m", text, re.MULTILINE)
    pixel_x, pixel_y = pair(r"Pixel_size\s+([0-9.eE+-]+)\s*m\s*x\s*([0-9.eE+-]+)\s*m")
    beam_x, beam_y = pair(r"Beam_xy\s*\(\s*([0-9.eE+-]+)\s*,\s*([0-9.eE+-]+)\s*\)")
    wavelength, cutoff, threshold = number("Wavelength"), number("Count_cutoff"), number("Threshold_setting")
    material = sensor[1] if sensor else "Silicon"
    return DetectorHeader(
        description=detector[1] if detector else "",
        serial_number=(detector[2] or "") if detector else "",
        sensor_material="Si" if material.lower() == "silicon" else material,
        sensor_thickness=float(sensor[2]) if sensor else 0.0,
        pixel_size_x=pixel_x or 172e-6,  # every Pilatus has 172 µm pixels
        pixel_size_y=pixel_y or 172e-6,
        beam_center_x=beam_x,
        beam_center_y=beam_y,
        detector_distance=abs(number("Detector_distance")),
        incident_wavelength=wavelength,
        incident_energy=energy_from_wavelength(wavelength) if wavelength else 0.0,
        count_time=number("Exposure_time"),
        frame_time=number("Exposure_period"),
        saturation_value=int(cutoff) or None,
        threshold_energy=threshold or None,
    )


def _mark_masked(counts: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Unsigned counts with every negative marker as the dtype's maximum."""
    if counts.dtype.kind == "u":
        return counts.astype(dtype, copy=False)
    marked = counts.astype(dtype)
    marked[counts < 0] = np.iinfo(dtype).max
    return marked


# ---- HDF5


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a frame is: a dataset and its row there; codec None when it has to be decoded."""

    dataset: h5py.Dataset
    row: int
    codec: Codec | None


def _open_hdf5(files: list[Path], channel: int | None) -> ReplaySeries:
    with contextlib.ExitStack() as stack:
        masters = [_open_h5(file, stack) for file in files]
        datasets = [dataset for master in masters for dataset in _image_datasets(master)]
        places = [place for dataset in datasets for place in _places(dataset, stack)]
        shape = _common_shape(datasets)
        dtype = _stream_dtype(datasets)
        selected = _choose_channel(datasets, channel)
        codecs = {place.codec for place in places if place is not None}
        # one codec per series; what differs is decoded and encoded
        only = next(iter(codecs)) if len(codecs) == 1 else None
        codec: Codec = only or "bslz4"

        def read(index: int) -> ReplayFrame | None:
            place = places[index]
            if place is None or not _is_written(place, selected):
                return None
            dataset, row = place.dataset, place.row
            provenance = {"source_file": Path(dataset.file.filename).name, "source_frame": row}
            frame = (row, selected)[: dataset.ndim - 2]
            if place.codec == codec:
                filter_mask, blob = dataset.id.read_direct_chunk((*frame, 0, 0))
                if filter_mask == 0:
                    return ReplayFrame(index, bytes(blob), provenance)
                if codec != "bslz4":
                    raise BadFrame(f"frame {row} of {dataset.file.filename} is stored without its {codec} filter")
            return ReplayFrame(index, _checked_counts(dataset[frame], np.dtype(dtype), provenance), provenance)

        detector = _detector_group(masters[0])
        source = {
            "format": "HDF5",
            "n_files": len(files),
            "transcoded": None in codecs or len(codecs) > 1,
            "files": [file.name for file in files[:100]],
        }
        header = _read_nxmx_header(masters[0], detector)
        mask = _read_pixel_mask(detector, shape)
        close = stack.pop_all().close
        return ReplaySeries(header, shape, dtype, mask, len(places), codec, source, read, close)


def _open_h5(file: Path, stack: contextlib.ExitStack) -> h5py.File:
    if not file.is_file():
        raise RunNotFound(f"{file} is missing; it is named by its master file and must lie where that says")
    try:
        return stack.enter_context(h5py.File(file, "r", locking="best-effort"))
    except OSError as error:
        raise BadFrame(f"{file} is not a readable HDF5 file ({error}); it may still be open for writing") from error


def _image_datasets(master: h5py.File) -> list[h5py.Dataset]:
    """/entry/data/data, or DECTRIS' data_000001 … links in order."""
    group = _entry(master).get("data")
    if isinstance(group, h5py.Dataset):
        return [group]
    names = list(group) if isinstance(group, h5py.Group) else []
    wanted = ["data"] if "data" in names else sorted(name for name in names if re.fullmatch(r"data_\d+", name))
    if not wanted:
        raise BadFrame(
            f"{master.filename} has no images at /entry/data/data or /entry/data/data_000001; is it a master file?"
        )
    for name in wanted:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink) and not (Path(master.filename).parent / link.filename).is_file():
            raise RunNotFound(f"{master.filename} links to {link.filename}, which is missing; put it beside the master")
    found = [group[name] for name in wanted]
    for dataset in found:
        if dataset.ndim not in (2, 3, 4):
            raise BadFrame(f"{dataset.name} in {master.filename} has {dataset.ndim} dimensions; images have 2 to 4")
    return found


def _places(dataset: h5py.Dataset, stack: contextlib.ExitStack) -> list[_Place | None]:
    """Where each frame of a dataset really is; None for frames of a virtual dataset without a source."""
    if dataset.ndim == 2:
        raise BadFrame(f"{dataset.name} in {dataset.file.filename} is one image, not a stack; give it a frame axis")
    if not dataset.is_virtual:
        return _rows_of(dataset, range(len(dataset)))
    places: list[_Place | None] = [None] * len(dataset)
    folder = Path(dataset.file.filename).parent
    for source in dataset.virtual_sources():
        file = dataset.file if source.file_name == "." else _open_h5(folder / source.file_name, stack)
        if source.dset_name not in file:
            raise BadFrame(
                f"{file.filename} has no {source.dset_name}, which {dataset.file.filename} shows as its data"
            )
        part = file[source.dset_name]
        rows, part_rows = _whole_frames(source.vspace, dataset.shape), _whole_frames(source.src_space, part.shape)
        same_frames = part.shape[-2:] == dataset.shape[-2:] and part.dtype == dataset.dtype and not part.is_virtual
        if rows is None or part_rows is None or len(rows) != len(part_rows) or not same_frames:
            # an arrangement of parts of frames: HDF5 puts it together, at the price of decoding
            return _rows_of(dataset, range(len(dataset)))
        places[rows.start : rows.stop] = _rows_of(part, part_rows)
    return places


def _rows_of(dataset: h5py.Dataset, rows: range) -> list[_Place | None]:
    codec = _codec_of(dataset)
    return [_Place(dataset, row, codec) for row in rows]


def _is_written(place: _Place, channel: int) -> bool:
    """False for a frame that has room in the file but no data, as after a cancelled series."""
    chunks = place.dataset.chunks
    if chunks is None:
        return True
    at = (place.row, channel)[: place.dataset.ndim - 2] + (0, 0)  # noqa: RUF005 - reads as a position
    corner = tuple(position - position % size for position, size in zip(at, chunks, strict=True))
    return place.dataset.id.get_chunk_info_by_coord(corner).byte_offset is not None


def _whole_frames(space: h5py.h5s.SpaceID, shape: tuple[int, ...]) -> range | None:
    """Rows that a selection covers, if it is whole frames one after the other."""
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return range(shape[0])
    first, last = space.get_select_bounds()
    whole = all(a == 0 and b == n - 1 for a, b, n in zip(first[1:], last[1:], shape[1:], strict=True))
    rows = range(int(first[0]), int(last[0]) + 1)
    dense = space.get_select_npoints() == len(rows) * int(np.prod(shape[1:], dtype=np.int64))
    return rows if whole and dense and rows.stop <= shape[0] else None


def _common_shape(datasets: list[h5py.Dataset]) -> tuple[int, int]:
    shapes = {dataset.shape[-2:]: dataset for dataset in datasets}
    if len(shapes) > 1:
        listed = ", ".join(f"{shape[0]} x {shape[1]} in {d.file.filename}" for shape, d in shapes.items())
        raise ShapeMismatch(f"frames differ in shape ({listed}); replay one detector and region at a time")
    slow, fast = next(iter(shapes))
    return int(slow), int(fast)


def _stream_dtype(datasets: list[h5py.Dataset]) -> str:
    """The unsigned dtype that carries these frames."""
    kinds = {dataset.dtype.newbyteorder("=") for dataset in datasets}
    if len(kinds) > 1:
        raise BadFrame(f"frames differ in dtype ({', '.join(map(str, kinds))}); replay these files one by one")
    kind = next(iter(kinds))
    if kind.kind not in "ui":
        raise BadFrame(f"frames are {kind}; stream v2 carries unsigned integers only, so these cannot be replayed")
    return f"uint{min(8 * kind.itemsize, 32)}"


def _choose_channel(datasets: list[h5py.Dataset], channel: int | None) -> int:
    n_channels = max(dataset.shape[1] if dataset.ndim == 4 else 1 for dataset in datasets)
    if channel is None and n_channels > 1:
        raise BadFrame(f"the file holds {n_channels} channels; choose one with channel=0 to {n_channels - 1}")
    if not 0 <= (channel or 0) < n_channels:
        raise BadFrame(f"channel {channel} does not exist; the file holds {n_channels}")
    return channel or 0


def _codec_of(dataset: h5py.Dataset) -> Codec | None:
    """Which codec a chunk can be passed on as; None when it has to be decoded."""
    one_frame = (1,) * (dataset.ndim - 2) + dataset.shape[-2:]
    if dataset.is_virtual or dataset.chunks != one_frame or dataset.dtype.str[0] == ">":
        return None
    if dataset.dtype.kind != "u" or dataset.dtype.itemsize > 4:
        return None
    properties = dataset.id.get_create_plist()
    if properties.get_nfilters() != 1:
        return None
    number, _, options, _ = properties.get_filter(0)
    if number == _LZ4_FILTER:
        return "lz4"
    is_bslz4 = number == _BITSHUFFLE_FILTER and len(options) >= 5 and options[4] == _BITSHUFFLE_WITH_LZ4
    return "bslz4" if is_bslz4 else None


def _checked_counts(pixels: np.ndarray, dtype: np.dtype, provenance: dict[str, Any]) -> np.ndarray:
    if pixels.dtype.itemsize > dtype.itemsize and int(pixels.max(initial=0)) > np.iinfo(dtype).max:
        raise BadFrame(
            f"frame {provenance['source_frame']} of {provenance['source_file']} holds {int(pixels.max())} counts, "
            f"more than {dtype} can carry"
        )
    return _mark_masked(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), dtype)


# ---- NXmx header


def _entry(master: h5py.File) -> h5py.Group:
    if "entry" in master:
        return master["entry"]
    for name, item in master.items():
        if isinstance(item, h5py.Group) and item.attrs.get("NX_class") in ("NXentry", b"NXentry"):
            return master[name]
    raise BadFrame(f"{master.filename} has no /entry group; replay reads NXmx and DECTRIS master files")


def _detector_group(master: h5py.File) -> h5py.Group | None:
    instrument = _entry(master).get("instrument")
    if instrument is None:
        return None
    if "detector" in instrument:
        return instrument["detector"]
    groups = [item for item in instrument.values() if isinstance(item, h5py.Group)]
    return next((g for g in groups if g.attrs.get("NX_class") in ("NXdetector", b"NXdetector")), None)


def _read_nxmx_header(master: h5py.File, detector: h5py.Group | None) -> DetectorHeader:
    """The fields of NXmx and of DECTRIS' older masters, in our units; 0 where the file is silent."""
    if detector is None:
        return DetectorHeader()
    beam = _entry(master).get("instrument/beam")
    wavelength = _number(beam, ["incident_wavelength", "wavelength"], _WAVELENGTH_A)
    energy = _number(beam, ["incident_energy"], _ENERGY_EV)
    energy = energy or _number(detector, ["detectorSpecific/photon_energy"], _ENERGY_EV)
    if not wavelength and energy:
        wavelength = wavelength_from_energy(energy)
    pixel_x = _number(detector, ["x_pixel_size", "module/fast_pixel_direction"], _LENGTH_M) or 75e-6
    pixel_y = _number(detector, ["y_pixel_size", "module/slow_pixel_direction"], _LENGTH_M) or 75e-6
    beam_x, beam_y = _beam_centre(detector, pixel_x, pixel_y)
    distances = ["distance", "detector_distance", "transformations/det_z", "transformations/detector_distance"]
    saturation = _number(detector, ["saturation_value", "detectorSpecific/countrate_correction_count_cutoff"], _NO_UNIT)
    threshold = _number(detector, ["threshold_energy", "threshold_1_channel/threshold_energy"], _ENERGY_EV)
    material = _word(detector, "sensor_material") or "Si"
    return DetectorHeader(
        description=_word(detector, "description"),
        serial_number=_word(detector, "serial_number") or _word(detector, "detector_number"),
        sensor_material="Si" if material.lower() in ("si", "silicon") else material,
        sensor_thickness=_number(detector, ["sensor_thickness"], _LENGTH_M),
        pixel_size_x=pixel_x,
        pixel_size_y=pixel_y,
        beam_center_x=beam_x,
        beam_center_y=beam_y,
        detector_distance=abs(_number(detector, distances, _LENGTH_M)),
        incident_energy=energy or (energy_from_wavelength(wavelength) if wavelength else 0.0),
        incident_wavelength=wavelength,
        count_time=_number(detector, ["count_time"], _TIME_S),
        frame_time=_number(detector, ["frame_time"], _TIME_S),
        saturation_value=int(saturation) or None,
        threshold_energy=threshold or None,
        countrate_correction_enabled=_flag(detector, "countrate_correction_applied"),
        flatfield_enabled=_flag(detector, "flatfield_applied", "flatfield_correction_applied"),
        pixel_mask_enabled=_flag(detector, "pixel_mask_applied"),
        virtual_pixel_interpolation_enabled=_flag(
            detector, "virtual_pixel_interpolation_applied", "virtual_pixel_correction_applied"
        ),
    )


def _beam_centre(detector: h5py.Group, pixel_x: float, pixel_y: float) -> tuple[float, float]:
    """Beam centre in px: the fields of that name, else the module's offset in the usual mounting."""
    if "beam_center_x" in detector and "beam_center_y" in detector:
        pixels = {"": 1.0, "pixel": 1.0, "pixels": 1.0, "px": 1.0}
        in_x = pixels | {unit: factor / pixel_x for unit, factor in _LENGTH_M.items()}
        in_y = pixels | {unit: factor / pixel_y for unit, factor in _LENGTH_M.items()}
        return _number(detector, ["beam_center_x"], in_x), _number(detector, ["beam_center_y"], in_y)
    offset = detector.get("module/module_offset")
    fast = detector.get("module/fast_pixel_direction")
    if offset is None or fast is None or not np.allclose(fast.attrs.get("vector", 0), (-1, 0, 0), atol=0.01):
        return 0.0, 0.0
    x, y, _ = np.asarray(offset.attrs.get("offset", (0.0, 0.0, 0.0)), float)
    factor = _LENGTH_M.get(_decoded(offset.attrs.get("offset_units", "m")), 1.0)
    return float(x * factor / pixel_x), float(y * factor / pixel_y)


def _read_pixel_mask(detector: h5py.Group | None, shape: tuple[int, int]) -> np.ndarray | None:
    if detector is None:
        return None
    for name in ("pixel_mask", "detectorSpecific/pixel_mask", "threshold_1_channel/pixel_mask"):
        if name in detector:
            mask = np.asarray(detector[name][()]).astype(np.uint32)
            mask = mask[0] if mask.ndim == 3 else mask
            if mask.shape != shape:
                raise ShapeMismatch(f"{name} has shape {mask.shape}, the frames {shape}; the master is inconsistent")
            return mask
    return None


def _number(group: h5py.Group | None, names: list[str], units: dict[str, float]) -> float:
    """The first of these fields that is there, converted by its unit; 0 when there is none.

    Raises
    ------
    BadFrame : the field has a unit that cannot be this quantity.
    """
    for name in names:
        if group is None or not isinstance(group.get(name), h5py.Dataset):
            continue
        values = np.asarray(group[name][()]).reshape(-1)
        if not values.size or values.dtype.kind not in "uif":
            continue
        unit = _decoded(group[name].attrs.get("units", "")).strip()
        if units is _NO_UNIT or not unit:
            return float(values[0])
        factor = units.get(unit, units.get(unit.lower()))
        if factor is None:
            raise BadFrame(f"{group[name].name} is in {unit!r}; expected one of {', '.join(u for u in units if u)}")
        return float(values[0]) * factor
    return 0.0


def _word(group: h5py.Group, name: str) -> str:
    if not isinstance(group.get(name), h5py.Dataset):
        return ""
    value = group[name][()]
    return _decoded(value[0] if isinstance(value, np.ndarray) and value.size else value)


def _flag(group: h5py.Group, *names: str) -> bool | None:
    for name in names:
        if isinstance(group.get(name), h5py.Dataset):
            return bool(np.asarray(group[name][()]).reshape(-1)[0])
    return None


def _decoded(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
