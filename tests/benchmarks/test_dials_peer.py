"""DIALS as a peer: each frame is answered, right, and its absence is a row and no error."""

import shutil

import pytest

from benchmarks import dials_peer
from benchmarks.frames import FrameSet, Options

HAS_DIALS = shutil.which("dials.stills_process") is not None


def rows_of(tmp_path):
    return {one.name: one for one in dials_peer.figures("1M", FrameSet.make("1M", 8), Options(tmp_path))}


@pytest.mark.campaign
def test_without_dials_our_rows_stay_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NEARLINE_DIALS_PYTHON", raising=False)
    rows = rows_of(tmp_path)
    assert {row.limit_name for row in rows.values()} == {"DIALS (not installed)"}
    assert rows["1M: lattices found, of 4"].value == 100
    assert rows["1M: wrong lattices"].is_met


@pytest.mark.dials
@pytest.mark.campaign
@pytest.mark.skipif(not HAS_DIALS, reason="DIALS is not installed (apt install dials)")
def test_dials_finds_the_true_lattice_from_pixels(tmp_path):
    rows = rows_of(tmp_path)
    assert rows["1M: lattices found, of 4"].limit_value == 100
    assert rows["1M: median misorientation"].limit_value < 0.2
    assert rows["1M hit, pixels to lattice"].limit_value > rows["1M hit, peak search"].limit_value > 1
