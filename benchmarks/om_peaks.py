"""The peer of the peak search: peakfinder8 as the OM monitor compiles it, in a process of OM's own.

Started with the interpreter of an environment that has ``ondamonitor`` (``NEARLINE_OM_PYTHON``); OM is GPL, so it is
never imported by anything of ours, and this file imports nothing of ours. Reads one folder: ``frames.npy``
(n, slow, fast), ``mask.npy`` (1 good), ``radius.npy`` (px), ``settings.json``. For each line on standard input it goes
over all frames once, and answers with a line of JSON: seconds of each frame by stage, and the peaks.
"""

import json
import random
import sys
import time
from pathlib import Path

import numpy as np

_FAST_SAMPLE = 100


def _sampled(radius):
    """Pixels of the fast mode: at most 100 of each ring, as OM draws them."""
    ring = np.rint(radius).astype(int).ravel()
    order = np.argsort(ring, kind="mergesort")
    random.seed(0)
    chosen = []
    for pixels in np.split(order, np.cumsum(np.bincount(ring))[:-1]):
        chosen += list(pixels) if len(pixels) < _FAST_SAMPLE else random.sample(list(pixels), _FAST_SAMPLE)
    chosen = np.array(chosen, np.int32)
    return chosen, ring[chosen].astype(np.int32)


def main(folder: Path) -> None:
    from om.algorithms._crystallography import peakfinder_8

    frames = np.load(folder / "frames.npy", mmap_mode="r")
    mask = np.load(folder / "mask.npy").astype(np.int8)
    radius = np.load(folder / "radius.npy").astype(np.float32)
    p = json.loads((folder / "settings.json").read_text())
    index, ring = _sampled(radius)
    slow, fast = frames.shape[1:]

    def search(data, is_fast):
        return peakfinder_8(
            p["max_peaks"], data, mask, radius, len(index), index, ring, int(is_fast), fast, slow, 1, 1,
            p["threshold"], p["min_snr"], p["min_pix_count"], p["max_pix_count"], p["local_bg_radius"],
        )  # fmt: skip

    for _ in sys.stdin:
        stages = {"convert": [], "fast": [], "full": []}
        peaks = []
        for frame in frames:
            frame = np.array(frame)
            at = time.perf_counter()
            data = frame.astype(np.float32)
            stages["convert"].append(time.perf_counter() - at)
            at = time.perf_counter()
            search(data, True)
            stages["fast"].append(time.perf_counter() - at)
            at = time.perf_counter()
            found = search(data, False)
            stages["full"].append(time.perf_counter() - at)
            # Pixel i is at i, where ours spans i to i + 1.
            peaks.append([[x + 0.5, y + 0.5, s] for x, y, s in zip(found[0], found[1], found[6], strict=True)])
        print(json.dumps({"seconds": stages, "peaks": peaks}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
