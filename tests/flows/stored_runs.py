"""Finished runs on disk, of frames that a test has made."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from storage.frame import FrameInfo, blob_crc32c, blob_digest
from storage.models import RunHeader, StreamHeader
from storage.run_folder import RunFolder
from storage.stream_store import StreamStore
from streaming.simulator import StillSimulator


def store_run(root: Path, simulator: StillSimulator, blobs: Sequence[bytes], frames_per_chunk: int = 20) -> RunFolder:
    """The run lyso/1 with these frames of the simulator's detector."""
    folder = RunFolder.create(root, RunHeader(experiment="lyso", run=1, started_at=datetime.now(UTC)))
    header = StreamHeader(
        experiment="lyso", run=1, data_source="eiger", shape=simulator.shape, dtype=simulator.dtype,
        frames_per_chunk=frames_per_chunk, planned=len(blobs), detector=simulator.header,
    )  # fmt: skip
    store = StreamStore.create(folder, header, pixel_mask=simulator.pixel_mask)
    for i, blob in enumerate(blobs):
        info = FrameInfo(frame_index=i, size_bytes=len(blob), crc32c=blob_crc32c(blob), digest=blob_digest(blob))
        store.append(info, blob)
    store.finish(len(blobs), "not received")
    store.close()
    folder.add_event("run_finished", {"state": "completed", "cause": None, "ledgers": []})
    return folder
