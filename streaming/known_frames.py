"""All that is known of a range of frames, as columns: frame table, metadata, results of a processing, annotations.

Whatever its origin, a column has one value for each frame, by frame index. Columns are read when
they are first asked for.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.amendments import Amendments
from storage.errors import BadQuery
from storage.frame_columns import FIXED_COLUMNS, META, PREFIXES, FrameRows, gather_rows, unified
from storage.promotion import read_promotion
from storage.step_store import Processing, find_processings

if TYPE_CHECKING:
    from streaming.retrieval import Stream

__all__ = ["FRAME_COLUMNS", "Column", "KnownFrames", "Reference", "Results", "find_results", "parse_reference"]

# A column as a condition names it: ("n_peaks",) or ("results", "n_peaks").
Reference = tuple[str, ...]

_COMPUTED = ("utc", "received", "n_parts")
FRAME_COLUMNS = (*(name for name in FIXED_COLUMNS if name != "part"), *_COMPUTED, META)
# What a frame in parts has of all of them; of the other columns it has its first part's.
_OF_ALL_PARTS = {"size_bytes": np.add, "late": np.logical_or}
_NO_TIME = -(2**63)
_MOST_LISTED = 60


@dataclass(frozen=True)
class Column:
    """A column by the family it belongs to and its exact name."""

    prefix: str
    name: str

    def __str__(self) -> str:
        return self.name if self.prefix == "frame" else f"{self.prefix}.{self.name}"


class KnownFrames:
    """What is known of the frames ``start <= frame_index < stop`` of a stream, at the time this is made."""

    def __init__(self, stream: "Stream", start: int, stop: int, results: "Results | None") -> None:
        self._stream, self._start, self._stop, self.results = stream, start, stop, results
        self._rows = rows_of(stream, start, stop)
        self._result_rows = results.rows(start, stop) if results is not None else None
        self._annotations = stream.run.read_annotations()
        self._loaded: dict[Column, pa.ChunkedArray] = {}

    @cached_property
    def frame_index(self) -> np.ndarray:
        """(n,) int64, rising: the frames there are."""
        return np.unique(self._every_index)

    def names(self, prefix: str) -> list[str]:
        """The columns of one family."""
        if prefix == "frame":
            return list(FRAME_COLUMNS)
        if prefix == "meta":
            return self._rows.metadata_names
        if prefix == "results":
            return [] if self._result_rows is None else self._result_rows.names
        return self._annotations.names(self._lineage)

    def find(self, ref: Reference, *, may_come: bool = False) -> Column:
        """The column that a reference means.

        A name of the frame table means that. Any other is looked for in metadata, results and annotations,
        as written, else without regard to case; where more than one of them has it, it needs its prefix.

        Parameters
        ----------
        may_come : with its prefix, a name is accepted before anything has it.

        Raises
        ------
        BadQuery : there is no such column, or there are several.
        """
        if len(ref) == 2 and ref[0].lower() in PREFIXES:
            prefix = ref[0].lower()
            name = _pick(ref[1], self.names(prefix)) or (ref[1] if may_come and prefix != "frame" else None)
            found = [Column(prefix, name)] if name else []
        elif len(ref) == 1:
            picked = ((prefix, _pick(ref[0], self.names(prefix))) for prefix in PREFIXES)
            found = [Column(prefix, name) for prefix, name in picked if name]
            found = found[:1] if found and found[0].prefix == "frame" else found
        else:
            path = ".".join(ref)[:100]
            raise BadQuery(f"{path!r} is not a column; what is nested in metadata is read like meta->>'$.{path}'")
        # Values that a chunk keeps in its JSON only are looked for last: that takes long.
        if not found and ref[0].lower() in (META, ref[-1].lower()) and self._rows.has_metadata(ref[-1]):
            found = [Column(META, ref[-1])]
        if not found:
            raise BadQuery(self._unknown(ref))
        if len(found) > 1:
            choices = " or ".join(str(column) for column in found)
            raise BadQuery(f"the column {ref[0]!r} is ambiguous in {self._stream.name}; write {choices}")
        return found[0]

    def load(self, columns: Iterable[Column]) -> dict[Column, pa.ChunkedArray]:
        """Columns with one value for each of `frame_index`; null where there is none."""
        missing = [column for column in dict.fromkeys(columns) if column not in self._loaded]
        by_prefix = {prefix: [c.name for c in missing if c.prefix == prefix] for prefix in PREFIXES}
        found = self._load_rows(by_prefix["frame"], by_prefix["meta"])
        if by_prefix["results"]:
            found |= self._load_results(by_prefix["results"])
        for name in by_prefix["annotation"]:
            found[Column("annotation", name)] = self._load_annotation(name)
        self._loaded |= found
        return self._loaded

    # ---- the families -------------------------------------------------------------------------

    @cached_property
    def _every_index(self) -> np.ndarray:
        """The index of every row; a frame in parts has several."""
        return self._rows.columns(["frame_index"])["frame_index"].to_numpy()

    @cached_property
    def _lineage(self) -> list[str]:
        """The data source and those it was made from: their annotations are its own."""
        return [one.name for one in _ancestry(self._stream)]

    @cached_property
    def _utc_ns(self) -> np.ndarray:
        """When each frame was taken, ns since 1970; of a derived stream, when its parent's was."""
        origin = _ancestry(self._stream)[-1]
        rows = self._rows if origin is self._stream else rows_of(origin, self._start, self._stop)
        columns = rows.columns(["frame_index", "utc_ns", "received_ns"])
        times = pc.coalesce(columns["utc_ns"], columns["received_ns"])
        return _aligned(times, columns["frame_index"].to_numpy(), self.frame_index).fill_null(_NO_TIME).to_numpy()

    def _load_rows(self, fixed: list[str], meta: list[str]) -> dict[Column, pa.ChunkedArray]:
        plain = [name for name in fixed if name not in _COMPUTED]
        read = self._rows.columns([*plain, *meta]) if plain or meta else {}
        first = np.searchsorted(self._every_index, self.frame_index)
        is_whole = len(first) == len(self._every_index)
        one_each = {name: column if is_whole else column.take(pa.array(first)) for name, column in read.items()}
        for name in () if is_whole else _OF_ALL_PARTS.keys() & read.keys():
            one_each[name] = pa.chunked_array([_OF_ALL_PARTS[name].reduceat(read[name].to_numpy(), first)])
        found = {Column("frame", name): one_each[name] for name in plain}
        found |= {Column("meta", name): one_each[name] for name in meta}
        if "utc" in fixed:
            found[Column("frame", "utc")] = _timestamps(self._utc_ns)
        if "received" in fixed:
            received = self._rows.columns(["received_ns"])["received_ns"].to_numpy()[first]
            found[Column("frame", "received")] = _timestamps(received)
        if "n_parts" in fixed:
            counts = np.diff(np.append(first, len(self._every_index)))
            found[Column("frame", "n_parts")] = pa.chunked_array([pa.array(counts, pa.int64())])
        return found

    def _load_results(self, names: list[str]) -> dict[Column, pa.ChunkedArray]:
        if self._result_rows is None:
            return {Column("results", name): self._nothing() for name in names}
        index, columns = self._result_rows.load(names)
        return {Column("results", name): _aligned(columns[name], index, self.frame_index) for name in names}

    def _load_annotation(self, name: str) -> pa.ChunkedArray:
        times = self._utc_ns if self._annotations.needs_times(name, self._lineage) else None
        return pa.chunked_array([self._annotations.column(name, self._lineage, self.frame_index, times)])

    def _nothing(self) -> pa.ChunkedArray:
        return pa.chunked_array([pa.nulls(len(self.frame_index))])

    def _unknown(self, ref: Reference) -> str:
        by_prefix = {prefix: self.names(prefix) for prefix in PREFIXES}
        columns = [Column(prefix, name) for prefix, names in by_prefix.items() for name in names]
        near = difflib.get_close_matches(ref[-1].lower(), {column.name.lower() for column in columns}, 3)
        meant = [str(column) for column in columns if column.name.lower() in near]
        hint = f"did you mean {' or '.join(meant)}? " if meant else ""
        there = "; ".join(f"{prefix}: {_listed(names)}" for prefix, names in by_prefix.items())
        whose = f" (results are those of {self.results.processing})" if self.results else ""
        return f"no column {'.'.join(ref)[:100]!r} in {self._stream.name}; {hint}there are {there}{whose}"


