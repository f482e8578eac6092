"""A real processing decides which frames of a simulated run go; by the plain function, the flow and the command."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import nearline
from flows.exports import export_stream
from flows.run_processing import ProcessRequest, run_processing
from flows.veto_frames import VetoRequest, next_step, plan_for
from nearline.cli import app
from storage.errors import BadQuery, RunNotFound
from storage.run_folder import RunFolder
from storage.verify import verify_run
from storage.veto import veto_of


@pytest.fixture
def processed(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    run_processing(ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json"), n_threads=2))
    return folder


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "nearline.cli", "veto", *arguments], capture_output=True, text=True, timeout=120
    )


def test_hits_and_sample_stay_and_the_rest_is_explained(processed, recipe, tmp_path):
    run = nearline.open(processed)
    table = run.processings["p1"].frames
    hits = set(table.filter(table["hit"])["frame_index"].to_pylist())
    before = {frame.frame_index: bytes(frame.blob) for frame in run["eiger"]}
    request = VetoRequest(run=str(processed), processing="p1", by="anna", grace="0min")
    assert next_step(request).stage == "done"
    kept = {frame.frame_index: bytes(frame.blob) for frame in nearline.open(processed)["eiger"]}
    assert hits < kept.keys()
    assert len(kept) == len(hits) + 1
    assert kept == {index: before[index] for index in kept}
    gone = min(before.keys() - kept.keys())
    assert veto_of(RunFolder.open(processed), "eiger", gone).plan.condition == "results.hit"
    assert verify_run(processed).findings == []
    again = nearline.open(processed)
    assert str(again.processings["p1"].frames.to_pylist()) == str(table.to_pylist())  # there are NaN among them
    assert set(again["eiger"].where("NOT results.hit", processing="p1").indices) == before.keys() - hits
    assert export_stream(again, again["eiger"], tmp_path / "x.h5")["frames"] == len(kept)
    other = recipe.model_copy(update={"name": "again"})
    summary = run_processing(ProcessRequest(run=str(processed), recipe=other.model_dump(mode="json"), n_threads=2))
    assert (summary["processing"], summary["frames"]) == ("p2", len(kept))


def test_the_command_marks_undoes_and_waits(processed):
    dry = json.loads(command(str(processed), "--processing", "p1", "--dry-run", "--json").stdout)
    assert dry["stage"] == "planned"
    assert not (processed / "vetoes").exists()
    assert json.loads(command(str(processed), "--processing", "p1", "--yes", "--json").stdout)["stage"] == "marked"
    assert "marked, due" in command(str(processed), "--yes").stdout
    assert json.loads(command(str(processed), "--undo", "--json").stdout)["stage"] == "undone"
    done = command(str(processed), "--undo")
    assert (done.returncode, "no veto that could be undone" in done.stderr) == (1, True)
    assert "--processing" in command(str(processed), "--yes").stderr


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"processing": "p9"}, RunNotFound, "no processing 'p9'"),
        ({"condition": "results.nothing"}, BadQuery, "nothing"),
        ({"condition": "results.hit) OR (true"}, BadQuery, "check its brackets"),
    ],
    ids=["no processing", "no column", "brackets"],
)
def test_refusals(processed, change, error, words):
    facts = {"run": str(processed), "processing": "p1", "by": "anna"} | change
    with pytest.raises(error, match=words):
        plan_for(VetoRequest(**facts))


def test_the_flow_does_the_next_step(processed, prefect_server):
    code = "import sys, json; from flows.retain_run import retain_run; r = retain_run(sys.argv[1], 'p1', grace='0min')"
    done = subprocess.run(
        [sys.executable, "-c", code + "; print(json.dumps(r))", str(processed)],
        env=prefect_server.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["stage"], result["n_control"]) == ("done", 1)
    assert nearline.open(processed)["eiger"].ledger().vetoed == result["n_vetoed"]
    shown = CliRunner().invoke(app, ["ledger", str(processed)])
    assert shown.exit_code == 0
    assert re.search(rf"vetoed\W+{result['n_vetoed']}\b", shown.output)
