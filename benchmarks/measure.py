"""Timing things beside each other, and the figures that come of it.

Two figures taken minutes apart cannot be compared on a machine that does other work. So all that
belongs together runs in turn, round after round, and a ratio is the median of the rounds' ratios.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Figure",
    "Rounds",
    "Target",
    "absent",
    "clock",
    "figure",
    "in_rounds",
    "interleave",
    "percentile",
    "rates",
]

log = logging.getLogger("benchmarks")

Rounds = dict[str, list[float]]
# A median of fewer says little.
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Target:
    """What a figure is meant to reach: a share of its limit, or a number in its own unit."""

    kind: Literal["of limit", "at least", "at most"]
    number: float

    def is_met(self, value: float, ratio: float | None) -> bool:
        if self.kind == "of limit":
            return ratio is not None and ratio >= self.number
        return value >= self.number if self.kind == "at least" else value <= self.number


@dataclass(frozen=True)
class Figure:
    """One measured value, its limit or peer, and how near it comes.

    limit_value : None with a limit_name says why that limit could not be measured.
    ratio : 1 is at the limit, below 1 slower than it, above 1 faster; whatever the unit. None without
        a limit.
    low, high : smallest and largest of the rounds.
    is_met : whether the target is reached; None without a target, or when its limit could not be measured.
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
    target: Target | None = None
    is_met: bool | None = None


def clock(function: Callable[[], object], n: int = 1) -> Callable[[], float]:
    """A round that calls ``function`` n times: s per call."""

    def once() -> float:
        started = time.perf_counter()
        for _ in range(n):
            function()
        return (time.perf_counter() - started) / n

    return once


def in_rounds(repeats: int, within_s: float = math.inf) -> Iterator[int]:
    """0 to repeats - 1, one for each round; after ``within_s`` no further one begins, but three there are."""
    started = time.monotonic()
    for number in range(repeats):
        if number >= _FEWEST_ROUNDS and time.monotonic() - started > within_s:
            log.info("no time for more than %d of %d rounds", number, repeats)
            return
        yield number
        log.info("round %d of %d, %.0f s", number + 1, repeats, time.monotonic() - started)


def interleave(
    rounds: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: bool = True, within_s: float = math.inf
) -> Rounds:
    """Run everything once per round, in an order that turns with each round: the numbers by name."""
    names = list(rounds)
    if warm_up:
        for name in names:
            rounds[name]()
    results: Rounds = {name: [] for name in names}
    for number in in_rounds(repeats, within_s):
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
    target: Target | None = None,
) -> Figure:
    """The median of a figure's rounds beside the median of its limit's.

    limit : name, and one number per round; a single number is a published value, none a limit that could
        not be measured, whose name says why.
    """
    limit_name, numbers = limit or (None, [])
    limit_value = ratio = None
    if numbers:
        limits = list(numbers) * (len(values) if len(numbers) == 1 else 1)
        limit_value = statistics.median(limits)
        pairs = zip(values, limits, strict=True)
        ratio = statistics.median(v / x if higher_is_better else x / v for v, x in pairs)
    value = statistics.median(values)
    is_judged = target is not None and (target.kind != "of limit" or ratio is not None)
    return Figure(
        name, value, unit, limit_name, limit_value, ratio, min(values), max(values), len(values),
        target, target.is_met(value, ratio) if target and is_judged else None,
    )  # fmt: skip


def absent(peer: str, why: str) -> tuple[str, Sequence[float]]:
    """A limit that cannot be measured here, for `figure`: its row stays and says why."""
    return f"{peer} ({why})", []


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]
