"""DIALS beside ours on the same simulated frames: from pixels to a lattice, how fast, and how many are right.

DIALS searches peaks and indexes in one process of its own (see `benchmarks.dials_frames`), one thread, with the known
cell; its start, and decoding on either side, are not counted. Its settings are the best of those tried on these frames:
with its defaults it misses most spots of a few pixels, and takes three to four times as long to index.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.analysis import Verdict
from benchmarks.frames import FrameSet, Options, WorkFolder
from benchmarks.measure import Figure, Target, absent, figure
from storage.errors import EngineMissing
from storage.geometry import Geometry
from storage.models import DetectorHeader
from tasks.engines import EngineJob, dials_stills
from tasks.engines.dials_stills import DialsParams
from tasks.engines.engine import Child
from tasks.index_frame import Indexer
from tasks.unit_cell import UnitCell, same_orientation

__all__ = ["Found", "ask_dials", "figures"]

_PHIL = (
    "indexing.basis_vector_combinations.max_combinations=100",
    # With its own choice (dispersion_extended, 3 pixels) it finds 0 to 13 of a hit's 100 clear spots here.
    "spotfinder.threshold.algorithm=dispersion",
    "spotfinder.filter.min_spot_size=2",
)
_PARAMS = DialsParams(phil=_PHIL)
_FRAME_SECONDS = 300.0
_FEWEST_OF_HIT = 15


@dataclass(frozen=True)
class Found:
    """What became of one frame: seconds of search and of indexing, and A (3, 3) of each lattice, 1/Å."""

    search_s: float
    index_s: float
    matrices: tuple[np.ndarray, ...]


def figures(name: str, frames: FrameSet, options: Options, beam_off: tuple[float, float] = (0.0, 0.0)) -> list[Figure]:
    """Rows of speed and quality, DIALS as the limit; where it is not installed the rows say so.

    beam_off : px by which the assumed beam centre is wrong.
    """
    verdict, geometry = Verdict(frames), _geometry(frames, beam_off)
    index = Indexer(verdict.cell, geometry.wavelength)
    _ours(verdict, index, geometry, frames.pixels(frames.first(is_hit=True)))  # compiled
    ours = [_ours(verdict, index, geometry, frames.pixels(i)) for i in range(len(frames.blobs))]
    try:
        peer = dials_stills.version()
        theirs = ask_dials(options, frames, geometry, verdict.cell)
    except EngineMissing:
        peer, theirs = "DIALS", None
    hits = [i for i, truth in enumerate(frames.truths) if truth.is_hit]
    figures = []
    for what, chosen, seconds in (
        ("blank, peak search", sorted({*range(len(ours))} - {*hits}), lambda one: one.search_s),
        ("hit, peak search", hits, lambda one: one.search_s),
        ("hit, pixels to lattice", hits, lambda one: one.search_s + one.index_s),
    ):
        limit = absent(peer, "not installed")
        if theirs is not None:
            limit = (peer, [1e3 * seconds(theirs[i]) for i in chosen])
        mine = [1e3 * seconds(ours[i]) for i in chosen]
        figures.append(figure(f"{name} {what}", "ms", mine, limit, higher_is_better=False))
    quality = zip(_judged(ours, frames, verdict.cell), _judged(theirs, frames, verdict.cell), strict=True)
    rows = (
        (f"lattices found, of {len(hits)}", "%", True),
        ("wrong lattices", "", False),
        ("median misorientation", "°", False),
    )
    for (what, unit, higher), (mine, other) in zip(rows, quality, strict=True):
        limit = (
            (peer, [other])
            if theirs is not None and other > 0
            else absent(peer, f"{other:g}" if theirs is not None else "not installed")
        )
        target = Target("at most", 0) if what.startswith("wrong") else None
        figures.append(figure(f"{name}: {what}", unit, [mine], limit, higher_is_better=higher, target=target))
    return figures


def ask_dials(options: Options, frames: FrameSet, geometry: Geometry, cell: UnitCell) -> list[Found]:
    """What DIALS makes of each frame."""
    found = []
    n = len(frames.blobs)
    with WorkFolder(options, "dials") as folder:
        _write(folder, frames, geometry, cell)
        script = str(Path(__file__).with_name("dials_frames.py"))
        command = [dials_stills.dials_python(), script, str(dials_stills.DRIVER), str(folder)]
        with Child("DIALS", command, folder) as child:
            for _ in range(n):
                said = json.loads(child.line(_FRAME_SECONDS))
                answer = dials_stills.read_answer({"why": ""} | said)
                matrices = tuple(lattice.A for lattice in answer.lattices)
                found.append(Found(said["search"], said["index"], matrices))
    return found


def _write(folder: Path, frames: FrameSet, geometry: Geometry, cell: UnitCell) -> None:
    shape = (len(frames.blobs), *frames.shape)
    kept = np.lib.format.open_memmap(folder / "frames.npy", mode="w+", dtype=frames.dtype, shape=shape)
    for i in range(len(frames.blobs)):
        kept[i] = frames.pixels(i)
    kept.flush()
    header = frames.header(1, len(frames.blobs), 1)
    dials_stills.write_job(folder, EngineJob(header, geometry, cell, ()), _PARAMS)
    job = json.loads((folder / "job.json").read_text())
    job["trusted"] = frames.simulator.header.saturation_value
    (folder / "job.json").write_text(json.dumps(job))


def _geometry(frames: FrameSet, beam_off: tuple[float, float]) -> Geometry:
    header: DetectorHeader = frames.simulator.header
    moved = {"beam_center_x": header.beam_center_x + beam_off[0], "beam_center_y": header.beam_center_y + beam_off[1]}
    return Geometry.from_header(header.model_copy(update=moved), frames.shape)


def _ours(verdict: Verdict, index: Indexer, geometry: Geometry, frame: np.ndarray) -> Found:
    at = time.perf_counter()
    peaks = verdict.find(frame)
    searched = time.perf_counter()
    crystals = []
    if len(peaks) >= _FEWEST_OF_HIT:
        crystals = index(geometry.scattering_vector(peaks["x"], peaks["y"]), peaks["intensity"])
    return Found(searched - at, time.perf_counter() - searched, tuple(crystal.A for crystal in crystals))


def _judged(found: list[Found] | None, frames: FrameSet, cell: UnitCell) -> tuple[float, float, float]:
    """Right lattices in % of the hits, wrong ones, and the median angle of the right ones, °."""
    angles: list[float] = []
    n_wrong = 0
    for one, truth in zip(found or [], frames.truths, strict=False):
        for A in one.matrices:
            is_same, angle = same_orientation(A, truth.A.T, cell) if truth.is_hit else (False, 180.0)
            n_wrong += not is_same
            angles += [angle] if is_same else []
    n_hits = sum(truth.is_hit for truth in frames.truths)
    return 100 * len(angles) / max(n_hits, 1), float(n_wrong), statistics.median(angles or [float("nan")])
