"""Crystallography beside its peers and beside the truth: how fast, and how many crystals are found.

Simulated stills whose truth is known: *1M*, *1M hard* (spots five times weaker, the beam centre off by 0.6 and 0.5 px),
*1M two* (two crystals in each frame), *4M* and *16M*. One thread. The peer of the peak search is OM's compiled
peakfinder8 (see `benchmarks.om_peaks`), on the same decoded frames, in turn with ours; that of all from pixels to a
lattice is DIALS (see `benchmarks.dials_peer`).
"""

import json
import logging
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from benchmarks import dials_peer
from benchmarks.analysis import Verdict, recipe_for
from benchmarks.frames import EXPERIMENT, FrameSet, Options, WorkFolder, stored_run
from benchmarks.measure import Figure, Target, absent, figure, in_rounds
from flows.finding_cell import StillSpots, cell_of_stills
from flows.run_processing import ProcessRequest, run_processing
from storage.codec import decode, decode_into
from storage.geometry import Geometry
from storage.kernels import use_compiled_kernels
from streaming.simulator import FrameTruth
from tasks.find_peaks import PeakFinder, PeakParams
from tasks.index_frame import Crystal, Indexer, IndexParams
from tasks.unit_cell import UnitCell, same_orientation

__all__ = ["BEAM_OFF", "lattices", "measure", "tolerances"]

log = logging.getLogger("benchmarks")

OM_PYTHON = "NEARLINE_OM_PYTHON"
_PEER = "OM 23.8.3"
# Frames below the hit cut are tried as well; a lattice has to be improbable by chance, however few its spots.
_FEWEST_TO_TRY, _FEWEST_OF_HIT = 8, 15
_SURE_SNR, _NEAR_PX, _TRUE_PX = 6.0, 0.2, 2.0
BEAM_OFF = (0.6, 0.5)
# What indexing came to with the peers, asdf and xgandalf alike.
_MOST_OFF_DEG = 0.014
# ms; a hit on 1M, indexamajig with asdf, from file to stream.
_CRYSTFEL_HIT_MS = 178.0
_ROUNDS = 5


def measure(options: Options) -> list[Figure]:
    use_compiled_kernels()
    figures = []
    for size, n, hit_ms, blank_ms in (("1M", 280, 20.0, None), ("4M", 40, 35.0, 7.0), ("16M", 12, None, 30.0)):
        frames = FrameSet.make(size, options.choose(8, n))
        figures += _of_speed(frames, size, hit_ms, blank_ms, options)
        if hit_ms is not None:
            figures.append(_of_writing(frames, size, options))
    n = options.choose(16, 280)
    clean, hard = FrameSet.make("1M", n), FrameSet.make("1M", n, weaker=5.0)
    figures += [_of_threads(clean, options)]
    figures += lattices("1M", clean, (0.0, 0.0))
    figures += lattices("1M hard", hard, BEAM_OFF)
    figures += _of_two_lattices("1M two", clean)
    figures += tolerances(clean)
    figures += _of_what_is_no_such_crystal(clean, options)
    figures += _of_an_unknown_cell(clean)
    # DIALS takes seconds a hit.
    m = options.choose(8, 40)
    for name, weaker, off in (("1M", 1.0, (0.0, 0.0)), ("1M hard", 5.0, BEAM_OFF)):
        figures += dials_peer.figures(name, FrameSet.make("1M", m, weaker=weaker), options, off)
    return figures


# ---- speed, and the same peaks as the peer ------------------------------------------------------------


