from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from storage.errors import BadFrame, BadRecipe, ShapeMismatch
from storage.geometry import Geometry, Panel
from storage.models import DetectorHeader
from tasks.find_peaks import PEAK_DTYPE, PeakFinder, PeakParams

SHAPE = (120, 140)
HEADER = DetectorHeader(beam_center_x=70, beam_center_y=60, detector_distance=0.1, incident_energy=12000)
GEOMETRY = Geometry.from_header(HEADER, SHAPE)
CLEAR = np.zeros(SHAPE, np.uint8)


def background(level=2.0, seed=3, dtype=np.uint16):
    return np.random.default_rng(seed).poisson(level, SHAPE).astype(dtype)


def with_spot(frame, y, x, block):
    out = frame.copy()
    out[y : y + len(block), x : x + len(block[0])] = block
    return out


SPOT = [[40, 60], [30, 20]]


def reference_thresholds(frame, mask, min_snr, threshold):
    """Five passes written with bincount over a compacted list of pixels, as published."""
    ring = np.rint(GEOMETRY.radius_px()).astype(int)[mask == 0]
    values = frame[mask == 0].astype(float)
    n_rings = ring.max() + 1
    upper, lower = np.full(n_rings, 1e9), np.full(n_rings, -1e9)
    for _ in range(5):
        use = (values > lower[ring]) & (values < upper[ring])
        n, s, ss = (np.bincount(ring[use], values[use] ** p, n_rings) for p in (0, 1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = s / n
            sd = np.sqrt(np.maximum(ss / n - mean**2, 0))
        upper = np.where(n > 0, np.maximum(mean + min_snr * sd, threshold), np.inf)
        lower = np.where(n > 0, mean - min_snr * sd, -np.inf)
    return np.nan_to_num(mean), upper


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "float32"])
@pytest.mark.parametrize("level", [0.2, 20, 400])
def test_ring_statistics_against_the_published_passes(dtype, level):
    frame = background(level).astype(dtype)
    if dtype in ("int32", "float32"):
        frame -= 5
    mask = (np.random.default_rng(1).random(SHAPE) < 0.05).astype(np.uint8)
    frame[40:42, 30:33] = 5000
    mean, upper = PeakFinder(GEOMETRY, mask, PeakParams(threshold=3)).thresholds(frame)
    expected_mean, expected_upper = reference_thresholds(frame, mask, 5, 3)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(upper, expected_upper, rtol=1e-9)


@pytest.mark.parametrize(
    # Each dtype has the kernels compiled anew.
    "dtype",
    ["uint16", "uint32", "int32", *(pytest.param(d, marks=pytest.mark.campaign) for d in ("uint8", "float32"))],
)
def test_one_spot_by_hand(dtype):
    frame = with_spot(np.full(SHAPE, 2, dtype), 30, 90, SPOT)
    (peak,) = PeakFinder(GEOMETRY, CLEAR)(frame)
    assert peak.dtype == PEAK_DTYPE
    assert peak["x"] == pytest.approx((70 * 90.5 + 80 * 91.5) / 150)
    assert peak["y"] == pytest.approx((100 * 30.5 + 50 * 31.5) / 150)
    assert (peak["n_pixels"], peak["max_value"], peak["background"]) == (4, 60, 2)
    assert peak["intensity"] == 150 - 4 * 2


def test_signal_to_noise_is_intensity_over_the_spread_of_a_disc():
    frame = with_spot(background(3.0), 30, 90, SPOT)
    (peak,) = PeakFinder(GEOMETRY, CLEAR, PeakParams(threshold=15))(frame)
    cy, cx = np.rint([peak["y"] - 0.5, peak["x"] - 0.5])
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    disc = (y - cy) ** 2 + (x - cx) ** 2 <= 36
    disc[30:32, 90:92] = False
    b, s = frame[disc].mean(), frame[disc].std()
    assert peak["background"] == pytest.approx(b, rel=1e-6)
    assert peak["snr"] == pytest.approx((150 - 4 * b) / s, rel=1e-5)


def test_no_peak_in_background_or_emptiness():
    finder = PeakFinder(GEOMETRY, CLEAR)
    for level in (0, 0.1, 1.0, 30.0, 400.0):
        assert len(finder(background(level))) == 0


