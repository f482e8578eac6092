"""The analysis of one chunk as something that travels: references and parameters, never frames.

Whoever carries it out, a thread here or a Dask worker on another host, opens the run's folder, reads the sealed
chunk, and leaves the outputs of the steps in the folder's step store. So where a chunk is analysed cannot change what
comes out.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

from storage.frame import RawFrame
from storage.models import StreamHeader
from storage.run_folder import ChunkCommit, StreamPaths
from storage.step_store import StepStore
from streaming.retrieval import Frame, Stream, open_run
from tasks.chunk_frames import usable_mask
from tasks.process_chunk import ChunkResult, PlannedStep, plan_steps, process_chunk
from tasks.recipe import Recipe, read_mask

__all__ = ["ChunkJob", "StepGroup", "analysis_header", "analysis_mask"]

# Chunks whose frames stay in memory for whoever needs them next: the steps after, exports, pictures.
_KEEP_CHUNKS = 3
_frames: OrderedDict[tuple[str, str, int, str], list[Frame]] = OrderedDict()
_frames_lock = threading.Lock()


@dataclass(frozen=True)
class StepGroup:
    """Neighbouring steps of a recipe that are carried out, retried and shown as one."""

    name: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class ChunkJob:
    """A recipe to be carried out on one sealed chunk.

    folder : of the run, as every worker sees it. n_threads : over the frames of the chunk. geometry : number of the
        geometry snapshot whose detector values the recipe has.
    """

    folder: str
    data_source: str
    recipe: Recipe
    commit: ChunkCommit
    n_threads: int = 1
    geometry: int = 0

    @property
    def groups(self) -> list[StepGroup]:
        """The recipe's steps in groups, in order."""
        grouped = groupby(self.recipe.steps, lambda step: step.group_name)
        return [StepGroup(name, tuple(step.name for step in steps)) for name, steps in grouped]

    def is_done(self, group: StepGroup) -> bool:
        """Whether all outputs of a group are there already."""
        store = StepStore(Path(self.folder))
        return all(store.find(one.digest) is not None for one in self.plan() if one.spec.name in group.steps)

    def digests(self, group: StepGroup) -> dict[str, str]:
        """Under which digest each step of a group keeps its output."""
        return {one.spec.name: one.digest for one in self.plan() if one.spec.name in group.steps}

    def carry_out(self, group: StepGroup) -> dict[str, float]:
        """Have the outputs of a group in the store: s that each step took, 0 for one that was there."""
        names = set(group.steps)
        seconds = self._process(names, {}).manifest.seconds
        return {name: seconds[name] for name in group.steps}

    def carry_out_all(self) -> dict[str, float]:
        """All groups, one after the other."""
        return {name: s for group in self.groups for name, s in self.carry_out(group).items()}

    def result(self, seconds: Mapping[str, float]) -> ChunkResult:
        """What came out; ``seconds`` as `carry_out` has given them."""
        result = self._process(None, seconds)
        return replace(result, manifest=result.manifest.model_copy(update={"geometry": self.geometry}))

    def plan(self) -> list[PlannedStep]:
        """Its steps with their digests; made once in a process, though each group of steps asks for it."""
        return _plan_of(*_whose(self), self.recipe.digest, self.commit.digest, _Unhashed(self))

    def frames(self) -> list[Frame]:
        """The chunk's frames, in index order; kept for a while."""
        key = (self.folder, self.data_source, self.commit.chunk, self.commit.digest)
        with _frames_lock:
            if key in _frames:
                return _frames[key]
        stream = _stream_of(self.folder, self.data_source)
        found = list(stream[self.commit.start : self.commit.stop])
        with _frames_lock:
            _frames[key] = found
            while len(_frames) > _KEEP_CHUNKS:
                _frames.popitem(last=False)
        return found

    def _raw_frames(self) -> list[list[RawFrame]]:
        return [frame.raw_parts for frame in self.frames()]

    def _process(self, names: set[str] | None, seconds: Mapping[str, float]) -> ChunkResult:
        header, mask = self._view()
        return process_chunk(
            self.recipe,
            self.commit,
            self._raw_frames,
            header,
            mask,
            Path(self.folder),
            plan=self.plan(),
            n_threads=self.n_threads,
            steps=names,
            seconds=seconds,
        )

    def _view(self) -> tuple[StreamHeader, np.ndarray]:
        return _view_of(*_whose(self), self.recipe.digest, _Unhashed(self))


def analysis_header(stream: Stream, recipe: Recipe) -> StreamHeader:
    """The stream's header with the recipe's detector values in place."""
    header = stream.header
    return header.model_copy(update={"detector": recipe.detector_header(header.detector)})


def analysis_mask(stream: Stream, recipe: Recipe) -> np.ndarray:
    """(slow, fast) uint8, nonzero = do not use: the detector's bad pixels and the recipe's."""
    shape = stream.header.image_shape
    user_mask = recipe.mask_of(shape, read_mask(Path(recipe.mask)) if recipe.mask else None)
    return usable_mask(stream.pixel_mask, shape, user_mask)


class _Unhashed:
    """A job beside the digests that tell it from others in a cache's key."""

    def __init__(self, job: ChunkJob) -> None:
        self.job = job

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)

    def __hash__(self) -> int:
        return 0


# The file of a stream's header, as it is now.
_Written = tuple[int, int] | None


def _whose(job: ChunkJob) -> tuple[str, str, _Written]:
    """Tells a run from another that has taken its place under a worker that lives for days."""
    try:
        found = StreamPaths(Path(job.folder), job.data_source).header.stat()
    except OSError:  # not on a disk of this machine
        return job.folder, job.data_source, None
    return job.folder, job.data_source, (found.st_ino, found.st_mtime_ns)


@lru_cache(maxsize=8)
def _view_of(
    folder: str, data_source: str, written: _Written, recipe_digest: str, key: _Unhashed
) -> tuple[StreamHeader, np.ndarray]:
    stream, recipe = _stream_of(folder, data_source), key.job.recipe
    return analysis_header(stream, recipe), analysis_mask(stream, recipe)


@lru_cache(maxsize=16)
def _plan_of(
    folder: str, data_source: str, written: _Written, recipe_digest: str, chunk_digest: str, key: _Unhashed
) -> list[PlannedStep]:
    job = key.job
    return plan_steps(job.recipe, job.commit, *job._view())


def _stream_of(folder: str, data_source: str) -> Stream:
    return open_run(folder)[data_source]
