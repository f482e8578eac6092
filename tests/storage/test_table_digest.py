"""A table's digest says what is in it, not how it was written."""

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.table_digest import row_digests, table_digest

TABLE = pa.table(
    {
        "frame_index": pa.array([0, 0, 1], pa.int64()),
        "x": np.array([1.5, math.nan, -0.0]),
        "hit": [True, False, True],
        "name": ["a", None, "ä"],
        "blob": pa.array([b"", b"\0\1", b"x"], pa.binary()),
    }
)


def test_the_writer_does_not_matter():
    for options in ({"compression": "none", "use_dictionary": False}, {"compression": "zstd", "row_group_size": 1}):
        sink = io.BytesIO()
        pq.write_table(TABLE, sink, **options)
        assert table_digest(pq.read_table(io.BytesIO(sink.getvalue()))) == table_digest(TABLE)
    pieces = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])
    assert table_digest(pieces) == table_digest(TABLE)
    assert row_digests(pieces) == row_digests(TABLE)


OTHERS = {
    "a value": TABLE.set_column(1, "x", pa.array([1.5, math.nan, 0.0])),
    "a null": TABLE.set_column(3, "name", pa.array(["a", "", "ä"])),
    "a type": TABLE.set_column(0, "frame_index", pa.array([0, 0, 1], pa.int32())),
    "a name": TABLE.rename_columns(["frame_index", "y", "hit", "name", "blob"]),
    "the order": TABLE.take([1, 0, 2]),
    "where bytes end": TABLE.set_column(4, "blob", pa.array([b"\0", b"\1", b"x"], pa.binary())),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_it_says_matters(other):
    assert table_digest(other) != table_digest(TABLE)


def test_where_bytes_lie_does_not_matter():
    blobs = [bytes([n]) * n for n in range(9)]
    table = pa.table({"blob": pa.array(blobs, pa.binary())})
    assert table_digest(table.slice(3, 4)) == table_digest(pa.table({"blob": pa.array(blobs[3:7], pa.large_binary())}))
    assert table_digest(table.slice(9)) == table_digest(pa.table({"blob": pa.array([], pa.binary())}))
    with_null = pa.table({"blob": pa.array([*blobs, None], pa.binary())})
    assert table_digest(with_null) != table_digest(pa.table({"blob": pa.array([*blobs, b""], pa.binary())}))
