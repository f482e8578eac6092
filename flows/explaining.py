"""From a result back to bytes, parameters and code: what `nearline explain` shows."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from storage.errors import BadQuery, CorruptFrame, FrameMissing, NearlineError, RunNotFound
from storage.frame import FrameInfo, has_digest
from storage.models import Record
from storage.provenance import provenance_of
from storage.run_folder import ChunkCommit, RunFolder, parse_file
from storage.shard import ShardReader
from storage.states import READABLE, FrameState
from storage.step_store import ChunkManifest, Processing, StepStore
from storage.stream_source import FolderSource
from storage.veto import veto_of
from streaming.retrieval import Run

__all__ = ["WITNESSES", "Explanation", "FrameBytes", "StepFacts", "Witness", "chunk_of", "explain", "key_of", "rows_of"]

_NOT_KEY = ("tables", "content", "made")


class FrameBytes(Record):
    """Where the bytes of a frame (or of one part of it) are, and whether they are those that were received."""

    part: int = 0
    file: str = Field("", description="shard or journal, relative to the run folder; empty where it is not on a disk")
    offset: int | None = None
    length: int = 0
    crc32c: str = ""
    digest: str = Field("", description="XXH3 (128 bits), or blake3 in runs of earlier versions, hex")
    is_verified: bool = Field(False, description="read now, and both checksums agree")
    problem: str = ""


class StepFacts(Record):
    """One step of the chain that led to the result."""

    name: str
    digest: str
    use: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    code: dict[str, str] = Field(default_factory=dict, description="source digest and library versions")
    modules: dict[str, str] = Field(default_factory=dict, description="source digest of each module, if recorded")
    made: dict[str, Any] = Field(default_factory=dict, description="when, by which program, where, by whom")
    content: dict[str, str] = Field(default_factory=dict, description="digest of each table, if recorded")


class Explanation(Record):
    """The way back from one frame, peak or reflection."""

    run: str
    data_source: str
    frame: int
    peak: int | None = None
    reflection: tuple[int, int, int] | None = None
    state: str
    why: str = Field("", description="of a frame that is not there: what happened, when, why")
    values: dict[str, Any] = Field(default_factory=dict, description="of the peak or reflection, or of the frame")
    received: dict[str, Any] = Field(default_factory=dict)
    bytes: list[FrameBytes] = Field(default_factory=list)
    chunk: dict[str, Any] = Field(default_factory=dict)
    steps: list[StepFacts] = Field(default_factory=list)
    detector: dict[str, Any] = Field(default_factory=dict, description="header values that the steps used")
    geometry: dict[str, Any] = Field(
        default_factory=dict, description="the geometry snapshot that gave those values, where it is not the recipe's"
    )
    mask: str = Field("", description="digest of the effective mask")
    processing: dict[str, Any] = Field(default_factory=dict, description="who ran it, when, in which flow run")


# Who knows why a frame is not there any more: (folder, data source, frame) to words, or None.
Witness = Callable[[RunFolder, str, int], str | None]


def _by_veto(folder: RunFolder, data_source: str, frame: int) -> str | None:
    """What took a frame that nobody wanted; nothing is said of one that is still there."""
    veto = veto_of(folder, data_source, frame)
    if veto is None or veto.stage == "marked":
        return None
    return (
        f"frame {frame} ({veto.size_bytes:,} bytes, digest {veto.digest}) was vetoed {veto.plan.cause}; "
        f"it is gone since {veto.at:%Y-%m-%d %H:%M:%S} UTC"
    )


WITNESSES: list[Witness] = [_by_veto]


def explain(
    run: Run,
    frame: int,
    *,
    peak: int | None = None,
    reflection: tuple[int, int, int] | None = None,
    processing: str | None = None,
    data_source: str | None = None,
) -> Explanation:
    """Walk back from a frame, one of its peaks (from 0), or one of its reflections.

    Raises
    ------
    RunNotFound : the folder is not visible here, or there is no such processing.
    BadQuery : no such peak or reflection; the message says what there is.
    FrameMissing : the run never had such a frame.
    """
    folder = run.visible_folder
    if folder is None:
        raise RunNotFound(f"the folder {run.folder} of run {run.name} is not visible here; explain it on its machine")
    chosen = _choose(run, processing)
    name = data_source or (chosen.manifest.data_source if chosen else run.detector.name)
    source = FolderSource(folder, name)
    announced = source.status().announced
    if not 0 <= frame < announced:
        raise FrameMissing(f"run {run.name}/{name} has no frame {frame}; its frames are 0 to {announced - 1}")
    known = {"run": run.name, "data_source": name, "frame": frame, "peak": peak, "reflection": reflection}
    known |= _frame_facts(source, folder, name, frame)
    if chosen is not None and chosen.manifest.data_source == name:
        known |= _result_facts(chosen, frame, peak, reflection)
    elif peak is not None or reflection is not None:
        raise BadQuery(f"run {run.name}/{name} has not been processed, so it has no peaks; `nearline process` does")
    return Explanation(**known)


def _choose(run: Run, processing: str | None) -> Processing | None:
    """The processing named, or the newest."""
    found = run.processings
    if processing is not None and processing not in found:
        raise RunNotFound(f"run {run.name} has no processing {processing!r}; it has: {', '.join(found) or 'none yet'}")
    return found[processing] if processing else next(reversed(found.values()), None)


# ---- the frame ------------------------------------------------------------------------------------


def _frame_facts(source: FolderSource, folder: RunFolder, name: str, frame: int) -> dict[str, Any]:
    state = source.states[frame]
    told = next((words for w in WITNESSES if (words := w(folder, name, frame))), None)
    facts: dict[str, Any] = {"state": state.name, "chunk": _chunk_facts(folder, name, frame, source)}
    if told or state not in READABLE:
        return facts | {"why": told or _why(source, folder, name, frame, state)}
    try:
        infos = list(source.infos(frame, frame + 1))
    except CorruptFrame as error:
        return facts | {"why": str(error)}
    why = f"{state.name}: {source.states.cause(frame)}" if state is FrameState.incomplete else ""
    places = [_bytes_of(source, folder, name, info) for info in infos]
    return facts | {"why": why, "bytes": places, "received": _received(infos[0], source, folder) if infos else {}}


def _why(source: FolderSource, folder: RunFolder, name: str, frame: int, state: FrameState) -> str:
    words = f"frame {frame} is {state.name}: {source.states.cause(frame)}"
    if folder.deletion is not None:
        return words
    path = folder.stream(name).commit(frame // source.header.frames_per_chunk)
    if path.exists():
        sealed_at = parse_file(ChunkCommit, path).sealed_at
        words += f"; known since its chunk was sealed at {sealed_at:%Y-%m-%d %H:%M:%S} UTC"
    return words


def _chunk_facts(folder: RunFolder, name: str, frame: int, source: FolderSource) -> dict[str, Any]:
    commit = source.commits.get(frame // source.header.frames_per_chunk)
    if commit is None:
        return {"chunk": frame // source.header.frames_per_chunk, "is_sealed": False}
    wanted = {"chunk", "start", "stop", "digest", "sealed_at", "epoch", "n_frames"}
    return {"is_sealed": True, **commit.model_dump(mode="json", include=wanted)}


def _received(info: FrameInfo, source: FolderSource, folder: RunFolder) -> dict[str, Any]:
    series = source.header.series
    claims = sorted(source.folder.stream(source.header.data_source).claims.glob("[0-9]*.json"))
    return {
        "received_at": _utc(info.received_ns),
        "exposed_at": _utc(info.utc_ns) if info.utc_ns is not None else None,
        "exposed_at_from": info.utc_source,
        "series_id": info.series_id,
        "series_unique_id": info.series_unique_id or (series.series_unique_id if series else None),
        "series_frame": info.series_frame,
        "producer": info.producer or "detector",
        "sequence": info.sequence,
        "is_late": info.late,
        "run_started_at": folder.header.started_at.isoformat(),
        "writers": [path.read_text() for path in claims],
    }


def _utc(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat()


def _bytes_of(source: FolderSource, folder: RunFolder, name: str, info: FrameInfo) -> FrameBytes:
    place = _place_of(source, folder, name, info)
    facts = {"part": info.part, "length": info.size_bytes, "crc32c": f"{info.crc32c:08x}", "digest": info.digest.hex()}
    problem = ""
    try:
        # Each part by itself: a damaged one says nothing of the others.
        if not has_digest(source.read_part(info.frame_index, info.part).blob, info.digest):
            problem = f"the bytes of frame {info.frame_index} in {place.get('file')} are not those that were received"
    except CorruptFrame as error:
        # A shard counts frames and parts alike, so of a frame in parts it would name another.
        where = f"part {info.part} of frame {info.frame_index} in {place.get('file')}"
        is_whole = source.header.parts == 1
        problem = str(error) if is_whole else f"{where} is damaged; restore it from a copy or leave the frame out"
    except (NearlineError, OSError) as error:
        problem = str(error)
    return FrameBytes(**facts, **place, is_verified=not problem, problem=problem)


def _place_of(source: FolderSource, folder: RunFolder, name: str, info: FrameInfo) -> dict[str, Any]:
    header, paths = source.header, folder.stream(name)
    if header.kind == "table":
        return {}
    slots, slot = header.frames_per_chunk * header.parts, info.frame_index * header.parts + info.part
    chunk = slot // slots
    if info.late or chunk not in source.commits:
        place = paths.amendments if info.late else paths.open_journal(chunk)
        return {"file": _relative(place, folder.path)}
    shard = paths.stored_shard(chunk, len(header.array_shape))
    try:
        reader = ShardReader(shard, chunk * slots, slots)
    except CorruptFrame:
        return {"file": _relative(shard, folder.path)}
    location = reader.location(slot) if slot in reader else None
    return {"file": _relative(shard, folder.path), "offset": location.offset if location else None}


def _relative(path: Path, base: Path) -> str:
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


# ---- the result -----------------------------------------------------------------------------------


def _result_facts(
    processing: Processing, frame: int, peak: int | None, reflection: tuple[int, int, int] | None
) -> dict[str, Any]:
    manifest = processing.manifest
    about = manifest.model_dump(mode="json", exclude={"recipe"}) | {"is_finished": processing.is_finished}
    chunk = chunk_of(processing, frame)
    if chunk is None:
        return {"processing": about | {"note": f"frame {frame} has not been processed"}}
    table = "peaks" if peak is not None else "reflections" if reflection is not None else None
    store, steps = StepStore(processing.run), list(chunk.steps.items())
    if table:
        steps = _up_to(steps, store, table)
    graph = provenance_of(processing.run, processing.name)
    done = graph.activities.get(f"{processing.name}/chunk/{chunk.chunk:05d}")
    about["task_runs"] = done.attributes.get("task_runs", {}) if done else {}
    keys = [store.record(digest) or {} for _, digest in steps]
    modules = {e.id.rpartition("/")[2]: e.attributes["modules"] for e in graph.entities.values() if e.kind == "code"}
    return {
        "values": _values(processing, chunk, store, steps, frame, peak, reflection),
        "steps": [_step_facts(name, digest, key, modules) for (name, digest), key in zip(steps, keys, strict=True)],
        "detector": (keys[-1].get("detector") or {}) if keys else {},
        "geometry": _geometry_facts(processing, chunk.geometry),
        "mask": keys[-1].get("mask", "") if keys else "",
        "processing": about,
    }


def _geometry_facts(processing: Processing, number: int) -> dict[str, Any]:
    """A snapshot without its values, which the steps have recorded."""
    if number == 0:
        return {}
    snapshot = processing.geometries()[number - 1]
    return snapshot.model_dump(mode="json", exclude={"detector"}) | {
        "digest": snapshot.digest, "words": snapshot.words
    }  # fmt: skip


def chunk_of(processing: Processing, frame: int) -> ChunkManifest | None:
    """The processed chunk that a frame is in."""
    return next((c for c in processing.chunks() if c.start <= frame < c.stop), None)


def key_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a step output was computed from, out of its ``step.json``."""
    return {name: value for name, value in record.items() if name not in _NOT_KEY}


