"""A detector's side of DECTRIS stream v2: CBOR messages pushed from a bound ZeroMQ socket.

An image message must be one contiguous ZeroMQ part, while its number, series and times change at
each sending. So a message is prepared once with a head of fixed length in front of the pixels;
sending overwrites the head in place and hands the buffer to ZeroMQ without a copy.

Field names and tags: DECTRIS stream v2 documentation; order and the 55799 wrapper as captured from
an EIGER2. Arrays: RFC 8746 (tag 40 multi-dimensional, 64/69/70 unsigned, 85 float32) over a byte
string or DECTRIS's compression tag 56500.
"""

import errno
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import cbor2
import numpy as np
import zmq
from pydantic import BaseModel, ConfigDict, Field

from storage.codec import Buffer
from storage.errors import BadFrame, ProtocolError, ServiceUnavailable, ShapeMismatch
from storage.models import DetectorHeader

__all__ = [
    "CLOCK_HZ",
    "DEFAULT_BIND",
    "DectrisStreamSender",
    "PreparedImage",
    "Progress",
    "SenderSettings",
    "finish",
    "nearline_user_data",
    "send_images",
]

Progress = Callable[[str, int, int], None]
Blobs = Buffer | Mapping[str, Buffer]

CLOCK_HZ = 50_000_000  # ticks per second of the detector's time stamps, as captured
DEFAULT_BIND = "tcp://127.0.0.1:31001"  # 31001 is DECTRIS's port for stream v2

_SELF_DESCRIBED = 55799
_SELF_DESCRIBED_BYTES = b"\xd9\xd9\xf7"
_TYPED_ARRAY_TAG = {"uint8": 64, "uint16": 69, "uint32": 70, "float32": 85}
_POLL_MS = 250
# None in a header means that nobody said; a detector's False would be a statement.
_SAID_IF_KNOWN = (
    "countrate_correction_enabled",
    "flatfield_enabled",
    "pixel_mask_enabled",
    "saturation_value",
    "virtual_pixel_interpolation_enabled",
)
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class SenderSettings(BaseModel):
    """How a series is sent: where, how fast, and as whose data."""

    model_config = ConfigDict(extra="forbid")

    bind: str = Field(DEFAULT_BIND, description="ZeroMQ endpoint the sender binds; port * takes any free port")
    rate: float = Field(0.0, ge=0, description="frames per second; 0 sends as fast as the receiver takes them")
    repeat: int = Field(1, ge=1, description="how many series are sent, one after the other")
    experiment: str | None = Field(None, description="experiment the frames belong to, told in the start message")
    run: int | None = Field(None, ge=0, description="run of the first series; each further series counts up")
    sample: str | None = Field(None, description="sample name, told in the start message")
    series_id: int = Field(1, ge=0, lt=2**32, description="detector's number of the first series")
    header_detail: Literal["basic", "all"] = Field("all", description="all adds pixel mask and flat field")
    high_water_mark: int = Field(32, ge=1, description="messages that wait in memory for a slow receiver")
    receiver_timeout: float | None = Field(
        None, gt=0, description="s without any receiver before giving up; none waits for ever"
    )


def nearline_user_data(experiment: str | None, run: int | None, sample: str | None) -> dict[str, Any]:
    """Our convention for the header appendix: whose frames these are; empty when nobody said."""
    if experiment is None and run is None and sample is None:
        return {}
    return {"nearline": {"experiment": experiment, "run": run, "sample": sample}}


class PreparedImage:
    """An image message whose pixels are encoded; only its head is written at sending.

    A buffer is not touched while ZeroMQ may still read it: sending the same image again waits.
    """

    __slots__ = ("buffer", "head_bytes", "n_keys", "tracker")

    def __init__(self, head_bytes: int, tail: Sequence[Buffer], n_keys: int):
        self.head_bytes, self.n_keys = head_bytes, n_keys
        self.buffer = bytearray().join([bytes(head_bytes), *(memoryview(part) for part in tail)])
        self.tracker: zmq.MessageTracker | None = None


