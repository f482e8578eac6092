"""What the analysis of a frame costs: kernel by kernel in one thread, and a whole chunk in two."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.frames import FrameSet, Options, WorkFolder, raw_frames
from benchmarks.measure import Figure, clock, figure, interleave, rates
from storage.codec import decode_into
from storage.frame import RawFrame
from storage.models import StreamHeader
from storage.run_folder import ChunkCommit
from tasks.bin_frames import Binner
from tasks.chunk_frames import ChunkFrames, usable_mask
from tasks.find_dispersed_peaks import DispersionFinder, DispersionParams
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.index_frame import Crystal, Indexer
from tasks.integrate_spots import IntegrationParams, integrate_spots
from tasks.predict_spots import predict_spots, profile_radius
from tasks.process_chunk import process_chunk
from tasks.recipe import Recipe, crystallography
from tasks.unit_cell import UnitCell

__all__ = ["N_THREADS", "Verdict", "measure", "measure_sizes", "recipe_for"]

N_THREADS = 2
_FEWEST_PEAKS = 15
# ASAP::O with CrystFEL on an EIGER2 16M, CPU time per frame (DESIGN section 10): another machine, so a scale, no peer.
_PUBLISHED_MS = {"blank": 242.0, "hit": 455.0}


def measure(options: Options) -> list[Figure]:
    return [*_of_frames(options, options.size), *_of_chunk(options, options.size)]


def measure_sizes(options: Options) -> list[Figure]:
    """The same for a small and a large detector."""
    return [one for size in ("1M", "16M") for one in measure(replace(options, size=size))]


def recipe_for(frames: FrameSet) -> Recipe:
    """The crystallography preset with the simulated crystal's cell."""
    return crystallography(_cell(frames))


def _cell(frames: FrameSet) -> UnitCell:
    crystal = frames.simulator.crystal
    return UnitCell(*crystal.cell, crystal.space_group)


class Verdict:
    """From compressed bytes to: blank, or a hit with its lattice and intensities."""

    def __init__(self, frames: FrameSet) -> None:
        simulator = frames.simulator
        self.geometry, self.mask = simulator.geometry, usable_mask(simulator.pixel_mask, simulator.shape, None)
        saturation = simulator.header.saturation_value
        self.find = PeakFinder(self.geometry, self.mask, PeakParams(saturation=saturation))
        self.cell = _cell(frames)
        self.index = Indexer(self.cell, self.geometry.wavelength)
        self.rings = IntegrationParams(saturation=saturation)
        slow, fast = simulator.shape
        corners = self.geometry.scattering_vector(np.array([0, fast, 0, fast]), np.array([0, 0, slow, slow]))
        self.hkl = self.cell.hkl_within(float(np.linalg.norm(corners, axis=-1).max()))
        self.out = np.empty(simulator.shape, simulator.dtype)

    def __call__(self, blob: bytes) -> int:
        """Reflections integrated; 0 for a blank."""
        frame = decode_into(blob, self.out)
        peaks = self.find(frame)
        if len(peaks) < _FEWEST_PEAKS:
            return 0
        q = self.q(peaks)
        return sum(self.integrate(frame, crystal, q) for crystal in self.index(q, peaks["intensity"]))

    def q(self, peaks: np.ndarray) -> np.ndarray:
        return self.geometry.scattering_vector(peaks["x"], peaks["y"])

    def integrate(self, frame: np.ndarray, crystal: Crystal, q: np.ndarray) -> int:
        predicted = predict_spots(
            crystal, self.geometry, profile_radius(crystal, q, self.geometry.wavelength), self.hkl
        )
        return len(integrate_spots(frame, self.mask, predicted, self.geometry, self.rings).reflections)


