"""The files that merged intensities leave in, and their statistics as a table and a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gemmi
import numpy as np

from flows.figure_style import BLUE, COLOURS, ORANGE, new_figure
from tasks.merge_crystals import Merged, MergeStatistics, ShellStatistics
from tasks.unit_cell import UnitCell
from tasks.wilson_plot import WilsonPlot

__all__ = ["draw_by_shell", "draw_statistics", "draw_wilson", "hkl_text", "merged_mtz", "shell_table"]


def merged_mtz(merged: Merged, cell: UnitCell, is_apart: bool, history: str) -> gemmi.Mtz:
    """IMEAN, SIGIMEAN and N_OBS; or I(+), SIGI(+), I(-), SIGI(-), with one row for both mates."""
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup, mtz.title, mtz.history = cell.group, "merged by Nearline", [history[:80]]
    mtz.add_dataset("nearline")
    mtz.set_cell_for_all(gemmi.UnitCell(*cell.parameters))
    if is_apart:
        columns, data = _mates_side_by_side(merged)
    else:
        columns = [("IMEAN", "J"), ("SIGIMEAN", "Q"), ("N_OBS", "I")]
        data = np.column_stack([merged.hkl, merged.intensity, merged.sigma, merged.n_observations])
    for label, kind in columns:
        mtz.add_column(label, kind)
    mtz.set_data(np.ascontiguousarray(data, np.float32))
    return mtz


def _mates_side_by_side(merged: Merged) -> tuple[list[tuple[str, str]], np.ndarray]:
    hkl, row = np.unique(merged.hkl, axis=0, return_inverse=True)
    values = np.full((len(hkl), 4), np.nan)
    for is_minus, at in ((False, 0), (True, 2)):
        mine = merged.is_minus == is_minus
        values[row.reshape(-1)[mine], at] = merged.intensity[mine]
        values[row.reshape(-1)[mine], at + 1] = merged.sigma[mine]
    columns = [("I(+)", "K"), ("SIGI(+)", "M"), ("I(-)", "K"), ("SIGI(-)", "M")]
    return columns, np.column_stack([hkl, values])


def hkl_text(merged: Merged, cell: UnitCell, is_apart: bool, history: str) -> str:
    """CrystFEL's reflection list 2.0; a minus mate under its own indices."""
    symmetry = cell.point_group if is_apart else cell.group.laue_str()
    lines = [
        "CrystFEL reflection list version 2.0", f"Symmetry: {symmetry}",
        "   h    k    l          I    phase   sigma(I)   nmeas",
    ]  # fmt: skip
    signs = np.where(merged.is_minus, -1, 1)[:, None]
    rows = zip((merged.hkl * signs).tolist(), merged.intensity, merged.sigma, merged.n_observations, strict=True)
    lines += [f"{hkl[0]:4d} {hkl[1]:4d} {hkl[2]:4d} {i:10.2f} {'-':>8} {s:10.2f} {n:7d}" for hkl, i, s, n in rows]
    return "\n".join([*lines, "End of reflections", history, ""])


def shell_table(statistics: MergeStatistics) -> str:
    """Statistics by shell and overall, as a Markdown table."""
    is_apart = statistics.friedel_mates == "apart"
    names: tuple[str, ...] = (
        "d, Å",
        "possible",
        "unique",
        "completeness",
        "multiplicity",
        "I/σ",
        "CC½",
        "CC*",
        "Rsplit",
    )
    names += ("CCano",) if is_apart else ()
    head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    rows = [_cells(shell, is_apart) for shell in (*statistics.shells, statistics)]
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)])


def _cells(shell: ShellStatistics, is_apart: bool) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    return [
        f"{shell.d_max:.2f}–{shell.d_min:.2f}", str(shell.n_possible), str(shell.n_unique),
        f"{100 * shell.completeness:.1f} %", number(shell.multiplicity, 1), number(shell.i_over_sigma, 1),
        number(shell.cc_half, 3), number(shell.cc_star, 3), number(shell.r_split, 3),
        *([number(shell.cc_ano, 3)] if is_apart else []),
    ]  # fmt: skip


def draw_statistics(path: Path, statistics: MergeStatistics, words: str) -> None:
    """CC1/2, CC* and Rsplit, completeness, multiplicity, I/σ, CCano by shell, and the Wilson plot, as a PNG."""
    figure, every = new_figure(12, 6, 2, 3)
    panels: list[tuple[str, dict[str, Callable[[ShellStatistics], Any]]]] = [
        ("", {"CC½": lambda s: s.cc_half, "CC*": lambda s: s.cc_star, "Rsplit": lambda s: s.r_split}),
        ("completeness, %", {"": lambda s: 100 * s.completeness}),
        ("multiplicity", {"": lambda s: s.multiplicity}),
        ("I/σ(I)", {"": lambda s: s.i_over_sigma}),
    ]
    if statistics.friedel_mates == "apart":
        panels.append(("CCano", {"": lambda s: s.cc_ano}))
    *by_shell, last, rest = every.flat
    draw_wilson(rest, statistics.wilson)
    for axes, (label, curves) in zip([*by_shell, last], panels, strict=False):
        draw_by_shell(axes, statistics.shells, label, curves)
    last.set_visible(len(panels) > len(by_shell))
    figure.suptitle(f"{words}; {statistics.space_group}, d_min {statistics.d_min:.2f} Å")
    figure.savefig(path)


def draw_by_shell(
    axes: Any, shells: Sequence[ShellStatistics], label: str, curves: dict[str, Callable[[ShellStatistics], Any]]
) -> None:
    """One or several quantities over resolution, in steps of equal volume in reciprocal space."""
    middle = [0.5 * (shell.d_max**-3 + shell.d_min**-3) for shell in shells]
    for (name, value), colour in zip(curves.items(), COLOURS, strict=False):
        values = [np.nan if (v := value(shell)) is None else v for shell in shells]
        axes.plot(middle, values, marker="o", markersize=4, color=colour, label=name or None)
    axes.set_ylabel(label)
    axes.margins(y=0.08)
    # A correlation may be negative; all else begins at nothing.
    axes.set_ylim(None if label == "CCano" else 0, 105 if label.startswith("completeness") else None)
    ticks = [middle[0], middle[len(middle) // 2], middle[-1]] if len(middle) > 2 else middle
    axes.set_xticks(ticks, [f"{tick ** (-1 / 3):.2f}" for tick in ticks])
    axes.set_xlabel("d, Å")
    if len(curves) > 1:
        axes.legend(frameon=False)


def draw_wilson(axes: Any, plot: WilsonPlot) -> None:
    """ln of the mean intensity over 1/(4d²), with the line through it where there is one."""
    axes.plot(plot.s_squared, plot.ln_mean_intensity, marker="o", markersize=4, linestyle="", color=BLUE)
    if plot.b_factor is not None and plot.ln_intercept is not None:
        x = np.array([0.0, max(plot.s_squared)])
        axes.plot(x, plot.ln_intercept - 2 * plot.b_factor * x, color=ORANGE, label=f"B = {plot.b_factor:.1f} Å²")
        axes.legend(frameon=False)
    axes.set_ylabel("ln ⟨I⟩")
    axes.set_xlabel("1/(4d²), 1/Å²")
