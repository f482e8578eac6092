"""Runs processed again, compared, promoted, and tried out: on real runs, with no server."""

import json

import numpy as np
import pytest

import nearline
from flows.canary import newest_chunks, try_recipe
from flows.comparison import compare_processings, comparison_rows, open_processing
from flows.comparison_picture import draw_comparison
from flows.reprocessing import reprocess_here
from flows.run_choice import choose_runs
from flows.run_processing import ProcessRequest, run_processing
from storage.errors import BadName, BadQuery, NearlineError, RunNotFound
from storage.promotion import default_processing, promote, read_promotion
from storage.step_store import Processing
from streaming.retrieval import open_run
from tasks.recipe import load_recipe
from tests.flows.conftest import CHUNK, N_FRAMES

N_CHUNKS = 3


def changed(recipe, step: str, name: str = "changed", **params):
    content = recipe.model_dump(mode="json") | {"name": name}
    for spec in content["steps"]:
        if spec["name"] == step:
            spec["params"] = params
    return load_recipe(content)


@pytest.fixture(scope="module")
def small(module_recipe):
    """The recipe without files: what is tested here is in the tables."""
    return load_recipe(module_recipe.model_dump(mode="json") | {"export": {"nexus": "none", "crystfel": False}})


@pytest.fixture(scope="module")
def module_recipe():
    from tasks.recipe import crystallography
    from tasks.unit_cell import read_cell

    return crystallography(read_cell("79.1,79.1,37.9,90,90,90", "P 43 21 2"))


@pytest.fixture(scope="module")
def data(simulated_run, small, tmp_path_factory):
    """A data folder with run 1, processed as p1."""
    root = tmp_path_factory.mktemp("data")
    folder = simulated_run.copy_to(root)
    run_processing(ProcessRequest(run=str(folder), recipe=small.model_dump(mode="json")))
    return root


def test_only_changed_steps_are_computed(data, small):
    recipe = changed(small, "integrate", inner=4.0, middle=5.0, outer=7.0)
    summary = reprocess_here(["lyso/1"], recipe, root=str(data))
    (one,) = summary["runs"]
    assert (one["state"], one["frames"]) == ("done", N_FRAMES)
    assert one["steps"] == {
        "bin": {"reused": N_CHUNKS, "computed": 0},
        "find_peaks": {"reused": N_CHUNKS, "computed": 0},
        "index": {"reused": N_CHUNKS, "computed": 0},
        "integrate": {"reused": 0, "computed": N_CHUNKS},
    }
    assert Processing(data / "lyso" / "1", "p1").is_finished  # the old one stays
    again = reprocess_here(["lyso/1"], recipe, root=str(data))
    assert (again["n_there_already"], again["runs"][0]["processing"]) == (1, one["processing"])
    assert reprocess_here(["lyso/1"], recipe, root=str(data), again=True)["n_done"] == 1


def test_a_failing_run_stops_no_other_and_is_named(data, small):
    recipe = changed(small, "find_peaks", name="others", min_peaks=12)
    summary = reprocess_here(["lyso/77", "lyso/1"], recipe, root=str(data), parallel=2)
    assert (summary["n_done"], summary["n_failed"]) == (1, 1)
    assert "no run lyso/77" in summary["failed"]["lyso/77"]
    assert [one["state"] for one in summary["runs"]] == ["failed", "done"]


CHOICES = [
    (["lyso/1"], None, ["lyso/1"]),
    (["lyso/0-9"], None, ["lyso/1"]),
    (["lyso/*"], "hit_rate > 0.1 AND n_frames = 24", ["lyso/1"]),
    ([], "state = 'completed' AND started_at > '2020-01-01' AND experiment LIKE 'ly%'", ["lyso/1"]),
    (["lyso/1, lyso/0-3"], "processing = 'p1' OR run = 1", ["lyso/1"]),
]


@pytest.mark.parametrize(("texts", "where", "names"), CHOICES, ids=[f"{t} {w}" for t, w, _ in CHOICES])
def test_runs_are_chosen(data, texts, where, names):
    assert choose_runs(texts, where, root=str(data)).names == names


BAD_CHOICES = [
    (["lyso/9-2"], None, BadName, "ends before it begins"),
    (["lyso"], None, BadName, "does not name a run"),
    (["lyso/5-9"], None, RunNotFound, "nothing matches"),
    ([], None, RunNotFound, "no runs were named"),
    ([], "secret = 1", BadQuery, "no column 'secret'"),
    ([], "run IN (SELECT 1)", BadQuery, "subquery"),
    ([], "1=1; DROP TABLE run", BadQuery, "condition"),
    ([], "read_text('/etc/passwd') = ''", BadQuery, "read_text"),
]


@pytest.mark.parametrize(
    ("texts", "where", "error", "words"), BAD_CHOICES, ids=[f"{t} {w}" for t, w, *_ in BAD_CHOICES]
)
def test_bad_choices_are_refused_in_words(data, texts, where, error, words):
    with pytest.raises(error, match=words):
        choose_runs(texts, where, root=str(data))


