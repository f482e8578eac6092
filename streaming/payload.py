"""Frames' bytes as message parts, and back."""

from typing import Any

import zmq

from storage.errors import ProtocolError
from storage.frame import FrameInfo
from streaming import wire

__all__ = ["glue_payload", "split_payload"]


def split_payload(infos: list[FrameInfo], parts: list[zmq.Frame]) -> list[Any]:
    """Each frame's bytes out of the payload parts, by the lengths in the rows.

    Raises
    ------
    ProtocolError : the parts do not add up to what the rows say.
    """
    sizes = [info.size_bytes for info in infos]
    if len(parts) == len(infos):
        # The parts themselves, not views of them: ZeroMQ passes its own frames on without a helper thread.
        blobs: list[Any] = list(parts)
    elif len(parts) == 1 and all(0 <= size <= wire.GLUE_BYTES for size in sizes):
        glued, at, blobs = parts[0].buffer, 0, []
        for size in sizes:
            blobs.append(glued[at : at + size])
            at += size
        if at != glued.nbytes:
            raise ProtocolError(f"payload of {glued.nbytes} bytes, but its rows add up to {at}")
    elif not parts and not any(sizes):
        blobs = [b""] * len(infos)
    else:
        raise ProtocolError(f"{len(infos)} rows with {len(parts)} payload parts; send one part for each frame")
    for info, blob in zip(infos, blobs, strict=True):
        if memoryview(blob).nbytes != info.size_bytes:
            raise ProtocolError(
                f"frame {info.frame_index} says {info.size_bytes} bytes, but {memoryview(blob).nbytes} came"
            )
    return blobs


def glue_payload(blobs: list[Any]) -> list[Any]:
    """Payload parts for frames: one part each, or a single one when all are small."""
    n_bytes = sum(memoryview(blob).nbytes for blob in blobs)
    if n_bytes == 0:
        return []
    if len(blobs) > 1 and n_bytes <= wire.GLUE_BYTES:
        return [b"".join(blobs)]
    return blobs
