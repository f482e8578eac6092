"""What an experimenter should know of a run under way, in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ChunkFigures", "warnings_of"]

# Chunks looked at as "now", and at least so many before them to compare with.
_RECENT, _BEFORE = 5, 5
# A rate has jumped when that is this unlikely (standard deviations) and it has changed this much.
_SIGMAS, _FACTOR = 5.0, 1.5
# Chunks without a hit, after there have been some.
_BLANK = 5
_SATURATED = 0.01
_MOST_BEFORE = 100


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


def warnings_of(chunks: Sequence[ChunkFigures], *, seeks_hits: bool = True) -> list[str]:
    """Sentences on what is odd about the newest chunks; none if nothing is.

    seeks_hits : whether any step tells hits from other frames; if none does, their absence is not odd.
    """
    if not chunks:
        return []
    found = [_blank(chunks) if seeks_hits else "", *_jumps(chunks), _lag(chunks), _saturation(chunks), _lost(chunks)]
    return [text for text in found if text]


def _blank(chunks: Sequence[ChunkFigures]) -> str:
    last = next((number for number in reversed(range(len(chunks))) if chunks[number].n_hits), None)
    if last is None:
        n_frames = sum(chunk.n_frames for chunk in chunks)
        return f"No hit on any of the {n_frames} frames so far." if len(chunks) >= _BLANK else ""
    return f"No hits since frame {chunks[last].stop}." if len(chunks) - 1 - last >= _BLANK else ""


def _jumps(chunks: Sequence[ChunkFigures]) -> list[str]:
    if len(chunks) < _RECENT + _BEFORE:
        return []
    now, before = chunks[-_RECENT:], chunks[-_RECENT - _MOST_BEFORE : -_RECENT]
    rates = [
        ("hit rate", [(c.n_hits, c.n_frames) for c in before], [(c.n_hits, c.n_frames) for c in now]),
        ("indexing rate", [(c.n_indexed, c.n_hits) for c in before], [(c.n_indexed, c.n_hits) for c in now]),
    ]
    return [_jump(name, _sum(old), _sum(new), now[0].start) for name, old, new in rates]


def _jump(name: str, old: tuple[int, int], new: tuple[int, int], frame: int) -> str:
    if not old[1] or not new[1] or (not new[0] and name == "hit rate"):  # that there are none is said already
        return ""
    a, b = old[0] / old[1], new[0] / new[1]
    both = (old[0] + new[0]) / (old[1] + new[1])
    error = math.sqrt(both * (1 - both) * (1 / old[1] + 1 / new[1]))
    if error == 0 or abs(b - a) / error < _SIGMAS or max(a, b) < _FACTOR * min(a, b):
        return ""
    return f"The {name} {'rose' if b > a else 'fell'} from {100 * a:.1f} % to {100 * b:.1f} % around frame {frame}."


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
