"""A recipe carried out on one chunk: step by step, each output kept under its own digest.

A step's digest covers everything its result depends on: the chunk, header, mask and cell, the
digests of the steps before it, its parameters, the source of its kernel and the versions of the
numeric libraries. So all digests are known before anything is computed (`plan_steps`), an output
that exists is used again, and a resumed or repeated processing computes only what is new.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from tasks import refine_detector, refine_panels
from tasks.chunk_frames import ChunkFrames
from tasks.recipe import Recipe, StepSpec
from tasks.step import Step, source_digest
from tasks.steps import STEPS, BinParams
from tasks.user_steps import user_step

__all__ = ["ChunkResult", "PlannedStep", "code_digest", "plan_steps", "process_chunk"]


@dataclass(frozen=True)
class ChunkResult:
    """What came out of one chunk: the record of it, and all tables by step."""

    manifest: ChunkManifest
    tables: Mapping[str, Tables]

    @property
    def frames(self) -> pa.Table:
        """Per-frame columns of all steps, one row per frame."""
        return join_frames([tables.get("frames") for tables in self.tables.values()])

    def table(self, name: str) -> pa.Table | None:
        """The newest table of that name, or None."""
        found = [tables[name] for tables in self.tables.values() if name in tables]
        return found[-1] if found else None


@dataclass(frozen=True)
class PlannedStep:
    """A step on one chunk before it is carried out: what its result depends on, and the digest of that.

    binning : pixels summed per side in the frames that this step sees.
    """

    spec: StepSpec
    step: Step
    key: dict[str, Any]
    digest: str
    binning: int


def plan_steps(recipe: Recipe, commit: ChunkCommit, header: StreamHeader, mask: np.ndarray) -> list[PlannedStep]:
    """All steps of a recipe on one chunk; no frame is looked at. Parameters as `process_chunk`."""
    base = {
        "chunk": commit.digest,
        "detector": header.detector.model_dump(mode="json") if header.detector else None,
        "frames": [header.dtype, *header.image_shape],
        "mask": array_digest(mask),
    }
    plan: list[PlannedStep] = []
    binning = 1
    for spec in recipe.steps:
        step = _step_of(spec)
        upstream = [one.digest for one in plan]
        key = base | {"binning": binning, "upstream": upstream} | _identity(step, spec, recipe)
        if ":" in spec.use:
            # A step of somebody's own may look at anything that the stream's header says, such as the user's data.
            key["header"] = header.model_dump(mode="json", exclude={"codec", "detector"})
        digest = blake3.blake3(json.dumps(key, sort_keys=True).encode()).hexdigest()
        plan.append(PlannedStep(spec, step, key, digest, binning))
        params = _params(step, spec)
        if isinstance(params, BinParams) and params.feed_next:
            binning = params.factor
    return plan


def process_chunk(
    recipe: Recipe,
    commit: ChunkCommit,
    frames: Callable[[], Sequence[Sequence[RawFrame]]],
    header: StreamHeader,
    mask: np.ndarray,
    run_folder: Path,
    *,
    plan: Sequence[PlannedStep] | None = None,
    n_threads: int = 1,
    steps: Collection[str] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> ChunkResult:
    """Carry out all steps of a recipe on one sealed chunk, as far as their outputs are not there.

    Parameters
    ----------
    commit : of the chunk; its digest identifies the frames.
    frames : gives the parts that came of each frame of the chunk, in index order, one part of an undivided frame;
        called only if a step has to be computed.
    header : of the stream, with the recipe's detector values in place.
    mask : (slow, fast), nonzero = do not use.
    run_folder : where ``steps/`` is.
    plan : as `plan_steps` gives it, if it is known.
    steps : names of the steps to carry out; the others must be there. All of them by default.
    seconds : what steps took that were carried out elsewhere.
    """
    plan = plan_steps(recipe, commit, header, mask) if plan is None else plan
    work = _Work(recipe, plan, StepStore(run_folder), lambda: _chunk(frames(), header, mask, commit, n_threads))
    wanted = [one for one in plan if steps is None or one.spec.name in steps]
    work.look_at_frames([one for one in wanted if one.step.frame_work is not None])
    for planned in wanted:
        work.carry_out(planned)
    elsewhere = seconds or {}
    took = {name: work.seconds.get(name) or elsewhere.get(name, 0.0) for name in (one.spec.name for one in plan)}
    tables = {one.spec.name: work.tables_of(one) for one in plan if steps is None or one.spec.name in steps}
    return ChunkResult(_manifest(commit, plan, tables, took), tables)


@dataclass
class _Work:
    """The steps of one chunk under way; frames are fetched when a step first needs them."""

    recipe: Recipe
    plan: Sequence[PlannedStep]
    store: StepStore
    make_chunk: Callable[[], ChunkFrames]
    seconds: dict[str, float] = field(default_factory=dict)
    _chunk: ChunkFrames | None = None

    def carry_out(self, planned: PlannedStep) -> None:
        """Have the step's output in the store."""
        started = time.perf_counter()
        if self.store.find(planned.digest) is not None:
            self.seconds.setdefault(planned.spec.name, 0.0)
            return
        before = self._before(planned)
        chunk = self._as_seen(planned, before)
        step, spec = planned.step, planned.spec
        self.store.save(
            planned.digest, planned.key, step.run(chunk, _params(step, spec), _cell(step, self.recipe), before)
        )
        self.seconds[spec.name] = time.perf_counter() - started

    def look_at_frames(self, planned: Sequence[PlannedStep]) -> None:
        """Have the outputs in the store of steps that want nothing but frames: each frame is decoded once for all.

        What a step took is its own calls' time over the threads; the first has the decoding.
        """
        missing = [one for one in planned if self.store.find(one.digest) is None]
        if len(missing) < 2:
            return
        seen = [self._as_seen(one, {}) for one in missing]
        works = [
            one.step.frame_work(chunk, _params(one.step, one.spec))
            for one, chunk in zip(missing, seen, strict=True)
            if one.step.frame_work is not None
        ]
        results = seen[0].map(lambda position: [_timed(work.each, position) for work in works])
        for number, (one, work) in enumerate(zip(missing, works, strict=True)):
            started = time.perf_counter()
            self.store.save(one.digest, one.key, work.gather([made[number][0] for made in results]))
            in_threads = sum(made[number][1] for made in results) / max(1, min(seen[0].n_threads, len(results)))
            self.seconds[one.spec.name] = in_threads + time.perf_counter() - started

    def tables_of(self, planned: PlannedStep) -> Tables:
        """What a step has made; it is made first if it is not there any more."""
        found = self.store.find(planned.digest)
        if found is None:
            self.carry_out(planned)
            found = self.store.find(planned.digest)
        assert found is not None, "a step's output is there once it has been saved"
        return found

    def _as_seen(self, planned: PlannedStep, before: Mapping[str, Tables]) -> ChunkFrames:
        use_compiled_kernels()
        if self._chunk is None:
            self._chunk = self.make_chunk()
        return _as_seen(self._chunk, planned.binning, before)

    def _before(self, planned: PlannedStep) -> dict[str, Tables]:
        earlier = self.plan[: self.plan.index(planned)]
        return {one.spec.name: self.tables_of(one) for one in earlier}


