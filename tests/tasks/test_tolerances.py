"""What indexing puts up with, each fault on a set of its own, as `benchmarks.crystallography` measures it at length."""

import pytest

from benchmarks.crystallography import BEAM_OFF, lattices, tolerances
from benchmarks.frames import FrameSet

N = 64


def test_each_fault_alone_costs_hardly_a_lattice():
    figures = tolerances(FrameSet.make("1M", N))
    missed = [f"{one.name}: {one.value:g} {one.unit}" for one in figures if one.is_met is not True]
    assert len(figures) == 14
    assert missed == []


@pytest.mark.parametrize(("weaker", "off"), [(1.0, (0.0, 0.0)), (5.0, BEAM_OFF)], ids=["clean", "hard"])
def test_lattices_are_found_and_none_is_wrong(weaker, off):
    found, wrong, angle = lattices("1M" if weaker == 1 else "1M hard", FrameSet.make("1M", N, weaker=weaker), off)
    assert (found.is_met, wrong.value) == (True, 0)
    assert angle.value <= (0.014 if weaker == 1 else 0.025)
