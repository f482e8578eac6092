"""Which sending was stored under which index, so that a retry gets the first answer again."""

from array import array

import numpy as np

__all__ = ["Answers"]

# A producer's number may be so far ahead of its last one without costing a dictionary entry: with
# several connections, or a frame that was refused, a few come out of order.
_LONGEST_GAP = 64
_NO_INDEX = -1


class Answers:
    """The frame_index of every stored sending, by producer and its own count.

    Producers count from 0, mostly without gaps: that costs 8 bytes a frame. Any other integer
    costs one dictionary entry, whatever its size.
    """

    def __init__(self) -> None:
        self._counted: dict[str, array[int]] = {}
        self._others: dict[tuple[str, int], int] = {}

    def find(self, producer: str, sequence: int) -> int | None:
        """Where a sending was stored; None if it was not."""
        counted = self._counted.get(producer)
        if counted is not None and 0 <= sequence < len(counted) and counted[sequence] != _NO_INDEX:
            return counted[sequence]
        return self._others.get((producer, sequence))

    def add(self, producer: str, sequence: int, frame_index: int) -> None:
        """Remember one sending."""
        counted = self._counted.get(producer)
        if counted is None:
            counted = self._counted[producer] = array("q")
        ahead = sequence - len(counted)
        if ahead == 0:
            counted.append(frame_index)
        elif sequence >= 0 and ahead < 0:
            counted[sequence] = frame_index
        elif 0 < ahead <= _LONGEST_GAP:
            counted.extend([_NO_INDEX] * ahead)
            counted.append(frame_index)
        else:
            self._others[producer, sequence] = frame_index

    def add_many(self, producer: str, sequences: np.ndarray, indices: np.ndarray) -> None:
        """Remember many sendings of one producer, in any order; at once where they follow those known."""
        order = np.argsort(sequences)
        sequences, indices = sequences[order], indices[order]
        counted = self._counted.setdefault(producer, array("q"))
        if np.array_equal(sequences, np.arange(len(counted), len(counted) + len(sequences))):
            counted.frombytes(np.ascontiguousarray(indices, np.int64).tobytes())
            return
        for sequence, index in zip(sequences.tolist(), indices.tolist(), strict=True):
            self.add(producer, sequence, index)
