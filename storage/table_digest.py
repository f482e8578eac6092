"""A digest of what a table says, whatever wrote it to a file and however its columns are cut in pieces."""

import json

import blake3
import numpy as np
import pyarrow as pa

__all__ = ["row_digests", "table_digest"]


def table_digest(table: pa.Table) -> str:
    """blake3 over names, types and values, column by column, hex.

    Rows and columns count in their order. A not-a-number is one value, whatever its bits; 0.0 and
    -0.0 are two. Text is the same as large text, a dictionary the same as its values.
    """
    digest = blake3.blake3()
    for name in table.column_names:
        column = _plain(table[name])
        digest.update(json.dumps([name, _type_name(column.type), len(column)]).encode())
        digest.update(np.ascontiguousarray(column.is_null().to_numpy(zero_copy_only=False), np.uint8).tobytes())
        for values in _values(column):
            digest.update(values)
    return digest.hexdigest()


def row_digests(table: pa.Table) -> list[str]:
    """The digest of each row as a table of its own."""
    return [table_digest(table.slice(row, 1)) for row in range(len(table))]


def _plain(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    # Copied: a slice keeps the offsets of what it was cut from.
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _type_name(kind: pa.DataType) -> str:
    return str(kind).removeprefix("large_")


def _values(column: pa.Array) -> list[bytes | memoryview]:
    """What is to be digested besides nulls; a null's value counts as nothing."""
    kind = column.type
    if pa.types.is_floating(kind):
        values = column.fill_null(0).to_numpy(zero_copy_only=False).copy()
        values[np.isnan(values)] = np.nan
        return [np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()]
    if pa.types.is_boolean(kind):
        return [np.ascontiguousarray(column.fill_null(False).to_numpy(zero_copy_only=False), np.uint8).tobytes()]
    if pa.types.is_integer(kind):
        values = column.fill_null(0).to_numpy(zero_copy_only=False)
        return [np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()]
    if _type_name(kind) == "binary" and not column.null_count:
        return _binary_values(column)
    if _type_name(kind) in ("string", "binary"):
        pieces = [b"" if v is None else v for v in column.to_pylist()]
        pieces = [p.encode() if isinstance(p, str) else p for p in pieces]
        return [np.array([len(p) for p in pieces], "<i8").tobytes(), *pieces]
    return [json.dumps(column.to_pylist(), default=str).encode()]


def _binary_values(column: pa.Array) -> list[bytes | memoryview]:
    """Lengths, and the values one after the other as they lie in memory: frames are not to be copied for it."""
    width = 8 if pa.types.is_large_binary(column.type) else 4
    _, offsets, content = column.buffers()
    at = np.frombuffer(offsets, f"<i{width}")[column.offset : column.offset + len(column) + 1]
    lengths = np.diff(at).astype("<i8").tobytes()
    return [lengths, memoryview(content)[at[0] : at[-1]]] if content is not None and len(column) else [lengths]
