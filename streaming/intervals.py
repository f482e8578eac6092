"""A set of whole numbers as runs: a million missing frames are two numbers."""

import bisect
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

__all__ = ["IntervalSet"]


class IntervalSet:
    """Whole numbers from 0 on, kept as rising half-open runs ``[start, stop)`` that do not touch.

    The bounds of all runs stand in one array, 16 bytes a run. A number is a member if an odd
    number of bounds lies at or below it; so membership and changes are a search by halves, and adding
    behind the last run costs nothing else.
    """

    __slots__ = ("_bounds",)

    def __init__(self, bounds: Iterable[int] = ()) -> None:
        self._bounds = array("q", bounds)

    @property
    def bounds(self) -> list[int]:
        """Start and stop of each run in turn, rising; what the set is made from again."""
        return self._bounds.tolist()

    def add(self, start: int, stop: int) -> None:
        """Take in ``start <= i < stop``."""
        self._replace(start, stop, outside=0)

    def discard(self, start: int, stop: int) -> None:
        """Leave out ``start <= i < stop``."""
        self._replace(start, stop, outside=1)

    def _replace(self, start: int, stop: int, outside: int) -> None:
        """Drop the bounds within a range; its ends become bounds where what is beside it is otherwise."""
        if start >= stop:
            return
        bounds = self._bounds
        low = bisect.bisect_left(bounds, start)
        high = bisect.bisect_right(bounds, stop, low)
        ends = array("q")
        if low % 2 == outside:
            ends.append(start)
        if high % 2 == outside:
            ends.append(stop)
        bounds[low:high] = ends

    def contains(self, numbers: np.ndarray) -> np.ndarray:
        """Which of the numbers are members, bool, all at once."""
        bounds = np.frombuffer(self._bounds, np.int64) if self._bounds else np.empty(0, np.int64)
        return np.searchsorted(bounds, numbers, side="right") % 2 == 1

    def start_of(self, number: int) -> int | None:
        """Where the run begins that a number is in; None if it is in none."""
        at = bisect.bisect_right(self._bounds, number)
        return self._bounds[at - 1] if at % 2 else None

    def __contains__(self, number: int) -> bool:
        return bisect.bisect_right(self._bounds, number) % 2 == 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The runs as (start, stop), rising."""
        return zip(self._bounds[::2], self._bounds[1::2], strict=True)

    def __len__(self) -> int:
        """How many numbers are in the set."""
        return sum(self._bounds[1::2]) - sum(self._bounds[::2])

    def __bool__(self) -> bool:
        return bool(self._bounds)

    def __repr__(self) -> str:
        return f"IntervalSet({self.bounds})"
