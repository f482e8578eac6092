"""The connector for DECTRIS detectors that speak stream v2: series in, runs out.

One thread, one PULL socket, blocking receive; the blob that arrives is the blob that is stored.
One series becomes one run. A detector cannot be made to wait: when the buffer is full the
thread stops reading, says so, and what the detector then drops is found by its index.
"""

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import numpy as np
import zmq
from pydantic import ValidationError

from storage.errors import BadFrame, BadMessage, BadName, NearlineError
from storage.frame import FrameInfo
from storage.metadata import pack_meta
from storage.models import StreamHeader
from storage.names import check_name
from storage.run_folder import RunFolder
from streaming.connectors.dectris_stream2 import EndMessage, ImageMessage, StartMessage, parse_message
from streaming.recorder import LiveStream, Recorder

__all__ = ["EigerConnector", "frames_per_chunk"]

log = logging.getLogger("nearline.eiger")

_POLL_MS = 200
# A header with flat field and mask of a 16M detector is about 140 MB.
_MAX_MESSAGE_BYTES = 1 << 30
_RECEIVE_QUEUE = 8
# A link over which nothing comes is probed after 10 s, and given up 12 s later.
_KEEPALIVE = {
    zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 10, zmq.TCP_KEEPALIVE_INTVL: 3, zmq.TCP_KEEPALIVE_CNT: 4
}  # fmt: skip
_CHUNK_S = 2.0
_CHUNK_BYTES = 1 << 30
_USER_KEY = "nearline"


@dataclass(frozen=True, slots=True)
class _Pending:
    """A start message that did not say the frames' shape or dtype; the first image does."""

    message: StartMessage


