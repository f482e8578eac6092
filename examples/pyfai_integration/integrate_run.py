"""Integrate a run with pyFAI, and draw its mean pattern with the rings that the calibrant should give.

PYTHONPATH=examples/pyfai_integration python examples/pyfai_integration/integrate_run.py calibration/1 mean.png
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
from azimuthal import q_axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyFAI.calibrant import get_calibrant

import nearline
from tasks.recipe import load_recipe

RECIPE = Path(__file__).parent / "recipe.yaml"
# 1/Å to both sides of a ring in which it is measured.
_REACH = 0.04


def mean_pattern(column: pa.ChunkedArray) -> np.ndarray:
    """(n_bins,) of a column of arrays: the mean over frames, bin by bin; NaN where no frame has a value."""
    flat = column.combine_chunks()
    values = flat.values.to_numpy(zero_copy_only=False).reshape(len(flat), -1).astype(float)
    n = np.isfinite(values).sum(axis=0)
    return np.where(n > 0, np.nansum(values, axis=0) / np.maximum(n, 1), np.nan)


def ring_offsets(q: np.ndarray, pattern: np.ndarray, rings: np.ndarray) -> np.ndarray:
    """(ring,) measured minus expected q, 1/Å: the centre of gravity of what stands above the line between the ends."""
    offsets = []
    for ring in rings:
        near = (abs(q - ring) < _REACH) & np.isfinite(pattern)
        at, height = q[near], pattern[near]
        ends = np.r_[0:3, -3:0]
        above = height - np.polyval(np.polyfit(at[ends], height[ends], 1), at)
        offsets.append(np.average(at, weights=np.clip(above, 0, None)) - ring)
    return np.array(offsets)


def draw(q: np.ndarray, pattern: np.ndarray, rings: np.ndarray, title: str, path: Path) -> None:
    """The pattern over q, with a tick at each ring, as a PNG."""
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    top = float(np.nanmax(pattern))
    axes.vlines(rings, 0, 1.05 * top, color="#d62728", linewidth=0.7, linestyle=":", label="rings of the calibrant")
    axes.plot(q, pattern, color="#1f77b4", linewidth=1, label="mean over all frames")
    axes.set(xlabel="q, 1/Å", ylabel="counts per pixel", title=title, xlim=(q[0], q[-1]), ylim=(0, 1.1 * top))
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="experiment/number, or the path of a run folder")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--calibrant", default="LaB6", help="by its name in pyFAI")
    arguments = parser.parse_args()

    summary = nearline.process(arguments.run, RECIPE)
    frames = nearline.open(arguments.run).processings[summary["processing"]].frames
    params = load_recipe(RECIPE).steps[0].params
    q = q_axis(params["q_min"], params["q_max"], params["n_bins"])
    pattern = mean_pattern(frames["intensity"])

    expected = 2 * np.pi / np.array(get_calibrant(arguments.calibrant).dspacing)
    seen = q[np.isfinite(pattern)]
    rings = expected[(expected > seen[0] + _REACH) & (expected < seen[-1] - _REACH)]
    offsets = ring_offsets(q, pattern, rings)
    draw(q, pattern, rings, f"{arguments.run}: {len(frames)} frames", arguments.picture)
    print(f"{len(frames)} frames, {len(rings)} rings: off by {1e3 * np.abs(offsets).max():.2f}e-3 1/Å at most")
    print(arguments.picture)


if __name__ == "__main__":
    main()
