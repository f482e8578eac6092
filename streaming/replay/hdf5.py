"""HDF5 masters of NXmx and DECTRIS's file writer: where each frame is, and its bytes as they are."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 - registers the detectors' compression filters
import numpy as np

from storage.errors import BadFrame, RunNotFound, ShapeMismatch
from streaming.replay.nxmx_header import detector_group, entry_of, read_nxmx_header, read_pixel_mask
from streaming.replay.series import Codec, ReplayFrame, ReplaySeries, mark_masked

__all__ = ["HDF5_ENDINGS", "open_hdf5"]

HDF5_ENDINGS = (".h5", ".hdf5", ".nxs")
# HDF5 filter numbers of the codecs that stream v2 carries as they are.
_BITSHUFFLE_FILTER, _LZ4_FILTER, _BITSHUFFLE_WITH_LZ4 = 32008, 32004, 2


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a frame is: a dataset and its row there; codec None when it has to be decoded."""

    dataset: h5py.Dataset
    row: int
    codec: Codec | None


def open_hdf5(files: list[Path], channel: int | None) -> ReplaySeries:
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

        detector = detector_group(masters[0])
        source = {
            "format": "HDF5",
            "n_files": len(files),
            "transcoded": None in codecs or len(codecs) > 1,
            "files": [file.name for file in files[:100]],
        }
        header = read_nxmx_header(masters[0], detector)
        mask = read_pixel_mask(detector, shape)
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
    group = entry_of(master).get("data")
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
    return mark_masked(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), dtype)
