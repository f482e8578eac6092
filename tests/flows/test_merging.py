"""The merge of processed runs: scaled, divided by what is known of frames, and the same in any order."""

import json
import shutil

import gemmi
import numpy as np
import pytest
from typer.testing import CliRunner

import nearline
from flows.merging import MergeRequest, lines_about, merge_runs
from flows.run_processing import ProcessRequest, run_processing
from nearline.cli import app
from storage.errors import BadQuery
from storage.step_store import Processing

D_MIN = 4.0


@pytest.fixture(scope="module")
def runs(simulated_run, recipe, tmp_path_factory):
    """Two runs of the same frames, so that every reflection is seen by two crystals; the laser is on in some."""
    root = tmp_path_factory.mktemp("merging")
    first = simulated_run.copy_to(root)
    second = root / "lyso" / "2"
    shutil.copytree(first, second)
    for path in (second / "run.json", *second.glob("*.stream.json")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run": 2}))
    for folder in (first, second):
        run_processing(ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json")))
        with_crystals = np.unique(Processing(folder, "p1").reflections["frame_index"].to_numpy())
        run = nearline.open(folder)
        run.annotate(frames=with_crystals[::2].tolist(), laser=True, delay_ps=3.0)
        run.annotate(frames=with_crystals[1::2][:-1].tolist(), laser=False)
    return [str(first), str(second)]


def merged(runs, output=None, **options):
    return merge_runs(MergeRequest(runs=tuple(runs), d_min=D_MIN, **options), output)


def test_any_order_of_runs_gives_the_same_files(runs, tmp_path):
    first, second = merged(runs, tmp_path / "1"), merged(runs[::-1], tmp_path / "2")
    assert first.statistics == second.statistics
    assert first.scaling == second.scaling
    assert (tmp_path / "1" / "merged.hkl").read_bytes() == (tmp_path / "2" / "merged.hkl").read_bytes()
    assert (tmp_path / "1" / "merged.mtz").read_bytes() == (tmp_path / "2" / "merged.mtz").read_bytes()


def test_crystals_are_scaled_unless_told_otherwise(runs):
    scaled, plain = merged(runs), merged(runs, scale=False)
    assert scaled.scaling.n_scaled == scaled.statistics.n_crystals
    assert scaled.scaling.n_scaled + sum(scaled.scaling.left_out.values()) == plain.statistics.n_crystals
    assert plain.scaling is None
    assert lines_about(scaled)[0].startswith(f"{scaled.scaling.n_scaled} crystals scaled")
    # Lysozyme leaves no choice of indexing.
    assert scaled.ambiguity is None


def test_crystals_with_nothing_in_common_are_merged_plainly_and_it_is_said(runs):
    """In P 1, eight crystals hardly share a reflection."""
    result = merged(runs[:1], space_group="P 1", cell="79.1,79.1,37.9,90,90,90")
    assert result.scaling is None
    assert any("not scaled, but a plain mean" in note for note in result.notes)
    assert result.statistics.n_crystals > 0


@pytest.mark.parametrize("scale", [True, False])
def test_a_split_divides_the_observations(runs, tmp_path, scale):
    result = merged(runs, tmp_path, split="laser", scale=scale)
    assert set(result.sets) == {"true", "false", "unset"}
    for name in ("n_observations", "n_crystals", "n_frames", "n_absent", "n_beyond", "n_refused"):
        assert sum(getattr(one, name) for one in result.sets.values()) == getattr(result.statistics, name)
    assert min(one.n_crystals for one in result.sets.values()) > 0
    for name, statistics in result.sets.items():
        mtz = gemmi.read_mtz_file(str(tmp_path / f"merged-laser-{name}.mtz"))
        assert result.files[f"laser-{name}.mtz"] == str(tmp_path / f"merged-laser-{name}.mtz")
        assert int(mtz.column_with_label("N_OBS").array.sum()) == statistics.n_observations
        content = json.loads((tmp_path / f"merged-laser-{name}.json").read_text())
        assert content["statistics"]["n_crystals"] == statistics.n_crystals
    # The whole is what it is without a split.
    assert result.statistics == merged(runs, scale=scale).statistics


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("annotation.delay_ps", {"3", "unset"}),
        ("laser AND delay_ps > 2", {"true", "false"}),
        ("results.indexed", {"true"}),
    ],
)
def test_splits_by_value_and_by_condition(runs, split, names):
    result = merged(runs, split=split)
    assert set(result.sets) == names
    assert sum(one.n_observations for one in result.sets.values()) == result.statistics.n_observations


def test_a_run_without_the_annotation_is_unset(runs, tmp_path):
    bare = tmp_path / "lyso" / "2"
    shutil.copytree(runs[1], bare, ignore=shutil.ignore_patterns("annotations"))
    alone = merged([str(bare)], scale=False).statistics
    result = merged([runs[0], str(bare)], split="laser", scale=False)
    assert result.sets["unset"].n_observations > alone.n_observations
    with pytest.raises(BadQuery, match="laser"):
        merged([str(bare)], split="laser")


def test_polarisation_raises_what_lies_beside_the_beam(runs):
    with_it, without = (merged(runs, scale=False, polarisation=p) for p in (0.99, None))
    ratio = with_it.statistics.wilson.ln_mean_intensity[-1] - without.statistics.wilson.ln_mean_intensity[-1]
    assert ratio > 0
    assert not with_it.notes


def test_the_command_has_it_all(runs, tmp_path):
    arguments = ["merge", *runs, "--d-min", "4.0", "-o", str(tmp_path), "--split", "laser", "--no-polarisation"]
    done = CliRunner().invoke(app, [*arguments, "--friedel-mates", "apart"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "CCano" in done.output
    assert "laser: true" in done.output
    content = json.loads((tmp_path / "merged.json").read_text())
    assert content["request"]["polarisation"] is None
    assert set(content["sets"]) == {"true", "false", "unset"}
    assert content["scaling"]["n_scaled"] == content["statistics"]["n_crystals"]
    done = CliRunner().invoke(app, ["merge", *runs, "--d-min", "4.0", "--no-scale", "--no-resolve", "--json"])
    assert json.loads(done.stdout.strip().splitlines()[-1])["scaling"] is None