def test_a_smooth_ring_is_background_not_peaks():
    ring = 500 * np.exp(-((GEOMETRY.radius_px() - 40) ** 2) / 200)
    frame = np.random.default_rng(2).poisson(ring + 1).astype(np.uint16)
    assert len(PeakFinder(GEOMETRY, CLEAR)(frame)) == 0


REFUSED = {
    "a lone hot pixel": ([[900]], {}),
    "too many pixels": ([[50] * 6] * 6, {"max_pix_count": 35}),
    "below the threshold": (SPOT, {"threshold": 61.0}),
    "outside max_res": (SPOT, {"max_res": 30.0}),
    "inside min_res": (SPOT, {"min_res": 50.0}),
    "saturated": ([[9000, 9000], [9000, 9000]], {"saturation": 8000}),
    "marked by the detector": ([[65535, 65535], [65535, 65535]], {}),
}


@pytest.mark.parametrize(("block", "params"), REFUSED.values(), ids=REFUSED)
def test_refused(block, params):
    frame = with_spot(np.full(SHAPE, 2, np.uint16), 30, 90, block)
    assert len(PeakFinder(GEOMETRY, CLEAR, PeakParams(**params))(frame)) == 0


def test_pixel_count_limits_are_inclusive():
    frame = with_spot(np.full(SHAPE, 2, np.uint16), 30, 90, SPOT)
    params = PeakParams(min_pix_count=4, max_pix_count=4)
    assert len(PeakFinder(GEOMETRY, CLEAR, params)(frame)) == 1


def test_masked_pixels_are_left_out_of_peak_and_background():
    frame = with_spot(np.full(SHAPE, 2, np.uint16), 30, 90, [[40, 60, 999], [30, 20, 999]])
    mask = CLEAR.copy()
    mask[30:32, 92] = 1
    (peak,) = PeakFinder(GEOMETRY, mask)(frame)
    assert (peak["n_pixels"], peak["background"], peak["max_value"]) == (4, 2, 60)


def test_large_peaks_outgrow_the_first_stack():
    frame = with_spot(background(0.5), 20, 20, np.full((12, 15), 50))
    (peak,) = PeakFinder(GEOMETRY, CLEAR, PeakParams(min_snr=3, local_bg_radius=8))(frame)
    assert peak["n_pixels"] == 180


def test_peaks_do_not_cross_panels_and_leave_out_their_edge():
    def panel(name, x):
        return Panel(name, (0.00525 - x * 75e-6, 0.0045, 0.1), (-75e-6, 0, 0), (0, -75e-6, 0), (120, 70), (0, x))

    geometry = Geometry((panel("left", 0), panel("right", 70)), 1.0)
    frame = with_spot(np.full(SHAPE, 2, np.uint16), 30, 67, [[50] * 6] * 2)
    peaks = PeakFinder(geometry, CLEAR)(frame)
    assert peaks["panel"].tolist() == [0, 1]
    assert peaks["n_pixels"].tolist() == [4, 4]
    assert peaks["x"].tolist() == [68.0, 72.0]


def test_table_is_sorted_limited_and_repeatable():
    rng, frame = np.random.default_rng(5), background(1.0)
    for y, x in rng.integers(5, 100, (40, 2)):
        frame[y : y + 2, x : x + 2] += rng.integers(30, 200, (2, 2)).astype(np.uint16)
    finder = PeakFinder(GEOMETRY, CLEAR)
    peaks = finder(frame)
    assert len(peaks) > 20
    np.testing.assert_array_equal(peaks, finder(frame))
    np.testing.assert_array_equal(peaks, np.sort(peaks, order=["y", "x"]))
    few = PeakFinder(GEOMETRY, CLEAR, PeakParams(max_peaks=3))(frame)
    np.testing.assert_array_equal(np.sort(few["snr"]), np.sort(peaks["snr"])[-3:])


def test_sampled_statistics_find_the_same_clear_spot():
    frame = with_spot(background(2.0), 30, 90, [[200, 300], [150, 100]])
    full, fast = (PeakFinder(GEOMETRY, CLEAR, PeakParams(sample_per_ring=n))(frame) for n in (0, 50))
    assert full["x"].tolist() == fast["x"].tolist() == pytest.approx([91.03], abs=0.1)