def _timed(work: Callable[[int], Any], position: int) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(position), time.perf_counter() - started


def code_digest(recipe: Recipe) -> str:
    """blake3 over the code of all steps of a recipe, hex: an interrupted processing goes on only with the same."""
    identities = [_step_of(spec).identity for spec in recipe.steps]
    if recipe.refine_detector is not None:
        identities.append({"source": source_digest(refine_detector, refine_panels)})
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


def _chunk(
    frames: Sequence[Sequence[RawFrame]], header: StreamHeader, mask: np.ndarray, commit: ChunkCommit, n_threads: int
) -> ChunkFrames:
    first, more = [parts[0] for parts in frames], [parts[1:] for parts in frames]
    return ChunkFrames(first, header, mask, commit.digest, more_parts=more, n_threads=n_threads)


def _as_seen(chunk: ChunkFrames, binning: int, before: Mapping[str, Tables]) -> ChunkFrames:
    """The chunk as a step sees it, behind those before it."""
    columns: dict[str, np.ndarray] = {}
    for tables in before.values():
        frames = tables.get("frames")
        if frames is not None:
            columns |= {n: frames[n].to_numpy(zero_copy_only=False) for n in frames.column_names if n != "frame_index"}
    return replace(chunk, binning=binning, columns=columns)


def _manifest(
    commit: ChunkCommit, plan: Sequence[PlannedStep], tables: Mapping[str, Tables], seconds: dict[str, float]
) -> ChunkManifest:
    frames = join_frames([t.get("frames") for t in tables.values()])

    def count(name: str) -> int:
        return int(np.count_nonzero(frames[name].to_numpy(zero_copy_only=False))) if name in frames.column_names else 0

    return ChunkManifest(
        chunk=commit.chunk,
        start=commit.start,
        stop=commit.stop,
        chunk_digest=commit.digest,
        steps={one.spec.name: one.digest for one in plan},
        n_frames=commit.n_frames,
        n_hits=count("hit"),
        n_indexed=count("indexed"),
        seconds=seconds,
    )
