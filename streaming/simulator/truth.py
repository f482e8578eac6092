"""What a simulated series holds, in one Parquet file: a row per frame, its spots as lists.

Columns: ``frame_index``, ``is_hit``, ``A`` (nine numbers, row by row a*, b*, c*, 1/Å without 2π,
laboratory frame, q = hkl @ A; null when blank), ``quaternion`` (w, x, y, z), ``scale``, and one list
per field of :data:`streaming.simulator.stills.SPOT_DTYPE` named ``spot_<field>``: ``spot_h``,
``spot_k``, ``spot_l``, ``spot_x``, ``spot_y`` (px from the first pixel's outer corner), ``spot_photons``
(expected on the frame), ``spot_partiality``, ``spot_intensity`` (true full intensity), ``spot_masked``.
The file's metadata key ``nearline`` holds settings and detector header as JSON.

When fewer unique frames than sent frames were made, frame i of the series is row i modulo the
number of rows.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import RunNotFound
from streaming.simulator.stills import SPOT_DTYPE, FrameTruth

__all__ = ["Truth", "read_truth", "write_truth"]

_METADATA_KEY = b"nearline"


@dataclass(frozen=True)
class Truth:
    """The truth of a series: frames in order, and what they were made with.

    ``truth[i]`` is the truth of frame i of the series, also where the frames were cycled.
    """

    frames: Sequence[FrameTruth]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> FrameTruth:
        return self.frames[index % len(self.frames)]

    @property
    def is_hit(self) -> np.ndarray:
        """(unique frame,), bool."""
        return np.array([frame.is_hit for frame in self.frames], bool)


def write_truth(path: str | os.PathLike[str], frames: Sequence[FrameTruth], metadata: dict[str, Any]) -> Path:
    """Write the truth beside its place, then rename; returns the path."""
    path = Path(path)
    columns: dict[str, pa.Array] = {
        "frame_index": pa.array([frame.index for frame in frames], pa.int64()),
        "is_hit": pa.array([frame.is_hit for frame in frames], pa.bool_()),
        "A": _numbers([frame.A.reshape(-1) if frame.is_hit else None for frame in frames]),
        "quaternion": _numbers([frame.quaternion if frame.is_hit else None for frame in frames]),
        "scale": pa.array([frame.scale for frame in frames], pa.float64()),
    }
    offsets = pa.array(np.cumsum([0, *(len(frame.spots) for frame in frames)]), pa.int32())
    spots = np.concatenate([np.empty(0, SPOT_DTYPE), *(frame.spots for frame in frames)])
    for name in SPOT_DTYPE.names or ():
        columns[f"spot_{name}"] = pa.ListArray.from_arrays(offsets, pa.array(spots[name]))
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part)
    part.replace(path)
    return path


def read_truth(path: str | os.PathLike[str]) -> Truth:
    """The truth that ``write_truth`` wrote.

    Raises
    ------
    RunNotFound : there is no such file.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise RunNotFound(f"no truth file at {path}; simulate with a truth path first") from error
    rows = table.select(["frame_index", "is_hit", "A", "quaternion", "scale"]).to_pylist()
    fields = {name: table[f"spot_{name}"].combine_chunks() for name in SPOT_DTYPE.names or ()}
    offsets = fields["h"].offsets.to_numpy()
    spots = np.empty(int(offsets[-1]) if len(offsets) else 0, SPOT_DTYPE)
    for name, lists in fields.items():
        spots[name] = lists.values.to_numpy(zero_copy_only=False)
    frames = [_frame(row, spots[offsets[i] : offsets[i + 1]]) for i, row in enumerate(rows)]
    return Truth(frames, json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}")))


def _frame(row: dict[str, Any], spots: np.ndarray) -> FrameTruth:
    A = np.array(row["A"] or [np.nan] * 9).reshape(3, 3)
    quaternion = np.array(row["quaternion"] or [np.nan] * 4)
    return FrameTruth(row["frame_index"], row["is_hit"], A, quaternion, row["scale"], spots)


def _numbers(rows: list[Any]) -> pa.Array:
    return pa.array([None if row is None else row.tolist() for row in rows], pa.list_(pa.float64()))
