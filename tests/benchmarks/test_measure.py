"""The benchmarks' own arithmetic, and that each of them runs; how fast is for `make bench` to say."""

import json

import pytest

from benchmarks import catalysis_loop, codec, read, report, small, stall, store, wire
from benchmarks.frames import FrameSet, Options
from benchmarks.measure import Target, absent, figure, in_rounds, interleave, percentile


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


@pytest.mark.parametrize(
    ("kind", "number", "limit", "is_met"),
    [
        pytest.param("of limit", 0.8, ("x", [10]), True, id="at-the-share"),
        pytest.param("of limit", 0.81, ("x", [10]), False, id="below-the-share"),
        pytest.param("of limit", 0.1, absent("x", "not installed"), None, id="nothing-to-compare-with"),
        pytest.param("at least", 8, None, True, id="just-enough"),
        pytest.param("at least", 9, absent("x", "not installed"), False, id="too-little"),
        pytest.param("at most", 8, None, True, id="just-within"),
        pytest.param("at most", 7, None, False, id="too-much"),
    ],
)
def test_a_target_is_met_short_or_not_judged(kind, number, limit, is_met):
    assert figure("f", "u", [8], limit, higher_is_better=True, target=Target(kind, number)).is_met is is_met


def test_a_peer_that_is_absent_stays_in_the_table():
    one = figure("f", "u", [8], absent("Redis", "not installed"), higher_is_better=True, target=Target("of limit", 1))
    assert (one.limit_name, one.limit_value, one.ratio) == ("Redis (not installed)", None, None)
    assert list(report.table({"wire": [one]}).columns[4].cells) == ["Redis (not installed)"]


def test_each_round_runs_everything_once_and_begins_with_another():
    order = []
    rounds = {name: (lambda name=name: order.append(name) or 1.0) for name in "ab"}
    assert interleave(rounds, 2, warm_up=False) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", "b", "a"]


@pytest.mark.parametrize(
    ("repeats", "within_s", "n_rounds"),
    [
        pytest.param(7, 60.0, 7, id="time-enough"),
        pytest.param(7, 0.0, 3, id="no-time-but-for-the-fewest"),
        pytest.param(2, 0.0, 2, id="fewer-were-asked-for"),
    ],
)
def test_rounds_end_when_the_time_is_over(repeats, within_s, n_rounds):
    assert list(in_rounds(repeats, within_s)) == list(range(n_rounds))


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100), (1, 1)])
def test_percentile_is_one_of_the_values(percent, expected):
    assert percentile(range(100, 0, -1), percent) == expected


@pytest.mark.parametrize(
    "benchmark",
    [codec, store, read, small, *(pytest.param(m, marks=pytest.mark.campaign) for m in (wire, stall, catalysis_loop))],
    ids=lambda module: module.__name__,
)
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
