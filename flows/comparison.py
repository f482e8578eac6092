"""Two processings side by side: what was asked for, what came out, and which frames one of them gained or lost."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import blake3
import numpy as np
import pyarrow as pa

from flows.reprocessing import count_steps
from storage.errors import BadName, StreamNotFound
from storage.step_store import ChunkManifest, Manifest, Processing
from streaming.retrieval import open_run

__all__ = ["Comparison", "Difference", "Side", "compare_processings", "comparison_rows", "markdown", "open_processing"]

CELL_LENGTHS = ("a", "b", "c")
_CELL = (*CELL_LENGTHS, "alpha", "beta", "gamma")
_MANY = 20


@dataclass(frozen=True)
class Difference:
    """A value that is not the same in both; None where one has none."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over crystals; Å, or degrees for angles."""

    mean: float
    spread: float


@dataclass(frozen=True)
class Side:
    """One processing on the frames that are compared.

    hit_rate : hits over frames. indexing_rate : indexed frames over hits. resolution : median over crystals, Å; None
    without integration. seconds : wall time by stage over all its chunks, as measured when it was computed.
    computed : chunks of each step that were computed, not taken from an earlier processing.
    """

    name: str
    recipe: str
    frames: int
    hits: int
    indexed: int
    hit_rate: float
    indexing_rate: float
    crystals: int
    peaks_per_hit: float | None
    cell: dict[str, Spread]
    resolution: float | None
    reflections: int
    seconds: dict[str, float]
    computed: dict[str, int]
    chunks: int
    is_finished: bool
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Tables:
    """What a picture is drawn from: per-frame columns and crystals of one side, on the frames compared."""

    frames: pa.Table
    crystals: pa.Table | None
    resolution: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Two processings, A (before) and B (after).

    parameters : what differs in the recipes. code : what differs in code and versions. hits_gained, hits_lost,
    indexed_gained, indexed_lost : frame indices that are so in B only, or in A only; empty for different runs.
    is_same_frames : both were held against each other on the same frames, ``frames``.
    """

    a: Side
    b: Side
    parameters: list[Difference]
    code: list[Difference]
    is_same_frames: bool
    hits_gained: list[int] = field(default_factory=list)
    hits_lost: list[int] = field(default_factory=list)
    indexed_gained: list[int] = field(default_factory=list)
    indexed_lost: list[int] = field(default_factory=list)
    tables: tuple[Tables, Tables] | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it but the tables."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tables"}
        return {name: _plain(value) for name, value in values.items()}


def open_processing(name: str, *, service: str | None = None, root: str | None = None) -> Processing:
    """A processing as people write it: ``lyso-2026/3:p2``; without an id the run's default.

    Raises
    ------
    RunNotFound : no such run or processing.
    """
    run, colon, processing = name.rpartition(":")
    # tcp://host:port/lyso/3 and s3://… have colons of their own.
    if not colon or "/" in processing:
        run, processing = name, ""
    return open_run(run, service=service, root=root).processing(processing or None)


def compare_processings(a: Processing, b: Processing) -> Comparison:
    """Hold two processings against each other: of one run on the frames both have, of two runs on all of each.

    Raises
    ------
    BadName : they are the same.
    StreamNotFound : one has done nothing yet, or they have no frame in common.
    """
    if (a.run, a.name) == (b.run, b.name):
        raise BadName(
            f"{_name(a)} is compared with itself; name two processings, such as lyso-2026/3:p1 lyso-2026/3:p2"
        )
    of_a, of_b = a.manifest, b.manifest
    frames = [_frames(processing) for processing in (a, b)]
    is_same = a.run == b.run and of_a.data_source == of_b.data_source
    if is_same:
        common = np.intersect1d(*(table["frame_index"].to_numpy() for table in frames))
        if not len(common):
            raise StreamNotFound(f"{_name(a)} and {_name(b)} have no frame in common yet; wait for the one that runs")
        frames = [_within(table, common) for table in frames]
    tables = [_tables(processing, table) for processing, table in zip((a, b), frames, strict=True)]
    sides = [_side(*both) for both in zip((a, b), (of_a, of_b), tables, strict=True)]
    return Comparison(
        a=sides[0],
        b=sides[1],
        parameters=_differences(_asked(of_a), _asked(of_b)),
        code=_differences(_code(a, of_a), _code(b, of_b)),
        is_same_frames=is_same,
        tables=(tables[0], tables[1]),
        **(_gained_and_lost(*frames) if is_same else {}),
    )


def comparison_rows(found: Comparison) -> list[tuple[str, str, str]]:
    """What to show, line by line: what it is, and its value on each side."""
    a, b = found.a, found.b
    rows: list[tuple[str, ...]] = [
        ("recipe", a.recipe, b.recipe),
        ("frames", *(str(side.frames) + _part_in_words(side) for side in (a, b))),
        ("hits", str(a.hits), str(b.hits)),
        ("hit rate (of frames)", f"{100 * a.hit_rate:.1f} %", f"{100 * b.hit_rate:.1f} %"),
        ("indexed", str(a.indexed), str(b.indexed)),
        ("indexing rate (of hits)", f"{100 * a.indexing_rate:.1f} %", f"{100 * b.indexing_rate:.1f} %"),
        ("crystals", str(a.crystals), str(b.crystals)),
        ("peaks per hit, median", *(_number(side.peaks_per_hit, "g") for side in (a, b))),
    ]
    for name in _CELL:
        if name in a.cell or name in b.cell:
            unit = "Å" if name in CELL_LENGTHS else "°"
            rows.append((f"{name}, {unit}", *(_spread_in_words(side.cell.get(name)) for side in (a, b))))
    rows.append(("resolution, Å, median", *(_number(side.resolution, ".2f") for side in (a, b))))
    rows.append(("reflections", str(a.reflections), str(b.reflections)))
    for stage in dict.fromkeys([*a.seconds, *b.seconds]):
        rows.append((f"time for {stage}, s", *(_time_in_words(side, stage) for side in (a, b))))
    for what, frames in _changes(found).items():
        if found.is_same_frames:
            rows.append((f"frames {what}", "", _frames_in_words(frames)))
    return [(name, a_value, b_value) for name, a_value, b_value in rows]


# ---- what was asked for -------------------------------------------------------------------------


def flatten(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted names."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, content


def _asked(manifest: Manifest) -> dict[str, Any]:
    """A recipe by dotted names; a step's by the step's name, so that its place does not matter."""
    recipe = dict(manifest.recipe)
    steps = {step["name"]: {k: v for k, v in step.items() if k != "name"} for step in recipe.pop("steps", [])}
    order = " → ".join(steps)
    recipe.pop("name", None)
    if geometry := (recipe.get("detector") or {}).get("geometry"):
        shown = f"{geometry.get('file') or 'panels'} {_content_digest(geometry)}"
        recipe["detector"] = recipe["detector"] | {"geometry": shown}
    return dict(flatten({**steps, "order of steps": order, **recipe, "data source": manifest.data_source}))


def _content_digest(geometry: Mapping[str, Any]) -> str:
    """Of where the panels are, short: a file may have been rewritten with the same content."""
    content = {name: value for name, value in geometry.items() if name not in ("file", "digest", "notes")}
    return blake3.blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _code(processing: Processing, manifest: Manifest) -> dict[str, Any]:
    """Versions, and the source of each step, as the first chunk was computed with."""
    found: dict[str, Any] = dict(manifest.versions)
    first = next(processing.chunks(), None)
    for step, digest in (first.steps if first else {}).items():
        path = processing.run / "steps" / digest / "step.json"
        code = json.loads(path.read_bytes()).get("code", {}) if path.exists() else {}
        if "source" in code:
            found[f"source of {step}"] = str(code["source"])[:12]
        found |= {name: value for name, value in code.items() if name != "source"}
    return found


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    names = dict.fromkeys([*a, *b])
    return [Difference(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


# ---- what came out ------------------------------------------------------------------------------


def _frames(processing: Processing) -> pa.Table:
    try:
        return processing.frames
    except KeyError:
        raise StreamNotFound(f"{_name(processing)} has not done a chunk yet; wait for it") from None


def _tables(processing: Processing, frames: pa.Table) -> Tables:
    index = frames["frame_index"].to_numpy()
    crystals = _within(found, index) if (found := _optional(processing, "crystals")) is not None else None
    quality = _within(found, index) if (found := _optional(processing, "crystal_quality")) is not None else None
    resolution = quality["resolution"].to_numpy() if quality is not None else np.empty(0)
    return Tables(frames, crystals, resolution[np.isfinite(resolution)])


def _side(processing: Processing, manifest: Manifest, tables: Tables) -> Side:
    frames, chunks = tables.frames, list(processing.chunks())
    hit, indexed = _flags(frames, "hit"), _flags(frames, "indexed")
    n_peaks = _column(frames, "n_peaks")[hit] if "n_peaks" in frames.column_names else np.empty(0)
    crystals = tables.crystals
    return Side(
        name=_name(processing),
        recipe=str(manifest.recipe.get("name", "")),
        frames=len(frames),
        hits=int(hit.sum()),
        indexed=int(indexed.sum()),
        hit_rate=_ratio(hit.sum(), len(frames)),
        indexing_rate=_ratio(indexed.sum(), hit.sum()),
        crystals=0 if crystals is None else len(crystals),
        peaks_per_hit=float(np.median(n_peaks)) if len(n_peaks) else None,
        cell={} if crystals is None or not len(crystals) else {name: _spread(crystals[name]) for name in _CELL},
        resolution=float(np.median(tables.resolution)) if len(tables.resolution) else None,
        reflections=int(np.nansum(_column(frames, "n_reflections"))) if "n_reflections" in frames.column_names else 0,
        seconds=_seconds(chunks),
        computed={step: n.computed for step, n in count_steps(chunks).items()},
        chunks=len(chunks),
        is_finished=processing.is_finished,
        part=manifest.part,
    )


def _gained_and_lost(a: pa.Table, b: pa.Table) -> dict[str, list[int]]:
    index, found = a["frame_index"].to_numpy(), {}
    for word, column in (("hits", "hit"), ("indexed", "indexed")):
        before, after = _flags(a, column), _flags(b, column)
        found[f"{word}_gained"] = index[after & ~before].tolist()
        found[f"{word}_lost"] = index[before & ~after].tolist()
    return found


def _optional(processing: Processing, name: str) -> pa.Table | None:
    try:
        return processing.table(name)
    except KeyError:
        return None


def _within(table: pa.Table, index: np.ndarray) -> pa.Table:
    """Rows of these frames, in index order."""
    return table.filter(pa.array(np.isin(table["frame_index"].to_numpy(), index))).sort_by("frame_index")


def _flags(frames: pa.Table, name: str) -> np.ndarray:
    if name not in frames.column_names:
        return np.zeros(len(frames), bool)
    flags: np.ndarray = frames[name].fill_null(False).to_numpy().astype(bool)
    return flags


def _column(table: pa.Table, name: str) -> np.ndarray:
    values: np.ndarray = table[name].to_numpy()
    return values


def _seconds(chunks: list[ChunkManifest]) -> dict[str, float]:
    total: dict[str, float] = {}
    for chunk in chunks:
        for stage, seconds in chunk.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return {stage: round(seconds, 3) for stage, seconds in total.items()}


def _spread(values: pa.ChunkedArray) -> Spread:
    numbers = values.to_numpy()
    return Spread(float(numbers.mean()), float(numbers.std()))


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0


# ---- words --------------------------------------------------------------------------------------


def _name(processing: Processing) -> str:
    return f"{processing.run.parent.name}/{processing.run.name}:{processing.name}"


def _changes(found: Comparison) -> dict[str, list[int]]:
    return {
        "that are hits in B only": found.hits_gained,
        "that were hits in A only": found.hits_lost,
        "indexed in B only": found.indexed_gained,
        "indexed in A only": found.indexed_lost,
    }


def _frames_in_words(frames: list[int]) -> str:
    if not frames:
        return "none"
    more = " …" if len(frames) > _MANY else ""
    return f"{len(frames)}: {', '.join(map(str, frames[:_MANY]))}{more}"


def _time_in_words(side: Side, stage: str) -> str:
    if stage not in side.seconds:
        return "–"
    if stage not in side.computed:
        return f"{side.seconds[stage]:.2f}"
    computed = side.computed[stage]
    return f"{side.seconds[stage]:.2f}" + ("" if computed == side.chunks else f" ({side.chunks - computed} reused)")


def _part_in_words(side: Side) -> str:
    if side.part is None:
        return "" if side.is_finished else " so far"
    return f" (a canary on {side.part[0]}–{side.part[1] - 1})"


def _spread_in_words(found: Spread | None) -> str:
    return "–" if found is None else f"{found.mean:.3f} ± {found.spread:.3f}"


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _plain(value: Any) -> Any:
    if isinstance(value, Side | Difference):
        return asdict(value)
    return [_plain(one) for one in value] if isinstance(value, list) else value


def markdown(found: Comparison, picture: str = "") -> str:
    """The comparison as a page; ``picture`` is a Markdown image, if there is one."""
    parts = [f"# {found.a.name} and {found.b.name}"]
    for title, rows in (("Parameters", found.parameters), ("Code and versions", found.code)):
        lines = [f"| {row.name} | {_short(row.a)} | {_short(row.b)} |" for row in rows]
        parts += [f"## {title}", _table(lines) if lines else "the same"]
    parts += ["## What came out", _table([f"| {name} | {a} | {b} |" for name, a, b in comparison_rows(found)]), picture]
    return "\n\n".join(parts)


def _table(lines: list[str]) -> str:
    return "\n".join(["| | A | B |", "|---|---|---|", *lines])


def _short(value: Any) -> str:
    return "–" if value is None else str(value)[:200].replace("|", "/")