def test_more_peaks_than_room_keeps_the_strongest():
    frame = np.ones(SHAPE, np.uint16)
    for i, (y, x) in enumerate((y, x) for y in range(10, 110, 20) for x in range(10, 130, 20)):
        frame[y, x : x + 2] = 100 + i
    peaks = PeakFinder(GEOMETRY, CLEAR, PeakParams(max_peaks=2))(frame)
    assert peaks["max_value"].tolist() == [128, 129]


def test_parameters_follow_binning():
    binned = PeakParams(max_res=800, max_pix_count=100, local_bg_radius=3).for_binning(2)
    assert (binned.max_res, binned.max_pix_count, binned.local_bg_radius, binned.min_pix_count) == (400, 25, 2, 1)
    assert (binned.threshold, binned.min_snr) == (8, 5)


def test_bad_input_is_refused():
    finder = PeakFinder(GEOMETRY, CLEAR)
    with pytest.raises(ShapeMismatch, match="finder"):
        finder(np.zeros((5, 5), np.uint16))
    with pytest.raises(BadFrame, match="complex"):
        finder(np.zeros(SHAPE, complex))
    with pytest.raises(BadRecipe, match="order them"):
        PeakParams(min_pix_count=5, max_pix_count=2)
    with pytest.raises(ShapeMismatch, match="outside"):
        PeakFinder(GEOMETRY, np.zeros((50, 50)))


def test_one_finder_serves_many_threads():
    finder = PeakFinder(GEOMETRY, CLEAR)
    frames = [with_spot(background(1.0, seed), 20 + seed, 90 - seed, SPOT) for seed in range(12)]
    alone = [finder(frame) for frame in frames]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(finder, frames))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def candidates_pixel_by_pixel(frame, mask, upper, panels):
    """Pixels above the limit of their ring, inside the panels, by the plain definition."""
    radius = np.rint(GEOMETRY.radius_px(0)).astype(int)
    above = (frame > upper[radius]) & (mask == 0) & (frame < np.iinfo(frame.dtype).max)
    inner = np.zeros(frame.shape, bool)
    for y0, y1, x0, x1 in panels:
        inner[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = True
    return above & inner


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint32"])
@pytest.mark.parametrize("seed", range(3))
def test_a_search_in_pieces_finds_what_a_search_of_every_pixel_finds(dtype, seed):
    rng = np.random.default_rng(seed)
    frame = rng.poisson(2, SHAPE).astype(dtype)
    mask = (rng.uniform(size=SHAPE) < 0.05).astype(np.uint8)
    mask[:, 40:47] = 1
    frame[mask != 0] = np.iinfo(frame.dtype).max
    # Single pixels, so that each candidate is a peak of its own.
    y, x = np.mgrid[2 : SHAPE[0] - 2 : 9, 2 : SHAPE[1] - 2 : 9].reshape(2, -1)
    shown = rng.uniform(size=len(y)) < 0.5
    frame[y[shown], x[shown]] = 100
    finder = PeakFinder(GEOMETRY, mask, PeakParams(threshold=20, min_pix_count=1))
    _, upper = finder.thresholds(frame)
    expected = np.argwhere(candidates_pixel_by_pixel(frame, mask, upper, [(0, SHAPE[0], 0, SHAPE[1])]))
    found = finder(frame)
    at = np.column_stack([found["y"], found["x"]]) - 0.5
    assert len(expected) > 20
    np.testing.assert_array_equal(np.rint(at).astype(int), expected)
    np.testing.assert_array_equal(finder(frame), found, "the marks of the first search are gone")


def test_a_frame_full_of_candidates_leaves_no_marks():
    rng = np.random.default_rng(5)
    quiet, loud = rng.poisson(1, SHAPE).astype(np.uint16), np.full(SHAPE, 500, np.uint16)
    loud[::2, ::2] = 0
    finder = PeakFinder(GEOMETRY, CLEAR)
    one_spot = with_spot(quiet, 20, 30, SPOT)
    before = finder(one_spot)
    finder(loud)
    np.testing.assert_array_equal(finder(one_spot), before)
    assert len(before) == 1
