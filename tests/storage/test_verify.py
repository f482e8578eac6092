"""Every kind of damage is found, and named with its file; what is sound is not suspected."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.errors import PlaceUnavailable
from storage.files import file_sizes, to_path
from storage.retention import delete_run
from storage.run_folder import RunFolder
from storage.states import FrameState
from storage.step_store import StepStore
from storage.stream_store import StreamStore
from storage.upload import upload_run
from storage.verify import VerifyReport, verify_run

from .stores import SHAPE, new_folder, new_header, put, put_late

MASK = (np.arange(SHAPE[0] * SHAPE[1]) % 11 == 0).astype(np.uint32).reshape(SHAPE)
SHARD = "eiger.zarr/data/c/1/0/0"
# In shards and the amendment, and in the table stream.
N_FRAMES = 10 + 6


def frames_of(store: StreamStore) -> None:
    """Frames 0 to 9 of which 3 is lost, 6 rejected, and 8 comes late."""
    put(store, 0, 1, 2, 4, 5, 7)
    store.account(6, 7, FrameState.rejected, "wrong shape")
    store.account(3, 4, FrameState.missing, "lost")
    store.account(8, 9, FrameState.missing, "lost")
    put(store, 9, 10, 11)
    store.seal_complete()
    put_late(store, 8)


def ended(root: Path) -> RunFolder:
    store = StreamStore.create(new_folder(root), new_header(), pixel_mask=MASK)
    frames_of(store)
    table = StreamStore.create(
        store.folder, new_header(data_source="eiger.results@p1", kind="table", shape=(), dtype="", parent="eiger")
    )
    put(table, *range(6))
    for each in (store, table):
        each.finish(6 if each is table else 12, "lost")
        each.close()
    StepStore(store.folder.path).save("abc", {"step": "x"}, {})
    store.folder.add_event("run_finished", {"state": "incomplete"})
    return store.folder


def interrupted(root: Path) -> RunFolder:
    store = StreamStore.create(new_folder(root), new_header())
    put(store, *range(6))
    store.seal_complete()
    store.close()
    return store.folder


def holes(report: VerifyReport) -> list[tuple]:
    return [(h.frames.state, h.frames.start, h.frames.stop, h.frames.cause) for h in report.holes]


class TestSound:
    def test_ended(self, tmp_path):
        told = []
        report = verify_run(ended(tmp_path).path, lambda done, total: told.append((done, total)))
        assert report.findings == []
        assert report.n_frames == N_FRAMES
        assert holes(report) == [
            ("missing", 3, 4, "lost"), ("rejected", 6, 7, "wrong shape"), ("missing", 8, 9, "lost"),
        ]  # fmt: skip
        assert told[-1][0] == told[-1][1] == sum(file_sizes(tmp_path / "lyso" / "1").values())

    def test_interrupted(self, tmp_path):
        report = verify_run(interrupted(tmp_path).path)
        assert report.findings == []
        assert report.n_frames == 6

    def test_live(self, tmp_path):
        store = StreamStore.create(new_folder(tmp_path), new_header(), pixel_mask=MASK)
        frames_of(store)
        put(store, 12, 13)
        assert verify_run(store.folder.path).findings == []
        store.close()

    def test_just_begun(self, tmp_path):
        assert verify_run(new_folder(tmp_path).path).is_sound

    def test_in_parts(self, tmp_path):
        store = StreamStore.create(new_folder(tmp_path), new_header(parts=2))
        for part, last in ((0, 5), (1, 6)):
            put(store, *range(last), part=part)
        store.finish(6, "lost")
        store.close()
        report = verify_run(store.folder.path)
        assert (report.findings, [h.frames.state for h in report.holes]) == ([], ["incomplete"])

    @pytest.mark.parametrize("remove_local", [False, True])
    def test_uploaded(self, tmp_path, bucket, remove_local):
        folder = ended(tmp_path)
        there = upload_run(folder, to_path(bucket), remove_local=remove_local).target
        for place in (folder.path, to_path(there)):
            report = verify_run(place)
            assert (report.findings, report.n_frames) == ([], N_FRAMES)

    def test_deleted(self, tmp_path):
        folder = ended(tmp_path)
        delete_run(folder, "anna", "")
        report = verify_run(folder.path)
        assert (report.findings, report.n_frames, len(report.holes)) == ([], 0, 3)


Damage = Callable[[Path], None]


def flip(at: float) -> Damage:
    """One bit, so far into the file: 0 the first byte, 1 the last."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(int(at * len(content)), len(content) - 1)] ^= 0x10
        path.write_bytes(bytes(content))

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


