"""The supervisor in a process of its own, with programs that die, linger and leave others behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUPERVISOR = """
import json, os, signal, sys, threading
from pathlib import Path
from nearline.supervisor import Program, Supervisor

stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
supervisor = Supervisor(dict(os.environ), Path(sys.argv[1]))
for name, *command in json.loads(sys.argv[2]):
    niceness = 7 if name == "nice" else 0
    supervisor.start(Program(name, tuple(command), patience_s=20, niceness=niceness))
while not stop.wait(0.05):
    for words in supervisor.look():
        print(words, flush=True)
    said = [[s.name, s.state, s.pid, s.n_restarts] for s in supervisor.statuses()]
    print(json.dumps(said), flush=True)
supervisor.stop_all()
print("down", flush=True)
"""
# Starts a program in a session of its own, as a Prefect worker does, and waits.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


class Supervised:
    """A supervisor under test, and what it has said."""

    def __init__(self, folder: Path, programs: list[list[str]]) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(HERE.parents[1])])}
        self.logs = folder / "logs"
        command = [sys.executable, "-c", SUPERVISOR, str(self.logs), json.dumps(programs)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said: list[str] = []

    def wait_for(self, is_there, timeout: float = 30.0) -> list:
        """The first status for which that holds."""
        deadline = time.monotonic() + timeout
        assert self.process.stdout is not None
        while time.monotonic() < deadline:
            line = self.process.stdout.readline()
            assert line, f"the supervisor has ended: {self.said}"
            if not line.startswith("[["):
                self.said.append(line.strip())
                continue
            if is_there(found := json.loads(line)):
                return found
        raise AssertionError(f"not in {timeout} s; {self.said}")

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=60)[0]


@pytest.fixture
def supervise(tmp_path):
    """Starts a supervisor of modules that are given by their source."""
    started = []

    def start(**sources: str) -> Supervised:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        started.append(Supervised(tmp_path, [[name, name] for name in sources]))
        return started[-1]

    yield start
    for supervised in started:
        supervised.process.kill()
        supervised.process.communicate()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def first_number(log: Path) -> int:
    deadline = time.monotonic() + 20
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(log.read_text().split()[0])


def test_what_dies_is_started_again_and_nothing_is_left(supervise):
    supervised = supervise(steady="import time; time.sleep(600)", other="import time; time.sleep(600)")
    ((_, state, pid, _), (*_, other, _)) = supervised.wait_for(lambda found: len(found) == 2)
    assert state == "running"
    os.kill(pid, signal.SIGKILL)
    again = supervised.wait_for(lambda found: found[0][3] == 1)
    assert again[0][2] != pid
    assert again[1][2] == other, "who has not died is left alone"
    assert any("steady was ended by SIGKILL" in words for words in supervised.said)
    assert supervised.stop().endswith("down\n")
    assert not any(map(is_running, (again[0][2], other)))


def test_pauses_between_starts_grow(supervise):
    dies = "import time; time.sleep(0.3); 1/0"
    supervised = supervise(dies=dies)
    supervised.wait_for(lambda found: found[0][3] == 2)
    pauses = [words.split("again in ")[1].split(" s")[0] for words in supervised.said if "again in" in words]
    assert pauses == ["1", "2"]
    assert "ZeroDivisionError" in "".join(supervised.said), "the last words are told"


def test_what_a_killed_worker_leaves_works_on_and_ends_with_us(supervise):
    supervised = supervise(worker=PARENT)
    ((_, _, worker, _),) = supervised.wait_for(lambda found: found[0][1] == "running")
    orphan = first_number(supervised.logs / "worker.log")
    os.kill(worker, signal.SIGKILL)
    supervised.wait_for(lambda found: found[0][3] == 1)
    assert is_running(orphan)
    supervised.stop()
    assert not is_running(orphan)


def test_what_gives_way_runs_with_its_niceness_and_the_rest_without(supervise):
    says = "import os, time; print(os.nice(0), flush=True); time.sleep(600)"
    supervised = supervise(nice=says, usual=says)
    supervised.wait_for(lambda found: len(found) == 2)
    nice, usual = (first_number(supervised.logs / f"{name}.log") for name in ("nice", "usual"))
    assert nice == min(usual + 7, 19)


def test_all_end_when_the_supervisor_is_killed(supervise):
    supervised = supervise(steady="import time; time.sleep(600)")
    ((_, _, pid, _),) = supervised.wait_for(lambda found: found[0][1] == "running")
    supervised.process.kill()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_program_that_cannot_start_says_why(tmp_path):
    code = """
import os, sys
from pathlib import Path
from nearline.supervisor import Program, Supervisor
from nearline.children import ChildFailed
try:
    Supervisor(dict(os.environ), Path(sys.argv[1])).start(Program("broken", ("no_such_module",), lambda: False))
except ChildFailed as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "broken ended with exit code 1" in done.stdout
    assert "No module named no_such_module" in done.stdout
