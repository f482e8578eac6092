"""Doing again exactly what led to a result, and saying what differs and why: `nearline explain --replay`."""

import tempfile
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from flows.explaining import Explanation, chunk_of, key_of, rows_of
from flows.record_provenance import modules_of
from flows.run_tally import detector_values
from storage.agents import environment_changes, read_environment
from storage.errors import CorruptFrame, FrameMissing, NearlineError, RunNotFound
from storage.frame import RawFrame, chunk_digest, has_digest
from storage.masks import array_digest, plane_of_frames
from storage.models import DetectorHeader, Record, StreamHeader
from storage.run_folder import RunFolder
from storage.step_store import ChunkManifest, Processing, StepStore, Tables
from storage.stream_source import FolderSource
from storage.table_digest import table_digest
from streaming.retrieval import Run
from tasks.chunk_frames import usable_mask
from tasks.process_chunk import process_chunk
from tasks.recipe import Recipe, StepSpec, load_recipe, read_mask

__all__ = ["Difference", "Replay", "TableCheck", "replay"]

_SHOWN_COLUMNS = 5


class Difference(Record):
    """One thing that is not as it was when the result was made."""

    kind: Literal["bytes", "parameter", "code", "library", "header", "mask", "sample", "upstream", "table"]
    what: str = Field(description="in words, naming the thing")


class TableCheck(Record):
    """The rows in question of one table: as they are kept, and as they came out now."""

    step: str
    table: str
    n_rows: int
    recorded: str = Field(description="digest of the rows")
    replayed: str = Field("", description="digest of the rows; empty if there are none now")
    columns: list[str] = Field(default_factory=list, description="columns that differ, with the values of one row")

    @property
    def is_identical(self) -> bool:
        return self.recorded == self.replayed


class Replay(Record):
    """What came of it."""

    is_identical: bool
    tables: list[TableCheck] = Field(default_factory=list)
    differences: list[Difference] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list, description="what has changed, but is in no step's digest")


def replay(run: Run, explanation: Explanation, *, recipe: Recipe | None = None, n_threads: int = 1) -> Replay:
    """Compute again what an explanation tells of, with nothing reused, and compare.

    Parameters
    ----------
    recipe : use its parameters instead of the recorded ones, to see what they change.

    Raises
    ------
    RunNotFound : the result is of no processing, or its folder is not visible here.
    FrameMissing : the frame is not there any more.
    """
    folder = run.visible_folder
    if folder is None or not explanation.steps:
        raise RunNotFound(
            f"frame {explanation.frame} of {run.name} has no result to replay; `nearline process` makes one"
        )
    if not explanation.bytes:
        raise FrameMissing(f"{explanation.why}; without its bytes it cannot be replayed")
    return _Replay(folder, explanation, recipe, n_threads).carry_out()


