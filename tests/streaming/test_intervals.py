"""Runs of numbers behave as the set of their numbers."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.intervals import IntervalSet

CHANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 60)), max_size=30)


@given(CHANGES)
def test_behaves_as_a_set(changes):
    runs, numbers = IntervalSet(), set()
    for is_added, start, stop in changes:
        (runs.add if is_added else runs.discard)(start, stop)
        numbers = numbers | set(range(start, stop)) if is_added else numbers - set(range(start, stop))
    everything = np.arange(62)
    assert {i for i in everything.tolist() if i in runs} == numbers
    assert set(everything[runs.contains(everything)].tolist()) == numbers
    assert [i for start, stop in runs for i in range(start, stop)] == sorted(numbers)
    assert len(runs) == len(numbers)
    assert runs.stop == max(numbers, default=-1) + 1
    assert bool(runs) == bool(numbers)


@given(CHANGES)
def test_runs_are_as_few_as_can_be(changes):
    """Bounds rise strictly, so runs neither touch nor are empty; and they make the same set again."""
    runs = IntervalSet()
    for is_added, start, stop in changes:
        (runs.add if is_added else runs.discard)(start, stop)
    assert runs.bounds == sorted(set(runs.bounds))
    assert list(IntervalSet(runs.bounds)) == list(runs)
    for start, stop in runs:
        assert {runs.start_of(i) for i in range(start, stop)} == {start}
    assert runs.start_of(61) is None


@given(
    CHANGES, st.lists(st.integers(1, 40_000), min_size=2, max_size=20).map(lambda steps: steps[: len(steps) // 2 * 2])
)
def test_appending_many_is_adding_each(changes, steps):
    bounds = 60 + np.cumsum(steps)
    runs, one_by_one = IntervalSet(), IntervalSet()
    for is_added, start, stop in changes:
        for each in (runs, one_by_one):
            (each.add if is_added else each.discard)(start, stop)
    runs.append(bounds[::2], bounds[1::2])
    for start, stop in zip(bounds[::2].tolist(), bounds[1::2].tolist(), strict=True):
        one_by_one.add(start, stop)
    assert runs.bounds == one_by_one.bounds
    assert runs.changed >= one_by_one.changed


BIG_CHANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 400_000), st.integers(0, 90_000)), max_size=8)


@given(BIG_CHANGES, BIG_CHANGES)
def test_blocks_that_changed_are_all_that_must_be_written(before, after):
    runs = IntervalSet()
    for is_added, start, n in before:
        (runs.add if is_added else runs.discard)(start, start + n)
    written = {number: runs.block(number) for number in range(9)}
    assert list(itertools.chain(*written.values())) == runs.bounds
    runs.changed.clear()
    for is_added, start, n in after:
        (runs.add if is_added else runs.discard)(start, start + n)
    written |= {number: runs.block(number) for number in runs.changed}
    assert list(itertools.chain(*written.values())) == runs.bounds


def test_a_million_missing_frames_are_two_numbers():
    runs = IntervalSet()
    for start in range(0, 1_000_000, 1000):
        runs.add(start, start + 1000)
    assert runs.bounds == [0, 1_000_000]
