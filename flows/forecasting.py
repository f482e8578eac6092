"""When will it be enough? From how quantities grew lately, with how uncertain that is.

Each quantity that can be forecast is first made straight: a function of it that grows in proportion to the
number of crystals. Counts and multiplicity grow so themselves; of completeness C it is −log(1 − C), which is what
chance alone would make of it; of a correlation CC½/(1 − CC½), since the variance of a mean falls as 1/n; of
Rsplit 1/Rsplit², of I/σ its square. Rates, means and resolution are not forecast.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from flows.criteria import Comparison, Junction, Negation, Node, Quantity, Values
from flows.growing_merge import OF_SCALED

__all__ = ["Forecast", "History", "forecast"]

_KEEP = 40
_FEWEST = 4


def _same(value: float) -> float:
    return value


_STRAIGHT: dict[str, Callable[[float], float]] = {
    "completeness": lambda c: -math.log1p(-c) if c < 1 else math.inf,
    "cc_half": lambda cc: cc / (1 - cc) if cc < 1 else math.inf,
    "r_split": lambda r: 1 / r**2 if r > 0 else math.inf,
    "i_over_sigma": lambda x: x * abs(x),
    "cc_star": lambda cc: cc * cc / (2 - 2 * cc * cc) if abs(cc) < 1 else math.inf,
    **dict.fromkeys(
        ("minutes", "n_frames", "n_hits", "n_indexed", "n_crystals", "n_chunks", "n_observations", "multiplicity",
         "count", "sum"),
        _same,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """Minutes of data taking from now: the best guess, and where it lies with about 95 % if all goes on as lately.

    high : None where it may take for ever.
    """

    minutes: float
    low: float
    high: float | None

    def __str__(self) -> str:
        if self.minutes < 0.05:
            return "enough any moment"
        until = f"to {_short(self.high)}" if self.high is not None else "or much more"
        return f"enough in about {_short(self.minutes)} min ({_short(self.low)} {until})"


def _short(minutes: float) -> str:
    return f"{minutes:.1f}" if minutes < 10 else f"{minutes:.0f}"


@dataclass
class History:
    """The last values of each quantity, with the minutes of data taking at which they held."""

    points: dict[Quantity, deque[tuple[float, float]]] = field(default_factory=dict)

    def add(self, minutes: float, values: Values) -> None:
        for quantity, value in values.items():
            if value is not None and quantity.name in _STRAIGHT:
                points = self.points.setdefault(quantity, deque(maxlen=_KEEP))
                if not points or (minutes > points[-1][0] and not _is_old(quantity, value, points[-1][1])):
                    points.append((minutes, value))


def _is_old(quantity: Quantity, value: float, last: float) -> bool:
    """Whether it is the value of the last fit: between fits nothing is known, which is not that nothing has changed."""
    return quantity.name in OF_SCALED and value == last


def forecast(node: Node, values: Values, history: History) -> Forecast | None:
    """When the criterion will be met; None where that cannot be said (yet)."""
    if node.holds(values) is True:
        return Forecast(0.0, 0.0, 0.0)
    if isinstance(node, Comparison):
        return _when(node, history)
    if isinstance(node, Negation):
        return None
    assert isinstance(node, Junction)
    parts = [forecast(part, values, history) for part in node.parts]
    known = [part for part in parts if part is not None]
    if node.kind == "or":
        return min(known, key=lambda part: part.minutes, default=None)
    if len(known) < len(parts):
        return None
    highs = [part.high for part in known]
    high = None if None in highs else max(h for h in highs if h is not None)
    return Forecast(max(p.minutes for p in known), max(p.low for p in known), high)


def _when(comparison: Comparison, history: History) -> Forecast | None:
    """Along a straight line through the recent values.

    Its slope is uncertain by the scatter of the steps between chunks, and by how much it changed
    from the first half of them to the second.
    """
    quantity = comparison.quantity
    points = history.points.get(quantity)
    falls = quantity.name == "r_split"
    if points is None or len(points) < _FEWEST or (comparison.sign[0] == "<") != falls:
        return None
    straight = _STRAIGHT[quantity.name]
    at = np.array([minutes for minutes, _ in points])
    level = np.array([straight(value) for _, value in points])
    gap = straight(comparison.limit) - level[-1]
    if not np.isfinite(level).all() or not math.isfinite(gap):
        return None
    slope, error = _slope(at, level)
    if slope <= 0:
        return None
    fastest, slowest = slope + 2 * error, slope - 2 * error
    gap = max(gap, 0.0)
    return Forecast(gap / slope, gap / fastest, gap / slowest if slowest > 0 else None)


def _slope(at: np.ndarray, level: np.ndarray) -> tuple[float, float]:
    """Of a sum of independent steps, and its standard error."""
    steps, times = np.diff(level), np.diff(at)
    slope = (level[-1] - level[0]) / (at[-1] - at[0])
    scatter = np.std(steps - slope * times, ddof=1) * math.sqrt(len(steps)) / (at[-1] - at[0])
    middle = len(at) // 2
    before = (level[middle] - level[0]) / (at[middle] - at[0])
    after = (level[-1] - level[middle]) / (at[-1] - at[middle])
    return float(slope), float(max(scatter, abs(after - before) / 2))
