"""What a report keeps of a run while it reads it, chunk by chunk: none of it grows with the run without end."""

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Block", "Blocks", "DetectorMap", "PeakCounts", "Sample"]

_MOST_BLOCKS = 2_000
_FRAMES_PER_BLOCK, _BLOCKS_PER_CHUNK = 10, 20
_MOST_PEAKS = 20_000
_MAP_CELLS, _FEWEST_CELLS, _PEAKS_PER_CELL = 128, 40, 2.0


class Sample:
    """Rows of numbers; all of them up to a limit, then every second, every fourth … of all there were."""

    def __init__(self, n_columns: int, most: int = 100_000) -> None:
        self._most, self._stride, self.n_seen = most, 1, 0
        self._parts: list[np.ndarray] = [np.empty((0, n_columns))]
        self._n_kept = 0

    def add(self, rows: np.ndarray) -> None:
        """rows : (n, columns)."""
        kept = rows[(-self.n_seen) % self._stride :: self._stride]
        self.n_seen += len(rows)
        self._parts.append(np.array(kept, float))
        self._n_kept += len(kept)
        while self._n_kept > self._most:
            self._parts = [np.concatenate(self._parts)[::2]]
            self._n_kept, self._stride = len(self._parts[0]), 2 * self._stride

    @property
    def rows(self) -> np.ndarray:
        """(n, columns), in the order they came."""
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    @property
    def is_whole(self) -> bool:
        return self._stride == 1


@dataclass(frozen=True)
class Block:
    """Sums over some neighbouring frames; ``middle`` is their mean index, ``n_peaks`` counts the peaks of hits."""

    middle: float
    n_frames: int
    n_hits: int
    n_indexed: int
    n_peaks: int


class Blocks:
    """Counts over blocks of neighbouring frames; where there are too many, neighbours are made one."""

    def __init__(self) -> None:
        self._rows = np.empty((0, 5))

    def add(self, index: np.ndarray, hit: np.ndarray, indexed: np.ndarray, n_peaks: np.ndarray) -> None:
        """Frames of one chunk: all (n,); ``index`` counts over all runs of a report."""
        if not len(index):
            return
        n_blocks = int(np.clip(len(index) // _FRAMES_PER_BLOCK, 1, _BLOCKS_PER_CHUNK))
        starts = np.array([part[0] for part in np.array_split(np.arange(len(index)), n_blocks)])
        columns = (index, np.ones(len(index)), hit, indexed, np.where(hit, n_peaks, 0))
        self._rows = np.concatenate(
            [self._rows, np.column_stack([np.add.reduceat(np.asarray(c, float), starts) for c in columns])]
        )
        if len(self._rows) > _MOST_BLOCKS:
            self._rows = _in_pairs(self._rows)

    def grouped(self, most: int, fewest_frames: int = 20) -> list[Block]:
        """At most so many groups of blocks, each of at least so many frames where there are that many."""
        if not len(self._rows):
            return []
        n_groups = int(np.clip(self._rows[:, 1].sum() // fewest_frames, 1, min(most, len(self._rows))))
        sums = [self._rows[part].sum(axis=0) for part in np.array_split(np.arange(len(self._rows)), n_groups)]
        return [Block(s[0] / s[1], *(int(v) for v in s[1:])) for s in sums]


def _in_pairs(rows: np.ndarray) -> np.ndarray:
    return np.add.reduceat(rows, np.arange(0, len(rows), 2), axis=0)


@dataclass
class PeakCounts:
    """How many frames have so many peaks, hits and others apart; (2, n) frames by number of peaks."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros((2, _MOST_PEAKS + 1), np.int64))

    def add(self, n_peaks: np.ndarray, hit: np.ndarray) -> None:
        kept = np.minimum(n_peaks, _MOST_PEAKS).astype(np.int64)
        for number, which in enumerate((hit, ~hit)):
            self.counts[number] += np.bincount(kept[which], minlength=_MOST_PEAKS + 1)

    @property
    def median_of_hits(self) -> int:
        """Peaks of the middle hit; 0 without hits."""
        rising = self.counts[0].cumsum()
        return int(np.searchsorted(rising, (rising[-1] + 1) // 2)) if rising[-1] else 0


class DetectorMap:
    """Peaks in cells of the detector, (slow, fast), each of ``factor`` pixels a side."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.factor = shape, max(1, -(-max(shape) // _MAP_CELLS))
        self.counts = np.zeros(tuple(-(-n // self.factor) for n in shape), np.int64)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """x, y : px; what lies beyond the detector is left out."""
        row, column = (y // self.factor).astype(int), (x // self.factor).astype(int)
        inside = (row >= 0) & (column >= 0) & (row < self.counts.shape[0]) & (column < self.counts.shape[1])
        np.add.at(self.counts, (row[inside], column[inside]), 1)

    def coarse(self) -> tuple[np.ndarray, int]:
        """Counts in cells so large that the usual one holds some peaks, (slow, fast), and their side, px."""
        counts, size = self.counts, self.factor
        while len(counts) > _FEWEST_CELLS and counts.mean() < _PEAKS_PER_CELL:
            edges = [np.arange(0, n, 2) for n in counts.shape]
            counts = np.add.reduceat(np.add.reduceat(counts, edges[0], axis=0), edges[1], axis=1)
            size *= 2
        return counts, size
