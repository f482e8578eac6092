"""Peak search by variance: against its definition pixel by pixel, and where radial statistics are at a loss."""

import numpy as np
import pytest

from benchmarks.analysis import Verdict
from benchmarks.frames import FrameSet
from flows.run_processing import ProcessRequest, run_processing
from storage.errors import BadFrame, BadRecipe, ShapeMismatch
from storage.geometry import Geometry
from storage.models import DetectorHeader
from storage.panels import Panel
from storage.step_store import Processing
from streaming.simulator import SimulatorSettings, make_frames
from tasks.find_dispersed_peaks import DispersionFinder, DispersionParams, _mark
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.recipe import crystallography, load_recipe
from tasks.unit_cell import read_cell
from tests.flows.panels import SHAPE, four_panels, header_of
from tests.flows.stored_runs import store_run

FLAT = Geometry.from_header(
    DetectorHeader(beam_center_x=40, beam_center_y=30, detector_distance=0.1, incident_energy=12000), (60, 80)
)


def finder(mask=None, **params) -> DispersionFinder:
    return DispersionFinder(FLAT, np.zeros((60, 80), bool) if mask is None else mask, DispersionParams(**params))


def quiet(seed=0, mean=3.0, dtype=np.uint16) -> np.ndarray:
    return np.random.default_rng(seed).poisson(mean, (60, 80)).astype(dtype)


def marks_by_definition(frame, bad, k, sigma_background, sigma_strong, largest):
    found = np.zeros(frame.shape, np.uint8)
    for y, x in np.ndindex(frame.shape):
        if bad[y, x] or not frame[y, x] <= largest:
            continue
        window = slice(max(y - k, 0), y + k + 1), slice(max(x - k, 0), x + k + 1)
        values = frame[window][~bad[window] & (frame[window] <= largest)].astype(float)
        if len(values) < 6:
            continue
        mean, variance = values.mean(), values.var(ddof=1)
        is_dispersed = variance > mean * (1 + sigma_background * np.sqrt(2 / (len(values) - 1)))
        found[y, x] = is_dispersed and frame[y, x] > mean + sigma_strong * np.sqrt(mean)
    return found


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.float32])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_pixels_stand_out_as_by_definition(dtype, k):
    rng = np.random.default_rng(k)
    frame = quiet(k, dtype=dtype)
    for y, x in rng.integers(1, 58, (25, 2)):
        frame[y : y + 2, x : x + 2] += rng.integers(5, 60, (2, 2)).astype(dtype)
    bad = rng.random(frame.shape) < 0.05
    bad[20:23] = True
    frame[40, 40] = 30_000
    marks, p = np.full(frame.shape, 9, np.uint8), DispersionParams()
    _mark(frame, bad, marks, 0, 60, 0, 80, k, 20_000.0, 0.0, 1.0, p.sigma_strong, p.sigma_background)
    expected = marks_by_definition(frame, bad, k, p.sigma_background, p.sigma_strong, 20_000.0)
    assert expected.sum() > 20
    np.testing.assert_array_equal(marks, expected)


def test_one_spot_is_measured():
    frame = np.full((60, 80), 3, np.uint16)
    frame[::2] += 1
    frame[30:32, 50:53] += np.array([[20, 40, 20], [20, 40, 20]], np.uint16)
    (peak,) = finder()(frame)
    assert (peak["x"], peak["y"]) == pytest.approx((51.5, 31.0), abs=0.05)
    assert peak["background"] == pytest.approx(3.5, abs=0.05)
    assert peak["intensity"] == pytest.approx(160, abs=1)
    assert (peak["max_value"], peak["n_pixels"], peak["panel"]) == (44, 6, 0)
    assert peak["snr"] == pytest.approx(peak["intensity"] / 0.5, rel=0.05)


@pytest.mark.parametrize("mean", [0.05, 0.5, 3.0, 100.0])
def test_a_background_alone_has_hardly_a_peak(mean):
    assert sum(len(finder()(quiet(seed, mean))) for seed in range(20)) <= 20


def test_what_cannot_be_used_is_no_peak_and_hides_none():
    frame = quiet(dtype=np.float32)
    frame[10:12, 10:12], frame[10:12, 14:16], frame[40:42, 40:42] = 80, 500, 70
    frame[::9, ::7] = np.nan
    frame[40:42, 40:42] = 70
    mask = np.zeros(frame.shape, bool)
    mask[10:12, 10:12] = True
    found = finder(mask, saturation=400)(frame)
    assert [(round(float(p["x"])), round(float(p["y"]))) for p in found] == [(41, 41)]


def test_infinite_counts_hide_nothing_below_them():
    frame = quiet(dtype=np.float32)
    frame[5, 10:30], frame[40:42, 20:22] = np.inf, 80
    assert [(round(float(p["x"])), round(float(p["y"]))) for p in finder()(frame)] == [(21, 41)]


def test_of_too_many_peaks_the_strongest_are_kept():
    frame = np.ones((60, 80), np.uint16)
    height = np.arange(60).reshape(6, 10) + 40
    for (i, j), h in np.ndenumerate(height):
        frame[5 + 9 * i : 7 + 9 * i, 4 + 8 * j] = h
    everything = finder()(frame)
    assert len(everything) == 60
    best = finder(max_peaks=4)(frame)
    assert sorted(best["max_value"]) == [96, 97, 98, 99]
    # And the marks of one frame are no matter to the next.
    np.testing.assert_array_equal(finder(max_peaks=4)(frame), best)


