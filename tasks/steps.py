"""The steps a recipe can name: each a pure function of a chunk, its parameters and earlier outputs.

A step returns tables. ``frames`` has one row per frame of the chunk, in order, and its columns
are what queries, stop criteria and the live view see; other tables (``peaks``, ``crystals``,
``reflections``) are keyed by ``frame_index``. A user's function does the same by returning a dict
of arrays with one value, or one array of a fixed length, per frame; a dict among them is a table.
"""

import functools
import hashlib
import importlib
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from storage import codec as codec_module
from storage import crystfel as crystfel_module
from storage import geometry as geometry_module
from storage import photons, sensor
from storage.codec import encode
from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.masks import array_digest
from storage.step_store import Tables
from tasks import bin_frames, chunk_frames, find_peaks, index_frame, ring_statistics, unit_cell
from tasks import integrate_spots as integrate_spots_module
from tasks import predict_spots as predict_spots_module
from tasks.bin_frames import Binner
from tasks.chunk_frames import ChunkFrames
from tasks.engines import Engine, EngineJob, dials_stills, indexamajig
from tasks.engines import engine as engine_module
from tasks.engines.engine import flat_geometry, spots_where_rays_enter
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.index_frame import Crystal, Indexer, IndexParams
from tasks.integrate_spots import REFLECTION_DTYPE, Integration, IntegrationParams, integrate_spots
from tasks.predict_spots import crystal_resolution, predict_spots, profile_radius
from tasks.unit_cell import UnitCell

__all__ = [
    "STEPS",
    "BinParams",
    "FindPeaksParams",
    "FrameWork",
    "Step",
    "crystal_matrix",
    "find_function",
    "read_crystal",
    "rows_by_frame",
    "scattering_vectors",
    "user_step",
]

Upstream = Mapping[str, Tables]
_KEEP_FINDERS = 2
# Made from columns, and sent on as pixels: no user's table can be one of these.
_OUR_TABLES = frozenset(("frames", "binned"))
# Kinds of NumPy numbers, booleans among them.
_NUMBERS = "biuf"
P = TypeVar("P", PeakParams, IntegrationParams)


@dataclass(frozen=True)
class BinParams:
    """Binned frames, as a stream of their own and, on request, for the steps that follow.

    factor : pixels per side. feed_next : later steps work on the binned frames.
    """

    factor: int = 4
    feed_next: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= 64:
            raise BadRecipe(f"binning factor {self.factor} is not between 1 and 64")


@dataclass(frozen=True)
class FindPeaksParams(PeakParams):
    """Peak search, and what makes a frame a hit.

    min_peaks : a frame with at least so many peaks is a hit.
    """

    min_peaks: int = 15


@dataclass(frozen=True)
class IntegrateParams(IntegrationParams):
    """Integration on predicted positions.

    d_min : Å; predictions end there. 0 for the corners of the detector.
    """

    d_min: float = 0.0


@dataclass(frozen=True)
class FrameWork:
    """What a step does that looks at each frame by itself.

    each : of a position in the chunk, from any thread. gather : of all that ``each`` returned, in order, the tables.
    """

    each: Callable[[int], Any]
    gather: Callable[[list[Any]], Tables]


@dataclass(frozen=True)
class Step:
    """One of our steps.

    run : (chunk, params, cell, upstream) → tables. kernels : modules whose source is part of
    the step's identity. frame_work : (chunk, params) → the same, for steps that want nothing but
    the frames; neighbours of this kind are carried out together, frame by frame.
    engine : the program of others that does the work; so is its version.
    """

    params: type
    run: Callable[[ChunkFrames, Any, UnitCell | None, Upstream], Tables]
    kernels: tuple[ModuleType, ...]
    needs_cell: bool = False
    frame_work: Callable[[ChunkFrames, Any], FrameWork] | None = None
    engine: Engine | None = None

    def read_params(self, given: Mapping[str, Any]) -> Any:
        """The step's parameters from what a recipe says; ValueError names what it does not know."""
        known = {field.name for field in fields(self.params)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"unknown parameter {', '.join(unknown)}; this step knows {', '.join(sorted(known))}")
        for name, value in given.items():
            is_infinite = isinstance(value, float) and not math.isfinite(value)
            if is_infinite and value != getattr(self.params, name, None):
                raise ValueError(f"{name}: {value} is not a usable number")
        try:
            return _reader(self.params).validate_python(dict(given))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(problems) from None

    @property
    def identity(self) -> dict[str, str]:
        """What the code of this step is: source digest and versions of the numeric libraries.

        Raises EngineMissing where the step wants a program that is not on this machine.
        """
        program = {self.engine.name: self.engine.version()} if self.engine is not None else {}
        return {"source": source_digest(*self.kernels, *_SHARED), **library_versions(), **program}

    @property
    def modules(self) -> dict[str, str]:
        """The source digest of each module that is part of its identity."""
        return {module.__name__: source_digest(module) for module in (*self.kernels, *_SHARED)}