def replaced(old: str, new: str) -> Damage:
    def damage(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


def exchanged(path: Path) -> None:
    """The file of the next chunk in its place: whole, and wrong."""
    other = Path(str(path).replace("/c/1/", "/c/2/").replace("00001", "00002"))
    path.write_bytes(other.read_bytes())


DAMAGE = {
    "run header cut": ("run.json", cut, None),
    "run header gone": ("run.json", gone, None),
    "event cut": ("events/000002-stream_finished.json", cut, None),
    "event gone": ("events/000002-stream_finished.json", gone, None),
    "event of another kind": ("events/000001-run_started.json", replaced("run_started", "run_stopped"), None),
    "stream header cut": ("eiger.stream.json", cut, None),
    "stream header gone": ("eiger.stream.json", gone, None),
    "stream header changed": ("eiger.stream.json", replaced("uint16", "uint32"), None),
    "bit in a frame": (SHARD, flip(0.2), 4),
    "bit in the last frame": (SHARD, flip(0.9), 7),
    "bit in the shard's index": (SHARD, flip(1), None),
    "shard cut": (SHARD, cut, None),
    "shard empty": (SHARD, empty, None),
    "shard gone": (SHARD, gone, None),
    "another shard": (SHARD, exchanged, None),
    "bit in the table": ("eiger.frames/00001.parquet", flip(0.3), None),
    "bit in the table's schema": ("eiger.frames/00001.parquet", flip(0.8), None),
    "table cut": ("eiger.frames/00001.parquet", cut, None),
    "table gone": ("eiger.frames/00001.parquet", gone, None),
    "another table": ("eiger.frames/00001.parquet", exchanged, None),
    "bit in a table stream": ("eiger.results@p1.frames/00000.parquet", flip(0.5), None),
    "commit cut": ("eiger.chunks/00001.json", cut, None),
    "commit gone": ("eiger.chunks/00001.json", gone, None),
    "last commit gone": ("eiger.chunks/00002.json", gone, None),
    "another commit": ("eiger.chunks/00001.json", exchanged, None),
    "commit counts wrong": ("eiger.chunks/00001.json", replaced('"n_frames": 3', '"n_frames": 4'), None),
    "commit by nobody": ("eiger.chunks/00001.json", replaced('"epoch": 1', '"epoch": 7'), None),
    "length": ("eiger.zarr/data/zarr.json", replaced("12", "13"), None),
    "array metadata gone": ("eiger.zarr/data/zarr.json", gone, None),
    "other codec": ("eiger.zarr/data/zarr.json", replaced("nearline.bslz4", "nearline.lz4"), None),
    "group metadata cut": ("eiger.zarr/zarr.json", cut, None),
    "bit in the mask": ("eiger.zarr/pixel_mask/c/0/0", flip(0.5), None),
    "mask gone": ("eiger.zarr/pixel_mask/c/0/0", gone, None),
    "mask's metadata gone": ("eiger.zarr/pixel_mask/zarr.json", gone, None),
    "bit in a late frame": ("eiger.amendments/00001.segment", flip(0.5), None),
    "late frames gone": ("eiger.amendments/00001.segment", gone, None),
    "their commit gone": ("eiger.amendments/00001.json", gone, None),
    "their table cut": ("eiger.amendments/00001.parquet", cut, None),
    "step output cut": ("steps/abc/step.json", cut, None),
}


@pytest.mark.parametrize(("name", "damage", "frame"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(tmp_path, name, damage, frame):
    folder = ended(tmp_path)
    damage(folder.path / name)
    report = verify_run(folder.path)
    assert not report.is_sound
    named = [f for f in report.findings if f.file == name or (name.startswith("events/") and "events" in f.file)]
    assert named, report.findings
    assert all(f.what and f.remedy for f in report.findings)
    assert frame is None or [f.frame for f in report.findings] == [frame]


@pytest.mark.parametrize("at", np.linspace(0, 1, 23))
def test_no_bit_of_a_frame_table_changes_unseen(tmp_path, at):
    folder = ended(tmp_path)
    flip(at)(folder.path / "eiger.frames" / "00001.parquet")
    assert next(f.file for f in verify_run(folder.path).findings) == "eiger.frames/00001.parquet"


@pytest.mark.parametrize("at", np.linspace(0, 1, 23))
def test_no_bit_of_a_journal_changes_unseen(tmp_path, at):
    folder = interrupted(tmp_path)
    name = "eiger.journal/00001.journal"
    flip(at)(folder.path / name)
    assert {f.file for f in verify_run(folder.path).findings} == {name}


def test_everything_at_once_is_still_a_report(tmp_path):
    """One damage does not hide another, nor stop the check."""
    folder = ended(tmp_path)
    for name in sorted(file_sizes(folder.path)):
        if not name.endswith("lock"):
            flip(0.5)(folder.path / name)
    damaged = {f.file.partition("/")[0] for f in verify_run(folder.path).findings}
    assert {"run.json", "events", "eiger.stream.json"} <= damaged


def test_frames_beside_a_damaged_one_are_still_read(tmp_path):
    folder = ended(tmp_path)
    flip(0.2)(folder.path / SHARD)
    assert verify_run(folder.path).n_frames == N_FRAMES - 1


def test_a_damaged_object_is_named(tmp_path, bucket):
    there = to_path(upload_run(ended(tmp_path), to_path(bucket)).target)
    flip_remote(there / SHARD)
    assert [(f.file, f.frame) for f in verify_run(there).findings] == [(SHARD, 4)]


def flip_remote(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 5] ^= 1
    path.write_bytes(bytes(content))


def test_a_store_that_is_away_is_no_damage(tmp_path, bucket, monkeypatch):
    from storage import shard

    folder = ended(tmp_path)
    upload_run(folder, to_path(bucket), remove_local=True)

    def away(*_: object) -> None:
        raise PlaceUnavailable("the network is gone")

    monkeypatch.setattr(shard._RemoteFile, "read_tail", away)
    with pytest.raises(PlaceUnavailable):
        verify_run(folder.path)


def test_unreadable_file(tmp_path, monkeypatch):
    """A disk that fails in the middle of a shard: the other frames are still judged."""
    folder = ended(tmp_path)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, n, at) if n < 3000 else _io_error())
    report = verify_run(folder.path)
    assert {f.frame for f in report.findings if f.file == SHARD} == {4, 5, 7}
    assert "Input/output error" in report.findings[0].what


def _io_error() -> bytes:
    raise OSError(5, "Input/output error")
