"""What an NXmx or filewriter master says of the detector, in Nearline's words and units."""

from typing import Any

import h5py
import numpy as np

from storage.errors import BadFrame, ShapeMismatch
from storage.models import DetectorHeader
from storage.photons import energy_from_wavelength, wavelength_from_energy

__all__ = ["detector_group", "entry_of", "read_nxmx_header", "read_pixel_mask"]

_LENGTH_M = {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "um": 1e-6, "µm": 1e-6, "micron": 1e-6}
_WAVELENGTH_A = {"angstrom": 1.0, "a": 1.0, "å": 1.0, "nm": 10.0}
_ENERGY_EV = {"ev": 1.0, "kev": 1e3}
_TIME_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_NO_UNIT = {"": 1.0}


def entry_of(master: h5py.File) -> h5py.Group:
    if "entry" in master:
        return master["entry"]
    for name, item in master.items():
        if isinstance(item, h5py.Group) and item.attrs.get("NX_class") in ("NXentry", b"NXentry"):
            return master[name]
    raise BadFrame(f"{master.filename} has no /entry group; replay reads NXmx and DECTRIS master files")


def detector_group(master: h5py.File) -> h5py.Group | None:
    instrument = entry_of(master).get("instrument")
    if instrument is None:
        return None
    if "detector" in instrument:
        return instrument["detector"]
    groups = [item for item in instrument.values() if isinstance(item, h5py.Group)]
    return next((g for g in groups if g.attrs.get("NX_class") in ("NXdetector", b"NXdetector")), None)


def read_nxmx_header(master: h5py.File, detector: h5py.Group | None) -> DetectorHeader:
    """The fields of NXmx and of DECTRIS' older masters, in our units; 0 where the file is silent."""
    if detector is None:
        return DetectorHeader()
    beam = entry_of(master).get("instrument/beam")
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


def read_pixel_mask(detector: h5py.Group | None, shape: tuple[int, int]) -> np.ndarray | None:
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