# What every step is computed with, whatever its kernel.
_SHARED = (sys.modules[__name__], chunk_frames, bin_frames, geometry_module, sensor, photons, codec_module)


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of what computes numbers; read once, which takes ten milliseconds."""
    return {
        "bitshuffle": version("bitshuffle"),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "gemmi": version("gemmi"),
    }


def source_digest(*modules: ModuleType) -> str:
    """sha256 over the source text of modules, hex."""
    return hashlib.sha256("".join(_source_of(module) for module in modules).encode()).hexdigest()


@functools.cache
def _reader(params: type) -> TypeAdapter[Any]:
    """Made once: that takes longer than reading the parameters of a chunk."""
    return TypeAdapter(params)


@functools.cache
def _source_of(module: ModuleType) -> str:
    """The text this process runs: read once, early, since the file may be changed under a running worker."""
    return inspect.getsource(module)


def find_function(name: str) -> Callable[..., Mapping[str, Any]]:
    """Import ``package.module:function``; BadRecipe if there is no such thing."""
    module, _, attribute = name.partition(":")
    try:
        function: Callable[..., Mapping[str, Any]] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadRecipe(
            f"cannot import step {name!r}: {error}; write package:function, and put its folder on PYTHONPATH"
        ) from None
    if not callable(function):
        raise BadRecipe(f"step {name!r} is not a function but a {type(function).__name__}")
    return function


def check_user_step(name: str, params: Mapping[str, Any]) -> None:
    """Refuse a user's step that cannot be imported or does not take these parameters."""
    function = find_function(name)
    try:
        inspect.signature(function).bind(None, **params)
    except TypeError as error:
        raise ValueError(f"step {name} cannot be called with these params: {error}") from None


def user_step(name: str) -> Step:
    """A user's function as a step: ``function(chunk, **params)`` → columns, and tables."""
    function = find_function(name)

    def run(chunk: ChunkFrames, params: dict[str, Any], cell: UnitCell | None, upstream: Upstream) -> Tables:
        try:
            result = function(chunk, **params)
        except Exception as error:
            raise BadRecipe(
                f"step {name} failed on frames {chunk.frame_index[0]} to {chunk.frame_index[-1]} "
                f"with {type(error).__name__}: {error}"
            ) from error
        return _tables_of(chunk, result, name)

    module = inspect.getmodule(function)
    step = Step(dict, run, (module,) if module else ())
    source_digest(*step.kernels)
    return step


def _tables_of(chunk: ChunkFrames, result: Mapping[str, Any], name: str) -> Tables:
    """What a user's step returned: ``frames`` of its columns, and a table of each dict among its values."""
    if not isinstance(result, Mapping):
        raise BadRecipe(f"step {name} returned a {type(result).__name__}; return a dict of one array per column")
    frames: dict[str, Any] = {"frame_index": chunk.frame_index}
    tables: dict[str, pa.Table] = {}
    for key, value in result.items():
        if isinstance(value, Mapping):
            tables[key] = _extra_table(chunk, value, key, name)
            continue
        if key == "frame_index":
            raise BadRecipe(f"step {name} returned column 'frame_index'; leave it to us")
        frames[str(key)] = _column(np.asarray(value), len(chunk), f"step {name} returned column {key!r}")
    return {"frames": pa.table(frames), **tables}


def _extra_table(chunk: ChunkFrames, columns: Mapping[str, Any], table: str, name: str) -> pa.Table:
    """Any number of rows for each frame; ``frame_index`` says whose they are, and never falls."""
    where = f"step {name} returned table {table!r}"
    index = np.asarray(columns.get("frame_index", None))
    if table in _OUR_TABLES or index.ndim != 1 or (len(index) and index.dtype.kind not in "iu"):
        raise BadRecipe(f"{where} without a frame_index of whole numbers, or under a name of ours; see docs/recipes.md")
    if not np.isin(index, chunk.frame_index).all() or (np.diff(index) < 0).any():
        raise BadRecipe(f"{where} with a frame_index that falls, or that is no frame of the chunk; sort its rows by it")
    made = {str(key): _column(np.asarray(value), len(index), f"{where} with {key!r}") for key, value in columns.items()}
    return pa.table(made | {"frame_index": index.astype(np.int64)})


