"""A run reaches its target whole and in order, whatever fails on the way; recording never waits."""

import os
import shutil
import threading
import time

import numpy as np
import pytest

import nearline
from storage import upload as upload_module
from storage.errors import DamagedFile, PlaceUnavailable, UploadConflict
from storage.files import file_sizes, is_local, to_path
from storage.run_folder import RunFolder, StreamPaths
from storage.states import FrameState
from storage.step_store import StepStore
from storage.stream_store import StreamStore
from storage.upload import Uploader, upload_run

from ..servers import CREDENTIALS, free_port, s3_server
from .stores import SHAPE, new_folder, new_header, pixels, put, put_late

MASK = (np.arange(SHAPE[0] * SHAPE[1]) % 11 == 0).astype(np.uint32).reshape(SHAPE)
THERE, LATE = [0, 1, 2, 4, 5, 6, 7, 8], 3
ALL = sorted([*THERE, LATE])


@pytest.fixture(params=["folder", "memory", "s3"])
def target(request, tmp_path):
    if request.param == "s3":
        return to_path(request.getfixturevalue("bucket") + "/beamline")
    return to_path(f"file://{tmp_path}/target" if request.param == "folder" else f"memory://{tmp_path.name}")


def begun(root, **options) -> StreamStore:
    folder = new_folder(root / "data", options.get("run", 1))
    return StreamStore.create(folder, new_header(**options), pixel_mask=MASK)


def ended(root, run: int = 1) -> RunFolder:
    store = begun(root, run=run)
    put(store, *THERE)
    store.account(3, 4, FrameState.missing, "lost")
    store.seal_complete()
    put_late(store, LATE)
    end(store)
    return store.folder


def end(store: StreamStore) -> None:
    store.finish(10, "lost")
    store.close()
    store.folder.add_event("run_finished", {"state": "incomplete"})


def names(place) -> set[str]:
    return set(file_sizes(place))


def facts(folder: RunFolder) -> set[str]:
    """What of a folder belongs at a target."""
    here = {"eiger.claims/lock"} | {n for n in names(folder.path) if "run_uploaded" in n or "/." in n}
    return names(folder.path) - here


def same_content(folder: RunFolder, place) -> bool:
    return all((folder.path / n).read_bytes() == (place / n).read_bytes() for n in facts(folder))


class TestWhole:
    def test_everything_arrives_and_reads_the_same(self, tmp_path, target):
        folder = ended(tmp_path)
        StepStore(folder.path).save("abc", {"step": "x"}, {})
        told = []
        summary = upload_run(folder, target, progress=lambda done, total: told.append((done, total)))
        assert names(target / "lyso" / "1") == facts(folder)
        assert same_content(folder, target / "lyso" / "1")
        assert told[-1] == (summary.n_bytes, summary.n_bytes)
        run = nearline.open(target / "lyso" / "1" if is_local(target) else str(target / "lyso" / "1"))
        assert [f.frame_index for f in run["eiger"].follow()] == ALL
        assert np.array_equal(run["eiger"][5].data, pixels(5))
        assert np.array_equal(run["eiger"].pixel_mask, MASK)
        assert run.state == "incomplete"

    def test_nothing_is_sent_twice(self, tmp_path, target):
        folder = ended(tmp_path)
        first, second = upload_run(folder, target), upload_run(folder, target)
        assert (second.n_files, second.n_there) == (0, first.n_files)
        assert len(list(folder.events("run_uploaded"))) == 1

    def test_what_was_lost_there_is_sent_again(self, tmp_path, target):
        folder = ended(tmp_path)
        upload_run(folder, target)
        lost = folder.stream("eiger").shard(1, 2).relative_to(folder.path)
        (target / "lyso" / "1" / lost).unlink()
        assert upload_run(folder, target).n_files == 1
        assert same_content(folder, target / "lyso" / "1")

    def test_what_changed_here_is_replaced_there(self, tmp_path, target):
        folder = ended(tmp_path)
        (folder.path / "processed").mkdir()
        (folder.path / "processed" / "summary.json").write_text("one")
        upload_run(folder, target)
        (folder.path / "processed" / "summary.json").write_text("two")
        assert upload_run(folder, target).n_files == 1
        assert same_content(folder, target / "lyso" / "1")

    @pytest.mark.parametrize("part", ["run.json", "eiger.chunks/00002.json"])
    def test_another_run_of_that_name_is_not_touched(self, tmp_path, target, part):
        folder, other = ended(tmp_path), ended(tmp_path / "other")
        if part != "run.json":
            (other.path / "run.json").write_bytes((folder.path / "run.json").read_bytes())
        upload_run(folder, target)
        with pytest.raises(UploadConflict, match=part):
            upload_run(RunFolder.open(other.path), target)
        assert same_content(folder, target / "lyso" / "1")

    def test_a_foreign_shard_without_commit_is_not_taken_for_ours(self, tmp_path, target):
        folder = ended(tmp_path)
        shard = folder.stream("eiger").shard(1, 2)
        foreign = target / "lyso" / "1" / shard.relative_to(folder.path)
        foreign.parent.mkdir(parents=True, exist_ok=True)
        foreign.write_bytes(bytes(shard.stat().st_size))
        with pytest.raises(UploadConflict, match="c/1/0/0"):
            upload_run(folder, target)
        assert "eiger.chunks/00001.json" not in names(target / "lyso" / "1")


