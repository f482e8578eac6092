"""Outputs of steps are there or not, never half; a processing has one worker."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

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
        assert Processing(tmp_path, "p1").is_claimed
        worker.kill()
        worker.wait()
    assert not Processing(tmp_path, "p1").is_claimed
    assert Processing(tmp_path, "p1").claim() > 0


def test_a_claim_says_whose_it_is(tmp_path):
    processing = Processing(tmp_path, "p1")
    assert (processing.claimed_by, processing.is_claimed) == (None, False)
    (tmp_path / "processed" / "p1").mkdir(parents=True)
    # Written by an earlier version, and longer than what takes its place may be.
    (tmp_path / "processed" / "p1" / "claim").write_text("pid 17" + " " * 500)
    assert processing.claimed_by is None
    before = datetime.now(UTC)
    fd = processing.claim("0198-flow")
    who = json.loads((tmp_path / "processed" / "p1" / "claim").read_bytes())
    assert set(who) == {"pid", "host", "flow_run_id", "since"}
    claim = processing.claimed_by
    assert (claim.pid, claim.host, claim.flow_run_id) == (os.getpid(), socket.gethostname(), "0198-flow")
    assert before <= claim.since <= datetime.now(UTC)
    with pytest.raises(ProcessingBusy, match=rf"pid {os.getpid()} on {socket.gethostname()}, flow run 0198-flow"):
        processing.claim()
    os.close(fd)
    assert processing.claimed_by == claim
    assert not processing.is_claimed


def test_a_claim_waits_for_whoever_asks(tmp_path):
    """Somebody who looks at the lock holds it for an instant; that is no reason to give up."""
    processing = Processing(tmp_path, "p1")
    os.close(processing.claim())
    looking = os.open(tmp_path / "processed" / "p1" / "claim", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    with ThreadPoolExecutor(1) as threads:
        claim = threads.submit(processing.claim)
        time.sleep(0.05)
        os.close(looking)
        assert claim.result() > 0


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