def _column(values: np.ndarray, n_rows: int, what: str) -> Any:
    """A value a row, or an array of equal length a row; of those, not-a-number becomes null, as JSON has none."""
    if values.dtype.kind not in (_NUMBERS if values.ndim > 1 else _NUMBERS + "SU"):
        raise BadRecipe(f"{what} of {values.dtype}; return numbers, booleans or text, and arrays of numbers")
    if values.ndim not in (1, 2) or values.shape[0] != n_rows or 0 in values.shape[1:]:
        raise BadRecipe(
            f"{what} of shape {values.shape} for {n_rows} rows; return one value, or one array of a fixed length, a row"
        )
    if not n_rows:
        return pa.nulls(0)  # nobody can tell of what type: it takes that of the other chunks
    if values.ndim == 1:
        return values
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), from_pandas=True), values.shape[1])


# ---- ours -------------------------------------------------------------------------------------


def bin_work(chunk: ChunkFrames, params: BinParams) -> FrameWork:
    """Sum n x n pixels of each frame; ``binned`` holds each frame as bslz4 uint32."""
    binner = Binner(chunk.detector_mask, params.factor, chunk.saturation_value)

    def one(position: int) -> tuple[bytes, int]:
        sums, total = binner(chunk.borrowed_unbinned(position))
        return encode(sums), total

    def gather(results: list[tuple[bytes, int]]) -> Tables:
        index = chunk.frame_index
        return {
            "frames": pa.table({"frame_index": index, "total_counts": np.array([t for _, t in results], np.int64)}),
            "binned": pa.table({"frame_index": index, "blob": pa.array([b for b, _ in results], pa.binary())}),
        }

    return FrameWork(one, gather)


def find_peaks_work(chunk: ChunkFrames, params: FindPeaksParams) -> FrameWork:
    """Peaks of each frame, and whether it is a hit."""
    finder = _finder_for(chunk.geometry, chunk.mask, _kernel_params(params, PeakParams, chunk))

    def gather(tables: list[np.ndarray]) -> Tables:
        n_peaks = np.array([len(t) for t in tables], np.int64)
        peaks = np.concatenate(tables) if tables else np.empty(0, find_peaks.PEAK_DTYPE)
        columns: dict[str, Any] = {"frame_index": np.repeat(chunk.frame_index, n_peaks)}
        columns |= {name: np.ascontiguousarray(peaks[name]) for name in peaks.dtype.names or ()}
        hit = n_peaks >= params.min_peaks
        return {
            "frames": pa.table({"frame_index": chunk.frame_index, "n_peaks": n_peaks, "hit": hit}),
            "peaks": pa.table(columns),
        }

    return FrameWork(lambda position: _in_detector_px(finder(chunk.borrowed(position)), chunk), gather)


_finders: OrderedDict[tuple[Geometry, str, PeakParams], PeakFinder] = OrderedDict()


def _finder_for(geometry: Geometry, mask: np.ndarray, params: PeakParams) -> PeakFinder:
    """The peak finder for this detector; kept, since preparing one takes as long as 25 frames of 4M."""
    key = (geometry, array_digest(mask), params)
    finder = _finders.get(key)
    if finder is None:
        finder = _finders[key] = PeakFinder(geometry, mask, params)
        while len(_finders) > _KEEP_FINDERS:
            _finders.popitem(last=False)
    return finder


def run_index(chunk: ChunkFrames, params: IndexParams, cell: UnitCell | None, upstream: Upstream) -> Tables:
    """Lattices in the hits, with the known cell."""
    assert cell is not None
    peaks, hit = _table(upstream, "peaks"), _frame_column(upstream, "hit")
    geometry = chunk.detector_geometry
    indexer = _indexer_for(cell, geometry.wavelength, params)
    rows = rows_by_frame(peaks, chunk.frame_index)

    def one(position: int) -> list[Crystal]:
        if not hit[position]:
            return []
        mine = peaks.slice(*rows[position])
        return indexer(scattering_vectors(geometry, mine), mine["intensity"].to_numpy())

    crystals = chunk.map(one)
    n_crystals = np.array([len(c) for c in crystals], np.int64)
    return {
        "frames": pa.table({"frame_index": chunk.frame_index, "indexed": n_crystals > 0, "n_crystals": n_crystals}),
        "crystals": _crystal_table(chunk.frame_index, crystals),
    }