CUT_AT = range(0, 21, 4)


class TestInterrupted:
    @pytest.mark.parametrize("after", CUT_AT)
    def test_taken_up_where_it_stopped(self, tmp_path, target, after, monkeypatch):
        """When the network goes, a reader sees no chunk before its frames, nor an end before all chunks."""
        folder = ended(tmp_path)
        place = target / "lyso" / "1"
        send, n_sent = upload_module.RunUpload.send, []

        def send_some(self, file):
            if len(n_sent) == after:
                raise PlaceUnavailable("the network is gone")
            n_sent.append(file.name)
            return send(self, file)

        monkeypatch.setattr(upload_module.RunUpload, "send", send_some)
        with pytest.raises(PlaceUnavailable):
            upload_run(folder, target)
        self.check_order(names(place))
        monkeypatch.setattr(upload_module.RunUpload, "send", send)
        summary = upload_run(folder, target)
        assert same_content(folder, place)
        assert summary.n_there == len(n_sent) + 1

    @staticmethod
    def check_order(there: set[str]) -> None:
        for chunk in range(3):
            if f"eiger.chunks/{chunk:05d}.json" in there:
                assert {f"eiger.zarr/data/c/{chunk}/0/0", f"eiger.frames/{chunk:05d}.parquet"} <= there
        if any("stream_finished" in name for name in there):
            assert {f"eiger.chunks/{chunk:05d}.json" for chunk in range(3)} <= there

    def test_half_a_file_is_completed(self, tmp_path, target):
        """A shard that is there already, as after a crash between shard and commit, is recognised."""
        folder = ended(tmp_path)
        shard = folder.stream("eiger").shard(0, 2)
        there = target / "lyso" / "1" / shard.relative_to(folder.path)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(shard.read_bytes())
        upload_run(folder, target)
        assert same_content(folder, target / "lyso" / "1")


