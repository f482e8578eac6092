"""Why a frame is not there is known after `kill -9`, too."""

import errno
import os
import time

import pytest

from storage.account_log import AccountLog
from storage.journal import Account
from storage.states import FrameState
from storage.stream_source import FolderSource
from storage.stream_store import StreamStore

from .stores import new_store, put, reopened


def ranges(source: StreamStore | FolderSource) -> list[tuple]:
    return [(r.state, r.start, r.stop, r.cause) for r in source.ledger().ranges]


def test_causes_survive_a_crash(tmp_path):
    store = new_store(tmp_path)
    put(store, 0, 5, 9)
    store.account(1, 3, FrameState.missing, "not received")
    store.account(6, 7, FrameState.rejected, "bad shape")
    store.account(0, 8, FrameState.missing, "lost while the service was down")
    put(store, 2)
    wanted = ranges(store)
    assert wanted == [
        ("missing", 1, 2, "not received"),
        ("missing", 3, 5, "lost while the service was down"),
        ("rejected", 6, 7, "bad shape"),
        ("missing", 7, 8, "lost while the service was down"),
    ]
    assert ranges(FolderSource(store.folder, "eiger")) == wanted
    store = reopened(store)
    assert store.states.indices(FrameState.pending).tolist() == [8]
    assert ranges(store) == ranges(FolderSource(store.folder, "eiger")) == wanted
    store.finish(0, "end")
    assert ranges(reopened(store)) == [*wanted, ("missing", 8, 9, "end")]
    assert not store.paths.accounts.exists()


def test_wide_gap_costs_one_record(tmp_path):
    store = new_store(tmp_path)
    put(store, 0, 100_000)
    started = time.perf_counter()
    store.account(1, 100_000, FrameState.missing, "not received")
    assert time.perf_counter() - started < 0.5
    assert len(list(store.paths.journal.iterdir())) == 3
    assert store.paths.accounts.stat().st_size < 200
    source = FolderSource(store.folder, "eiger")
    assert source.ledger().missing == 99_999


def test_reader_follows_accounts(tmp_path, monkeypatch):
    monkeypatch.setattr("storage.account_log._LARGEST_BYTES", 300)
    store = new_store(tmp_path)
    source = FolderSource(store.folder, "eiger")
    for index in range(0, 60, 2):
        put(store, index)
        store.account(index + 1, index + 2, FrameState.missing, f"cause {index}")
        if index % 8 == 6:
            store.seal_complete()
        assert ranges(source) == ranges(store)
    assert store.paths.accounts.stat().st_size < 600, "what commits say is dropped from it"


@pytest.mark.parametrize("n_sealed", [0, 2])
def test_a_shorter_log_says_what_is_needed(tmp_path, n_sealed):
    log = AccountLog(tmp_path / "accounts.journal")
    for start in range(0, 40, 4):
        log.add(Account([(start, start + 2)], "missing", "x" * 50))
    before = log.path.stat().st_size
    log.shorten(8 * n_sealed)
    assert log.path.stat().st_size == pytest.approx(before * (10 - 2 * n_sealed) / 10, abs=3)
    log.add(Account([(50, 51)], "rejected", "y"))
    kept = [account.ranges[0][0] for account in AccountLog(log.path).recover()]
    assert kept == [*range(8 * n_sealed, 40, 4), 50]


def test_full_disk_does_not_keep_a_gap_from_being_declared(tmp_path, monkeypatch, caplog):
    store = new_store(tmp_path)
    put(store, 0, 5)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        store.account(1, 2, FrameState.missing, "first")
    assert ranges(store) == [("missing", 1, 2, "first")]
    assert "causes of 1 gaps are in memory only" in caplog.text
    store.account(2, 3, FrameState.missing, "second")
    assert ranges(reopened(store)) == [("missing", 1, 2, "first"), ("missing", 2, 3, "second")]
