"""`nearline tune`: threshold, mask and hit cut of the peak search proposed from a minute of a run, with reasons."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

from flows.figure_style import BLUE, GREY, LIGHT, ORANGE, new_figure
from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.models import Record
from streaming.retrieval import Run, Stream
from tasks.chunk_frames import trustworthy, usable_mask
from tasks.chunk_job import analysis_header, analysis_mask
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.recipe import Recipe, load_recipe
from tasks.tune_peaks import BadPixels, PixelSurvey, hit_cut

__all__ = ["Survey", "TuneReport", "draw_tuning", "tune", "write_mask", "write_tuned_recipe"]

ProgressCall = Callable[[str, int, int], None]
# Above such a share of bad pixels it is not single pixels that are wrong.
_MOST_BAD = 0.05
_NO_HITS = 0.002


class TuneReport(Record):
    """What is proposed, and why."""

    run: str
    data_source: str
    n_frames: int = Field(description="looked at, spread over the newest part of the run")
    threshold: float = Field(description="counts, as `find_peaks` takes it")
    min_snr: float
    min_pix_count: int
    min_peaks: int = Field(description="a frame with at least so many is a hit")
    n_hot: int = Field(description="pixels to mask that are too bright too often")
    n_cold: int = Field(description="pixels to mask that count too little, a shadow among them")
    masked_before: float = Field(description="share of the frame that was masked already")
    background_low: float = Field(description="counts per pixel of the darkest tenth of rings")
    background_high: float = Field(description="counts per pixel of the brightest ring")
    n_hits: int = Field(description="of the frames looked at, with what is proposed")
    n_hits_before: int = Field(description="with the parameters and mask that were there")
    blank_peaks: float = Field(description="peaks of a frame without a crystal, on average")
    false_hits: float = Field(description="share of blank frames that would be taken for hits")
    words: tuple[str, ...] = Field(description="the same in words")


@dataclass(frozen=True)
class Survey:
    """What the report rests on, for pictures and files."""

    recipe: Recipe
    geometry: Geometry
    rings: np.ndarray
    mask: np.ndarray
    bad: BadPixels
    background: np.ndarray
    counts: np.ndarray
    counts_before: np.ndarray
    example: np.ndarray
    example_peaks: np.ndarray


def tune(
    run: Run,
    *,
    data_source: str | None = None,
    n_frames: int = 300,
    recipe: Recipe | None = None,
    n_threads: int | None = None,
    progress: ProgressCall = lambda stage, done, total: None,
) -> tuple[TuneReport, Survey]:
    """Look at frames of a run, live or finished, and propose how to search them.

    Parameters
    ----------
    n_frames : at most so many are looked at, evenly spread over what there is.
    recipe : what is in use: its detector values, its mask and its `find_peaks`; by default none.

    Raises
    ------
    BadRecipe : fewer than twenty frames, no threshold parts peaks from background, or the recipe searches binned
        frames. BadFrame : no geometry.
    """
    loaded = recipe or load_recipe({"steps": [{"use": "find_peaks"}]})
    _require_whole_frames(loaded)
    stream = run[data_source] if data_source else run.detector
    header = analysis_header(stream, loaded)
    assert header.detector is not None
    shape = (header.image_shape[0], header.image_shape[1])
    geometry, mask = Geometry.from_header(header.detector, shape), analysis_mask(stream, loaded)
    before = _params(loaded, trustworthy(header.detector.saturation_value, header))
    survey = PixelSurvey(geometry, mask, before)
    indices = _spread(stream, n_frames)
    for n_done, frame in enumerate(_frames(stream, indices), 1):
        survey.add(frame)
        progress("pixels", n_done, len(indices))
    bad = survey.bad_pixels()
    params = replace(before, threshold=survey.threshold())
    better = usable_mask(None, shape, (mask != 0) | bad.any)
    finders = PeakFinder(geometry, better, params), PeakFinder(geometry, mask, before)
    counts, example = _counts(stream, indices, finders, n_threads, progress)
    cut = hit_cut(counts[:, 0])
    n_before = int((counts[:, 1] >= _min_peaks(loaded)).sum())
    background = survey.background()
    report = TuneReport(
        run=run.name,
        data_source=stream.name,
        n_frames=len(indices),
        threshold=params.threshold,
        min_snr=params.min_snr,
        min_pix_count=params.min_pix_count,
        min_peaks=cut.min_peaks,
        n_hot=int(bad.hot.sum()),
        n_cold=int(bad.cold.sum()),
        masked_before=float((mask != 0).mean()),
        background_low=float(np.nanpercentile(background[1:], 10)),
        background_high=float(np.nanmax(background[1:])),
        n_hits=cut.n_hits,
        n_hits_before=n_before,
        blank_peaks=cut.blank_mean,
        false_hits=cut.false_hits,
        words=(),
    )
    data = Survey(
        loaded, geometry, survey.rings, mask, bad, background, counts[:, 0], counts[:, 1], example,
        finders[0](example),
    )  # fmt: skip
    return report.model_copy(update={"words": tuple(_words(report, before, mask.size))}), data


def _require_whole_frames(recipe: Recipe) -> None:
    uses = [step.use for step in recipe.steps]
    if "find_peaks_dispersion" in uses:
        raise BadRecipe(
            f"recipe {recipe.name} searches peaks with find_peaks_dispersion, and what is tuned here are thresholds of "
            "find_peaks; tune a recipe that uses that one"
        )
    before = recipe.steps[: uses.index("find_peaks")] if "find_peaks" in uses else []
    if any(step.use == "bin" and step.params.get("feed_next") for step in before):
        raise BadRecipe(
            f"recipe {recipe.name} searches binned frames (bin: feed_next), and thresholds of whole frames say nothing "
            "about those; tune without feed_next, or leave the peak search's parameters as they are"
        )


# ---- frames ---------------------------------------------------------------------------------------


def _spread(stream: Stream, n: int) -> list[int]:
    """Indices of up to n frames, evenly over those that are there."""
    n_there = len(stream)
    return sorted({int(i) for i in np.linspace(0, n_there - 1, min(n, n_there))}) if n_there else []


def _frames(stream: Stream, indices: list[int]) -> Iterator[np.ndarray]:
    for frame in stream.frames_at(np.array(indices, np.int64)):
        yield frame.image


def _counts(
    stream: Stream,
    indices: list[int],
    finders: tuple[PeakFinder, PeakFinder],
    n_threads: int | None,
    progress: ProgressCall,
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2): peaks of each frame with each finder; and the frame with most of them."""
    most, example, counts = -1, np.empty(0), []
    with ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
        for frame in _frames(stream, indices):
            found = [len(peaks) for peaks in pool.map(lambda find, frame=frame: find(frame), finders)]
            counts.append(found)
            if found[0] > most:
                most, example = found[0], frame
            progress("peaks", len(counts), len(indices))
    return np.array(counts), example


