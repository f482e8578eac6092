"""Real frames, which are not part of the repository: NEARLINE_TEST_DATA names the folder that has them."""

import os
from pathlib import Path

import pytest

__all__ = ["DATA", "THAUMATIN", "needs_thaumatin"]

DATA = Path(os.environ.get("NEARLINE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
# Stills of one thaumatin crystal: Diamond Light Source I24, PILATUS3 6M, CBF (dials/data-files, CC-BY 4.0).
THAUMATIN = DATA / "thaumatin-pilatus3-6m"
needs_thaumatin = pytest.mark.skipif(
    not THAUMATIN.is_dir(), reason=f"no thaumatin frames at {THAUMATIN}; set NEARLINE_TEST_DATA to the data folder"
)
