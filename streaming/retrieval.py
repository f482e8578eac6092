"""The retrieval API: a run, its streams, their frames; the same objects live, finished and offline.

Open, choose, slice, read; nothing is read until asked. Where the frames come from is the
business of a `StreamSource`: a running service or a run folder.
"""

import itertools
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from storage.codec import decode, decode_into
from storage.errors import (
    CorruptFrame,
    FrameMissing,
    GroupNeedsService,
    NotStored,
    RunNotFound,
    StreamNotFound,
)
from storage.files import is_local, to_path
from storage.frame import FrameInfo, RawFrame
from storage.frame_columns import PREFIXES
from storage.geometry import Geometry
from storage.masks import plane_of_frames
from storage.models import RunHeader, RunState, StreamHeader
from storage.names import parse_run_key, run_key
from storage.run_folder import ChunkCommit, Event, RunFolder
from storage.states import StreamLedger
from storage.stream_source import FolderSource, LeasedFrame, StreamSource, StreamStatus, state_of
from streaming import wire
from streaming.client import Client, is_reachable
from streaming.service_source import ServiceSource
from streaming.wire import DEFAULT_ADDRESS

if TYPE_CHECKING:
    import pyarrow as pa
    import zarr

    from storage.annotations import AnnotationBatch, Annotations
    from storage.step_store import Processing
    from streaming.query import Selection

__all__ = ["Chunk", "Frame", "FrameTimes", "Run", "Stream", "StreamSlice", "open_run"]

log = logging.getLogger("nearline.retrieval")

# A wait that another thread may end looks so often whether it has.
_LOOK_AT_STOP_S = 0.2


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """When a frame was exposed: detector ticks with their rate, and UTC estimates."""

    start_tick: int | None
    stop_tick: int | None
    tick_rate: int | None
    utc: datetime | None
    utc_source: str
    received: datetime


