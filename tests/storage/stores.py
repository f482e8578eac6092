"""Small streams for the storage tests."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from storage.codec import encode
from storage.frame import FrameInfo, blob_crc32c, blob_digest
from storage.metadata import pack_meta
from storage.models import RunHeader, StreamHeader
from storage.run_folder import RunFolder
from storage.stream_store import StreamStore

SHAPE = (64, 80)


def pixels(index: int, dtype: str = "uint16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(index)
    return rng.integers(0, 200, shape).astype(dtype)


def new_folder(root: Path, run: int = 1) -> RunFolder:
    return RunFolder.create(root, RunHeader(experiment="lyso", run=run, started_at=datetime.now(UTC)))


def new_header(**options) -> StreamHeader:
    fields = {"run": 1, "data_source": "eiger", "shape": SHAPE, "dtype": "uint16", "frames_per_chunk": 4} | options
    return StreamHeader(experiment="lyso", **fields)


def new_store(root: Path, **options) -> StreamStore:
    return StreamStore.create(new_folder(root), new_header(**options))


def row(index: int, blob: bytes, meta: dict | None = None, **fields) -> FrameInfo:
    info = FrameInfo(frame_index=index, size_bytes=len(blob), meta_json=pack_meta(meta or {}), **fields)
    info.crc32c, info.digest = blob_crc32c(blob), blob_digest(blob)
    return info


def frame_of(store: StreamStore, index: int, part: int = 0, **fields) -> tuple[FrameInfo, bytes]:
    """A frame, or part of one, whose pixels follow from its index and part."""
    blob = b""
    if store.header.kind == "frames":
        blob = encode(pixels(index + 1000 * part, store.header.dtype, store.header.shape), store.header.codec)
    return row(index, blob, part=part, meta={"delay": index / 10}, **fields), blob


def put(store: StreamStore, *indices: int, part: int = 0) -> None:
    """Append such frames, one by one."""
    for index in indices:
        store.append(*frame_of(store, index, part))


def put_late(store: StreamStore, *indices: int, part: int = 0) -> None:
    """Keep such frames as late ones."""
    for index in indices:
        store.append_late(*frame_of(store, index, part))


def reopened(store: StreamStore) -> StreamStore:
    """The next service, after this one has died."""
    store.close()
    return StreamStore.recover(RunFolder.open(store.folder.path), store.header.data_source)
