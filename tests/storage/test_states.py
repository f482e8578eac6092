"""Each index is in exactly one state, and the sums say so."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.models import StreamHeader
from storage.states import READABLE, FrameState, IndexStates, StreamLedger, build_ledger

HEADER = StreamHeader(experiment="e", run=1, data_source="d", shape=(2, 2), dtype="uint8")

changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "account", "announce"]),
        st.integers(0, 3000),
        st.integers(0, 300),
        st.sampled_from([state for state in FrameState if state is not FrameState.pending]),
        st.sampled_from([None, "dropped", "bad shape", "unknown"]),
    ),
    max_size=12,
)


def apply(done) -> tuple[IndexStates, dict[int, tuple[FrameState, str]], int]:
    """The states, and a plain dictionary that has seen the same."""
    states, model, announced = IndexStates(), {}, 0
    for what, start, n, state, cause in done:
        announced = max(announced, start + n)
        if what == "announce":
            states.announce(start + n)
            continue
        getattr(states, what)(start, start + n, state, cause)
        for index in range(start, start + n):
            if what == "set" or index not in model:
                has_cause = state not in (
                    FrameState.pending, FrameState.stored, FrameState.late, FrameState.buffered
                )  # fmt: skip
                model[index] = (state, cause if cause and has_cause else "unknown")
    return states, model, announced


@given(done=changes)
def test_states_are_those_of_a_plain_dictionary(done):
    states, model, announced = apply(done)
    assert states.announced == announced
    assert all(states[i] is model.get(i, (FrameState.pending,))[0] for i in range(announced + 3))
    assert all(states.cause(i) == cause for i, (_, cause) in model.items())
    assert states.watermark == next((i for i in range(announced) if i not in model), announced)


@given(done=changes)
def test_what_is_readable_only_after_it_was_given_up_is_listed_as_late(done):
    """Groups that have passed such a frame find it there, whether or not its chunk was sealed before."""
    states, late = IndexStates(), []
    for what, start, n, state, cause in done:
        if what == "announce":
            states.announce(start + n)
            continue
        indices = range(start, start + n)
        if what == "set" and state is FrameState.late:
            late += indices
        elif what == "set" and state in READABLE:
            late += [i for i in indices if states[i] is not FrameState.pending and states[i] not in READABLE]
        getattr(states, what)(start, start + n, state, cause)
    states.set(5, 7, FrameState.late)
    assert states.late_order == [*late, 5, 6]


@given(done=changes, start=st.integers(-5, 3500), length=st.integers(-5, 3500))
def test_counts_indices_and_ranges_agree(done, start, length):
    states, model, announced = apply(done)
    stop = start + length
    inside = range(max(start, 0), max(min(stop, announced), 0))
    for state in FrameState:
        want = [i for i in inside if model.get(i, (FrameState.pending,))[0] is state]
        assert states.indices(state, start, stop).tolist() == want
        assert states.count(state, start, stop) == len(want)
    ranges = states.ranges()
    assert [r.start for r in ranges] == ([0] if announced else []) + [r.stop for r in ranges[:-1]]
    assert (ranges[-1].stop if ranges else 0) == announced
    for part in ranges:
        assert {states[i].name for i in range(part.start, part.stop)} == {part.state}
    again = IndexStates()
    for part in ranges:
        again.set(part.start, part.stop, FrameState[part.state], part.cause)
    assert again.ranges() == ranges, "what a commit says brings the same states back"


@given(done=changes, is_terminal=st.booleans())
def test_ledger_balances(done, is_terminal):
    states, _, announced = apply(done)
    if is_terminal:
        states.account(0, announced, FrameState.missing, "end")
    online = HEADER.model_copy(update={"persistence": "online"})
    ledger = build_ledger(online, states, 1, is_terminal=is_terminal)
    assert ledger.problems == []
    known = ledger.received + ledger.missing + ledger.rejected + ledger.late + ledger.left_out
    assert known + ledger.pending == announced
    after = ledger.without_memory()
    assert after.problems == []
    assert (after.received, after.buffered, after.incomplete) == (ledger.received, 0, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"announced": 5, "received": 3, "stored": 3}, "5 frames announced, but 3 received"),
        ({"announced": 3, "received": 3, "stored": 2}, "3 frames received, but 0 buffered \\+ 2 stored"),
        ({"announced": 3, "late": 2}, "3 frames announced, but 0 received .* 2 late"),
        ({"announced": 3, "left_out": 2}, "3 frames announced, but 0 received .* 2 left out"),
        ({"announced": 2, "received": 2, "stored": 1}, "0 incomplete"),
        ({"announced": 1, "pending": 1, "is_terminal": True}, "ended with 1 frames in no state"),
        ({"announced": 1, "received": 1, "buffered": 1, "is_terminal": True}, "1 frames in memory only"),
    ],
    ids=["lost", "not stored", "late", "left out", "incomplete", "pending at the end", "buffered at the end"],
)
def test_imbalance_is_said(fields, words):
    ledger = StreamLedger(data_source="eiger", **fields)
    assert not ledger.is_balanced
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(ledger.problems[0])


@pytest.mark.parametrize("number", [-(2**63), -1, 2**63, 2**64, 10**30], ids=str)
def test_any_number_may_be_asked_for(number):
    states = IndexStates()
    states.set(0, 5, FrameState.stored)
    assert states[number] is FrameState.pending
    assert states.indices(FrameState.stored, number, number + 1).size == 0
    assert states.count(FrameState.stored, number) == (5 if number < 0 else 0)
    assert states.cause(number) == "unknown"


def test_million_missing_frames_are_cheap():
    states = IndexStates()
    states.account(0, 1_000_000, FrameState.missing, "down for an hour")
    assert [(r.start, r.stop) for r in states.ranges()] == [(0, 1_000_000)]
    assert states._codes.nbytes + states._cause_of.nbytes < 20e6


def test_readers_while_the_arrays_grow():
    states, failed = IndexStates(), []

    def look():
        try:
            while states.announced < 200_000:
                assert states.watermark <= states.announced
                states.indices(FrameState.stored, states.watermark - 10)
                states[states.announced - 1]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for index in range(0, 200_000, 7):
        states.set(index, index + 7, FrameState.stored)
    for thread in threads:
        thread.join()
    assert not failed
    assert np.all(states._codes[: states.announced] == FrameState.stored)
