"""A comparison of two processings as one picture: distributions overlaid, rates over frames."""

from pathlib import Path
from typing import Any

import numpy as np

from flows.comparison import CELL_LENGTHS, Comparison, Tables
from flows.figure_style import BLUE, ORANGE, new_figure

__all__ = ["draw_comparison"]

_COLOURS = (BLUE, ORANGE)
_N_BINS = 40
# Rates over fewer frames jump about and say nothing.
_FRAMES_PER_POINT = 10


def draw_comparison(path: Path, found: Comparison) -> Path:
    """Histograms of peaks, resolution and cell lengths, and hit rate over frames, A and B overlaid, as a PNG."""
    assert found.tables is not None
    figure, axes = new_figure(10, 5.6, 2, 3)
    a, b = found.tables
    names = (f"A  {found.a.name}  {found.a.recipe}", f"B  {found.b.name}  {found.b.recipe}")
    _histograms(axes[0, 0], [_hit_peaks(a), _hit_peaks(b)], "peaks on a hit", "hits")
    _histograms(axes[0, 1], [a.resolution, b.resolution], "resolution of a crystal, Å", "crystals")
    _rates(axes[0, 2], [a, b])
    for axis, length in zip(axes[1], CELL_LENGTHS, strict=True):
        _histograms(axis, [_cell(a, length), _cell(b, length)], f"{length}, Å", "crystals")
    handles, _ = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[:2], names, loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _histograms(axes: Any, values: list[np.ndarray], label: str, what: str) -> None:
    every = np.concatenate(values)
    axes.set_xlabel(label)
    axes.set_ylabel(what)
    if not len(every):
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color="#777777")
        for colour in _COLOURS:
            axes.plot([], [], color=colour, linewidth=1.6, label=" ")
        return
    low, high = np.percentile(every, [0.5, 99.5])
    edges = np.linspace(low, max(high, low + 1e-3), min(_N_BINS, 8 + len(every) // 8))
    for one, colour, is_filled in zip(values, _COLOURS, (True, False), strict=True):
        counts, _ = np.histogram(np.clip(one, edges[0], edges[-1]), edges)
        axes.stairs(
            counts, edges, color=colour, fill=is_filled, alpha=0.45 if is_filled else 1.0, linewidth=1.6, label=" "
        )
        if len(one):
            axes.axvline(np.median(one), color=colour, linewidth=1, linestyle=":")
    axes.margins(y=0.12)
    axes.locator_params(axis="x", nbins=5)


def _rates(axes: Any, both: list[Tables]) -> None:
    for tables, colour in zip(both, _COLOURS, strict=True):
        frames = tables.frames.sort_by("frame_index")
        index = frames["frame_index"].to_numpy()
        n_points = max(1, min(60, len(index) // _FRAMES_PER_POINT))
        places = [part for part in np.array_split(np.arange(len(index)), n_points) if len(part)]
        middle = [index[part].mean() for part in places]
        for column, style in (("hit", "-"), ("indexed", "--")):
            if column in frames.column_names:
                flags = frames[column].fill_null(False).to_numpy().astype(float)
                rates = [100 * flags[part].mean() for part in places]
                axes.plot(middle, rates, style, color=colour, linewidth=1.4, marker="." if n_points < 10 else None)
    axes.set_xlabel("frame index")
    axes.set_ylabel("% of frames:  — hits   - - indexed")
    axes.set_ylim(0, None)
    axes.margins(y=0.1)


def _hit_peaks(tables: Tables) -> np.ndarray:
    frames = tables.frames
    if not {"n_peaks", "hit"} <= set(frames.column_names):
        return np.empty(0)
    return frames["n_peaks"].to_numpy()[frames["hit"].fill_null(False).to_numpy().astype(bool)].astype(float)


def _cell(tables: Tables, length: str) -> np.ndarray:
    return np.empty(0) if tables.crystals is None else tables.crystals[length].to_numpy()
