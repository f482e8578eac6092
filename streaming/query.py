"""Choosing frames by an SQL condition over everything known of them, now or as they come.

`streaming.known_frames` brings the columns together, `streaming.condition` judges them; both in this process. Frames
themselves are read only when asked for.
"""

import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from storage.errors import BadQuery
from streaming.condition import Condition
from streaming.known_frames import Column, KnownFrames, Reference, Results, find_results, parse_reference

if TYPE_CHECKING:
    import zarr

    from streaming.retrieval import Frame, Stream

__all__ = ["Selection", "follow_matches", "select"]

# How often to look whether a processing has begun: no one announces a new data source.
_LOOK_FOR_PROCESSING_S = 0.5
# A wait that another thread may end looks so often whether it has.
_LOOK_AT_STOP_S = 0.2


class Selection:
    """The frames for which a condition was true when it was asked; ``indices`` are theirs, rising, int64.

    Rows have been read, frames have not: iterate, index, or take the `array`.
    """

    def __init__(
        self, stream: "Stream", condition: str, known: KnownFrames, positions: np.ndarray, wanted: dict[str, Column]
    ) -> None:
        self.condition = condition
        self.indices: np.ndarray = known.frame_index[positions]
        self.n_considered = len(known.frame_index)
        self._stream, self._known, self._positions, self._wanted = stream, known, positions, wanted

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator["Frame"]:
        """The frames, in index order; neighbours are read together."""
        return self._stream.frames_at(self.indices)

    def __getitem__(self, position: int) -> "Frame":
        """The frame at a position of the selection; negative numbers count from its end."""
        return self._stream[int(self.indices[position])]

    @cached_property
    def table(self) -> pa.Table:
        """A row for each selected frame: ``frame_index`` and the columns asked for."""
        columns = self._known.load(self._wanted.values())
        arrays = {"frame_index": pa.array(self.indices)}
        arrays |= {name: columns[column].take(pa.array(self._positions)) for name, column in self._wanted.items()}
        return pa.table(arrays)

    @property
    def array(self) -> "zarr.Array":
        """The selected frames' pixels as a lazy Zarr array, (selected, slow, fast)."""
        # Zarr takes half a second to import: only those who want an array pay.
        from storage.array_view import open_view

        blob_of = self._stream.read_blob
        return open_view(
            self._stream.header, 0, len(self), lambda position, part: blob_of(int(self.indices[position]), part)
        )

    def __repr__(self) -> str:
        return f"<Selection of {self._stream.name}: {len(self)} of {self.n_considered} frames, {self.condition!r}>"


def select(
    stream: "Stream",
    condition: str,
    columns: Iterable[str] | None = None,
    processing: str | None = None,
    time_limit_s: float = 30.0,
) -> Selection:
    """The frames stored now for which a condition is true; `Stream.where` explains the parameters."""
    judge = Condition(condition)
    try:
        known = KnownFrames(stream, 0, stream.status.announced, find_results(stream, processing))
        names = _columns_of(judge, known)
        if columns is None:
            wanted = {".".join(ref): column for ref, column in names.items()}
        else:
            asked = [columns] if isinstance(columns, str) else columns
            wanted = {name: known.find(parse_reference(name)) for name in asked}
        return Selection(stream, condition, known, _judged(judge, known, names, time_limit_s), wanted)
    finally:
        judge.close()


def follow_matches(
    stream: "Stream",
    condition: str,
    processing: str | None = None,
    start: int = 0,
    timeout: float | None = None,
    stop: threading.Event | None = None,
    time_limit_s: float = 30.0,
) -> Iterator["Frame"]:
    """Matching frames as they come; `Stream.where` explains when a frame is decided."""
    # Read at once, so that a bad one is an error where it was written, not where the loop begins.
    return _follow(stream, Condition(condition), processing, start, _Patience(timeout, stop), time_limit_s)


@dataclass(frozen=True)
class _Patience:
    """How long to wait for what comes next, and who may end it."""

    timeout: float | None
    stop: threading.Event | None

    @property
    def is_over(self) -> bool:
        return self.stop is not None and self.stop.is_set()

    def slices(self) -> Iterator[float | None]:
        """Times to wait one after the other: the whole of it, unless someone may end it meanwhile."""
        if self.stop is None:
            yield self.timeout
            return
        deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout
        yield max(min(_LOOK_AT_STOP_S, deadline - time.monotonic()), 0.0)
        while (left := deadline - time.monotonic()) > 0 and not self.is_over:
            yield min(_LOOK_AT_STOP_S, left)


