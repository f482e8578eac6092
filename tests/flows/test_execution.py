"""Where a chunk is analysed cannot change what comes out; and what is there is not computed again."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from flows.execution import Execution
from flows.run_processing import ProcessRequest, run_processing
from storage.errors import BadRecipe
from storage.step_store import Processing
from tasks.recipe import load_recipe
from tests.flows.conftest import N_FRAMES
from tests.flows.test_process_run import ask

TABLES = ("frames", "peaks", "crystals", "crystal_quality", "reflections")
KINDS = ("threads", "processes", "dask")


@pytest.fixture(scope="module")
def inline(simulated_run, recipe, tmp_path_factory):
    folder = simulated_run.copy_to(tmp_path_factory.mktemp("inline"))
    run_processing(request(folder, recipe, "inline"))
    return outcome(folder)


def request(folder, recipe, kind, **options) -> ProcessRequest:
    execution = Execution(kind=kind, **options)
    return ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json"), execution=execution)


def outcome(folder, name="p1") -> dict:
    """The tables, the digests of all step outputs, and what the exported stream says."""
    processing = Processing(folder, name)
    tables = {table: repr(processing.table(table).to_pylist()) for table in TABLES}
    stream = next((folder / "processed" / name).glob("*.stream")).read_text()
    return tables | {
        "digests": [chunk.steps for chunk in processing.chunks()],
        "stream": [line for line in stream.splitlines() if "/" not in line],
    }


def _without_paths(text: str) -> list[str]:
    return [line for line in text.splitlines() if "/" not in line]


@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.campaign), "dask"])
def test_every_execution_gives_the_same(simulated_run, recipe, inline, tmp_path, kind):
    folder = simulated_run.copy_to(tmp_path)
    summary = run_processing(request(folder, recipe, kind))
    assert summary["frames"] == N_FRAMES
    assert (summary["steps_computed"], summary["steps_reused"]) == (12, 0)
    found = outcome(folder)
    for name, value in inline.items():
        if name == "stream":  # it names its own image file
            value, found[name] = (
                [x for x in lines if str(tmp_path) not in x and "/" not in x] for lines in (value, found[name])
            )
        assert found[name] == value, name


@pytest.mark.campaign
def test_dask_workers_are_other_processes(simulated_run, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    step = {"use": "tests.flows.own_steps:who_works"}
    content = {"steps": [step], "export": {"nexus": "none", "crystfel": False}}
    execution = Execution(kind="dask", workers=2)
    run_processing(ProcessRequest(run=str(folder), recipe=content, execution=execution))
    pids = set(Processing(folder, "p1").frames["pid"].to_pylist())
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_cluster_that_is_not_there_is_named(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    with pytest.raises(BadRecipe, match=r"cannot use no_such\.Cluster"):
        run_processing(request(folder, recipe, "dask", cluster="no_such.Cluster"))


def test_what_was_done_can_be_left_at_that(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    first = run_processing(request(folder, recipe, "inline"))
    again = run_processing(request(folder, recipe, "inline").model_copy(update={"if_done": "skip"}))
    assert (again["processing"], again["done_before"]) == ("p1", True)
    assert again["hits"] == first["hits"]
    assert sorted(p.name for p in (folder / "processed").iterdir()) == ["p1"]


# ---- under Prefect ------------------------------------------------------------------------------

FLOW = """
import json, sys
from flows.process_run import process_run
summary = process_run(sys.argv[1], json.loads(sys.argv[2]), execution=json.loads(sys.argv[3]), if_done=sys.argv[4])
print(json.dumps(summary and {k: summary[k] for k in ("processing", "frames", "indexed")}))
"""


def start_flow(server, folder, recipe, execution=None, if_done="repeat") -> "subprocess.Popen[str]":
    arguments = [str(folder), recipe.model_dump_json(), json.dumps(execution or {"kind": "inline"}), if_done]
    return subprocess.Popen(
        [sys.executable, "-c", FLOW, *arguments], env=server.environment, stdout=subprocess.PIPE, text=True
    )


def summary_of(flow: "subprocess.Popen[str]") -> dict:
    out, _ = flow.communicate(timeout=200)
    assert flow.returncode == 0
    return json.loads(out.splitlines()[-1])


def flow_runs(server, folder) -> list[dict]:
    found = ask(server, "/flow_runs/filter", {"flow_runs": {"name": {"any_": [f"process {folder}"]}}})
    return sorted(found, key=lambda run: run["created"])


def task_states(server, flow_run: dict, at_least: int) -> dict[str, str]:
    """The state of each task run by its name; they are recorded some seconds behind."""
    deadline = time.monotonic() + 30
    wanted = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
    while len(found := ask(server, "/task_runs/filter", wanted)) < at_least and time.monotonic() < deadline:
        time.sleep(0.5)
    return {run["name"]: run["state_name"] for run in found}


@pytest.mark.parametrize(
    "kind", ["dask", *(pytest.param(k, marks=pytest.mark.campaign) for k in ("threads", "processes"))]
)
def test_the_flow_gives_the_same_on_every_task_runner(simulated_run, recipe, inline, prefect_server, tmp_path, kind):
    folder = simulated_run.copy_to(tmp_path)
    summary = summary_of(start_flow(prefect_server, folder, recipe, {"kind": kind, "workers": 2}))
    assert summary["frames"] == N_FRAMES
    found = outcome(folder)
    assert {name: found[name] for name in (*TABLES, "digests")} == {name: inline[name] for name in (*TABLES, "digests")}


def test_cached_tasks_are_shown_as_such(simulated_run, recipe, prefect_server, tmp_path):
    """Other integration parameters: peaks and lattices are there, and the server says so."""
    folder = simulated_run.copy_to(tmp_path)
    summary_of(start_flow(prefect_server, folder, recipe))
    steps = [step.model_dump() for step in recipe.steps]
    steps[-1]["params"] = {"inner": 4.0, "middle": 5.0, "outer": 7.0}
    changed = recipe.model_validate(recipe.model_dump() | {"steps": steps})
    assert summary_of(start_flow(prefect_server, folder, changed))["processing"] == "p2"
    first, second = (task_states(prefect_server, run, 12) for run in flow_runs(prefect_server, folder))
    assert set(first.values()) == {"Completed"}
    by_group = {group: {state for name, state in second.items() if name.startswith(group)} for group in GROUPS}
    assert by_group == {"peaks": {"Cached"}, "index": {"Cached"}, "integrate": {"Completed"}, "export": {"Completed"}}


GROUPS = ("peaks", "index", "integrate", "export")


def test_tasks_share_a_limit_of_the_server(simulated_run, prefect_server, tmp_path):
    """Three chunks on three threads, of which one at a time may work."""
    ask(prefect_server, "/v2/concurrency_limits/", {"name": "one-at-a-time", "limit": 1})
    recipe = load_recipe({"steps": [{"use": "tests.flows.own_steps:noted"}]})
    overlaps = {}
    for limit in (None, "one-at-a-time"):
        folder, diary = simulated_run.copy_to(tmp_path / str(limit)), tmp_path / f"diary-{limit}"
        server = replace(prefect_server, environment=prefect_server.environment | {"DIARY": str(diary)})
        summary_of(start_flow(server, folder, recipe, {"kind": "threads", "workers": 3, "limit": limit}))
        words = [line.split()[0] for line in diary.read_text().splitlines()]
        assert words.count("begun") == words.count("done") == 3
        overlaps[limit] = any(pair == ("begun", "begun") for pair in itertools.pairwise(words))
    assert overlaps == {None: True, "one-at-a-time": False}


def test_a_limit_that_the_server_does_not_have_is_named(simulated_run, recipe, prefect_server, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    flow = start_flow(prefect_server, folder, recipe, {"kind": "threads", "limit": "nowhere"})
    flow.communicate(timeout=200)
    assert flow.returncode != 0
    (run,) = flow_runs(prefect_server, folder)
    assert run["state_type"] == "FAILED"
    assert "prefect gcl create nowhere" in run["state"]["message"]


@pytest.mark.campaign
def test_one_of_two_flows_works(simulated_run, recipe, prefect_server, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    flows = [start_flow(prefect_server, folder, recipe, if_done="skip") for _ in range(2)]
    summaries = [summary_of(flow) for flow in flows]
    assert sorted(p.name for p in (folder / "processed").iterdir()) == ["p1"]
    names = sorted(run["state"]["name"] for run in flow_runs(prefect_server, folder))
    assert names in (["Claimed elsewhere", "Completed"], ["Completed", "Completed"])
    assert sum(summary is not None for summary in summaries) >= 1


def test_a_killed_flow_is_taken_up_without_doing_anything_twice(simulated_run, recipe, prefect_server, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    flow = start_flow(prefect_server, folder, recipe)
    deadline = time.monotonic() + 100
    while not (folder / "processed" / "p1" / "chunks" / "00000.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(flow.pid, signal.SIGKILL)
    flow.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "steps").glob("[0-9a-f]*")}
    summary = summary_of(start_flow(prefect_server, folder, recipe))
    assert (summary["processing"], summary["frames"]) == ("p1", N_FRAMES)
    later = {path.name: path.stat().st_mtime_ns for path in (folder / "steps").glob("[0-9a-f]*")}
    assert len(later) == 12
    assert {name: later[name] for name in done} == done
    states = task_states(prefect_server, flow_runs(prefect_server, folder)[-1], 12)
    assert sum(state == "Cached" for state in states.values()) >= 3