def _of_speed(
    frames: FrameSet, size: str, hit_ms: float | None, blank_ms: float | None, options: Options
) -> list[Figure]:
    verdict = Verdict(frames)
    blank, hit = ([i for i, t in enumerate(frames.truths) if t.is_hit == kind] for kind in (False, True))
    ours: dict[str, list[float]] = {"blank": [], "hit": [], "decode": []}
    theirs: dict[str, list[float]] = {"convert": [], "fast": [], "full": []}
    verdict(frames.blob(hit[0]))  # compiled
    peaks: list[Any] | None = None
    with WorkFolder(options, "crystallography") as folder, _om(folder, frames, verdict) as ask:
        for _ in in_rounds(options.choose(2, _ROUNDS)):
            ours["blank"].append(_median_ms(lambda i: verdict(frames.blob(i)), blank))
            ours["hit"].append(_median_ms(lambda i: verdict(frames.blob(i)), hit))
            ours["decode"].append(_median_ms(lambda i: decode_into(frames.blob(i), verdict.out), blank))
            if ask is not None and (answer := ask()) is not None:
                peaks = answer["peaks"]
                for stage, seconds in answer["seconds"].items():
                    theirs[stage].append(1e3 * statistics.median(seconds[i] for i in blank))
    figures = []
    for stage, factor in (("fast", 3.0), ("full", 10.0)):
        what = f"{_PEER} {stage}, with decoding and conversion"
        rows = zip(ours["decode"], theirs["convert"], theirs[stage], strict=False)
        limit = (what, [sum(row) for row in rows]) if theirs[stage] else absent(what, f"set {OM_PYTHON}")
        target = Target("of limit", factor)
        figures.append(
            figure(f"{size} blank, bytes to verdict", "ms", ours["blank"], limit, higher_is_better=False, target=target)
        )
    if blank_ms is not None:
        aim = Target("at most", blank_ms)
        figures.append(
            figure(f"{size} blank, bytes to verdict", "ms", ours["blank"], higher_is_better=False, target=aim)
        )
    target_ms = Target("at most", hit_ms) if hit_ms is not None else None
    figures.append(
        figure(f"{size} hit, bytes to intensities", "ms", ours["hit"], higher_is_better=False, target=target_ms)
    )
    if peaks is not None:
        figures += _of_peaks(frames, size, verdict, peaks)
    return figures


def _of_writing(frames: FrameSet, size: str, options: Options) -> Figure:
    """A run of hits and nothing else, one thread, from its opening to its last file: tables, NXmx, CrystFEL stream."""
    is_hit = [truth.is_hit for truth in frames.truths]
    blobs = [blob for blob, keep in zip(frames.blobs, is_hit, strict=True) if keep]
    hits = FrameSet(frames.simulator, blobs, [truth for truth in frames.truths if truth.is_hit])
    n, times = options.choose(10, 100), []
    recipe = recipe_for(frames).model_dump(mode="json")
    with WorkFolder(options, f"crystallography-{size}") as root:
        for number in in_rounds(options.choose(2, _ROUNDS) + 1):
            shutil.rmtree(root / EXPERIMENT, ignore_errors=True)
            folder = stored_run(root, hits, 1, n, 50)
            started = time.perf_counter()
            run_processing(ProcessRequest(run=str(folder.path), recipe=recipe, n_threads=1))
            if number:  # once for nothing
                times.append(1e3 * (time.perf_counter() - started) / n)
    peer = ("measured before: indexamajig, asdf, on 1M", [_CRYSTFEL_HIT_MS])
    target = Target("of limit", 8.0) if size == "1M" else None
    what = f"{size} hit, run to tables, NXmx and .stream on disk"
    return figure(what, "ms", times, peer, higher_is_better=False, target=target)


def _median_ms(work: Any, indices: Sequence[int]) -> float:
    seconds = []
    for index in indices:
        started = time.perf_counter()
        work(index)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def _of_peaks(frames: FrameSet, size: str, verdict: Verdict, peaks: list[Any]) -> list[Figure]:
    """Hits and peaks of both, and how many of the peaks are true."""
    mine = [verdict.find(frames.pixels(i)) for i in range(len(frames.blobs))]
    theirs = [np.array(found).reshape(-1, 3) for found in peaks]
    differ = sum((len(a) >= _FEWEST_OF_HIT) != (len(b) >= _FEWEST_OF_HIT) for a, b in zip(mine, theirs, strict=True))
    distances = np.concatenate([_distances(a[a["snr"] >= _SURE_SNR], b) for a, b in zip(mine, theirs, strict=True)])
    near = 100 * float((distances[distances < _TRUE_PX] <= _NEAR_PX).mean())
    recall = [
        _true_share([np.column_stack([a["x"], a["y"]]) for a in mine], frames.truths),
        _true_share([b[:, :2] for b in theirs], frames.truths),
    ]
    none, most = Target("at most", 0.0), Target("at least", 98.0)
    figures = [
        figure(f"{size} verdicts unlike {_PEER} full", "frames", [float(differ)], higher_is_better=False, target=none),
        figure(f"{size} common peaks within {_NEAR_PX} px", "%", [near], higher_is_better=True, target=most),
    ]
    for at, what in enumerate(("spots of over 20 photons found", "peaks on a true spot")):
        figures.append(
            figure(
                f"{size} {what}", "%", [100 * recall[0][at]], (f"{_PEER} full", [100 * recall[1][at]]),
                higher_is_better=True,
            )
        )  # fmt: skip
    return figures


