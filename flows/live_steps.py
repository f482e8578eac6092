"""A recipe on each frame as it is stored, its results in a stream: for decisions within a second.

`run_processing` works on sealed chunks, some seconds each, and keeps what it makes. This follows the
frames themselves, as a member of a consumer group, keeps nothing but the rows of the derived table
stream, and is done with a frame some milliseconds after it was stored. The same recipe, processed
afterwards, gives the same columns.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from flows.derived_streams import plain_row
from storage.errors import BadRecipe, GroupNeedsService, IndexConflict, StreamNotFound
from storage.models import StreamHeader
from storage.names import check_name
from storage.step_store import Tables, join_frames
from streaming.derived import DerivedStream, Row, open_derived
from streaming.retrieval import Frame, Run, Stream
from tasks.chunk_frames import ChunkFrames
from tasks.chunk_job import analysis_header, analysis_mask
from tasks.process_chunk import code_digest
from tasks.recipe import Recipe, StepSpec
from tasks.steps import STEPS, BinParams
from tasks.user_steps import user_step

__all__ = ["Decide", "process_live", "run_steps", "wait_for_stream"]

log = logging.getLogger("nearline.live")

Decide = Callable[[Frame, dict[str, Any]], Mapping[str, Any] | None]
# A member that died gives its frame back after so long.
_LEASE_S = 5.0


def process_live(
    run: Run,
    stream: Stream,
    recipe: Recipe,
    *,
    name: str = "live",
    decide: Decide | None = None,
    timeout: float | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Carry out a recipe on each frame as it is stored; rows go into ``<source>.results@<name>``. Ends with the stream.

    Several processes with the same ``name`` share the frames, as long as none decides. One that died is
    followed by another with the same name, which goes on where it was.

    Parameters
    ----------
    decide : called with each frame and its columns, in order; what it returns is added to the row. After a
        restart it is first called for the rows there are, whose decisions stand.
    timeout : end after so many seconds without a new frame; None waits for ever.
    stop : set by another thread to end the loop.

    Returns
    -------
    ``stream``, and how many ``frames`` were done here, ``failed`` ones among them: a step that raises gives
    a row with its ``error``, and no decision.

    Raises
    ------
    GroupNeedsService : the run is a bare folder.
    StreamNotOpen, ProtocolError : it was processed live under this name already, and has ended.
    """
    if run.service_address is None:
        raise GroupNeedsService(f"{run.name} is a bare folder: nothing comes any more; use nearline.process")
    if recipe.refine_detector is not None:
        log.warning("frame by frame the detector stays where the recipe has it; nearline.process refines it")
    work = _Live(run, stream, recipe, check_name(name, "processing"), decide)
    return work.carry_out(timeout, stop)


def wait_for_stream(run: Run, data_source: str | None, wait_s: float) -> Stream:
    """A data source, by default the one detector, once it has begun; StreamNotFound if it does not in time."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return run[data_source] if data_source else run.detector
        except StreamNotFound:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


class _Live:
    """One member of the group: frame in, row out."""

    def __init__(self, run: Run, stream: Stream, recipe: Recipe, name: str, decide: Decide | None) -> None:
        self._run, self._stream, self._recipe, self._decide = run, stream, recipe, decide
        self._group, self._target = f"process-{name}", f"{stream.name}.results@{name}"
        self._header, self._mask = analysis_header(stream, recipe), analysis_mask(stream, recipe)
        self._name = name

    def carry_out(self, timeout: float | None, stop: threading.Event | None) -> dict[str, Any]:
        if self._decide is not None and self._target in self._run:
            self._recall(self._run[self._target])
        derived = open_derived(self._run, self._result_header(), producer=self._target)
        n_frames = n_failed = 0
        for frame in self._stream.follow(group=self._group, timeout=timeout, lease_s=_LEASE_S, stop=stop):
            if frame.delivery > 1 and self._has_row(frame.frame_index):
                continue  # whoever had it before died, or was slow, after it had sent the row
            row = self._row_of(frame)
            n_frames, n_failed = n_frames + 1, n_failed + ("error" in row)
            _send(derived, frame.frame_index, row)
        status = self._stream.status
        if status.is_terminal:
            derived.finish(status.announced)
        return {"stream": self._target, "frames": n_frames, "failed": n_failed}

    def _row_of(self, frame: Frame) -> dict[str, Any]:
        try:
            row = plain_row(run_steps(self._recipe, self._chunk_of(frame)))
        except BadRecipe as error:
            log.warning("frame %d of %s: %s", frame.frame_index, self._stream.name, error)
            return {"error": str(error)}
        return row | dict((self._decide(frame, row) if self._decide else None) or {})

    def _chunk_of(self, frame: Frame) -> ChunkFrames:
        first, *more = frame.raw_parts
        digest = frame.info.digest.hex()
        return ChunkFrames([first], self._header, self._mask, digest, more_parts=[more], n_threads=1)

    def _recall(self, results: Stream) -> None:
        """Have the decider see again what it has decided on."""
        assert self._decide is not None
        rows = {row.frame_index: row.meta for row in results}
        for frame in self._stream.frames_at(np.array(sorted(rows), np.int64)):
            if "error" not in rows[frame.frame_index]:
                self._decide(frame, rows[frame.frame_index])

    def _has_row(self, frame_index: int) -> bool:
        return any(True for _ in self._run[self._target].frames_at(np.array([frame_index])))

    def _result_header(self) -> StreamHeader:
        provenance = {"recipe": self._recipe.model_dump(mode="json"), "recipe_digest": self._recipe.digest}
        changes = {
            "kind": "table", "shape": (), "dtype": "", "codec": "raw", "detector": None, "series": None, "parts": 1,
            "data_source": self._target, "parent": self._stream.name, "processing": self._name,
            "user_data": provenance | {"code_digest": code_digest(self._recipe)},
        }  # fmt: skip
        header = self._stream.header.model_copy(update=changes)
        return StreamHeader.model_validate(header.model_dump())


def run_steps(recipe: Recipe, chunk: ChunkFrames) -> dict[str, Any]:
    """The columns of the one frame in a chunk after all steps; nothing is kept."""
    tables: dict[str, Tables] = {}
    cell = recipe.sample.unit_cell if recipe.sample is not None else None
    for spec in recipe.steps:
        step, params = _prepared(spec)
        made = tables[spec.name] = step.run(chunk, params, cell, tables)
        frames = made["frames"]
        columns = {n: frames[n].to_numpy(zero_copy_only=False) for n in frames.column_names if n != "frame_index"}
        chunk = replace(chunk, columns=chunk.columns | columns)
        if isinstance(params, BinParams) and params.feed_next:
            chunk = replace(chunk, binning=params.factor)
    row: dict[str, Any] = join_frames([made.get("frames") for made in tables.values()]).to_pylist()[0]
    row.pop("frame_index")
    return row


def _prepared(spec: StepSpec) -> tuple[Any, Any]:
    if ":" in spec.use:
        return user_step(spec.use), dict(spec.params)
    return STEPS[spec.use], STEPS[spec.use].read_params(spec.params)


def _send(derived: DerivedStream, frame_index: int, row: dict[str, Any]) -> None:
    try:
        derived.send([Row(frame_index, None, row)])
    except IndexConflict as error:
        log.warning("%s", error)