class EigerConnector(threading.Thread):
    """Receives one detector's stream.

    Parameters
    ----------
    data_source : name of the detector here, such as ``eiger``; further channels become
        ``eiger.<channel>``.
    endpoint : where the detector binds, such as ``tcp://127.0.0.1:31001``.
    experiment : for series whose header appendix does not name one.
    persistence : of its streams; ``online`` keeps them in memory only.
    """

    def __init__(
        self,
        recorder: Recorder,
        data_source: str,
        endpoint: str,
        experiment: str,
        persistence: Literal["stored", "online"] = "stored",
    ) -> None:
        super().__init__(name=f"connector-{data_source}", daemon=True)
        self.data_source = check_name(data_source, "data source")
        self.endpoint = endpoint
        self.n_messages = 0
        self.n_bad_messages = 0
        self.is_paused = False
        self._recorder, self._experiment, self._persistence = recorder, experiment, persistence
        self._stopping = threading.Event()
        self._pending: _Pending | None = None
        self._complained: set[str] = set()
        # The series of the last image, and its streams.
        self._current: tuple[Any, dict[str | None, LiveStream]] = (None, {})

    def stop(self) -> None:
        """Stop reading; what was read is already queued."""
        self._stopping.set()
        self.join()

    def run(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        socket.setsockopt(zmq.RCVTIMEO, _POLL_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        # We only receive: without the kernel's probes a detector that lost its power, or a cut cable, would leave a
        # connection that looks well for ever, and the detector's next life would wait for a receiver. Heartbeats of
        # ZeroMQ's would do the same, but need a detector that knows them.
        for option, value in _KEEPALIVE.items():
            socket.setsockopt(option, value)
        socket.connect(self.endpoint)
        try:
            while not self._stopping.is_set():
                with suppress(zmq.Again):
                    self._receive(socket.recv_multipart(copy=False))
        finally:
            socket.close()

    def _receive(self, parts: list[zmq.Frame]) -> None:
        self.n_messages += 1
        try:
            if len(parts) != 1:
                raise BadMessage(f"message of {len(parts)} parts; stream v2 sends one (is the format 'legacy'?)")
            message = parse_message(parts[0].buffer)
            if isinstance(message, StartMessage):
                self._start(message)
            elif isinstance(message, ImageMessage):
                self._image(message)
            else:
                self._end(message)
        except NearlineError as error:
            self._reject_message(str(error))
        except ValidationError as error:
            why = "; ".join(problem["msg"] for problem in error.errors())
            self._reject_message(f"a start message that cannot be meant: {why}")
        except Exception:
            log.exception("%s: a message could not be handled and was left out", self.data_source)
            self._reject_message("internal error")

    def _reject_message(self, why: str) -> None:
        self.n_bad_messages += 1
        self._recorder.n_rejected_messages += 1
        # Once a reason: a detector repeats its fault with every frame.
        if why not in self._complained and len(self._complained) < 1000:
            self._complained.add(why)
            log.error("%s: message left out: %s", self.data_source, why)

    # ---- series ---------------------------------------------------------------------------------

    def _start(self, message: StartMessage) -> None:
        if self._series(message.series.series_unique_id, message.series.series_id):
            return  # the same header again, after a reconnect
        self._end_previous()
        if message.shape is None or message.dtype is None:
            self._pending = _Pending(message)
            return
        # The message does not tell the codec: bslz4 is the detector's default, the first image corrects it.
        self._open_run(message, dict.fromkeys(message.channels, (message.shape, message.dtype, "bslz4")))

    def _end_previous(self) -> None:
        """A new header without an end message of the series before: the detector was restarted."""
        self._pending = None
        for stream in self._mine():
            for part in [p for p in stream.series if not p.is_ended]:
                part.is_ended = True
                if self._recorder.open_run(stream.header.experiment) is None:
                    self._recorder.finish_stream(stream, aborted="a new series began without an end message")

    def _series(self, series_unique_id: str | None, series_id: int) -> list[LiveStream]:
        """Open streams of a series of this detector; another one may count its series alike."""
        return [s for s in self._recorder.find_series(series_unique_id, series_id) if self._is_mine(s)]

    def _mine(self) -> list[LiveStream]:
        is_open = (s for s in self._recorder.streams() if s.is_open and s.header.series is not None)
        return [s for s in is_open if s.header.parent is None and self._is_mine(s)]

    def _is_mine(self, stream: LiveStream) -> bool:
        name = stream.header.data_source
        return name == self.data_source or name.startswith(f"{self.data_source}.")

    def _open_run(self, message: StartMessage, arrays: dict[str, tuple[Any, str, str]]) -> None:
        user_data = {"header_appendix": message.user_data} if message.user_data else {}
        # Made before the run is, so that a header that cannot be leaves no empty run behind.
        headers = {
            channel: StreamHeader(
                experiment=self._experiment,
                run=0,
                data_source=self._name_of(channel, message.channels),
                shape=shape,
                dtype=dtype,
                codec=codec,
                frames_per_chunk=frames_per_chunk(message.detector.frame_time, shape, dtype),
                planned=message.series.number_of_images,
                persistence=self._persistence,
                channel=channel,
                detector=message.detector,
                series=message.series,
                user_data=user_data,
            )
            for channel, (shape, dtype, codec) in arrays.items()
        }
        opened = self._recorder.open_run(_wish(message.user_data).get("experiment") or self._experiment)
        folder = opened or self._start_run(_wish(message.user_data), user_data)
        for channel, header in headers.items():
            if opened and self._continue(folder, header, message):
                continue
            # How many frames a run of several series will have is not known.
            planned = 0 if opened else header.planned
            update = {"experiment": folder.header.experiment, "run": folder.header.run, "planned": planned}
            self._recorder.start_stream(
                folder,
                header.model_copy(update=update),
                pixel_mask=_fitting(message.pixel_masks.get(channel), header.shape),
                flatfield=_fitting(message.flatfields.get(channel), header.shape),
            )

    def _continue(self, folder: RunFolder, header: StreamHeader, message: StartMessage) -> bool:
        """Append the series to the stream of an earlier one in the same run, if frames are of the same kind."""
        stream = self._recorder.find((folder.header.experiment, folder.header.run, header.data_source))
        if stream is None:
            return False
        if (stream.header.shape, stream.header.dtype) != (header.shape, header.dtype):
            raise BadMessage(
                f"series {message.series.series_id} has {header.dtype} frames of {header.shape}, but run "
                f"{folder.header.experiment}/{folder.header.run} holds {stream.header.dtype} {stream.header.shape}; "
                "stop the run before the detector is set up differently"
            )
        self._recorder.continue_stream(stream, message.series)
        return True

    def _start_run(self, wish: dict[str, Any], user_data: dict[str, Any]) -> RunFolder:
        """The run that the header appendix asks for; else the next free one: frames are not given up for a name."""
        experiment, run = wish.get("experiment") or self._experiment, wish.get("run")
        sample = None if wish.get("sample") is None else str(wish["sample"])
        try:
            return self._recorder.start_run(experiment, run, sample=sample, user_data=user_data)
        except BadName as error:
            if experiment == self._experiment and run is None:
                raise
            log.error("%s: %s; this series goes to the next run of %s", self.data_source, error, self._experiment)
            return self._recorder.start_run(self._experiment, sample=sample, user_data=user_data)

    def _name_of(self, channel: str, channels: tuple[str, ...]) -> str:
        return self.data_source if channel == channels[0] else f"{self.data_source}.{channel}"

    def _end(self, message: EndMessage) -> None:
        streams = self._series(message.series_unique_id, message.series_id)
        if not streams:
            raise BadMessage(f"end of series {message.series_id}, which is not being recorded")
        for stream in streams:
            part = stream.find_series(message.series_unique_id, message.series_id)
            if part is not None and not part.is_ended:
                self._recorder.end_series(stream, part)

    # ---- frames ---------------------------------------------------------------------------------

    def _image(self, message: ImageMessage) -> None:
        if self._pending and self._pending.message.series.series_id == message.series_id:
            start = self._pending.message
            self._open_run(start, {n: (a.shape, a.dtype, a.codec) for n, a in message.channels.items()})
            self._pending = None
        streams = self._streams_of(message)
        if not streams:
            raise BadMessage(
                f"image of series {message.series_id} before any start message of it; its frames are left out "
                "until the detector is armed again"
            )
        for channel, array in message.channels.items():
            stream = streams.get(channel)
            if stream is None:
                raise BadMessage(f"image of channel {channel!r}, which the start message did not announce")
            self._take(stream, message, array)

    def _streams_of(self, message: ImageMessage) -> dict[str | None, LiveStream]:
        """Open streams of an image's series by channel; looked for once a series, among all there are."""
        series = (message.series_unique_id, message.series_id)
        known, streams = self._current
        if series != known or not streams or not all(stream.is_open for stream in streams.values()):
            streams = {s.header.channel: s for s in self._series(*series)}
            self._current = (series, streams)
        return streams

    def _take(self, stream: LiveStream, message: ImageMessage, array: Any) -> None:
        """Queue one array; one that contradicts its header is rejected by index, with the reason."""
        if array.codec != stream.header.codec and not stream.submitted and not stream.store.states.announced:
            stream.store.change_codec(array.codec)
        if not stream.is_open:
            raise BadMessage(f"image {message.image_id} of series {message.series_id} after the series had ended")
        header = stream.header
        info = _frame_info(message)
        part = stream.find_series(message.series_unique_id, message.series_id)
        info.frame_index += part.offset if part else 0
        try:
            if message.user_data:
                info.meta_json = pack_meta(_meta_of(message.user_data))
            if array.shape != header.shape or array.dtype != header.dtype or array.codec != header.codec:
                raise BadFrame(
                    f"frame {message.image_id} is {array.shape} {array.dtype} {array.codec}, but its series began as "
                    f"{header.shape} {header.dtype} {header.codec}; arm the detector again after changing it"
                )
            while not self._recorder.submit(stream, [(info, array.blob)]):
                self._pause()
                if self._stopping.is_set():
                    return
        except BadFrame as error:
            if 0 <= info.frame_index < stream.index_limit:
                self._recorder.reject(stream, info.frame_index, str(error))
            raise
        self.is_paused = False

    def _pause(self) -> None:
        if not self.is_paused:
            log.warning(
                "%s: the buffer is full and the disk does not keep up; reading is paused, the detector may drop frames",
                self.data_source,
            )
        self.is_paused = True


def frames_per_chunk(frame_time: float, shape: tuple[int, ...], dtype: str) -> int:
    """N of a stream: about 2 s of data, at most 1 GiB of decoded frames, 10 to 1000 frames."""
    by_time = _CHUNK_S / frame_time if frame_time > 0 else 100.0
    by_size = _CHUNK_BYTES / max(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, 1)
    return int(min(max(by_time, 10.0), max(by_size, 1.0), 1000.0))


def _frame_info(message: ImageMessage) -> FrameInfo:
    info = FrameInfo(
        frame_index=message.image_id,
        start_tick=message.start_tick,
        stop_tick=message.stop_tick,
        tick_rate=message.tick_rate,
        series_id=message.series_id,
        series_unique_id=message.series_unique_id,
        series_frame=message.image_id,
    )
    if message.series_date and message.tick_rate and message.start_tick is not None:
        # Absolute frame time = series_date + start_time (stream v2 documentation).
        info.utc_ns = _absolute_ns(message.series_date, message.start_tick, message.tick_rate)
        info.utc_source = "series_date" if info.utc_ns is not None else info.utc_source
    if info.utc_ns is None:
        info.utc_ns = time.time_ns()
    return info


def _meta_of(user_data: Any) -> dict[str, Any]:
    return user_data if isinstance(user_data, dict) else {"image_appendix": user_data}


def _absolute_ns(series_date: datetime, tick: int, tick_rate: int) -> int | None:
    """UTC in ns since 1970; None where the detector's numbers lead out of the calendar."""
    try:
        moment = series_date + timedelta(microseconds=tick * 1_000_000 // tick_rate)
        return int(moment.timestamp() * 1e9)
    except (OverflowError, ValueError):
        return None


def _wish(user_data: Any) -> dict[str, Any]:
    """What the header appendix asks for: ``{"nearline": {"experiment": …, "run": …, "sample": …}}``."""
    wish = user_data.get(_USER_KEY) if isinstance(user_data, dict) else None
    if not isinstance(wish, dict):
        return {}
    return wish if isinstance(wish.get("experiment"), str) else wish | {"experiment": None}


def _fitting(plane: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """A mask or flat field that covers the frames; others are reported and left out."""
    if plane is not None and plane.shape != tuple(shape):
        log.error("a mask or flat field of shape %s does not cover frames of %s; it is left out", plane.shape, shape)
        return None
    return plane
