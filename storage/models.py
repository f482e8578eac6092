"""The words of DESIGN as frozen models: what is written to disk and sent over the wire.

Names follow NXmx and DECTRIS stream v2 where they exist. Units are in the field's
description: lengths in m, energies in eV, wavelengths in Å, times in s, beam centre in px
measured from the outer corner of the first pixel (pixel i spans i to i + 1).
"""

import math
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from storage.codec import MOST_FRAME_BYTES
from storage.errors import BadFrame
from storage.panels import Panel

__all__ = [
    "DTYPES",
    "MOST_PLANNED",
    "SCHEMA_VERSION",
    "DetectorHeader",
    "Model",
    "Record",
    "RunHeader",
    "RunState",
    "SeriesHeader",
    "StreamHeader",
    "field_problem",
]

SCHEMA_VERSION = 1
DTYPES = (
    "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
)  # fmt: skip
# What fits a database's integer; nobody means to send more.
MOST_PLANNED = 1 << 53
# The shard index has 16 bytes for each frame of a chunk, in memory while it is sealed.
MOST_FRAMES_PER_CHUNK = 100_000


def field_problem(field: str, message: str, value: Any) -> str:
    """What is wrong with a field of a file, with its value where that is short and not told anyway.

    The value helps: YAML reads ``off`` as False. message : pydantic's.
    """
    message, shown = message.removeprefix("Value error, "), repr(value)
    is_told = isinstance(value, dict) or len(shown) > 80 or shown in message
    return f"{field}: {message}" if is_told else f"{field} is {shown}: {message}"


class Model(BaseModel):
    """Frozen, strict about unknown fields, so that a typing error is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Model):
    """What we wrote or sent ourselves: a newer version's unknown fields are left alone, not an error."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RunState(StrEnum):
    """Where a run is in its life; the last four are terminal."""

    live = "live"
    draining = "draining"
    completed = "completed"
    incomplete = "incomplete"
    aborted = "aborted"
    deleted = "deleted"

    @property
    def is_terminal(self) -> bool:
        return self not in (RunState.live, RunState.draining)


