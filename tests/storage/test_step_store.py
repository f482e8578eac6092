"""Outputs of steps are there or not, never half; a processing has one worker."""

import errno
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pytest

from storage.errors import ProcessingBusy, RunNotFound
from storage.step_store import ChunkManifest, Processing, StepStore, find_processings

TABLES = {"frames": pa.table({"frame_index": [0, 1], "n_peaks": [5, 6]}), "peaks": pa.table({"x": [1.5]})}


def test_save_and_load(tmp_path):
    steps = StepStore(tmp_path)
    assert steps.load("abc") is None
    steps.save("abc", {"step": "find_peaks"}, TABLES)
    assert steps.load("abc") == TABLES
    assert steps.read("abc", "peaks") == TABLES["peaks"]
    assert steps.read("abc", "crystals") is None


def test_first_one_wins(tmp_path):
    steps = StepStore(tmp_path)
    steps.save("abc", {}, TABLES)
    steps.save("abc", {}, {})
    assert steps.load("abc") == TABLES


def test_many_at_once(tmp_path):
    steps = StepStore(tmp_path)
    threads = [threading.Thread(target=steps.save, args=("abc", {}, TABLES)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps.load("abc") == TABLES
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["abc"]


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    steps = StepStore(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        steps.save("abc", {}, TABLES)
    assert steps.load("abc") is None
    assert list((tmp_path / "steps").iterdir()) == []


def manifest(number: int, digest: str) -> ChunkManifest:
    return ChunkManifest(
        chunk=number, start=2 * number, stop=2 * number + 2, chunk_digest="c", steps={"find_peaks": digest},
        n_frames=2, n_hits=1, n_indexed=0,
    )  # fmt: skip


def test_tables_over_chunks(tmp_path):
    steps, processing = StepStore(tmp_path), Processing(tmp_path, "p1")
    steps.save("a", {}, TABLES)
    steps.save("b", {}, {"frames": TABLES["frames"]})
    processing.add_chunk(manifest(1, "b"))
    processing.add_chunk(manifest(0, "a"))
    assert [c.chunk for c in processing.chunks()] == [0, 1]
    assert processing.frames.num_rows == 4
    assert processing.peaks.num_rows == 1
    with pytest.raises(KeyError, match="no table 'crystals'"):
        processing.table("crystals")


def test_unknown_processing(tmp_path):
    assert find_processings(tmp_path) == {}
    with pytest.raises(RunNotFound, match="no processing p7"):
        _ = Processing(tmp_path, "p7").manifest


def test_claim_ends_with_the_process(tmp_path):
    script = """
import sys; from pathlib import Path; from storage.step_store import Processing
Processing(Path(sys.argv[1]), "p1").claim(); print("claimed", flush=True); sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        worker.stdout.readline()
        with pytest.raises(ProcessingBusy, match=f"being worked on by pid {worker.pid}"):
            Processing(tmp_path, "p1").claim()
        worker.kill()
        worker.wait()
    assert Processing(tmp_path, "p1").claim() > 0


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_output_counts_as_not_computed(tmp_path, damage):
    steps = StepStore(tmp_path)
    steps.save("abc", {}, TABLES)
    table = tmp_path / "steps" / "abc" / "peaks.parquet"
    if damage == "missing":
        table.unlink()
    else:
        table.write_bytes(table.read_bytes()[:20])
    assert steps.load("abc") is None
    steps.save("abc", {}, TABLES)
    assert steps.load("abc") == TABLES


def test_who_works_on_a_processing_can_be_asked(tmp_path):
    processing = Processing(tmp_path, "p1")
    assert not processing.is_claimed
    assert processing.claimed_by is None
    claim = processing.claim("0123")
    assert processing.is_claimed
    assert processing.claimed_by.pid == os.getpid()
    assert processing.claimed_by.flow_run_id == "0123"
    with pytest.raises(ProcessingBusy, match=f"pid {os.getpid()} on .*flow run 0123"):
        Processing(tmp_path, "p1").claim()
    os.close(claim)
    assert not processing.is_claimed


def test_asking_does_not_keep_anybody_from_claiming(tmp_path):
    processing = Processing(tmp_path, "p1")
    os.close(processing.claim())
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            processing.is_claimed  # noqa: B018

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(50):
            os.close(Processing(tmp_path, "p1").claim())
    finally:
        stop.set()
        for asker in askers:
            asker.join()
