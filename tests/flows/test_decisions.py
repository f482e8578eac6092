"""Stop criteria judged as chunks are processed, waited for by others, and the runs of a sample merged."""

import json
import shutil
import threading
import time

import gemmi
import numpy as np
import pytest
from typer.testing import CliRunner

import nearline
from flows.criteria import read_criterion
from flows.decisions import Decisions, Judge, decisions_of
from flows.merging import MergeRequest, merge_runs
from flows.run_processing import ProcessRequest, run_processing
from nearline.cli import app
from storage.errors import BadCriterion, BadRecipe, NotEnough, RunNotFound
from storage.step_store import Processing
from tasks.merge_crystals import MergeSums


@pytest.fixture(scope="module")
def processed(simulated_run, recipe, tmp_path_factory):
    """Two runs of one sample, processed; the second has its frames under another number."""
    root = tmp_path_factory.mktemp("decisions")
    first = simulated_run.copy_to(root)
    second = root / "lyso" / "2"
    shutil.copytree(first, second)
    for folder, number in ((first, 1), (second, 2)):
        header = json.loads((folder / "run.json").read_text()) | {"run": number, "sample": "lysozyme"}
        (folder / "run.json").write_text(json.dumps(header))
        for path in folder.glob("*.stream.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"run": number}))
    stops = ("n_frames >= 15", "n_hits >= 100000", "sample: n_runs >= 2")
    for folder in (first, second):
        run_processing(ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json"), stop=stops))
    return root


def processing(root, run: int) -> Processing:
    return Processing(root / "lyso" / str(run), "p1")


def nearline_(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_a_decision_is_recorded_once_with_what_it_rests_on(processed):
    (decision,) = decisions_of(processing(processed, 1))
    assert (decision.criterion, decision.chunk) == ("n_frames >= 15", 1)
    assert decision.values == {"n_frames": 20.0}
    (rests_on,) = decision.inputs
    assert (rests_on["run"], rests_on["n_chunks"]) == ("lyso/1", 2)
    assert len(rests_on["digest"]) == 64


def test_a_criterion_of_a_sample_counts_its_runs(processed):
    found = {d.criterion: d for d in decisions_of(processing(processed, 2))}
    decision = found["sample: n_runs >= 2"]
    assert decision.values == {"n_runs": 2.0}
    assert {one["run"] for one in decision.inputs} == {"lyso/1", "lyso/2"}


def test_taken_up_again_nothing_is_told_twice(processed):
    told = []
    again = Decisions(processing(processed, 1), "digest", ("n_frames >= 15", "n_frames >= 16"), told.append)
    assert again.judge(2) == {"n_frames >= 15": "enough", "n_frames >= 16": "enough"}
    assert [decision.criterion for decision in told] == ["n_frames >= 16"]
    assert again.judge(3)["n_frames >= 16"] == "enough"
    assert len(told) == 1


def test_merged_quantities_are_those_of_a_merge_of_all(processed, recipe):
    store = processing(processed, 1)
    criterion = read_criterion("completeness(3.0) > 0.01 and cc_half(3.0) > -2 and n_crystals > 0")
    judge = Judge(store, [criterion])
    judge.refresh()
    sums = (
        MergeSums(recipe.sample.unit_cell(), 3.0)
        if callable(recipe.sample.unit_cell)
        else MergeSums(recipe.sample.unit_cell, 3.0)
    )
    table = store.table("reflections")
    sums.add("lyso/1", {name: table[name].to_numpy() for name in table.column_names})
    expected = sums.statistics()
    values = judge.values(criterion)
    assert values["completeness(3)"] == pytest.approx(expected.completeness, abs=0)
    assert values["cc_half(3)"] == expected.cc_half
    assert values["n_crystals"] == len(store.table("crystals"))


def test_a_criterion_that_cannot_be_judged_is_refused_before_anything_begins(simulated_run, recipe, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    with pytest.raises(BadCriterion, match="n_hitz"):
        run_processing(ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json"), stop=("n_hitz > 3",)))
    assert not (folder / "processed").exists()


def test_wait_until_follows_a_processing_under_way(simulated_run, tmp_path, in_thread):
    folder = simulated_run.copy_to(tmp_path)
    result = in_thread(lambda: nearline.wait_until(folder, "n_frames >= 20", timeout=60))
    time.sleep(0.5)
    assert threading.active_count() > 1
    run_processing(ProcessRequest(run=str(folder), recipe={"steps": [{"use": "find_peaks"}]}))
    found = result()
    assert found["is_met"]
    assert found["values"]["n_frames"] >= 20


def test_what_is_never_met_ends_with_the_processing(processed):
    with pytest.raises(NotEnough, match="n_hits is"):
        nearline.wait_until(processed / "lyso" / "1", "n_hits >= 100000", timeout=30)
    done = nearline_("wait", processed / "lyso" / "1", "n_hits >= 100000")
    assert done.exit_code == 1
    done = nearline_("wait", processed / "lyso" / "1", "n_frames > 3", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout.strip().splitlines()[-1])["is_met"]
    with pytest.raises(NotEnough, match="nobody has begun"):
        nearline.wait_until(
            shutil.copytree(
                processed / "lyso" / "1", processed / "bare" / "1", ignore=shutil.ignore_patterns("processed")
            ),
            "n_frames > 1",
            timeout=0.2,
        )


def test_runs_are_merged_into_files_that_others_open(processed, tmp_path):
    runs = [str(processed / "lyso" / n) for n in ("1", "2")]
    done = nearline_("merge", *runs, "--d-min", 3.0, "-o", tmp_path, "--name", "both")
    assert done.exit_code == 0, done.output
    statistics = json.loads((tmp_path / "both.json").read_text())["statistics"]
    mtz = gemmi.read_mtz_file(str(tmp_path / "both.mtz"))
    assert mtz.spacegroup.xhm() == "P 43 21 2"
    assert np.allclose(mtz.cell.parameters, [79.1, 79.1, 37.9, 90, 90, 90])
    assert mtz.nreflections == statistics["n_unique"]
    assert {column.label for column in mtz.columns} == {"H", "K", "L", "IMEAN", "SIGIMEAN", "N_OBS"}
    assert int(mtz.column_with_label("N_OBS").array.sum()) == statistics["n_observations"]
    lines = (tmp_path / "both.hkl").read_text().splitlines()
    assert lines[:2] == ["CrystFEL reflection list version 2.0", "Symmetry: 4/mmm"]
    assert len(lines) == statistics["n_unique"] + 5
    assert (tmp_path / "both.png").read_bytes()[1:4] == b"PNG"
    one = merge_runs(MergeRequest(runs=(runs[0],), d_min=3.0)).statistics
    assert statistics["n_observations"] == 2 * one.n_observations


def test_friedel_mates_apart_have_columns_of_their_own(processed, tmp_path):
    request = MergeRequest(runs=(str(processed / "lyso" / "1"),), d_min=3.0, friedel_mates="apart")
    result = merge_runs(request, tmp_path)
    mtz = gemmi.read_mtz_file(result.files["mtz"])
    plus, minus = (mtz.column_with_label(f"I({sign})").array for sign in "+-")
    assert np.isfinite(plus).sum() + np.isfinite(minus).sum() == result.statistics.n_unique
    assert (np.isfinite(plus) | np.isfinite(minus)).all()


def test_runs_without_reflections_are_named(simulated_run, processed, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    run_processing(ProcessRequest(run=str(folder), recipe={"steps": [{"use": "find_peaks"}]}))
    with pytest.raises(RunNotFound, match="has no reflections; put index and integrate"):
        merge_runs(MergeRequest(runs=(str(folder),)))
    with pytest.raises(BadRecipe, match="space group"):
        merge_runs(
            MergeRequest(runs=(str(processed / "lyso" / "1"),), cell="79.1,79.1,37.9,90,90,90", space_group="P 99")
        )
