"""`nearline up` as a user starts it: real server, service, workers; runs are processed, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nearline.children import free_port
from nearline.prefect_server import is_healthy
from storage.step_store import find_processings
from streaming.simulator import SimulatorSettings, simulate

STEPS = [{"use": "find_peaks"}, {"use": "tests.flows.own_steps:noted"}]


class UnderUp:
    """An experiment that `nearline up` looks after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.detector = f"tcp://127.0.0.1:{free_port()}"
        self.prefect_port = free_port()
        content = {
            "experiment": "lyso", "beamline": "simulated", "data_sources": [{"endpoint": self.detector}],
            "recipes": {"r": {"steps": STEPS}},
            "deployment": {
                "root": "data", "service": {"address": f"tcp://127.0.0.1:{free_port()}"},
                "prefect": {"port": self.prefect_port, "home": "prefect"},
                "environment": {"DIARY": str(folder / "diary")},
            },
        }  # fmt: skip
        self.file = folder / "experiment.yaml"
        self.file.write_text(yaml.safe_dump(content))
        self.said: list[dict[str, Any]] = []
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nearline.cli", "up", str(self.file), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            # Started in the background by a shell, we ignore it, and so would it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def wait(self, is_so: Callable[[], Any], what: str, timeout: float = 120.0) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := is_so()):
            if self.process.poll() is not None:
                raise AssertionError(f"`nearline up` has ended: {self.process.stderr.read()[-3000:]}")  # type: ignore[union-attr]
            assert time.monotonic() < deadline, f"{what}: {self._last_words()}"
            time.sleep(0.2)
        return found

    def wait_for_words(self, words: str) -> None:
        self.wait(lambda: any(words in entry["said"] for entry in self.said), words)

    def pid(self, program: str) -> int:
        found = next(p for p in self.said[-1]["programs"] if p["name"] == program)
        return int(found["pid"])

    def take_run(self, n_frames: int = 40) -> None:
        """Ten frames a second, in chunks of ten."""
        settings = SimulatorSettings(
            size="512",
            n_frames=n_frames,
            bind=self.detector,
            experiment="lyso",
            hit_fraction=0.3,
            frame_time=0.2,
            rate=10,
        )
        simulate(settings)

    def n_processed(self, run: int) -> int:
        """Frames in the finished processing of a run; 0 while there is none."""
        processings = find_processings(self.folder / "data" / "lyso" / str(run)).values()
        finished = [p for p in processings if p.is_finished]
        assert len(finished) < 2, "it was processed twice"
        return sum(chunk.n_frames for chunk in finished[0].chunks()) if finished else 0

    def is_begun(self, run: int) -> bool:
        """Whether some chunk of it is processed, and not all."""
        processings = find_processings(self.folder / "data" / "lyso" / str(run)).values()
        return any(next(p.chunks(), None) and not p.is_finished for p in processings)

    def flow_pid(self, run: int) -> int:
        """The process that works on a run."""
        (processing,) = find_processings(self.folder / "data" / "lyso" / str(run)).values()
        assert processing.is_claimed
        return processing.claimed_by.pid  # type: ignore[union-attr]

    def restarts(self) -> Counter[str]:
        """How often each program was said to be started again."""
        words = (entry["said"].partition(" is started again (pid") for entry in self.said)
        return Counter(name.split()[-1] for name, found, _ in words if found)

    def diary(self) -> Counter[str]:
        """How often each chunk has been begun, and done, since this was last asked."""
        path = self.folder / "diary"
        lines = path.read_text().splitlines()
        path.unlink()
        return Counter(lines)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(90)

    def _last_words(self) -> str:
        logs = sorted((self.folder / "data" / ".up" / "logs").glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs) + str(self.said[-5:])


@pytest.fixture
def under_up(tmp_path):
    started = UnderUp(tmp_path)
    yield started
    started.stop()
    assert started.process.stdout is not None
    assert started.process.stderr is not None
    started.process.stdout.close()
    started.process.stderr.close()


def programs_of(folder: Path) -> list[int]:
    """Processes that have this folder on their command line, or are flow runs told of it."""
    mark, found = str(folder).encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.joinpath("cmdline").read_bytes() and (
                mark in path.joinpath("cmdline").read_bytes() or mark in path.joinpath("environ").read_bytes()
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


FLOW_RUN = "flow run"
VICTIMS = ((FLOW_RUN,), ("worker-live",), ("prefect",), ("worker-live", "prefect"))
CHUNKS = {f"{word} {first}" for word in ("begun", "done") for first in range(0, 40, 10)}


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_runs_are_processed_whoever_is_killed(under_up):
    """Flow run, worker, server, and worker and server at once, each killed while a run is processed."""
    up = under_up
    up.wait_for_words("everything is up")
    assert is_healthy(f"http://127.0.0.1:{up.prefect_port}/api")

    n_killed: Counter[str] = Counter()
    for run, victims in enumerate(VICTIMS, 1):
        up.take_run()
        up.wait(lambda run=run: up.is_begun(run), f"run {run} is processed")
        for name in victims:
            os.kill(up.flow_pid(run) if name == FLOW_RUN else up.pid(name), signal.SIGKILL)
        up.wait(lambda run=run: up.n_processed(run) == 40, f"run {run} is processed although {victims} were killed")
        diary = up.diary()
        assert set(diary) == CHUNKS
        # One at a time: only what was under way may be begun anew.
        assert sum(diary.values()) <= len(CHUNKS) + 1, diary
        n_killed.update(name for name in victims if name != FLOW_RUN)
        up.wait(lambda: not n_killed - up.restarts(), f"{n_killed} are started again")
        up.wait(lambda: is_healthy(f"http://127.0.0.1:{up.prefect_port}/api"), "the server is back")

    assert len(programs_of(up.folder)) > 4
    assert up.stop() == 0
    assert programs_of(up.folder) == []


@pytest.mark.timeout(280)
def test_a_second_one_is_refused_and_down_ends_the_first(under_up, tmp_path):
    under_up.wait_for_words("starting service")
    command = [sys.executable, "-m", "nearline.cli"]
    second = subprocess.run([*command, "up", str(under_up.file)], capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert f"pid {under_up.process.pid}" in " ".join(second.stderr.split())
    done = subprocess.run([*command, "down", str(under_up.file)], capture_output=True, text=True, timeout=200)
    assert "everything is down" in done.stdout
    assert under_up.process.wait(10) == 0
    again = subprocess.run([*command, "down", str(under_up.file)], capture_output=True, text=True, timeout=60)
    assert "nothing is up" in again.stdout
