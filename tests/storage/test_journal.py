"""The journal: what is appended is there after any cut, and never more than that."""

import errno
import os
import struct

import google_crc32c
import msgspec
import pytest

from storage.errors import BadFrame, CorruptFrame, StorageFull
from storage.frame import FrameInfo
from storage.journal import Journal
from storage.shard import ShardReader

from .stores import row

BLOBS = {0: b"a" * 100, 2: b"", 1: b"bb" * 300, 5: bytes(range(256))}


def fill(journal: Journal) -> list[int]:
    """Append all blobs; the journal's end after each."""
    ends = []
    for index, blob in BLOBS.items():
        journal.append(row(index, blob, meta={"i": index}), blob)
        ends.append(journal.end)
    return ends


def test_read_back(tmp_path):
    journal = Journal.create(tmp_path / "j", 0, 8)
    fill(journal)
    assert {i: journal.read(i).blob for i in BLOBS} == BLOBS
    assert journal.read(1).info.meta == {"i": 1}


def test_every_truncation_keeps_the_whole_records(tmp_path):
    path = tmp_path / "j"
    ends = fill(Journal.create(path, 0, 8))
    content = path.read_bytes()
    for cut in [*range(0, len(content), 13), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])]:
        path.write_bytes(content[:cut])
        journal = Journal.recover(path, 0, 8)
        n_whole = sum(end <= cut for end in ends)
        assert list(journal.infos) == list(BLOBS)[:n_whole]
        assert path.stat().st_size == (ends[n_whole - 1] if n_whole else 0)


@pytest.mark.parametrize("at", range(0, 180, 7))
def test_damage_costs_one_frame_or_what_cannot_be_told_apart(tmp_path, at):
    """Behind damaged pixels the next record is found; behind a damaged header nothing can be."""
    path = tmp_path / "j"
    journal = Journal.create(path, 0, 8)
    ends = fill(journal)
    before = list(BLOBS)[: sum(end <= at for end in ends)]
    hit = list(BLOBS)[len(before)]
    is_blob = journal.locations[hit].offset <= at < journal.locations[hit].offset + len(BLOBS[hit])
    is_spare_crc = at >= journal.locations[hit].offset + len(BLOBS[hit])  # Zarr's copy; the header has the crc too
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    others = [index for index in BLOBS if index != hit]
    expected = list(BLOBS) if is_spare_crc else others if is_blob else before
    assert list(Journal.recover(path, 0, 8).infos) == expected


def test_goes_on_after_recovery(tmp_path):
    path = tmp_path / "j"
    fill(Journal.create(path, 0, 8))
    os.truncate(path, path.stat().st_size - 1)
    journal = Journal.recover(path, 0, 8)
    journal.append(row(7, b"new"), b"new")
    assert [*Journal.recover(path, 0, 8).infos] == [0, 2, 1, 7]


@pytest.mark.parametrize("at", range(4))
def test_a_lost_crc_behind_a_blob_is_written_again(tmp_path, at):
    """It can reach the disk later than the blob, and readers of the shard have no other."""
    path = tmp_path / "j"
    journal = Journal.create(path, 0, 8)
    fill(journal)
    crc_at = journal.locations[1].offset + journal.locations[1].length
    content = bytearray(path.read_bytes())
    content[crc_at + at : crc_at + 4] = bytes(4 - at)
    path.write_bytes(content)
    recovered = Journal.recover(path, 0, 8)
    assert list(recovered.infos) == list(BLOBS)
    recovered.write_index()
    reader = ShardReader(path, 0, 8)
    assert {i: reader.read(i) for i in BLOBS} == BLOBS


def test_sealed_journal_is_a_shard_and_still_a_journal(tmp_path):
    path = tmp_path / "j"
    journal = Journal.create(path, 0, 8)
    fill(journal)
    journal.write_index()
    reader = ShardReader(path, 0, 8)
    assert {i: reader.read(i) for i in range(8) if i in reader} == BLOBS
    with pytest.raises(KeyError):
        reader.read(3)
    assert list(Journal.recover(path, 0, 8).infos) == list(BLOBS)


