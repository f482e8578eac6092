"""Simulate a series from settings to the last message: make frames, compress, send, keep the truth."""

import itertools
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator

from storage.codec import encode
from streaming.simulator.crystal import LYSOZYME_CELL, LYSOZYME_SPACE_GROUP, SimulatedCrystal
from streaming.simulator.dectris import (
    DectrisStreamSender,
    PreparedImage,
    Progress,
    SenderSettings,
    finish,
    nearline_user_data,
    send_images,
)
from streaming.simulator.stills import FrameTruth, StillPhysics, StillSimulator, default_detector
from streaming.simulator.truth import write_truth

__all__ = ["SENSOR_SIZES", "SeriesSent", "SimulatorSettings", "make_frames", "map_ahead", "simulate"]

# (slow, fast) px; all but the first are EIGER2 detectors.
SENSOR_SIZES = {
    "512": (512, 512),
    "1M": (1062, 1028),
    "4M": (2162, 2068),
    "9M": (3262, 3108),
    "16M": (4362, 4148),
}

Item = TypeVar("Item")
Result = TypeVar("Result")


class SimulatorSettings(SenderSettings):
    """A simulated series: the detector, the crystals, and how the frames are sent."""

    size: str = Field("4M", description="512, 1M, 4M, 9M, 16M, or SLOWxFAST in px, e.g. 1024x768")
    dtype: Literal["uint16", "uint32"] = Field("uint16", description="dtype of the frames")
    n_frames: int = Field(300, ge=1, description="frames per series")
    unique_frames: int | None = Field(
        None, ge=1, description="frames really made, cycled to n_frames; they stay in memory. None: at most 300"
    )
    hit_fraction: float = Field(0.5, ge=0, le=1, description="share of frames that show a crystal")
    seed: int = Field(0, ge=0, description="another seed gives other orientations, noise and bad pixels")
    crystal_seed: int = Field(0, ge=0, description="another crystal seed gives another structure, other intensities")
    cell: tuple[float, float, float, float, float, float] = Field(
        LYSOZYME_CELL, description="a, b, c in Å, alpha, beta, gamma in degrees"
    )
    space_group: str = Field(LYSOZYME_SPACE_GROUP, description="Hermann-Mauguin name")
    bijvoet: float = Field(0.0, ge=0, le=1, description="rms of (I+ - I-) / mean I of acentric reflections")
    spot_strength: float = Field(
        StillPhysics().spot_strength, ge=0, description="photons of a mean full reflection at low resolution"
    )
    background: float = Field(
        StillPhysics().background, ge=0, description="photons per pixel on the crest of the water ring"
    )
    gaps: bool = Field(True, description="gaps between modules")
    polarisation: float | None = Field(
        None, ge=0, le=1, description="horizontally polarised fraction, e.g. 0.99; None: no polarisation"
    )
    parallax: bool = Field(False, description="spots move outward by their path in the sensor")
    energy: float = Field(12_000.0, gt=1000, description="photon energy, eV")
    distance: float | None = Field(None, gt=0, description="m; None: about 2 Å at the edge of a 4M")
    frame_time: float | None = Field(None, gt=0, description="s, as announced; None: 1 / rate, or 7.5 ms")
    truth: Path | None = Field(None, description="where to write the truth (Parquet); None: nowhere")
    threads: int | None = Field(None, ge=1, description="threads that make frames; None: one per core")

    @field_validator("size")
    @classmethod
    def _known_size(cls, size: str) -> str:
        if size not in SENSOR_SIZES and not re.fullmatch(r"\d+x\d+", size):
            raise ValueError(f"size {size!r} is none of {', '.join(SENSOR_SIZES)} and not SLOWxFAST such as 1024x768")
        return size

    @property
    def shape(self) -> tuple[int, int]:
        """(slow, fast), px."""
        if self.size in SENSOR_SIZES:
            return SENSOR_SIZES[self.size]
        slow, fast = self.size.split("x")
        return int(slow), int(fast)

    @property
    def n_unique(self) -> int:
        """Frames that are made and kept in memory; frame i of the series is unique frame i % n_unique."""
        return min(self.n_frames, self.unique_frames or 300)

    def simulator(self) -> StillSimulator:
        """The frames these settings describe, without sending them anywhere."""
        frame_time = self.frame_time or (1 / self.rate if self.rate else 0.0075)
        detector = default_detector(
            self.shape, self.dtype, energy=self.energy, frame_time=frame_time, distance=self.distance
        )
        crystal = SimulatedCrystal(self.cell, self.space_group, self.crystal_seed, bijvoet=self.bijvoet)
        physics = StillPhysics(
            hit_fraction=self.hit_fraction,
            spot_strength=self.spot_strength,
            background=self.background,
            polarisation=self.polarisation,
            parallax=self.parallax,
            gaps=self.gaps,
        )
        return StillSimulator(self.shape, self.dtype, detector, crystal, physics, self.seed)


