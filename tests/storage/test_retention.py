"""Deleted runs stay accounted for; policies choose by age, and never what is live or new."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

import nearline
from storage import retention
from storage.errors import FrameMissing, ProcessingBusy, RunBusy, StreamOwned
from storage.files import file_sizes, to_path
from storage.models import RunState
from storage.retention import RetentionPolicy, RunAge, apply_policy, delete_run, parse_age, select_runs
from storage.run_folder import RunFolder, claim_stream
from storage.step_store import Processing, StepStore
from storage.stream_store import StreamStore
from storage.upload import upload_run

from .stores import new_folder, new_header, put

NOW = datetime(2026, 11, 1, tzinfo=UTC)
KEPT = {"run.json", "events", "eiger.stream.json", "eiger.chunks", "eiger.claims"}


def ended(root, run: int = 1) -> RunFolder:
    folder = new_folder(root, run)
    store = StreamStore.create(folder, new_header(run=run))
    put(store, 0, 1, 2, 4, 5)
    store.finish(7, "lost")
    store.close()
    StepStore(folder.path).save("abc", {"step": "x"}, {})
    folder.add_event("run_finished", {"state": "incomplete"})
    return folder


def tops(folder: RunFolder) -> set[str]:
    return {name.partition("/")[0] for name in file_sizes(folder.path)}


@pytest.fixture(params=["folder", "memory", "s3"])
def run(request, tmp_path) -> RunFolder:
    folder = ended(tmp_path)
    if request.param == "folder":
        return folder
    url = request.getfixturevalue("bucket") if request.param == "s3" else f"memory://{tmp_path.name}"
    return RunFolder.open(upload_run(folder, to_path(url)).target)


class TestDeleting:
    def test_leaves_header_events_and_ledger(self, run):
        before = nearline.open(run.path)["eiger"].ledger()
        n_bytes = sum(size for name, size in file_sizes(run.path).items() if name.partition("/")[0] not in KEPT)
        deleted = delete_run(run, "anna", "wrong sample")
        assert deleted.n_bytes == n_bytes
        assert tops(run) == KEPT
        assert run.state is RunState.deleted
        opened = nearline.open(run.path)
        assert (opened.state, opened.header) == (RunState.deleted, run.header)
        after = opened["eiger"].ledger()
        assert (after.stored, after.pruned) == (0, before.stored)
        assert after.is_balanced
        assert (after.missing, after.ranges) == (before.missing, before.ranges)

    def test_reading_a_deleted_frame_says_so(self, run):
        delete_run(run, "anna", "wrong sample")
        eiger = nearline.open(run.path)["eiger"]
        with pytest.raises(FrameMissing, match=r"frame 4 of lyso/1/eiger was deleted by anna .*wrong sample"):
            eiger[4]
        with pytest.raises(FrameMissing, match="frame 3 of lyso/1/eiger is missing"):
            eiger[3]
        assert list(eiger) == list(eiger.follow()) == []
        assert len(eiger) == 7

    def test_again_removes_nothing_and_records_nothing(self, run):
        delete_run(run, "anna", "wrong sample")
        assert delete_run(run, "bert", "again").n_files == 0
        assert [event.payload["by"] for event in run.events("run_deleted")] == ["anna"]

    @pytest.mark.parametrize("n_removed", range(4))
    def test_interrupted_it_is_completed_by_the_next(self, tmp_path, n_removed, monkeypatch):
        folder, remove, done = ended(tmp_path), retention.remove, []

        def remove_some(path):
            if len(done) == n_removed:
                raise OSError(5, "power loss")
            done.append(path)
            remove(path)

        monkeypatch.setattr(retention, "remove", remove_some)
        with pytest.raises(OSError, match="power loss"):
            delete_run(folder, "anna", "wrong sample")
        monkeypatch.undo()
        assert folder.state is RunState.deleted
        assert nearline.open(folder.path)["eiger"].ledger().pruned == 5
        delete_run(folder, "anna", "wrong sample")
        assert tops(folder) == KEPT
        assert nearline.open(folder.path)["eiger"].ledger().pruned == 5


class TestRefusals:
    def test_live_run(self, tmp_path):
        store = StreamStore.create(new_folder(tmp_path), new_header())
        put(store, 0)
        with pytest.raises(RunBusy, match="is live"):
            delete_run(store.folder, "anna", "")
        assert store.read(0)
        store.close()

    def test_a_writer_of_an_ended_run(self, tmp_path):
        folder = ended(tmp_path)
        _, lock = claim_stream(folder.stream("eiger"), "somebody")
        with pytest.raises(StreamOwned, match="somebody"):
            delete_run(folder, "anna", "")
        os.close(lock)
        assert not list(folder.events("run_deleted"))

    def test_a_processing_at_work(self, tmp_path):
        folder = ended(tmp_path)
        claim = Processing(folder.path, "p1").claim()
        with pytest.raises(ProcessingBusy, match="p1"):
            delete_run(folder, "anna", "")
        os.close(claim)
        assert not list(folder.events("run_deleted"))

    def test_an_interrupted_run_may_go(self, tmp_path):
        """Its service died: nobody writes it. While it is deleted nobody can take it up."""
        store = StreamStore.create(new_folder(tmp_path), new_header())
        put(store, 0, 1)
        store.close()
        delete_run(store.folder, "anna", "")
        assert tops(store.folder) <= KEPT
        assert nearline.open(store.folder.path)["eiger"].ledger().pruned == 2

    def test_a_damaged_run_may_go(self, tmp_path, caplog):
        folder = ended(tmp_path)
        (folder.path / "eiger.chunks" / "00000.json").write_text("{")
        delete_run(folder, "anna", "damaged")
        assert tops(folder) == KEPT
        assert "the ledger of eiger is not kept" in caplog.text


KILLED = """
import os, sys
from storage import retention
from storage.run_folder import RunFolder
remove, left = retention.remove, int(sys.argv[2])
def remove_some(path):
    global left
    if not left:
        os.kill(os.getpid(), 9)
    left -= 1
    remove(path)
