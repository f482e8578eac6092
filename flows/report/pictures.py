"""The pictures of a report, each a figure of its own that can be read on a phone."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flows.figure_style import BLUE, GREY, LIGHT, MAP, ORANGE, new_figure, plain
from flows.merged_files import draw_by_shell, draw_wilson
from flows.report.gathering import CELL_NAMES, Gathered
from flows.report.numbers import ReportFigures
from flows.report.pole_figures import draw_axis, draw_beams
from tasks.merge_crystals import MergeStatistics, ShellStatistics

__all__ = [
    "array_mean", "background", "beam_shifts", "cells", "column_histogram", "column_over_frames", "detector_map",
    "indexed_spots", "merging", "orientations", "peaks_over_frames", "peaks_per_frame", "rates", "resolutions",
    "spot_shares",
]  # fmt: skip

_WIDE, _HALF, _HIGH = 10.0, 5.6, 3.3
# Inches: left, right, bottom, top, between columns, between rows.
_ONE, _TIMED = (0.65, 0.15, 0.5, 0.2, 0.0, 0.0), (0.65, 0.35, 0.5, 0.5, 0.0, 0.0)
_GRID = (0.65, 0.15, 0.5, 0.3, 0.65, 0.75)
_MOST_POINTS = 80
# Å, round numbers to draw rings at.
_RINGS = (20, 10, 7, 5, 4, 3.5, 3, 2.5, 2.2, 2, 1.8, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1, 0.9, 0.8, 0.7, 0.6, 0.5)
_MOST_RINGS = 5
_MASK_PX = 700


# ---- over the run -----------------------------------------------------------------------------------------


def rates(found: Gathered) -> Figure:
    """Hit rate and indexing rate over frames, each with what counting leaves open."""
    figure, axes = new_figure(_WIDE, _HIGH, margins=_TIMED)
    blocks = found.blocks.grouped(_MOST_POINTS)
    at = np.array([block.middle for block in blocks])
    curves = [("hits / frames", "n_hits", "n_frames", BLUE)]
    curves += [("indexed / hits", "n_indexed", "n_hits", ORANGE)] if found.seeks_lattices else []
    for label, part, whole, colour in curves:
        n, of = (np.array([getattr(block, name) for block in blocks], float) for name in (part, whole))
        low, middle, high = _shares(n, of)
        axes.fill_between(at, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(at, 100 * middle, color=colour, linewidth=1.5, marker="o" if len(at) < 40 else None, markersize=3)
        axes.plot([], [], color=colour, label=label)
    axes.set(ylim=(0, None), ylabel="%")
    axes.legend(framealpha=0.8, edgecolor="none", fontsize=8, ncols=2, loc="lower right")
    _over_frames(axes, found)
    return figure


def _shares(n: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share with Wilson's 68 % interval (J. Am. Stat. Assoc. 22 (1927) 209); NaN of nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = n / of
        centre = (share + 0.5 / of) / (1 + 1 / of)
        half = np.sqrt(share * (1 - share) / of + 0.25 / of**2) / (1 + 1 / of)
    return centre - half, share, centre + half


def peaks_over_frames(found: Gathered) -> Figure:
    """Mean number of peaks of a hit, over frames."""
    blocks = [block for block in found.blocks.grouped(_MOST_POINTS) if block.n_hits]
    figure, axes = new_figure(_HALF, _HIGH, margins=_TIMED)
    at, means = [block.middle for block in blocks], [block.n_peaks / block.n_hits for block in blocks]
    axes.plot(at, means, color=BLUE, linewidth=1.4, marker="o" if len(at) < 60 else None, markersize=3)
    axes.set(ylabel="peaks of a hit, mean", ylim=(0, 1.15 * max(means, default=1.0)))
    _over_frames(axes, found)
    return figure


def background(found: Gathered) -> Figure:
    """Background at the peaks, chunk by chunk."""
    values = [
        (part.offset + (one.start + one.stop) / 2, one.background) for part in found.parts for one in part.figures
    ]
    at, level = np.array(values).T
    figure, axes = new_figure(_HALF, _HIGH)
    axes.plot(at, level, color=BLUE, linewidth=1.4, marker="o" if len(at) < 60 else None, markersize=3)
    known = level[np.isfinite(level)]
    axes.set(ylabel="counts per pixel", ylim=(0, 1.15 * float(known.max(initial=1e-6))))
    _over_frames(axes, found)
    return figure


def column_over_frames(found: Gathered, name: str) -> Figure:
    """A column of a step over the frames."""
    scalar = found.columns.scalars[name]
    figure, axes = new_figure(_HALF, _HIGH)
    many = len(scalar.at) >= 80
    axes.plot(scalar.at, scalar.means, color=BLUE, linewidth=1.2, marker=None if many else "o", markersize=3)
    axes.set_ylabel(plain(name))
    _over_frames(axes, found)
    return figure


def column_histogram(found: Gathered, name: str) -> Figure:
    """How often a column has which values."""
    figure, axes = new_figure(_HALF, _HIGH)
    _histogram(axes, found.values[name].rows[:, 0], plain(name), "frames")
    return figure


def array_mean(found: Gathered, name: str) -> Figure:
    """The mean of an array over all frames."""
    array = found.columns.arrays[name]
    figure, axes = new_figure(_HALF, _HIGH)
    axes.plot(np.arange(len(array.sums)), array.mean, color=BLUE, linewidth=1.2)
    axes.set(xlabel="element", ylabel=plain(name))
    return figure


def _over_frames(axes: Any, found: Gathered) -> None:
    """Frame index below, the clock above; where one run follows another, a line."""
    axes.set_xlabel("frame index" if len(found.parts) == 1 else "frames of all runs")
    stop = found.parts[-1].stop
    axes.set_xlim(0, max(stop, 1))
    if len(found.parts) > 1:
        for part in found.parts:
            axes.axvline(part.offset, color=GREY, linewidth=0.7, linestyle=":")
            axes.text(part.offset, 1.0, f" {plain(part.run.name)}", transform=axes.get_xaxis_transform(), fontsize=7,
                      color=GREY, va="bottom")  # fmt: skip
        return
    sealed = found.parts[0].sealed
    if len(sealed) < 2:
        return
    chosen = [sealed[i] for i in sorted({int(i) for i in np.linspace(0, len(sealed) - 1, 4)})]
    above = axes.secondary_xaxis("top")
    above.set_xticks([frame for frame, _ in chosen], [f"{at:%H:%M:%S}" for _, at in chosen])
    above.tick_params(labelsize=7, colors=GREY)
    above.spines["top"].set_visible(False)
    above.set_xlabel("stored at, UTC", fontsize=7, color=GREY)


# ---- peaks --------------------------------------------------------------------------------------------------


def peaks_per_frame(found: Gathered) -> Figure:
    """Frames by their number of peaks, on logarithmic axes."""
    hits, others = found.peaks.counts
    highest = int(np.flatnonzero(hits + others).max(initial=1))
    fine = np.geomspace(10, max(highest + 1, 11), 40).astype(int)
    edges = np.unique(np.concatenate([np.arange(10), fine, [highest + 1]]))
    axis = np.arange(len(edges) - 1)
    figure, axes = new_figure(_HALF, _HIGH, margins=_ONE)
    for counts, colour, label in ((others, LIGHT, "not hits"), (hits, BLUE, "hits")):
        binned = np.add.reduceat(counts[: highest + 1], edges[:-1])
        axes.bar(axis, binned, width=1.0, color=colour, edgecolor="white", linewidth=0.3, label=label, zorder=2)
    labels = [n for n in (0, 3, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if n <= highest]
    axes.set_xticks(np.interp(labels, edges, np.arange(len(edges))), [str(n) for n in labels])
    axes.set(xlabel="peaks of a frame", ylabel="frames", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    return figure


def spot_shares(found: Gathered) -> Figure:
    """How much of an indexed frame's peaks its lattices explain."""
    figure, axes = new_figure(_HALF, _HIGH, margins=_ONE)
    shares = np.minimum(100 * found.shares.rows[:, 0], 100)
    axes.hist(shares, np.linspace(0, 100, 26), color=BLUE, edgecolor="white", linewidth=0.3)
    _median_line(axes, shares, "{:.0f} %")
    axes.set(xlabel="peaks that a lattice explains, %", ylabel="indexed frames", xlim=(0, 100))
    return figure


