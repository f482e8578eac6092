"""A retry gets the first answer, also from the next service, whatever numbers a producer invents."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.answers import Answers
from storage.errors import IndexConflict
from storage.states import FrameState
from storage.stream_store import Admission

from .stores import frame_of, new_store, put, reopened, row

numbers = st.one_of(st.integers(-3, 300), st.integers(-(2**63), 2**63 - 1))


@given(st.lists(st.tuples(st.sampled_from("ab"), numbers, st.integers(0, 2**62)), max_size=40))
def test_as_a_dictionary(sent):
    answers, model = Answers(), {}
    for producer, sequence, index in sent:
        answers.add(producer, sequence, index)
        model[producer, sequence] = index
    asked = {(producer, number + d) for producer, number in model for d in (-1, 0, 1)}
    assert all(answers.find(*key) == model.get(key) for key in asked)


@given(st.lists(st.lists(numbers, max_size=30, unique=True), max_size=4), st.booleans())
def test_many_at_once_as_one_by_one(batches, is_counted):
    at_once, single, n = Answers(), Answers(), 0
    for batch in batches:
        sequences = list(range(n, n + len(batch))) if is_counted else batch
        indices = [7 * sequence % 1000 for sequence in sequences]
        at_once.add_many("a", np.array(sequences, np.int64), np.array(indices, np.int64))
        for sequence, index in zip(sequences, indices, strict=True):
            single.add("a", sequence, index)
        n += len(batch)
    asked = {sequence for batch in batches for sequence in batch} | set(range(n))
    assert [at_once.find("a", s) for s in asked] == [single.find("a", s) for s in asked]


def test_memory_is_that_of_the_frames():
    tracemalloc.start()
    answers = Answers()
    for index in range(100_000):
        answers.add("a", index, index)
    assert tracemalloc.get_traced_memory()[0] < 1_000_000
    for index in range(1000):
        answers.add("b", 2**62 - 1000 * index, index)
        answers.add("c", 65 * index, index)
    assert tracemalloc.get_traced_memory()[0] < 2_500_000
    tracemalloc.stop()


def sending(store, index, sequence, producer="p", **fields):
    return frame_of(store, index, producer=producer, sequence=sequence, **fields)


def fill(store) -> None:
    """Sealed frames 0 to 3 but 2, which comes late, and frame 5 in a journal; sequence = 10 + index."""
    store.append_many([sending(store, index, 10 + index) for index in (0, 1, 3, 5)])
    store.account(2, 3, FrameState.missing, "not received")
    store.seal_complete()
    store.append_late(*sending(store, 2, 12))


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same service", "next service"])
def test_retry_gets_the_first_answer(tmp_path, is_restarted):
    store = new_store(tmp_path)
    fill(store)
    store = reopened(store) if is_restarted else store
    assert [store.answered("p", 10 + index) for index in range(7)] == [0, 1, 2, 3, None, 5, None]
    assert store.answered("q", 10) is None
    for index in (0, 1, 2, 3, 5):
        assert store.admit(sending(store, index, 10 + index)[0]) is Admission.retry
        assert store.admit(sending(store, index, 10 + index, "q")[0]) is Admission.duplicate
    assert store.duplicate == 5, "retries are not counted"


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same service", "next service"])
def test_sending_with_other_content_or_index_is_a_conflict(tmp_path, is_restarted):
    store = new_store(tmp_path)
    fill(store)
    store = reopened(store) if is_restarted else store
    for index in (0, 2, 5):
        with pytest.raises(IndexConflict, match=f"frame {index} of eiger arrived twice with different content"):
            store.admit(row(index, b"other", producer="p", sequence=10 + index))
        with pytest.raises(IndexConflict, match=f"sending {10 + index} of producer p .* stored as frame {index} "):
            store.admit(sending(store, 6, 10 + index)[0])


def test_producers_that_do_not_count_have_duplicates_only(tmp_path):
    store = new_store(tmp_path)
    put(store, 0, 1)
    store.append(*frame_of(store, 2, producer="p"))
    store.append(*frame_of(store, 3, producer="p", sequence=2**62))
    store.seal_complete()
    store = reopened(store)
    assert store.admit(frame_of(store, 0)[0]) is Admission.duplicate
    assert store.admit(frame_of(store, 2, producer="p")[0]) is Admission.duplicate
    assert store.admit(frame_of(store, 3, producer="p", sequence=2**62)[0]) is Admission.retry
    assert store.answered("p", 2**62) == 3
