"""`nearline report`: its options, and what it says."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.run_processing import ProcessRequest, run_processing
from nearline.cli import app
from streaming.simulator import SimulatorSettings, make_frames
from tests.flows.stored_runs import store_run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data folder with the run lyso/1, processed by a peak search."""
    settings = SimulatorSettings(size="512", n_frames=10, hit_fraction=0.6)
    simulator = settings.simulator()
    blobs, _ = make_frames(simulator, settings.n_frames)
    root = tmp_path_factory.mktemp("command")
    folder = store_run(root, simulator, blobs, frames_per_chunk=5)
    recipe = {"steps": [{"use": "find_peaks"}], "export": {"nexus": "none", "crystfel": False}}
    run_processing(ProcessRequest(run=str(folder.path), recipe=recipe, n_threads=2))
    return root


def command(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_file_is_named_after_the_run(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("lyso/1", "--root", root)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "report-lyso-1-p1.html"
    assert Path("report-lyso-1-p1.html").read_text().startswith("<!DOCTYPE html>")


def test_scripts_get_one_object(root, tmp_path):
    done = command("lyso/1", "--root", root, "-o", tmp_path / "a" / "b.html", "--pictures", tmp_path / "c", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["path"] == str(tmp_path / "a" / "b.html")
    assert answer["figures"]["n_frames"] == 10
    assert sorted(answer["pictures"]) == sorted(map(str, (tmp_path / "c").iterdir()))
    assert str(tmp_path / "c" / "detector-map.png") in answer["pictures"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "name a run"), (("lyso/9",), "lyso/9"), (("--sample", "[bold]x"), "sample = '[bold]x'")],
    ids=["nothing", "no such run", "no such sample"],
)
def test_what_cannot_be_reported_is_said(root, arguments, words):
    done = command(*arguments, "--root", root)
    assert done.exit_code != 0
    assert words in done.output + str(done.exception)
