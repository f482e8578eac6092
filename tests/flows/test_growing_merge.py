"""Merging while measuring: crystals come chunk by chunk, and are scaled together as they become more."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from flows import growing_merge
from flows.criteria import Quantity
from flows.forecasting import History
from flows.growing_merge import ChunkReflections, GrowingMerge, join_chunks
from flows.observed_reflections import observed_reflections
from storage.errors import DamagedOutput
from storage.step_store import StepStore
from streaming.simulator.crystal import SimulatedCrystal
from tasks.join_crystals import join_crystals
from tasks.merge_crystals import MergeSums, merge_statistics, unique_reflections
from tasks.observations import gather_observations
from tasks.unit_cell import read_cell
from tests.tasks.still_tables import StillTables

CRYSTAL, D_MIN = SimulatedCrystal(), 3.0
CELL = read_cell(CRYSTAL.cell, CRYSTAL.space_group)
STILLS = StillTables(CRYSTAL, 60, D_MIN, scale_spread=0.7, b_spread=6.0, polarisation=0.99, excitation_error=2e-4)
PER_CHUNK = 6


def sealed(number: int) -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """Ten chunks of six crystals each, in a step store."""
    store, table = StepStore(tmp_path_factory.mktemp("run")), STILLS.table()
    geometry, found = STILLS.simulator.geometry, []
    for number in range(STILLS.n_crystals // PER_CHUNK):
        mine = table["frame_index"] // PER_CHUNK == number
        digest = f"{number:064x}"
        store.save(digest, {"chunk": number}, {"reflections": pa.table({n: c[mine] for n, c in table.items()})})
        found.append(ChunkReflections("lyso/1", number, sealed(number), PER_CHUNK, store, digest, geometry))
    return found


def scaled_at_once(chunks):
    tables = [("lyso/1", observed_reflections(chunk.table(), chunk.geometry)[0]) for chunk in chunks]
    observations = gather_observations(unique_reflections(CELL, D_MIN), tables)
    return merge_statistics(join_crystals(observations).merged())


def test_nothing_is_said_of_a_few_crystals(chunks):
    merge = GrowingMerge(CELL, D_MIN)
    assert merge.statistics([]) is None
    assert merge.statistics(chunks[:3]) is None, "18 crystals"
    assert merge.statistics(chunks[:4]) is not None


def test_as_good_as_a_merge_of_all_and_better_than_a_plain_mean(chunks):
    found = GrowingMerge(CELL, D_MIN).statistics(chunks)
    assert found == scaled_at_once(chunks[: found.n_crystals // PER_CHUNK])
    assert found.n_crystals >= STILLS.n_crystals / growing_merge._GROWTH - PER_CHUNK
    sums = MergeSums(CELL, D_MIN)
    for chunk in chunks:
        table = chunk.table()
        sums.add("lyso/1", {name: table[name].to_numpy() for name in table.column_names})
    assert found.cc_half > merge_statistics(sums).cc_half + 0.02


def test_whoever_asks_is_told_the_same_however_often_and_in_whatever_order(chunks):
    patient, curious = GrowingMerge(CELL, D_MIN), GrowingMerge(CELL, D_MIN)
    mixed = random.Random(0).sample(chunks, len(chunks))
    for n in range(1, len(chunks) + 1):
        told = curious.statistics(mixed[:n])
    assert told == patient.statistics(chunks) == patient.statistics(reversed(chunks))


def test_fits_are_few(chunks, monkeypatch):
    fits = []
    monkeypatch.setattr(growing_merge, "join_chunks", lambda *given: fits.append(len(given[2])) or join_chunks(*given))
    merge = GrowingMerge(CELL, D_MIN)
    for n in range(len(chunks) + 1):
        merge.statistics(chunks[:n])
        merge.statistics(chunks[:n])
    assert fits == sorted(set(fits)), "each time of more chunks"
    assert fits[0] * PER_CHUNK >= growing_merge._FIRST
    many = [ChunkReflections("lyso/1", n, sealed(n), 1, chunks[0].store, "", None) for n in range(2000)]
    rungs = {len(growing_merge._first_chunks(many[:n])) for n in range(len(many))}
    assert 40 < len(rungs) < 60, "of 2,000 crystals one by one"


def test_an_output_that_is_gone_is_named(chunks):
    gone = replace(chunks[3], digest="f" * 64)
    with pytest.raises(DamagedOutput, match=r"chunk 3 of lyso/1"):
        GrowingMerge(CELL, D_MIN).statistics([*chunks[:3], gone])


def test_runs_that_grow_side_by_side_cost_no_more_fits(chunks, monkeypatch):
    """A run whose name comes first adds chunks while the other does: what was fitted stays the beginning."""
    fits = []
    monkeypatch.setattr(growing_merge, "join_chunks", lambda *given: fits.append(len(given[2])) or join_chunks(*given))
    two = [replace(chunk, run=f"lyso/{9 + chunk.chunk % 2}") for chunk in chunks]
    merge = GrowingMerge(CELL, D_MIN)
    for n in range(len(two) + 1):
        merge.statistics(two[:n])
    assert fits == sorted(set(fits))
    assert len(fits) == len({len(growing_merge._first_chunks(chunks[:n])) for n in range(4, len(chunks) + 1)})


def test_reflections_of_an_unknown_detector_are_merged_as_they_are(chunks):
    table = chunks[0].table()
    columns, why_not = observed_reflections(table, None)
    assert "unknown" in why_not
    assert np.array_equal(columns["intensity"], table["intensity"].to_numpy())
    columns, why_not = observed_reflections(table.drop_columns(["x"]), chunks[0].geometry)
    assert "no x" in why_not
    corrected, why_not = observed_reflections(table, chunks[0].geometry)
    assert why_not is None
    assert np.abs(corrected["intensity"]).sum() > 1.005 * np.abs(columns["intensity"]).sum()


def test_between_two_fits_nothing_is_learnt_of_how_fast_quality_grows():
    history, cc_half, counted = History(), Quantity("cc_half"), Quantity("completeness")
    for minutes, value in ((1, 0.5), (2, 0.5), (3, 0.6), (4, 0.6)):
        history.add(minutes, {cc_half: value, counted: value})
    assert [at for at, _ in history.points[cc_half]] == [1, 3]
    assert [at for at, _ in history.points[counted]] == [1, 2, 3, 4]
