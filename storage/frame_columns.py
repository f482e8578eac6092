"""Columns of many frames at once: from sealed chunks' Parquet files, and from rows in memory.

A column has one type over a whole stream, although each chunk chose its own: whole numbers and
others become floating point, anything else that is mixed becomes text. What a chunk keeps in its JSON only,
because the values were mixed there, is found as well.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.files import readable
from storage.frame import FrameInfo

__all__ = ["FIXED_COLUMNS", "META", "PREFIXES", "RESERVED_NAMES", "FrameRows", "gather_rows", "typed_array", "unified"]

META = "meta"
# What every frame has, whatever its source.
FIXED_COLUMNS: dict[str, pa.DataType] = {
    "frame_index": pa.int64(),
    "size_bytes": pa.int64(),
    "crc32c": pa.uint32(),
    "digest": pa.binary(),
    "received_ns": pa.int64(),
    "start_tick": pa.int64(),
    "stop_tick": pa.int64(),
    "tick_rate": pa.int64(),
    "utc_ns": pa.int64(),
    "utc_source": pa.string(),
    "utc_uncertainty_ns": pa.int64(),
    "series_id": pa.int64(),
    "series_unique_id": pa.string(),
    "series_frame": pa.int64(),
    "trigger_index": pa.int64(),
    "producer": pa.string(),
    "sequence": pa.int64(),
    "part": pa.int64(),
    "late": pa.bool_(),
}
PREFIXES = ("frame", "meta", "results", "annotation")
# Names that a condition reads as something else already; `streaming.query` computes the last three.
RESERVED_NAMES = frozenset((*FIXED_COLUMNS, *PREFIXES, META, "utc", "received", "n_parts"))
_DEFAULTS: dict[str, Any] = {"part": 0, "late": False}


class _Piece(Protocol):
    """Some rows of a stream, in index order."""

    def metadata_names(self) -> Iterable[str]:
        """Keys of the metadata that are columns, as far as can be told at a glance."""
        ...

    def has_metadata(self, name: str) -> bool:
        """Whether any frame has a number, text, true or false under this key; looks at each of them."""
        ...

    def columns(self, names: Sequence[str]) -> dict[str, pa.Array | pa.ChunkedArray]:
        """Columns by name: of `FIXED_COLUMNS`, `META` for all metadata as JSON, or a key of the metadata."""
        ...


class _Sealed:
    """The rows ``start <= frame_index < stop`` of a sealed chunk's frame table.

    No file stays open: a run can have ten thousand of them.
    """

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self._path, self._start, self._stop = path, start, stop

    def metadata_names(self) -> Iterable[str]:
        return set(pq.read_schema(readable(self._path)).names) - FIXED_COLUMNS.keys() - {META}

    def has_metadata(self, name: str) -> bool:
        with pq.ParquetFile(readable(self._path)) as file:
            texts = file.read([META])[META]
        return any(map(_is_scalar, _values_in(texts, name)))

    def columns(self, names: Sequence[str]) -> dict[str, pa.Array | pa.ChunkedArray]:
        with pq.ParquetFile(readable(self._path)) as file:
            there = set(file.schema_arrow.names)
            needs_json = any(name not in there and name not in FIXED_COLUMNS for name in names)
            wanted = {"frame_index", *there.intersection(names), *([META] if needs_json else [])}
            table = file.read(sorted(wanted))
        index = table["frame_index"]
        table = table.filter(pc.and_(pc.greater_equal(index, self._start), pc.less(index, self._stop)))
        found: dict[str, pa.Array | pa.ChunkedArray] = {}
        for name in names:
            if name in there:
                found[name] = table[name]
            elif name in FIXED_COLUMNS:
                found[name] = pa.repeat(pa.scalar(_DEFAULTS[name], FIXED_COLUMNS[name]), len(table))
            else:
                found[name] = typed_array(_values_in(table[META], name))
        return found


class _Open:
    """Rows in memory, of chunks that are not sealed, or from where no files can be seen."""

    def __init__(self, infos: list[FrameInfo]) -> None:
        self._infos = infos

    @cached_property
    def _metas(self) -> list[dict[str, Any]]:
        return [info.meta for info in self._infos]

    def metadata_names(self) -> Iterable[str]:
        keys = {key for meta in self._metas for key, value in meta.items() if _is_scalar(value)}
        return keys - FIXED_COLUMNS.keys() - {META}

    def has_metadata(self, name: str) -> bool:
        return any(_is_scalar(meta.get(name)) for meta in self._metas)

    def columns(self, names: Sequence[str]) -> dict[str, pa.Array | pa.ChunkedArray]:
        return {name: self._column(name) for name in names}

    def _column(self, name: str) -> pa.Array:
        if name in FIXED_COLUMNS:
            return pa.array([getattr(info, name) for info in self._infos], FIXED_COLUMNS[name])
        if name == META:
            return pa.array([info.meta_json or b"{}" for info in self._infos], pa.string())
        return typed_array([meta.get(name) for meta in self._metas])


class FrameRows:
    """Rows of a stream as they were when this was made; columns are read when asked for."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self._pieces = pieces

    @cached_property
    def metadata_names(self) -> list[str]:
        """Keys of the metadata that can be columns, sorted."""
        return sorted(set().union(*(piece.metadata_names() for piece in self._pieces)))

    def has_metadata(self, name: str) -> bool:
        """Whether any frame has a value that is not nested under this key, `metadata_names` telling of it or not."""
        return name not in FIXED_COLUMNS and name != META and any(piece.has_metadata(name) for piece in self._pieces)

    def columns(self, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Columns by name, each of one type over all rows.

        Parameters
        ----------
        names : of `FIXED_COLUMNS`, `META` for all metadata as JSON text, or keys of the metadata: null where
            a frame does not have the key or has no number, JSON text where the value is nested.
        """
        parts = [piece.columns(names) for piece in self._pieces]
        return {name: unified([part[name] for part in parts], _type_of(name)) for name in names}


def gather_rows(
    start: int,
    stop: int,
    frames_per_chunk: int,
    read_infos: Callable[[int, int], Iterator[FrameInfo]],
    sealed: dict[int, Path] | None = None,
) -> FrameRows:
    """The rows ``start <= frame_index < stop`` there are now.

    Parameters
    ----------
    read_infos : (start, stop) → rows in index order, for what has no file.
    sealed : chunk number → frame table of that chunk.
    """
    files = sealed or {}
    pieces: list[_Piece] = []
    numbers = range(start // frames_per_chunk, -(-stop // frames_per_chunk))

    for in_file, group in itertools.groupby(numbers, files.__contains__):
        chunks = list(group)
        if in_file:
            pieces += [_Sealed(files[number], start, stop) for number in chunks]
        else:
            first, last = chunks[0] * frames_per_chunk, (chunks[-1] + 1) * frames_per_chunk
            pieces.append(_Open(list(read_infos(max(first, start), min(last, stop)))))
    return FrameRows(pieces)


def typed_array(values: list[Any]) -> pa.Array:
    """JSON values as one array: of booleans, numbers or text; mixed or nested ones as text, as JSON writes them."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return pa.nulls(len(values))
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {int, float}:
        return _numbers(values, pa.int64() if kinds == {int} else pa.float64())
    return pa.array([None if value is None else _text(value) for value in values], pa.string())


def unified(arrays: Sequence[pa.Array | pa.ChunkedArray], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    """Pieces of one column as one, of one type: that given, or the narrowest of ours that holds them all."""
    target = kind or _common_type({array.type for array in arrays if not pa.types.is_null(array.type)})
    chunks = [piece for array in arrays for piece in (array.chunks if isinstance(array, pa.ChunkedArray) else [array])]
    return pa.chunked_array([_cast(chunk, target) for chunk in chunks], target)


def _values_in(texts: pa.ChunkedArray, key: str) -> list[Any]:
    """A key's value in each JSON text.

    Mixed values and those of very many keys are there only; most chunks do not have the key at all.
    """
    if key.isascii() and not pc.any(pc.match_substring(texts, json.dumps(key))).as_py():
        return [None] * len(texts)
    return [json.loads(text).get(key) for text in texts.to_pylist()]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _numbers(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, OverflowError):  # whole numbers beyond 64 bits, or beyond 53 beside others
        return pa.array([None if value is None else _rounded(value) for value in values], pa.float64())


def _rounded(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _type_of(name: str) -> pa.DataType | None:
    return pa.string() if name == META else FIXED_COLUMNS.get(name)


def _common_type(found: set[pa.DataType]) -> pa.DataType:
    if not found:
        return pa.null()
    if len(found) == 1:
        only = next(iter(found))
        return pa.float64() if pa.types.is_floating(only) else only
    if all(pa.types.is_integer(t) for t in found):
        return pa.int64()
    if all(pa.types.is_integer(t) or pa.types.is_floating(t) for t in found):
        return pa.float64()
    return pa.string()


def _cast(array: pa.Array, target: pa.DataType) -> pa.Array:
    if pa.types.is_string(target) and not pa.types.is_string(array.type):
        return pa.array([None if value is None else _text(value) for value in array.to_pylist()], target)
    # A whole number beyond 53 bits beside others is rounded, as everywhere where numbers are floating.
    cast = array.cast(target, safe=False)
    # Not-a-number is "no value": SQL would call it larger than every number.
    return pc.if_else(pc.is_nan(cast), None, cast) if pa.types.is_floating(target) else cast


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