def detector_map(found: Gathered, mask: np.ndarray | None) -> Figure:
    """All peaks on the detector, with rings of equal resolution."""
    assert found.map is not None
    slow, fast = found.map.shape
    width = _HALF - 1.65
    height = float(np.clip(width * slow / fast, 1.5, 8))
    figure, axes = new_figure(_HALF, height + 0.75, margins=(0.75, 0.9, 0.5, 0.25, 0.0, 0.0))
    axes.grid(False)
    counts, size = found.map.coarse()
    extent = (0, counts.shape[1] * size, counts.shape[0] * size, 0)
    axes.set_facecolor("#f4f4f4")
    if mask is not None:
        axes.imshow(_shaded(mask), cmap="gray", vmin=0, vmax=1, extent=(0, fast, slow, 0), interpolation="nearest")
    # A hot pixel must not make all else dark.
    highest = max(float(np.percentile(counts[counts > 0], 99.5)), 2.0)
    image = axes.imshow(
        np.where(counts > 0, counts, np.nan), cmap=MAP, vmin=0, vmax=highest, extent=extent, interpolation="nearest"
    )
    beside = axes.inset_axes((1.03, 0.1, 0.04, 0.8))
    colours = figure.colorbar(image, cax=beside, extend="max" if counts.max() > highest else "neither")
    colours.set_label(f"peaks in {size} × {size} px", fontsize=8)
    colours.ax.tick_params(labelsize=7)
    _draw_rings(axes, found)
    axes.set(xlim=(0, fast), ylim=(slow, 0), xlabel="fast, px", ylabel="slow, px", aspect="equal")
    return figure