def test_windows_and_peaks_end_where_panels_do():
    geometry = Geometry.from_header(header_of(four_panels()), SHAPE)
    frame = np.ones(SHAPE, np.uint16)
    y0, x0 = geometry.panels[1].origin
    frame[:, :x0] = 40  # another panel, at other gain
    find = DispersionFinder(geometry, np.zeros(SHAPE, bool), DispersionParams())
    assert len(find(frame)) == 0
    frame[y0 + 20 : y0 + 22, x0 : x0 + 2] = 30
    (peak,) = find(frame)
    assert (peak["panel"], round(float(peak["x"]))) == (1, x0 + 1)


@pytest.fixture(scope="module")
def hard():
    return FrameSet.make("1M", 40, weaker=5.0)


def test_behind_a_shadow_it_finds_what_radial_statistics_miss(hard):
    """Half of the detector sees 30 % of the photons: its rings hold two backgrounds."""
    verdict, rng = Verdict(hard), np.random.default_rng(0)
    saturation = hard.simulator.header.saturation_value
    searches = {
        "radial": PeakFinder(verdict.geometry, verdict.mask, PeakParams(saturation=saturation)),
        "dispersion": DispersionFinder(verdict.geometry, verdict.mask, DispersionParams(saturation=saturation)),
    }
    n_true, n_false, n_hits = (dict.fromkeys(searches, 0) for _ in range(3))
    for i, truth in enumerate(hard.truths):
        frame = hard.pixels(i).copy()
        shadowed = np.zeros(frame.shape, bool)
        shadowed[:, frame.shape[1] // 2 :] = True
        shadowed &= frame < 60_000
        frame[shadowed] = rng.binomial(frame[shadowed], 0.3)
        for name, find in searches.items():
            peaks = find(frame)
            is_true = np.zeros(len(peaks), bool)
            if truth.is_hit and len(peaks):
                d = np.hypot(peaks["x"][:, None] - truth.spots["x"], peaks["y"][:, None] - truth.spots["y"])
                is_true = d.min(axis=1) < 2
            n_true[name] += int(is_true.sum())
            n_false[name] += int((~is_true).sum())
            n_hits[name] += len(peaks) >= 15
            assert truth.is_hit or len(peaks) < 15
    assert n_true["dispersion"] > 1.25 * n_true["radial"]
    assert n_hits["dispersion"] > n_hits["radial"]
    assert n_false["dispersion"] < 0.05 * n_true["dispersion"]


@pytest.mark.parametrize("feed_next", [False, True], ids=["whole frames", "binned frames"])
def test_a_recipe_may_search_with_it(tmp_path, feed_next):
    settings = SimulatorSettings(size="512", n_frames=20, hit_fraction=0.7, seed=4)
    simulator = settings.simulator()
    blobs, truths = make_frames(simulator, settings.n_frames)
    run = store_run(tmp_path, simulator, blobs)
    recipe = crystallography(read_cell("79.1,79.1,37.9,90,90,90", "P 43 21 2"))
    content = recipe.model_dump(mode="json") | {"export": {"nexus": "none", "crystfel": False}}
    steps = [{"use": "bin", "params": {"factor": 2, "feed_next": feed_next}}, {"use": "find_peaks_dispersion"}]
    content["steps"] = [*steps, {"use": "index"}, {"use": "integrate"}]
    summary = run_processing(ProcessRequest(run=str(run.path), recipe=content))
    n_hits = sum(truth.is_hit for truth in truths)
    assert summary["hits"] == n_hits
    assert summary["indexed"] >= n_hits - 1
    peaks = Processing(run.path, summary["processing"]).peaks
    assert peaks["x"].to_numpy().max() > 300  # px of the detector, binned or not


def test_impossible_parameters_and_frames_are_refused():
    for params in ({"kernel": 0}, {"sigma_strong": -1}, {"min_pix_count": 5, "max_pix_count": 4}):
        with pytest.raises(BadRecipe):
            DispersionParams(**params)
    with pytest.raises(BadRecipe, match=r"this step knows .*sigma_background"):
        load_recipe({"steps": [{"use": "find_peaks_dispersion", "params": {"min_snr": 5}}]})
    with pytest.raises(ShapeMismatch):
        finder()(np.zeros((3, 3), np.uint16))
    with pytest.raises(BadFrame):
        finder()(np.zeros((60, 80), complex))


def test_a_panel_narrower_than_the_window_is_searched():
    panel = Panel("p", (0.0, 0.0, 0.1), (-1e-4, 0.0, 0.0), (0.0, -1e-4, 0.0), (4, 5))
    frame = np.ones((4, 5), np.uint16)
    frame[1:3, 2] = 60
    find = DispersionFinder(Geometry((panel,), 1.0), np.zeros((4, 5), bool), DispersionParams(sigma_background=2))
    (peak,) = find(frame)
    assert (peak["x"], peak["y"]) == pytest.approx((2.5, 2.0))
