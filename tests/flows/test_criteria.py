"""Stop criteria: what may be written, what it means, what is refused, and when it will be met."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.criteria import AGGREGATES, QUANTITIES, Criterion, Quantity, read_criteria, read_criterion
from flows.forecasting import History, forecast
from storage.errors import BadCriterion


@pytest.mark.parametrize(
    ("text", "values", "is_met"),
    [
        ("n_indexed >= 1000", {"n_indexed": 1000}, True),
        ("n_indexed > 1000", {"n_indexed": 1000}, False),
        ("completeness > 0.98 and cc_half > 0.5", {"completeness": 0.99, "cc_half": 0.4}, False),
        ("completeness > 0.98 AND cc_half > .5", {"completeness": 0.99, "cc_half": 0.6}, True),
        ("0.5 < cc_half", {"cc_half": 0.6}, True),
        ("resolution <= 2.0", {"resolution": None}, False),
        ("not resolution <= 2.0", {"resolution": None}, False),
        ("resolution <= 2.0 or minutes >= 20", {"resolution": None, "minutes": 20}, True),
        ("minutes >= 1 or n_hits > 5 and n_hits < 3", {"minutes": 1, "n_hits": 4}, True),
        ("(minutes >= 1 or n_hits > 5) and n_hits < 3", {"minutes": 1, "n_hits": 4}, False),
        ("hit_rate > 0.1", {"hit_rate": float("nan")}, False),
    ],
)
def test_meaning(text, values, is_met):
    assert read_criterion(text).is_met({Quantity(name): value for name, value in values.items()}) is is_met


def test_columns_of_own_steps_are_aggregated_and_judged():
    """As for a catalysis run: what a user's step fitted, with one shot whose fit failed."""
    criterion = read_criterion("max(fraction_reduced) >= 0.95 and median(chi2_red) < 2 and std(chi2_red) < 1")
    columns = {"fraction_reduced": [0.2, 0.6, np.nan, 0.96], "chi2_red": [1.0, 1.1, np.nan, 0.9]}

    def values(n: int) -> dict[Quantity, float | None]:
        shots = {name: np.array(column[:n]) for name, column in columns.items()}
        return {q: AGGREGATES[q.name](shots[q.column][np.isfinite(shots[q.column])]) for q in criterion.quantities}

    assert [criterion.is_met(values(n)) for n in range(5)] == [False, False, False, False, True]
    assert values(4)[Quantity("max", column="fraction_reduced")] == 0.96
    assert values(0)[Quantity("median", column="chi2_red")] is None, "nothing is known of no shots"


def test_arguments_and_scope():
    criterion = read_criterion("sample: completeness(2.0) > 0.98 and mean(edge_energy) > 7120 and count(hit) >= 500")
    assert criterion.scope == "sample"
    assert criterion.quantities == (
        Quantity("completeness", d_min=2.0), Quantity("mean", column="edge_energy"), Quantity("count", column="hit"),
    )  # fmt: skip
    assert read_criterion("n_hits > 1").scope == read_criterion("run: n_hits > 1").scope == "run"


@pytest.mark.parametrize(
    "text",
    [
        "", "  ", None, 3, "n_indexed", "n_indexed >", "3 > 2", "n_hits > n_frames", "mean(3) > 1", "mean > 1",
        "completeness(0) > 1", "completeness(nan) > 1", "minutes(3) > 2", "((((n_hits > 1)", "n_hits > 1)",
        "(" * 60 + "n_hits>1" + ")" * 60, "not " * 200 + "n_hits>1", "x" * 2000, "n_hits > 1e999", "n_hits > nan",
        "n_hits > 0x10", "1 < n_hits < 3", "n_hits[0] > 1", "n_hits > 1; n_hits", "n_hits > 1 n_hits < 2", "lambda: 0",
        "__import__('os')", "n_hits.__class__ > 1", "n_hits > '1'", "n_hits > 1 and", "and n_hits > 1", "n_hits > ١",
        "beamline: n_hits > 1",
    ],
)  # fmt: skip
def test_bad_input_is_refused(text):
    with pytest.raises(BadCriterion):
        read_criterion(text)


def test_unknown_name_lists_those_there_are():
    with pytest.raises(BadCriterion, match="did you mean n_indexed") as error:
        read_criterion("n_indexd > 3")
    assert all(name in str(error.value) for name in (*QUANTITIES, *AGGREGATES))


def test_one_text_is_no_list():
    with pytest.raises(BadCriterion, match="list"):
        read_criteria("n_hits > 1")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="n_hits>=<!() 0.9andorot,-e'[]", max_size=60))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(BadCriterion):
        assert isinstance(read_criterion(text), Criterion)


def history(name, values, step=0.1):
    found, quantity = History(), Quantity(name)
    for number, value in enumerate(values):
        found.add(number * step, {quantity: value})
    return found, {quantity: values[-1]}


def test_steady_growth_is_forecast():
    found, values = history("n_indexed", [10.0 * n for n in range(10)])
    answer = forecast(read_criterion("n_indexed >= 1000").tree, values, found)
    assert (answer.minutes, answer.low, answer.high) == pytest.approx((9.1, 9.1, 9.1))


def test_completeness_saturates():
    found, values = history("completeness", [1 - 0.9**n for n in range(10)])
    answer = forecast(read_criterion("completeness > 0.9").tree, values, found)
    # 0.9^n = 0.1 at n = 21.85; nine steps of 0.1 min are behind.
    assert answer.minutes == pytest.approx(2.185 - 0.9, abs=0.01)


@pytest.mark.parametrize("text", ["hit_rate > 0.5", "n_indexed < 5", "not n_indexed < 500", "resolution < 2"])
def test_what_cannot_be_forecast_is_not(text):
    found, values = history("n_indexed", [10.0 * n for n in range(10)])
    assert forecast(read_criterion(text).tree, values, found) is None


def test_standstill_gives_no_forecast():
    found, values = history("n_indexed", [10.0] * 10)
    assert forecast(read_criterion("n_indexed >= 1000").tree, values, found) is None
