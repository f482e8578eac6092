"""What reciprocalspaceship, other people's reader of streams and MTZ files, makes of ours."""

import numpy as np
import pytest
import reciprocalspaceship as rs

from flows.merging import MergeRequest, merge_runs
from flows.run_processing import ProcessRequest, run_processing
from storage.step_store import Processing


@pytest.fixture(scope="module")
def processed(simulated_run, recipe, tmp_path_factory):
    folder = simulated_run.copy_to(tmp_path_factory.mktemp("rs"))
    run_processing(ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json")))
    return Processing(folder, "p1")


def test_it_reads_every_reflection_of_the_stream_where_ours_says_it_is(processed):
    (path,) = processed.folder.glob("*.stream")
    read, ours = rs.read_crystfel(str(path), num_cpus=1).reset_index(), processed.reflections
    assert len(read) == len(ours) > 0
    assert len(np.unique(read["BATCH"])) == len(processed.table("crystals"))
    order = np.lexsort([read[name] for name in ("L", "K", "H", "BATCH")])
    crystal = np.cumsum(np.append(False, np.diff(ours["frame_index"].to_numpy()) != 0))
    ours_order = np.lexsort([*(ours[name].to_numpy() for name in "lkh"), crystal])
    for theirs, name, tolerance in (
        ("H", "h", 0), ("K", "k", 0), ("L", "l", 0), ("I", "intensity", 0.006), ("SigI", "sigma", 0.006),
        ("XDET", "x", 0.06), ("YDET", "y", 0.06),
    ):  # fmt: skip
        a, b = read[theirs].to_numpy(float)[order], ours[name].to_numpy()[ours_order]
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5, err_msg=name)
    # Computed from the orientation in the file: spots lie near Ewald's sphere, those of a wrong hand do not.
    assert np.median(np.abs(read["ewald_offset"])) < 0.003


def test_it_reads_the_merged_file_with_cell_and_group(processed, tmp_path):
    merge_runs(MergeRequest(runs=(str(processed.run),), d_min=4.0), tmp_path)
    merged = rs.read_mtz(str(tmp_path / "merged.mtz"))
    assert merged.cell.parameters == pytest.approx((79.1, 79.1, 37.9, 90, 90, 90), rel=1e-3)
    assert merged.spacegroup.hm == "P 43 21 2"
    assert merged.merged
    assert merged.compute_dHKL()["dHKL"].min() >= 4.0 - 1e-3
