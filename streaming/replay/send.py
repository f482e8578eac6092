"""Find recorded files, open them as one series, and send it as a detector does."""

import glob
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.errors import BadFrame, RunNotFound
from storage.geometry import override_detector
from streaming.replay.cbf import CBF_ENDINGS, open_cbf
from streaming.replay.hdf5 import HDF5_ENDINGS, open_hdf5
from streaming.replay.series import ReplayFrame, ReplaySeries
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

__all__ = ["read_files", "replay"]

_Image = tuple[int, bytes | PreparedImage, dict[str, Any] | None]  # image_id, image, user_data


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
    series = open_cbf(files) if _is_cbf(files[0]) else open_hdf5(files, channel)
    try:
        series.header = override_detector(series.header, overrides)
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
        if not found.name.lower().endswith((*CBF_ENDINGS, *HDF5_ENDINGS)):
            raise BadFrame(f"{found} has no known format; replay reads {', '.join((*CBF_ENDINGS, *HDF5_ENDINGS))}")
        return [found]
    if glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path)))
        if not matches:
            raise RunNotFound(f"no files match {path}; check the folder and the pattern")
        return [file for match in matches for file in _expand(match)]
    raise RunNotFound(f"no file or folder {path}; check the name")


def _files_of_folder(folder: Path) -> list[Path]:
    names = sorted(entry for entry in folder.iterdir() if entry.is_file())
    files = [file for file in names if file.name.lower().endswith((*CBF_ENDINGS, *HDF5_ENDINGS))]
    if not files:
        raise RunNotFound(f"folder {folder} holds no CBF or HDF5 files; name the folder of the images")
    # data files beside their master would be sent twice
    masters = [file for file in files if file.stem.endswith("_master") or file.suffix == ".nxs"]
    return masters if masters and not any(map(_is_cbf, files)) else files


def _is_cbf(file: Path) -> bool:
    return file.name.lower().endswith(CBF_ENDINGS)


def _number_in_name(file: Path) -> tuple[str, int, str]:
    """(prefix, last number in the name, name): there is no frame number in a CBF header."""
    stem = re.sub(r"\.cbf(\.gz|\.bz2)?$", "", file.name, flags=re.IGNORECASE)
    match = re.fullmatch(r"(.*?)(\d+)\D*", stem)
    # folder first, so that scans in several folders do not interleave
    return (str(file.parent / match[1]), int(match[2]), stem) if match else (str(file.parent / stem), -1, stem)
