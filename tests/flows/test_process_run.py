"""The flow under a real Prefect server: what its users see there."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from flows.explaining import explain
from streaming.retrieval import open_run
from tests.flows.conftest import N_FRAMES

CELL = ["--cell", "79.1,79.1,37.9,90,90,90", "--space-group", "P 43 21 2"]


def ask(server, path: str, body: dict) -> list:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/api{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def flow_run(simulated_run, prefect_server, tmp_path_factory):
    """`nearline process` under the server: (its summary, the flow run, task runs, artifacts)."""
    folder = simulated_run.copy_to(tmp_path_factory.mktemp("flow"))
    command = [sys.executable, "-m", "nearline.cli", "process", str(folder), "--prefect", "--json", *CELL]
    done = subprocess.run(command, env=prefect_server.environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    wanted = {"flow_runs": {"name": {"any_": ["process " + str(folder)]}}}
    (found,) = ask(prefect_server, "/flow_runs/filter", wanted)
    tasks = {"flow_runs": {"id": {"any_": [found["id"]]}}}
    deadline = time.monotonic() + 30
    # Task runs are recorded from events, some seconds behind.
    while len(task_runs := ask(prefect_server, "/task_runs/filter", tasks)) < 12 and time.monotonic() < deadline:
        time.sleep(0.5)
    artifacts = ask(prefect_server, "/artifacts/latest/filter", {})
    return summary, found, task_runs, {a["key"]: a for a in artifacts if a["flow_run_id"] == found["id"]}


def test_flow_run_is_completed_and_linked(flow_run):
    summary, found, _, _ = flow_run
    assert found["state_type"] == "COMPLETED"
    assert summary["flow_run_url"].endswith(found["id"])
    assert summary["frames"] == N_FRAMES


def test_task_runs_name_run_and_frames(flow_run):
    names = {run["name"] for run in flow_run[2]}
    assert {n.split(" chunk ")[1] for n in names} == {"0: frames 0 to 9", "1: frames 10 to 19", "2: frames 20 to 23"}
    assert all("lyso/1" in name for name in names)


def test_tasks_do_not_log_what_their_state_says(prefect_server, flow_run):
    """Each line of a task's log costs the server as much as a state."""
    lines = ask(prefect_server, "/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run[1]["id"]]}}})
    assert lines, "the flow's own lines are there"
    assert [line for line in lines if line["task_run_id"] and "Finished in state" in line["message"]] == []


def test_provenance_names_the_task_runs_of_each_chunk(flow_run):
    summary, _, task_runs, _ = flow_run
    folder = Path(summary["files"]["nexus"]).parents[1]
    names = {run["id"]: run["name"] for run in task_runs}
    for frame in (0, 15, 23):
        done = explain(open_run(folder), frame).processing["task_runs"]
        assert set(done) == {"peaks", "index", "integrate"}
        assert all(names[task_run].startswith(f"{group} lyso/1") for group, task_run in done.items())


def test_one_page_shows_rates_pictures_and_files(flow_run):
    summary, _, _, artifacts = flow_run
    (page,) = [a for key, a in artifacts.items() if key.endswith("-p1")]
    assert f"{100 * summary['hit_rate']:.1f}" in page["data"]
    assert "data:image/" in page["data"]
    assert summary["files"]["nexus"] in page["data"]


def test_export_flow_writes_the_file(simulated_run, prefect_server, tmp_path):
    code = "import sys; from flows.export_nexus import export_nexus; export_nexus(sys.argv[1], sys.argv[2])"
    output = tmp_path / "out.h5"
    folder = str(simulated_run.folder)
    subprocess.run([sys.executable, "-c", code, folder, str(output)], env=prefect_server.environment, check=True)
    assert output.stat().st_size > 1_000_000
