"""Directions on a sphere as equal-area pole figures, with their density against that of random ones."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flows.figure_style import BLUE, GREY, MAP, ORANGE
from flows.report.gathering import Gathered
from tasks.orientation_coverage import axis_directions, beam_directions, laue_rotations

__all__ = ["draw_axis", "draw_beams", "equal_area"]

_NAMES = ("a*", "b*", "c*")
_RADIUS = 2**0.5
# Below so many, each direction is a point; above, a cell of a map.
_MOST_POINTS = 6_000
_CELLS = 36


def equal_area(directions: np.ndarray) -> np.ndarray:
    """(n, 2): Lambert's azimuthal projection of the upper half sphere about z; lower ones as their opposite.

    Areas stay as they are, so random directions are spread evenly over a disc of radius √2.
    """
    up = np.where(directions[:, 2:] < 0, -directions, directions)
    return np.asarray(up[:, :2] / np.sqrt((1 + up[:, 2:]) / 2))


def draw_beams(figure: Figure, axes: Any, found: Gathered) -> None:
    """The direction of the beam in each crystal, with its equivalents in the Laue group."""
    assert found.cell is not None
    beams = beam_directions(found.matrices, found.cell)
    every = np.einsum("mij,nj->mni", laue_rotations(found.cell), beams).reshape(-1, 3)
    _disc(figure, axes, every)
    axes.set_title("the beam in the crystal", fontsize=10)
    for name, column in zip(_NAMES, found.cell.B.T, strict=True):
        x, y = equal_area(column[None] / np.linalg.norm(column))[0]
        axes.plot(x, y, "x", color=ORANGE, markersize=7)
        axes.annotate(name, (x, y), (4, 4), textcoords="offset points", color=ORANGE, fontsize=9)


def draw_axis(figure: Figure, axes: Any, found: Gathered, name: str | None) -> None:
    """Where an axis of the crystals points in the laboratory, seen along the beam; c* where none is named."""
    assert found.cell is not None
    columns = dict(zip(_NAMES, found.cell.B.T, strict=True))
    name = name or "c*"
    # What is none of the three is the threefold axis between them.
    axis = columns[name] if name in columns else sum(c / np.linalg.norm(c) for c in columns.values())
    # Looking along the beam, x goes to the left.
    _disc(figure, axes, axis_directions(found.matrices, found.cell, np.asarray(axis)) * (-1, 1, 1))
    axes.set_title(f"{name} in the laboratory", fontsize=10)
    for y, text in ((1.5, "up"), (-1.5, "down")):
        axes.text(0, y, text, ha="center", va="center", color=GREY, fontsize=8)
    axes.plot(0, 0, "+", color=ORANGE, markersize=9)


def _disc(figure: Figure, axes: Any, directions: np.ndarray) -> None:
    at = equal_area(directions)
    turn = np.linspace(0, 2 * np.pi, 200)
    axes.plot(_RADIUS * np.cos(turn), _RADIUS * np.sin(turn), color=GREY, linewidth=0.9)
    axes.set(aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
    axes.axis("off")
    if len(at) < _MOST_POINTS:
        axes.scatter(*at.T, s=max(2.0, min(14.0, 6000 / max(len(at), 1))), color=BLUE, alpha=0.5, linewidths=0)
        return
    edges = np.linspace(-_RADIUS, _RADIUS, _CELLS + 1)
    counts, _, _ = np.histogram2d(at[:, 1], at[:, 0], [edges, edges])
    share = _inside(edges)
    with np.errstate(invalid="ignore", divide="ignore"):
        density = counts / (share / share.sum() * len(at))
    density[share < 0.2] = np.nan
    image = axes.imshow(density, origin="lower", extent=(-_RADIUS, _RADIUS) * 2, cmap=MAP, vmin=0)
    bar = figure.colorbar(image, cax=axes.inset_axes((1.02, 0.2, 0.035, 0.6)))
    bar.set_label("density, 1 = random", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _inside(edges: np.ndarray) -> np.ndarray:
    """(n, n): the share of each cell that lies in the disc, by 8 × 8 points."""
    n = len(edges) - 1
    fine = np.linspace(edges[0], edges[-1], 8 * n, endpoint=False) + (edges[1] - edges[0]) / 16
    within = fine[:, None] ** 2 + fine[None] ** 2 <= _RADIUS**2
    return np.asarray(within.reshape(n, 8, n, 8).mean(axis=(1, 3)))