def _shaded(mask: np.ndarray) -> np.ndarray:
    """0.72 where a pixel is masked, transparent elsewhere; of a large frame every nth pixel."""
    stride = max(1, max(mask.shape) // _MASK_PX)
    return np.where(mask[::stride, ::stride] != 0, 0.72, np.nan)


def _draw_rings(axes: Any, found: Gathered) -> None:
    part = found.parts[0]
    if part.geometry is None:
        return
    slow, fast = part.header.image_shape
    x, y = np.linspace(0, fast, 200), np.linspace(0, slow, 200)
    q = np.linalg.norm(part.geometry.scattering_vector(*np.meshgrid(x, y)), axis=-1)
    inside = [d for d in _RINGS if q.min() < 1 / d < q.max()]
    # Evenly over the radius: q is nearly that.
    wanted = np.linspace(0.2, 0.97, _MOST_RINGS) * q.max()
    if inside:
        known = np.array(inside)
        chosen = sorted({float(known[np.abs(1 / known - at).argmin()]) for at in wanted}, reverse=True)
        lines = axes.contour(x, y, q, levels=[1 / d for d in chosen], colors=ORANGE, linewidths=0.8)
        labels = axes.clabel(lines, fmt={1 / d: f"{d:g} Å" for d in chosen}, fontsize=8)
        for label in labels:
            label.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8})
    axes.plot(part.detector.beam_center_x, part.detector.beam_center_y, "+", color=ORANGE, markersize=9)


# ---- crystals -------------------------------------------------------------------------------------------------


def cells(found: Gathered, figures: ReportFigures) -> Figure:
    """Histograms of a, b, c, α, β, γ with the median, and the cell that the recipe gives."""
    figure, every = new_figure(_WIDE, 5.2, 2, 3, margins=_GRID)
    labels = ("a, Å", "b, Å", "c, Å", "α, °", "β, °", "γ, °")
    assert figures.cell is not None
    assert figures.cell_sigma is not None
    for number, (axes, name) in enumerate(zip(every.ravel(), CELL_NAMES, strict=True)):
        values, unit = found.crystal_column(name), labels[number][-1]
        given = figures.cell_given[number] if figures.cell_given else None
        _histogram(axes, values, labels[number], "crystals" if number % 3 == 0 else "", given, least=0.001)
        median, sigma = figures.cell[number], figures.cell_sigma[number]
        is_fixed = bool(np.ptp(values) < 1e-9 * median)
        text = f"{median:g} {unit}, by symmetry" if is_fixed else f"{median:.3f} ± {sigma:.3f} {unit}"
        axes.set_title(text, fontsize=9)
    return figure


