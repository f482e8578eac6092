"""Pictures of frames for people: what was found, drawn on what was seen."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from storage.models import StreamHeader
from tasks.bin_frames import MARKED, bin_frame

__all__ = ["draw_frame", "frame_figure"]

_WIDTH_PX = 700


def draw_frame(
    path: Path,
    frame: np.ndarray,
    mask: np.ndarray,
    header: StreamHeader,
    title: str,
    peaks: pa.Table,
    reflections: pa.Table | None = None,
) -> Path:
    """A frame with its peaks (circles) and predicted reflections (squares) as a PNG.

    frame, mask : (slow, fast). peaks, reflections : tables with x, y in px.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frame_figure(frame, mask, header, title, peaks, reflections).savefig(path)
    return path


def frame_figure(
    frame: np.ndarray,
    mask: np.ndarray,
    header: StreamHeader,
    title: str,
    peaks: pa.Table,
    reflections: pa.Table | None = None,
) -> Figure:
    """The same, not written yet."""
    factor = max(1, -(-frame.shape[1] // _WIDTH_PX))
    if frame.dtype.kind == "f":
        # Whole counts are enough for a picture, and what sums pixels takes no others.
        mask = (mask != 0) | ~np.isfinite(frame)
        frame = np.rint(np.clip(np.where(np.isfinite(frame), frame, 0), 0, 2**31 - 1)).astype(np.uint32)
    sums, _ = bin_frame(frame, mask, factor, None)
    image = np.where(sums == MARKED, np.nan, sums / factor**2)
    # No pyplot: it keeps figures for a whole process, and runs are processed in several threads.
    figure = Figure(figsize=(7, 7 * frame.shape[0] / frame.shape[1] + 0.4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    low, high = np.nanpercentile(image, [1, 99.7]) if np.isfinite(image).any() else (0, 1)
    extent = (0, sums.shape[1] * factor, sums.shape[0] * factor, 0)
    colours = colormaps["gray_r"].with_extremes(bad="#cfd8e6")
    axes.imshow(image, cmap=colours, vmin=low, vmax=max(high, low + 1e-6), extent=extent, interpolation="nearest")
    axes.autoscale(False)
    if reflections is not None and len(reflections):
        axes.scatter(
            reflections["x"],
            reflections["y"],
            s=34,
            marker="s",
            facecolors="none",
            edgecolors="#1f77b4",
            linewidths=0.6,
        )
    axes.scatter(peaks["x"], peaks["y"], s=46, facecolors="none", edgecolors="#d62728", linewidths=0.9)
    if header.detector is not None:
        axes.plot(header.detector.beam_center_x, header.detector.beam_center_y, "+", color="#2ca02c", markersize=9)
    axes.set_title(f"{title}\ncircles: peaks found; squares: predicted from the lattice; cross: beam", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.tight_layout(pad=0.4)
    return figure
