"""Azimuthal integration by pyFAI, against plain NumPy and against where the rings of a crystal must be."""

import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import nearline
from flows.live_steps import run_steps
from storage.errors import BadRecipe
from streaming.service import Service, ServiceSettings
from tasks.chunk_frames import ChunkFrames
from tasks.chunk_job import analysis_header, analysis_mask
from tasks.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "pyfai_integration"
N_FRAMES = 12
Q_MIN, Q_MAX, N_BINS = 1.0, 4.7, 600
# The lattice constant of the simulated powder, and the rings of a simple cubic lattice up to 4.7 1/Å: h² + k² + l².
LATTICE = 4.156826
RINGS = 2 * np.pi / LATTICE * np.sqrt([1, 2, 3, 4, 5, 6, 8, 9])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one run of rings, sent through a service."""
    folder = tmp_path_factory.mktemp("rings")
    with (
        Service(ServiceSettings(root=folder, bind="tcp://127.0.0.1:*", sources=())) as service,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("NEARLINE_SERVICE", service.address)
        send_rings = runpy.run_path(str(HERE / "send_rings.py"))["send_rings"]
        assert send_rings("calibration", N_FRAMES) == "calibration/1"
    return folder


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> nearline.Run:
    monkeypatch.delenv("NEARLINE_SERVICE", raising=False)
    monkeypatch.syspath_prepend(str(HERE))
    return nearline.open(root / "calibration" / "1")


def with_params(**params) -> Recipe:
    recipe = load_recipe(HERE / "recipe.yaml").model_dump(mode="json")
    recipe["steps"][0]["params"] |= params
    return load_recipe(recipe)


def pattern_of(run: nearline.Run, recipe: Recipe) -> np.ndarray:
    """(bin,) of frame 3 by the recipe's step."""
    stream = run.detector
    chunk = ChunkFrames([stream[3].raw], analysis_header(stream, recipe), analysis_mask(stream, recipe), "digest")
    return np.array(run_steps(recipe, chunk)["intensity"], float)


def histogram_of(
    run: nearline.Run,
    polarization: float | None,
    shift_x: float = 0.0,
    tilt: float = 0.0,
    saturation: int = 60_000,
) -> np.ndarray:
    """(bin,) the same by plain trigonometry: counts over solid angle, each pixel in the bin of its centre.

    shift_x : px by which the beam is farther to the right than the header says. tilt : rad, about the vertical axis.
    """
    detector, frame, mask = run.detector.header.detector, run.detector[3].data, run.detector.pixel_mask
    y, x = np.indices(frame.shape) + 0.5
    x = (x - detector.beam_center_x - shift_x) * detector.pixel_size_x
    y = (y - detector.beam_center_y) * detector.pixel_size_y
    # The detector turned about the sample, its point of normal incidence at (0, 0).
    along = np.full(frame.shape, detector.detector_distance)
    x, along = np.cos(tilt) * x + np.sin(tilt) * along, np.cos(tilt) * along - np.sin(tilt) * x
    distance = np.sqrt(x**2 + y**2 + along**2)
    two_theta = np.arccos(along / distance)
    q = 4 * np.pi * np.sin(two_theta / 2) / detector.incident_wavelength
    weight = (detector.detector_distance / distance) ** 3
    if polarization is not None:
        azimuth = np.arctan2(y, x)
        weight *= 0.5 * (1 + np.cos(two_theta) ** 2 - polarization * np.cos(2 * azimuth) * np.sin(two_theta) ** 2)
    use = (mask == 0) & (frame <= saturation)
    bins = {"bins": N_BINS, "range": (Q_MIN, Q_MAX)}
    counts, _ = np.histogram(q[use], weights=frame[use].astype(float), **bins)
    norm, _ = np.histogram(q[use], weights=weight[use], **bins)
    return np.where(norm > 0, counts / np.maximum(norm, 1e-12), np.nan)


