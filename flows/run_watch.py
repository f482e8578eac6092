"""What is odd about a processing under way, in words: figures of its chunks, the first frames, the cell."""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from flows.cell_check import CellCheck
from flows.chunk_figures import figures_of_chunk
from flows.first_look import words_of_frames, words_of_mask
from flows.run_warnings import ChunkFigures, along_the_run, warnings_of
from storage.models import DetectorHeader, StreamHeader
from storage.step_store import Processing
from streaming.retrieval import Frame, Run
from tasks.chunk_frames import trustworthy
from tasks.process_chunk import ChunkResult

__all__ = ["RunWatch"]

log = logging.getLogger("nearline.process")

# A run of hours must not grow in memory.
_MOST_CHUNKS = 20_000


class RunWatch:
    """Told of every chunk; `words` is what to look at now, `last_words` what there was along the whole run.

    Parameters
    ----------
    header : of the stream, as the processing takes it. mask : (slow, fast), nonzero = do not use.
    """

    def __init__(self, run: Run, processing: Processing, header: StreamHeader, mask: np.ndarray) -> None:
        self._header, self._mask = header, mask
        self._cell_check = CellCheck(run, processing)
        self._figures: list[ChunkFigures] = []
        self._seeks_hits = self._has_looked = False
        self._at_first: list[str] = []

    def take(
        self,
        result: ChunkResult,
        frames: Callable[[], Sequence[Frame]],
        detector: DetectorHeader | None,
        lag_frames: int,
    ) -> ChunkFigures:
        """Take in a processed chunk; what is remembered of it.

        frames : gives the chunk's, should they be looked at. detector : as the chunk was processed.
        """
        if not self._has_looked and len(self._header.image_shape) == 2:
            self._look_at(frames())
        self._seeks_hits |= "hit" in result.frames.column_names
        figures = figures_of_chunk(
            result.manifest,
            detector or DetectorHeader(),
            crystals=result.table("crystals"),
            quality=result.table("crystal_quality"),
            peaks=result.table("peaks"),
            lag_frames=lag_frames,
        )
        self._figures.append(figures)
        del self._figures[:-_MOST_CHUNKS]
        self._cell_check.take(result.manifest)
        return figures

    def finish(self) -> None:
        """Wait for what is still being looked into."""
        self._cell_check.finish()

    @property
    def words(self) -> tuple[str, ...]:
        """What is odd now."""
        return self._with(warnings_of(self._figures, seeks_hits=self._seeks_hits))

    @property
    def last_words(self) -> tuple[str, ...]:
        """What is odd at the end, and the changes along the run."""
        return self._with(along_the_run(self._figures, seeks_hits=self._seeks_hits))

    def _with(self, warnings: list[str]) -> tuple[str, ...]:
        return tuple(text for text in (*self._at_first, *warnings, self._cell_check.words) if text)

    def _look_at(self, frames: Sequence[Frame]) -> None:
        """Once, at the first frames there are; what they say is said at once, in the log too."""
        if not frames:
            return
        self._has_looked = True
        some = [frames[i].image for i in sorted({0, len(frames) // 2, len(frames) - 1})]
        saturation = self._header.detector.saturation_value if self._header.detector else None
        limit = trustworthy(saturation, self._header)
        self._at_first = [
            text for text in (words_of_mask(self._mask), words_of_frames(some, self._mask, limit)) if text
        ]
        for text in self._at_first:
            log.warning("%s", text)