def _follow(
    stream: "Stream",
    judge: Condition,
    processing: str | None,
    start: int,
    patience: _Patience,
    time_limit_s: float,
) -> Iterator["Frame"]:
    try:
        prepared = _prepare(stream, judge, processing, patience)
        if prepared is None:
            return
        names, results = prepared
        uses_results = any(column.prefix == "results" for column in names.values())
        at = max(start, 0)
        for until in _frontiers(stream, results if uses_results else None, at, patience):
            known = KnownFrames(stream, at, until, results)
            for frame in stream.frames_at(known.frame_index[_judged(judge, known, names, time_limit_s)]):
                if patience.is_over:
                    return
                yield frame
            at = until
    finally:
        judge.close()


def _columns_of(condition: Condition, known: KnownFrames, *, may_come: bool = False) -> dict[Reference, Column]:
    try:
        return {ref: known.find(ref, may_come=may_come) for ref in condition.columns}
    except BadQuery as error:
        raise condition.refused(str(error)) from None


def _judged(
    condition: Condition, known: KnownFrames, names: Mapping[Reference, Column], time_limit_s: float
) -> np.ndarray:
    """Positions in ``known.frame_index`` of the frames for which a condition is true."""
    columns = known.load(names.values())
    numbered = {column: f"c{number}" for number, column in enumerate(dict.fromkeys(names.values()))}
    table = pa.table({"i": pa.array(known.frame_index)} | {name: columns[c] for c, name in numbered.items()})
    return condition.matches(table, {ref: numbered[c] for ref, c in names.items()}, time_limit_s=time_limit_s)


def _prepare(
    stream: "Stream", judge: Condition, processing: str | None, patience: _Patience
) -> tuple[dict[Reference, Column], Results | None] | None:
    """The columns that a condition means, once they can be told; None if the time-out comes before.

    Raises
    ------
    BadQuery : a name that nothing has, and that nothing will bring which has begun.
    """
    deadline = math.inf if patience.timeout is None else time.monotonic() + patience.timeout
    asks_results = processing is not None or any(len(r) == 2 and r[0].lower() == "results" for r in judge.columns)
    while True:
        left = max(deadline - time.monotonic(), 0.0)
        results = _results_so_far(stream, processing)
        if results is None and asks_results:
            if left == 0.0 or patience.is_over:
                return None
            if not stream.is_live:
                raise judge.refused(f"asks for results, but {stream.name} was not processed; use `nearline process`")
            time.sleep(min(left, _LOOK_FOR_PROCESSING_S))
            continue
        known = KnownFrames(stream, 0, stream.status.announced, results)
        try:
            return _columns_of(judge, known, may_come=True), results
        except BadQuery:
            sources = [stream, *([results.stream] if results is not None and results.stream is not None else [])]
            # A stream without frames is empty, and so false: ask for None by name.
            awaited = next((source for source in sources if _has_just_begun(source)), None)
            if awaited is None:
                raise
        rest = _Patience(None if left == math.inf else left, patience.stop)
        if _newest(awaited, -1, rest) is None and awaited.is_live:
            return None


def _results_so_far(stream: "Stream", processing: str | None) -> Results | None:
    try:
        return find_results(stream, processing)
    except BadQuery:  # it may come
        return None


def _has_just_begun(stream: "Stream") -> bool:
    """Whether its first frame is still to come, and with it the names of its columns."""
    return stream.is_live and stream.latest() is None


def _frontiers(stream: "Stream", results: Results | None, at: int, patience: _Patience) -> Iterator[int]:
    """Rising indices below which every frame can be decided."""
    if results is None:
        while (watermark := _watermark(stream, at, patience)) > at:
            at = watermark
            yield at
    elif results.stream is None:
        yield stream.status.announced
    else:
        # Results come in index order: all frames up to the newest row have been processed.
        while (newest := _newest(results.stream, at - 1, patience)) is not None:
            at = newest + 1
            yield at


def _watermark(stream: "Stream", above: int, patience: _Patience) -> int:
    """The watermark once it exceeds ``above``, or nothing more is to be waited for."""
    for slice_s in patience.slices():
        status = stream.source.wait(above, slice_s)
        if status.watermark > above or status.is_terminal:
            break
    return status.watermark


def _newest(stream: "Stream", after: int, patience: _Patience) -> int | None:
    """The newest frame's index once it exceeds ``after``; None if nothing more is to be waited for."""
    for slice_s in patience.slices():
        # Asked before: what came in between must not be taken for nothing.
        may_come = patience.stop is None or stream.is_live
        raw = stream.source.latest(after, slice_s)
        if raw is not None:
            return raw.info.frame_index
        if not may_come:
            break
    return None
