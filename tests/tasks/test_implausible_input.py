"""What cannot be analysed: it takes bounded time, and nothing plausible comes out of it."""

import time

import numpy as np
import pytest

from benchmarks.analysis import Verdict
from benchmarks.frames import FrameSet
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.index_frame import Indexer
from tasks.unit_cell import UnitCell

# Many times what such a frame takes, for a busy machine; and far from what a search without bounds would take.
_PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def frames():
    return FrameSet.make("1M", 48)


@pytest.fixture(scope="module")
def hits(frames):
    """(x, y, intensity) of the peaks of each hit."""
    verdict = Verdict(frames)
    found = [verdict.find(frames.pixels(i)) for i, truth in enumerate(frames.truths) if truth.is_hit]
    assert len(found) > 15
    return found


@pytest.mark.parametrize(
    "cell",
    [
        (30, 40, 50, 90, 100, 90, "P 1 21 1"),
        pytest.param((58.4, 58.4, 152.3, 90, 90, 90, "P 41 21 2"), marks=pytest.mark.campaign),
        pytest.param((60, 150, 70, 90, 110, 90, "C 1 2 1"), marks=pytest.mark.campaign),
        # Its spots are so many that some are near to any others; every hit was "indexed" with it once.
        (281, 281, 165, 90, 90, 120, "P 63"),
    ],
    ids=lambda cell: cell[-1],
)
def test_another_cell_indexes_nothing(frames, hits, cell):
    verdict = Verdict(frames)
    index = Indexer(UnitCell(*cell), verdict.geometry.wavelength)
    assert [index(verdict.q(peaks), peaks["intensity"]) for peaks in hits] == [[]] * len(hits)


@pytest.mark.parametrize("error", [0.9, 1.1])
def test_a_wrong_distance_indexes_nothing(frames, hits, error):
    verdict = Verdict(frames)
    index = Indexer(verdict.cell, verdict.geometry.wavelength)
    header = frames.simulator.header
    moved = header.model_copy(update={"detector_distance": error * header.detector_distance})
    geometry = type(verdict.geometry).from_header(moved, frames.shape)
    for peaks in hits:
        assert index(geometry.scattering_vector(peaks["x"], peaks["y"]), peaks["intensity"]) == []


def test_an_inverted_mask_leaves_no_hit(frames):
    verdict = Verdict(frames)
    find = PeakFinder(verdict.geometry, verdict.mask == 0, verdict.find.params)
    most = max(len(find(frames.pixels(i))) for i in range(len(frames.blobs)))
    assert most < 15


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
@pytest.mark.parametrize("kind", ["empty", "saturated", "marked", "negative"])
def test_frames_of_one_value_have_no_peak(frames, dtype, kind):
    verdict, info = Verdict(frames), np.iinfo(dtype)
    value = {"empty": 0, "saturated": verdict.find.params.saturation, "marked": info.max, "negative": info.min}[kind]
    assert len(verdict.find(np.full(frames.shape, value, dtype))) == 0


def test_not_a_number_is_no_peak_and_hides_none(frames):
    find = PeakFinder(Verdict(frames).geometry, np.zeros(frames.shape, bool), PeakParams())
    nothing = np.full(frames.shape, np.nan, np.float32)
    assert len(find(nothing)) == 0
    some = np.random.default_rng(0).poisson(1.0, frames.shape).astype(np.float32)
    some[400:403, 400:403] = 500.0
    some[::7, ::5] = np.nan
    assert any(np.hypot(peak["x"] - 401.5, peak["y"] - 401.5) < 1 for peak in find(some))


def test_a_hundred_thousand_false_peaks_take_bounded_time_and_give_no_lattice(frames):
    verdict, rng = Verdict(frames), np.random.default_rng(1)
    slow, fast = frames.shape
    frame = rng.poisson(0.5, frames.shape).astype(np.uint16)
    y, x = np.mgrid[2 : slow - 2 : 3, 2 : fast - 2 : 3].reshape(2, -1)
    chosen = rng.permutation(len(y))[:100_000]
    for dy, dx in ((0, 0), (0, 1), (1, 0)):
        frame[y[chosen] + dy, x[chosen] + dx] = rng.integers(200, 1000, 100_000)
    verdict(frames.blob(0))  # compiled
    started = time.perf_counter()
    peaks = verdict.find(frame)
    crystals = verdict.index(verdict.q(peaks), peaks["intensity"])
    assert time.perf_counter() - started < _PATIENCE_S
    assert len(peaks) <= verdict.find.params.max_peaks
    assert crystals == []


def test_a_hundred_thousand_spots_at_once_take_bounded_time_and_give_no_lattice(frames):
    """Given to the indexer past any limit of the peak search."""
    verdict, rng = Verdict(frames), np.random.default_rng(2)
    x, y = rng.uniform(0, frames.shape[1], 100_000), rng.uniform(0, frames.shape[0], 100_000)
    started = time.perf_counter()
    assert verdict.index(verdict.geometry.scattering_vector(x, y), rng.exponential(100, 100_000)) == []
    assert time.perf_counter() - started < _PATIENCE_S
