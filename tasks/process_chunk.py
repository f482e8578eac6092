"""A recipe carried out on one chunk: step by step, each output kept under its own digest.

A step's digest covers everything its result depends on: the chunk, header, mask and cell, the
digests of the steps before it, its parameters, the source of its kernel and the versions of the
numeric libraries. An output that exists is used again, so a resumed or repeated processing
computes only what is new.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pyarrow as pa

from storage.frame import RawFrame
from storage.kernels import use_compiled_kernels
from storage.masks import array_digest
from storage.models import StreamHeader
from storage.run_folder import ChunkCommit
from storage.step_store import ChunkManifest, StepStore, Tables, join_frames
from tasks.chunk_frames import ChunkFrames
from tasks.recipe import Recipe, StepSpec
from tasks.steps import STEPS, BinParams, Step, user_step

__all__ = ["ChunkResult", "code_digest", "process_chunk"]


@dataclass(frozen=True)
class ChunkResult:
    """What came out of one chunk: the record of it, and all tables by step."""

    manifest: ChunkManifest
    tables: dict[str, Tables]

    @property
    def frames(self) -> pa.Table:
        """Per-frame columns of all steps, one row per frame."""
        return join_frames([tables.get("frames") for tables in self.tables.values()])

    def table(self, name: str) -> pa.Table | None:
        """The newest table of that name, or None."""
        found = [tables[name] for tables in self.tables.values() if name in tables]
        return found[-1] if found else None


def process_chunk(
    recipe: Recipe,
    commit: ChunkCommit,
    frames: list[RawFrame],
    header: StreamHeader,
    mask: np.ndarray,
    run_folder: Path,
    *,
    n_threads: int = 1,
) -> ChunkResult:
    """Carry out all steps of a recipe on one sealed chunk.

    Parameters
    ----------
    commit : of the chunk; its digest identifies the frames.
    frames : of the chunk, in index order.
    header : of the stream, with the recipe's detector values in place.
    mask : (slow, fast), nonzero = do not use.
    run_folder : where ``steps/`` is.
    """
    use_compiled_kernels()
    store = StepStore(run_folder)
    chunk = ChunkFrames(frames, header, mask, commit.digest, n_threads=n_threads)
    base = {
        "chunk": commit.digest,
        "detector": header.detector.model_dump(mode="json") if header.detector else None,
        "frames": [header.dtype, *header.shape],
        "mask": array_digest(mask),
    }
    digests: dict[str, str] = {}
    seconds: dict[str, float] = {}
    tables: dict[str, Tables] = {}
    for spec in recipe.steps:
        step = _step_of(spec)
        key = base | {"binning": chunk.binning, "upstream": list(digests.values())} | _identity(step, spec, recipe)
        digest = blake3.blake3(json.dumps(key, sort_keys=True).encode()).hexdigest()
        found, started = store.load(digest), time.perf_counter()
        if found is None:
            found = step.run(chunk, _params(step, spec), _cell(step, recipe), tables)
            store.save(digest, key, found)
            seconds[spec.name] = time.perf_counter() - started
        else:
            seconds[spec.name] = 0.0
        digests[spec.name], tables[spec.name] = digest, found
        chunk = _with_results(chunk, spec, step, tables)
    return ChunkResult(_manifest(commit, digests, tables, len(frames), seconds), tables)


def code_digest(recipe: Recipe) -> str:
    """blake3 over the code of all steps of a recipe, hex: an interrupted processing goes on only with the same."""
    identities = [_step_of(spec).identity for spec in recipe.steps]
    return blake3.blake3(json.dumps(identities, sort_keys=True).encode()).hexdigest()


def _step_of(spec: StepSpec) -> Step:
    return user_step(spec.use) if ":" in spec.use else STEPS[spec.use]


def _params(step: Step, spec: StepSpec) -> Any:
    return dict(spec.params) if step.params is dict else step.read_params(spec.params)


def _cell(step: Step, recipe: Recipe) -> Any:
    return recipe.sample.unit_cell if recipe.sample is not None else None


def _identity(step: Step, spec: StepSpec, recipe: Recipe) -> dict[str, Any]:
    """What the step is, apart from its input."""
    params = spec.params if step.params is dict else vars(step.read_params(spec.params))
    cell = [*recipe.sample.cell, recipe.sample.space_group] if recipe.sample and step.needs_cell else None
    return {"use": spec.use, "params": json.loads(json.dumps(params, default=str)), "cell": cell, "code": step.identity}


def _with_results(chunk: ChunkFrames, spec: StepSpec, step: Step, tables: dict[str, Tables]) -> ChunkFrames:
    """The chunk as the next step sees it."""
    frames = tables[spec.name].get("frames")
    columns = dict(chunk.columns)
    if frames is not None:
        columns |= {n: frames[n].to_numpy(zero_copy_only=False) for n in frames.column_names if n != "frame_index"}
    params = _params(step, spec)
    if isinstance(params, BinParams) and params.feed_next:
        return replace(chunk, columns=columns, binning=params.factor)
    return replace(chunk, columns=columns)


def _manifest(
    commit: ChunkCommit, digests: dict[str, str], tables: dict[str, Tables], n_frames: int, seconds: dict[str, float]
) -> ChunkManifest:
    frames = join_frames([t.get("frames") for t in tables.values()])

    def count(name: str) -> int:
        return int(np.count_nonzero(frames[name].to_numpy(zero_copy_only=False))) if name in frames.column_names else 0

    return ChunkManifest(
        chunk=commit.chunk,
        start=commit.start,
        stop=commit.stop,
        chunk_digest=commit.digest,
        steps=digests,
        n_frames=n_frames,
        n_hits=count("hit"),
        n_indexed=count("indexed"),
        seconds=seconds,
    )
