"""DECTRIS stream v2 (CBOR): what each message says, in Nearline's words.

Field names and layouts: DECTRIS stream v2 documentation; arrays by RFC 8746 (typed arrays,
tags 64 to 87; multi-dimensional, tag 40) and DECTRIS's tag 56500 for compressed ones. Only
``type``, ``series_id`` and, for images, ``image_id`` and ``data`` are treated as certain.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from storage.codec import CODECS, decode
from storage.errors import BadFrame, BadMessage, ProtocolError
from storage.models import MOST_PLANNED, DetectorHeader, SeriesHeader
from storage.names import check_name
from storage.photons import energy_from_wavelength, wavelength_from_energy
from streaming.connectors.cbor_view import Tag, decode_view

__all__ = ["EncodedArray", "EndMessage", "ImageMessage", "StartMessage", "parse_message"]

_TYPED_ARRAYS = {
    64: "u1", 68: "u1", 65: ">u2", 66: ">u4", 67: ">u8", 69: "<u2", 70: "<u4", 71: "<u8",
    72: "i1", 73: ">i2", 74: ">i4", 75: ">i8", 77: "<i2", 78: "<i4", 79: "<i8",
    81: ">f4", 82: ">f8", 85: "<f4", 86: "<f8",
}  # fmt: skip
_IMAGE_DTYPES = ("uint8", "uint16", "uint32")
_MOST_CHANNELS = 16
_ROW_MAJOR, _COMPRESSED, _DATE = 40, 56500, 0


@dataclass(frozen=True, slots=True)
class EncodedArray:
    """An array as it travelled: shape (slow, fast), NumPy dtype name, codec and its bytes."""

    shape: tuple[int, ...]
    dtype: str
    codec: str
    blob: memoryview

    def decode(self) -> np.ndarray:
        return decode(self.blob, self.shape, self.dtype, self.codec)


@dataclass(frozen=True, slots=True)
class StartMessage:
    """Arm: the series, the detector, and which channels will come."""

    series: SeriesHeader
    detector: DetectorHeader
    channels: tuple[str, ...]
    shape: tuple[int, int] | None
    dtype: str | None
    pixel_masks: dict[str, np.ndarray] = field(default_factory=dict)
    flatfields: dict[str, np.ndarray] = field(default_factory=dict)
    user_data: Any = None


@dataclass(frozen=True, slots=True)
class ImageMessage:
    """One exposure: an encoded array per channel, and its times in ticks."""

    series_id: int
    series_unique_id: str | None
    image_id: int
    channels: dict[str, EncodedArray]
    start_tick: int | None = None
    stop_tick: int | None = None
    tick_rate: int | None = None
    series_date: datetime | None = None
    user_data: Any = None


@dataclass(frozen=True, slots=True)
class EndMessage:
    """End of a series: complete, cancelled or aborted; the detector does not say which."""

    series_id: int
    series_unique_id: str | None


def parse_message(message: memoryview) -> StartMessage | ImageMessage | EndMessage:
    """Understand one message.

    Raises
    ------
    BadMessage : not CBOR, not a stream v2 message, or a certain field is missing or absurd.
    """
    fields = decode_view(message)
    if not isinstance(fields, dict):
        raise BadMessage(f"stream v2 message is a {type(fields).__name__}, not a map; is the stream format 'cbor'?")
    kind = fields.get("type")
    try:
        if kind == "image":
            return _image(fields)
        if kind == "start":
            return _start(fields)
        if kind == "end":
            return EndMessage(_series_id(fields), _text(fields.get("series_unique_id")))
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, AttributeError) as error:
        if isinstance(error, BadMessage):
            raise
        raise BadMessage(f"stream v2 {kind} message is malformed: {error}") from error
    raise BadMessage(f"stream v2 message of unknown type {str(kind)[:80]!r}; known are start, image and end")


def _image(fields: dict[str, Any]) -> ImageMessage:
    data = fields.get("data")
    if not isinstance(data, dict) or not data:
        raise BadMessage("stream v2 image message without data")
    start, stop = fields.get("start_time"), fields.get("stop_time")
    return ImageMessage(
        series_id=_series_id(fields),
        series_unique_id=_text(fields.get("series_unique_id")),
        image_id=_index(fields.get("image_id"), "image_id"),
        channels={_channel(name): _encoded_array(item) for name, item in data.items()},
        start_tick=_ticks(start),
        stop_tick=_ticks(stop),
        tick_rate=_int64(start[1]) if start else None,
        series_date=_date(fields.get("series_date")),
        user_data=plain(fields.get("user_data")),
    )


def _start(fields: dict[str, Any]) -> StartMessage:
    rows, columns = fields.get("image_size_y"), fields.get("image_size_x")
    channels = tuple(_channel(name) for name in fields.get("channels") or ("threshold_1",))
    if len(channels) > _MOST_CHANNELS:
        raise BadMessage(f"stream v2 start message with {len(channels)} channels; detectors have at most 3")
    dtype = _text(fields.get("image_dtype"))
    if dtype is not None and dtype not in _IMAGE_DTYPES:
        raise BadMessage(f"stream v2 start message with image_dtype {dtype[:40]!r}; known are {_IMAGE_DTYPES}")
    return StartMessage(
        series=SeriesHeader(
            series_id=_series_id(fields),
            series_unique_id=_text(fields.get("series_unique_id")) or f"series-{_series_id(fields)}",
            number_of_images=min(max(int(fields.get("number_of_images") or 0), 0), MOST_PLANNED),
            arm_date=_date(fields.get("arm_date")),
        ),
        detector=_detector(fields, channels),
        channels=channels,
        shape=(int(rows), int(columns)) if rows and columns else None,
        dtype=dtype,
        pixel_masks=_planes(fields.get("pixel_mask")),
        flatfields=_planes(fields.get("flatfield")),
        user_data=plain(fields.get("user_data")),
    )


def _detector(fields: dict[str, Any], channels: tuple[str, ...]) -> DetectorHeader:
    """The detector's header; there is no distance key, it is |detector_translation z|.

    A value that makes no sense is left out like one that was not sent: frames are not given up for it.
    """
    translation = fields.get("detector_translation")
    distance = translation[2] if isinstance(translation, list) and len(translation) == 3 else 0.0
    energy, wavelength = _positive(fields, "incident_energy"), _positive(fields, "incident_wavelength")
    thresholds = fields.get("threshold_energy")
    threshold = thresholds.get(channels[0]) if isinstance(thresholds, dict) else None
    saturation = fields.get("saturation_value")
    return DetectorHeader(
        description=str(fields.get("detector_description") or ""),
        serial_number=str(fields.get("detector_serial_number") or ""),
        sensor_material=str(fields.get("sensor_material") or "Si"),
        sensor_thickness=_positive(fields, "sensor_thickness"),
        pixel_size_x=_positive(fields, "pixel_size_x") or 75e-6,
        pixel_size_y=_positive(fields, "pixel_size_y") or 75e-6,
        beam_center_x=_finite(fields.get("beam_center_x")),
        beam_center_y=_finite(fields.get("beam_center_y")),
        detector_distance=abs(_finite(distance)),
        incident_energy=energy or (energy_from_wavelength(wavelength) if wavelength else 0.0),
        incident_wavelength=wavelength or (wavelength_from_energy(energy) if energy else 0.0),
        count_time=_positive(fields, "count_time"),
        frame_time=_positive(fields, "frame_time"),
        saturation_value=saturation if isinstance(saturation, int) else None,
        threshold_energy=_finite(threshold) if threshold is not None else None,
        countrate_correction_enabled=_flag(fields, "countrate_correction_enabled"),
        flatfield_enabled=_flag(fields, "flatfield_enabled"),
        pixel_mask_enabled=_flag(fields, "pixel_mask_enabled"),
        virtual_pixel_interpolation_enabled=_flag(fields, "virtual_pixel_interpolation_enabled"),
    )


def _encoded_array(item: Any) -> EncodedArray:
    if not isinstance(item, Tag) or item.number != _ROW_MAJOR:
        raise BadMessage(f"image data is not a row-major array (tag 40) but {_describe(item)}")
    shape, typed = item.value
    if not isinstance(typed, Tag) or typed.number not in _TYPED_ARRAYS:
        raise BadMessage(f"image data is not a typed array (RFC 8746) but {_describe(typed)}")
    dtype = np.dtype(_TYPED_ARRAYS[typed.number])
    if dtype.byteorder == ">":
        raise BadMessage(f"big-endian image data (tag {typed.number}) is not supported; detectors send little-endian")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 3:
        raise BadMessage(f"image data with a shape that is {_describe(shape)}")
    shape = tuple(_index(n, "array dimension") for n in shape)
    if isinstance(typed.value, memoryview):
        return EncodedArray(shape, dtype.name, "raw", typed.value)
    if not isinstance(typed.value, Tag) or typed.value.number != _COMPRESSED:
        raise BadMessage(f"image bytes are neither plain nor compressed (tag 56500) but {_describe(typed.value)}")
    codec, element_size, blob = typed.value.value
    if codec not in CODECS or not isinstance(blob, memoryview):
        raise BadMessage(f"image bytes are compressed with {_describe(codec)}; known are {', '.join(CODECS)}")
    if codec == "bslz4" and element_size != dtype.itemsize:
        raise BadMessage(f"bslz4 element size {element_size} does not fit {dtype.name}")
    return EncodedArray(shape, dtype.name, codec, blob)


def _planes(item: Any) -> dict[str, np.ndarray]:
    """Flat fields or masks by channel; those cut or empty (header_detail below ``all``) are left out."""
    planes: dict[str, np.ndarray] = {}
    for channel, array in item.items() if isinstance(item, dict) else ():
        try:
            planes[str(channel)] = _encoded_array(array).decode()
        except (BadFrame, ProtocolError, TypeError, ValueError):
            continue
    return planes


def plain(item: Any) -> Any:
    """User data as JSON can hold it: views become hex text, dates ISO text, unknown tags their value."""
    if isinstance(item, Tag):
        return str(item.value) if item.number == _DATE else plain(item.value)
    if isinstance(item, dict):
        return {str(key): plain(value) for key, value in item.items()}
    if isinstance(item, list):
        return [plain(value) for value in item]
    if isinstance(item, memoryview):
        return item[:4096].hex()
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if isinstance(item, int) and not -(2**63) <= item < 2**63:
        return str(item)
    return item


def _series_id(fields: dict[str, Any]) -> int:
    return _index(fields.get("series_id"), "series_id")


def _index(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise BadMessage(f"stream v2 message has no usable {name}: {_describe(value)}")
    return value


def _finite(value: Any) -> float:
    """A finite number; 0, that is unknown, for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _positive(fields: dict[str, Any], name: str) -> float:
    return max(_finite(fields.get(name)), 0.0)


def _flag(fields: dict[str, Any], name: str) -> bool | None:
    value = fields.get(name)
    return value if isinstance(value, bool) else None


def _ticks(time: Any) -> int | None:
    """Numerator of a ``[numerator, denominator]`` time."""
    return _int64(time[0]) if time else None


def _int64(value: Any) -> int:
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise BadMessage(f"stream v2 message with a number beyond 64 bits: {number}")
    return number


def _channel(name: Any) -> str:
    """A channel becomes part of a folder's name."""
    return check_name(name, "channel")


def _date(item: Any) -> datetime | None:
    if not isinstance(item, Tag) or not isinstance(item.value, str):
        return None
    try:
        date = datetime.fromisoformat(item.value)
    except ValueError:
        return None
    return date if date.tzinfo else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _describe(item: Any) -> str:
    if isinstance(item, Tag):
        return f"tag {item.number}"
    is_plain = isinstance(item, str | int | float | None)
    return f"{type(item).__name__} {str(item)[:60]!r}" if is_plain else f"a {type(item).__name__}"
