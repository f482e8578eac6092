"""Background of a frame as a function of the distance from the beam: mean and limit of each ring of pixels.

As in peakfinder8 (Barty et al. 2014): five passes over the pixels of a ring, each leaving out what lies outside the
limits of the pass before. Which pixels are looked at is settled once for a detector; per frame they are gathered ring
by ring, so that the passes run over a few hundred numbers next to each other.
"""

import numpy as np
from numba import njit

__all__ = ["N_PASSES", "RingStatistics"]

N_PASSES = 5
# Fibonacci hashing (Knuth): neighbouring rows get unlike numbers.
_HASH = np.uint32(2654435769)


class RingStatistics:
    """Statistics prepared for one detector; keeps no state between calls.

    Parameters
    ----------
    rings : (slow, fast) uint16, 0 where a pixel is not to be used, else the number of its ring.
    per_ring : 0 to use every pixel; else whole rows are left out of large rings, such that at least so many stay.
        The same rings give the same pixels.
    """

    def __init__(self, rings: np.ndarray, per_ring: int = 0) -> None:
        self.n_rings = int(rings.max(initial=0)) + 1
        flat = rings.reshape(-1)
        chosen = np.flatnonzero(_sampled(rings, per_ring, self.n_rings) if per_ring > 0 else flat)
        # Where the value of each pixel goes, so that rings lie one behind the other.
        order = np.argsort(flat[chosen], kind="stable")
        slots = np.empty(len(chosen), np.int32)
        slots[order] = np.arange(len(chosen), dtype=np.int32)
        self._positions, self._slots = chosen.astype(np.int32), slots
        self._starts = np.searchsorted(flat[chosen][order], np.arange(self.n_rings + 1)).astype(np.int64)

    def __call__(
        self, frame: np.ndarray, largest: float, threshold: float, min_snr: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(mean, upper), counts, each (n_rings,) float64; upper is inf for ring 0 and where nothing is usable.

        Parameters
        ----------
        frame : C-contiguous. largest : larger counts are left out, and NaN. threshold : least upper limit, counts.
        min_snr : standard deviations from mean to limit.
        """
        passes = _passes_of_floats if frame.dtype.kind == "f" else _passes_of_integers
        values = _gather(frame.reshape(-1), self._positions, self._slots)
        return passes(values, self._starts, largest, threshold, min_snr)


def _sampled(rings: np.ndarray, per_ring: int, n_rings: int) -> np.ndarray:
    """(slow, fast) bool: a pixel is in the sample if its row is, for a ring of that many pixels.

    Row y is in every sample of one row in 2^k for k up to the zeros at the end of its hash: samples of large rings are
    parts of those of small ones, and no regular pattern of the detector is met again and again.
    """
    count = np.bincount(rings.reshape(-1), minlength=n_rings)
    wanted = np.floor(np.log2(np.maximum(count / per_ring, 1))).astype(np.int8)
    mixed = (np.arange(rings.shape[0], dtype=np.uint32) * _HASH) >> np.uint32(16)
    lowest_bit = mixed & (~mixed + np.uint32(1))
    zeros = np.where(mixed == 0, 16, np.log2(np.maximum(lowest_bit, 1))).astype(np.int8)
    return (rings != 0) & (zeros[:, None] >= wanted[rings])


@njit(cache=True, nogil=True)
def _gather(frame, positions, slots):
    """The chosen pixels, ring by ring; read in the order of memory."""
    values = np.empty(positions.size, frame.dtype)
    for i in range(positions.size):
        values[slots[i]] = frame[positions[i]]
    return values


def _passes(values, starts, largest, threshold, min_snr):
    """Mean and upper limit of each ring after five passes, or as soon as they change nothing."""
    n_rings = starts.size - 1
    mean, upper = np.zeros(n_rings), np.full(n_rings, np.inf)
    usable = np.empty(values.size)
    for r in range(1, n_rings):
        n_usable = 0
        for i in range(starts[r], starts[r + 1]):
            v = values[i]
            if v <= largest:  # neither is NaN
                usable[n_usable] = v
                n_usable += 1
        low, up = -1e9, 1e9
        for _ in range(N_PASSES):
            n, total, squares = 0.0, 0.0, 0.0
            for i in range(n_usable):
                v = usable[i]
                weight = 1.0 if low < v < up else 0.0
                n += weight
                total += weight * v
                squares += weight * v * v
            if n == 0:
                new_low, new_up, mean[r] = -np.inf, np.inf, 0.0
            else:
                mean[r] = total / n
                sd = np.sqrt(max(0.0, squares / n - mean[r] * mean[r]))
                new_low, new_up = mean[r] - min_snr * sd, max(mean[r] + min_snr * sd, threshold)
            is_settled = new_low == low and new_up == up
            low, up = new_low, new_up
            if is_settled:
                break
        upper[r] = up
    return mean, upper


# Sums of whole numbers are exact in any order, so they may be taken several at a time; those of others are not.
_passes_of_integers = njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})(_passes)
_passes_of_floats = njit(cache=True, nogil=True)(_passes)
