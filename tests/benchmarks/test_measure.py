"""The benchmarks' own arithmetic, and that each of them runs; how fast is for `make bench` to say."""

import json

import pytest

from benchmarks import codec, read, report, store, wire
from benchmarks.frames import FrameSet, Options
from benchmarks.measure import figure, interleave, percentile


@pytest.mark.parametrize(
    ("values", "limits", "higher_is_better", "ratio"),
    [
        pytest.param([50, 50, 50], [100, 100, 100], True, 0.5, id="half-the-rate"),
        pytest.param([2, 2, 2], [1, 1, 1], False, 0.5, id="twice-the-time"),
        pytest.param([4, 4], [8], True, 0.5, id="published"),
        # medians taken apart would give 50 / 90
        pytest.param([50, 10, 90], [100, 20, 90], True, 0.5, id="round-by-round"),
    ],
)
def test_a_ratio_of_one_half_means_half_as_fast(values, limits, higher_is_better, ratio):
    assert figure("f", "u", values, ("limit", limits), higher_is_better=higher_is_better).ratio == ratio


def test_each_round_runs_everything_once_and_begins_with_another():
    order = []
    rounds = {name: (lambda name=name: order.append(name) or 1.0) for name in "ab"}
    assert interleave(rounds, 2, warm_up=False) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", "b", "a"]


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100), (1, 1)])
def test_percentile_is_one_of_the_values(percent, expected):
    assert percentile(range(100, 0, -1), percent) == expected


@pytest.mark.parametrize("benchmark", [codec, store, read, wire], ids=lambda module: module.__name__)
def test_a_quick_benchmark_gives_figures_that_can_be_written(benchmark, tmp_path):
    figures = benchmark.measure(Options(tmp_path, size="512", quick=True))
    assert figures
    assert all(one.value >= 0 for one in figures)
    path = report.write_json(tmp_path, "x", figures, "command", report.machine())
    assert len(json.loads(path.read_text())["figures"]) == len(figures)


def test_the_frames_hold_a_hit_and_a_blank():
    frames = FrameSet.make("512", 8)
    assert frames.truths[frames.first(is_hit=True)].is_hit
    assert not frames.truths[frames.first(is_hit=False)].is_hit
