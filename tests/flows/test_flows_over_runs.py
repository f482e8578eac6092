"""The flows that work over many runs, `reprocess-runs` and `merge-dataset`, against a real Prefect server."""

import json
import subprocess
import sys

import gemmi
import pytest

from benchmarks.analysis import recipe_for
from benchmarks.frames import EXPERIMENT, FrameSet, stored_run
from flows.run_processing import ProcessRequest, run_processing

from .test_execution import ask, task_states

N_RUNS, N_FRAMES, PER_CHUNK = 5, 20, 10
N_CHUNKS = N_FRAMES // PER_CHUNK
RUNS = f"{EXPERIMENT}/1-{N_RUNS}"


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """A data folder with five finished runs, each processed; and the recipe."""
    root, frames = tmp_path_factory.mktemp("runs"), FrameSet.make("512", 16)
    recipe = recipe_for(frames).model_dump(mode="json")
    recipe["export"] = {"nexus": "none", "crystfel": False}
    for number in range(1, N_RUNS + 1):
        folder = stored_run(root, frames, number, N_FRAMES, PER_CHUNK)
        run_processing(ProcessRequest(run=str(folder.path), recipe=recipe))
    return root, recipe


def called(server, code: str, *arguments: str):
    """What a flow returned that a program of its own has called; the last line of what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}\nprint(json.dumps(found, default=str))", *arguments],
        env=server.environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def page(server, key: str) -> str:
    (artifact,) = ask(server, "/artifacts/latest/filter", {"artifacts": {"key": {"any_": [key]}}})
    return artifact["data"]


def test_five_runs_with_other_integration_parameters_use_what_is_there(processed, prefect_server):
    root, recipe = processed
    steps = [dict(step) for step in recipe["steps"]]
    steps[-1]["params"] = {"inner": 4.0, "middle": 5.0, "outer": 7.0}
    code = """
from flows.reprocess_runs import reprocess_runs
found = reprocess_runs([sys.argv[1]], json.loads(sys.argv[2]), root=sys.argv[3], n_threads=2)
"""
    found = called(prefect_server, code, RUNS, json.dumps(recipe | {"steps": steps}), str(root))
    assert (found["n_runs"], found["n_done"], found["n_failed"]) == (N_RUNS, N_RUNS, 0)
    kept, made = {"reused": N_CHUNKS, "computed": 0}, {"reused": 0, "computed": N_CHUNKS}
    for one in found["runs"]:
        assert one["steps"] == {name: made if name == "integrate" else kept for name in one["steps"]}
        assert {"find_peaks", "index", "integrate"} <= set(one["steps"])
    runs = {"flow_runs": {"name": {"any_": [f"process {EXPERIMENT}/{n}" for n in range(1, N_RUNS + 1)]}}}
    subflows = [run for run in ask(prefect_server, "/flow_runs/filter", runs) if run["parent_task_run_id"]]
    assert len(subflows) == N_RUNS
    states = task_states(prefect_server, subflows[0], 4 * N_CHUNKS)
    assert {state for name, state in states.items() if name.startswith(("peaks", "index"))} == {"Cached"}
    assert {state for name, state in states.items() if name.startswith("integrate")} == {"Completed"}


def test_runs_are_merged_with_a_page_and_files(processed, prefect_server):
    root, _ = processed
    code = """
from flows.merge_dataset import merge_dataset
found = merge_dataset([sys.argv[1]], d_min=3.0, root=sys.argv[2], name="five")
"""
    found = called(prefect_server, code, RUNS, str(root))
    assert len(found["inputs"]) == N_RUNS
    n_crystals = found["statistics"]["n_crystals"]
    assert n_crystals >= N_RUNS
    assert f"# Merged: {n_crystals} crystals of {N_RUNS} runs" in page(prefect_server, "merge-five")
    mtz = gemmi.read_mtz_file(found["files"]["mtz"])
    assert mtz.nreflections > 100
    assert mtz.resolution_high() >= 3.0 - 1e-3
