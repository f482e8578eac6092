"""Simulated frames for all benchmarks, and finished runs made of them."""

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np

from storage.codec import decode
from storage.errors import NearlineError
from storage.frame import FrameInfo, RawFrame, blob_crc32c, blob_digest
from storage.models import RunHeader, StreamHeader
from storage.run_folder import RunFolder
from storage.stream_store import StreamStore
from streaming.simulator import FrameTruth, SimulatorSettings, StillPhysics, StillSimulator, make_frames

__all__ = [
    "EXPERIMENT",
    "METADATA",
    "SMALL_BLOBS",
    "SOURCE",
    "FrameSet",
    "FramesLost",
    "Options",
    "WorkFolder",
    "Workload",
    "open_store",
    "raw_frames",
    "stored_run",
]

EXPERIMENT, SOURCE = "bench", "eiger"


class FramesLost(NearlineError):
    """A series did not come through whole: the figures would mean nothing."""


# A row of 1 kB as beamline controls send one: numbers by name, a trace, a remark.
METADATA: dict[str, Any] = {
    "sample": "lysozyme", "energy": 12_000.0, "transmission": 0.25, "i0": 0.9731, "is_shutter_open": True,
    "motors": {name: 0.125 * number for number, name in enumerate(("x", "y", "z", "omega", "kappa", "phi"))},
    "trace": [round(0.001 * i * i, 6) for i in range(40)],
    "remark": "r" * 480,
}  # fmt: skip
SMALL_BLOBS = [msgspec.msgpack.encode(METADATA)]


@dataclass(frozen=True)
class Workload:
    """Which frames a benchmark sends; frame i of a series is unique frame i % n_unique."""

    size: str = "4M"
    dtype: Literal["uint16", "uint32"] = "uint16"
    n_unique: int = 32

    def frames(self) -> "FrameSet":
        return FrameSet.make(self.size, self.n_unique, self.dtype)


@dataclass(frozen=True)
class Options:
    """How much is measured, and where.

    size : of the detector, see `streaming.simulator`. folder : on the disk to be measured.
    quick : fewer frames and rounds, to see that it works.
    """

    folder: Path
    size: str = "4M"
    quick: bool = False

    def choose(self, quick: int, normal: int) -> int:
        """A count by thoroughness."""
        return quick if self.quick else normal


class WorkFolder:
    """An empty folder that is gone afterwards."""

    def __init__(self, options: Options, name: str) -> None:
        self._path = options.folder / name

    def __enter__(self) -> Path:
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir(parents=True)
        return self._path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


@dataclass(frozen=True)
class FrameSet:
    """Some unique frames, compressed, with their truth; frame i of a run is unique frame i % n."""

    simulator: StillSimulator
    blobs: list[bytes]
    truths: list[FrameTruth]

    @classmethod
    @cache
    def make(
        cls, size: str, n_unique: int, dtype: Literal["uint16", "uint32"] = "uint16", weaker: float = 1.0, seed: int = 0
    ) -> "FrameSet":
        """The same frames every time, each a hit by the toss of a coin; made once per process.

        weaker : factor by which spots are fainter than usual.
        """
        strength = StillPhysics().spot_strength / weaker
        settings = SimulatorSettings(size=size, dtype=dtype, n_frames=n_unique, spot_strength=strength, seed=seed)
        simulator = settings.simulator()
        return cls(simulator, *make_frames(simulator, n_unique))

    @property
    def shape(self) -> tuple[int, int]:
        return self.simulator.shape

    @property
    def dtype(self) -> str:
        return self.simulator.dtype

    @property
    def decoded_bytes(self) -> int:
        """Of one frame."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def blob(self, index: int) -> bytes:
        return self.blobs[index % len(self.blobs)]

    def pixels(self, index: int) -> np.ndarray:
        return decode(self.blob(index), self.shape, self.dtype)

    def first(self, *, is_hit: bool) -> int:
        """Index of the first hit (of average strength or more) or blank."""
        fits = [t for t in self.truths if t.is_hit == is_hit and (t.scale >= 1 or not is_hit)]
        return fits[0].index

    def hit_share(self, n_frames: int) -> str:
        """Hits over all frames of a run of n, in words."""
        n_hits = sum(self.truths[i % len(self.truths)].is_hit for i in range(n_frames))
        return f"{100 * n_hits / n_frames:.0f} % hits"

    def total_bytes(self, n_frames: int) -> int:
        """Compressed bytes of a run of n frames."""
        return sum(len(self.blob(i)) for i in range(n_frames))

    def header(self, run: int, n_frames: int, frames_per_chunk: int) -> StreamHeader:
        return StreamHeader(
            experiment=EXPERIMENT,
            run=run,
            data_source=SOURCE,
            shape=self.shape,
            dtype=self.dtype,
            frames_per_chunk=frames_per_chunk,
            planned=n_frames,
            detector=self.simulator.header,
        )


def raw_frames(frames: FrameSet, start: int, stop: int) -> list[RawFrame]:
    """Frames ``start <= frame_index < stop`` as the recorder hands them to the store."""
    found = []
    for index in range(start, stop):
        blob = frames.blob(index)
        info = FrameInfo(frame_index=index, size_bytes=len(blob), crc32c=blob_crc32c(blob), digest=blob_digest(blob))
        found.append(RawFrame(info, blob))
    return found


def open_store(root: Path, frames: FrameSet, run: int, n_frames: int, frames_per_chunk: int) -> StreamStore:
    """The writer of a new run."""
    folder = RunFolder.create(root, RunHeader(experiment=EXPERIMENT, run=run, started_at=datetime.now(UTC)))
    header = frames.header(run, n_frames, frames_per_chunk)
    return StreamStore.create(folder, header, pixel_mask=frames.simulator.pixel_mask)


def stored_run(root: Path, frames: FrameSet, run: int, n_frames: int, frames_per_chunk: int) -> RunFolder:
    """A finished run of n frames on disk."""
    store = open_store(root, frames, run, n_frames, frames_per_chunk)
    for frame in raw_frames(frames, 0, n_frames):
        store.append(frame.info, frame.blob)
    store.finish(n_frames, "not received")
    store.close()
    store.folder.add_event("run_finished", {"state": "completed", "cause": None, "ledgers": []})
    return store.folder
