"""What a processing says of frames that it can do nothing with, in the notes of its summary."""

import re

import numpy as np
import pytest

from flows.first_look import words_of_frames, words_of_mask
from flows.run_processing import ProcessRequest, run_processing
from storage.codec import encode
from streaming.simulator import SimulatorSettings, make_frames
from tasks.recipe import crystallography
from tasks.unit_cell import UnitCell
from tests.flows.stored_runs import store_run

LYSOZYME = UnitCell(79.1, 79.1, 37.9, 90, 90, 90, "P 43 21 2")
SETTINGS = SimulatorSettings(size="512", n_frames=60, hit_fraction=0.5, seed=4)
SATURATED = 60_000


@pytest.fixture(scope="module")
def frames():
    simulator = SETTINGS.simulator()
    return simulator, make_frames(simulator, SETTINGS.n_frames)[0]


def notes_of(folder, simulator, blobs, **of_recipe) -> list[str]:
    run = store_run(folder, simulator, blobs, 10)
    recipe = crystallography(LYSOZYME).model_dump(mode="json") | of_recipe
    recipe["export"] = {"nexus": "none", "crystfel": False}
    return run_processing(ProcessRequest(run=str(run.path), recipe=recipe, n_threads=2))["notes"]


def test_nothing_is_said_of_frames_as_they_should_be(frames, tmp_path):
    assert notes_of(tmp_path, *frames) == []


def test_an_inverted_mask_is_said(frames, tmp_path):
    simulator, blobs = frames
    mask = np.ones(simulator.shape, np.uint8)
    mask[100:110] = 0
    np.save(tmp_path / "mask.npy", mask)
    said = notes_of(tmp_path, simulator, blobs, mask=str(tmp_path / "mask.npy"))
    assert said[0].startswith("The mask leaves 2.0 % of the pixels")
    assert "the other way round?" in said[0]
    assert said[1] == "No hit on any of the 60 frames so far."


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "The first frames hold 0 on every pixel"),
        (SATURATED, r"\d\d\.?\d* % of the pixels of the first frames are saturated, 60000 or more"),
        (65535, r"\d\d\.?\d* % of the pixels of the first frames are saturated"),
    ],
)
def test_frames_that_hold_nothing_are_said(frames, tmp_path, value, words):
    simulator, _ = frames
    blob = encode(np.full(simulator.shape, value, simulator.dtype), "bslz4")
    detector = {"saturation_value": SATURATED}
    said = notes_of(tmp_path, simulator, [blob] * SETTINGS.n_frames, detector=detector)
    assert re.match(words, said[0].replace("100 %", "99 %"))
    assert said[-1] == "No hit on any of the 60 frames so far."


def test_one_odd_frame_among_good_ones_is_not_talked_about():
    good, mask = np.random.default_rng(0).poisson(3.0, (50, 60)).astype(np.uint16), np.zeros((50, 60), np.uint8)
    full = np.full((50, 60), 65535, np.uint16)
    assert words_of_frames([full, good], mask, None) == ""
    assert words_of_frames([full, full], mask, None).startswith("100 % of the pixels of the first frames are saturated")
    assert words_of_frames([good], mask, None) == ""
    assert words_of_frames([], mask, None) == ""


def test_pixels_that_are_not_numbers_and_pixels_that_are_masked():
    lost, mask = np.full((50, 60), np.nan, np.float32), np.zeros((50, 60), np.uint8)
    assert words_of_frames([lost], mask, None).startswith("100 % of the pixels of the first frames are not numbers")
    lost[:20] = np.linspace(0, 1, 20 * 60).reshape(20, 60)
    mask[20:] = 1
    assert words_of_frames([lost], mask, None) == ""
    assert words_of_mask(mask).startswith("The mask leaves 40.0 % of the pixels")
    assert words_of_mask(np.zeros((50, 60), np.uint8)) == ""
