"""The frame table: one Parquet row per frame of a chunk, for people and queries as much as for us."""

import errno
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import CorruptFrame, NearlineError
from storage.files import readable
from storage.frame import FrameInfo
from storage.metadata import NO_META, scalar_columns

__all__ = ["frame_table", "read_frame_table", "read_sendings", "table_bytes"]

_SCHEMA = pa.schema(
    [
        ("frame_index", pa.int64()),
        ("size_bytes", pa.int64()),
        ("crc32c", pa.uint32()),
        ("digest", pa.binary()),
        ("received_ns", pa.int64()),
        ("start_tick", pa.int64()),
        ("stop_tick", pa.int64()),
        ("tick_rate", pa.int64()),
        ("utc_ns", pa.int64()),
        ("utc_source", pa.string()),
        ("utc_uncertainty_ns", pa.int64()),
        ("series_id", pa.int64()),
        ("series_unique_id", pa.string()),
        ("series_frame", pa.int64()),
        ("trigger_index", pa.int64()),
        ("producer", pa.string()),
        ("sequence", pa.int64()),
        ("part", pa.int32()),
        ("late", pa.bool_()),
    ]
)
_FIELDS = tuple(_SCHEMA.names)
_META, _NOTHING = "meta", b"{}"
_OWN = frozenset((*_FIELDS, _META))
# Longer values are frames, not digests.
_LARGE_BYTES = 1024
# A source that invents keys would make a table of a million columns; the JSON keeps the rest.
_MOST_COLUMNS = 500


def frame_table(infos: Iterable[FrameInfo]) -> pa.Table:
    """Rows in index order; scalar metadata as columns of its own, all of it as JSON in ``meta``.

    A metadata key that carries one of the standard names stays in the JSON only, and so do all
    keys beyond the first 500.
    """
    rows = sorted(infos, key=lambda info: (info.frame_index, info.part))
    by_field = dict(
        zip(FrameInfo.__struct_fields__, zip(*map(msgspec.structs.astuple, rows), strict=True), strict=False)
    )
    columns = [pa.array(by_field.get(name, ()), _SCHEMA.field(name).type) for name in _FIELDS]
    table = pa.Table.from_arrays(columns, schema=_SCHEMA)
    named = ((key, values) for key, values in scalar_columns([row.meta_json for row in rows]) if key not in _OWN)
    for key, values in itertools.islice(named, _MOST_COLUMNS):
        column = _scalar_column(values)
        if column is not None:
            table = table.append_column(key, column)
    return table.append_column(_META, pa.array([row.meta_json or _NOTHING for row in rows], pa.string()))


def table_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file in memory, ready to be published in one step."""
    sink = pa.BufferOutputStream()  # a file of Python's takes six times as long
    packed = {name for name in table.column_names if _is_packed(table[name])}
    plain = [name for name in table.column_names if name not in packed]
    pq.write_table(
        table,
        sink,
        compression={name: "none" if name in packed else "zstd" for name in table.column_names},
        # Not the metadata's text: each is another, and would be looked up in a dictionary for nothing.
        use_dictionary=[name for name in plain if name != _META],
        write_statistics=plain,
    )
    return bytes(sink.getvalue().to_pybytes())


def _is_packed(column: pa.ChunkedArray) -> bool:
    """Whether it holds frames: they are compressed, and packing them again costs as much as binning does."""
    is_binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    return is_binary and len(column) > 0 and column.nbytes / len(column) > _LARGE_BYTES


def read_frame_table(path: Path) -> list[FrameInfo]:
    """The rows of one chunk's frame table, by index and part.

    Raises
    ------
    CorruptFrame : the file is gone or damaged.
    """
    with _damage_named(path):
        table = pq.read_table(readable(path), columns=[*_FIELDS, _META])
        columns = [table.column(name).to_pylist() for name in _FIELDS]
        metas = table.column(_META).to_pylist()
        return [
            FrameInfo(**dict(zip(_FIELDS, values, strict=True)), meta_json=_text_of(meta))
            for *values, meta in zip(*columns, metas, strict=True)
        ]


def read_sendings(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Who sent the frames of a chunk: each producer with its sequences and the indices they were stored under.

    Costs little where no producer counted, as with a detector. Raises as `read_frame_table`.
    """
    with _damage_named(path), pq.ParquetFile(readable(path), read_dictionary=["producer"]) as file:
        if not _has_producers(file):
            return
        table = file.read(columns=["producer", "sequence", "frame_index"]).combine_chunks()
    if not table.num_rows:
        return
    producers, indices = table["producer"].chunk(0), table["frame_index"].to_numpy()
    numbers, sequences, is_counted = producers.indices.to_numpy(), *_with_gaps(table["sequence"])
    for number, producer in enumerate(producers.dictionary.to_pylist()):
        mine = is_counted & (numbers == number)
        if producer and mine.any():
            yield producer, sequences[mine], indices[mine]


def _with_gaps(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Integers, of which some may be null, and where they are not: through floats they would lose digits."""
    if not column.null_count:
        return column.to_numpy(), np.ones(len(column), bool)
    values = column.to_pylist()
    return np.array([value or 0 for value in values], np.int64), np.array([value is not None for value in values])


def _has_producers(file: pq.ParquetFile) -> bool:
    column = file.schema_arrow.get_field_index("producer")
    groups = [file.metadata.row_group(i).column(column) for i in range(file.metadata.num_row_groups)]
    return any(group.statistics is None or group.statistics.max != "" for group in groups)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what Parquet says of a damaged or missing file into an error that names it."""
    try:
        yield
    except NearlineError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        # A file that Parquet cannot make sense of is an OSError without a number.
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        raise CorruptFrame(
            f"frame table {path} is gone or damaged ({error}); restore it from a copy, or leave its frames out"
        ) from error


def _text_of(meta: str) -> bytes:
    return NO_META if meta == "{}" else meta.encode()


def _scalar_column(values: list[Any]) -> pa.Array | None:
    """A column of numbers, booleans or strings; None where the values are nested or mixed."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float} and kinds:
        kind = pa.float64() if float in kinds else pa.int64()
    elif kinds == {bool}:
        kind = pa.bool_()
    elif kinds == {str}:
        kind = pa.string()
    else:
        return None
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, OverflowError):  # an integer beyond 64 bits: the JSON keeps it
        return None
