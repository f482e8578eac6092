"""The catalysis experiment, shortened: three processes, and a loop that closes itself by what was fitted."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import nearline

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "catalysis"
MOST_SHOTS = 600
RATE, GAIN_K = 0.02, 4.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of one experiment, with what the program said beside it."""
    folder = tmp_path_factory.mktemp("catalysis")
    options = ["--rate", "20", "--reaction-rate", str(RATE), "--gain", str(GAIN_K), "--shots", str(MOST_SHOTS)]
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), "--root", str(folder), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


@pytest.fixture
def run(root: Path) -> nearline.Run:
    return nearline.open(root / "catalysis" / "1")


def column(stream: nearline.Stream, name: str) -> np.ndarray:
    """(shot,) of a value in the rows' metadata; NaN where it is null."""
    return np.array([row.meta[name] for row in stream], float)


def example(name: str) -> ModuleType:
    """A file of the example as a module under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"catalysis_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_closes(run, root) -> None:
    xas, results, log = (run[name] for name in ("xas", "xas.results@live", "reactor"))
    assert 50 < len(xas) < MOST_SHOTS, "a decision ends the run, not the number of shots"
    assert run.state == "completed"
    assert all(account.is_balanced for account in run.ledger().values())
    assert [row.frame_index for row in results] == [row.frame_index for row in log] == list(range(len(xas)))
    assert np.median(column(log, "latency_s")) < 5
    assert (root / "catalysis-1.png").stat().st_size > 10_000
    assert f"{len(xas)} shots; more than 95% reduced" in (root / "said").read_text()


def test_the_fits_agree_with_the_truth_within_their_sigma(run) -> None:
    results = run["xas.results@live"]
    truth, sigma = column(run["xas"], "true_fraction_reduced"), column(results, "fraction_sigma")
    assert truth[-1] > 0.9
    assert 1e-4 < sigma.max() < 0.02
    squares = np.sum(((column(results, "fraction_reduced") - truth) / sigma) ** 2)
    # χ² with as many degrees of freedom as there are shots.
    assert abs(squares - len(truth)) < 5 * np.sqrt(2 * len(truth))
    assert column(results, "chi2_red").mean() == pytest.approx(1, abs=0.05)


def test_the_decisions_follow_from_the_fits(run) -> None:
    rows = [row.meta for row in run["xas.results@live"]]
    decide = example("decide").ConstantRate(RATE, gain_k=GAIN_K)
    for shot, row in enumerate(rows):
        expected = decide.after(shot, row["fraction_reduced"], row["fraction_sigma"])
        assert {name: row[name] for name in expected} == expected

    fraction, sigma = (np.array([row[name] for row in rows]) for name in ("fraction_reduced", "fraction_sigma"))
    assert rows[30]["fitted_rate"] == pytest.approx(np.polyfit(range(11, 31), fraction[11:31], 1)[0], rel=0.2, abs=1e-4)
    # σ is nearly the same in neighbours, so that of the newest may stand for all five.
    means = np.convolve(fraction, np.full(5, 0.2), "valid")
    first_enough = 4 + np.flatnonzero(means - 2 * sigma[4:] / np.sqrt(5) > 0.95)[0]
    assert abs(next(i for i, row in enumerate(rows) if "stop_reason" in row) - first_enough) <= 1


def test_the_instrument_obeys(run) -> None:
    rows = [row.meta for row in run["xas.results@live"]]
    shots = [row.meta for row in run["xas"]]
    decided = [shot["decided_by"] for shot in shots]
    assert decided == sorted(decided)
    assert decided[-1] >= len(shots) // 2
    for number, shot in enumerate(shots):
        assert shot["decided_by"] < number
        if shot["decided_by"] >= 0:
            assert shot["setpoint_k"] == rows[shot["decided_by"]]["next_setpoint_k"]
    assert shots[-1]["temperature_k"] - shots[0]["temperature_k"] > 30


def test_shots_are_found_by_fit_and_metadata_and_fitted_again_alike(run, monkeypatch) -> None:
    fraction = column(run["xas.results@live"], "fraction_reduced")
    hot = column(run["xas"], "temperature_k") > 500
    expected = np.flatnonzero((fraction > 0.5) & hot).tolist()
    assert 0 < len(expected) < len(fraction)

    monkeypatch.syspath_prepend(str(HERE))
    try:
        summary = nearline.process(run.folder, HERE / "recipe.yaml", data_source="xas", n_threads=1)
    finally:
        sys.modules.pop("steps", None)
    frames = run.processings[summary["processing"]].frames
    assert frames["fraction_reduced"].to_pylist() == fraction.tolist()
    selection = run["xas"].where("fraction_reduced > 0.5 AND temperature_k > 500")
    assert selection.indices.tolist() == expected


def test_the_snippet_of_its_page_runs(run, root, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "catalysis-data").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    assert f"more than 95% reduced {len(run['xas'])}" in capsys.readouterr().out