class _Replay:
    """One replay: what was recorded, what is there now, and what they disagree about."""

    def __init__(self, folder: RunFolder, explanation: Explanation, recipe: Recipe | None, n_threads: int) -> None:
        self._folder, self._asked, self._n_threads = folder, explanation, n_threads
        self._processing = Processing(folder.path, explanation.processing["processing"])
        chunk = chunk_of(self._processing, explanation.frame)
        assert chunk is not None
        self._chunk: ChunkManifest = chunk
        self._source = FolderSource(folder, explanation.data_source)
        self._store = StepStore(folder.path)
        self._records = {step.name: self._store.record(step.digest) or {} for step in explanation.steps}
        self._differences: list[Difference] = []
        self._recipe = self._recorded_recipe(recipe)

    def carry_out(self) -> Replay:
        frames = self._frames()
        if self._recipe is None or self._asked.frame not in {parts[0].info.frame_index for parts in frames}:
            return Replay(is_identical=False, differences=self._differences, notes=self._notes())
        with tempfile.TemporaryDirectory(prefix="nearline-replay-") as scratch:
            try:
                done = process_chunk(
                    self._recipe,
                    self._source.commits[self._chunk.chunk],
                    lambda: frames,
                    self._header(),
                    self._mask(),
                    Path(scratch),
                    n_threads=self._n_threads,
                )
            except NearlineError as error:
                self._differ("code", f"it cannot be computed any more: {error}")
                return Replay(is_identical=False, differences=self._differences, notes=self._notes())
            again = StepStore(Path(scratch))
            for step, digest in done.manifest.steps.items():
                self._compare_keys(step, key_of(self._records[step]), key_of(again.record(digest) or {}))
            checks = [check for step in done.tables for check in self._compare_tables(step, done.tables[step])]
        is_identical = bool(checks) and all(check.is_identical for check in checks)
        return Replay(is_identical=is_identical, tables=checks, differences=self._differences, notes=self._notes())

    def _differ(self, kind: Any, what: str) -> None:
        difference = Difference(kind=kind, what=what)
        if difference not in self._differences:
            self._differences.append(difference)

    # ---- what goes in -------------------------------------------------------------------------

    def _recorded_recipe(self, instead: Recipe | None) -> Recipe | None:
        """The chain with the parameters its outputs name, defaults of that time included."""
        manifest, content = self._processing.manifest, dict(self._processing.manifest.recipe)
        specs = []
        for step in self._asked.steps:
            chosen = next((s for s in instead.steps if s.name == step.name), None) if instead else None
            if instead is not None and chosen is None:
                self._differ("parameter", f"the recipe has no step {step.name!r}")
                return None
            specs.append(chosen or StepSpec(use=step.use, name=step.name, params=step.params))
        try:
            used = detector_values(self._processing, self._chunk.geometry)
            if instead is not None:
                is_same = instead.detector == detector_values(self._processing, 0)
                detector = used if is_same else instead.detector
                return instead.model_copy(update={"steps": tuple(specs), "detector": detector})
            # A mask file is looked at in `_mask`; it need not be there for the recipe to be read.
            content |= {"steps": [s.model_dump() for s in specs], "mask": None, "mask_digest": None, "detector": used}
            self._check_manifest(load_recipe(dict(manifest.recipe) | {"mask": None}), manifest.recipe_digest)
            return load_recipe(content)
        except (NearlineError, ValueError) as error:
            self._differ("code", f"the recorded recipe cannot be carried out here: {error}")
            return None

    def _check_manifest(self, recipe: Recipe, recorded: str) -> None:
        given = {s.name: s.params for s in recipe.steps}
        for step in self._asked.steps:
            for name, value in given.get(step.name, {}).items():
                if name in step.params and not _same(step.params[name], value):
                    then = step.params[name]
                    self._differ(
                        "parameter",
                        f"{step.name}.{name} was {then} when the result was made, the manifest's recipe says {value}",
                    )
        if recipe.digest != recorded:
            self._differ("parameter", f"the recipe in {self._processing.folder / 'manifest.json'} has been changed")

    def _frames(self) -> list[list[RawFrame]]:
        """The frames of the chunk, each its parts, whose bytes are those that were received; the others are named."""
        good: list[list[RawFrame]] = []
        slots, parts = {}, self._source.header.parts
        for info in self._source.infos(self._chunk.start, self._chunk.stop):
            if not info.late:
                slots[info.frame_index * parts + info.part] = info
        for index in sorted({info.frame_index for info in slots.values()}):
            try:
                found = self._source.read_parts(index)
            except (CorruptFrame, OSError) as error:
                self._differ("bytes", str(error))
                continue
            wrong = [raw for raw in found if not has_digest(raw.blob, raw.info.digest)]
            for raw in wrong:
                self._differ("bytes", f"frame {index}: its digest is not {raw.info.digest.hex()}, the one received")
            if not wrong:
                good.append(found)
        digest = chunk_digest(slots)
        if digest != self._chunk.chunk_digest:
            was = self._chunk.chunk_digest
            self._differ("bytes", f"chunk {self._chunk.chunk} has digest {digest} by its frame table, was {was}")
        return good

    def _header(self) -> StreamHeader:
        """The stream's header with the detector values that were used."""
        detector = self._asked.detector
        now = self._detector_now()
        for name in sorted(detector):
            if now.get(name) != detector[name]:
                self._differ("header", f"{name} was {detector[name]}, the stream's header now gives {now.get(name)}")
        return self._source.header.model_copy(update={"detector": DetectorHeader.model_validate(detector)})

    def _detector_now(self) -> dict[str, Any]:
        """The detector values that the stream's header and the recorded recipe give today."""
        recipe = self._recipe
        assert recipe is not None
        return recipe.detector_header(self._source.header.detector).model_dump(mode="json")

    def _mask(self) -> Any:
        path = self._processing.manifest.recipe.get("mask")
        user = None
        try:
            user = read_mask(Path(path)) if path else None
        except NearlineError as error:
            self._differ("mask", str(error))
        assert self._recipe is not None
        header = self._source.header
        shape = header.image_shape
        user = self._recipe.mask_of(shape, user)
        mask = usable_mask(plane_of_frames(self._source.plane("pixel_mask"), header), shape, user)
        if array_digest(mask) != self._asked.mask:
            which = f"the detector's, or the recipe's {path}" if path else "the detector's pixel_mask"
            self._differ("mask", f"the mask ({which}) has digest {array_digest(mask)}, was {self._asked.mask}")
        return mask

    # ---- what comes out -----------------------------------------------------------------------

    def _compare_keys(self, step: str, then: dict[str, Any], now: dict[str, Any]) -> None:
        for name in sorted(then.get("params", {}).keys() | now.get("params", {}).keys()):
            before, after = (k.get("params", {}).get(name) for k in (then, now))
            if not _same(before, after):
                self._differ("parameter", f"{step}.{name} was {before}, is {after}")
        if then.get("cell") != now.get("cell"):
            self._differ("sample", f"the cell of {step} was {then.get('cell')}, is {now.get('cell')}")
        for name in sorted(then.get("code", {}).keys() | now.get("code", {}).keys()):
            before, after = (k.get("code", {}).get(name) for k in (then, now))
            if before == after:
                continue
            if name == "source":
                self._differ("code", f"the code of {step} is another: {self._changed_modules(step)}")
            else:
                self._differ("library", f"{name} was {before}, is {after}")

    def _changed_modules(self, step: str) -> str:
        assert self._recipe is not None
        now = modules_of(self._recipe)[step]
        then = next(s.modules for s in self._asked.steps if s.name == step)
        if not then:
            return f"one of {', '.join(now)}; which one was not recorded"
        changed = [name for name in now if then.get(name) != now[name]]
        return ", ".join(f"module {name}" for name in changed) or "the order of its modules"

    def _compare_tables(self, step: str, tables: Tables) -> list[TableCheck]:
        asked = self._asked
        digest = next(s.digest for s in asked.steps if s.name == step)
        kept = {name: self._store.read(digest, name) for name in self._records[step].get("tables", tables)}
        checks = []
        for name, table in kept.items():
            if table is None:
                self._differ("table", f"table {name} of step {step} is gone")
                continue
            was = self._records[step].get("content", {}).get(name)
            if was and table_digest(table) != was:
                self._differ("table", f"table {name} of step {step} was changed after it was written")
            if not self._is_asked(step, name):
                continue
            recorded = rows_of(table, *self._question(name))
            replayed = rows_of(tables[name], *self._question(name)) if name in tables else recorded.slice(0, 0)
            checks.append(_check(step, name, recorded, replayed))
        return checks

    def _is_asked(self, step: str, table: str) -> bool:
        """For a peak or reflection its own table; for a frame all tables."""
        if self._asked.peak is None and self._asked.reflection is None:
            return True
        wanted = "peaks" if self._asked.peak is not None else "reflections"
        return table == wanted and step == self._asked.steps[-1].name

    def _question(self, table: str) -> tuple[int, int | None, tuple[int, int, int] | None]:
        asked = self._asked
        is_its = {"peaks": asked.peak, "reflections": asked.reflection}.get(table) is not None
        return (asked.frame, asked.peak, asked.reflection) if is_its else (asked.frame, None, None)

    def _notes(self) -> list[str]:
        made = self._asked.steps[-1].made
        then = read_environment(self._folder.path, str(made.get("environment", "")))
        changes = environment_changes(then) if then else {}
        return [f"{name} was {a or 'not there'}, is {b or 'not there'}" for name, (a, b) in changes.items()]


def _check(step: str, table: str, recorded: pa.Table, replayed: pa.Table) -> TableCheck:
    columns = []
    for name in recorded.column_names:
        if name not in replayed.column_names:
            columns.append(f"{name} is gone")
        elif table_digest(recorded.select([name])) != table_digest(replayed.select([name])):
            columns.append(_first_difference(name, recorded[name].to_pylist(), replayed[name].to_pylist()))
    return TableCheck(
        step=step,
        table=table,
        n_rows=len(recorded),
        recorded=table_digest(recorded),
        replayed=table_digest(replayed),
        columns=columns[:_SHOWN_COLUMNS],
    )


def _first_difference(name: str, then: list[Any], now: list[Any]) -> str:
    if len(then) != len(now):
        return f"{name}: {len(then)} rows were {len(now)} this time"
    row, before, after = next((i, a, b) for i, (a, b) in enumerate(zip(then, now, strict=True)) if not _same(a, b))
    return f"{name} of row {row}: was {str(before)[:60]}, is {str(after)[:60]}"


def _same(one: Any, other: Any) -> bool:
    one, other = (list(v) if isinstance(v, tuple) else v for v in (one, other))
    return bool(one == other or (one != one and other != other))
