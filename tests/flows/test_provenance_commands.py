"""`nearline explain` and `nearline provenance` on a processed run, their files read by other people's programs."""

import json
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import blake3
import h5py
import pytest
from prov.model import ProvAssociation, ProvDerivation, ProvDocument, ProvGeneration, ProvUsage
from rocrate.rocrate import ROCrate
from typer.testing import CliRunner

import nearline as api
from flows.experiment import load_experiment
from flows.explaining import explain
from flows.run_processing import ProcessRequest, run_processing
from nearline.automation_commands import _keep_provenance
from nearline.cli import app
from storage.catalog import default_url
from storage.errors import RunNotFound
from storage.provenance import ProvenanceRecorder
from storage.provenance_tables import ProvenanceTables
from storage.run_folder import RunFolder
from storage.step_store import Processing, StepStore
from storage.veto import find_veto
from streaming.retrieval import open_run
from tasks.recipe import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def processed(simulated_run, recipe, tmp_path_factory) -> Path:
    folder = simulated_run.copy_to(tmp_path_factory.mktemp("provenance"))
    run_processing(ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json")))
    return folder


def nearline(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_explain_leads_from_a_peak_to_bytes_and_code(processed):
    frame = open_run(processed).processings["p1"].peaks["frame_index"][0].as_py()
    done = nearline("explain", processed, "--frame", frame, "--peak", 0)
    assert done.exit_code == 0, done.output
    for words in (
        f"peak 0 of frame {frame}",
        "step find_peaks",
        "min_snr: 5",
        "read and verified",
        "eiger.zarr/data/c/",
    ):
        assert words in done.output, words
    assert "step index" not in done.output, "what came after it has no part in it"


def test_random_peaks_and_reflections_replay_alike(processed):
    tables, chosen = open_run(processed).processings["p1"], random.Random(11)
    for row in chosen.sample(range(len(tables.peaks)), 2):
        frame = tables.peaks["frame_index"][row].as_py()
        peak = row - tables.peaks["frame_index"].to_pylist().index(frame)
        done = nearline("explain", processed, "--frame", frame, "--peak", peak, "--replay", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["replay"]["is_identical"]
    row = tables.reflections.slice(chosen.randrange(len(tables.reflections)), 1).to_pylist()[0]
    hkl = f"{row['h']},{row['k']},{row['l']}"
    done = nearline("explain", processed, "--frame", row["frame_index"], "--reflection", hkl, "--replay")
    assert done.exit_code == 0, done.output
    assert "replayed: identical" in done.output


def test_another_parameter_is_named_and_ends_with_1(processed, tmp_path):
    frame = open_run(processed).processings["p1"].peaks["frame_index"][0].as_py()
    other = tmp_path / "other.yaml"
    content = Processing(processed, "p1").manifest.recipe
    for step in content["steps"]:
        step["params"] |= {"min_snr": 40.0} if step["use"] == "find_peaks" else {}
    other.write_text(json.dumps(content))
    done = nearline("explain", processed, "--frame", frame, "--peak", 0, "--replay", "--recipe", other)
    assert done.exit_code == 1
    assert "find_peaks.min_snr was 5.0, is 40.0" in done.output


def test_what_is_no_reflection_is_refused(processed):
    done = nearline("explain", processed, "--frame", 1, "--reflection", "1,2")
    assert done.exit_code == 2
    assert "three whole numbers" in " ".join(done.output.split())


def test_a_vetoed_frame_is_answered_for(processed, tmp_path):
    folder = tmp_path / "lyso" / "1"
    shutil.copytree(processed, folder)
    options = ("--processing", "p1", "--grace", "0min", "--keep-fraction", 0, "--why", "space", "--yes")
    done = nearline("veto", folder, *options)
    assert done.exit_code == 0, done.output
    assert find_veto(RunFolder.open(folder)) is None, "it is due at once, and carried out"
    frames = Processing(folder, "p1").table("frames").to_pylist()
    gone = next(row["frame_index"] for row in frames if not row["hit"])
    found = explain(open_run(folder), gone)
    assert found.state == "vetoed"
    assert "space" in found.why
    assert "results.hit" in found.why
    assert "gone since" in found.why
    assert not found.bytes
    done = nearline("explain", folder, "--frame", gone)
    assert "vetoed" in done.output


def test_provenance_as_a_tree_and_as_json(processed):
    done = nearline("provenance", processed)
    assert done.exit_code == 0, done.output
    for words in ("24 frames in 3 chunks", "processing p1", "step index: 3 outputs", "file nexus/"):
        assert words in done.output, words
    assert done.output.count("file nexus/") == 1, "each file once"
    content = json.loads(nearline("provenance", processed, "--json").stdout)
    assert {a["kind"] for a in content["activities"]} == {"recording", "processing", "chunk", "export"}


def test_prov_json_is_read_by_prov(processed, tmp_path):
    path = tmp_path / "prov.json"
    assert nearline("provenance", processed, "--prov", path).exit_code == 0
    document = ProvDocument.deserialize(path, format="json")
    for kind, n_least in ((ProvUsage, 3), (ProvGeneration, 9), (ProvDerivation, 9), (ProvAssociation, 4)):
        assert len(list(document.get_records(kind))) >= n_least
    # Each output of a step comes of the chunk's frames, by a chain of derivations that the package follows.
    derived = {str(r.args[0]): str(r.args[1]) for r in document.get_records(ProvDerivation)}
    for chunk in Processing(processed, "p1").chunks():
        entity = f"run:step/{list(chunk.steps.values())[-1]}"
        for _ in chunk.steps:
            entity = derived[entity]
        assert entity == f"run:frames/{chunk.chunk_digest}"
    # Written again by that package, nothing is lost.
    again = ProvDocument.deserialize(content=document.serialize(format="json"), format="json")
    assert again == document


def test_python_gives_what_the_command_shows(processed):
    assert api.provenance(processed) == json.loads(nearline("provenance", processed, "--json").stdout)
    frame = open_run(processed).processings["p1"].peaks["frame_index"][0].as_py()
    found = api.explain(processed, frame, peak=0, replay=True)
    shown = nearline("explain", processed, "--frame", frame, "--peak", 0, "--replay", "--json")
    assert found == json.loads(shown.stdout)
    assert found["replay"]["is_identical"]
    with pytest.raises(RunNotFound, match="no processing 'p9'; it has: p1"):
        api.provenance(processed, processing="p9")


def test_the_crate_is_read_by_rocrate(processed, tmp_path):
    done = nearline("provenance", processed, "--crate", tmp_path / "crate")
    assert done.exit_code == 0, done.output
    crate = ROCrate(tmp_path / "crate")
    assert crate.mainEntity.id == "recipe.json"
    assert "ComputationalWorkflow" in crate.mainEntity.type
    action = crate.dereference("#processing/p1")
    assert action.type == "CreateAction"
    assert action["instrument"].id == "recipe.json"
    assert any(one.id.endswith(".h5") for one in action["result"])
    assert action["object"].id.endswith("eiger.zarr/")
    assert action["actionStatus"] == "http://schema.org/CompletedActionStatus"
    assert {profile.id.split("/")[-2] for profile in crate.root_dataset["conformsTo"]} >= {"process", "workflow"}
    assert json.loads((tmp_path / "crate" / "recipe.json").read_text())["steps"]
    crate.write(tmp_path / "again")


@pytest.mark.parametrize("way", ["while processing", "afterwards"])
def test_an_exported_file_says_which_steps_made_it(processed, tmp_path, way):
    if way == "while processing":
        (path,) = (processed / "nexus").glob("*.h5")
    else:
        path = tmp_path / "hits.h5"
        done = nearline("export", processed, "--processing", "p1", "-o", path)
        assert done.exit_code == 0, done.output
    store = Processing(processed, "p1")
    chunks, manifest = list(store.chunks()), store.manifest
    with h5py.File(path) as file:
        groups = [file[f"entry/process_{k + 1}"] for k in range(len(manifest.recipe["steps"]) + 1)]
        assert f"entry/process_{len(groups) + 1}" not in file
        assert [int(group["sequence_index"][()]) for group in groups] == list(range(1, len(groups) + 1))
        assert json.loads(groups[-1]["parameters/data"][()])["step"] == "export_nexus"
        for spec, group in zip(manifest.recipe["steps"], groups, strict=False):
            assert group.attrs["NX_class"] == "NXprocess"
            records = [StepStore(processed).record(chunk.steps[spec["name"]]) for chunk in chunks]
            made = [record["made"] for record in records]
            assert text(group["program"]) == "nearline"
            assert text(group["version"]) == made[0]["version"]
            assert text(group["date"]) == max(one["at"] for one in made)
            assert group["environment"].asstr()[:].tolist() == sorted({one["environment"] for one in made})
            commits = group["commit"].asstr()[:].tolist() if "commit" in group else []
            assert commits == sorted({one["commit"] for one in made if one["commit"]})
            parameters = json.loads(text(group["parameters/data"]))
            assert (parameters["use"], parameters["params"]) == (spec["use"], records[0]["params"])
            assert group["recipe"].attrs["NX_class"] == "NXnote"
            assert load_recipe(json.loads(text(group["recipe/data"]))).digest == manifest.recipe_digest
            assert text(group["recipe/digest"]) == manifest.recipe_digest


def text(dataset: h5py.Dataset) -> str:
    return dataset.asstr()[()]


@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_all_runs_are_asked_what_a_commit_or_some_frames_made(processed, tmp_path, where, request):
    url = f"sqlite:///{tmp_path}/c.sqlite" if where == "sqlite" else request.getfixturevalue("postgres").url
    root = processed.parents[1]
    store = Processing(processed, "p1")
    chunk = next(store.chunks())
    done = nearline("provenance", "--made-from", chunk.chunk_digest, "--root", root, "--catalog", url, "--json")
    assert {row["digest"] for row in json.loads(done.stdout)} == set(chunk.steps.values()), "without a rebuild"
    done = nearline("catalog", "rebuild", "--root", root, "--catalog", url)
    assert done.exit_code == 0, done.output
    assert "1 with their provenance" in " ".join(done.output.split())
    tables = ProvenanceTables(url)
    made = tables.made_from(chunk.chunk_digest)
    assert {row.digest for row in made} == set(chunk.steps.values())
    (frames,) = tables.with_digest(chunk.chunk_digest)
    assert frames.kind == "frames"
    tables.close()
    done = nearline("provenance", "--made-from", chunk.chunk_digest[:20], "--root", root, "--catalog", url)
    assert done.output.count("step output") == len(chunk.steps)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    if commit.returncode == 0:
        done = nearline("provenance", "--made-by", commit.stdout[:10], "--root", root, "--catalog", url, "--json")
        assert len(json.loads(done.stdout)) == sum(len(c.steps) for c in store.chunks())
    assert "nothing" in nearline("provenance", "--made-by", "0" * 12, "--root", root, "--catalog", url).output


def test_tables_read_again_only_the_runs_that_have_changed(processed, tmp_path):
    root = tmp_path / "data"
    for number in (1, 2):
        folder = root / processed.parent.name / str(number)
        shutil.copytree(processed, folder)
        header = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(header | {"run": number}))
    tables = ProvenanceTables(f"sqlite:///{tmp_path}/c.sqlite")
    assert tables.refresh(root) == 2
    assert tables.refresh(root) == 0
    run = root / processed.parent.name / "2"
    recorder = ProvenanceRecorder(run, Processing(run, "p1"))
    recorder.finished({})
    assert tables.refresh(root) == 1
    recorder.exported({"nexus": run / "run.json"})
    assert tables.refresh(root) == 1, "lines are added to a file that was there"
    digest = blake3.blake3((run / "run.json").read_bytes()).hexdigest()
    assert [row.location for row in tables.with_digest(digest)] == ["run.json"]
    (run / "processed" / "p1" / "manifest.json").write_text("{")
    os.utime(run / "processed" / "p1")
    told: list[str] = []
    assert tables.refresh(root, left_out=told.append) == 0
    assert "manifest.json" in told[0]
    assert tables.with_digest(digest), "what was known stays"
    assert tables.refresh(root, anew=True, left_out=told.append) == 1
    tables.close()


def test_catch_up_keeps_the_tables_until_it_is_told_to_stop(processed, tmp_path):
    (tmp_path / "experiment.yaml").write_text(
        json.dumps({"experiment": "lyso", "beamline": "I24", "deployment": {"root": str(processed.parents[1])}})
    )
    experiment, stop = load_experiment(tmp_path / "experiment.yaml"), threading.Event()
    keeping = threading.Thread(target=_keep_provenance, args=(experiment, stop))
    keeping.start()
    tables = ProvenanceTables(default_url(processed.parents[1]))
    digest = next(Processing(processed, "p1").chunks()).chunk_digest
    deadline = time.monotonic() + 30
    while not tables.with_digest(digest) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tables.with_digest(digest)
    stop.set()
    keeping.join(10)
    assert not keeping.is_alive()
    tables.close()
