"""One look for all figures: colours that colour-blind eyes tell apart, light axes, text as it was written."""

import io
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from PIL import Image

__all__ = [
    "BLUE", "COLOURS", "GREEN", "GREY", "LIGHT", "MAP", "ORANGE", "PURPLE", "SKY", "new_figure", "plain", "png_of",
    "tidy",
]  # fmt: skip

# Okabe & Ito's palette (Color Universal Design, 2008).
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
GREY, LIGHT = "#666666", "#d9dde3"
# Even steps of lightness, and the same order for every eye.
MAP = "viridis"
_LONGEST, _DPI, _N_COLOURS = 60, 130, 128

Margins = tuple[float, float, float, float, float, float]


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, *, margins: Margins | None = None
) -> tuple[Figure, Any]:
    """A figure of inches with its axes: one, or an array of them as `Figure.subplots` gives it.

    Parameters
    ----------
    margins : inches left, right, bottom, top, and between columns and rows. Without them matplotlib finds them by
        drawing everything twice.
    """
    # No pyplot: it keeps figures for a whole process, and flows draw in several threads.
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    if margins is not None:
        left, right, bottom, top, between, above = margins
        each = (width - left - right - between * (columns - 1)) / columns
        tall = (height - bottom - top - above * (rows - 1)) / rows
        figure.subplots_adjust(
            left / width, bottom / height, 1 - right / width, 1 - top / height, between / each, above / tall
        )
    for one in np.ravel(axes):
        tidy(one)
    return figure, axes


def tidy(axes: Any) -> None:
    """Two spines, small ticks, a faint grid behind what is drawn."""
    for side in ("top", "right"):
        if side in axes.spines:
            axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(9)


def png_of(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG."""
    # Not `savefig`, which draws everything twice.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    buffer = io.BytesIO()
    # Of some ten colours and their shades; it takes a third of the bytes.
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(_N_COLOURS).save(buffer, "PNG")
    return buffer.getvalue()


def plain(text: str) -> str:
    """What a user has named, as a label: no formulas, no letters without a glyph, no more than fits."""
    shown = "".join(letter if letter.isprintable() and ord(letter) in _glyphs() else "?" for letter in text)
    shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
    return shown.replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
