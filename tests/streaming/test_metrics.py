"""Counters and histograms: what they count, from several threads, and what that costs."""

import threading

import pytest

from streaming.metrics import BOUNDS_S, Counter, Histogram, ServiceMetrics, resident_bytes

BUCKETS = [(-3.0, 0), (0.0, 0), (BOUNDS_S[0], 0), (0.00011, 1), (0.02, 7), (10.0, 15), (11.0, 16), (1e9, 16)]


@pytest.mark.parametrize(("seconds", "bucket"), BUCKETS)
def test_a_duration_falls_into_the_first_bucket_that_holds_it(seconds, bucket):
    histogram = Histogram()
    histogram.observe(seconds)
    counts = histogram.as_dict()["counts"]
    assert counts.index(1) == bucket
    assert sum(counts) == 1
    assert histogram.as_dict()["sum_s"] == histogram.as_dict()["longest_s"] == max(seconds, 0)


def test_nothing_is_lost_between_threads():
    counter, histogram = Counter(), Histogram()

    def work() -> None:
        for _ in range(20_000):
            counter.add(3)
            histogram.observe(0.5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value == 240_000
    assert sum(histogram.as_dict()["counts"]) == 80_000
    assert histogram.as_dict()["sum_s"] == 40_000


def test_what_fails_is_timed_too():
    histogram = Histogram()
    with pytest.raises(KeyError), histogram.timed():
        raise KeyError
    assert sum(histogram.as_dict()["counts"]) == 1


def test_all_are_in_the_status():
    metrics = ServiceMetrics()
    metrics.frames_stored.add(2)
    metrics.seal.observe(1.0)
    content = metrics.as_dict()
    assert content["counters"]["frames_stored"] == 2
    assert content["histograms"]["seal"]["sum_s"] == 1.0
    assert {len(h["counts"]) for h in content["histograms"].values()} == {len(content["bounds_s"]) + 1}
    assert set(content["counters"]) | set(content["histograms"]) == set(vars(metrics))


def test_memory_is_what_this_process_takes():
    assert 5 << 20 < resident_bytes() < 64 << 30
