"""What a processing makes of a stream's frames, as streams of its own beside it: results, binned frames, hits."""

import logging
import math
from typing import Any

from storage.errors import BadRecipe, NearlineError
from storage.models import StreamHeader
from storage.step_store import Processing
from streaming.derived import DerivedStream, Row, open_derived
from streaming.retrieval import Run, Stream, open_run
from tasks.bin_frames import binned_header
from tasks.chunk_job import ChunkJob
from tasks.process_chunk import ChunkResult
from tasks.recipe import Recipe
from tasks.steps import STEPS, BinParams

__all__ = ["DerivedStreams", "plain_row"]

log = logging.getLogger("nearline.process")

_NOT_A_HIT = "not a hit"


class DerivedStreams:
    """The derived streams of one processing, open from `open` to `finish`.

    header : of the parent as the processing takes it.
    """

    def __init__(self, run: Run, stream: Stream, processing: Processing, recipe: Recipe, header: StreamHeader) -> None:
        self._run, self._stream, self._processing, self._recipe = run, stream, processing, recipe
        self._header = header
        self._streams: dict[str, DerivedStream] = {}
        self._is_hits_opened = False

    def open(self) -> None:
        """``<source>.results@<id>``, one row per frame, and ``<source>.binned@<id>`` where a step bins."""
        headers = {"results": {"kind": "table", "shape": (), "dtype": "", "codec": "raw", "detector": None, "parts": 1}}
        for spec in self._recipe.steps:
            if spec.use == "bin":
                factor = STEPS["bin"].read_params(spec.params)
                headers["binned"] = self._binned_header(factor)
        for name, changes in headers.items():
            self._open_one(name, self._stream.header, changes)

    def send(self, job: ChunkJob, result: ChunkResult) -> None:
        """What came out of one chunk; it is stored when this returns."""
        self._send_results(result)
        self._send_hits(job, result)

    def finish(self, announced: int) -> None:
        """End them; indices below ``announced`` that never came are missing."""
        self._open_hits()  # a run without a chunk has hits, too: none
        for stream in self._streams.values():
            stream.finish(announced)

    def _open_hits(self) -> None:
        """``<source>.hits@<id>``: the frames with a hit, byte for byte as the detector sent them.

        Not before a chunk is sealed: until its first frame has come, a live stream's header may name another codec.
        """
        if not self._recipe.export.hits_stream or self._is_hits_opened:
            return
        self._is_hits_opened = True
        parent = open_run(str(self._run.folder))[self._stream.name].header
        self._open_one("hits", parent, {"leaves_out": _NOT_A_HIT})

    def _open_one(self, name: str, parent: StreamHeader, changes: dict[str, Any]) -> None:
        source = f"{self._stream.name}.{name}@{self._processing.name}"
        base = {
            "data_source": source, "parent": self._stream.name, "processing": self._processing.name,
            "planned": self._header.planned, "series": None, "user_data": {},
        }  # fmt: skip
        header = parent.model_copy(update=base | changes)
        try:
            self._streams[name] = open_derived(self._run, StreamHeader.model_validate(header.model_dump()))
        except (NearlineError, FileExistsError) as error:
            # A processing taken up again after its streams have ended: its tables are complete all the same.
            log.warning("not writing the stream %s: %s", source, error)

    def _binned_header(self, params: BinParams) -> dict[str, Any]:
        slow, fast = self._header.image_shape
        assert self._header.detector is not None
        return {
            "shape": (slow // params.factor, fast // params.factor),
            "dtype": "uint32",
            "codec": "bslz4",
            "parts": 1,
            "detector": binned_header(self._header.detector, params.factor),
        }

    def _send_results(self, result: ChunkResult) -> None:
        if "results" in self._streams:
            rows = [plain_row(row) for row in result.frames.to_pylist()]
            self._streams["results"].send([Row(row.pop("frame_index"), None, row) for row in rows])
        binned = result.table("binned")
        if "binned" in self._streams and binned is not None:
            pairs = zip(binned["frame_index"].to_pylist(), binned["blob"].to_pylist(), strict=True)
            self._streams["binned"].send([Row(index, blob, {}) for index, blob in pairs])

    def _send_hits(self, job: ChunkJob, result: ChunkResult) -> None:
        self._open_hits()
        if "hits" not in self._streams:
            return
        if "hit" not in result.frames.column_names:
            raise BadRecipe(
                "export.hits_stream needs a step that says which frames are hits: add find_peaks, or a step of your "
                "own that makes the column hit"
            )
        hits = set(result.frames.filter(result.frames["hit"])["frame_index"].to_pylist())
        if hits:
            frames = [frame for frame in job.frames() if frame.frame_index in hits]
            parts = [raw for frame in frames for raw in frame.raw_parts]
            self._streams["hits"].send(
                [Row(raw.info.frame_index, memoryview(raw.blob), raw.info.meta, raw.info.part) for raw in parts]
            )


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it: not-a-number becomes nothing."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
