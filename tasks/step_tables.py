"""Tables that steps make and take: rows of crystals and reflections, and whose rows belong to which frame."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.step_store import Tables
from tasks.index_frame import Crystal
from tasks.integrate_spots import REFLECTION_DTYPE, Integration
from tasks.step import Upstream
from tasks.unit_cell import UnitCell

__all__ = [
    "IntegratedCrystal",
    "column_before",
    "crystal_matrix",
    "crystal_table",
    "indexed_by_frame",
    "integration_tables",
    "read_crystal",
    "rows_by_frame",
    "scattering_vectors",
    "table_before",
]

_A_COLUMNS = tuple(f"{axis}_{i}" for axis in ("a_star", "b_star", "c_star") for i in "xyz")
_CELL_COLUMNS = ("a", "b", "c", "alpha", "beta", "gamma")


def crystal_matrix(row: Mapping[str, Any]) -> np.ndarray:
    """(3, 3) in 1/Å, columns a*, b*, c*, of a row of the crystals table."""
    return np.array([row[name] for name in _A_COLUMNS], float).reshape(3, 3).T


def crystal_table(frame_index: np.ndarray, crystals: list[list[Crystal]]) -> pa.Table:
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


def table_before(upstream: Upstream, name: str) -> pa.Table:
    """The newest table of that name among earlier steps."""
    for tables in reversed(list(upstream.values())):
        if name in tables:
            return tables[name]
    raise BadRecipe(
        f"a step needs the table {name!r}, but no step before it makes it; put find_peaks (and index) first"
    )


def column_before(upstream: Upstream, name: str) -> np.ndarray:
    for tables in reversed(list(upstream.values())):
        if name in tables.get("frames", {}).column_names:
            return tables["frames"][name].to_numpy()
    raise BadRecipe(f"a step needs the column {name!r}, but no step before it makes one; put find_peaks first")


def indexed_by_frame(crystals: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each indexed frame of a crystals table: its index, its first row, and the spots that its crystals explain."""
    index, first = np.unique(crystals["frame_index"].to_numpy(), return_index=True)
    n_indexed = np.add.reduceat(crystals["n_indexed"].to_numpy(), first) if len(first) else np.empty(0, np.int64)
    return index, first, n_indexed


def rows_by_frame(table: pa.Table, frame_index: np.ndarray) -> list[tuple[int, int]]:
    """(offset, length) of each frame's rows in a table sorted by frame_index."""
    column = table["frame_index"].to_numpy()
    start, stop = np.searchsorted(column, frame_index, "left"), np.searchsorted(column, frame_index, "right")
    return [(int(a), int(b - a)) for a, b in zip(start, stop, strict=True)]


def scattering_vectors(geometry: Geometry, peaks: pa.Table) -> np.ndarray:
    """(n, 3) in 1/Å of the rows of a peaks table."""
    x, y, panel = (peaks[name].to_numpy() for name in ("x", "y", "panel"))
    return geometry.q_at(x, y, panel)


@dataclass(frozen=True)
class IntegratedCrystal:
    """One crystal's integration, its profile radius in 1/Å and its resolution in Å."""

    integration: Integration
    radius: float
    resolution: float


def integration_tables(frame_index: np.ndarray, results: list[list[IntegratedCrystal]]) -> Tables:
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