class Frame:
    """One frame: its bytes as the detector compressed them, decoded when first touched.

    A frame of a detector in parts holds all parts that came; the rest says what belongs to the
    first of them.
    """

    def __init__(self, raws: list[RawFrame], header: StreamHeader, leased: LeasedFrame | None = None) -> None:
        self._raws, self._raw, self._header, self._leased = raws, raws[0], header, leased

    @property
    def frame_index(self) -> int:
        return self._raw.info.frame_index

    @property
    def info(self) -> FrameInfo:
        """The frame's row in the frame table."""
        return self._raw.info

    @property
    def delivery(self) -> int:
        """How often a group has given it out, this time included."""
        return self._leased.delivery if self._leased else 1

    @property
    def is_late(self) -> bool:
        """Whether it, or a part of it, came after its chunk was sealed without it, or after its group had passed it."""
        return any(raw.info.late for raw in self._raws) or (self._leased is not None and self._leased.is_late)

    @property
    def is_complete(self) -> bool:
        """Whether all its parts are there."""
        return len(self._raws) == self._header.parts

    def acknowledge(self) -> None:
        """In a group followed with ``acknowledges=False``: this frame is done. From any thread, while the loop goes on.

        Raises
        ------
        GroupNeedsService : the frame does not come from a group.
        """
        self._in_group("acknowledged").is_done = True

    def retry_later(self, delay_s: float = 0.0) -> None:
        """In a group: have it delivered again after so long, to anyone, instead of acknowledged.

        Raises
        ------
        GroupNeedsService : the frame does not come from a group.
        """
        self._in_group("given back").retry_after_s = delay_s

    def _in_group(self, what: str) -> LeasedFrame:
        if self._leased is None:
            raise GroupNeedsService(f"only a frame that was given out to a group can be {what}; follow(group=…)")
        return self._leased

    @property
    def raw(self) -> RawFrame:
        """Row and bytes together, as storage and steps know them."""
        return self._raw

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Metadata that came with the frame."""
        return self._raw.info.meta

    @property
    def blob(self) -> memoryview:
        """The compressed bytes, exactly as delivered."""
        return memoryview(self._raw.blob)

    @cached_property
    def data(self) -> np.ndarray:
        """The pixels, (slow, fast), in the stream's dtype; masked pixels hold the dtype's maximum.

        Of a detector in parts (part, slow, fast), a part that never came filled like masked pixels.
        """
        header = self._header
        if header.kind == "table":
            raise FrameMissing(f"{header.data_source} is a table: its frames have .meta, but no pixels")
        if header.parts == 1:
            return decode(self._raw.blob, header.shape, header.dtype, header.codec)
        data = np.full((header.parts, *header.shape), header.fill_value, header.dtype)
        for raw in self._raws:
            decode_into(raw.blob, data[raw.info.part, ...], header.codec)
        return data

    @property
    def image(self) -> np.ndarray:
        """The pixels as analysis sees them: `data`, with the parts of a frame one below the other in one array."""
        return self.data.reshape(self._header.image_shape)

    @property
    def raw_parts(self) -> list[RawFrame]:
        """Row and bytes of each part that came; one, unless the detector sends frames in parts."""
        return self._raws

    @cached_property
    def parts(self) -> list[np.ndarray | None]:
        """The pixels of each part; None where one never came."""
        header, found = self._header, dict.fromkeys(range(self._header.parts))
        for raw in self._raws:
            found[raw.info.part] = decode(raw.blob, header.shape, header.dtype, header.codec)
        return list(found.values())

    @property
    def times(self) -> FrameTimes:
        info = self._raw.info
        return FrameTimes(
            info.start_tick,
            info.stop_tick,
            info.tick_rate,
            _utc(info.utc_ns) if info.utc_ns is not None else None,
            info.utc_source,
            _utc(info.received_ns),
        )

    def __repr__(self) -> str:
        return f"<Frame {self.frame_index} of {self._header.data_source}, {self._raw.nbytes} bytes>"


@dataclass(frozen=True)
class Chunk:
    """A sealed chunk: frames ``start <= frame_index < stop``, some of which may be missing."""

    stream: "Stream"
    commit: ChunkCommit

    @property
    def start(self) -> int:
        return self.commit.start

    @property
    def stop(self) -> int:
        return self.commit.stop

    def frames(self) -> Iterator[Frame]:
        """Its frames, in index order."""
        return iter(self.stream[self.start : self.stop])


class StreamSlice:
    """Frames ``start <= frame_index < stop`` of a stream; iterate over it, or take its `array`."""

    def __init__(self, stream: "Stream", start: int, stop: int) -> None:
        self._stream, self.start, self.stop = stream, start, stop

    def __len__(self) -> int:
        """Number of indices, missing frames included."""
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[Frame]:
        """The frames that are there, in index order."""
        at = self.start
        while at < self.stop:
            frames = self._stream.source.read(at, self.stop)
            if not frames:
                return
            for _, parts in groupby(frames, lambda raw: raw.info.frame_index):
                yield Frame(list(parts), self._stream.header)
            at = frames[-1].info.frame_index + 1

    @property
    def array(self) -> "zarr.Array":
        """The pixels as a lazy Zarr array, (frame, slow, fast); missing frames read as the fill value."""
        # Zarr takes half a second to import: only those who want an array pay.
        from storage.array_view import open_view

        return open_view(self._stream.header, self.start, self.stop, self._stream.read_blob)


class Stream:
    """One data source of a run: an ordered sequence of frames, live or finished."""

    def __init__(self, source: StreamSource, run: "Run") -> None:
        self.source, self.run = source, run

    @property
    def header(self) -> StreamHeader:
        """What is known of every frame: shape, dtype, codec, detector."""
        return self.source.header

    @property
    def name(self) -> str:
        """The data source."""
        return self.header.data_source

    @property
    def status(self) -> StreamStatus:
        return self.source.status()

    @property
    def is_live(self) -> bool:
        """Whether frames may still come."""
        return not self.status.is_terminal

    def __len__(self) -> int:
        """Frames so far: the highest index known, plus one; includes missing ones."""
        return self.status.announced

    @overload
    def __getitem__(self, which: int) -> Frame: ...
    @overload
    def __getitem__(self, which: slice) -> StreamSlice: ...
    def __getitem__(self, which: int | slice) -> Frame | StreamSlice:
        """Frame ``i``, or a slice of frames; negative numbers count from the present end.

        Raises
        ------
        FrameMissing, FrameNotYetAvailable, CorruptFrame
        """
        if isinstance(which, slice):
            if which.step not in (None, 1):
                raise ValueError(f"slices of a stream go in steps of 1, not {which.step}; slice .array instead")
            start, stop, _ = which.indices(len(self))
            return StreamSlice(self, start, stop)
        index = which + len(self) if which < 0 else which
        return Frame(self.source.read_parts(index), self.header)

    def __iter__(self) -> Iterator[Frame]:
        """All frames there are now; `follow` also waits for those to come."""
        return iter(self[:])

    @property
    def array(self) -> "zarr.Array":
        """All frames there are now as a lazy Zarr array, (frame, slow, fast)."""
        return self[:].array

    def follow(
        self,
        group: str | None = None,
        *,
        start: int = 0,
        timeout: float | None = None,
        lease_s: float = 60.0,
        max_deliveries: int | None = None,
        stop: threading.Event | None = None,
        acknowledges: bool = True,
    ) -> Iterator[Frame]:
        """Every frame in order, waiting for those to come, until the run has ended.

        Parameters
        ----------
        group : share the frames with the other members of this consumer group. Each frame is
            leased to one member, and acknowledged when the loop comes back for the next.
        start : first frame index; a group goes on where it was.
        timeout : stop after so many seconds without a new frame; None waits for ever.
        lease_s : a member that has not come back for the next frame after so many seconds loses this
            one to another member.
        max_deliveries : a frame that a group has given out so often in vain becomes a dead letter
            (`dead_letters`); None leaves the group's own limit, 10 at first.
        stop : set by another thread to end the loop, within 0.2 s also while it waits.
        acknowledges : with False going on acknowledges nothing: a frame of the group is done with
            `Frame.acknowledge`, such as when the results of a batch are on disk. What has no such word when its lease
            runs out, or when the loop is left, is delivered again.

        Raises
        ------
        GroupNeedsService : a group was asked for, but this run is a bare folder.
        CorruptFrame : the next frame is damaged on disk; go on with ``start`` behind it, or use a group.
        """
        if group is not None:
            leases = self.source.follow_group(
                group, timeout, lease_s, stop=stop, max_deliveries=max_deliveries, acknowledges=acknowledges
            )
            for leased in leases:
                yield Frame([leased.frame, *leased.more_parts], self.header, leased)
            return
        at = max(start, 0)
        while stop is None or not stop.is_set():
            status = self._wait(at, timeout, stop)
            if status.watermark <= at:
                return
            for frame in StreamSlice(self, at, status.watermark):
                yield frame
                if stop is not None and stop.is_set():
                    return
            at = status.watermark

    def latest(self, after: int = -1, *, timeout: float | None = 0.0, group: str | None = None) -> Frame | None:
        """The newest frame with an index above ``after``; waits up to ``timeout`` s for one, then None.

        With a group, each newest frame is given only once to all its members: for displays and
        programs that share the work of looking at what is new.
        """
        raw = self.source.latest(after, timeout, group)
        if raw is None:
            return None
        is_whole = self.header.parts == 1
        return Frame([raw] if is_whole else self.source.read_parts(raw.info.frame_index), self.header)

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The consumer groups by name: cursor, lag, who has which frame, dead letters."""
        return self.source.groups()

    def seek(self, group: str, frame_index: int) -> None:
        """Put a group on a frame: from there on all is delivered (again); 0 begins anew."""
        self.source.seek_group(group, frame_index)

    def settle_dead_letters(
        self, group: str, action: Literal["retry", "drop"], frames: Iterable[int] | None = None
    ) -> list[int]:
        """Have a group's dead letters delivered again, or give them up; all, or these frames."""
        return self.source.settle_dead_letters(group, action, None if frames is None else list(frames))

    @overload
    def where(
        self,
        condition: str,
        *,
        columns: Iterable[str] | None = None,
        processing: str | None = None,
        follow: Literal[False] = False,
        time_limit_s: float = 30.0,
    ) -> "Selection": ...
    @overload
    def where(
        self,
        condition: str,
        *,
        processing: str | None = None,
        follow: Literal[True],
        start: int = 0,
        timeout: float | None = None,
        stop: threading.Event | None = None,
        time_limit_s: float = 30.0,
    ) -> Iterator[Frame]: ...
    def where(
        self,
        condition: str,
        *,
        columns: Iterable[str] | None = None,
        processing: str | None = None,
        follow: bool = False,
        start: int = 0,
        timeout: float | None = None,
        stop: threading.Event | None = None,
        time_limit_s: float = 30.0,
    ) -> "Selection | Iterator[Frame]":
        """The frames for which an SQL condition is true, such as ``n_peaks > 20 AND laser``.

        Without ``follow``: those among all frames stored at this moment, as a `Selection`. With it:
        each matching frame as it comes, in order, until the stream has ended. A frame is then decided once, as
        soon as it is stored; if the condition uses results, as soon as the processing has reached it, and the end is
        that of the processing. What is annotated later changes nothing for it.

        Columns are those of the frame table, metadata, results and annotations; ``frame.``, ``meta.``, ``results.``
        and ``annotation.`` before a name say which is meant. `docs/queries.md` has them all.

        Parameters
        ----------
        columns : what the selection's table shows beside frame_index; by default what the condition uses.
        processing : whose results; by default those of the promoted one, else of the newest that has finished or is
            running.
        start : with ``follow``, the first frame index to consider.
        timeout : with ``follow``, stop after so many seconds in which no further frame could be decided.
        stop : with ``follow``, the loop ends when another thread sets it.
        time_limit_s : a condition that takes longer is interrupted.

        Raises
        ------
        BadQuery : not one condition, or a name that no column has; the message lists those there are.
        """
        # DuckDB takes a while to import: only those who ask pay.
        from streaming.query import follow_matches, select

        if follow:
            return follow_matches(self, condition, processing, start, timeout, stop, time_limit_s)
        return select(self, condition, columns, processing, time_limit_s)

    def columns(self, processing: str | None = None) -> dict[str, list[str]]:
        """The columns that `where` knows now, by prefix: frame, meta, results, annotation."""
        from streaming.known_frames import KnownFrames, find_results

        known = KnownFrames(self, 0, self.status.announced, find_results(self, processing))
        return {prefix: known.names(prefix) for prefix in PREFIXES}

    def read_blob(self, frame_index: int, part: int = 0) -> bytes | None:
        """A frame's compressed bytes; None where it is missing."""
        try:
            found = {raw.info.part: raw for raw in self.source.read_parts(frame_index)}
        except FrameMissing:
            return None
        return bytes(found[part].blob) if part in found else None

    def frames_at(self, indices: np.ndarray) -> Iterator[Frame]:
        """The frames of these indices, which must rise; those that are not there are left out.

        Neighbours are read together.
        """
        edges = np.flatnonzero(np.diff(indices) != 1) + 1
        for begin, end in itertools.pairwise([0, *edges.tolist(), len(indices)] if len(indices) else []):
            yield from StreamSlice(self, int(indices[begin]), int(indices[end - 1]) + 1)

    def chunks(self, *, start: int = 0, timeout: float | None = None) -> Iterator[Chunk]:
        """Sealed chunks in order, waiting for those to come, until the run has ended.

        Raises
        ------
        CorruptFrame : the run has ended, and a chunk of it has no commit.
        NotStored : its frames are in memory only, so there are no chunks.
        """
        self.require_stored("cut into chunks")
        number = start
        while (commit := self.source.wait_chunk(number, timeout)) is not None:
            yield Chunk(self, commit)
            number += 1
        status, first = self.status, number * self.header.frames_per_chunk
        if not status.is_terminal or first >= status.announced:
            return
        if not self.source.ledger().is_terminal:
            log.warning(
                "%s/%s/%s was interrupted: frames from %d on are in a chunk that was never sealed; "
                "a service started on this data folder takes the run up and seals it",
                self.header.experiment, self.header.run, self.name, first,
            )  # fmt: skip
        else:
            raise CorruptFrame(
                f"the commit of chunk {number} of {self.header.experiment}/{self.header.run}/{self.name} is gone, so "
                f"frames from {first} on cannot be processed; restore {number:05d}.json from a copy"
            )

    def require_stored(self, what: str) -> None:
        """NotStored for a stream in memory only, which cannot be what is said."""
        header = self.header
        if header.is_online:
            raise NotStored(
                f"{self.run.name}/{header.data_source} is in memory only and cannot be {what}; follow() it while it is "
                "taken, or have such streams stored: persistence='stored', `nearline serve` without --online"
            )

    def ledger(self) -> StreamLedger:
        """Every frame accounted for."""
        return self.source.ledger()

    def _wait(self, above: int, timeout: float | None, stop: threading.Event | None) -> StreamStatus:
        """The status once the watermark exceeds ``above``; looks at ``stop`` meanwhile."""
        if stop is None:
            return self.source.wait(above, timeout)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            status = self.source.wait(above, max(min(left, _LOOK_AT_STOP_S), 0.0))
            if status.watermark > above or status.is_terminal or left <= 0 or stop.is_set():
                return status

    @cached_property
    def pixel_mask(self) -> np.ndarray | None:
        """The detector's mask, (slow, fast) uint32, nonzero where a pixel must not be used; None if it sent none.

        Of frames in parts it has the shape of `Frame.image`.
        """
        return plane_of_frames(self.source.plane("pixel_mask"), self.header)

    @property
    def geometry(self) -> Geometry:
        """Where the pixels are; BadFrame if the detector never told distance or wavelength."""
        shape = self.header.image_shape
        if self.header.detector is None or len(shape) != 2:
            raise StreamNotFound(f"{self.name} is not a detector's stream and has no geometry")
        return Geometry.from_header(self.header.detector, (shape[0], shape[1]))

    def __repr__(self) -> str:
        h = self.header
        what = f"{h.dtype} {h.shape}" if h.kind == "frames" else "table"
        return f"<Stream {run_key(h.experiment, h.run)}/{h.data_source}: {len(self)} frames, {what}>"