def _distances(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of each of our peaks to the nearest of theirs, px."""
    if not len(mine) or not len(theirs):
        return np.empty(0)
    return np.hypot(mine["x"][:, None] - theirs[:, 0], mine["y"][:, None] - theirs[:, 1]).min(axis=1)


def _true_share(found: Sequence[np.ndarray], truths: Sequence[FrameTruth]) -> tuple[float, float]:
    """Recall of clear spots, and precision, over all frames."""
    n_clear = n_found = n_peaks = n_true = 0
    for at, truth in zip(found, truths, strict=True):
        n_peaks += len(at)
        if not truth.is_hit or not len(at):
            n_clear += int((_clear(truth)).sum())
            continue
        d = np.hypot(at[:, :1] - truth.spots["x"], at[:, 1:2] - truth.spots["y"])
        n_true += int((d.min(axis=1) < _TRUE_PX).sum())
        clear = _clear(truth)
        n_clear += int(clear.sum())
        n_found += int((d.min(axis=0)[clear] < _TRUE_PX).sum())
    return n_found / max(n_clear, 1), n_true / max(n_peaks, 1)


def _clear(truth: FrameTruth) -> np.ndarray:
    return (truth.spots["photons"] > 20) & (truth.spots["masked"] == 0)


def _of_threads(frames: FrameSet, options: Options) -> Figure:
    """Blanks and hits from bytes to intensities, in two threads beside one."""
    verdict = Verdict(frames)
    indices = range(len(frames.blobs))
    outs = {0: verdict.out, 1: np.empty_like(verdict.out)}

    def work(thread: int, share: range) -> None:
        mine = copy(verdict)
        mine.out = outs[thread]
        for index in share:
            mine(frames.blob(index))

    def rate(n_threads: int) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(work, range(n_threads), (indices[at::n_threads] for at in range(n_threads))))
        return len(indices) / (time.perf_counter() - started)

    one, two = [], []
    rate(2)
    for _ in in_rounds(options.choose(2, _ROUNDS)):
        one.append(rate(1))
        two.append(rate(2))
    name = f"1M, {frames.hit_share(len(indices))}, two threads"
    return figure(name, "frames/s", two, ("one thread", one), higher_is_better=True, target=Target("of limit", 1.8))


@contextmanager
def _om(folder: Path, frames: FrameSet, verdict: Verdict) -> Iterator[Any]:
    """Asks OM for one round over all frames; None where it is not installed."""
    python = os.environ.get(OM_PYTHON)
    if not python:
        yield None
        return
    shape = (len(frames.blobs), *frames.shape)
    kept = np.lib.format.open_memmap(folder / "frames.npy", mode="w+", dtype=frames.dtype, shape=shape)
    for i in range(len(frames.blobs)):
        kept[i] = frames.pixels(i)
    kept.flush()
    np.save(folder / "mask.npy", verdict.mask == 0)
    np.save(folder / "radius.npy", verdict.geometry.radius_px())
    p = verdict.find.params
    settings = {
        "max_peaks": p.max_peaks, "threshold": p.threshold, "min_snr": p.min_snr, "min_pix_count": p.min_pix_count,
        "max_pix_count": p.max_pix_count, "local_bg_radius": p.local_bg_radius,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [python, str(Path(__file__).with_name("om_peaks.py")), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> dict[str, Any] | None:
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                log.warning("%s ended; is ondamonitor installed there?", python)
                return None
            answer: dict[str, Any] = json.loads(line)
            return answer

        yield ask
        process.stdin.close()


# ---- lattices beside the truth ------------------------------------------------------------------------


@dataclass
class _Score:
    n_right: int = 0
    n_wrong: int = 0
    n_wanted: int = 0
    angles: list[float] | None = None

    def figures(self, name: str, least: float | None) -> list[Figure]:
        share = 100 * self.n_right / max(self.n_wanted, 1)
        at_least = Target("at least", least) if least is not None else None
        most_off = Target("at most", _MOST_OFF_DEG) if name == "1M" else None
        angle = statistics.median(self.angles or [float("nan")])
        return [
            figure(f"{name}: lattices found, of {self.n_wanted}", "%", [share], higher_is_better=True, target=at_least),
            figure(
                f"{name}: wrong lattices",
                "",
                [float(self.n_wrong)],
                higher_is_better=False,
                target=Target("at most", 0),
            ),
            figure(f"{name}: median misorientation", "°", [angle], higher_is_better=False, target=most_off),
        ]


def lattices(name: str, frames: FrameSet, beam_off: tuple[float, float]) -> list[Figure]:
    find, index, geometry, cell = _tools(frames, beam_off)
    score = _Score(angles=[])
    for blob, truth in zip(frames.blobs, frames.truths, strict=True):
        score.n_wanted += truth.is_hit
        crystals = _crystals(decode(blob, frames.shape, frames.dtype), find, index, geometry)
        _judge(score, crystals, [truth.A.T] if truth.is_hit else [], cell)
    return score.figures(name, 99.0 if beam_off == (0.0, 0.0) else 95.0)


@dataclass(frozen=True)
class _Fault:
    """What is wrong with cell, geometry or spots, each alone: factors, px, shares."""

    cell: float = 1.0
    beam_off: tuple[float, float] = (0.0, 0.0)
    wavelength: float = 1.0
    spurious: float = 0.0
    n_spots: int | None = None


_FAULTS = {
    "cell 2 % too large": _Fault(cell=1.02),
    "cell 2 % too small": _Fault(cell=0.98),
    "beam centre off by 1 px": _Fault(beam_off=(-0.7, 0.7)),
    "wavelength off by 0.1 %": _Fault(wavelength=1.001),
    "30 % of the peaks spurious": _Fault(spurious=0.3),
    "8 peaks": _Fault(n_spots=8),
    "cell 1 %, beam centre 0.7 px, wavelength and 30 % spurious at once": _Fault(1.01, (0.5, 0.5), 1.001, 0.3),
}


def tolerances(frames: FrameSet) -> list[Figure]:
    """Each fault on the peaks of the clean set: right lattices as a share of the clean set's hits."""
    find, _, _, cell = _tools(frames, (0.0, 0.0))
    hits = [(find(frames.pixels(i)), truth.A.T) for i, truth in enumerate(frames.truths) if truth.is_hit]
    figures = []
    for name, fault in _FAULTS.items():
        score = _Score(n_wanted=len(hits), angles=[])
        geometry = _faulty_geometry(frames, fault)
        edges = [fault.cell * edge for edge in cell.parameters[:3]]
        index = Indexer(cell.with_parameters([*edges, *cell.parameters[3:]]), geometry.wavelength)
        rng = np.random.default_rng(0)
        for peaks, A in hits:
            x, y, intensity = _faulty_spots(peaks, fault, frames.shape, rng)
            _judge(score, index(geometry.scattering_vector(x, y), intensity), [A], cell)
        share = 100 * score.n_right / max(score.n_wanted, 1)
        figures.append(
            figure(f"1M, {name}: lattices found", "%", [share], higher_is_better=True, target=Target("at least", 95.0))
        )
        figures.append(
            figure(
                f"1M, {name}: wrong", "", [float(score.n_wrong)], higher_is_better=False, target=Target("at most", 0)
            )
        )
    return figures


def _faulty_geometry(frames: FrameSet, fault: _Fault) -> Geometry:
    header = frames.simulator.header
    energy = header.incident_energy / fault.wavelength
    wrong = {
        "beam_center_x": header.beam_center_x + fault.beam_off[0],
        "beam_center_y": header.beam_center_y + fault.beam_off[1],
        "incident_energy": energy,
        "incident_wavelength": header.incident_wavelength * fault.wavelength,
    }
    return Geometry.from_header(header.model_copy(update=wrong), frames.shape)


def _faulty_spots(
    peaks: np.ndarray, fault: _Fault, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y px and intensity: some of the peaks, and others that belong to no lattice."""
    kept = peaks if fault.n_spots is None else peaks[rng.permutation(len(peaks))[: fault.n_spots]]
    n_more = round(len(kept) * fault.spurious / (1 - fault.spurious))
    x = np.concatenate([kept["x"], rng.uniform(0, shape[1], n_more)])
    y = np.concatenate([kept["y"], rng.uniform(0, shape[0], n_more)])
    return x, y, np.concatenate([kept["intensity"], rng.choice(kept["intensity"], n_more)])


# Cells of other proteins: lysozyme's spots are no lattice of theirs.
_OTHER_CELLS = (
    (58.4, 58.4, 152.3, 90, 90, 90, "P 41 21 2"),
    (118, 118, 118, 90, 90, 90, "I 2 3"),
    (100, 120, 140, 90, 90, 90, "P 21 21 21"),
    (281, 281, 165, 90, 90, 120, "P 63"),
)


def _of_what_is_no_such_crystal(frames: FrameSet, options: Options) -> list[Figure]:
    """Lattices where there is none: spots at random, 8 to 200 of them, and the hits with other cells."""
    find, index, geometry, _ = _tools(frames, (0.0, 0.0))
    rng, n_random = np.random.default_rng(0), options.choose(30, 3000)
    numbers = np.linspace(8, 200, n_random).astype(int)
    at_random = [rng.uniform(0, 1, (n, 2)) * frames.shape[::-1] for n in numbers]
    found = sum(len(index(geometry.scattering_vector(*xy.T))) for xy in at_random)
    none = Target("at most", 0.0)
    figures = [
        figure(
            f"1M, {n_random} frames of random spots: lattices", "", [float(found)], higher_is_better=False, target=none
        ),
        figure(
            "1M, false lattices a frame of random spots, 95 % confidence: below", "%",
            [100 * float(beta.ppf(0.95, found + 1, n_random - found))], higher_is_better=False,
        ),
    ]  # fmt: skip
    hits = [find(frames.pixels(i)) for i, truth in enumerate(frames.truths) if truth.is_hit]
    for parameters in _OTHER_CELLS:
        cell = UnitCell(*parameters)
        other = Indexer(cell, geometry.wavelength)
        n = sum(len(other(geometry.scattering_vector(p["x"], p["y"]), p["intensity"])) for p in hits)
        what = f"1M, {len(hits)} hits with the cell {' × '.join(f'{edge:g}' for edge in parameters[:3])} Å"
        figures.append(figure(f"{what}: lattices", "", [float(n)], higher_is_better=False, target=none))
    return figures


def _of_an_unknown_cell(frames: FrameSet) -> list[Figure]:
    """The cell from the first 50 hits and nothing else."""
    find, _, geometry, cell = _tools(frames, (0.0, 0.0))
    hits = [i for i, truth in enumerate(frames.truths) if truth.is_hit][:50]
    peaks = {i: find(frames.pixels(i)) for i in hits}
    stills = [
        StillSpots(i, geometry.scattering_vector(p["x"], p["y"]), p["intensity"].astype(float))
        for i, p in peaks.items()
    ]
    started = time.perf_counter()
    report = cell_of_stills(stills, geometry.wavelength)
    seconds = time.perf_counter() - started
    name = f"1M, cell from {len(hits)} hits"
    off = max(abs(a / b - 1) for a, b in zip(report.cell, cell.parameters, strict=True)) if report.cell else 1.0
    return [
        figure(f"{name}: largest error", "%", [100 * off], higher_is_better=False, target=Target("at most", 1.0)),
        figure(f"{name}: took", "s", [seconds], higher_is_better=False),
    ]


def _of_two_lattices(name: str, frames: FrameSet) -> list[Figure]:
    """Frames of two crystals each: the counts of two hits, added."""
    find, index, geometry, cell = _tools(frames, (0.0, 0.0), IndexParams(max_lattices=2))
    hits = [i for i, truth in enumerate(frames.truths) if truth.is_hit]
    score = _Score(angles=[])
    marked = np.iinfo(frames.dtype).max
    for one, other in zip(hits[::2], hits[1::2], strict=False):
        a, b = frames.pixels(one), frames.pixels(other)
        both = np.where((a == marked) | (b == marked), marked, a + b)
        score.n_wanted += 2
        truths = [frames.truths[i].A.T for i in (one, other)]
        _judge(score, _crystals(both, find, index, geometry), truths, cell)
    return score.figures(name, 98.0)


def _tools(
    frames: FrameSet, beam_off: tuple[float, float], params: IndexParams | None = None
) -> tuple[PeakFinder, Indexer, Geometry, UnitCell]:
    header = frames.simulator.header
    moved = {"beam_center_x": header.beam_center_x + beam_off[0], "beam_center_y": header.beam_center_y + beam_off[1]}
    geometry = Geometry.from_header(header.model_copy(update=moved), frames.shape)
    verdict = Verdict(frames)
    find = PeakFinder(geometry, verdict.mask, PeakParams(saturation=header.saturation_value))
    return find, Indexer(verdict.cell, geometry.wavelength, params), geometry, verdict.cell


def _crystals(frame: np.ndarray, find: PeakFinder, index: Indexer, geometry: Geometry) -> list[Crystal]:
    peaks = find(frame)
    if len(peaks) < _FEWEST_TO_TRY:
        return []
    return index(geometry.scattering_vector(peaks["x"], peaks["y"]), peaks["intensity"])


def _judge(score: _Score, crystals: Sequence[Crystal], truths: Sequence[np.ndarray], cell: UnitCell) -> None:
    left = list(truths)
    for crystal in crystals:
        found = [same_orientation(crystal.A, A, cell) for A in left]
        right = [at for at, (is_same, _) in enumerate(found) if is_same]
        if right:
            score.n_right += 1
            assert score.angles is not None
            score.angles.append(found[right[0]][1])
            del left[right[0]]
        else:
            score.n_wrong += 1
