"""Alarms in words: what jumps, what crowds on rings, and that steady data raise none."""

import re
from dataclasses import replace

import numpy as np
import pytest

from flows.run_warnings import N_RINGS, RING_WIDTH, ChunkFigures, along_the_run, warnings_of

FRAMES = 100


def steady(
    rng, n, *, hit_rate=0.2, peaks=60.0, background=1.5, shift=(0.0, 0.0), ring=None, start=0, indexing_rate=0.8
):
    """Chunks as a quiet run gives them: everything scatters, nothing changes."""
    found = []
    for k in range(start, start + n):
        hits = int(rng.binomial(FRAMES, hit_rate))
        n_peaks = int(rng.poisson(peaks * rng.lognormal(0, 0.1) * hits)) if hits else 0
        q = rng.uniform(0.03, 0.5, n_peaks) ** (2 / 3)
        if ring is not None:
            q[: n_peaks // 4] = 1 / ring + rng.normal(0, 0.001, n_peaks // 4)
        counts = np.bincount((q[q < 1] / RING_WIDTH).astype(int), minlength=N_RINGS)[:N_RINGS].astype(np.uint32)
        crystals = int(rng.binomial(hits, indexing_rate))
        found.append(
            ChunkFigures(
                FRAMES * k, FRAMES * (k + 1), FRAMES, hits, crystals, 0, n_peaks=n_peaks,
                background=float(background * rng.lognormal(0, 0.03)), shifts=rng.normal(shift, 0.1, (crystals, 2)),
                rings=counts, seeks_lattices=True,
            )
        )  # fmt: skip
    return found


def test_steady_runs_raise_no_alarm():
    """One in a thousand looks at most, over 20 runs that are looked at after each of 60 chunks."""
    rng, n_looks, alarms = np.random.default_rng(0), 0, []
    for _ in range(20):
        figures = steady(rng, 60)
        for n in range(1, 61):
            n_looks += 1
            alarms += warnings_of(figures[:n])
    assert len(alarms) <= n_looks / 1000, alarms


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hit_rate": 0.05}, "hit rate fell"),
        ({"peaks": 20.0}, "number of peaks per hit fell"),
        ({"background": 3.0}, "background at the peaks rose from 1.4"),
        ({"indexing_rate": 0.3}, "indexing rate fell"),
    ],
    ids=["hits", "peaks", "background", "indexing"],
)
def test_a_jump_is_said_with_the_frame_it_began_at(changed, said):
    """Also at every later look, when the newest chunks are long past it."""
    rng = np.random.default_rng(1)
    figures = steady(rng, 30) + steady(rng, 10, start=30, **changed)
    looks = [[text for text in warnings_of(figures[:n]) if said in text] for n in range(35, 41)]
    assert [len(texts) for texts in looks] == [1] * 6
    frames = {int(re.search(r"around frame (\d+)", texts[0])[1]) for texts in looks}
    assert all(abs(frame - 3000) <= 2 * FRAMES for frame in frames)
    assert len(frames) <= 2


def test_a_slow_drift_is_no_jump():
    rng = np.random.default_rng(2)
    figures = [steady(rng, 1, background=1.5 + 0.01 * k, start=k)[0] for k in range(40)]
    assert warnings_of(figures) == []


def test_a_beam_centre_that_is_off_is_said():
    (text,) = warnings_of(steady(np.random.default_rng(3), 10, shift=(0.6, -0.5)))
    assert re.match(r"The beam centre is off by \(\+0\.(59|6\d), -0\.(49|5\d)\) px", text)
    assert "refine-detector" in text


def test_a_beam_centre_that_was_refined_meanwhile_is_no_alarm():
    rng = np.random.default_rng(4)
    before = steady(rng, 20, shift=(0.6, -0.5))
    behind = [replace(one, geometry=1) for one in steady(rng, 3, start=20)]
    assert warnings_of([*before, *behind]) == []


@pytest.mark.parametrize(
    ("ring", "said"),
    [
        (3.67, "where ice diffracts"),
        (3.50, "Were it ice, its ring is at 3.44 Å, and distance or wavelength are off by +1."),
        (2.80, "a powder or salt"),
    ],
)
def test_peaks_on_one_ring_are_ice_or_tell_of_the_geometry(ring, said):
    (text,) = warnings_of(steady(np.random.default_rng(4), 12, ring=ring))
    assert said in text
    assert float(re.search(r"on a ring at ([\d.]+) Å", text)[1]) == pytest.approx(ring, abs=0.015)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"indexing_rate": 0.0}, r"None of \d+ hits is indexed: cell, distance, .* nearline find-cell"),
        (
            {"indexing_rate": 0.0, "peaks": 900.0},
            r"None of \d+ hits is indexed, and a hit has \d\d\d peaks.* nearline tune",
        ),
    ],
)
def test_hits_that_are_hardly_ever_indexed_are_said(changed, said):
    figures = steady(np.random.default_rng(5), 6, **changed)
    (text,) = warnings_of(figures)
    assert re.match(said, text)
    assert warnings_of([replace(one, seeks_lattices=False) for one in figures]) == []
    assert warnings_of(figures[:1]) == []


def test_what_changed_long_ago_is_still_said_once():
    def chunks(n, hits, first=0):
        return [ChunkFigures(100 * i, 100 * i + 100, 100, hits, hits // 2, 0) for i in range(first, first + n)]

    said = [text for text in along_the_run(chunks(60, 10) + chunks(340, 40, first=60)) if "hit rate" in text]
    assert len(said) == 1
    assert "around frame 6000" in said[0]
    assert along_the_run(chunks(400, 20)) == []
