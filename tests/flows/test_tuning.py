"""Peak search parameters proposed from frames with known faults, on weak, usual and strong background."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from flows.tuning import tune
from nearline.cli import app
from storage.codec import encode
from storage.errors import BadRecipe
from streaming.retrieval import open_run
from streaming.simulator import StillPhysics, StillSimulator
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.recipe import load_recipe
from tasks.tune_peaks import hit_cut
from tests.flows.stored_runs import store_run

N_FRAMES = 60
SHAPE = (512, 512)


def faulty_run(root, background=None, hit_fraction=0.4):
    """(run, simulator, truths, hot, cold): frames with 40 hot, 40 flickering and 30 dead pixels nobody has masked."""
    physics = StillPhysics(hit_fraction=hit_fraction, **({} if background is None else {"background": background}))
    simulator = StillSimulator(SHAPE, physics=physics, seed=11)
    rng = np.random.default_rng(5)
    good = np.flatnonzero((simulator.pixel_mask == 0) & (simulator.background > 0.3))
    chosen = rng.choice(good, 110, replace=False)
    hot, cold = chosen[:80], chosen[80:]
    blobs, truths = [], []
    for i in range(N_FRAMES):
        frame, truth = simulator.frame(i)
        flat = frame.reshape(-1)
        flat[hot[:40]] = rng.poisson(300, 40)
        flicker = hot[40:][rng.uniform(size=40) < 0.3]
        flat[flicker] = rng.poisson(100, len(flicker))
        flat[cold] = 0
        blobs.append(encode(frame))
        truths.append(truth)
    folder = store_run(root, simulator, blobs)
    return open_run(str(folder.path)), simulator, truths, hot, cold


@pytest.fixture(scope="module", params=[0.4, None, 12.0], ids=["weak", "usual", "strong"])
def faulty(request, tmp_path_factory):
    return faulty_run(tmp_path_factory.mktemp("tune"), request.param)


def test_bad_pixels_are_found_and_good_ones_left(faulty):
    run, simulator, _, hot, cold = faulty
    report, survey = tune(run)
    assert survey.bad.hot.reshape(-1)[hot].mean() >= 0.95
    # A dead pixel is told from a dark one where 60 frames bring 20 counts.
    bright = simulator.background.reshape(-1)[cold] * N_FRAMES > 25
    assert survey.bad.cold.reshape(-1)[cold][bright].mean() >= 0.95 if bright.any() else True
    good = survey.bad.any.copy()
    good.reshape(-1)[np.concatenate([hot, cold])] = False
    # The simulator has some noisy pixels of its own.
    assert good.sum() <= 12
    assert report.n_frames == N_FRAMES


def test_hits_are_those_of_the_truth_and_peaks_no_worse_than_by_default(faulty):
    run, simulator, truths, *_ = faulty
    report, survey = tune(run)
    is_hit = np.array([truth.is_hit for truth in truths])
    assert ((survey.counts >= report.min_peaks) != is_hit).sum() <= 1
    mask = (survey.mask != 0) | survey.bad.any
    saturation = simulator.header.saturation_value
    tuned = PeakFinder(simulator.geometry, mask, PeakParams(threshold=report.threshold, saturation=saturation))
    default = PeakFinder(simulator.geometry, survey.mask, PeakParams(saturation=saturation))
    (recall, precision), (recall_before, precision_before) = (quality(run, find, truths) for find in (tuned, default))
    assert recall >= recall_before - 0.01
    assert precision >= min(precision_before, 0.99)


def quality(run, find, truths):
    """Share of clear spots found, and of peaks that are spots, over all frames."""
    clear = found = true = total = 0
    for frame, truth in zip(run["eiger"], truths, strict=True):
        peaks, spots = find(frame.data), truth.spots
        total += len(peaks)
        if not truth.is_hit or not len(peaks):
            continue
        d = np.hypot(peaks["x"][:, None] - spots["x"], peaks["y"][:, None] - spots["y"])
        is_clear = (spots["photons"] > 60) & ~spots["masked"]
        clear, found = clear + is_clear.sum(), found + (d.min(axis=0)[is_clear] < 2).sum()
        true += (d.min(axis=1) < 2).sum()
    return found / clear, true / total


def test_the_command_writes_recipe_mask_and_picture(faulty, tmp_path):
    run, *_ = faulty
    recipe, picture = tmp_path / "tuned.yaml", tmp_path / "tuned.png"
    result = CliRunner().invoke(
        app, ["tune", str(run.folder), "--write", str(recipe), "--picture", str(picture), "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    content = yaml.safe_load(recipe.read_text())
    assert content["steps"][0]["params"] == {"threshold": report["threshold"], "min_peaks": report["min_peaks"]}
    assert np.load(content["mask"]).shape == SHAPE
    with Image.open(picture) as opened:
        assert opened.size[0] > 1000
    again = CliRunner().invoke(app, ["tune", str(run.folder), "--recipe", str(recipe)])
    assert again.exit_code == 0
    assert "no pixel that is not masked already" in " ".join(again.stdout.split())


def test_without_crystals_it_says_so(tmp_path):
    run, *_ = faulty_run(tmp_path, hit_fraction=0.0)
    report, _ = tune(run)
    assert report.n_hits == 0
    assert "stands out as a hit" in report.words[-1]


def test_too_few_frames_are_refused(faulty):
    run, *_ = faulty
    with pytest.raises(BadRecipe, match="5 frames are too few"):
        tune(run, n_frames=5)


def test_a_search_on_binned_frames_is_refused(faulty):
    run, *_ = faulty
    steps = [{"use": "bin", "params": {"factor": 2, "feed_next": True}}, {"use": "find_peaks"}]
    with pytest.raises(BadRecipe, match="searches binned frames"):
        tune(run, recipe=load_recipe({"steps": steps}))


@pytest.mark.parametrize(
    ("blanks", "hits"), [((0.05, 900), (40, 100)), ((3.0, 500), (60, 500)), ((0.2, 990), (30, 10))]
)
def test_the_cut_parts_two_heaps(blanks, hits):
    rng = np.random.default_rng(0)
    low, high = rng.poisson(*blanks), rng.poisson(*hits)
    cut = hit_cut(np.concatenate([low, high]))
    assert (low >= cut.min_peaks).sum() <= 1
    assert (high >= cut.min_peaks).mean() > 0.99
    assert cut.blank_mean == pytest.approx(blanks[0], rel=0.3, abs=0.05)
