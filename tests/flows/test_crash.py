"""`kill -9` of the service in the middle of a run: it comes back, the run goes on and is processed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flows.run_processing import ProcessRequest, run_processing
from nearline.children import free_port
from storage.errors import NearlineError
from streaming.client import is_reachable
from streaming.retrieval import open_run
from streaming.simulator import SimulatorSettings

N_FRAMES = 120


def serve(root: Path, address: str, detector: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "nearline.cli", "serve", "--root", str(root), "--bind", address]
    process = subprocess.Popen(
        [*command, "--source", f"eiger={detector}", "--gap-timeout", "1", "--idle-timeout", "20"],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not is_reachable(address):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def wait_for(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := condition():
                return result
        except NearlineError:
            pass
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.timeout(200)
def test_killed_service_goes_on_with_the_run(tmp_path, recipe):
    kill_and_go_on(tmp_path, recipe, at_frame=40)


@pytest.mark.campaign
@pytest.mark.timeout(200)
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_any_moment(tmp_path, recipe, seed):
    kill_and_go_on(tmp_path, recipe, at_frame=random.Random(seed).randrange(1, 90))


def kill_and_go_on(tmp_path, recipe, at_frame: int) -> None:
    """Kill the service once that frame is stored, start it again, and hold it to what it had promised."""
    address, detector = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    service = serve(tmp_path, address, detector)
    command = [sys.executable, "-m", "nearline.cli", "simulate", "--size", "1M", "--frames", str(N_FRAMES)]
    sending = subprocess.Popen(
        [*command, "--rate", "15", "--bind", detector, "--experiment", "lyso"], stderr=subprocess.DEVNULL
    )
    try:
        run = wait_for(lambda: open_run(f"{address}/lyso/1"))
        wait_for(lambda: "eiger" in run and run["eiger"].status.watermark >= at_frame)
        stored = [(frame.frame_index, bytes(frame.blob)) for frame in run["eiger"]]
        os.kill(service.pid, signal.SIGKILL)
        service.wait()
        time.sleep(0.5)
        service = serve(tmp_path, address, detector)
        again = open_run(f"{address}/lyso/1")
        wait_for(lambda: again.state.is_terminal)
        stream = again["eiger"]
        assert [(i, bytes(stream[i].blob)) for i, _ in stored] == stored
        ledger = stream.ledger()
        assert ledger.is_balanced, ledger.problems
        assert ledger.stored > len(stored), "frames sent after the restart belong to the same run"
        assert all(part.cause for part in ledger.ranges)
        assert (tmp_path / "lyso" / "2").exists() is False
        summary = run_processing(ProcessRequest(run="lyso/1", recipe=recipe.model_dump(mode="json"), service=address))
        assert summary["frames"] == ledger.stored
        assert summary["indexed"] > 0
        simulator = SimulatorSettings(size="1M", n_frames=N_FRAMES, hit_fraction=0.3, rate=15).simulator()
        assert np.array_equal(stream[stored[0][0]].data, simulator.frame(stored[0][0])[0])
    finally:
        sending.kill()
        sending.wait()
        service.send_signal(signal.SIGTERM)
        assert service.wait(20) == 0