def resolutions(found: Gathered) -> Figure:
    """How far crystals diffract."""
    figure, axes = new_figure(_HALF, _HIGH, margins=_ONE)
    values = found.crystal_column("resolution")
    _histogram(axes, values[np.isfinite(values)], "resolution of a crystal, Å", "crystals")
    _median_line(axes, values[np.isfinite(values)], "{:.2f} Å")
    axes.invert_xaxis()
    return figure


def indexed_spots(found: Gathered) -> Figure:
    """How many spots lattices explain."""
    figure, axes = new_figure(_HALF, _HIGH, margins=_ONE)
    values = found.crystal_column("n_indexed")
    _histogram(axes, values, "indexed spots of a crystal", "crystals")
    _median_line(axes, values, "{:.0f}")
    return figure


def beam_shifts(found: Gathered) -> Figure:
    """Where each crystal would have the beam centre."""
    figure, axes = new_figure(_HALF, 4.2, margins=(0.65, 0.4, 0.5, 0.15, 0.0, 0.0))
    x, y = (found.crystal_column(name) for name in ("shift_x", "shift_y"))
    alpha = max(0.08, min(0.5, 100 / max(len(x), 1)))
    axes.scatter(x, y, s=10, alpha=alpha, color=BLUE, linewidths=0, label="one crystal")
    axes.scatter(np.median(x), np.median(y), s=110, marker="+", color=ORANGE, linewidths=2, label="median")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    reach = max(0.5, float(np.percentile(np.abs([x, y]), 99)) * 1.3)
    axes.set(xlim=(-reach, reach), ylim=(reach, -reach), xlabel="fast, px", ylabel="slow, px", aspect="equal")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def orientations(found: Gathered, figures: ReportFigures) -> Figure:
    """The beam in the crystals, and their main axis in the laboratory, as equal-area pole figures."""
    assert figures.orientation is not None
    figure, (left, right) = new_figure(_WIDE, 4.6, 1, 2, margins=(0.1, 0.6, 0.1, 0.35, 0.6, 0.0))
    draw_beams(figure, left, found)
    draw_axis(figure, right, found, figures.orientation.axis)
    return figure


# ---- merging ------------------------------------------------------------------------------------------------------


def merging(statistics: MergeStatistics) -> Figure:
    """CC1/2 and Rsplit, completeness, multiplicity, I/σ by shell, and the Wilson plot."""
    figure, every = new_figure(_WIDE, 5.6, 2, 3, margins=_GRID)
    panels: list[tuple[str, dict[str, Callable[[ShellStatistics], Any]]]] = [
        ("", {"CC½": lambda s: s.cc_half, "CC*": lambda s: s.cc_star}),
        ("Rsplit", {"": lambda s: s.r_split}),
        ("completeness, %", {"": lambda s: 100 * s.completeness}),
        ("multiplicity", {"": lambda s: s.multiplicity}),
        ("I/σ(I)", {"": lambda s: s.i_over_sigma}),
    ]
    *by_shell, last = every.ravel()
    for axes, (label, curves) in zip(by_shell, panels, strict=True):
        draw_by_shell(axes, statistics.shells, label, curves)
    draw_wilson(last, statistics.wilson)
    return figure


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _histogram(
    axes: Any, values: np.ndarray, label: str, what: str, given: float | None = None, least: float = 1e-9
) -> None:
    """Counts of values; the outermost half per cent on each side is put into the last bars.

    least : relative width, so that what does not vary is one bar and not noise.
    """
    axes.set(xlabel=label, ylabel=what)
    axes.locator_params(axis="x", nbins=5)
    if not len(values):
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color=GREY)
        return
    low, high = np.percentile(values, [0.5, 99.5])
    middle, half = (low + high) / 2, max((high - low) / 2, least * abs(low + high) / 2, 1e-9)
    edges = np.linspace(middle - half, middle + half, int(np.clip(8 + len(values) // 8, 8, 40)) + 1)
    axes.hist(np.clip(values, edges[0], edges[-1]), edges, color=BLUE, edgecolor="white", linewidth=0.3)
    if given is not None:
        axes.axvline(given, color=ORANGE, linewidth=1.4, linestyle="--")


def _median_line(axes: Any, values: np.ndarray, form: str) -> None:
    if len(values):
        middle = float(np.median(values))
        axes.axvline(middle, color=ORANGE, linewidth=1.4, label=f"median {form.format(middle)}")
        axes.legend(frameon=False, fontsize=8)