class Run:
    """A run: its header, its state, and its data sources by name."""

    def __init__(self, experiment: str, run: int, client: Client | None, folder: Path | None) -> None:
        self._client = client
        self._folder = RunFolder.open(folder) if folder is not None else None
        content = self._describe(experiment, run)
        self.header = RunHeader.model_validate(content["header"])
        self.folder = self._folder.path.absolute() if self._folder else Path(content["folder"])
        self._streams: dict[str, Stream] = {}
        self._annotations: Annotations | None = None

    @property
    def name(self) -> str:
        """As people write it: ``lyso-2026/17``."""
        return run_key(self.header.experiment, self.header.run)

    @property
    def state(self) -> RunState:
        return RunState(self._describe(self.header.experiment, self.header.run)["state"])

    @property
    def metadata(self) -> dict[str, Any]:
        """What is known of the run: what it was started with, and what was added since."""
        found = dict(self.header.user_data)
        for event in self.events("metadata"):
            found.update(event.payload)
        return found

    @property
    def next_run(self) -> int | None:
        """Where the experiment goes on, if whoever sent this run has said so."""
        pointers = [event.payload["run"] for event in self.events("next_run")]
        return pointers[-1] if pointers else None

    def events(self, kind: str | None = None) -> list[Event]:
        """The facts about the run in order, such as ``run_started``, ``comment``, ``run_finished``."""
        if self._folder is not None:
            return list(self._folder.events(kind))
        assert self._client is not None
        ask = wire.GetEvents(id=0, experiment=self.header.experiment, run=self.header.run, kind=kind)
        return [Event.model_validate(content) for content in self._client.connection.ask_json(ask)]

    @property
    def data_sources(self) -> list[str]:
        """Names of all streams, derived ones included."""
        return sorted(self._describe(self.header.experiment, self.header.run)["streams"])

    @property
    def service_address(self) -> str | None:
        """The service this run is read through; None for a bare folder."""
        return self._client.address if self._client else None

    def __getitem__(self, data_source: str) -> Stream:
        """A data source by name.

        Raises
        ------
        StreamNotFound : there is none of that name; the message lists those there are.
        """
        if data_source not in self._streams:
            self._streams[data_source] = Stream(self._source(data_source), self)
        return self._streams[data_source]

    def __contains__(self, data_source: str) -> bool:
        return data_source in self.data_sources

    def __iter__(self) -> Iterator[str]:
        return iter(self.data_sources)

    @property
    def detector(self) -> Stream:
        """The run's one primary data source with frames; StreamNotFound if there is none, or several."""
        streams = self._describe(self.header.experiment, self.header.run)["streams"]
        primary = [n for n, h in streams.items() if h["kind"] == "frames" and h["parent"] is None and "." not in n]
        if len(primary) != 1:
            have = ", ".join(sorted(streams)) or "no data sources yet"
            raise StreamNotFound(f"run {self.name} has {len(primary)} detectors; name a data source of: {have}")
        return self[primary[0]]

    def ledger(self) -> dict[str, StreamLedger]:
        """The ledger of each primary data source."""
        primary = [name for name in self.data_sources if self[name].header.parent is None]
        return {name: self[name].ledger() for name in primary}

    @property
    def processings(self) -> dict[str, "Processing"]:
        """Processings by id, oldest first; their tables are read from the run's folder."""
        # Parquet takes a while to import: only those who want tables pay.
        from storage.step_store import find_processings

        return find_processings(self.folder)

    def processing(self, name: str | None = None) -> "Processing":
        """A processing by id; by default the promoted one (`nearline promote`), else the newest of the whole run.

        Raises
        ------
        RunNotFound : there is none of that name, or none yet; the message lists those there are.
        """
        from storage.promotion import default_processing

        found = self.processings
        chosen = default_processing(self.folder) if name is None else found.get(name)
        if chosen is None:
            missing = "processing" if name is None else f"processing {name!r}"
            raise RunNotFound(
                f"run {self.name} has no {missing}; it has: {', '.join(found) or 'none yet'}; "
                "`nearline process` makes one"
            )
        return chosen

    @cached_property
    def visible_folder(self) -> RunFolder | None:
        """The run's folder as this process sees it; None where only the service can."""
        if self._folder is not None:
            return self._folder
        try:
            found = RunFolder.open(self.folder)
        except (RunNotFound, OSError):
            return None
        return found if found.header == self.header else None

    def annotate(
        self,
        *,
        frames: Any = None,
        start: int | None = None,
        stop: int | None = None,
        from_time: datetime | str | None = None,
        to_time: datetime | str | None = None,
        data_source: str | None = None,
        by: str | None = None,
        values: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> int:
        """Say something of frames that came late: ``run.annotate(start=100, stop=200, laser=True, delay_ps=3.0)``.

        A later value for the same frame and name wins; the earlier one stays in `annotations`. The number of
        this batch is returned.

        Parameters
        ----------
        frames : a frame index, a slice or range, or a list of indices; with a list a name can have a list of values.
        start, stop : ``start <= frame_index < stop``; one of them may be left out.
        from_time, to_time : ``from_time <= time of the frame < to_time``, with a time zone; one may be left out.
        data_source : whose frame indices these are; None for all data sources of the run.
        by : who says so; by default the user of this program.
        values : names that are no Python arguments, such as ``start``.
        named : name → true or false, a number, text, or None to take back what was said.

        Raises
        ------
        BadAnnotation : a name, value or range that cannot be kept.
        """
        from storage.annotations import make_batch

        said = {**(values or {}), **named}
        batch = make_batch(
            said, frames=frames, start=start, stop=stop, from_time=from_time, to_time=to_time,
            data_source=data_source, by=by,
        )  # fmt: skip
        return self.add_annotations(batch)

    def add_annotations(self, batch: "AnnotationBatch") -> int:
        """Keep a batch of annotations, such as one read from a table; its number.

        Raises
        ------
        BadAnnotation : it contradicts earlier ones.
        """
        if batch.data_source is not None and batch.data_source not in self.data_sources:
            raise StreamNotFound(
                f"run {self.name} has no data source {batch.data_source!r}; it has: {', '.join(self.data_sources)}"
            )
        return self.read_annotations().add(batch)

    @property
    def annotations(self) -> "pa.Table":
        """All that was said of the run's frames, a row for each value, in the order it was said."""
        return self.read_annotations().table()

    def read_annotations(self) -> "Annotations":
        """The annotations there are now."""
        if self._annotations is None:
            self._annotations = self._no_annotations_yet()
        self._annotations = self._annotations.refreshed()
        return self._annotations

    def _no_annotations_yet(self) -> "Annotations":
        from storage.annotations import Annotations, FolderAnnotations
        from streaming.service_annotations import ServiceAnnotations

        if self._client is not None:
            return Annotations(ServiceAnnotations(self._client, self.header.experiment, self.header.run))
        return Annotations(FolderAnnotations(self.folder))

    def _source(self, data_source: str) -> StreamSource:
        if self._folder is not None:
            return FolderSource(self._folder, data_source)
        streams = self._describe(self.header.experiment, self.header.run)["streams"]
        if data_source not in streams:
            have = ", ".join(sorted(streams)) or "none yet"
            raise StreamNotFound(f"run {self.name} has no data source {data_source!r}; it has: {have}")
        assert self._client is not None
        return ServiceSource(self._client, StreamHeader.model_validate(streams[data_source]))

    def _describe(self, experiment: str, run: int | None) -> dict[str, Any]:
        if self._folder is None:
            assert self._client is not None
            answer: dict[str, Any] = self._client.connection.ask_json(
                wire.OpenRun(id=0, experiment=experiment, run=run)
            )
            return answer
        folder = self._folder
        return {
            "header": folder.header.model_dump(mode="json"),
            "state": state_of(folder).value,
            "folder": str(folder.path.absolute()),
            "streams": {n: folder.stream_header(n).model_dump(mode="json") for n in folder.data_sources()},
        }

    def __repr__(self) -> str:
        # Asks nobody: a repr must not wait for a service.
        return f"<Run {self.name} {'through ' + self._client.address if self._client else 'in ' + str(self.folder)}>"


def open_run(target: str | Path, *, service: str | None = None, root: str | Path | None = None) -> Run:
    """Open a run, live or finished.

    Parameters
    ----------
    target : ``experiment/number``; ``tcp://host:port/experiment/number``; the path of a run folder, or its URL,
        such as ``s3://bucket/lyso-2026/17``.
    service : address of the service to ask; by default the one on this machine, if it runs.
    root : data folder (or its URL) to look in when no service answers.

    Raises
    ------
    RunNotFound, ServiceUnavailable, BadName
    """
    text = str(target)
    if text.startswith("tcp://"):
        address, _, key = text.removeprefix("tcp://").partition("/")
        return _through_service(f"tcp://{address}", key)
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1
    if is_path or (service is None and (to_path(target) / "run.json").exists()):
        return Run("", 0, None, to_path(target))
    experiment, number = parse_run_key(text)
    if service is not None:
        return _through_service(service, text)
    if is_reachable(DEFAULT_ADDRESS) and root is None:
        return _through_service(DEFAULT_ADDRESS, text)
    folder = to_path(root or "nearline-data") / experiment / str(number)
    if is_local(folder) and not (folder / "run.json").exists():
        raise RunNotFound(
            f"no run {text}: no service answers at {DEFAULT_ADDRESS}, and {folder} is not a run folder; "
            "start `nearline serve`, or give the folder's path"
        )
    return Run(experiment, number, None, folder)


def _through_service(address: str, key: str) -> Run:
    experiment, number = parse_run_key(key)
    return Run(experiment, number, Client(address), None)


def _utc(ns: int) -> datetime:
    return datetime.fromtimestamp(ns / 1e9, UTC)
