"""The sections of a report: words, tables and pictures, in the order in which one asks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from flows.report import pictures
from flows.report.gathering import Gathered
from flows.report.layout import Picture, Section, Table
from flows.report.numbers import OrientationFigures, ReportFigures
from flows.report.origin import ledger_section, origin_section
from tasks.merge_crystals import ShellStatistics

__all__ = ["sections_of"]

# Columns drawn, of users' steps; with more nobody finds any.
_MOST_COLUMNS = 12
# By picture: what it shows for who cannot see it, and its caption.
_ABOUT = {
    "rates": (
        "hit rate and indexing rate over the frames of the run",
        "Each point is the mean of some neighbouring frames; the band is what counting alone leaves open (68 %).",
    ),
    "peaks-of-hits": (
        "mean number of peaks of a hit over the frames of the run",
        "Peaks of a hit, mean of neighbouring hits. It falls with the beam, the thickness of the jet or bad crystals.",
    ),
    "background": (
        "background at the peaks over the frames of the run",
        "Background around the peaks, median of each chunk.",
    ),
    "peaks-per-frame": (
        "histogram of the number of peaks of a frame",
        "Frames by their number of peaks, both axes logarithmic. Blanks and hits should be two heaps that lie apart.",
    ),
    "detector-map": (
        "density of peaks over the detector, with rings of equal resolution",
        "All peaks of all frames; the brighter, the more; grey is masked. Rings are at the resolutions named, the "
        "cross is the assumed beam centre. A bright ring is ice or a powder, a bright spot a hot pixel.",
    ),
    "cells": (
        "histograms of the cell lengths and angles of single crystals",
        "Cells of single crystals, with median ± robust standard deviation; dashed, the cell that the recipe gives. "
        "Two heaps are two crystal forms, or an error of the geometry.",
    ),
    "resolution": (
        "histogram of the resolution of single crystals",
        "How far each crystal diffracts; better to the right.",
    ),
    "spots-indexed": (
        "share of the peaks of an indexed frame that its lattices explain",
        "Of each indexed frame, the share of its peaks that belong to a lattice. A second heap on the left are frames "
        "with a lattice that was not found, or with ice.",
    ),
    "indexed-spots": (
        "histogram of the number of indexed spots of a crystal",
        "Spots that each crystal explains.",
    ),
    "beam-shifts": (
        "beam centre of each crystal against the assumed one",
        "Where each crystal puts the beam centre against the assumed one. If the median is off by more than some "
        "tenths of a pixel, nearline refine-detector gives the recipe to go on with.",
    ),
    "orientations": (
        "pole figures: the beam in the crystal, and an axis of the crystals in the laboratory",
        "Equal-area pole figures: random orientations fill both discs evenly. Left, the direction of the beam in each "
        "crystal, with its equivalents: along what is empty, nothing was measured. Right, where an axis of the "
        "crystals points, seen along the beam (cross): crowding is a preferred orientation.",
    ),
    "merging": (
        "merging statistics by resolution shell, and the Wilson plot",
        "By resolution, low on the left, in shells of equal volume in reciprocal space; last, the Wilson plot.",
    ),
}


def sections_of(
    found: Gathered,
    figures: ReportFigures,
    *,
    mask: np.ndarray | None,
    examples: Sequence[Picture],
) -> list[Section]:
    """All sections that this processing has something for.

    mask : (slow, fast), nonzero where a pixel is not used; of the first detector. examples : frames, drawn.
    """
    made = [
        _summary(figures),
        *_over_the_run(found, figures),
        *_peaks(found, mask),
        *_crystals(found, figures),
        *_orientations(found, figures),
        *_merging(figures),
        *_columns(found, figures),
    ]
    if examples:
        made.append(Section("examples", "Examples", pictures=examples))
    return [*made, ledger_section(found), origin_section(found)]


# ---- the first screen -------------------------------------------------------------------------------------


def _summary(figures: ReportFigures) -> Section:
    words = [
        f"{one.at:%Y-%m-%d %H:%M:%S} UTC: enough, by {one.criterion!r} (" + ", ".join(
            f"{name} {'unknown' if value is None else f'{value:.5g}'}" for name, value in one.values.items()
        ) + f"), at chunk {one.chunk} of {one.run}."
        for one in figures.decisions
    ]  # fmt: skip
    tables = [Table(list(_summary_rows(figures)))]
    if len(figures.runs) > 1:
        tables.append(_runs_table(figures))
    return Section("summary", "Summary", words, tables)


def _summary_rows(f: ReportFigures) -> Iterator[tuple[str, str]]:
    yield "frames", f"{f.n_frames:,}"
    if f.n_hits is not None:
        yield "hits", f"{f.n_hits:,}{_percent(f.hit_rate, 'of frames')}"
    if f.n_indexed is not None:
        yield "indexed frames", f"{f.n_indexed:,}{_percent(f.indexing_rate, 'of hits')}"
    if f.n_crystals is not None:
        yield "crystals", f"{f.n_crystals:,}{_percent(f.multiple_rate, 'of indexed frames show several')}"
    if f.peaks_per_hit is not None:
        yield "peaks on a hit, mean", f"{f.peaks_per_hit:.1f}"
    if f.spots_indexed is not None:
        yield "spots indexed", f"{100 * f.spots_indexed:.1f} % of the peaks of indexed frames"
    if f.resolution is not None:
        yield "resolution, median", f"{f.resolution:.2f} Å"
    if f.cell is not None and f.cell_sigma is not None:
        yield "cell, medians", cell_text(f.cell, f.cell_sigma)
    if f.beam_shift is not None:
        yield "beam centre, against the assumed one", "({:+.2f}, {:+.2f}) px".format(*f.beam_shift)
    if f.background is not None:
        yield "background at the peaks", f"{f.background:.3g} counts per pixel"
    if f.merging is not None:
        yield "merged", _merged_text(f.merging)


def cell_text(cell: Sequence[float], sigma: Sequence[float]) -> str:
    """``79.10 ± 0.02, …`` Å, then the angles."""
    parts = [f"{v:.2f} ± {s:.3f}" if s > 1e-6 else f"{v:.6g}" for v, s in zip(cell, sigma, strict=True)]
    return f"{', '.join(parts[:3])} Å; {', '.join(parts[3:])} °"


def _merged_text(s: ShellStatistics) -> str:
    parts = [f"{100 * s.completeness:.1f} % complete to {s.d_min:.2f} Å"]
    parts += [f"multiplicity {s.multiplicity:.1f}"] if s.multiplicity is not None else []
    parts += [f"CC½ {s.cc_half:.3f}"] if s.cc_half is not None else []
    return ", ".join(parts)


def _runs_table(figures: ReportFigures) -> Table:
    head = ("run", "processing", "frames", "hits", "indexed", "never came", "state")
    rows = [
        (one.run, one.processing, f"{one.n_frames:,}", f"{one.n_hits:,}", f"{one.n_indexed:,}", f"{one.n_missing:,}",
         "whole" if one.is_whole else "still growing")
        for one in figures.runs
    ]  # fmt: skip
    return Table(rows, head)


# ---- pictures --------------------------------------------------------------------------------------------


def _picture(name: str, draw: Callable[[], Figure], *, is_wide: bool = False) -> Picture:
    alt, caption = _ABOUT[name]
    return Picture(name, draw, alt, caption, is_wide)


def _over_the_run(found: Gathered, figures: ReportFigures) -> Iterator[Section]:
    made = []
    if found.seeks_hits and figures.n_frames:
        made.append(_picture("rates", partial(pictures.rates, found), is_wide=True))
    if figures.peaks_per_hit is not None:
        made.append(_picture("peaks-of-hits", partial(pictures.peaks_over_frames, found)))
    if figures.background is not None:
        made.append(_picture("background", partial(pictures.background, found)))
    if made:
        yield Section("course", "Over the run", pictures=made)


def _peaks(found: Gathered, mask: np.ndarray | None) -> Iterator[Section]:
    if not found.has_peaks:
        return
    made = [_picture("peaks-per-frame", partial(pictures.peaks_per_frame, found))]
    if found.map is not None and found.map.counts.any():
        made.append(_picture("detector-map", partial(pictures.detector_map, found, mask)))
    yield Section("peaks", "Peaks", pictures=made)


def _crystals(found: Gathered, figures: ReportFigures) -> Iterator[Section]:
    if not found.n_crystals:
        return
    made = [_picture("cells", partial(pictures.cells, found, figures), is_wide=True)]
    if figures.resolution is not None:
        made.append(_picture("resolution", partial(pictures.resolutions, found)))
    if len(found.shares.rows):
        made.append(_picture("spots-indexed", partial(pictures.spot_shares, found)))
    made.append(_picture("indexed-spots", partial(pictures.indexed_spots, found)))
    made.append(_picture("beam-shifts", partial(pictures.beam_shifts, found)))
    yield Section("crystals", "Crystals", pictures=made)


def _orientations(found: Gathered, figures: ReportFigures) -> Iterator[Section]:
    o = figures.orientation
    if o is None or found.cell is None:
        return
    words = [
        f"No direction in the crystal is farther than {o.largest_gap_deg:.0f}° from one along which the beam has gone, "
        f"or its equivalent in the Laue group {found.cell.group.laue_str()}.",
        _about_axis(o, found.cell.lattice == "cubic", found.n_crystals),
    ]
    picture = _picture("orientations", partial(pictures.orientations, found, figures), is_wide=True)
    yield Section("orientations", "Orientations", words, pictures=[picture])


def _about_axis(o: OrientationFigures, is_cubic: bool, n_crystals: int) -> str:
    if o.axis is None or o.eigenvalue is None or o.highest_random is None or o.chance is None:
        if is_cubic:
            return "Of a cubic crystal the direction tensor says nothing about preferred orientation."
        return f"{n_crystals} crystals are too few to speak of preferred orientation."
    verdict = "a preferred orientation" if o.is_preferred else "no preferred orientation that matters"
    return (
        f"{o.axis} in the laboratory: the largest eigenvalue of its direction tensor is {o.eigenvalue:.3f} (1/3 if "
        f"random, and then seldom above {o.highest_random:.3f}; 1 if all are parallel). Random orientations differ as "
        f"much from 1/3 with a chance of {_chance(o.chance)} (Bingham's test). That is {verdict}."
    )


def _chance(p: float) -> str:
    return f"{100 * p:.0f} %" if p >= 0.01 else "less than 1 in a million" if p < 1e-6 else f"1 in {1 / p:,.0f}"


def _merging(figures: ReportFigures) -> Iterator[Section]:
    s = figures.merging
    if s is None:
        return
    how = "scaled together" if figures.scaling is not None else "not scaled, but their plain mean"
    modelled = figures.partiality
    if modelled is not None and modelled.is_used:
        how += " with partialities modelled"
    words = [
        f"{s.n_observations:,} observations of {s.n_crystals:,} crystals in {s.space_group}, {how}, corrected for "
        "polarisation where the detector's place is known. nearline merge writes the files."
    ]
    if figures.scaling is not None:
        words += [f"{n:,} crystals are left out: {why}." for why, n in figures.scaling.left_out.items()]
    if s.n_outliers:
        words.append(f"{s.n_outliers:,} observations are left out as outliers.")
    if s.resolution is not None:
        words.append(f"CC½ stays above 0.3 up to {s.resolution:.2f} Å.")
    if s.wilson.b_factor is not None:
        words.append(f"Wilson B is {s.wilson.b_factor:.1f} Å².")
    picture = _picture("merging", partial(pictures.merging, s), is_wide=True)
    head = ("d, Å", "possible", "unique", "complete", "multiplicity", "I/σ", "CC½", "CC*", "Rsplit")
    rows = [_shell_row(shell) for shell in s.shells] + [("all", *_shell_row(s)[1:])]
    yield Section("merging", "Merging", words, [Table(rows, head)], [picture])


def _shell_row(s: ShellStatistics) -> tuple[str, ...]:
    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    return (
        f"{s.d_max:.2f}–{s.d_min:.2f}", f"{s.n_possible:,}", f"{s.n_unique:,}", f"{100 * s.completeness:.1f} %",
        number(s.multiplicity, 1), number(s.i_over_sigma, 1), number(s.cc_half, 3), number(s.cc_star, 3),
        number(s.r_split, 3),
    )  # fmt: skip


def _columns(found: Gathered, figures: ReportFigures) -> Iterator[Section]:
    arrays, scalars = list(found.columns.arrays), list(found.columns.scalars)
    if not arrays and not scalars:
        return
    made = []
    for number, name in enumerate(arrays[:_MOST_COLUMNS]):
        array = found.columns.arrays[name]
        made.append(Picture(
            f"array-{number}", partial(pictures.array_mean, found, name), f"mean of {name} over all frames",
            f"{name}, element by element, mean of {array.n_frames:,} frames.",
        ))  # fmt: skip
    for number, name in enumerate(scalars[: _MOST_COLUMNS - len(made)]):
        made.append(Picture(
            f"column-{number}", partial(pictures.column_over_frames, found, name), f"{name} over the frames of the run",
            f"{name} over frames, means of neighbouring ones.",
        ))  # fmt: skip
        made.append(Picture(
            f"histogram-{number}", partial(pictures.column_histogram, found, name), f"histogram of {name}",
            f"{name}, frames by value.",
        ))  # fmt: skip
    left_out = [*arrays, *scalars][_MOST_COLUMNS:]
    words = [f"Also in the tables, not drawn: {', '.join(left_out)}."] if left_out else []
    head = ("column", "frames", "mean", "standard deviation", "least", "greatest")
    rows = [
        (name, f"{c.n_values:,}", *(f"{value:.5g}" for value in (c.mean, c.sigma, c.least, c.greatest)))
        for name, c in figures.columns.items()
    ]
    tables = [Table(rows, head)] if rows else []
    yield Section("columns", "Columns of the steps", words, tables, made)


def _percent(share: float | None, of: str) -> str:
    return "" if share is None else f", {100 * share:.1f} % {of}"
