"""miniCBF files of Pilatus detectors: counts, masks and header text."""

import bz2
import gzip
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fabio
import numpy as np
from blake3 import blake3

from storage.errors import BadFrame, NearlineError, ShapeMismatch
from storage.models import DetectorHeader
from storage.photons import energy_from_wavelength
from streaming.replay.series import ReplayFrame, ReplaySeries, mark_masked

__all__ = ["CBF_ENDINGS", "open_cbf", "parse_cbf_header"]

CBF_ENDINGS = (".cbf", ".cbf.gz", ".cbf.bz2")
# Bits of the NXmx pixel_mask that Pilatus' marker values stand for.
_GAP_BIT, _DEAD_BIT = 1 << 0, 1 << 1
_CBF_GAP, _CBF_DEAD = -1, -2


def open_cbf(files: list[Path]) -> ReplaySeries:
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
        return ReplayFrame(index, mark_masked(counts, np.dtype(np.uint32)), provenance)

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