@pytest.mark.parametrize(
    ("params", "detector", "same"),
    [
        pytest.param({}, {}, {}, id="as-the-header-says"),
        pytest.param({"polarization": None}, {}, {"polarization": None}, id="no-polarisation"),
        pytest.param({}, {"beam_center_x": 241.3}, {"shift_x": 10.0}, id="recipe-moves-the-beam"),
        pytest.param({"rot1": 0.05}, {}, {"tilt": 0.05}, id="tilted"),
        pytest.param({}, {"saturation_value": 60}, {"saturation": 60}, id="saturated-pixels-left-out"),
    ],
)
def test_it_agrees_with_a_histogram_of_the_pixels(run, params, detector, same) -> None:
    recipe = with_params(split="no", **params).model_copy(update={"detector": detector})
    ours = pattern_of(run, recipe)
    other = histogram_of(run, **({"polarization": 0.99} | same))
    assert np.array_equal(np.isnan(ours), np.isnan(other))
    # pyFAI keeps q in float32: a pixel within that rounding of an edge may be in either bin. All others must agree.
    agree = np.isclose(ours, other, rtol=1e-4, equal_nan=True)
    assert agree.mean() > 0.95
    assert np.nanmax(abs(ours - other)) < 0.05 * np.nanmax(other)


def test_masked_pixels_have_no_part_in_it(run) -> None:
    pattern = pattern_of(run, with_params())
    assert np.nanmax(pattern) < 1000, "masked pixels hold 65535"
    recipe = with_params()
    mask = analysis_mask(run.detector, recipe).copy()
    mask[:] = 1
    chunk = ChunkFrames([run.detector[3].raw], analysis_header(run.detector, recipe), mask, "digest")
    with pytest.raises(BadRecipe, match="mask"):
        run_steps(recipe, chunk)


def test_the_integrator_is_kept_for_one_geometry_and_mask(run) -> None:
    import azimuthal

    azimuthal._integrator.cache_clear()
    first = pattern_of(run, with_params())
    assert np.array_equal(pattern_of(run, with_params()), first, equal_nan=True)
    assert (azimuthal._integrator.cache_info().hits, azimuthal._integrator.cache_info().misses) == (1, 1)
    moved = with_params().model_copy(update={"detector": {"detector_distance": 0.09}})
    assert not np.array_equal(pattern_of(run, moved), first, equal_nan=True)
    assert azimuthal._integrator.cache_info().misses == 2


def test_threads_share_an_integrator_and_get_the_same(run) -> None:
    stream, recipe = run.detector, with_params()
    header, mask = analysis_header(stream, recipe), analysis_mask(stream, recipe)

    def pattern(index: int) -> list[float]:
        return run_steps(recipe, ChunkFrames([stream[index].raw], header, mask, "digest"))["intensity"]

    alone = [pattern(index) for index in range(N_FRAMES)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(pattern, [*range(N_FRAMES)] * 3)) == alone * 3


def test_the_program_finds_the_rings_where_they_must_be(run, root, tmp_path) -> None:
    picture = tmp_path / "mean.png"
    done = subprocess.run(
        [sys.executable, str(HERE / "integrate_run.py"), str(run.folder), str(picture)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.stat().st_size > 10_000
    assert f"{N_FRAMES} frames, {len(RINGS)} rings: off by" in done.stdout
    assert float(re.search(r"off by ([\d.]+)e-3", done.stdout)[1]) < 2

    frames = run.processings["p1"].frames
    patterns = np.array(frames["intensity"].to_pylist(), float)
    q = np.linspace(Q_MIN, Q_MAX, N_BINS + 1)[:-1] + (Q_MAX - Q_MIN) / N_BINS / 2
    mean = patterns.mean(axis=0)
    for ring in RINGS:
        near = abs(q - ring) < 0.06
        assert q[near][np.argmax(mean[near])] == pytest.approx(ring, abs=0.011)
    # Of n planes at q a ring has n / q here, so that of 210, with 24 planes, is the strongest.
    assert np.allclose(frames["strongest_q"].to_numpy(), RINGS[4], atol=0.02)
    # Frames are found by what the step made of them.
    mean_intensity = frames["mean_intensity"].to_numpy()
    limit = float(np.median(mean_intensity))
    found = run.detector.where(f"mean_intensity > {limit!r} AND strongest_q > 3")
    assert found.indices.tolist() == np.flatnonzero(mean_intensity > limit).tolist()


def test_the_snippet_of_its_page_runs(run, root, monkeypatch, capsys) -> None:
    nearline.process(run.folder, HERE / "recipe.yaml", n_threads=1)
    monkeypatch.setenv("NEARLINE_ROOT", str(root))
    for block in re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    shape, n_bright = capsys.readouterr().out.splitlines()
    assert shape.startswith(f"({N_FRAMES}, {N_BINS}) 3.37")
    assert int(n_bright) > 0
