"""Vetoed frames: what goes, what stays, and what is known afterwards; also after a crash at any point."""

import os
import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

import nearline
from storage import veto as vetoing
from storage.codec import decode
from storage.errors import FrameMissing, ProcessingBusy, RunBusy, VetoRefused
from storage.files import file_sizes
from storage.run_folder import RunFolder
from storage.states import FrameState
from storage.step_store import Processing
from storage.stream_source import FolderSource
from storage.stream_store import StreamStore
from storage.verify import verify_run
from storage.veto import (
    carry_out_veto,
    find_veto,
    hold_frames,
    mark_veto,
    plan_veto,
    read_background,
    undo_veto,
    veto_of,
)  # fmt: skip

from .stores import new_folder, new_header, put, put_late
from .test_store_faults import Faults, Killed

N = 14
WANTED = {0, 5, 12}


def ended(root: Path, **options) -> RunFolder:
    """Frames 0 to 13; 7 is missing, 3 came late."""
    store = StreamStore.create(new_folder(root), new_header(**options))
    parts = range(store.header.parts)
    for index in set(range(N)) - {3, 7}:
        for part in parts:
            put(store, index, part=part)
    store.account(3, 4, FrameState.missing, "lost")
    store.seal_complete()
    for part in parts:
        put_late(store, 3, part=part)
    store.finish(N, "lost")
    store.close()
    store.folder.add_event("run_finished", {"state": "incomplete"})
    return store.folder


def planned(folder: RunFolder, **options):
    facts = {
        "processing": "p1",
        "condition": "hit",
        "by": "anna",
        "grace": timedelta(0),
        "keep_fraction": 0.2,
    } | options
    return plan_veto(folder, "eiger", set(range(N)) - WANTED, **facts)


def blobs(folder: RunFolder) -> dict[int, list[bytes]]:
    source = FolderSource(folder, "eiger")
    return {int(i): [bytes(raw.blob) for raw in source.read_parts(int(i))] for i in source.states.readable()}


def gone(plan) -> set[int]:
    return {index for chunk in plan.chunks for index in chunk.indices()}


@pytest.fixture(params=[{}, {"parts": 2}, {"dtype": "float32", "codec": "raw"}], ids=["plain", "parts", "float"])
def folder(request, tmp_path) -> RunFolder:
    return ended(tmp_path, **request.param)


