"""A receiver for tests that decodes stream v2 as DECTRIS' example client does.

Independent of our connectors: cbor2 and bitshuffle only.
"""

import struct
import threading
from typing import Any

import bitshuffle
import cbor2
import h5py
import hdf5plugin  # noqa: F401 - registers the filters
import numpy as np
import zmq

TYPED_ARRAYS = {64: "u1", 69: "<u2", 70: "<u4", 85: "<f4"}


def decompress(algorithm: str, element_size: int, data: bytes) -> bytes:
    size, block_bytes = struct.unpack_from(">QI", data)
    if algorithm == "bslz4":
        shape, block = (size // element_size,), block_bytes // element_size
        packed = np.frombuffer(data, np.uint8)[12:]
        return bitshuffle.decompress_lz4(packed, shape, np.dtype(f"u{element_size}"), block).tobytes()
    with h5py.File.in_memory() as file:  # let HDF5's own filter decode the lz4 framing
        chunk = file.create_dataset("x", (size,), "u1", chunks=(size,), compression=32004)
        chunk.id.write_direct_chunk((0,), data)
        return chunk[()].tobytes()


def decode_tag(tag: Any) -> Any:
    if tag.tag in TYPED_ARRAYS:
        return np.frombuffer(tag.value, TYPED_ARRAYS[tag.tag])
    if tag.tag == 40:
        shape, flat = tag.value
        return np.asarray(flat).reshape(shape)
    if tag.tag == 56500:
        return decompress(*tag.value)
    return tag


def tag_hook(first: Any, second: Any) -> Any:
    """cbor2 6 calls hook(tag, immutable), cbor2 5 hook(decoder, tag)."""
    return decode_tag(second if isinstance(second, cbor2.CBORTag) else first)


def decode(message: bytes) -> dict[str, Any]:
    return dict(cbor2.loads(message, tag_hook=tag_hook))


class Receiver(threading.Thread):
    """Connects, and keeps every message until ``n_series`` end messages came."""

    def __init__(self, endpoint: str, n_series: int = 1):
        super().__init__(daemon=True)
        self.endpoint, self.n_series = endpoint, n_series
        self.raw: list[bytes] = []
        self.start()

    def run(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.PULL)
        socket.set(zmq.RCVTIMEO, 30_000)
        socket.connect(self.endpoint)
        n_ended = 0
        try:
            while n_ended < self.n_series:
                self.raw.append(socket.recv())
                n_ended += self.raw[-1][3:].startswith(b"\xa3dtypecend")
        finally:
            socket.close(linger=0)
            context.term()

    def messages(self) -> list[dict[str, Any]]:
        self.join(30)
        assert not self.is_alive(), f"only {len(self.raw)} messages came"
        return [decode(raw) for raw in self.raw]
