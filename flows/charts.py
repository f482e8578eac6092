"""Small charts as SVG text: cheap enough to draw between two chunks, and sharp on any screen."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

__all__ = ["as_image", "histogram", "lines", "mean_of_known"]

WIDTH, HEIGHT = 420, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 24, 24
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c")
_MOST_POINTS = 200


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    highest: float | None = None,
    lowest: float | None = 0.0,
) -> str:
    """Values over a common x, as SVG text.

    Parameters
    ----------
    series : name → (n,) values; not-a-number where there is none.
    highest : upper end of the axis; by default the largest value.
    lowest : lower end of the axis; None for the smallest value.
    """
    every = np.array(list(series.values()), float).reshape(len(series), -1)
    at = np.asarray(x, float)
    if at.size > _MOST_POINTS:
        groups = np.array_split(np.arange(at.size), _MOST_POINTS)
        at = np.array([at[g].mean() for g in groups])
        every = np.array([[mean_of_known(row[g]) for g in groups] for row in every])
    finite = every[np.isfinite(every)]
    top = highest if highest is not None else float(finite.max()) if finite.size else 1.0
    bottom = lowest if lowest is not None else float(finite.min()) if finite.size else 0.0
    top = top if top > bottom else bottom + 1.0
    parts = [_frame(title, x_label, at.min() if at.size else 0, at.max() if at.size else 1, bottom, top)]
    left, span = (float(at.min()), float(np.ptp(at)) or 1.0) if at.size else (0.0, 1.0)
    for number, (name, values) in enumerate(zip(series, every, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [
            f"{_x((t - left) / span):.1f},{_y((min(v, top) - bottom) / (top - bottom)):.1f}"
            for t, v in zip(at, values, strict=True)
            if np.isfinite(v)
        ]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(points) == 1:
            cx, cy = points[0].split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="2.5" fill="{colour}"/>')
        place = WIDTH - _RIGHT - 92 * (len(series) - number) + 8
        parts.append(f'<text x="{place}" y="15" fill="{colour}" font-size="11">{escape(name)}</text>')
    return _svg(parts)


def histogram(values: np.ndarray, *, title: str, x_label: str, n_bins: int = 40) -> str:
    """Counts of values, as SVG text; the outermost half per cent on each side is put into the last bars."""
    values = values[np.isfinite(values)]
    if not len(values):
        return _svg([_frame(f"{title}: none yet", x_label, 0, 1, 0, 1)])
    low, high = np.percentile(values, [0.5, 99.5])
    edges = np.linspace(low, max(high, low + 1e-3), min(n_bins, 8 + len(values) // 8) + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    top = int(counts.max())
    median = float(np.median(values))
    parts = [_frame(f"{title}: median {median:.4g}, {len(values)}", x_label, edges[0], edges[-1], 0, top)]
    wide = (WIDTH - _LEFT - _RIGHT) / len(counts)
    for number, count in enumerate(counts):
        y = _y(count / top)
        parts.append(
            f'<rect x="{_LEFT + number * wide:.1f}" y="{y:.1f}" width="{max(wide - 0.8, 0.5):.1f}" '
            f'height="{HEIGHT - _BOTTOM - y:.1f}" fill="{_COLOURS[0]}"/>'
        )
    return _svg(parts)


def as_image(svg: str, words: str) -> str:
    """A Markdown image that holds the chart itself."""
    return f"![{words}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def mean_of_known(values: np.ndarray) -> float:
    """The mean of what is a number; a value that is not there hides none of its neighbours."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _short(value: float) -> str:
    """A number that fits beside the axis."""
    text = f"{value:.4g}"
    return text if len(text) <= 7 else f"{value:.1e}"


def _frame(title: str, x_label: str, x_min: float, x_max: float, y_min: float, y_max: float) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    return (
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#888888"/>'
        f'<text x="{_LEFT}" y="15" font-size="11" font-weight="bold">{escape(title)}</text>'
        f'<text x="{_LEFT - 4}" y="{_TOP + 8}" text-anchor="end">{_short(y_max)}</text>'
        f'<text x="{_LEFT - 4}" y="{bottom}" text-anchor="end">{_short(y_min)}</text>'
        f'<text x="{_LEFT}" y="{HEIGHT - 9}">{x_min:.5g}</text>'
        f'<text x="{right}" y="{HEIGHT - 9}" text-anchor="end">{x_max:.5g}</text>'
        f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 9}" text-anchor="middle">{escape(x_label)}</text>'
    )


def _x(part: float) -> float:
    return _LEFT + part * (WIDTH - _LEFT - _RIGHT)


def _y(part: float) -> float:
    return HEIGHT - _BOTTOM - part * (HEIGHT - _TOP - _BOTTOM)


def _svg(parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'{head} font-family="sans-serif" font-size="10" fill="#222222">{"".join(parts)}</svg>'
