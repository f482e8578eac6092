"""Frames as examples: the best, one in the middle, and the fullest one that was not taken for a hit."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from flows.chunk_figures import newest_table
from flows.pictures import frame_figure
from flows.report.gathering import Example, Gathered, RunPart
from flows.report.layout import Picture
from storage.errors import BadRecipe, NearlineError
from storage.step_store import StepStore
from tasks.chunk_frames import usable_mask
from tasks.recipe import read_mask

__all__ = ["example_pictures", "mask_of"]


def mask_of(part: RunPart) -> np.ndarray | None:
    """(slow, fast), nonzero where a pixel is not used; None where frames are no images."""
    if len(part.header.image_shape) != 2:
        return None
    path = part.manifest.recipe.get("mask")
    try:
        own = read_mask(Path(path)) if path else None
    except BadRecipe:  # the file has gone since: the detector's own mask is still there
        own = None
    return usable_mask(part.run[part.header.data_source].pixel_mask, part.header.image_shape, own)


def example_pictures(found: Gathered, mask: np.ndarray | None) -> list[Picture]:
    """Up to three frames with their peaks; a frame that is not there any more is left out, with a note.

    mask : of the first detector.
    """
    if mask is None or not found.has_peaks:
        return []
    made = []
    for name, words, example in _chosen(found):
        part = found.parts[example.part]
        if part.header.image_shape != mask.shape:
            continue
        try:
            figure = _draw(part, example.frame_index, mask, f"{part.run.name} frame {example.frame_index}")
        except (NearlineError, OSError) as error:
            found.notes.append(f"{words} is not shown: {error}")
            continue
        caption = f"{words[0].upper()}{words[1:]}: {part.run.name}, frame {example.frame_index}."
        made.append(Picture(f"example-{name}", partial(_same, figure), f"a frame with its peaks: {words}", caption))
    return made


def _same(figure: Figure) -> Figure:
    return figure


def _chosen(found: Gathered) -> Iterator[tuple[str, str, Example]]:
    shown = set()
    if found.best is not None:
        shown.add((found.best.part, found.best.frame_index))
        yield "best", f"the frame with most indexed spots, {found.best.rank:.0f}", found.best
    middle = found.peaks.median_of_hits
    others = [one for one in found.hits_with.values() if (one.part, one.frame_index) not in shown]
    if others:
        usual = min(others, key=lambda one: abs(one.rank - middle))
        yield "usual", f"a hit in the middle, with {_peaks(usual.rank)}", usual
    if found.near_hit is not None and found.seeks_hits:
        yield "near", f"the fullest frame that is no hit, with {_peaks(found.near_hit.rank)}", found.near_hit


def _peaks(n: float) -> str:
    return f"{n:.0f} peak{'' if n == 1 else 's'}"


def _draw(part: RunPart, index: int, mask: np.ndarray, title: str) -> Figure:
    frame = part.run[part.header.data_source][index].image
    chunk = part.processing.chunk(index // part.header.frames_per_chunk)
    assert chunk is not None
    store = StepStore(part.processing.run)
    peaks, reflections = (_of_frame(newest_table(store, chunk, name), index) for name in ("peaks", "reflections"))
    assert peaks is not None
    header = part.header.model_copy(update={"detector": part.detector})
    return frame_figure(frame, mask, header, title, peaks, reflections)


def _of_frame(table: pa.Table | None, index: int) -> pa.Table | None:
    return None if table is None else table.filter(pa.array(table["frame_index"].to_numpy() == index))
