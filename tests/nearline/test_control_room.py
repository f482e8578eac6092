"""A deployed experiment as its beamline uses it: programs of their own, a real Prefect server, and nobody who watches.

There is no catch-up here: what starts a flow run is the service's event, through outbox, relay and automation.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

import nearline
from flows.calls import canary_deployed
from flows.experiment import load_experiment, serve_arguments
from nearline.children import Children, free_port
from nearline.prefect_server import server_environment, wait_until_healthy
from storage.step_store import Processing
from streaming.retrieval import Run
from streaming.simulator import SimulatorSettings, simulate
from tests.flows.test_deploying import ask

NAME, N_FRAMES = "lyso-2026", 20
RECIPE = {"steps": [{"use": "find_peaks"}]}
STRICTER = {"steps": [{"use": "find_peaks", "params": {"min_snr": 9.0}}]}
FEW_FRAMES = "n_frames >= 10"
POOLS = ("live", "reprocess", "export")


class Beamline:
    """Service, relay, workers and server of an experiment, as `nearline up` starts them, without its catch-up."""

    def __init__(self, folder: Path) -> None:
        self.detector, self.service = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        self._port = free_port()
        self.api = f"http://127.0.0.1:{self._port}/api"
        self.file, self.root = folder / "experiment.yaml", folder / "data"
        content = {
            "experiment": NAME, "beamline": "I24", "data_sources": [{"endpoint": self.detector}],
            "recipes": {"r": RECIPE}, "stop": [FEW_FRAMES],
            "deployment": {"root": "data", "service": {"address": self.service}, "prefect": {"api": self.api}},
        }  # fmt: skip
        self.file.write_text(yaml.safe_dump(content))
        self._environment = server_environment(folder / "prefect", self._port)
        self._children = Children(folder / "logs")
        self.start_server()
        self._children.start(
            "service", ["nearline.cli", "serve", *serve_arguments(load_experiment(self.file))], self._environment
        )
        self._children.start("relay", ["nearline.cli", "relay", "--root", str(self.root)], self._environment)

    def start_server(self) -> None:
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        self._children.start("prefect", command, self._environment)
        wait_until_healthy(self._port, 120, lambda: self._children.check("prefect"))

    def stop_server(self) -> None:
        self._children.stop("prefect")

    def start_workers(self) -> None:
        for pool in POOLS:
            command = ["prefect", "worker", "start", "--type", "process", "--pool", pool]
            self._children.start(f"worker-{pool}", command, self._environment)

    def stop(self) -> None:
        for pool in POOLS:
            self._children.stop(f"worker-{pool}")  # with no server they would take their time
        self._children.stop_all()

    def run(self, *arguments: str) -> Any:
        """What a command of ours says as JSON."""
        done = subprocess.run(
            [sys.executable, "-m", "nearline.cli", *arguments, "--json"],
            env=self._environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return ask(self.api, path, body)

    def flow_runs(self, name: str) -> list[dict[str, Any]]:
        return list(self.ask("/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}}))

    def ended(self, name: str) -> list[dict[str, Any]]:
        """The flow runs of that name, once there is one and all have come to an end."""
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

        def found() -> list[dict[str, Any]] | None:
            runs = self.flow_runs(name)
            return runs if runs and all(run["state_type"] in final for run in runs) else None

        return list(self.wait(found, name))

    def wait(self, is_so: Callable[[], Any], what: str, timeout: float = 120.0) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := is_so()):
            assert time.monotonic() < deadline, f"{what}: {self._last_words()}"
            time.sleep(0.3)
        return found

    def take_run(self, n_frames: int = N_FRAMES) -> Run:
        """Ten frames a second, in chunks of ten; the run, which is the newest."""
        settings = SimulatorSettings(
            size="512", n_frames=n_frames, bind=self.detector, experiment=NAME, hit_fraction=0.4, frame_time=0.2,
            rate=10,
        )  # fmt: skip
        simulate(settings)
        return self.open(self.newest())

    def newest(self) -> int:
        """The number of the newest run."""
        return max(int(path.name) for path in (self.root / NAME).iterdir() if path.name.isdecimal())

    def open(self, number: int) -> Run:
        return nearline.open(f"{NAME}/{number}", service=self.service)

    def _last_words(self) -> str:
        logs = sorted(self._children.log("x").parent.glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)


@pytest.fixture(scope="module")
def beamline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beamline]:
    """Deployed by its command; three runs are taken, one after the other, before anything is looked at."""
    made = Beamline(tmp_path_factory.mktemp("beamline"))
    try:
        changes = made.run("deploy", str(made.file))
        assert {change["action"] for change in changes} == {"created"}
        made.start_workers()
        for number in (1, 2, 3):
            assert made.take_run().header.run == number
        with temporary_settings({PREFECT_API_URL: made.api}):
            os.environ["PREFECT_API_URL"] = made.api
            yield made
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        made.stop()


def finished(run: Run) -> list[Processing]:
    return [processing for processing in run.processings.values() if processing.is_finished]


def n_processed(processing: Processing) -> int:
    return sum(chunk.n_frames for chunk in processing.chunks())


pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_each_run_is_processed_with_no_further_command(beamline, number):
    (flow_run,) = beamline.ended(f"process {NAME}/{number}")
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["created_by"]["type"] == "AUTOMATION"
    assert {f"experiment:{NAME}", "beamline:I24"} <= set(flow_run["tags"])
    assert flow_run["work_pool_name"] == "live"
    (processing,) = finished(beamline.open(number))
    assert (processing.name, n_processed(processing)) == ("p1", N_FRAMES)
    wanted = {"artifacts": {"key": {"any_": [f"{NAME}-{number}-p1"]}}}
    (page,) = beamline.ask("/artifacts/latest/filter", wanted)
    assert page["flow_run_id"] == flow_run["id"]
    assert f"**{N_FRAMES}** frames" in page["data"]


def test_that_it_is_enough_is_an_event_of_the_flow_that_found_it(beamline):
    beamline.ended(f"process {NAME}/1")
    wanted = {"filter": {"event": {"name": ["nearline.run.enough"]}}, "limit": 50}
    named = f"nearline.run.{NAME}.1"

    def told() -> list[dict[str, Any]]:
        events = beamline.ask("/events/filter", wanted)["events"]
        return [event for event in events if event["resource"]["prefect.resource.id"] == named]

    (event,) = beamline.wait(told, "the event arrives", timeout=30)
    assert event["payload"]["criterion"] == FEW_FRAMES
    assert event["payload"]["name"] == f"{NAME}/1"


def test_a_program_has_a_run_processed_by_a_worker(beamline):
    place = {"service": beamline.service}
    summary = nearline.process(f"{NAME}/1", STRICTER, deployment=True, timeout=100, **place)
    assert summary["deployment"] == f"process-run/{NAME}-again"
    assert summary["frames"] == N_FRAMES
    processing = beamline.open(1).processings[summary["processing"]]
    assert processing.manifest.flow_run_id == summary["flow_run_id"]
    assert processing.manifest.recipe["steps"][0]["params"]["min_snr"] == 9.0


def test_runs_are_handed_over_and_done_again_by_a_worker(beamline, tmp_path):
    path = tmp_path / "stricter.yaml"
    path.write_text(yaml.safe_dump(STRICTER))
    place = ["--service", beamline.service]
    for number in (2, 3):
        beamline.ended(f"process {NAME}/{number}")
    handed = beamline.run("reprocess", f"{NAME}/2-3", "--recipe", str(path), "--deployed", *place)
    assert handed["runs"] == [f"{NAME}/2", f"{NAME}/3"]

    def done() -> bool:
        return beamline.ask(f"/flow_runs/{handed['flow_run_id']}")["state_type"] == "COMPLETED"

    beamline.wait(done, "both are reprocessed")
    assert [len(finished(beamline.open(number))) for number in (2, 3)] == [2, 2]

    # A program that waits for it finds both there already.
    again = nearline.reprocess(f"{NAME}/2-3", STRICTER, deployment=True, timeout=100, service=beamline.service)
    assert again["runs"] == [f"{NAME}/2", f"{NAME}/3"]
    assert [len(finished(beamline.open(number))) for number in (2, 3)] == [2, 2]

    compared = beamline.run("compare", f"{NAME}/2", "--processings", "p1", "p2", *place)
    assert "min_snr" in json.dumps(compared["parameters"])
    promoted = beamline.run("promote", f"{NAME}/2", "p2", "--why", "fewer false peaks", *place)
    assert promoted["processing"] == beamline.open(2).processing().name == "p2"


def test_a_canary_tries_the_newest_frames_of_a_run_that_goes_on(beamline):
    before, n_frames = beamline.newest(), 250
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(beamline.take_run, n_frames)
        name = f"{NAME}/{before + 1}"
        beamline.wait(lambda: beamline.newest() > before and n_chunks(beamline.open(before + 1)) > 1, "it has chunks")
        options = {"service": beamline.service, "minutes": 0.05}
        tried = canary_deployed(name, STRICTER, options, timeout=100)
        assert not beamline.open(before + 1).state.is_terminal, "the canary was to end before the run"
        assert tried["processing"] == "canary1"
        assert 0 < tried["part"][1] < n_frames
        run = taken.result()
    (flow_run,) = beamline.ended(f"process {name}")
    assert flow_run["state_type"] == "COMPLETED"
    assert n_processed(run.processings["p1"]) == n_frames


def n_chunks(run: Run) -> int:
    return run["eiger"].status.n_sealed if "eiger" in run else 0


def test_a_run_taken_while_the_server_is_away_is_processed_when_it_is_back(beamline):
    beamline.stop_server()
    run = beamline.take_run()
    assert run["eiger"].ledger().stored == N_FRAMES
    assert not run.processings
    beamline.start_server()
    name = f"process {run.name}"
    ended = beamline.ended(name)
    assert "COMPLETED" in {flow_run["state_type"] for flow_run in ended}
    (processing,) = finished(beamline.open(run.header.run))
    assert n_processed(processing) == N_FRAMES


def test_what_was_deployed_is_removed_by_its_command(beamline, tmp_path):
    pools = {role: {"name": f"other-{role}"} for role in POOLS}
    content = {"experiment": "other", "beamline": "I24", "recipes": {"r": RECIPE}, "deployment": {"pools": pools}}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(content))
    made = beamline.run("deploy", str(path), "--api", beamline.api)
    removed = beamline.run("undeploy", "other", "--api", beamline.api)
    assert {change["action"] for change in removed} == {"removed"}
    assert {change["name"] for change in removed} == {change["name"] for change in made}
    left = beamline.ask("/deployments/filter", {})
    assert {deployment["name"] for deployment in left} == {NAME, f"{NAME}-again"}