def _up_to(steps: list[tuple[str, str]], store: StepStore, table: str) -> list[tuple[str, str]]:
    """The chain up to the last step that makes a table; all steps if none does."""
    makers = [n for n, (_, digest) in enumerate(steps) if table in (store.record(digest) or {}).get("tables", ())]
    return steps[: makers[-1] + 1] if makers else steps


def _step_facts(name: str, digest: str, record: dict[str, Any], modules: dict[str, dict[str, str]]) -> StepFacts:
    known = {k: record[k] for k in ("use", "params", "code", "made", "content") if k in record}
    return StepFacts(name=name, digest=digest, modules=modules.get(name, {}), **known)


def rows_of(table: pa.Table, frame: int, peak: int | None, reflection: tuple[int, int, int] | None) -> pa.Table:
    """The rows of a table that a question is about: the frame's, its peak's, or its reflection's."""
    rows = table.filter(pc.equal(table["frame_index"], frame))
    if peak is not None:
        return rows.slice(peak, 1)
    for name, value in zip("hkl", reflection or (), strict=False):
        rows = rows.filter(pc.equal(rows[name], value))
    return rows


def _values(
    processing: Processing,
    chunk: ChunkManifest,
    store: StepStore,
    steps: list[tuple[str, str]],
    frame: int,
    peak: int | None,
    reflection: tuple[int, int, int] | None,
) -> dict[str, Any]:
    if peak is None and reflection is None:
        found = [store.read(digest, "frames") for _, digest in steps]
        rows = [rows_of(table, frame, None, None).to_pylist() for table in found if table is not None]
        return {name: value for row in rows for name, value in (row[0] if row else {}).items()}
    name = "peaks" if peak is not None else "reflections"
    table = store.read(steps[-1][1], name) if steps else None
    if table is None:
        raise BadQuery(f"processing {processing.name} has no table {name}; its steps are {', '.join(chunk.steps)}")
    n_rows = len(rows_of(table, frame, None, None))
    rows = rows_of(table, frame, peak, reflection).to_pylist() if peak is None or peak >= 0 else []
    if not rows:
        what = f"peak {peak}" if peak is not None else f"reflection {','.join(map(str, reflection or ()))}"
        raise BadQuery(f"frame {frame} has no {what} in processing {processing.name}; it has {n_rows} {name}, from 0")
    return rows[0] if len(rows) == 1 else {"crystals": rows}
