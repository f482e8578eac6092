"""Users' own steps: a function named ``package.module:function``, and what it returned as tables."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from storage import codec, photons, sensor
from storage import geometry as geometry_module
from storage.errors import BadRecipe
from storage.step_store import Tables
from tasks import bin_frames, chunk_frames
from tasks import step as step_module
from tasks.chunk_frames import ChunkFrames
from tasks.imported_code import imported_code
from tasks.step import Step, Upstream
from tasks.unit_cell import UnitCell

__all__ = ["check_user_step", "find_function", "user_step"]

# Made from columns, and sent on as pixels: no user's table can be one of these.
_OUR_TABLES = frozenset(("frames", "binned"))
# Kinds of NumPy numbers, booleans among them.
_NUMBERS = "biuf"
# What a user's step is given is made by these.
_SHARED = (sys.modules[__name__], step_module, chunk_frames, bin_frames, geometry_module, sensor, photons, codec)


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
    if module is None:
        return Step(dict, run, _SHARED)
    rests_on = imported_code(module)
    others = (one for one in rests_on.modules if one not in _SHARED)
    return Step(dict, run, (module, *others, *_SHARED), libraries=rests_on.versions)


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