@dataclass(frozen=True, slots=True)
class SeriesSent:
    """What was sent, once every message has left for the receiver."""

    endpoint: str
    n_series: int
    n_frames: int
    n_bytes: int
    seconds: float
    series_unique_ids: tuple[str, ...]


def simulate(
    settings: SimulatorSettings,
    progress: Progress | None = None,
    *,
    stop: threading.Event | None = None,
    on_bound: Callable[[str], None] | None = None,
) -> SeriesSent:
    """Make the frames, write the truth, and send the series ``settings.repeat`` times.

    Parameters
    ----------
    progress : called with (stage, done, total); stages are "making frames", "sending", and a sentence
        with (0, 0) whenever the sender has to wait.
    stop : looked at between frames; when set, the series ends early with its end message, as after a
        detector's cancel.
    on_bound : called with the bound endpoint before anything is sent; for port * and tests.

    Raises
    ------
    ServiceUnavailable : the port is taken, or no receiver came within ``receiver_timeout``.
    """
    tell = progress or (lambda stage, done, total: None)
    simulator = settings.simulator()
    with DectrisStreamSender(
        settings.bind,
        high_water_mark=settings.high_water_mark,
        receiver_timeout=settings.receiver_timeout,
        report=lambda sentence: tell(sentence, 0, 0),
    ) as sender:
        if on_bound is not None:
            on_bound(sender.endpoint)
        blobs, truths = make_frames(simulator, settings.n_unique, threads=settings.threads, progress=progress)
        if settings.truth is not None:
            write_truth(settings.truth, truths, truth_metadata(settings, simulator))
        sender.wait_for_receiver()
        return _send_repeatedly(sender, settings, simulator, blobs, progress, stop)


def make_frames(
    simulator: StillSimulator, n_frames: int, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[list[bytes], list[FrameTruth]]:
    """Frames 0 to n_frames compressed as bslz4, and their truth; made in threads, the same in any number."""

    def make(index: int) -> tuple[bytes, FrameTruth]:
        array, truth = simulator.frame(index)
        return encode(array), truth

    simulator.frame(0)  # fills the tables and compiles, which the threads would otherwise all do
    blobs, truths = [], []
    for blob, truth in map_ahead(make, range(n_frames), threads=threads):
        blobs.append(blob)
        truths.append(truth)
        if progress is not None:
            progress("making frames", len(blobs), n_frames)
    return blobs, truths


def truth_metadata(settings: SimulatorSettings, simulator: StillSimulator) -> dict[str, Any]:
    """What the truth file says beside the frames."""
    return {
        "settings": settings.model_dump(mode="json"),
        "detector": simulator.header.model_dump(mode="json"),
        "cell": list(settings.cell),
        "space_group": settings.space_group,
        "shape": list(simulator.shape),
        "wavelength": simulator.geometry.wavelength,
    }


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None
) -> Iterator[Result]:
    """``map`` in threads, in order, at most two results per thread ahead of the reader."""
    workers = threads or os.cpu_count() or 1
    items = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="frames") as pool:
        pending = deque(pool.submit(function, item) for item in itertools.islice(items, 2 * workers))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def _send_repeatedly(
    sender: DectrisStreamSender,
    settings: SimulatorSettings,
    simulator: StillSimulator,
    blobs: list[bytes],
    progress: Progress | None,
    stop: threading.Event | None,
) -> SeriesSent:
    prepared: list[PreparedImage] = []
    unique_ids, n_sent, started = [], 0, time.monotonic()
    for series in range(settings.repeat):
        if stop is not None and stop.is_set():
            break
        run = None if settings.run is None else settings.run + series
        sender.send_start(
            simulator.header,
            simulator.shape,
            settings.dtype,
            settings.n_frames,
            series_id=settings.series_id + series,
            header_detail=settings.header_detail,
            pixel_mask=simulator.pixel_mask,
            flatfield=np.ones(simulator.shape, np.float32),
            user_data=nearline_user_data(settings.experiment, run, settings.sample) or "",
        )
        unique_ids.append(sender.series_unique_id)
        if not prepared:
            prepared = [sender.prepare_image(blob) for blob in blobs]
            blobs.clear()
            started = time.monotonic()
        images = ((i, prepared[i % len(prepared)], None) for i in _until(stop, settings.n_frames))
        n_sent += send_images(sender, images, rate=settings.rate, total=settings.n_frames, progress=progress)
        sender.send_end()
    finish(sender)
    seconds = time.monotonic() - started
    return SeriesSent(sender.endpoint, len(unique_ids), n_sent, sender.n_bytes_sent, seconds, tuple(unique_ids))


def _until(stop: threading.Event | None, n_frames: int) -> Iterator[int]:
    for index in range(n_frames):
        if stop is not None and stop.is_set():
            return
        yield index
