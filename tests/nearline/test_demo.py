"""The demo as a stranger runs it: one command, in a process of its own, with everything real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import nearline
from storage.stream_source import state_of
from tests.real_data import THAUMATIN, needs_thaumatin


def _hear_interrupts() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, tests and their children too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def demo(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "nearline.cli", "demo", "--folder", str(folder), *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_hear_interrupts,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of live processes that name the folder, or whose environment does."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            content = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            is_zombie = (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if str(folder).encode() in content and not is_zombie and int(path.name) != os.getpid():
            found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def test_simulated_run_travels_the_whole_way(tmp_path):
    process = demo(tmp_path, "--size", "1M", "--frames", "60", "--rate", "20", "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["ledger"]["is_balanced"]
    assert result["ledger"]["stored"] == 60
    assert result["hits"]["found"] >= 0.95 * result["hits"]["true"] > 0
    assert result["indexed"]["correct"] >= 0.9 * result["hits"]["found"]
    assert [frame["frame_index"] for frame in result["frames"]] == list(range(60))
    assert all(Path(path).stat().st_size for path in result["files"].values())
    assert result["flow_run_url"].startswith("http://127.0.0.1:")
    assert processes_of(tmp_path) == []


@needs_thaumatin
@pytest.mark.campaign
def test_real_stills_index(tmp_path):
    cell = ["--cell", "58.4,58.4,152.3,90,90,90", "--space-group", "P 41 21 2"]
    process = demo(tmp_path, "--real", str(THAUMATIN), *cell, "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert [frame["hit"] for frame in result["frames"]] == [True, True, True, False]
    for frame in result["frames"][:3]:
        assert np.allclose(frame["cell"][:3], [58.4, 58.4, 152.3], rtol=0.01)


@pytest.mark.parametrize("seconds", [3.0, *(pytest.param(s, marks=pytest.mark.campaign) for s in (0.5, 9.0, 15.0))])
def test_interrupt_leaves_nothing_behind(tmp_path, seconds):
    process = demo(tmp_path, "--size", "1M", "--frames", "400", "--rate", "20")
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert processes_of(tmp_path) == []
    run = tmp_path / "data" / "lysozyme" / "1"
    if (run / "eiger.stream.json").exists():
        stream = nearline.open(run)["eiger"]
        assert stream.ledger().is_balanced
        assert all(frame.data.shape == stream.header.shape for frame in stream)


def test_killed_demo_leaves_nothing_behind(tmp_path):
    process = demo(tmp_path, "--size", "1M", "--frames", "400", "--rate", "20")
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=9)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    deadline = time.monotonic() + 20
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(tmp_path) == []


@pytest.mark.campaign
def test_state_of_an_interrupted_run_is_terminal(tmp_path):
    process = demo(tmp_path, "--size", "1M", "--frames", "4000", "--rate", "20")
    run = tmp_path / "data" / "lysozyme" / "1"
    deadline = time.monotonic() + 60
    while not list(run.glob("eiger.chunks/*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    opened = nearline.open(run)
    assert state_of_folder(run).is_terminal
    assert len(list(opened["eiger"].follow())) == opened["eiger"].ledger().stored > 0


def state_of_folder(run: Path):
    from storage.run_folder import RunFolder

    return state_of(RunFolder.open(run))