def _params(recipe: Recipe, saturation: int | None) -> PeakParams:
    """Those of the recipe's peak search."""
    given = next((dict(step.params) for step in recipe.steps if step.use == "find_peaks"), {})
    given.pop("min_peaks", None)
    return PeakParams(**({"saturation": saturation} | given))


def _min_peaks(recipe: Recipe) -> int:
    given = next((step.params for step in recipe.steps if step.use == "find_peaks"), {})
    return int(given.get("min_peaks", 15))


# ---- words ----------------------------------------------------------------------------------------


def _words(report: TuneReport, before: PeakParams, n_pixels: int) -> Iterator[str]:
    yield (
        f"background is {report.background_low:.2g} to {report.background_high:.2g} counts per pixel; with a threshold "
        f"of {report.threshold:g} (it was {before.threshold:g}) it makes less than one false peak in ten frames"
    )
    n_bad = report.n_hot + report.n_cold
    if n_bad:
        yield (
            f"{report.n_hot} pixels are hot and {report.n_cold} cold, {100 * n_bad / n_pixels:.2g} % of the frame; "
            "mask them (--write gives the mask)"
        )
    else:
        yield "no pixel that is not masked already is out of the ordinary"
    if report.n_cold > _MOST_BAD * n_pixels:
        yield "so many cold pixels are a shadow, or a beam centre that is far off: look at the picture first"
    share = report.n_hits / report.n_frames
    if share < _NO_HITS:
        yield (
            f"none of the {report.n_frames} frames stands out as a hit, so the cut of {report.min_peaks} peaks rests "
            "on blanks alone; look again when crystals come"
        )
    else:
        yield (
            f"a frame without a crystal has {report.blank_peaks:.2g} peaks; from {report.min_peaks} on it is a hit, "
            f"which one blank in {1 / report.false_hits:,.0f} reaches: {report.n_hits} of {report.n_frames} frames are "
            f"hits, {100 * share:.0f} % ({report.n_hits_before} with what was in use)"
        )


# ---- files ----------------------------------------------------------------------------------------