retention.remove = remove_some
retention.delete_run(RunFolder.open(sys.argv[1]), "anna", "wrong sample")
"""


def test_killed_in_the_middle_a_policy_completes_it(tmp_path):
    folder = ended(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder.path), "1"])
    assert done.returncode == -9
    assert tops(folder) > KEPT
    result = apply_policy(tmp_path, RetentionPolicy(older_than=timedelta(days=999)), datetime.now(UTC), "cron")
    assert result.selected == ["lyso/1"]
    assert tops(folder) == KEPT


# ---- policies -----------------------------------------------------------------------------------


def aged(run: int, days: float | None, experiment: str = "lyso", **facts) -> RunAge:
    """A run that ended so many days ago, or has not; run numbers rise with time."""
    started = NOW - timedelta(days=100 - run)
    ended_at = None if days is None else NOW - timedelta(days=days)
    state = facts.pop("state", RunState.live if days is None else RunState.completed)
    return RunAge(experiment, run, started, ended_at, state, **facts)


RUNS = [
    aged(1, 40),
    aged(2, 31, is_uploaded=True),
    aged(3, 29.9),
    aged(4, None),
    aged(5, 50, state=RunState.deleted),
    aged(1, 60, "ferri"),
    aged(2, 45, "ferri", state=RunState.aborted),
]
POLICIES = {
    "nothing said": ({}, ["lyso/1", "ferri/1", "lyso/2", "ferri/2", "lyso/3"]),
    "30 days": ({"older_than": timedelta(days=30)}, ["lyso/1", "ferri/1", "lyso/2", "ferri/2"]),
    "exactly so old": ({"older_than": timedelta(days=40)}, ["lyso/1", "ferri/1", "ferri/2"]),
    "one experiment": ({"older_than": timedelta(days=30), "experiment": "ferri"}, ["ferri/1", "ferri/2"]),
    "keep one, the live one": ({"keep_last": 1}, ["lyso/1", "ferri/1", "lyso/2", "lyso/3"]),
    "keep three": ({"keep_last": 3}, ["lyso/1"]),
    "keep many": ({"keep_last": 9}, []),
    "old, but the last two": ({"older_than": timedelta(days=30), "keep_last": 2}, ["lyso/1", "lyso/2"]),
    "uploaded": ({"only_uploaded": True}, ["lyso/2"]),
    "another experiment": ({"experiment": "insulin"}, []),
}


@pytest.mark.parametrize(("policy", "expected"), POLICIES.values(), ids=POLICIES)
def test_policy(policy, expected):
    chosen = select_runs(RUNS, RetentionPolicy(**policy), NOW)
    assert sorted(run.name for run in chosen) == sorted(expected)
    assert [run.started_at for run in chosen] == sorted(run.started_at for run in chosen)


AGES = {"30d": 30 * 24, "12h": 12, "2w": 14 * 24, "90min": 1.5, "1.5d": 36}


@pytest.mark.parametrize(("text", "hours"), AGES.items())
def test_age(text, hours):
    assert parse_age(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "3 years", "1e3d"])
def test_no_age(text):
    with pytest.raises(ValueError, match="is not an age"):
        parse_age(text)


class TestApplying:
    def test_dry_run_touches_nothing(self, tmp_path):
        folders = [ended(tmp_path, n) for n in (1, 2)]
        before = [tops(f) for f in folders]
        result = apply_policy(tmp_path, RetentionPolicy(), datetime.now(UTC), "cron", dry_run=True)
        assert (result.selected, result.deleted) == (["lyso/1", "lyso/2"], [])
        assert [tops(f) for f in folders] == before

    def test_one_that_cannot_go_does_not_hold_up_the_others(self, tmp_path):
        folders = {n: ended(tmp_path, n) for n in (1, 2, 3)}
        _, lock = claim_stream(folders[2].stream("eiger"), "somebody")
        (folders[3].path / "events" / "000003-run_finished.json").write_text("{")
        result = apply_policy(tmp_path, RetentionPolicy(), datetime.now(UTC), "cron")
        os.close(lock)
        assert [deleted.run for deleted in result.deleted] == ["lyso/1"]
        assert result.refused.keys() == {"lyso/2", "lyso/3"}
        assert tops(folders[1]) == KEPT
        assert "retention" in next(folders[1].events("run_deleted")).payload["why"]

    def test_nothing_twice(self, tmp_path):
        ended(tmp_path)
        now = datetime.now(UTC)
        assert len(apply_policy(tmp_path, RetentionPolicy(), now, "cron").deleted) == 1
        assert apply_policy(tmp_path, RetentionPolicy(), now, "cron").selected == []