# ---- results --------------------------------------------------------------------------------------


class Results:
    """The per-frame results of one processing: a stream while it runs, its tables once it has finished.

    Tables are preferred where the run's folder can be seen: they are whole even if the processing was interrupted
    and taken up after its stream had ended.
    """

    def __init__(self, processing: str, stream: "Stream | None", finished: Processing | None) -> None:
        self.processing, self._finished = processing, finished
        self.stream = stream if finished is None else None

    def rows(self, start: int, stop: int) -> "_ResultRows":
        if self._finished is not None:
            return _ResultRows(self._finished.frames, None)
        assert self.stream is not None
        return _ResultRows(None, rows_of(self.stream, start, stop))


class _ResultRows:
    def __init__(self, table: pa.Table | None, rows: FrameRows | None) -> None:
        self._table, self._rows = table, rows

    @property
    def names(self) -> list[str]:
        if self._table is not None:
            return [name for name in self._table.column_names if name != "frame_index"]
        assert self._rows is not None
        return self._rows.metadata_names

    def load(self, names: list[str]) -> tuple[np.ndarray, dict[str, pa.ChunkedArray]]:
        """Indices, rising, and columns; null where nobody has such a column."""
        if self._rows is not None:
            columns = self._rows.columns(["frame_index", *names])
            return columns.pop("frame_index").to_numpy(), columns
        assert self._table is not None
        table = self._table.sort_by("frame_index")
        nothing = pa.chunked_array([pa.nulls(len(table))])
        found = {name: unified([table[name]]) if name in table.column_names else nothing for name in names}
        return table["frame_index"].to_numpy(), found