def run_engine(engine: Engine, chunk: ChunkFrames, params: Any, cell: UnitCell | None, upstream: Upstream) -> Tables:
    """Lattices that a program of others finds in the peaks of the hits, counted as ours are."""
    assert cell is not None
    peaks, hit = _table(upstream, "peaks"), _frame_column(upstream, "hit")
    geometry, rows = chunk.detector_geometry, rows_by_frame(peaks, chunk.frame_index)
    hits = np.flatnonzero(hit)
    mine = [peaks.slice(*rows[position]) for position in hits]
    vectors = [scattering_vectors(geometry, table) for table in mine]
    spots = [
        spots_where_rays_enter(geometry, q, table["panel"].to_numpy(), table["intensity"].to_numpy())
        for q, table in zip(vectors, mine, strict=True)
    ]
    job = EngineJob(chunk.header, flat_geometry(geometry), cell, tuple(spots))
    answers = engine.index(job, params) if spots else []
    counter = _indexer_for(cell, geometry.wavelength, IndexParams())
    crystals: list[list[Crystal]] = [[] for _ in range(len(chunk))]
    why, counts = [""] * len(chunk), []
    for position, q, answer in zip(hits, vectors, answers, strict=True):
        why[position] = answer.why
        for lattice in answer.lattices:
            crystal = counter.described(q, lattice.A, lattice.shift)
            if crystal is None:
                why[position] = f"{engine.name} gave a lattice that explains no spot"
                continue
            crystals[position].append(crystal)
            counts.append(lattice.n_indexed)
    table = _crystal_table(chunk.frame_index, crystals)
    n_crystals = np.array([len(c) for c in crystals], np.int64)
    return {
        "frames": pa.table(
            {
                "frame_index": chunk.frame_index,
                "indexed": n_crystals > 0,
                "n_crystals": n_crystals,
                "not_indexed_because": why,
            }
        ),
        "crystals": table.append_column("n_indexed_by_engine", pa.array(counts, pa.int64())),
    }


@functools.lru_cache(maxsize=_KEEP_FINDERS)
def _indexer_for(cell: UnitCell, wavelength: float, params: IndexParams) -> Indexer:
    """Kept from chunk to chunk: preparing one takes as long as indexing several frames."""
    return Indexer(cell, wavelength, params)


@functools.lru_cache(maxsize=_KEEP_FINDERS)
def _indices_within(cell: UnitCell, q_max: float) -> np.ndarray:
    """(n, 3): reflections that may be seen at all; tens of milliseconds to list."""
    hkl = cell.hkl_within(q_max)
    hkl.flags.writeable = False
    return hkl


def run_integrate(chunk: ChunkFrames, params: IntegrateParams, cell: UnitCell | None, upstream: Upstream) -> Tables:
    """Intensities on the predicted positions of each indexed lattice."""
    assert cell is not None
    geometry = chunk.geometry
    crystals, peaks = _table(upstream, "crystals"), _table(upstream, "peaks")
    rows, peak_rows = rows_by_frame(crystals, chunk.frame_index), rows_by_frame(peaks, chunk.frame_index)
    hkl = _indices_within(cell, 1 / params.d_min if params.d_min else geometry.q_at_corner)
    rings = _kernel_params(params, IntegrationParams, chunk)

    def one(position: int) -> list[_Integrated]:
        found = [read_crystal(row, cell) for row in crystals.slice(*rows[position]).to_pylist()]
        if not found:
            return []
        q = scattering_vectors(chunk.detector_geometry, peaks.slice(*peak_rows[position]))
        radii = [profile_radius(crystal, q, geometry.wavelength) for crystal in found]
        predicted = [predict_spots(c, geometry, r, hkl) for c, r in zip(found, radii, strict=True)]
        frame = chunk.borrowed(position)
        return [
            _Integrated(
                _integrate(frame, chunk, mine, rings, _others(predicted, number)),
                radii[number],
                crystal_resolution(found[number], q, geometry.wavelength),
            )
            for number, mine in enumerate(predicted)
        ]

    return _integration_tables(chunk.frame_index, chunk.map(one))


@dataclass(frozen=True)
class _Integrated:
    """One crystal's integration, its profile radius in 1/Å and its resolution in Å."""

    integration: Integration
    radius: float
    resolution: float


