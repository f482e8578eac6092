"""Zarr v3 codecs that let plain Zarr read a detector's own bytes.

Zarr finds them by entry point, or because importing this module registers them; a bare clone
needs only the import. There is no standard name for bitshuffle + LZ4 with HDF5's head.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from zarr.abc.codec import BytesBytesCodec
from zarr.registry import register_codec

from storage.codec import decode, encode

__all__ = ["Bslz4", "Lz4"]


@dataclass(frozen=True)
class _DetectorCodec(BytesBytesCodec):
    """Bytes as a detector delivers them; ``elem_size`` is the pixel's size in bytes."""

    elem_size: int = 1

    is_fixed_size = False
    codec_name = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        return {"name": f"nearline.{self.codec_name}", "configuration": {"elem_size": self.elem_size}}

    # The parameter's name is part of the interface: newer versions pass it by keyword.
    def evolve_from_array_spec(self, array_spec: Any) -> Self:
        return replace(self, elem_size=_item_size(array_spec))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        raise NotImplementedError(f"the size of a {self.codec_name} frame is known after compressing it")

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        blob = chunk_bytes.as_numpy_array()
        dtype = np.dtype(f"u{self.elem_size}")
        out = decode(blob, tuple(chunk_spec.shape), dtype, self.codec_name)
        return chunk_spec.prototype.buffer.from_array_like(out.reshape(-1).view(np.uint8))

    def _encode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        pixels = chunk_bytes.as_numpy_array().view(np.dtype(f"u{self.elem_size}"))
        blob = encode(pixels, self.codec_name)
        return chunk_spec.prototype.buffer.from_array_like(np.frombuffer(blob, np.uint8))

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return self._decode_sync(chunk_bytes, chunk_spec)

    async def _encode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return self._encode_sync(chunk_bytes, chunk_spec)


@dataclass(frozen=True)
class Bslz4(_DetectorCodec):
    """``nearline.bslz4``: bitshuffle + LZ4 as in HDF5 filter 32008."""

    codec_name = "bslz4"


@dataclass(frozen=True)
class Lz4(_DetectorCodec):
    """``nearline.lz4``: LZ4 blocks as in HDF5 filter 32004."""

    codec_name = "lz4"


def _item_size(array_spec: Any) -> int:
    dtype = array_spec.dtype
    size = getattr(dtype, "item_size", None)
    return int(size) if size else int(dtype.to_native_dtype().itemsize)


register_codec("nearline.bslz4", Bslz4)
register_codec("nearline.lz4", Lz4)