def find_results(stream: "Stream", processing: str | None = None) -> Results | None:
    """The results of a processing; by default of the promoted one, else of the newest that has finished or is running.

    A derived stream has those of the processing that made it. None where there are none.

    Raises
    ------
    BadQuery : there is no such processing; the message lists those there are.
    """
    origin = _ancestry(stream)[-1].name
    prefix = f"{origin}.results@"
    streams = {name.removeprefix(prefix): name for name in stream.run.data_sources if name.startswith(prefix)}
    folder = stream.run.visible_folder
    processings = find_processings(folder.path) if folder is not None else {}
    tables = {name: p for name, p in processings.items() if p.manifest.data_source == origin}
    names = sorted({*streams, *tables}, key=lambda name: (len(name), name))
    wanted = processing or stream.header.processing or _promoted(stream, names)
    if processing is not None and processing not in names:
        raise BadQuery(f"no processing {processing!r} of {origin}; there are: {', '.join(names) or 'none yet'}")
    # A canary speaks for a part of the run only: it is asked by name.
    whole = [name for name in names if name not in tables or tables[name].manifest.part is None]
    chosen = whole if wanted is None else [wanted]
    found = [_results(stream, name, streams.get(name), tables.get(name)) for name in chosen]
    usable = [results for results in found if results is not None]
    active = [results for results in usable if results.stream is None or results.stream.is_live]
    return (active or usable)[-1] if usable else None


def _promoted(stream: "Stream", names: list[str]) -> str | None:
    """The processing that somebody made the run's default, if it is one of these."""
    folder = stream.run.visible_folder
    promotion = read_promotion(folder.path) if folder is not None else None
    return promotion.processing if promotion is not None and promotion.processing in names else None


def _results(stream: "Stream", name: str, data_source: str | None, processing: Processing | None) -> Results | None:
    if data_source == stream.name:  # its columns are its own metadata
        return None
    if processing is not None and processing.is_finished and next(processing.chunks(), None) is not None:
        return Results(name, None, processing)
    return Results(name, stream.run[data_source], None) if data_source else None


# ---- rows -----------------------------------------------------------------------------------------


def rows_of(stream: "Stream", start: int, stop: int) -> FrameRows:
    """The rows of a stream; those of sealed chunks from their files where the run's folder can be seen."""
    size, folder = stream.header.frames_per_chunk, stream.run.visible_folder
    sealed = {}
    # Listing the files of a long run takes longer than a few rows.
    if folder is not None and stop - start >= size:
        paths = folder.stream(stream.name)
        # What came late is not in the table of its chunk.
        amended = {info.frame_index // size for info in Amendments(paths.amendments, stream.header.parts).look()}
        sealed = {number: paths.frame_table(number) for number in paths.commits() if number not in amended}
    return gather_rows(start, stop, size, stream.source.infos, sealed)


def _ancestry(stream: "Stream") -> list["Stream"]:
    """The stream, its parent, and so on up to the detector's."""
    found = [stream]
    while found[-1].header.parent is not None and found[-1].header.parent not in {s.name for s in found}:
        found.append(stream.run[found[-1].header.parent])
    return found


def _aligned(values: pa.ChunkedArray, index: np.ndarray, wanted: np.ndarray) -> pa.ChunkedArray:
    """The value of each wanted index; null where there is none. ``index`` rises."""
    if len(index) == len(wanted) and np.array_equal(index, wanted):
        return values
    if not len(index):
        return pa.chunked_array([pa.nulls(len(wanted), values.type)])
    at = np.minimum(np.searchsorted(index, wanted), len(index) - 1)
    return values.take(pa.array(at, mask=index[at] != wanted))


def _timestamps(ns: np.ndarray) -> pa.ChunkedArray:
    """UTC, in the microseconds that SQL counts in; null where nobody knows."""
    times = pa.array(ns // 1000, pa.int64(), mask=ns == _NO_TIME)
    return pa.chunked_array([times.cast(pa.timestamp("us", tz="UTC"))])


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:_MOST_LISTED], *(["…"] if len(names) > _MOST_LISTED else [])]) or "none"


def _pick(name: str, names: Sequence[str]) -> str | None:
    """The name as written, else the only one that differs in case alone."""
    if name in names:
        return name
    similar = [other for other in names if other.lower() == name.lower()]
    return similar[0] if len(similar) == 1 else None


def parse_reference(text: str) -> Reference:
    """A column as people write it: ``n_peaks``, ``results.n_peaks``, ``meta.odd name``."""
    prefix, dot, name = text.partition(".")
    return (prefix, name) if dot and prefix.lower() in PREFIXES else (text,)