class DectrisStreamSender:
    """Binds a PUSH socket and sends series as a detector does.

    Parameters
    ----------
    bind : endpoint such as tcp://127.0.0.1:31001; tcp://127.0.0.1:* takes a free port.
    high_water_mark : messages queued per receiver before sending blocks.
    receiver_timeout : s that a message may wait before ServiceUnavailable; None waits for ever.
    report : called with a sentence when sending has to wait.

    Raises
    ------
    ServiceUnavailable : the port is taken or cannot be bound.
    """

    def __init__(
        self,
        bind: str = DEFAULT_BIND,
        *,
        high_water_mark: int = 32,
        receiver_timeout: float | None = None,
        report: Callable[[str], None] | None = None,
    ):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set(zmq.SNDHWM, high_water_mark)
        # below this size pyzmq copies, and then cannot tell when a message has left
        self._socket.copy_threshold = 0
        self.receiver_timeout = receiver_timeout
        self.report = report or (lambda sentence: None)
        self.n_bytes_sent = 0
        self._in_flight: deque[zmq.MessageTracker] = deque()
        self._series: _Series | None = None
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ServiceUnavailable(_bind_failure(bind, error)) from error
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> "DectrisStreamSender":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        # after an error what is queued is of no use: do not hang on a receiver that went away
        self.close(linger=0.0 if error_type else 30.0)

    @property
    def series_unique_id(self) -> str:
        return self._current().unique_id

    def wait_for_receiver(self) -> None:
        """Return when somebody is connected.

        Raises
        ------
        ServiceUnavailable : nobody connected within ``receiver_timeout``.
        """
        self._wait_until_writable(f"waiting for a receiver at {self.endpoint}")

    def send_start(
        self,
        detector: DetectorHeader,
        shape: tuple[int, int],
        dtype: str,
        number_of_images: int,
        *,
        series_id: int = 1,
        series_unique_id: str | None = None,
        channels: Sequence[str] = ("threshold_1",),
        codec: Literal["bslz4", "lz4", "raw"] = "bslz4",
        header_detail: Literal["basic", "all"] = "all",
        pixel_mask: np.ndarray | None = None,
        flatfield: np.ndarray | None = None,
        user_data: Any = "",
    ) -> None:
        """Arm: everything a receiver must know before the first image.

        shape : (slow, fast). codec : how the blobs that follow are compressed.
        pixel_mask : (slow, fast), uint32, NXmx bits; flatfield : (slow, fast), float32; sent with
        header_detail "all" only, and then all-valid and all-one when left out.
        user_data : the header appendix; a map may hold "nearline" (see nearline_user_data).
        """
        name = np.dtype(dtype).name
        if name not in _TYPED_ARRAY_TAG or name == "float32":
            raise BadFrame(f"stream v2 carries uint8, uint16 or uint32 images, not {name}; convert the frames first")
        for label, array in (("pixel_mask", pixel_mask), ("flatfield", flatfield)):
            if array is not None and array.shape != shape:
                raise ShapeMismatch(f"{label} has shape {array.shape}, the frames {shape}; give one value per pixel")
        self._series = _Series(
            series_id, series_unique_id or _ulid(), tuple(channels), shape, name, codec, detector.count_time
        )
        message = _start_fields(detector, self._series, number_of_images, user_data)
        if header_detail == "all":
            mask = np.zeros(shape, np.uint32) if pixel_mask is None else pixel_mask
            flat = np.ones(shape, np.float32) if flatfield is None else flatfield
            message["flatfield"] = {channel: _array(flat.astype("<f4")) for channel in channels}
            message["pixel_mask"] = {channel: _array(mask.astype("<u4")) for channel in channels}
        self._push(_dumps(message))

    def prepare_image(self, blobs: Blobs, user_data: Any = None) -> PreparedImage:
        """Encode an image's pixels once, for sending it any number of times in this or later series.

        blobs : the compressed frame, or one for each channel. user_data : the image appendix.
        """
        series = self._current()
        if not isinstance(blobs, Mapping):
            blobs = dict.fromkeys(series.channels, blobs)
        if set(blobs) != set(series.channels):
            raise BadFrame(f"blobs for {sorted(blobs)} given, but the start message announced {series.channels}")
        tail: list[Buffer] = [_text("data"), _head(5, len(blobs))]
        for channel, blob in blobs.items():
            tail += [_text(channel), *_image_array(blob, series)]
        if user_data is not None:
            tail += [_text("user_data"), cbor2.dumps(user_data)]
        n_keys = 9 if user_data is None else 10
        return PreparedImage(len(series.image_head(0, 0, 0, n_keys)), tail, n_keys)

    def send_image(self, image_id: int, image: Blobs | PreparedImage, user_data: Any = None) -> None:
        """Send one frame; blocks while the receiver's queue is full.

        image : the compressed frame (copied once into its message), or one from prepare_image (not copied).
        """
        series = self._current()
        if not isinstance(image, PreparedImage):
            image = self.prepare_image(image, user_data)
        elif user_data is not None:
            raise ProtocolError("a prepared image has its user_data already; give it to prepare_image")
        if image.tracker is not None:
            self._wait_until_sent(image.tracker)
        stop = series.ticks()
        start = max(0, stop - series.exposure_ticks)
        head = series.image_head(image_id, start, stop, image.n_keys)
        if len(head) != image.head_bytes:
            raise ProtocolError(
                f"image was prepared for a series_unique_id of another length than {series.unique_id!r}; "
                "prepare it again after send_start"
            )
        image.buffer[: image.head_bytes] = head
        image.tracker = self._push(image.buffer)

    def send_end(self) -> None:
        """The series is complete, or was stopped."""
        series = self._current()
        self._push(_dumps({"type": "end", "series_id": series.series_id, "series_unique_id": series.unique_id}))
        self._series = None

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every message has left for the receiver; False when one took longer than ``timeout`` s."""
        try:
            for tracker in self._in_flight:
                tracker.wait(-1 if timeout is None else timeout)
        except zmq.NotDone:
            return False
        return True

    def close(self, linger: float = 30.0) -> None:
        """Close the socket; queued messages may still leave for ``linger`` s."""
        if not self._socket.closed:
            self._socket.close(linger=round(linger * 1000))
            self._context.term()

    def _current(self) -> "_Series":
        if self._series is None:
            raise ProtocolError("no series is open; call send_start first")
        return self._series

    def _push(self, message: bytes | bytearray) -> zmq.MessageTracker:
        while True:
            self._wait_until_writable(f"the receiver at {self.endpoint} is slow or gone; waiting")
            try:
                tracker = self._socket.send(message, flags=zmq.NOBLOCK, copy=False, track=True)
            except zmq.Again:  # the receiver left between the two calls
                continue
            assert tracker is not None
            self.n_bytes_sent += len(message)
            self._in_flight.append(tracker)
            while self._in_flight[0].done and len(self._in_flight) > 1:
                self._in_flight.popleft()
            return tracker

    def _wait_until_writable(self, sentence: str) -> None:
        started, reported = time.monotonic(), False
        # in slices, so that Ctrl-C is heard
        while not self._socket.poll(_POLL_MS, zmq.POLLOUT):
            waited = time.monotonic() - started
            if self.receiver_timeout is not None and waited > self.receiver_timeout:
                raise ServiceUnavailable(
                    f"no receiver took a message at {self.endpoint} for {waited:.1f} s; "
                    "start 'nearline serve' with this endpoint, or raise receiver_timeout"
                )
            if not reported:
                self.report(sentence)
                reported = True

    def _wait_until_sent(self, tracker: zmq.MessageTracker) -> None:
        started = time.monotonic()
        while not tracker.done:
            waited = time.monotonic() - started
            if self.receiver_timeout is not None and waited > self.receiver_timeout:
                raise ServiceUnavailable(
                    f"a message at {self.endpoint} has not left for {waited:.1f} s; is the receiver still running?"
                )
            time.sleep(1e-4)


def finish(sender: DectrisStreamSender) -> None:
    """Wait for the last messages to leave.

    Raises
    ------
    ServiceUnavailable : the receiver took none of them for ``receiver_timeout`` s.
    """
    if not sender.flush(sender.receiver_timeout):
        raise ServiceUnavailable(
            f"the receiver at {sender.endpoint} took no message for {sender.receiver_timeout} s; "
            "the end of the series is lost. Restart the receiver, then send again"
        )


def send_images(
    sender: DectrisStreamSender,
    images: Iterable[tuple[int, Blobs | PreparedImage, Any]],
    *,
    rate: float = 0.0,
    total: int = 0,
    progress: Progress | None = None,
) -> int:
    """Send (image_id, image, user_data) on an absolute schedule; returns how many were sent.

    Frame n leaves n / rate s after the first, or at once when the sender is behind: a late frame
    delays no other. rate 0 sends without a schedule.
    """
    started, n_sent, last_report = time.monotonic(), 0, 0.0
    for image_id, image, user_data in images:
        if rate:
            _sleep_until(started + n_sent / rate)
        sender.send_image(image_id, image, user_data)
        n_sent += 1
        if progress is not None and (time.monotonic() - last_report > 0.1 or n_sent == total):
            last_report = time.monotonic()
            progress("sending", n_sent, total)
    return n_sent


def _sleep_until(moment: float) -> None:
    delay = moment - time.monotonic()
    if delay > 0:
        time.sleep(delay)


class _Series:
    """What is constant between a start and an end message."""

    def __init__(
        self,
        series_id: int,
        unique_id: str,
        channels: tuple[str, ...],
        shape: tuple[int, int],
        dtype: str,
        codec: str,
        count_time: float,
    ):
        self.series_id, self.unique_id, self.channels = series_id, unique_id, channels
        self.shape, self.dtype, self.codec = shape, dtype, codec
        self.date = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.exposure_ticks = round(count_time * CLOCK_HZ)
        self._started_ns = time.monotonic_ns()
        # integers in their widest CBOR form, so that every head has the same length
        self._before_image_id = b"".join(
            [
                *(_text("type"), _text("image")),
                *(_text("series_id"), struct.pack(">BI", 0x1A, series_id)),
                *(_text("series_unique_id"), _text(unique_id), _text("image_id")),
            ]
        )
        self._date_item = b"".join([_text("series_date"), b"\xc0", _text(self.date), _text("start_time")])

    def ticks(self) -> int:
        """Detector time since the start of the series."""
        return (time.monotonic_ns() - self._started_ns) * CLOCK_HZ // 1_000_000_000

    def image_head(self, image_id: int, start: int, stop: int, n_keys: int) -> bytes:
        """Everything of an image message that comes before its pixels."""
        return b"".join(
            [
                _SELF_DESCRIBED_BYTES,
                _head(5, n_keys),
                self._before_image_id,
                struct.pack(">BI", 0x1A, image_id),
                _text("real_time"),
                _seconds(stop - start),
                self._date_item,
                _seconds(start),
                _text("stop_time"),
                _seconds(stop),
            ]
        )


def _start_fields(detector: DetectorHeader, series: _Series, number_of_images: int, user_data: Any) -> dict[str, Any]:
    """The start message without its arrays."""
    message: dict[str, Any] = {
        "type": "start",
        "series_id": series.series_id,
        "series_unique_id": series.unique_id,
        "arm_date": cbor2.CBORTag(0, series.date),
        "beam_center_x": detector.beam_center_x,
        "beam_center_y": detector.beam_center_y,
        "channels": list(series.channels),
        "count_time": detector.count_time,
        "detector_description": detector.description,
        "detector_serial_number": detector.serial_number,
        # there is no distance key: x and y are the beam centre in m, z the negative distance
        "detector_translation": [
            detector.beam_center_x * detector.pixel_size_x,
            detector.beam_center_y * detector.pixel_size_y,
            -detector.detector_distance,
        ],
        "frame_time": detector.frame_time,
        "goniometer": {axis: {"increment": 0.0, "start": 0.0} for axis in ("chi", "omega", "phi")},
        "image_dtype": series.dtype,
        "image_size_x": series.shape[1],
        "image_size_y": series.shape[0],
        "incident_energy": detector.incident_energy,
        "incident_wavelength": detector.incident_wavelength,
        "number_of_images": number_of_images,
        "pixel_size_x": detector.pixel_size_x,
        "pixel_size_y": detector.pixel_size_y,
        "sensor_material": detector.sensor_material,
        "sensor_thickness": detector.sensor_thickness,
        "user_data": user_data,
    }
    for name in _SAID_IF_KNOWN:
        value = getattr(detector, name)
        if value is not None:
            message[name] = value
    if detector.threshold_energy is not None:
        message["threshold_energy"] = dict.fromkeys(series.channels, detector.threshold_energy)
    return message


def _dumps(message: dict[str, Any]) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(_SELF_DESCRIBED, message))


def _array(array: np.ndarray) -> cbor2.CBORTag:
    """RFC 8746 row-major array of the numbers as they are."""
    typed = cbor2.CBORTag(_TYPED_ARRAY_TAG[array.dtype.name], array.tobytes())
    return cbor2.CBORTag(40, [list(array.shape), typed])


def _image_array(blob: Buffer, series: _Series) -> list[Buffer]:
    """The same for compressed pixels, in pieces, so that the blob is not copied here."""
    view = memoryview(blob).cast("B")
    rows, columns = series.shape
    pieces: list[Buffer] = [
        _head(6, 40) + _head(4, 2) + _head(4, 2) + _head(0, rows) + _head(0, columns),
        _head(6, _TYPED_ARRAY_TAG[series.dtype]),
    ]
    if series.codec != "raw":
        # DECTRIS gives 0 as the element size of plain lz4
        element_size = np.dtype(series.dtype).itemsize if series.codec == "bslz4" else 0
        pieces.append(_head(6, 56500) + _head(4, 3) + _text(series.codec) + _head(0, element_size))
    return [*pieces, _head(2, view.nbytes), view]


def _head(major: int, value: int) -> bytes:
    """Shortest CBOR head of a major type (RFC 8949, section 3)."""
    if value < 24:
        return bytes([major << 5 | value])
    for information, form in ((24, ">BB"), (25, ">BH"), (26, ">BI")):
        if value < 1 << (8 << (information - 24)):
            return struct.pack(form, major << 5 | information, value)
    return struct.pack(">BQ", major << 5 | 27, value)


def _text(text: str) -> bytes:
    raw = text.encode()
    return _head(3, len(raw)) + raw


def _seconds(ticks: int) -> bytes:
    """A time as the rational [ticks, clock frequency], always of the same length."""
    return struct.pack(">BBQBI", 0x82, 0x1B, ticks, 0x1A, CLOCK_HZ)


def _ulid() -> str:
    """26 characters as the detector's: 48 bits of milliseconds, 80 random bits, Crockford base 32."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def _bind_failure(bind: str, error: zmq.ZMQError) -> str:
    if error.errno in (zmq.EADDRINUSE, errno.EADDRINUSE):
        return (
            f"{bind} is in use: port {bind.rpartition(':')[2]} belongs to another program, perhaps another simulator; "
            "stop it, or bind another port"
        )
    return f"cannot bind {bind} ({error}); write it as tcp://ADDRESS:PORT with an address of this machine"
