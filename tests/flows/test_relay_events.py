"""The relay under a real Prefect server: nothing lost and nothing twice, whoever is killed or away."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime

import pytest

from nearline.children import free_port
from storage.models import RunHeader
from storage.run_folder import RunFolder
from streaming.outbox import Outbox, OutboxReader, outbox_folder
from tests.flows.conftest import PrefectServer


@pytest.fixture
def outbox(tmp_path):
    outbox = Outbox(tmp_path, lambda: "tcp://127.0.0.1:5600")
    outbox.start()
    yield outbox
    outbox.stop()


def take_runs(outbox: Outbox, root, experiment: str, numbers: range) -> None:
    before = outbox.status()["told"]
    for run in numbers:
        folder = RunFolder.create(root, RunHeader(experiment=experiment, run=run, started_at=datetime.now(UTC)))
        folder.add_event("run_finished", {"state": "completed", "cause": None})
        outbox.run_changed(folder)
    deadline = time.monotonic() + 10
    while outbox.status()["told"] < before + 2 * len(numbers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def relay(root, server: PrefectServer, *options: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "nearline.cli", "relay", "--root", str(root), *options]
    return subprocess.Popen(command, env=server.environment, stderr=subprocess.PIPE)


def events_of(server: PrefectServer, experiment: str) -> list[dict]:
    wanted = {"filter": {"resource": {"id_prefix": [f"nearline.run.{experiment}."]}, "order": "ASC"}, "limit": 50}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/api/events/filter",
        json.dumps(wanted).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)["events"]


def finish(process: "subprocess.Popen[bytes]") -> str:
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said.decode()
    return said.decode()


@pytest.mark.timeout(120)
def test_killed_relay_loses_and_repeats_nothing(outbox, tmp_path, prefect_server):
    take_runs(outbox, tmp_path, "killed", range(1, 6))
    first = relay(tmp_path, prefect_server)
    deadline = time.monotonic() + 60  # the program alone takes some seconds to begin on a busy machine
    while not events_of(prefect_server, "killed"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    take_runs(outbox, tmp_path, "killed", range(6, 11))
    finish(relay(tmp_path, prefect_server, "--once"))
    (outbox_folder(tmp_path) / "relay.json").unlink()  # even without its place it tells nothing twice
    finish(relay(tmp_path, prefect_server, "--once"))
    events = events_of(prefect_server, "killed")
    assert sorted(e["id"] for e in events) == sorted(f.id for f in OutboxReader(tmp_path).facts())
    assert {e["event"] for e in events} == {"nearline.run.started", "nearline.run.finished"}
    event = next(e for e in events if e["resource"]["prefect.resource.id"] == "nearline.run.killed.7")
    assert event["resource"]["prefect.resource.name"] == event["payload"]["name"] == "killed/7"
    assert event["payload"]["run"] == 7
    assert event["payload"]["root"] == str(tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(60)
def test_absent_server_is_waited_for_and_a_stop_is_quick(outbox, tmp_path, prefect_server):
    take_runs(outbox, tmp_path, "away", range(1, 3))
    nowhere = f"http://127.0.0.1:{free_port()}/api"
    away = PrefectServer(0, prefect_server.environment | {"PREFECT_API_URL": nowhere})
    waiting = relay(tmp_path, away, "--log-format", "json")
    assert waiting.stderr is not None
    said = json.loads(waiting.stderr.readline())
    assert "wait in the outbox" in said["message"]
    waiting.send_signal(signal.SIGTERM)
    finish(waiting)
    finish(relay(tmp_path, prefect_server, "--once"))
    assert len(events_of(prefect_server, "away")) == 4


@pytest.mark.campaign
@pytest.mark.timeout(60)
def test_one_relay_is_enough(outbox, tmp_path, prefect_server):
    take_runs(outbox, tmp_path, "two", range(1, 2))
    nowhere = prefect_server.environment | {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    first = relay(tmp_path, PrefectServer(0, nowhere))
    assert first.stderr is not None
    first.stderr.readline()
    second = relay(tmp_path, prefect_server)
    _, said = second.communicate(timeout=30)
    first.terminate()
    first.communicate(timeout=20)
    assert second.returncode == 1
    assert b"another relay" in said
