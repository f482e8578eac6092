"""The Zarr v3 metadata of a stream: written as JSON, read back by any Zarr."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from storage.files import replace
from storage.models import StreamHeader

__all__ = ["array_metadata", "frame_codecs", "inner_shape", "write_array_metadata", "write_group"]

_LITTLE_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_AXES = ("z", "y", "x")


def frame_codecs(header: StreamHeader) -> list[dict[str, Any]]:
    """Codecs of one stored frame: as delivered, then the checksum."""
    size = np.dtype(header.dtype).itemsize
    little = _LITTLE_BYTES if size > 1 else {"name": "bytes"}
    if header.codec == "raw":
        return [little, {"name": "crc32c"}]
    return [little, {"name": f"nearline.{header.codec}", "configuration": {"elem_size": size}}, {"name": "crc32c"}]


def array_metadata(header: StreamHeader, n_frames: int) -> dict[str, Any]:
    """``zarr.json`` of ``data``: inner chunk = one frame (or part of one), shard = one chunk of N frames."""
    shape, axes = list(header.array_shape), list(_AXES[3 - len(header.shape) :])
    fill: Any = header.fill_value
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_frames, *shape],
        "data_type": header.dtype,
        "fill_value": "NaN" if isinstance(fill, float) else fill,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [header.frames_per_chunk, *shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": inner_shape(header),
                    "codecs": frame_codecs(header),
                    "index_codecs": [_LITTLE_BYTES, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {},
        "dimension_names": ["frame", *(["part"] if header.parts > 1 else []), *axes],
    }


def inner_shape(header: StreamHeader) -> list[int]:
    """What is compressed as one: a frame, or one of its parts."""
    return [1] * (1 + len(header.array_shape) - len(header.shape)) + list(header.shape)


def write_array_metadata(array: Path, header: StreamHeader, n_frames: int, *, is_synced: bool = True) -> None:
    """Publish the array's present length (by rename: readers see the old or the new one)."""
    content = json.dumps(array_metadata(header, n_frames), indent=1).encode()
    replace(array / "zarr.json", content, is_synced=is_synced)


def write_group(group: Path, attributes: dict[str, Any]) -> None:
    """``zarr.json`` of the group that holds a stream's array and masks."""
    content = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    replace(group / "zarr.json", json.dumps(content, indent=1).encode())