def _integrate(
    frame: np.ndarray,
    chunk: ChunkFrames,
    predicted: np.ndarray,
    rings: IntegrationParams,
    neighbours: np.ndarray | None,
) -> Integration:
    found = integrate_spots(frame, chunk.mask, predicted, chunk.geometry, rings, neighbours)
    return replace(found, reflections=_in_detector_px(found.reflections, chunk))


def _others(predicted: list[np.ndarray], number: int) -> np.ndarray | None:
    rest = [table for i, table in enumerate(predicted) if i != number]
    return np.concatenate(rest) if rest else None


def scattering_vectors(geometry: Geometry, peaks: pa.Table) -> np.ndarray:
    """(n, 3) in 1/Å of the rows of a peaks table."""
    x, y, panel = (peaks[name].to_numpy() for name in ("x", "y", "panel"))
    return geometry.q_at(x, y, panel)


# ---- tables -----------------------------------------------------------------------------------

_A_COLUMNS = tuple(f"{axis}_{i}" for axis in ("a_star", "b_star", "c_star") for i in "xyz")
_CELL_COLUMNS = ("a", "b", "c", "alpha", "beta", "gamma")


def crystal_matrix(row: Mapping[str, Any]) -> np.ndarray:
    """(3, 3) in 1/Å, columns a*, b*, c*, of a row of the crystals table."""
    return np.array([row[name] for name in _A_COLUMNS], float).reshape(3, 3).T


def _crystal_table(frame_index: np.ndarray, crystals: list[list[Crystal]]) -> pa.Table:
    rows = [
        {"frame_index": int(index), "crystal": number}
        | dict(zip(_A_COLUMNS, c.A.T.ravel().tolist(), strict=True))
        | dict(zip(_CELL_COLUMNS, c.cell.parameters, strict=True))
        | {
            "n_indexed": c.n_indexed,
            "n_spots": c.n_spots,
            "rmsd": c.rmsd,
            "excitation_rmsd": c.excitation_rmsd,
            "shift_x": c.shift[0],
            "shift_y": c.shift[1],
            "log10_chance": c.log10_chance,
        }
        for index, found in zip(frame_index, crystals, strict=True)
        for number, c in enumerate(found)
    ]
    return pa.Table.from_pylist(rows, schema=_CRYSTAL_SCHEMA)


_CRYSTAL_SCHEMA = pa.schema(
    [("frame_index", pa.int64()), ("crystal", pa.int64())]
    + [(name, pa.float64()) for name in (*_A_COLUMNS, *_CELL_COLUMNS)]
    + [("n_indexed", pa.int64()), ("n_spots", pa.int64())]
    + [(name, pa.float64()) for name in ("rmsd", "excitation_rmsd", "shift_x", "shift_y", "log10_chance")]
)


def read_crystal(row: Mapping[str, Any], cell: UnitCell) -> Crystal:
    """The crystal of a row of the crystals table; ``cell`` gives its symmetry."""
    return Crystal(
        A=crystal_matrix(row),
        cell=cell.with_parameters([row[name] for name in _CELL_COLUMNS]),
        n_indexed=row["n_indexed"],
        n_spots=row["n_spots"],
        rmsd=row["rmsd"],
        excitation_rmsd=row["excitation_rmsd"],
        shift=(row["shift_x"], row["shift_y"]),
        log10_chance=row["log10_chance"],
    )


def _table(upstream: Upstream, name: str) -> pa.Table:
    """The newest table of that name among earlier steps."""
    for tables in reversed(list(upstream.values())):
        if name in tables:
            return tables[name]
    raise BadRecipe(
        f"a step needs the table {name!r}, but no step before it makes it; put find_peaks (and index) first"
    )


def _frame_column(upstream: Upstream, name: str) -> np.ndarray:
    for tables in reversed(list(upstream.values())):
        if name in tables.get("frames", {}).column_names:
            return tables["frames"][name].to_numpy()
    raise BadRecipe(f"a step needs the column {name!r}, but no step before it makes one; put find_peaks first")


def rows_by_frame(table: pa.Table, frame_index: np.ndarray) -> list[tuple[int, int]]:
    """(offset, length) of each frame's rows in a table sorted by frame_index."""
    column = table["frame_index"].to_numpy()
    start, stop = np.searchsorted(column, frame_index, "left"), np.searchsorted(column, frame_index, "right")
    return [(int(a), int(b - a)) for a, b in zip(start, stop, strict=True)]


