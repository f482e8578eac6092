"""The page of a run in the Prefect UI: how far, how good, what it looks like, what is odd, where the files are.

One artifact for each run and processing. Told of every chunk, it writes at most every few seconds, in a thread of
its own: the analysis never waits for a server.
"""

import base64
import io
import logging
import threading
import time
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flows.charts import as_image, histogram, lines
from flows.chunk_figures import newest_table
from flows.markdown_page import MarkdownPage
from flows.progress import Progress
from flows.run_warnings import ChunkFigures
from flows.step_columns import StepColumns
from storage.step_store import ChunkManifest, Processing, StepStore
from streaming.retrieval import Run
from tasks.recipe import Recipe

__all__ = ["RunPage"]

log = logging.getLogger("nearline.process")

_EVERY_S = 5.0
_PICTURE_PX = 420
_LAST_S = 20.0
_CELL_LENGTHS = ("a", "b", "c")
# Enough for any histogram; a run of hours must not grow in memory.
_MOST_CRYSTALS = 20_000
_MOST_CHUNKS = 20_000
_BAR = 30


class RunPage:
    """A `flows.progress.Reporter` that keeps the page up to date.

    Parameters
    ----------
    every : s between two versions at least.
    """

    def __init__(self, every: float = _EVERY_S) -> None:
        self._every = every
        self._changed = threading.Condition()
        self._chunks: list[tuple[ChunkManifest, ChunkFigures]] = []
        self._progress: Progress | None = None
        self._summary: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        # Below: the thread's own.
        self._figures: list[ChunkFigures] = []
        self._values: dict[str, list[np.ndarray]] = {}
        self._columns = StepColumns()
        self._pictures: dict[Path, str] = {}

    def started(self, run: Run, processing: Processing, recipe: Recipe) -> None:
        self._title = f"{run.name} · {processing.name} · {recipe.name}"
        self._run, self._store = run, StepStore(run.folder)
        self._own_steps = [spec.name for spec in recipe.steps if ":" in spec.use]
        self._finds_peaks = any(spec.use.startswith("find_peaks") for spec in recipe.steps)
        self._page = MarkdownPage(f"{run.name}-{processing.name}", f"the page of {self._title}")
        self._started = time.monotonic()
        # In a copy of our context: that is how the server knows which flow run the page belongs to.
        self._thread = threading.Thread(target=copy_context().run, args=(self._keep,), name="run-page", daemon=True)
        self._thread.start()

    def chunk_done(self, progress: Progress) -> None:
        with self._changed:
            self._chunks.append((progress.chunk, progress.figures))
            self._progress = progress
            self._changed.notify_all()

    def finished(self, summary: dict[str, Any]) -> None:
        with self._changed:
            self._summary = summary
            self._changed.notify_all()
        if self._thread is not None:
            # A server that hangs costs the last version of the page, not the flow.
            self._thread.join(_LAST_S)

    # ---- the thread ---------------------------------------------------------------------------

    def _keep(self) -> None:
        """Bring the page up to date when something is new, not too often, until the processing has finished."""
        is_last = False
        while not is_last:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks or self._summary is not None)
                new, self._chunks = self._chunks, []
                progress, summary = self._progress, self._summary
            is_last = summary is not None
            try:
                for chunk, figures in new:
                    self._take_in(chunk, figures)
                self._page.show(self._text(progress, summary), is_last=is_last)
            except Exception:  # a page that cannot be drawn is no reason to stop the analysis, nor the next page
                log.exception("the page of %s could not be drawn", self._title)
            if not is_last:
                with self._changed:
                    self._changed.wait_for(lambda: self._summary is not None, self._every)

    def _take_in(self, chunk: ChunkManifest, figures: ChunkFigures) -> None:
        """Remember of a chunk what the page shows."""
        for name in self._own_steps:
            frames = self._store.read(chunk.steps[name], "frames")
            if frames is not None:
                self._columns.take_in(frames)
        crystals, quality = (newest_table(self._store, chunk, name) for name in ("crystals", "crystal_quality"))
        if crystals is not None:
            for name in _CELL_LENGTHS:
                self._values.setdefault(name, []).append(crystals[name].to_numpy())
        if quality is not None:
            self._values.setdefault("resolution", []).append(quality["resolution"].to_numpy())
        self._figures.append(figures)
        del self._figures[:-_MOST_CHUNKS]

    def _newest(self, name: str) -> np.ndarray:
        """The newest values of all crystals, so many that a histogram does not change by more."""
        parts = self._values.get(name, [])
        every = np.concatenate(parts)[-_MOST_CRYSTALS:] if parts else np.empty(0)
        self._values[name] = [every]
        return every

    # ---- the text -----------------------------------------------------------------------------

    def _text(self, progress: Progress | None, summary: dict[str, Any] | None) -> str:
        parts = [
            f"# {self._title}",
            self._how_far(progress, summary),
            self._warnings(progress, summary),
            _geometries(progress),
            _outlook(progress),
            self._charts(),
            self._own_columns(),
        ]
        if progress is not None and progress.pictures:
            parts.append("## Examples\n\n" + "\n".join(self._picture(path) for path in progress.pictures))
        parts.append(self._files(summary))
        return "\n\n".join(part for part in parts if part)

    def _how_far(self, progress: Progress | None, summary: dict[str, Any] | None) -> str:
        if progress is None:
            return "no frames" if summary is not None else "waiting for the first chunk"
        totals, seconds = progress.totals, time.monotonic() - self._started
        hits = (
            f" · **{totals.hits}** hits, **{100 * totals.hit_rate:.1f} %** of frames · "
            f"**{totals.indexed}** indexed, **{100 * totals.indexing_rate:.1f} %** of hits"
        )
        lines_ = [f"**{totals.frames}** frames{hits if self._seeks_hits else ''}"]
        if summary is not None:
            lines_.insert(0, f"`{_bar(1.0)}` finished after {summary['seconds']:.1f} s")
        elif progress.planned:
            part = min(progress.chunk.stop / progress.planned, 1.0)
            lines_.insert(0, f"`{_bar(part)}` {100 * part:.0f} % of {progress.planned} planned frames")
        if summary is None:
            lines_.append(
                f"lag {progress.figures.lag_frames} frames · {totals.frames / max(seconds, 1e-3):.1f} frames/s"
            )
        return "\n\n".join(lines_)

    def _warnings(self, progress: Progress | None, summary: dict[str, Any] | None) -> str:
        notes = summary["notes"] if summary is not None else progress.notes if progress is not None else ()
        return "\n".join(f"> **Look:** {text}\n" for text in notes)

    @property
    def _seeks_hits(self) -> bool:
        """Whether a step tells hits from other frames: ours, or a user's with such a column."""
        return self._finds_peaks or "hit" in self._columns

    def _own_columns(self) -> str:
        charts = self._columns.charts()
        return f"## Columns of {', '.join(self._own_steps)}\n\n{charts}" if charts else ""

    def _charts(self) -> str:
        if not self._figures:
            return ""
        middle = [(c.start + c.stop) / 2 for c in self._figures]
        rates = {
            "hits/frames": [_percent(c.n_hits, c.n_frames) for c in self._figures],
            "indexed/hits": [_percent(c.n_indexed, c.n_hits) for c in self._figures],
        }
        lags = {"lag": [float(c.lag_frames) for c in self._figures]}
        images = [as_image(lines(middle, lags, title="lag, frames", x_label="frame"), "lag over frames")]
        if self._seeks_hits:
            chart = lines(middle, rates, title="rates, %", x_label="frame", highest=100.0)
            images.insert(0, as_image(chart, "rates over frames"))
        if "a" in self._values:
            values = self._newest("resolution")
            images.append(as_image(histogram(values, title="resolution, Å", x_label="Å"), "resolution of crystals"))
            for name in _CELL_LENGTHS:
                chart = histogram(self._newest(name), title=f"cell {name}, Å", x_label="Å")
                images.append(as_image(chart, f"cell length {name}"))
        return "\n".join(images)

    def _picture(self, path: Path) -> str:
        if path not in self._pictures:
            self._pictures[path] = _embedded(path)
        return self._pictures[path]

    def _files(self, summary: dict[str, Any] | None) -> str:
        rows = [("run folder", str(self._run.folder))]
        rows += [(name, str(path)) for name, path in (summary or {}).get("files", {}).items()]
        return "## Files\n\n" + "\n".join(
            ["| | path |", "|---|---|", *(f"| {name} | `{path}` |" for name, path in rows)]
        )


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else float("nan")


def _outlook(progress: Progress | None) -> str:
    """Whether, or when, there is enough."""
    rows = [] if progress is None else [f"| `{text}` | {words} |" for text, words in progress.outlook.items()]
    return "\n".join(["| stop when | |", "|---|---|", *rows]) if rows else ""


def _geometries(progress: Progress | None) -> str:
    """Where the detector was found to stand elsewhere."""
    return "\n".join(f"> **Geometry:** {snapshot.words}\n" for snapshot in (progress.geometries if progress else ()))


def _bar(part: float) -> str:
    n = round(_BAR * part)
    return "█" * n + "░" * (_BAR - n)


def _embedded(path: Path) -> str:
    """A small copy of a picture inside the text: the UI has no access to the data folder."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_PICTURE_PX, _PICTURE_PX))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=70)
    return f"![{path.stem}](data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()})"