def _of_frames(options: Options, size: str) -> list[Figure]:
    frames = FrameSet.make(size, 8)
    verdict = Verdict(frames)
    blank, hit = frames.first(is_hit=False), frames.first(is_hit=True)
    dark, bright, blob = frames.pixels(blank), frames.pixels(hit), frames.blob(hit)
    peaks = verdict.find(bright)
    q, copy = verdict.q(peaks), np.empty_like(bright)
    crystals = verdict.index(q, peaks["intensity"])
    if not crystals or verdict(frames.blob(blank)):
        raise RuntimeError(f"the {size} hit was not indexed, or the blank is no blank: nothing to measure")
    saturation = frames.simulator.header.saturation_value
    halves, quarters = (Binner(verdict.mask, factor, saturation) for factor in (2, 4))
    n = options.choose(1, 3)
    t = interleave(
        {
            "memcpy": clock(lambda: np.copyto(copy, bright), n),
            "decode": clock(lambda: decode_into(blob, copy), n),
            "bin 2 × 2": clock(lambda: halves(bright), n),
            "bin 4 × 4": clock(lambda: quarters(bright), n),
            "find_peaks, blank": clock(lambda: verdict.find(dark), n),
            "find_peaks, hit": clock(lambda: verdict.find(bright), n),
            "index, hit": clock(lambda: verdict.index(q, peaks["intensity"]), n),
            "integrate, hit": clock(lambda: verdict.integrate(bright, crystals[0], q), n),
            "bytes to verdict, blank": clock(lambda: verdict(frames.blob(blank)), n),
            "bytes to verdict, hit": clock(lambda: verdict(blob), n),
        },
        options.choose(3, 15),
    )
    milliseconds = {name: [1e3 * s for s in seconds] for name, seconds in t.items()}
    figures = []
    for name, values in milliseconds.items():
        if name == "memcpy":
            continue
        limit = "memcpy" if name.startswith(("decode", "bin")) else "decode"
        of = "memcpy of the frame" if limit == "memcpy" else "decode of the frame"
        figures.append(figure(f"{size} {name}", "ms", values, (of, milliseconds[limit]), higher_is_better=False))
    figures.append(_of_dispersion(options, size, verdict, blob, bright, saturation))
    if size == "16M":
        for kind, published in _PUBLISHED_MS.items():
            limit_name = "published: ASAP::O + CrystFEL, other CPU"
            values = milliseconds[f"bytes to verdict, {kind}"]
            figures.append(
                figure(
                    f"{size} bytes to verdict, {kind}", "ms", values, (limit_name, [published]), higher_is_better=False
                )
            )
    return figures


def _of_dispersion(
    options: Options, size: str, verdict: Verdict, blob: bytes, frame: np.ndarray, saturation: int | None
) -> Figure:
    """The other peak search, by itself: what it holds would push the others' frames out of the processor's cache."""
    find = DispersionFinder(verdict.geometry, verdict.mask, DispersionParams(saturation=saturation))
    out = np.empty_like(frame)
    t = interleave(
        {"decode": clock(lambda: decode_into(blob, out)), "find": clock(lambda: find(frame))}, options.choose(3, 9)
    )
    ms = {name: [1e3 * s for s in seconds] for name, seconds in t.items()}
    limit = ("decode of the frame", ms["decode"])
    return figure(f"{size} find_peaks_dispersion, hit", "ms", ms["find"], limit, higher_is_better=False)


def _of_chunk(options: Options, size: str) -> list[Figure]:
    n = options.choose(16, 64)
    frames = FrameSet.make(size, 16)
    header, mask = frames.header(1, n, n), usable_mask(frames.simulator.pixel_mask, frames.shape, None)
    chunk, recipe = raw_frames(frames, 0, n), recipe_for(frames)
    commit = ChunkCommit(
        chunk=0, start=0, stop=n, ranges=[], n_frames=n, size_bytes=frames.total_bytes(n), digest="0" * 64, epoch=1,
        sealed_at=datetime.now(UTC),
    )  # fmt: skip
    with WorkFolder(options, "analysis") as folder:
        t = interleave(
            {
                "decode": clock(lambda: _decode_all(chunk, header, mask)),
                "chunk": clock(lambda: _process(recipe, commit, chunk, header, mask, folder)),
            },
            options.choose(2, 5),
        )
    limit = (f"decoding the frames, {N_THREADS} threads", rates(n, t["decode"]))
    name = f"{size} process_chunk, {N_THREADS} threads, {frames.hit_share(n)}"
    return [figure(name, "frames/s", rates(n, t["chunk"]), limit, higher_is_better=True)]


def _decode_all(chunk: list[RawFrame], header: StreamHeader, mask: np.ndarray) -> None:
    frames = ChunkFrames(chunk, header, mask, "", n_threads=N_THREADS)
    frames.map(lambda position: frames.unbinned(position).shape)


def _process(
    recipe: Recipe, commit: ChunkCommit, chunk: list[RawFrame], header: StreamHeader, mask: np.ndarray, folder: Path
) -> None:
    # Kept step outputs would be found again.
    shutil.rmtree(folder / "steps", ignore_errors=True)
    process_chunk(recipe, commit, lambda: [[frame] for frame in chunk], header, mask, folder, n_threads=N_THREADS)