class DetectorHeader(Record):
    """The detector and the beam it stands in; zero or None where the beamline never said."""

    # JSON has no word for infinity: such a header could be written, but never read again.
    model_config = ConfigDict(allow_inf_nan=False)

    description: str = ""
    serial_number: str = ""
    sensor_material: str = Field("Si", description="NXmx word: Si, CdTe, GaAs")
    sensor_thickness: float = Field(0.00045, ge=0, description="m")
    pixel_size_x: float = Field(75e-6, gt=0, description="m, along the fast axis")
    pixel_size_y: float = Field(75e-6, gt=0, description="m, along the slow axis")
    beam_center_x: float = Field(0.0, description="px from the first pixel's outer corner, fast axis")
    beam_center_y: float = Field(0.0, description="px from the first pixel's outer corner, slow axis")
    detector_distance: float = Field(0.0, ge=0, description="m, sample to detector along the beam")
    incident_energy: float = Field(0.0, ge=0, description="eV")
    incident_wavelength: float = Field(0.0, ge=0, description="Å")
    count_time: float = Field(0.0, ge=0, description="s")
    frame_time: float = Field(0.0, ge=0, description="s")
    saturation_value: int | None = Field(None, description="largest trustworthy count")
    threshold_energy: float | None = Field(None, description="eV")
    countrate_correction_enabled: bool | None = None
    flatfield_enabled: bool | None = None
    pixel_mask_enabled: bool | None = None
    virtual_pixel_interpolation_enabled: bool | None = None
    panels: tuple[Panel, ...] = Field(
        (),
        description="where each panel stands; the values above then summarise them. Empty for one that faces the beam",
    )

    @model_serializer(mode="wrap")
    def _as_before(self, proceed: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without panels there is no word of them: headers and what was digested of them stay as they were."""
        values: dict[str, Any] = proceed(self)
        if not self.panels:
            values.pop("panels", None)
        return values


class SeriesHeader(Record):
    """What the detector says of one arm-to-end series."""

    series_id: int
    series_unique_id: str
    number_of_images: int = Field(0, ge=0, le=MOST_PLANNED, description="planned frames; 0 when unknown")
    arm_date: datetime | None = None


class StreamHeader(Record):
    """Everything a reader must know before the first frame of a stream."""

    schema_version: int = SCHEMA_VERSION
    experiment: str
    run: int
    data_source: str
    kind: Literal["frames", "table"] = "frames"
    shape: tuple[int, ...] = Field((), description="of one frame or part, (slow, fast) for an image; () for a table")
    dtype: str = Field("", description="NumPy name, e.g. uint16; empty for a table")
    codec: Literal["bslz4", "lz4", "raw"] = "bslz4"
    parts: int = Field(1, ge=1, le=1024, description="records that make up one frame, such as a detector's modules")
    frames_per_chunk: int = Field(100, gt=0, le=MOST_FRAMES_PER_CHUNK)
    planned: int = Field(0, ge=0, le=MOST_PLANNED, description="frames the source means to send; 0 when unknown")
    persistence: Literal["stored", "online"] = Field(
        "stored", description="online: in the service's memory only, until newer frames need the room"
    )
    channel: str | None = Field(None, description="the detector's own name of this array, such as threshold_1")
    detector: DetectorHeader | None = None
    series: SeriesHeader | None = None
    parent: str | None = Field(None, description="data source this one was derived from")
    processing: str | None = Field(None, description="processing that derived it")
    leaves_out: str | None = Field(
        None,
        description="of a selection: why a frame of the parent is not in it, such as not a hit; such are left out, "
        "not missing",
    )
    user_data: dict[str, Any] = Field(default_factory=dict)

    @field_validator("dtype")
    @classmethod
    def _numeric(cls, name: str) -> str:
        if name and name not in DTYPES:
            raise BadFrame(f"dtype {name[:40]!r} is not one of {', '.join(DTYPES)}; convert the frames first")
        return name

    @model_validator(mode="after")
    def _bounded(self) -> "StreamHeader":
        """A shape that can be allocated: sizes are believed from here on."""
        if self.parts * self.frames_per_chunk > MOST_FRAMES_PER_CHUNK:
            raise BadFrame(
                f"{self.frames_per_chunk} frames of {self.parts} parts are more than {MOST_FRAMES_PER_CHUNK} in one "
                "chunk; make chunks of fewer frames"
            )
        if self.kind == "table":
            return self
        if not self.dtype:
            raise BadFrame(f"stream {self.data_source[:100]!r} has frames, but no dtype; give a NumPy name like uint16")
        if len(self.shape) > 3 or any(n <= 0 for n in self.shape):
            raise BadFrame(f"frames of shape {self.shape} cannot be stored; use 0 to 3 axes, none of them empty")
        if math.prod(self.shape) * np.dtype(self.dtype).itemsize > MOST_FRAME_BYTES:
            raise BadFrame(f"a frame of {self.dtype} {self.shape} is larger than {MOST_FRAME_BYTES} bytes; split it")
        return self

    @property
    def fill_value(self) -> int | float:
        """What a hole reads as through plain Zarr: the dtype's maximum, which means masked."""
        kind = np.dtype(self.dtype)
        return int(np.iinfo(kind).max) if kind.kind in "ui" else float("nan")

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Shape of one frame in the Zarr array: the parts, if there are several, are its first axis."""
        return (self.parts, *self.shape) if self.parts > 1 else self.shape

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one frame as analysis and exported files see it: its parts one below the other, as one array."""
        if self.parts == 1:
            return self.shape
        slow, *rest = self.shape or (1,)
        return (self.parts * slow, *rest)

    @property
    def is_online(self) -> bool:
        """Whether its frames are in memory only."""
        return self.persistence == "online"

    @property
    def frame_bytes(self) -> int:
        """Bytes of one decoded frame, all parts of it."""
        return int(np.prod(self.array_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize if self.dtype else 0


class RunHeader(Record):
    """A run as the scientist asked for it; facts that come later are events."""

    schema_version: int = SCHEMA_VERSION
    experiment: str
    run: int = Field(ge=0)
    started_at: datetime
    sample: str | None = None
    comment: str = ""
    user_data: dict[str, Any] = Field(default_factory=dict)
    request_key: str | None = Field(None, description="of the request that started it, so that repeating it is safe")