@pytest.fixture(scope="module")
def strict(data, small):
    """p1's run processed with a stricter hit criterion: (before, after)."""
    recipe = changed(small, "find_peaks", name="strict", min_peaks=60)
    summary = reprocess_here(["lyso/1"], recipe, root=str(data))
    after = open_processing(f"lyso/1:{summary['runs'][0]['processing']}", root=str(data))
    return open_processing("lyso/1:p1", root=str(data)), after


def test_a_run_is_chosen_by_a_path_that_begins_as_a_name_does(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    name = f"{data.name}/lyso/1"
    assert choose_runs([name]).names == [name]


def test_comparison_says_what_differs_and_which_frames_changed(strict):
    before, after = strict
    found = compare_processings(before, after)
    assert [(d.name, d.a, d.b) for d in found.parameters] == [("find_peaks.params.min_peaks", None, 60)]
    assert found.code == []
    table = before.frames
    lost = table.filter(np.array(table["hit"]) & (np.array(table["n_peaks"]) < 60))["frame_index"].to_pylist()
    assert lost
    assert (found.hits_lost, found.hits_gained) == (lost, [])
    assert found.a.hits - found.b.hits == len(lost)
    assert found.a.cell["a"].mean == pytest.approx(79.1, rel=0.01)
    assert found.a.resolution == pytest.approx(np.median(before.table("crystal_quality")["resolution"].to_numpy()))
    assert found.a.reflections == len(before.reflections)
    assert found.b.computed == {"bin": 0, "find_peaks": N_CHUNKS, "index": N_CHUNKS, "integrate": N_CHUNKS}
    words = {row[0]: row[1:] for row in comparison_rows(found)}
    assert words["frames that were hits in A only"][1].startswith(f"{len(lost)}: {lost[0]}")
    json.dumps(found.as_json())


def test_comparison_is_drawn(strict, tmp_path):
    found = compare_processings(*strict)
    assert draw_comparison(tmp_path / "c.png", found).read_bytes().startswith(b"\x89PNG")


def test_a_processing_is_not_compared_with_itself(strict):
    with pytest.raises(BadName, match="itself"):
        compare_processings(strict[0], strict[0])


def test_promoted_processing_is_the_default(data, strict):
    run = open_run(data / "lyso" / "1")
    newest = run.processing().name
    assert newest != "p1"
    hits = {name: len(run["eiger"].where("hit", processing=name)) for name in ("p1", strict[1].name)}
    assert hits["p1"] > hits[strict[1].name]
    promote(run.folder, "p1", by="me", why="more hits")
    assert run.processing().name == "p1"
    assert len(run["eiger"].where("hit")) == hits["p1"]
    promote(run.folder, strict[1].name)
    assert len(run["eiger"].where("hit")) == hits[strict[1].name]
    assert read_promotion(run.folder).previous == "p1"
    with pytest.raises(RunNotFound, match="it has: p1"):
        promote(run.folder, "p99")
    (run.folder / "processed" / "default.json").write_text("{")
    with pytest.raises(NearlineError, match=r"default\.json is damaged"):
        run.processing()
    (run.folder / "processed" / "default.json").unlink()


def test_canary_covers_the_newest_chunks_and_disturbs_nothing(data, small):
    run = open_run(data / "lyso" / "1")
    before = default_processing(run.folder).name
    steps = {p.name: p.stat().st_mtime_ns for p in (run.folder / "steps").iterdir()}
    summary, found = try_recipe(run, changed(small, "find_peaks", name="new", min_peaks=10), 1e-6, n_threads=1)
    assert summary["part"] == [2 * CHUNK, N_FRAMES]
    canary = run.processings[summary["processing"]]
    assert canary.frames["frame_index"].to_pylist() == list(range(2 * CHUNK, N_FRAMES))
    assert canary.manifest.part == (2 * CHUNK, N_FRAMES)
    # A is what runs, on the same frames.
    assert (found.a.frames, found.b.frames, found.is_same_frames) == (4, 4, True)
    assert found.a.name.endswith(f":{before}")
    assert default_processing(run.folder).name == before
    assert len(run["eiger"].where("hit")) == len(run["eiger"].where("hit", processing=before))
    assert steps == {name: (run.folder / "steps" / name).stat().st_mtime_ns for name in steps}
    with pytest.raises(BadName, match="covers only a part"):
        promote(run.folder, canary.name)
    # A canary is not taken up as if it were a processing of the run.
    assert [chunk.commit.chunk for chunk in newest_chunks(run["eiger"], 60)] == [0, 1, 2]


def test_python_calls_need_no_server(data, small, monkeypatch):
    monkeypatch.setenv("NEARLINE_ROOT", str(data))
    summary = nearline.reprocess("lyso/1", changed(small, "integrate", d_min=3.0), n_threads=1)
    assert summary["n_done"] == 1
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(NearlineError, match="PREFECT_API_URL"):
        nearline.process("lyso/1", small, wait=False)
    with pytest.raises(ValueError, match="needs a worker"):
        nearline.process("lyso/1", small, wait=False, deployment=False)