def write_mask(path: Path, survey: Survey) -> None:
    """The mask for the recipe, (slow, fast) uint8 as ``.npy``, nonzero = do not use: what was masked, and is bad."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, ((survey.mask != 0) | survey.bad.any).astype(np.uint8))


def write_tuned_recipe(path: Path, report: TuneReport, survey: Survey) -> None:
    """The recipe with what is proposed, and its mask beside it, ``<name>.mask.npy``."""
    mask = path.with_suffix(".mask.npy")
    write_mask(mask, survey)
    content = survey.recipe.model_dump(mode="json", exclude_defaults=True)
    content.pop("mask_digest", None)
    proposed = {"threshold": report.threshold, "min_peaks": report.min_peaks}
    steps = content.get("steps") or [{"use": "find_peaks"}]
    for step in steps:
        if step["use"] == "find_peaks":
            step["params"] = dict(step.get("params") or {}) | proposed
    content |= {"steps": steps, "mask": str(mask.absolute())}
    path.write_text(f"# tuned to {report.n_frames} frames of {report.run}\n" + yaml.safe_dump(content, sort_keys=False))


def draw_tuning(path: Path, report: TuneReport, survey: Survey) -> None:
    """Background with the threshold, numbers of peaks with the cut, bad pixels, and the frame with most; a PNG."""
    figure, axes = new_figure(10, 7, 2, 2)
    _draw_background(axes[0, 0], report, survey)
    _draw_counts(axes[0, 1], report, survey)
    _draw_mask(axes[1, 0], report, survey)
    _draw_example(axes[1, 1], survey)
    figure.suptitle(f"{report.run} · {report.data_source} · {report.n_frames} frames")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_background(axes: Any, report: TuneReport, survey: Survey) -> None:
    level = survey.background[1:]
    axes.plot(np.arange(len(level)), level, color=BLUE, label="background")
    own = level + report.min_snr * np.sqrt(level)
    axes.plot(np.arange(len(level)), np.maximum(own, report.threshold), color=ORANGE, label="a pixel above counts")
    axes.axhline(report.threshold, color=GREY, linewidth=0.8, linestyle=":", label=f"threshold {report.threshold:g}")
    axes.set(xlabel="distance from the beam, px", ylabel="counts per pixel", title="background", ylim=(0, None))
    axes.legend()


def _draw_counts(axes: Any, report: TuneReport, survey: Survey) -> None:
    highest = max(int(survey.counts.max(initial=1)), int(survey.counts_before.max(initial=1)), report.min_peaks + 1)
    edges = np.unique(np.geomspace(1, highest + 2, 40).astype(int)) - 0.5
    edges = np.concatenate([[-0.5], edges])
    for values, colour, label in (
        (survey.counts_before, LIGHT, "as it was"), (survey.counts, BLUE, "proposed")
    ):  # fmt: skip
        axes.stairs(np.histogram(values, edges)[0], edges, color=colour, fill=label == "as it was", label=label)
    axes.axvline(report.min_peaks - 0.5, color=ORANGE, linestyle="--", label=f"hits from {report.min_peaks} on")
    axes.set(xlabel="peaks in a frame", ylabel="frames", title="where hits begin", xscale="symlog", xlim=(-0.5, None))
    axes.legend()


def _draw_mask(axes: Any, report: TuneReport, survey: Survey) -> None:
    axes.grid(False)
    shape = survey.mask.shape
    axes.imshow(np.where(survey.mask != 0, 0.75, 1.0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for which, colour, label in (
        (survey.bad.hot, ORANGE, f"hot: {report.n_hot}"), (survey.bad.cold, BLUE, f"cold: {report.n_cold}")
    ):  # fmt: skip
        y, x = np.nonzero(which)
        axes.scatter(x, y, s=4, color=colour, label=label)
    axes.set(xlim=(0, shape[1]), ylim=(shape[0], 0), title="bad pixels (grey: masked already)")
    axes.legend(loc="upper right")


def _draw_example(axes: Any, survey: Survey) -> None:
    axes.grid(False)
    frame = np.where((survey.mask != 0) | survey.bad.any, np.nan, survey.example.astype(float))
    top = float(np.nanpercentile(frame, 99.7)) or 1.0
    axes.imshow(frame, cmap="gray_r", vmin=0, vmax=max(top, 1.0))
    axes.scatter(survey.example_peaks["x"], survey.example_peaks["y"], s=40, facecolors="none", edgecolors=ORANGE)
    axes.set_title(f"the frame with most peaks: {len(survey.example_peaks)}")
