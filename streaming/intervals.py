"""A set of whole numbers as runs: a million missing frames are two numbers."""

import bisect
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

__all__ = ["IntervalSet"]

_BLOCK_BITS = 16


class IntervalSet:
    """Whole numbers from 0 on, kept as rising half-open runs ``[start, stop)`` that do not touch.

    The bounds of all runs stand in one array, 16 bytes a run. A number is a member if an odd
    number of bounds lies at or below it; so membership and changes are a search by halves, and adding
    behind the last run costs nothing else.

    To be written in parts, runs count to the block of 65,536 numbers in which they start;
    ``changed`` are the blocks that are not as they were when somebody last emptied it.
    """

    __slots__ = ("_bounds", "changed")

    def __init__(self, bounds: Iterable[int] = ()) -> None:
        self._bounds = array("q", bounds)
        self.changed: set[int] = set()

    @property
    def bounds(self) -> list[int]:
        """Start and stop of each run in turn, rising; what the set is made from again."""
        return self._bounds.tolist()

    def add(self, start: int, stop: int) -> None:
        """Take in ``start <= i < stop``."""
        self._replace(start, stop, outside=0)

    def append(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Take in many runs at once, rising and apart from each other, behind all there are."""
        self.add(int(starts[0]), int(stops[0]))  # may touch the last one
        bounds = np.column_stack([starts[1:], stops[1:]]).astype(np.int64)
        self._bounds.frombytes(bounds.tobytes())
        self.changed.update(np.unique(bounds >> _BLOCK_BITS).tolist())

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
        before = bounds[low - low % 2 : high]
        bounds[low:high] = ends
        self.changed.update([bound >> _BLOCK_BITS for bound in before + ends])

    def block(self, number: int) -> list[int]:
        """The bounds of the runs that start in a block."""
        first, last = (bisect.bisect_left(self._bounds, edge << _BLOCK_BITS) for edge in (number, number + 1))
        # An odd one is the stop of a run that starts before.
        return self._bounds[first + first % 2 : last + last % 2].tolist()

    def contains(self, numbers: np.ndarray) -> np.ndarray:
        """Which of the numbers are members, bool, all at once."""
        bounds = np.frombuffer(self._bounds, np.int64) if self._bounds else np.empty(0, np.int64)
        return np.searchsorted(bounds, numbers, side="right") % 2 == 1

    @property
    def stop(self) -> int:
        """Behind the highest number; 0 for an empty set."""
        return self._bounds[-1] if self._bounds else 0

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
