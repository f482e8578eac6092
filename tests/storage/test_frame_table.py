"""Rows of frames as Parquet, for people as much as for us."""

import io
import json

import blake3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.frame import FrameInfo, content_digest, has_digest
from storage.frame_table import frame_table, read_frame_table, table_bytes
from storage.metadata import pack_meta

FULL = FrameInfo(
    frame_index=3, size_bytes=7, crc32c=2**32 - 1, digest=b"\x01" * 32, received_ns=2**60, start_tick=-5, stop_tick=6,
    tick_rate=50_000_000, utc_ns=2**61, utc_source="series_date", utc_uncertainty_ns=10, series_id=2,
    series_unique_id="X", series_frame=3, trigger_index=0, producer="p", sequence=9,
    meta_json=pack_meta({"laser": True, "nested": {"a": [1, 2]}}),
)  # fmt: skip


@pytest.mark.parametrize("rows", [[], [FULL], [FULL, FrameInfo(frame_index=0)]], ids=["empty", "one", "mixed"])
def test_round_trip(tmp_path, rows):
    path = tmp_path / "0.parquet"
    path.write_bytes(table_bytes(frame_table(rows)))
    assert read_frame_table(path) == sorted(rows, key=lambda r: r.frame_index)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([1, None], pa.int64()),
        ([True, False], pa.bool_()),
        (["a", "b"], pa.string()),
        ([True, 1], None),
        ([{"a": 1}, {}], None),
        ([2**70, 1], None),
        ([2**64 - 1, 1], None),
        ([None, None], None),
        ([float("nan"), 1], pa.float64()),
        ([1, [2]], None),
        ([[1], 2], None),
    ],
    ids=str,
)
def test_scalar_metadata_becomes_columns(values, kind):
    table = frame_table(FrameInfo(frame_index=i, meta_json=pack_meta({"x": v})) for i, v in enumerate(values))
    assert (table.schema.field("x").type if "x" in table.column_names else None) == kind


def test_standard_names_are_not_overwritten(tmp_path):
    table = frame_table([FrameInfo(frame_index=1, meta_json=pack_meta({"frame_index": 99, "meta": 1, "crc32c": "x"}))])
    assert table.column("frame_index").to_pylist() == [1]
    assert len(set(table.column_names)) == len(table.column_names)


def test_invented_keys_do_not_make_a_table_of_a_million_columns():
    table = frame_table(
        FrameInfo(frame_index=i, meta_json=pack_meta({f"k{i}-{j}": j for j in range(50)})) for i in range(100)
    )
    assert len(table.column_names) < 600
    assert '"k99-49":49' in table.column("meta")[99].as_py()


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        ({"stage": 1, "laser": True}, b'{"laser":true,"stage":1}'),
        ({"b": None, "a": [1, 2]}, b'{"a": [1, 2], "b": null}'),
        ({}, b"{}"),
    ],
    ids=["sorted", "with null", "none"],
)
def test_digests_of_earlier_versions_are_made_as_they_were(meta, text):
    """Frames had blake3 digests then, tables the order of the source, and chunks are still verified."""
    stored = json.dumps(meta, separators=(",", ":")).encode() if meta else b""
    info = FrameInfo(frame_index=4, digest=blake3.blake3(b"x").digest(), meta_json=stored)
    facts = b"[4,0,0,null,null,null,null,null,null]"
    assert content_digest(info) == blake3.blake3(info.digest + facts + text).digest()
    assert has_digest(b"x", info.digest)
    assert not has_digest(b"y", info.digest)


def test_content_digest_ignores_how_a_frame_came():
    a, b = FrameInfo(frame_index=1, producer="a", received_ns=1), FrameInfo(frame_index=1, producer="b", received_ns=2)
    assert content_digest(a) == content_digest(b)
    assert content_digest(a) != content_digest(FrameInfo(frame_index=2))


def test_frames_in_a_table_are_not_packed_again():
    blobs = [np.random.default_rng(i).bytes(5000) for i in range(4)]
    table = pa.table({"frame_index": range(4), "blob": blobs, "digest": [b"0" * 32] * 4})
    content = table_bytes(table)
    assert pq.read_table(io.BytesIO(content)) == table
    columns = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0)
    packing = {columns.column(n).path_in_schema: columns.column(n).compression for n in range(columns.num_columns)}
    assert packing == {"frame_index": "ZSTD", "blob": "UNCOMPRESSED", "digest": "ZSTD"}
    assert len(content) < 4 * 5000 + 4000