class TestRemoving:
    def test_frames_are_then_read_from_the_target(self, tmp_path, bucket):
        folder = ended(tmp_path)
        summary = upload_run(folder, to_path(bucket), remove_local=True)
        assert summary.n_removed == 3
        assert not any("data/c/" in name for name in names(folder.path))
        eiger = nearline.open(folder.path)["eiger"]
        assert [f.frame_index for f in eiger] == ALL
        assert np.array_equal(eiger[5].data, pixels(5))
        assert eiger.ledger().is_balanced
        assert upload_run(folder, to_path(bucket), remove_local=True).n_files == 0

    def test_only_of_an_ended_run(self, tmp_path, target):
        store = begun(tmp_path)
        put(store, *range(6))
        store.seal_complete()
        assert upload_run(store.folder, target, remove_local=True).n_removed == 0
        assert store.paths.shard(0, 2).exists()
        store.close()

    def test_not_what_the_target_lost(self, tmp_path, target):
        folder = ended(tmp_path)
        upload_run(folder, target)
        shard = folder.stream("eiger").shard(1, 2)
        upload = upload_module.RunUpload(folder, target)
        upload.begin()
        (upload.target / shard.relative_to(folder.path)).unlink()
        assert upload.remove_sent() == 2
        assert shard.exists()

    def test_no_commit_is_published_whose_frames_are_elsewhere(self, tmp_path, target, bucket):
        folder = ended(tmp_path)
        upload_run(folder, to_path(bucket) / "first", remove_local=True)
        with pytest.raises(DamagedFile, match=f"the frames are in {bucket}/first/lyso/1"):
            upload_run(folder, target / "second")
        assert not any(".chunks/" in name for name in names(target / "second"))


