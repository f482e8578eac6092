"""The cells of single hits as histograms, for `nearline find-cell --picture`."""

from pathlib import Path
from typing import Any

import numpy as np

from flows.figure_style import BLUE, ORANGE, new_figure
from flows.finding_cell import CellReport

__all__ = ["draw_cells"]

_NAMES = ("a, Å", "b, Å", "c, Å", "α, °", "β, °", "γ, °")


def draw_cells(path: Path, report: CellReport) -> Path:
    """Histograms of a, b, c, α, β, γ over the hits that agree, and the proposed cell as a line, as a PNG."""
    figure, every = new_figure(8.5, 4.8, 2, 3)
    cells = np.array(report.cells, float).reshape(-1, 6)
    for number, axes in enumerate(every.ravel()):
        _histogram(axes, cells[:, number], _NAMES[number], report.cell[number] if report.cell else None)
    figure.suptitle(_title(report), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _title(report: CellReport) -> str:
    if report.cell is None:
        return f"{report.run}: no cell"
    numbers = "  ".join(f"{v:g}" for v in report.cell)
    return f"{report.run}: {report.lattice}, {numbers} ({report.certainty}; {report.n_agreeing} hits agree)"


def _histogram(axes: Any, values: np.ndarray, label: str, proposed: float | None) -> None:
    axes.set_xlabel(label)
    axes.set_ylabel("hits")
    if not len(values):
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color="#777777")
        return
    middle = float(np.median(values))
    half = max(float(np.abs(values - middle).max()), 0.002 * middle) * 1.05
    axes.hist(values, np.linspace(middle - half, middle + half, min(40, 10 + len(values) // 6)), color=BLUE)
    if proposed is not None:
        axes.axvline(proposed, color=ORANGE, linewidth=1.4)
    axes.locator_params(axis="x", nbins=5)
