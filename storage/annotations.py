"""Annotations: facts about frames that come late, such as laser on or off, a delay, a position on the chip.

Each batch is one immutable file, ``annotations/000001.json`` in the run's folder: who said it,
when, of which data source, and columns of values for frames or for stretches of time. Of
several values for the same frame and name the later batch wins; the earlier ones stay as history.
"""

import csv
import getpass
import io
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
import pyarrow as pa

from storage.errors import BadAnnotation
from storage.files import publish
from storage.frame_columns import RESERVED_NAMES, typed_array
from storage.names import check_name

__all__ = [
    "AnnotationBatch",
    "AnnotationStore",
    "Annotations",
    "FolderAnnotations",
    "Scalar",
    "Statement",
    "accept_batch",
    "batch_from_csv",
    "make_batch",
]

Scalar = bool | int | float | str | None
Key = Literal["frame_index", "utc_ns"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_MOST_NAMES = 200
_MOST_VALUES = 1_000_000
_MOST_BYTES = 64 << 20
_LONGEST_TEXT = 1000
# A batch that is sent again is looked for among so many of the newest.
_LOOK_BACK = 16
_EARLIEST, _LATEST = -(2**63), 2**63 - 1
_Int64 = Annotated[int, msgspec.Meta(ge=_EARLIEST, le=_LATEST)]


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """Values of one name: ``values[i]`` holds for ``starts[i] <= key < stops[i]``.

    ``stops`` left out means single frames. A value of None takes back what was said before.
    """

    name: str
    starts: list[_Int64]
    values: list[bool | int | float | str | None]
    stops: list[_Int64] | None = None


class AnnotationBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody said at one time; ``data_source`` None means every data source of the run.

    ``key`` says what starts and stops count: frame indices, or UTC in ns since 1970.
    """

    at: datetime
    by: str
    key: Key
    statements: list[Statement]
    data_source: str | None = None
    version: int = 1

    def encode(self) -> bytes:
        """As it is kept: one JSON object.

        Raises
        ------
        BadAnnotation : larger than 64 MiB.
        """
        content = msgspec.json.encode(self)
        if len(content) > _MOST_BYTES:
            raise BadAnnotation(f"annotations of {len(content)} bytes are more than {_MOST_BYTES}; send them in parts")
        return content


class AnnotationStore(Protocol):
    """Where the batches of a run are kept."""

    def append(self, batch: bytes) -> int:
        """Keep one batch for good; its number, counted from 1."""
        ...

    def read_all(self, after: int = 0) -> list[tuple[int, bytes]]:
        """All batches with a number above ``after``, in order, each with its number."""
        ...


class FolderAnnotations:
    """Annotations in a run's folder: one numbered file a batch, none ever replaced."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "annotations"

    def append(self, batch: bytes) -> int:
        files = self._files()
        for number, path in files[-_LOOK_BACK:]:
            # Sent twice, since the first answer was lost: who and when are part of it.
            if path.stat().st_size == len(batch) and path.read_bytes() == batch:
                return number
        number = 1 + max((number for number, _ in files), default=0)
        while not publish(self._folder / f"{number:06d}.json", batch):
            number += 1
        return number

    def read_all(self, after: int = 0) -> list[tuple[int, bytes]]:
        return [(number, path.read_bytes()) for number, path in self._files() if number > after]

    def numbers(self, after: int = 0) -> list[int]:
        """Which batches there are with a number above ``after``, in order."""
        return [number for number, _ in self._files() if number > after]

    def read(self, number: int) -> bytes:
        """One of them."""
        return (self._folder / f"{number:06d}.json").read_bytes()

    def _files(self) -> list[tuple[int, Path]]:
        return sorted((int(p.stem), p) for p in self._folder.glob("[0-9]*.json") if p.stem.isdecimal())


class Annotations:
    """The annotations of a run as they were when this was made."""

    def __init__(self, store: AnnotationStore, batches: Sequence[tuple[int, AnnotationBatch]] = ()) -> None:
        self._store, self._batches = store, list(batches)

    def refreshed(self) -> "Annotations":
        """With the batches that have come since.

        Raises
        ------
        BadAnnotation : a batch is damaged; the message names it.
        """
        after = self._batches[-1][0] if self._batches else 0
        new = [(number, _read(number, content)) for number, content in self._store.read_all(after)]
        return Annotations(self._store, [*self._batches, *new])

    def add(self, batch: AnnotationBatch) -> int:
        """Keep a batch; its number.

        Raises
        ------
        BadAnnotation : a name has values of another kind already, or is spelt otherwise.
        """
        kinds = self.refreshed()._kinds()
        spelling = {name.lower(): name for name in kinds}
        for statement in batch.statements:
            known = spelling.get(statement.name.lower(), statement.name)
            if known != statement.name:
                raise BadAnnotation(f"this run knows {known!r}, not {statement.name!r}; use the same spelling")
            mixed = kinds.get(known, set()) | _kinds_of(statement.values)
            if len(mixed) > 1:
                raise BadAnnotation(
                    f"{known!r} would be {' and '.join(sorted(mixed))} in one run; give values of one kind, "
                    "or use another name"
                )
        return self._store.append(batch.encode())

    def names(self, data_sources: Sequence[str] | None = None) -> list[str]:
        """Names there are, sorted; only those that concern these data sources."""
        return sorted({s.name for _, batch in self._of(data_sources) for s in batch.statements})

    def column(
        self, name: str, data_sources: Sequence[str], frame_index: np.ndarray, utc_ns: np.ndarray | None = None
    ) -> pa.Array:
        """The values of one name for these frames, null where nothing was said.

        Parameters
        ----------
        frame_index : (n,) int64, rising.
        utc_ns : (n,) int64, when each of them was taken; needed where `needs_times`.
        """
        values = np.full(len(frame_index), None, object)
        by_time = np.argsort(utc_ns, kind="stable") if utc_ns is not None else None
        for _, batch in self._of(data_sources):
            for statement in batch.statements:
                if statement.name == name and batch.key == "frame_index":
                    _state(values, frame_index, None, statement)
                elif statement.name == name and utc_ns is not None and by_time is not None:
                    _state(values, utc_ns[by_time], by_time, statement)
        return typed_array(values.tolist())

    def needs_times(self, name: str, data_sources: Sequence[str]) -> bool:
        """Whether any value of this name is given by time."""
        batches = [batch for _, batch in self._of(data_sources) if batch.key == "utc_ns"]
        return any(statement.name == name for batch in batches for statement in batch.statements)

    def table(self) -> pa.Table:
        """The whole history, a row for each value: batch, at, by, data_source, name, frames or times, value as JSON."""
        rows = [row for number, batch in self._batches for row in _history(number, batch)]
        return pa.Table.from_pylist(rows, schema=_HISTORY)

    def _of(self, data_sources: Sequence[str] | None) -> Iterator[tuple[int, AnnotationBatch]]:
        for number, batch in self._batches:
            if data_sources is None or batch.data_source is None or batch.data_source in data_sources:
                yield number, batch

    def _kinds(self) -> dict[str, set[str]]:
        kinds: dict[str, set[str]] = {}
        for _, batch in self._batches:
            for statement in batch.statements:
                kinds[statement.name] = kinds.get(statement.name, set()) | _kinds_of(statement.values)
        return kinds


# ---- making batches -----------------------------------------------------------------------------


def make_batch(
    values: Mapping[str, Any],
    *,
    frames: Any = None,
    start: int | None = None,
    stop: int | None = None,
    from_time: datetime | str | None = None,
    to_time: datetime | str | None = None,
    data_source: str | None = None,
    by: str | None = None,
) -> AnnotationBatch:
    """A batch that says the same of a range of frames or of time, or something of each frame listed.

    Parameters
    ----------
    values : name → value; with a list of ``frames`` also name → one value for each of them. None
        takes back what was said before.
    frames : a frame index, a slice or range of step 1, or a list of indices.
    start, stop : ``start <= frame_index < stop``; one of them may be left out.
    from_time, to_time : ``from_time <= time of the frame < to_time``, with a time zone; one of them may be left out.
    data_source : whose frame indices these are; None for all data sources of the run.
    by : who says so; by default the user of this program.

    Raises
    ------
    BadAnnotation : names, values, frames or times that cannot be kept; the message says which.
    """
    ways = [frames is not None, (start, stop) != (None, None), (from_time, to_time) != (None, None)]
    if sum(ways) != 1:
        raise BadAnnotation(
            "say what is annotated in one way: frames=…, or start=… and stop=…, or from_time=… and to_time=…"
        )
    if not values:
        raise BadAnnotation("nothing is said: give at least one name and its value, such as laser=True")
    if ways[2]:
        where = _Where([_time(from_time, _EARLIEST)], [_time(to_time, _LATEST)])
    else:
        where = _frames(frames, start, stop)
    statements = [_statement(name, value, where) for name, value in values.items()]
    return _batch("utc_ns" if ways[2] else "frame_index", statements, data_source, by)


def batch_from_csv(text: str, *, data_source: str | None = None, by: str | None = None) -> AnnotationBatch:
    """A batch from a table with a header line.

    Its key is a column ``frame_index``, or ``start`` and ``stop`` (frames), or ``from`` and ``to`` (times).
    Every other column is a name; an empty cell says nothing.

    Raises
    ------
    BadAnnotation : the message names the line.
    """
    rows = _csv_rows(text)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    keys = next((keys for keys in _CSV_KEYS if set(keys) <= set(header)), None)
    if keys is None:
        raise BadAnnotation(
            f"a table with the columns {', '.join(header)[:200] or 'of nothing'} says nothing of frames; it needs a "
            "column frame_index, or start and stop, or from and to (times), in its first line"
        )
    if len(set(header)) < len(header):
        raise BadAnnotation(f"two columns of the table have one name: {', '.join(header)[:200]}; name each once")
    starts: list[int] = []
    stops: list[int] = []
    cells: dict[str, list[str]] = {name: [] for name in header if name not in keys}
    for line, row in rows:
        if len(row) != len(header):
            raise BadAnnotation(f"line {line} has {len(row)} cells for {len(header)} columns; correct it")
        by_name = dict(zip(header, (cell.strip() for cell in row), strict=True))
        starts.append(_csv_key(by_name[keys[0]], keys[0], line))
        stops.append(_csv_key(by_name[keys[-1]], keys[-1], line))
        for name, column in cells.items():
            column.append(by_name[name])
    where = _Where(starts, None if len(keys) == 1 else stops)
    statements = [_csv_statement(name, column, where) for name, column in cells.items()]
    said = [statement for statement in statements if statement.values]
    if not said:
        raise BadAnnotation("the table says nothing: it has no values beside its key columns; fill in at least one")
    return _batch("utc_ns" if keys[0] == "from" else "frame_index", said, data_source, by)


@dataclass(frozen=True)
class _Where:
    """What the values of a batch are about; without stops single frames."""

    starts: list[int]
    stops: list[int] | None

    def __post_init__(self) -> None:
        if len(self.starts) > _MOST_VALUES:
            raise BadAnnotation(f"{len(self.starts)} frames or ranges are more than {_MOST_VALUES}; send them in parts")
        for start, stop in zip(self.starts, self.stops or [], strict=False):
            if start >= stop:
                raise BadAnnotation(f"from {start} to {stop} is empty; the end is not included and must be larger")

    def only(self, which: list[int]) -> "_Where":
        return _Where([self.starts[i] for i in which], None if self.stops is None else [self.stops[i] for i in which])


_CSV_KEYS = (("frame_index",), ("start", "stop"), ("from", "to"))


def accept_batch(content: bytes) -> AnnotationBatch:
    """A batch that somebody else has encoded, held to the rules of `make_batch`.

    Raises
    ------
    BadAnnotation : the message says what is wrong with it.
    """
    if len(content) > _MOST_BYTES:
        raise BadAnnotation(f"annotations of {len(content)} bytes are more than {_MOST_BYTES}; send them in parts")
    try:
        batch = _decode(content)
    except ValueError as error:
        raise BadAnnotation(f"these bytes are no batch of annotations: {error}; make one with make_batch") from None
    statements = [_checked(s.name, s.values, _Where(s.starts, s.stops)) for s in batch.statements]
    _check_batch(statements, batch.data_source, batch.by)
    return batch


def _batch(key: Key, statements: list[Statement], data_source: str | None, by: str | None) -> AnnotationBatch:
    who = by if by is not None else _this_user()
    _check_batch(statements, data_source, who)
    return AnnotationBatch(at=datetime.now(UTC), by=who, key=key, statements=statements, data_source=data_source)


def _check_batch(statements: list[Statement], data_source: str | None, who: str) -> None:
    if data_source is not None:
        check_name(data_source, "data source")
    if len(statements) > _MOST_NAMES:
        raise BadAnnotation(f"{len(statements)} names in one batch are more than {_MOST_NAMES}; send them in parts")
    if not who or len(who) > _LONGEST_TEXT:
        raise BadAnnotation(f"by={who[:50]!r} does not say who annotates; give at most {_LONGEST_TEXT} characters")


def _this_user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def _statement(name: str, value: Any, where: _Where) -> Statement:
    given = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(given, list | tuple):
        if where.stops is not None or len(given) != len(where.starts):
            raise BadAnnotation(
                f"{name} has {len(given)} values for {len(where.starts)} frames or ranges; "
                "give one value, or a list of frames and one value for each"
            )
        values = list(given)
    else:
        values = [given] * len(where.starts)
    return _checked(name, values, where)


def _checked(name: str, values: list[Any], where: _Where) -> Statement:
    check_annotation_name(name)
    for value in values:
        _check_value(name, value)
    if len(kinds := _kinds_of(values)) > 1:
        raise BadAnnotation(f"{name!r} would be {' and '.join(sorted(kinds))}; give values of one kind")
    return Statement(name, where.starts, values, where.stops)


def check_annotation_name(name: str) -> str:
    """Return a name that a condition can use as it is; BadAnnotation otherwise."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadAnnotation(
            f"{str(name)[:70]!r} cannot name an annotation; use letters, digits and _, not beginning with a digit, "
            "at most 63 of them"
        )
    if name.lower() in RESERVED_NAMES:
        raise BadAnnotation(f"{name!r} is a column of the frame table, or a prefix; choose another name")
    return name


def _check_value(name: str, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int) and _EARLIEST <= value <= _LATEST:
        return
    if isinstance(value, float) and math.isfinite(value):
        return
    if isinstance(value, str) and len(value) <= _LONGEST_TEXT:
        return
    raise BadAnnotation(
        f"{name} = {str(value)[:50]!r} ({type(value).__name__}) cannot be kept; give true or false, a finite number of "
        f"at most 64 bits, text of at most {_LONGEST_TEXT} characters, or None"
    )


def _frames(frames: Any, start: int | None, stop: int | None) -> _Where:
    if isinstance(frames, slice | range):
        if frames.step not in (None, 1):
            raise BadAnnotation(f"frames={frames} goes in steps of {frames.step}; give a list of frames instead")
        start, stop, frames = frames.start, frames.stop, None
    if frames is None:
        return _Where([_index(0 if start is None else start)], [_LATEST if stop is None else _index(stop)])
    listed = [frames] if isinstance(frames, int | np.integer) else list(frames)
    if not listed:
        raise BadAnnotation("an empty list of frames says nothing; give at least one")
    return _Where([_index(index) for index in listed], None)


def _index(index: Any) -> int:
    if isinstance(index, np.integer):
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= _LATEST:
        raise BadAnnotation(f"{str(index)[:40]!r} is not a frame index; give a whole number from 0")
    return index


def _time(time: datetime | str | None, otherwise: int) -> int:
    """UTC in ns since 1970."""
    if time is None:
        return otherwise
    if isinstance(time, str):
        text = time.strip()
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise BadAnnotation(f"{text[:40]!r} is not a time; write it like 2026-11-03T14:05:00+01:00") from None
    if not isinstance(time, datetime) or time.tzinfo is None:
        raise BadAnnotation(f"the time {time} has no time zone; write it like 2026-11-03T14:05:00+01:00, or with Z")
    since = time - datetime(1970, 1, 1, tzinfo=UTC)
    ns = (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000
    if not _EARLIEST < ns < _LATEST:
        raise BadAnnotation(f"the time {time} is not between the years 1678 and 2262; leave an open end out")
    return ns


def _csv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(io.StringIO(text))
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise BadAnnotation(f"line {rows.line_num} of the table cannot be read: {error}; is it a CSV file?") from None


def _csv_key(cell: str, name: str, line: int) -> int:
    if name in ("from", "to"):
        return _time(cell or None, _EARLIEST if name == "from" else _LATEST)
    if not re.fullmatch(r"\d{1,18}", cell):
        raise BadAnnotation(f"line {line}: {name} is {cell[:40]!r}, not a frame index; give a whole number from 0")
    return int(cell)


def _csv_statement(name: str, cells: list[str], where: _Where) -> Statement:
    """A column as booleans, numbers or text: the first of them that all its cells can be."""
    which = [i for i, cell in enumerate(cells) if cell]
    filled = [cells[i] for i in which]
    values: list[Any] = filled
    if all(cell.lower() in ("true", "false") for cell in filled):
        values = [cell.lower() == "true" for cell in filled]
    elif all(re.fullmatch(r"[+-]?\d{1,18}", cell) for cell in filled):
        values = [int(cell) for cell in filled]
    elif all(_NUMBER.fullmatch(cell) for cell in filled):
        values = [float(cell) for cell in filled]
    return _checked(name, values, where.only(which))


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


# ---- reading them -------------------------------------------------------------------------------


def _read(number: int, content: bytes) -> AnnotationBatch:
    try:
        return _decode(content)
    except ValueError as error:
        raise BadAnnotation(
            f"annotations/{number:06d}.json of the run is damaged: {error}; restore it from a copy, or move it away"
        ) from None


def _decode(content: bytes) -> AnnotationBatch:
    """ValueError, as msgspec's own errors are, where values and frames do not match."""
    batch = msgspec.json.decode(content, type=AnnotationBatch)
    for s in batch.statements:
        if {len(s.values), len(s.starts if s.stops is None else s.stops)} != {len(s.starts)}:
            raise ValueError(f"{s.name[:60]!r} has {len(s.values)} values for {len(s.starts)} frames or ranges")
    return batch


def _state(values: np.ndarray, keys: np.ndarray, order: np.ndarray | None, statement: Statement) -> None:
    """Put a statement's values where its keys say; ``keys`` rise, ``order`` maps them to positions."""
    first = np.searchsorted(keys, np.array(statement.starts, np.int64))
    if statement.stops is None:
        there = first < len(keys)
        there[there] = keys[first[there]] == np.array(statement.starts, np.int64)[there]
        positions = first[there] if order is None else order[first[there]]
        values[positions] = np.array(statement.values, object)[there]
        return
    last = np.searchsorted(keys, np.array(statement.stops, np.int64))
    for start, stop, value in zip(first.tolist(), last.tolist(), statement.values, strict=True):
        if order is None:
            values[start:stop] = value
        else:
            values[order[start:stop]] = value


def _kinds_of(values: Iterable[Any]) -> set[str]:
    return {_KINDS[type(value)] for value in values if value is not None}


def _history(number: int, batch: AnnotationBatch) -> Iterator[dict[str, Any]]:
    names = ("start", "stop") if batch.key == "frame_index" else ("from_time", "to_time")
    told = {"batch": number, "at": batch.at, "by": batch.by, "data_source": batch.data_source}
    for statement in batch.statements:
        stops = [start + 1 for start in statement.starts] if statement.stops is None else statement.stops
        for start, stop, value in zip(statement.starts, stops, statement.values, strict=True):
            limits = (None if start == _EARLIEST else start, None if stop == _LATEST else stop)
            said = {"name": statement.name, "value": json.dumps(value)}
            yield told | said | dict(zip(names, limits, strict=True))


_KINDS: dict[type, str] = {bool: "true or false", int: "numbers", float: "numbers", str: "text"}

_HISTORY = pa.schema(
    [
        ("batch", pa.int64()),
        ("at", pa.timestamp("us", tz="UTC")),
        ("by", pa.string()),
        ("data_source", pa.string()),
        ("name", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("from_time", pa.timestamp("ns", tz="UTC")),
        ("to_time", pa.timestamp("ns", tz="UTC")),
        ("value", pa.string()),
    ]
)
