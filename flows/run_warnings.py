"""What an experimenter should know of a run under way, in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["ENOUGH_HITS", "HARDLY_INDEXED", "N_RINGS", "RING_WIDTH", "ChunkFigures", "along_the_run", "warnings_of"]

# Chunks looked at as "now", and at least so many before them to compare with.
_RECENT, _BEFORE = 5, 5
# A rate has jumped when that is this unlikely (standard deviations) and it has changed this much.
_SIGMAS, _FACTOR = 5.0, 1.5
# Chunks without a hit, after there have been some.
_BLANK = 5
_SATURATED = 0.01
# Hits of which at least so many should be indexed, and peaks that are more than a crystal gives.
ENOUGH_HITS, HARDLY_INDEXED, _MANY_PEAKS = 50, 0.02, 500
# Looks back along a run: one in so many chunks, and so many at most.
_LOOK_EVERY, _MOST_LOOKS = 5, 400
_MOST_BEFORE = 100
# A level has jumped when it has changed by so many of its own standard deviations, and by this factor.
_LEVEL_FACTOR = 1.3
# Crystals that tell of the beam centre, and how far off it may be, px.
_ENOUGH_CRYSTALS, _OFF_PX = 20, 0.3
# Peaks that tell of rings; a ring holds so large a share of them, and so many times what its neighbourhood does.
_ENOUGH_PEAKS, _RING_SHARE, _RING_FACTOR = 300, 0.1, 6.0
RING_WIDTH = 0.005
N_RINGS = 200
# Å; hexagonal ice, its strongest rings.
_ICE = (3.90, 3.67, 3.44, 2.67, 2.25, 2.07, 1.95, 1.92)
_NEAR_ICE = 0.012


@dataclass(frozen=True)
class ChunkFigures:
    """What is remembered of a chunk."""

    start: int
    stop: int
    n_frames: int
    n_hits: int
    n_indexed: int
    lag_frames: int
    n_reflections: int = 0
    n_saturated: int = 0
    n_peaks: int = 0
    # Counts per pixel around the peaks, the median; NaN without any.
    background: float = math.nan
    # (n, 2) px: of each crystal, where the beam centre is against the assumed one.
    shifts: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    # Which geometry snapshot the shifts are against.
    geometry: int = 0
    # Whether any step looks for lattices.
    seeks_lattices: bool = False
    # (N_RINGS,): peaks between k and k + 1 times RING_WIDTH 1/Å from the beam.
    rings: np.ndarray = field(default_factory=lambda: np.zeros(N_RINGS, np.uint32))


def warnings_of(chunks: Sequence[ChunkFigures], *, seeks_hits: bool = True) -> list[str]:
    """Sentences on what is odd about the newest chunks; none if nothing is.

    seeks_hits : whether any step tells hits from other frames; if none does, their absence is not odd.
    """
    if not chunks:
        return []
    found = [
        _blank(chunks) if seeks_hits else "",
        _unindexed(chunks),
        *_jumps(chunks),
        *_levels(chunks),
        _beam(chunks),
        _ring(chunks),
        _lag(chunks),
        _saturation(chunks),
        _lost(chunks),
    ]
    return [text for text in found if text]


def along_the_run(chunks: Sequence[ChunkFigures], *, seeks_hits: bool = True) -> list[str]:
    """What is odd now, and what was along the run; a change is said once, as it was seen last."""
    step = max(_LOOK_EVERY, -(-len(chunks) // _MOST_LOOKS))
    said: dict[str, str] = {}
    for n in range(step, len(chunks), step):
        for text in warnings_of(chunks[:n], seeks_hits=seeks_hits):
            if " around frame " in text:
                kind = text.partition(" from ")[0]
                said[kind + text.partition(" around frame ")[2].partition(".")[0].partition(":")[0]] = text
    return list(dict.fromkeys([*warnings_of(chunks, seeks_hits=seeks_hits), *said.values()]))


def _blank(chunks: Sequence[ChunkFigures]) -> str:
    last = next((number for number in reversed(range(len(chunks))) if chunks[number].n_hits), None)
    if last is None:
        n_frames = sum(chunk.n_frames for chunk in chunks)
        return f"No hit on any of the {n_frames} frames so far." if len(chunks) >= _BLANK else ""
    return f"No hits since frame {chunks[last].stop}." if len(chunks) - 1 - last >= _BLANK else ""


def _unindexed(chunks: Sequence[ChunkFigures]) -> str:
    """Hits that are no crystals, or not those of the recipe, or not where the geometry has them."""
    recent = [c for c in chunks[-_MOST_BEFORE:] if c.seeks_lattices]
    n_hits, n_indexed, n_peaks = (sum(getattr(c, name) for c in recent) for name in ("n_hits", "n_indexed", "n_peaks"))
    if n_hits < ENOUGH_HITS or n_indexed >= HARDLY_INDEXED * n_hits:
        return ""
    text = f"{n_indexed or 'None'} of {n_hits} hits {'is' if n_indexed < 2 else 'are'} indexed"
    if n_peaks >= _MANY_PEAKS * n_hits:
        return (
            f"{text}, and a hit has {n_peaks / n_hits:.0f} peaks, more than a crystal gives: are they noise? nearline "
            "tune proposes thresholds and a mask."
        )
    return (
        f"{text}: cell, distance, wavelength or beam centre are wrong, or these are no crystals. nearline find-cell "
        "looks without a cell, nearline show at a frame."
    )


def _jumps(chunks: Sequence[ChunkFigures]) -> list[str]:
    if len(chunks) < _RECENT + _BEFORE:
        return []
    window = chunks[-_RECENT - _MOST_BEFORE :]
    starts = [c.start for c in window]
    return [
        _jump("hit rate", [(c.n_hits, c.n_frames) for c in window], starts),
        _jump("indexing rate", [(c.n_indexed, c.n_hits) for c in window], starts),
    ]


def _jump(name: str, counted: list[tuple[int, int]], starts: list[int]) -> str:
    (n, of), (n_now, of_now) = _sum(counted[:-_RECENT]), _sum(counted[-_RECENT:])
    if not of or not of_now or (not n_now and name == "hit rate"):  # that there are none is said already
        return ""
    both = (n + n_now) / (of + of_now)
    error = math.sqrt(both * (1 - both) * (1 / of + 1 / of_now))
    a, b = n / of, n_now / of_now
    if error == 0 or abs(b - a) / error < _SIGMAS or max(a, b) < _FACTOR * min(a, b):
        return ""
    at = _change(np.array([k - both * m for k, m in counted]))
    (n, of), (n_since, of_since) = _sum(counted[:at]), _sum(counted[at:])
    return (
        f"The {name} {'rose' if b > a else 'fell'} from {100 * n / max(of, 1):.1f} % to "
        f"{100 * n_since / max(of_since, 1):.1f} % around frame {starts[at]}."
    )


def _levels(chunks: Sequence[ChunkFigures]) -> list[str]:
    """Numbers of peaks and backgrounds that have changed at once: the beam, the jet or the detector has."""
    if len(chunks) < _RECENT + 2 * _BEFORE:
        return []
    window = chunks[-_RECENT - _MOST_BEFORE :]
    peaks = [(c.start, c.n_peaks / c.n_hits) for c in window if c.n_hits]
    background = [(c.start, c.background) for c in window if not math.isnan(c.background)]
    said = [
        _level("number of peaks per hit", peaks, "look at the beam's intensity and the crystals"),
        _level("background at the peaks", background, "look at beam, jet and beamstop"),
    ]
    return [text for text in said if text]


def _level(name: str, series: list[tuple[int, float]], remedy: str) -> str:
    values = np.array([value for _, value in series])
    before, now = values[:-_RECENT], values[-_RECENT:]
    if len(before) < 2 * _BEFORE:
        return ""
    old, new = float(np.median(before)), float(np.median(now))
    # What five chunks that belong to those before would do: their own spread, as a robust standard deviation.
    spread = 1.4826 * float(np.median(np.abs(before - old)))
    is_far = abs(new - old) > _SIGMAS * max(spread, 1e-9) and bool(np.all((now - old) * (new - old) > 0))
    if not is_far or max(old, new) < _LEVEL_FACTOR * min(old, new):
        return ""
    at = _change(values - values.mean())
    was, since = float(np.median(values[:at])), float(np.median(values[at:]))
    verb, frame = "rose" if new > old else "fell", series[at][0]
    return f"The {name} {verb} from {was:.3g} to {since:.3g} around frame {frame}: {remedy}."


def _change(deviations: np.ndarray) -> int:
    """Where a series changed its level: behind the extreme of its cumulated deviations from the mean (CUSUM).

    E. S. Page, Biometrika 41 (1954) 100. Any later look at the same change finds the same place, which the newest
    chunks do not.
    """
    return 1 + int(np.abs(np.cumsum(deviations)[:-1]).argmax())


def _beam(chunks: Sequence[ChunkFigures]) -> str:
    newest = chunks[-1].geometry
    recent = [c.shifts for c in chunks[-_MOST_BEFORE:] if len(c.shifts) and c.geometry == newest]
    shifts = np.concatenate(recent) if recent else np.empty((0, 2))
    if len(shifts) < _ENOUGH_CRYSTALS:
        return ""
    x, y = np.median(shifts, axis=0)
    if math.hypot(x, y) < _OFF_PX:
        return ""
    return (
        f"The beam centre is off by ({x:+.2f}, {y:+.2f}) px, say {len(shifts)} crystals: nearline refine-detector "
        "gives the recipe to go on with."
    )


def _ring(chunks: Sequence[ChunkFigures]) -> str:
    """Peaks that crowd on one ring are ice, or a powder, or salt."""
    counts = np.sum([chunk.rings for chunk in chunks[-_MOST_BEFORE:]], axis=0, dtype=float)
    total = counts.sum()
    if total < _ENOUGH_PEAKS:
        return ""
    pairs = counts[:-1] + counts[1:]
    at = int(pairs.argmax())
    around = np.concatenate([pairs[max(at - 10, 0) : max(at - 2, 0)], pairs[at + 3 : at + 11]])
    usual = max(float(around.mean()) if len(around) else 0.0, 1.0)
    if pairs[at] < _RING_SHARE * total or pairs[at] < _RING_FACTOR * usual:
        return ""
    middle = float((counts[at] * (at + 0.5) + counts[at + 1] * (at + 1.5)) / pairs[at] * RING_WIDTH)
    d = 1 / middle
    nearest = min(_ICE, key=lambda ice: abs(ice - d))
    text = f"{100 * pairs[at] / total:.0f} % of the peaks lie on a ring at {d:.2f} Å"
    if abs(nearest - d) <= _NEAR_ICE * nearest:
        return f"{text}, where ice diffracts: dry the sample's surroundings, or mask the ring."
    return (
        f"{text}: a powder or salt. Were it ice, its ring is at {nearest:.2f} Å, and distance or wavelength are off by "
        f"{100 * (d / nearest - 1):+.1f} %."
    )


def _lag(chunks: Sequence[ChunkFigures]) -> str:
    lags = [chunk.lag_frames for chunk in chunks[-2 * _RECENT :]]
    if len(lags) < 2 * _RECENT:
        return ""
    early, late = max(lags[:_RECENT]), min(lags[_RECENT:])
    size = max(chunks[-1].stop - chunks[-1].start, 1)
    if late <= early or late < 2 * size:
        return ""
    return f"The analysis falls behind: {lags[-1]} frames, {lags[0]} ten chunks ago. Give it more workers or bin first."


def _saturation(chunks: Sequence[ChunkFigures]) -> str:
    saturated, reflections = (sum(getattr(c, n) for c in chunks[-20:]) for n in ("n_saturated", "n_reflections"))
    total = saturated + reflections
    if not total or saturated / total < _SATURATED:
        return ""
    return f"{100 * saturated / total:.1f} % of reflections are saturated: attenuate the beam."


def _lost(chunks: Sequence[ChunkFigures]) -> str:
    missing = sum(chunk.stop - chunk.start - chunk.n_frames for chunk in chunks[:-1])
    return f"{missing} frames never came; the ledger says which." if missing > 0 else ""


def _sum(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(a for a, _ in pairs), sum(b for _, b in pairs)
