"""Columns over chunks whose types differ, and over rows in memory: the same answer whatever was sealed."""

import math

import numpy as np
import pyarrow as pa
import pytest

from storage.frame import FrameInfo
from storage.frame_columns import META, gather_rows, typed_array
from storage.frame_table import frame_table, table_bytes
from storage.metadata import pack_meta

SIZE = 4


def rows_of(values):
    """One row for each value; ``...`` means a frame without the key."""
    metas = [{} if value is ... else {"x": value} for value in values]
    return [FrameInfo(frame_index=i, size_bytes=i, meta_json=pack_meta(meta)) for i, meta in enumerate(metas)]


def gathered(infos, tmp_path, sealed=(), start=0, stop=None):
    """The rows, with the chunks ``sealed`` in files."""
    stop = len(infos) if stop is None else stop
    files = {}
    for number in sealed:
        files[number] = tmp_path / f"{number}.parquet"
        files[number].write_bytes(table_bytes(frame_table(infos[number * SIZE : (number + 1) * SIZE])))
    return gather_rows(start, stop, SIZE, lambda a, b: iter(i for i in infos if a <= i.frame_index < b), files)


MIXTURES = [
    ([1, 2, 3, 4, 5, 6, 7, 8], pa.int64(), None),
    ([1, 2, 3, 4, 5.5, 6, 7, 8], pa.float64(), None),
    ([True, False, True, False, None, None, None, True], pa.bool_(), None),
    (["a", "b", "c", "d", "e", "f", "g", "h"], pa.string(), None),
    ([..., ..., ..., ..., 5, 6, 7, 8], pa.int64(), [None] * 4 + [5, 6, 7, 8]),
    ([1, 2, 3, 4, ..., ..., ..., ...], pa.int64(), [1, 2, 3, 4] + [None] * 4),
    ([1, 2, 3, 4, "a", "b", "c", "d"], pa.string(), ["1", "2", "3", "4", "a", "b", "c", "d"]),
    ([1, 2, 3, 4, 5, "b", 7, True], pa.string(), ["1", "2", "3", "4", "5", "b", "7", "true"]),
    ([1, "b", 3, 4, 5, 6, 7, 8], pa.string(), ["1", "b", "3", "4", "5", "6", "7", "8"]),
    ([True, False, True, True, 5, 6, 7, 8], pa.string(), ["true", "false", "true", "true", "5", "6", "7", "8"]),
    ([True, False, True, True, "a", ..., ..., ...], pa.string(), ["true", "false", "true", "true", "a"] + [None] * 3),
    ([{"a": 1}, [1], 3, 4, 5, 6, 7, 8], pa.string(), ['{"a": 1}', "[1]", "3", "4", "5", "6", "7", "8"]),
    ([math.nan, 1.5, 2.5, 3.5, 4, 5, 6, math.nan], pa.float64(), [None, 1.5, 2.5, 3.5, 4, 5, 6, None]),
    ([2**64, 1, 2, 3, 4, 5, 6, 7], pa.float64(), [2.0**64, 1, 2, 3, 4, 5, 6, 7]),
    ([10**400, 1, 2, 3, 4, 5, 6, 7], pa.float64(), [math.inf, 1, 2, 3, 4, 5, 6, 7]),
    ([None] * 8, pa.null(), None),
]


@pytest.mark.parametrize("sealed", [(), (0,), (1,), (0, 1)], ids=["none", "first", "second", "both"])
@pytest.mark.parametrize(("values", "kind", "expected"), MIXTURES, ids=[str(m[0])[:40] for m in MIXTURES])
def test_one_type_over_all_chunks(tmp_path, values, kind, expected, sealed):
    column = gathered(rows_of(values), tmp_path, sealed).columns(["x"])["x"]
    assert column.type == kind
    assert column.to_pylist() == (values if expected is None else expected)


def test_fixed_columns_and_json(tmp_path):
    rows = gathered(rows_of([1, 2, 3, 4, ..., "ü"]), tmp_path, [0])
    columns = rows.columns(["frame_index", "size_bytes", "late", "utc_ns", META])
    assert columns["frame_index"].to_pylist() == columns["size_bytes"].to_pylist() == list(range(6))
    assert columns["late"].to_pylist() == [False] * 6
    assert columns["utc_ns"].type == pa.int64()
    assert columns[META].to_pylist()[3:5] == ['{"x":4}', "{}"]


def test_names_are_those_of_all_chunks(tmp_path):
    infos = [
        FrameInfo(frame_index=i, meta_json=pack_meta({"abcdefgh"[i]: i, "frame_index": 3, "meta": 1})) for i in range(8)
    ]
    assert gathered(infos, tmp_path, [0]).metadata_names == list("abcdefgh")


@pytest.mark.parametrize("key", ['odd "name"', "läser", "a.b", "x" * 300, "", "%_", "meta.x"])
def test_odd_keys(tmp_path, key):
    infos = [FrameInfo(frame_index=i, meta_json=pack_meta({key: "text" if i == 2 else i})) for i in range(8)]
    values = gathered(infos, tmp_path, [0, 1]).columns([key])[key].to_pylist()
    assert values == ["0", "1", "text", "3", "4", "5", "6", "7"]


def test_keys_beyond_the_most_columns_are_found(tmp_path):
    infos = [FrameInfo(frame_index=i, meta_json=pack_meta({f"k{n:04}": n for n in range(600)})) for i in range(4)]
    assert gathered(infos, tmp_path, [0]).columns(["k0599"])["k0599"].to_pylist() == [599] * 4


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (2, 8), (0, 6), (2, 6), (4, 8), (3, 5), (5, 5)])
def test_ranges_that_are_no_whole_chunks(tmp_path, start, stop):
    rows = gathered(rows_of(range(8)), tmp_path, [0, 1], start, stop)
    assert rows.columns(["x"])["x"].to_pylist() == list(range(start, stop))


def test_nothing(tmp_path):
    assert gathered([], tmp_path).columns(["frame_index", "x"])["frame_index"].to_pylist() == []
    assert typed_array([]).type == pa.null()


def test_many_rows_become_columns():
    n = 100_000
    infos = [
        FrameInfo(frame_index=i, meta_json=pack_meta({"delay": i / 10, "laser": i % 2 == 0, "well": "A1"}))
        for i in range(n)
    ]
    rows = gather_rows(0, n, 100, lambda a, b: iter(infos[a:b]))
    columns = rows.columns(["frame_index", "size_bytes", "delay", "laser", "well"])
    assert np.array_equal(columns["delay"].to_numpy(), np.arange(n) / 10)
    assert columns["laser"].to_pylist() == [i % 2 == 0 for i in range(n)]
    assert set(columns["well"].to_pylist()) == {"A1"}