class TestCarriedOut:
    def test_survivors_are_the_same_bytes_and_the_ledger_balances(self, folder):
        before, ledger = blobs(folder), FolderSource(folder, "eiger").ledger()
        plan = mark_veto(folder, planned(folder))
        assert blobs(folder) == before
        assert FolderSource(folder, "eiger").ledger() == ledger
        carry_out_veto(folder)
        taken = gone(plan)
        assert blobs(folder) == {i: blob for i, blob in before.items() if i not in taken}
        assert 3 not in taken
        assert taken.isdisjoint(WANTED)
        after = FolderSource(folder, "eiger").ledger()
        assert (after.vetoed, after.stored) == (len(taken), ledger.stored - len(taken))
        assert (after.problems, after.late, after.missing) == ([], 1, 1)
        report = verify_run(folder.path)
        assert report.findings == []

    def test_disk_use_falls_as_predicted(self, folder):
        array = folder.stream("eiger").array
        before = sum(file_sizes(array).values())
        plan = mark_veto(folder, planned(folder))
        carry_out_veto(folder)
        freed = sum(chunk.bytes_before - chunk.bytes_after for chunk in plan.chunks)
        assert sum(file_sizes(array).values()) == before - freed
        # Plan, old commits and events are a few kilobytes more.
        assert 0 <= sum(file_sizes(folder.path).values()) - plan.bytes_after < 25_000

    def test_a_vetoed_frame_says_why_and_is_skipped(self, folder):
        plan = mark_veto(folder, planned(folder, why="disk full"))
        carry_out_veto(folder)
        run, index = nearline.open(folder.path), min(gone(plan))
        words = (
            rf"frame {index} of .* was vetoed on .* by anna, because it is not hit in p1 \(disk full\).*background.npy"
        )
        with pytest.raises(FrameMissing, match=words):
            run["eiger"][index]
        assert {frame.frame_index for frame in run["eiger"].follow()} == set(range(N)) - {7} - gone(plan)
        fill = np.asarray(run["eiger"].array[index])
        assert np.isnan(fill).all() or (fill == np.iinfo(fill.dtype).max).all()
        assert set(run["eiger"].where("size_bytes > 0").indices) == set(range(N)) - {7}
        assert set(run["eiger"].where(f"veto_control = '{plan.veto}'").indices) == set(plan.control)
        record = veto_of(folder, "eiger", index)
        assert (record.stage, record.plan.by, record.plan.processing) == ("done", "anna", "p1")
        assert veto_of(folder, "eiger", 0) is None

    def test_background_is_the_sum(self, folder):
        header, before = folder.stream_header("eiger"), blobs(folder)
        plan = mark_veto(folder, planned(folder))
        carry_out_veto(folder)
        frames = [
            np.stack([decode(blob, header.shape, header.dtype, header.codec) for blob in before[i]]).astype(float)
            for i in gone(plan)
        ]
        total, count, facts = read_background(folder, "v1")
        assert np.array_equal(total.reshape(frames[0].shape), sum(frames))
        assert (count == plan.n_vetoed).all()
        assert facts.n_frames == plan.n_vetoed

    def test_chunk_digest_changes_and_the_old_commit_stays(self, folder):
        paths = folder.stream("eiger")
        plan = mark_veto(folder, planned(folder))
        old = {chunk.chunk: paths.read_commit(chunk.chunk) for chunk in plan.chunks}
        carry_out_veto(folder)
        for chunk in plan.chunks:
            kept = (folder.path / "vetoes" / "v1" / "commits" / f"{chunk.chunk:05d}.json").read_bytes()
            assert type(old[chunk.chunk]).model_validate_json(kept) == old[chunk.chunk]
            assert paths.read_commit(chunk.chunk).digest != chunk.digest

    def test_a_second_veto_goes_on_from_the_first(self, folder):
        mark_veto(folder, planned(folder))
        carry_out_veto(folder)
        first = set(blobs(folder))
        plan = mark_veto(folder, planned(folder, keep_fraction=0.0))
        carry_out_veto(folder)
        assert plan.veto == "v2"
        assert set(blobs(folder)) == first - gone(plan) == WANTED | {3}
        assert verify_run(folder.path).findings == []
        assert FolderSource(folder, "eiger").ledger().problems == []

    def test_a_service_on_the_folder_takes_it_as_it_is(self, folder):
        plan = mark_veto(folder, planned(folder))
        carry_out_veto(folder)
        store = StreamStore.recover(RunFolder.open(folder.path), "eiger")
        assert store.ledger() == FolderSource(folder, "eiger").ledger()
        assert store.ledger().vetoed == plan.n_vetoed
        store.close()


class TestMarked:
    def test_planning_changes_nothing_and_gives_the_same_sample(self, folder):
        before = file_sizes(folder.path)
        assert planned(folder).control == planned(folder).control
        assert file_sizes(folder.path) == before

    def test_undone(self, folder):
        before = blobs(folder)
        mark_veto(folder, planned(folder))
        undo_veto(folder, "bert")
        assert (find_veto(folder), veto_of(folder, "eiger", 1)) == (None, None)
        with pytest.raises(VetoRefused, match="no veto to carry out"):
            carry_out_veto(folder)
        assert blobs(folder) == before

    def test_not_before_it_is_due(self, folder):
        mark_veto(folder, planned(folder, grace=timedelta(days=7)))
        with pytest.raises(VetoRefused, match="is due at"):
            carry_out_veto(folder)
        carry_out_veto(folder, now=datetime.now(UTC) + timedelta(days=8))

    def test_one_at_a_time(self, folder):
        mark_veto(folder, planned(folder))
        with pytest.raises(VetoRefused, match="undo it first"):
            mark_veto(folder, planned(folder))