def test_damaged_blob_is_named(tmp_path):
    path = tmp_path / "j"
    journal = Journal.create(path, 0, 8)
    fill(journal)
    with open(path, "r+b") as file:
        file.seek(journal.locations[5].offset)
        file.write(b"\xff")
    with pytest.raises(CorruptFrame, match=r"frame 5 in .*/j fails its crc32c"):
        journal.read(5)


def test_cut_shard_index_is_named(tmp_path):
    path = tmp_path / "j"
    journal = Journal.create(path, 0, 8)
    fill(journal)
    journal.write_index()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptFrame, match="index of shard"):
        ShardReader(path, 0, 8)


def test_view_follows_a_living_writer(tmp_path):
    writer = Journal.create(tmp_path / "j", 0, 8)
    writer.append(row(0, b"x"), b"x")
    view = Journal.view(tmp_path / "j", 0, 8)
    writer.append(row(1, b"y"), b"y")
    assert list(view.infos) == [0]
    view.look_again()
    assert view.read(1).blob == b"y"


def test_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    """Half a record is written, then the disk is full; when there is room again it goes on."""
    journal = Journal.create(tmp_path / "j", 0, 8)
    journal.append(row(0, b"x" * 100), b"x" * 100)
    end = journal.end
    real = os.pwritev
    calls = []

    def full(fd, parts, offset):
        calls.append(offset)
        if len(calls) == 1:
            return os.pwrite(fd, bytes(parts[0])[:10], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageFull, match="no space left for j"):
        journal.append(row(1, b"y" * 100), b"y" * 100)
    assert (tmp_path / "j").stat().st_size == end
    monkeypatch.setattr(os, "pwritev", real)
    journal.append(row(1, b"y" * 100), b"y" * 100)
    assert list(Journal.recover(tmp_path / "j", 0, 8).infos) == [0, 1]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: os.pwrite(fd, b"".join(map(bytes, parts))[:11], at))
    fill(Journal.create(tmp_path / "j", 0, 8))
    assert list(Journal.recover(tmp_path / "j", 0, 8).infos) == list(BLOBS)


def test_journal_of_version_2_is_read_and_gone_on_with(tmp_path):
    """Its rows have metadata as an object: that of an open chunk, or of late frames, which stay in this form."""
    info, content = row(0, b"abc", meta={"b": 1, "a": [2, {"c": None}]}, producer="p", sequence=7), b"abc"
    values = list(msgspec.structs.astuple(info))
    values[FrameInfo.__struct_fields__.index("meta_json")] = info.meta
    meta = msgspec.msgpack.encode(values)
    head = struct.pack("<8sBqIQI", b"NLJOURN2", 0, 0, len(meta), len(content), info.crc32c)
    crc = google_crc32c.extend(google_crc32c.value(head), meta)
    record = head + struct.pack("<I", crc) + meta + content + struct.pack("<I", info.crc32c)
    (tmp_path / "j").write_bytes(record)
    journal = Journal.recover(tmp_path / "j", 0, 8)
    journal.append(row(1, b"de"), b"de")
    for found in (journal, Journal.view(tmp_path / "j", 0, 8)):
        assert found.infos == {0: info, 1: row(1, b"de")}
        assert [bytes(found.read(i).blob) for i in (0, 1)] == [b"abc", b"de"]


def test_row_that_recovery_would_not_read_is_refused(tmp_path):
    journal = Journal.create(tmp_path / "j", 0, 8)
    info = row(0, b"")
    info.meta_json = b'{"x":"' + b"y" * (65 << 20) + b'"}'
    with pytest.raises(BadFrame, match="recovery would not read it"):
        journal.append(info, b"")
    assert journal.end == 0