def _kernel_params(params: Any, kind: type[P], chunk: ChunkFrames) -> P:
    """The kernel's parameters for frames as the step sees them.

    The detector's saturation value holds unless the recipe gives another. Binned frames need
    none, since binning has marked what was saturated, and their lengths in px are scaled.
    """
    values = {field.name: getattr(params, field.name) for field in fields(kind)}
    if values["saturation"] is None and chunk.binning == 1 and chunk.saturation_value is not None:
        values["saturation"] = float(chunk.saturation_value)
    kernel_params = kind(**values)
    return kernel_params.for_binning(chunk.binning) if chunk.binning > 1 else kernel_params


def _in_detector_px(table: np.ndarray, chunk: ChunkFrames) -> np.ndarray:
    """Positions found on binned frames as positions on the detector's own."""
    if chunk.binning > 1:
        table["x"] *= chunk.binning
        table["y"] *= chunk.binning
    return table


def _integration_tables(frame_index: np.ndarray, results: list[list[_Integrated]]) -> Tables:
    crystals, parts = [], []
    for index, found in zip(frame_index, results, strict=True):
        for number, one in enumerate(found):
            reflections = one.integration.reflections
            crystals.append(
                {
                    "frame_index": int(index),
                    "crystal": number,
                    "profile_radius": one.radius,
                    "resolution": one.resolution,
                    "n_reflections": len(reflections),
                    "n_masked": one.integration.n_masked,
                    "n_saturated": one.integration.n_saturated,
                    "n_implausible": one.integration.n_implausible,
                }
            )
            parts.append((int(index), number, reflections))
    reflections = np.concatenate([p[2] for p in parts]) if parts else np.empty(0, REFLECTION_DTYPE)
    lengths = [len(p[2]) for p in parts]
    columns: dict[str, Any] = {
        "frame_index": np.repeat(np.array([p[0] for p in parts], np.int64), lengths),
        "crystal": np.repeat(np.array([p[1] for p in parts], np.int64), lengths),
    }
    columns |= {name: np.ascontiguousarray(reflections[name]) for name in REFLECTION_DTYPE.names or ()}
    n_reflections = np.array([sum(len(one.integration.reflections) for one in found) for found in results], np.int64)
    resolution = [min((one.resolution for one in found), default=float("nan")) for found in results]
    return {
        "frames": pa.table(
            {"frame_index": frame_index, "n_reflections": n_reflections, "resolution": np.array(resolution, float)}
        ),
        "crystal_quality": pa.Table.from_pylist(crystals, schema=_QUALITY_SCHEMA),
        "reflections": pa.table(columns),
    }


_QUALITY_SCHEMA = pa.schema(
    [("frame_index", pa.int64()), ("crystal", pa.int64()), ("profile_radius", pa.float64())]
    + [("resolution", pa.float64())]
    + [(name, pa.int64()) for name in ("n_reflections", "n_masked", "n_saturated", "n_implausible")]
)


def _frame_step(params: type, begin: Callable[[ChunkFrames, Any], FrameWork], kernels: tuple[ModuleType, ...]) -> Step:
    def run(chunk: ChunkFrames, params: Any, cell: UnitCell | None, upstream: Upstream) -> Tables:
        work = begin(chunk, params)
        return work.gather(chunk.map(work.each))

    return Step(params, run, kernels, frame_work=begin)


_DIALS = Engine("DIALS", dials_stills.DialsParams, dials_stills.version, dials_stills.index)
_INDEXAMAJIG = Engine("indexamajig", indexamajig.IndexamajigParams, indexamajig.version, indexamajig.index)


def _engine_step(engine: Engine, *modules: ModuleType) -> Step:
    kernels = (*modules, engine_module, index_frame, unit_cell)
    return Step(engine.params, functools.partial(run_engine, engine), kernels, needs_cell=True, engine=engine)


STEPS: dict[str, Step] = {
    "bin": _frame_step(BinParams, bin_work, (bin_frames,)),
    "find_peaks": _frame_step(FindPeaksParams, find_peaks_work, (find_peaks, ring_statistics)),
    "index": Step(IndexParams, run_index, (index_frame, unit_cell), needs_cell=True),
    "index_dials": _engine_step(_DIALS, dials_stills, dials_stills.dials_driver),
    "index_indexamajig": _engine_step(_INDEXAMAJIG, indexamajig, crystfel_module),
    "integrate": Step(
        IntegrateParams, run_integrate, (predict_spots_module, integrate_spots_module, unit_cell), needs_cell=True
    ),
}
for _step in STEPS.values():
    source_digest(*_step.kernels, *_SHARED)
