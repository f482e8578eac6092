"""Timing things beside each other, and the figures that come of it.

Two figures taken minutes apart cannot be compared on a machine that does other work. So all that
belongs together runs in turn, round after round, and a ratio is the median of the rounds' ratios.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Figure", "Rounds", "clock", "figure", "interleave", "percentile", "rates"]

Rounds = dict[str, list[float]]


@dataclass(frozen=True)
class Figure:
    """One measured value, its limit or peer, and how near it comes.

    ratio : 1 is at the limit, below 1 slower than it, above 1 faster; whatever the unit. None without
        a limit.
    low, high : smallest and largest of the rounds.
    """

    name: str
    value: float
    unit: str
    limit_name: str | None
    limit_value: float | None
    ratio: float | None
    low: float
    high: float
    n_rounds: int


def clock(function: Callable[[], object], n: int = 1) -> Callable[[], float]:
    """A round that calls ``function`` n times: s per call."""

    def once() -> float:
        started = time.perf_counter()
        for _ in range(n):
            function()
        return (time.perf_counter() - started) / n

    return once


def interleave(rounds: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: bool = True) -> Rounds:
    """Run everything once per round, in an order that turns with each round: the numbers by name."""
    names = list(rounds)
    if warm_up:
        for name in names:
            rounds[name]()
    results: Rounds = {name: [] for name in names}
    for number in range(repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            results[name].append(rounds[name]())
    return results


def rates(amount: float, seconds: Sequence[float]) -> list[float]:
    """Amount per second of each round."""
    return [amount / s for s in seconds]


def figure(
    name: str,
    unit: str,
    values: Sequence[float],
    limit: tuple[str, Sequence[float]] | None = None,
    *,
    higher_is_better: bool,
) -> Figure:
    """The median of a figure's rounds beside the median of its limit's.

    limit : name, and one number per round; a single number is a published value.
    """
    limit_name = limit_value = ratio = None
    if limit is not None:
        limit_name, numbers = limit
        limits = list(numbers) * (len(values) if len(numbers) == 1 else 1)
        limit_value = statistics.median(limits)
        pairs = zip(values, limits, strict=True)
        ratio = statistics.median(v / x if higher_is_better else x / v for v, x in pairs)
    return Figure(
        name, statistics.median(values), unit, limit_name, limit_value, ratio, min(values), max(values), len(values)
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]
