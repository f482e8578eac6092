"""Pixel mask and flat field of a stream, kept beside its frames in the Zarr group.

Masks are uint32 bit fields as NXmx defines them, nonzero where a pixel must not be used
(bit 0 gap, 1 dead, 8 user, 31 virtual pixel).
"""

from pathlib import Path

import blake3
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from storage.errors import ShapeMismatch
from storage.files import storage_options
from storage.models import StreamHeader

__all__ = ["PLANES", "array_digest", "plane_of_frames", "read_plane", "write_plane"]

PLANES = ("pixel_mask", "flatfield")


def write_plane(group: Path, name: str, plane: np.ndarray, header: StreamHeader) -> None:
    """Keep one plane, such as ``pixel_mask``, in a stream's Zarr group.

    plane : (slow, fast) of a frame, or of one part of it, for which it holds in all frames' parts alike.

    Raises
    ------
    ShapeMismatch : the plane does not cover the stream's frames.
    """
    if plane.shape not in (header.shape, header.image_shape):
        raise ShapeMismatch(
            f"{name} has shape {plane.shape}, but the frames have {header.image_shape}; send one that fits"
        )
    zarr.create_array(
        store=str(group / name),
        data=np.ascontiguousarray(plane),
        chunks=plane.shape,
        # Zstandard alone would decode many a damaged byte to other pixels without a word.
        compressors=[ZstdCodec(), Crc32cCodec()],
        overwrite=True,
    )


def plane_of_frames(plane: np.ndarray | None, header: StreamHeader) -> np.ndarray | None:
    """A plane for whole frames, (slow, fast), also where it was given for one part of them."""
    if plane is None or plane.shape == header.image_shape:
        return plane
    return np.concatenate([plane] * header.parts)


def read_plane(group: Path, name: str) -> np.ndarray | None:
    """The plane of that name, or None where the source sent none; no other array can be had this way."""
    if name not in PLANES or not (group / name / "zarr.json").exists():
        return None
    array = zarr.open_array(str(group / name), mode="r", storage_options=storage_options(group))
    return np.asarray(array[:])


def array_digest(array: np.ndarray | None) -> str:
    """blake3 of dtype, shape and values, hex; empty for no array."""
    if array is None:
        return ""
    array = np.ascontiguousarray(array)
    return blake3.blake3(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()