# ---- the thread beside the recorder -------------------------------------------------------------


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(upload_module, "_FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(upload_module, "_LAST_RETRY_S", 0.1)


def record(store: StreamStore, uploader: Uploader, *indices: int) -> None:
    put(store, *indices)
    for commit in store.seal_complete():
        uploader.chunk_sealed(store.folder, "eiger", commit.chunk)


class TestUploader:
    def test_chunks_follow_as_they_are_sealed(self, tmp_path, target):
        uploader, store = Uploader(target), begun(tmp_path)
        uploader.run_changed(store.folder)
        for start in (0, 4, 8):
            record(store, uploader, *range(start, start + 4))
            assert uploader.flush(20)
            commits = StreamPaths(target / "lyso" / "1", "eiger").commits()
            assert commits == list(range(start // 4 + 1))
        end(store)
        uploader.run_changed(store.folder)
        assert uploader.close(20)
        assert same_content(store.folder, target / "lyso" / "1")
        assert uploader.status()["refused"] == {}

    def test_a_reader_at_the_target_follows_the_live_run(self, tmp_path, bucket):
        uploader, store = Uploader(bucket), begun(tmp_path)
        uploader.run_changed(store.folder)
        record(store, uploader, *range(5))
        assert uploader.flush(20)
        eiger = nearline.open(f"{bucket}/lyso/1")["eiger"]
        assert eiger.is_live
        assert [f.frame_index for f in eiger] == [0, 1, 2, 3]
        record(store, uploader, 5, 6, 7)
        end(store)
        uploader.run_changed(store.folder)
        assert [f.frame_index for f in eiger.follow()] == list(range(8))
        assert uploader.close(20)

    def test_a_restart_finds_what_is_missing(self, tmp_path, target):
        store = begun(tmp_path)
        put(store, *range(8))
        uploader = Uploader(target)
        uploader.chunk_sealed(store.folder, "eiger", store.seal_complete()[0].chunk)
        assert uploader.close(20)
        put(store, 8, 9)
        end(store)
        again = Uploader(target)
        again.resume(tmp_path / "data")
        assert again.close(20)
        assert same_content(store.folder, target / "lyso" / "1")
        third = Uploader(target)
        third.resume(tmp_path / "data")
        assert third.status()["runs"] == 0, "an ended run that was uploaded is not looked at again"
        third.close()

    def test_calls_return_at_once_while_the_target_hangs(self, tmp_path, target, monkeypatch):
        may_go = threading.Event()
        monkeypatch.setattr(upload_module, "file_sizes", lambda folder: may_go.wait(20) and file_sizes(folder))
        uploader, store = Uploader(target), begun(tmp_path, frames_per_chunk=1)
        started = time.monotonic()
        record(store, uploader, *range(50))
        elapsed = time.monotonic() - started
        status = uploader.status()
        assert (status["chunks"], status["runs"]) == (50, 1)
        assert status["bytes"] == sum(store.paths.shard(i, 2).stat().st_size for i in range(50))
        started = time.monotonic()
        assert not uploader.close(0.1)
        assert elapsed + time.monotonic() - started < 5
        may_go.set()
        store.close()

    def test_tries_again_until_the_target_is_back(self, tmp_path, monkeypatch, quick, caplog):
        port = free_port()
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        from upath import UPath

        options = {
            "endpoint_url": f"http://127.0.0.1:{port}",
            "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 1},
            "use_listings_cache": False,
        }
        target = UPath("s3://bucket", **options)
        target.fs.retries = 1
        folder = ended(tmp_path)
        uploader = Uploader(target)
        uploader.run_changed(folder)
        wait_until(lambda: uploader.status()["error"])
        assert "cannot be reached" in uploader.status()["error"]
        wait_until(lambda: uploader.status()["failing_s"] > 0)
        with s3_server(port):
            # There is no bucket yet: another error, and no reason to give up either.
            wait_until(lambda: "bucket does not exist" in (uploader.status()["error"] or ""))
            target.fs.mkdir("bucket")
            assert uploader.flush(20)
            assert uploader.status()["error"] is None
            assert same_content(folder, target / "lyso" / "1")
            uploader.close()

    def test_one_refused_run_does_not_hold_up_the_others(self, tmp_path, target, caplog):
        taken, good = ended(tmp_path / "a"), ended(tmp_path / "b", run=2)
        upload_run(ended(tmp_path / "c"), target)
        uploader = Uploader(target)
        uploader.run_changed(taken)
        uploader.run_changed(good)
        assert uploader.close(20)
        assert same_content(good, target / "lyso" / "2")
        assert "another run of that name" in uploader.status()["refused"]["lyso/1"]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_fault_of_ours_is_seen(self, tmp_path, monkeypatch):
        monkeypatch.setattr(upload_module.RunUpload, "begin", lambda self: 1 // 0)
        uploader = Uploader(tmp_path / "target")
        uploader.run_changed(ended(tmp_path))
        wait_until(lambda: "has stopped" in (uploader.status()["error"] or ""))
        assert not uploader.close(0.1)

    def test_a_run_deleted_meanwhile_is_forgotten(self, tmp_path, target, quick, monkeypatch, caplog):
        folder = ended(tmp_path)
        begin = upload_module.RunUpload.begin
        monkeypatch.setattr(upload_module.RunUpload, "begin", lambda self: shutil.rmtree(folder.path) or begin(self))
        uploader = Uploader(target)
        uploader.run_changed(folder)
        assert uploader.close(20)

    def test_local_shards_go_once_the_run_has_ended(self, tmp_path, target):
        uploader, store = Uploader(target, remove_local=True), begun(tmp_path)
        record(store, uploader, *range(8))
        assert uploader.flush(20)
        assert store.paths.shard(0, 2).exists()
        before = store.read(5).blob
        end(store)
        uploader.run_changed(store.folder)
        assert uploader.close(20)
        assert not store.paths.shard(0, 2).exists()
        assert bytes(nearline.open(store.folder.path)["eiger"][5].blob) == bytes(before)


def test_files_of_this_machine_stay_here(tmp_path, target):
    store = begun(tmp_path)
    put(store, 0, 1)
    processing = store.folder.path / "processed" / "p1"
    processing.mkdir(parents=True)
    (processing / "claim").write_text(f"pid {os.getpid()}")
    (processing / ".summary.json.123").write_text("{")
    upload_run(store.folder, target)
    of_this_machine = {"eiger.claims/lock", "processed/p1/claim", "processed/p1/.summary.json.123"}
    assert names(target / "lyso" / "1") & of_this_machine == set()
    assert not any(".journal" in name for name in names(target / "lyso" / "1"))
    store.close()
