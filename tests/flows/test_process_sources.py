"""Several detectors of a run in one flow: each with its own processing, side by side."""

import json
import subprocess
import sys
import threading

import pytest

from flows.process_sources import process_sources
from flows.run_processing import ProcessRequest, run_processing
from storage.errors import BadRecipe, ProcessingBusy, StreamNotFound
from storage.models import StreamHeader
from storage.step_store import Processing, find_processings
from streaming.producer import Producer
from streaming.retrieval import open_run
from tests.streaming.harness import pixels, serving

from .test_process_run import ask

SHAPES = {"eiger": (64, 80), "jungfrau": (32, 48)}
N_FRAMES = {"eiger": 7, "jungfrau": 5}
EXPORT = {"nexus": "none", "crystfel": False}
BIN, BIN_MORE = ({"steps": [{"use": "bin", "params": {"factor": factor}}], "export": EXPORT} for factor in (4, 2))


def send(address, name, out):
    for index in range(N_FRAMES[name]):
        out.send(pixels(index, shape=SHAPES[name]), frame_index=index)


@pytest.fixture
def service(tmp_path):
    with serving(tmp_path) as service:
        yield service


def take_run(address, between=lambda: None):
    """A run of two detectors; the second appears when the first has sent what it has."""
    producers = {name: Producer(address, "lyso", name) for name in SHAPES}
    with producers["eiger"] as one, producers["jungfrau"] as two:
        first = one.run(1)
        send(address, "eiger", first)
        between()
        second = two.run(1, join=True)
        send(address, "jungfrau", second)
        first.finish()
        second.finish()


def check(folder, summaries):
    assert {name: summary["frames"] for name, summary in summaries.items()} == N_FRAMES
    for name, summary in summaries.items():
        processing = Processing(folder, summary["processing"])
        assert processing.manifest.data_source == name
        totals = [int(pixels(index, shape=SHAPES[name]).sum()) for index in range(N_FRAMES[name])]
        assert processing.frames["total_counts"].to_pylist() == totals
    assert len(find_processings(folder)) == 2


def process_in(service, run, recipes):
    def process(name):
        return run_processing(ProcessRequest(run=run, recipe=recipes[name], data_source=name, service=service.address))

    return process


def test_a_detector_that_is_in_memory_only_is_not_among_all_of_them(service, tmp_path):
    header = StreamHeader(
        experiment="lyso", run=1, data_source="jungfrau", shape=SHAPES["jungfrau"], dtype="uint16", persistence="online"
    )
    with Producer(service.address, "lyso", "eiger") as one, Producer(service.address, "lyso", "jungfrau") as two:
        stored = one.run(1)
        send(service.address, "eiger", stored)
        online = two.run(1, join=True)
        online.start(header)
        send(service.address, "jungfrau", online)
        stored.finish()
        online.finish()
    run = open_run("lyso/1", service=service.address)
    found = process_sources(run, "all", process_in(service, "lyso/1", {"eiger": BIN}))
    assert {name: summary["frames"] for name, summary in found.items()} == {"eiger": N_FRAMES["eiger"]}


def test_all_detectors_of_a_live_run_also_one_that_comes_later(service, tmp_path):
    is_working, first_is_there = threading.Event(), threading.Event()
    outcome = {}

    def work():
        first_is_there.wait(20)
        process = process_in(service, "lyso/1", {"eiger": BIN, "jungfrau": BIN_MORE})

        def told(name):
            is_working.set()
            return process(name)

        outcome.update(process_sources(open_run(f"{service.address}/lyso/1"), "all", told))

    worker = threading.Thread(target=work)
    worker.start()

    def between():
        first_is_there.set()
        assert is_working.wait(20)

    take_run(service.address, between)
    worker.join(60)
    folder = tmp_path / "lyso" / "1"
    check(folder, outcome)
    run = open_run(str(folder))
    binned = {name: run[f"{name}.binned@{outcome[name]['processing']}"].header.shape for name in SHAPES}
    assert binned == {"eiger": (16, 20), "jungfrau": (16, 24)}


def test_a_failure_of_one_leaves_the_other(service, tmp_path):
    take_run(service.address)
    run = open_run(f"{service.address}/lyso/1")
    process = process_in(service, "lyso/1", {"eiger": {"steps": [{"use": "no such"}]}, "jungfrau": BIN})
    with pytest.raises(BadRecipe, match="no step 'no such'"):
        process_sources(run, ["eiger", "jungfrau"], process)
    (done,) = find_processings(tmp_path / "lyso" / "1").values()
    assert (done.manifest.data_source, done.is_finished) == ("jungfrau", True)


def test_one_that_somebody_else_is_at_has_no_summary(service):
    take_run(service.address)

    def process(name):
        if name == "eiger":
            raise ProcessingBusy("somebody is at it")
        return {"frames": 5}

    run = open_run(f"{service.address}/lyso/1")
    assert process_sources(run, ["eiger", "jungfrau"], process) == {"eiger": None, "jungfrau": {"frames": 5}}


def test_a_run_without_detectors_is_named(service):
    with Producer(service.address, "lyso", "motor") as producer:
        producer.run(1).finish()
    with pytest.raises(StreamNotFound, match="lyso/1 has ended without a detector"):
        process_sources(open_run(f"{service.address}/lyso/1"), "all", lambda name: {})


FLOW = """
import json, sys
from flows.process_run import process_run
print(json.dumps(process_run(sys.argv[1], json.loads(sys.argv[2]), data_source="all", recipes=json.loads(sys.argv[3]))))
"""


def test_one_flow_run_has_the_tasks_and_pages_of_all(prefect_server, tmp_path):
    with serving(tmp_path) as service:
        take_run(service.address)
    folder = tmp_path / "lyso" / "1"
    command = [sys.executable, "-c", FLOW, str(folder), json.dumps(BIN), json.dumps({"jungfrau": BIN_MORE})]
    done = subprocess.run(command, env=prefect_server.environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    summaries = json.loads(done.stdout.splitlines()[-1])
    check(folder, summaries)
    (flow_run,) = ask(prefect_server, "/flow_runs/filter", {"flow_runs": {"name": {"any_": [f"process {folder}"]}}})
    assert {Processing(folder, s["processing"]).manifest.flow_run_id for s in summaries.values()} == {flow_run["id"]}
    factors = {n: Processing(folder, s["processing"]).manifest.recipe["steps"][0] for n, s in summaries.items()}
    assert {name: step["params"]["factor"] for name, step in factors.items()} == {"eiger": 4, "jungfrau": 2}
    pages = {
        a["key"] for a in ask(prefect_server, "/artifacts/latest/filter", {}) if a["flow_run_id"] == flow_run["id"]
    }
    assert {key.rpartition("-")[2] for key in pages} == {"p1", "p2"}