class TestRefused:
    def test_live(self, tmp_path):
        store = StreamStore.create(new_folder(tmp_path), new_header())
        put(store, 0, 1)
        with pytest.raises(RunBusy):
            planned(store.folder)
        store.close()

    def test_processing_at_work(self, tmp_path):
        folder = ended(tmp_path)
        mark_veto(folder, planned(folder))
        claim = Processing(folder.path, "p2").claim()
        with pytest.raises(ProcessingBusy):
            carry_out_veto(folder)
        carry_out_veto(folder, despite_processing=True)
        os.close(claim)

    def test_frames_held(self, tmp_path):
        folder = ended(tmp_path)
        mark_veto(folder, planned(folder))
        held = hold_frames(folder.path)
        with pytest.raises(ProcessingBusy, match="being processed"):
            carry_out_veto(folder)
        os.close(held)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.campaign)])
def test_killed_or_refused_at_every_call_and_repeated(tmp_path, every):
    undisturbed = ended(tmp_path / "0")
    plan = mark_veto(undisturbed, planned(undisturbed))
    before = blobs(undisturbed)
    shutil.copytree(tmp_path / "0", tmp_path / "marked")
    with pytest.MonkeyPatch.context() as patch:
        calls = Faults(patch, tmp_path / "0")
        carry_out_veto(undisturbed)
    expected = blobs(undisturbed)
    assert len(calls.names) > 40
    for first, how in enumerate(("killed after", "refused")):
        for n in range(first, len(calls.names), every):
            name = calls.names[n]
            shutil.copytree(tmp_path / "marked", tmp_path / how / str(n))
            folder = RunFolder.open(tmp_path / how / str(n) / "lyso" / "1")
            with pytest.MonkeyPatch.context() as patch:
                Faults(patch, folder.path, n, how)
                with pytest.raises((Killed, OSError)):
                    carry_out_veto(folder)
            found = blobs(folder)
            assert expected.items() <= found.items() <= before.items(), f"{how} {n}: {name}"
            assert FolderSource(folder, "eiger").ledger().problems == []
            if find_veto(folder) is not None:
                carry_out_veto(folder)
            assert blobs(folder) == expected
            assert verify_run(folder.path).findings == [], f"{how} {n}: {name}"
            assert FolderSource(folder, "eiger").ledger().vetoed == plan.n_vetoed
            assert not list((folder.path / "vetoes").rglob(".*.shard"))


def test_reader_beside_it_sees_old_or_new(tmp_path, monkeypatch):
    """A reader that was there before, and new ones, at each step of every swap."""
    folder = ended(tmp_path)
    before, plan = blobs(folder), mark_veto(folder, planned(folder))
    old, looks = FolderSource(folder, "eiger"), []

    def look(*_) -> None:
        for source in (old, FolderSource(folder, "eiger")):
            for index, expected in before.items():
                try:
                    assert [bytes(raw.blob) for raw in source.read_parts(index)] == expected
                except FrameMissing:
                    assert index in gone(plan)
        looks.append(1)

    for name in ("replace", "sync_folder", "publish"):
        real = getattr(vetoing, name)
        monkeypatch.setattr(vetoing, name, lambda *a, real=real: (look(), real(*a), look())[1])
    worker = threading.Thread(target=carry_out_veto, args=(folder,))
    worker.start()
    worker.join()
    assert len(looks) > 20
    old._veto_due = 0.0  # a second later
    old.status()
    assert {raw.info.frame_index for raw in old.read(0, N)} == before.keys() - gone(plan)
